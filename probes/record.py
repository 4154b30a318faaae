"""Records what a real training step allocates, one event a line, from PyTorch's own memory history.

This is the ground the planner's ops stand on: each case trains a small model of a real architecture with the
real Trainer (or trl's SFTTrainer) for a few steps and writes every allocation and free of CUDA memory with the
op and the Python line that made it. Needs a CUDA device.

    python -m vramplan.probes.record CASES.json OUT_DIR
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# dladdr names a frame from its symbol table: enough for op names, and fast where addr2line takes minutes.
os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import torch
import transformers

_BACKWARD = re.compile(r"(\w+Backward\d*|AccumulateGrad|CopyBackwards|CopySlices)::apply")
_OP = re.compile(r"at::_ops::(\w+)::(?:call|redispatch)")
_SKIP = re.compile(r"nn/modules/module\.py|_jit_internal|autograd/function\.py|utils/_contextlib\.py")


def _label(frames: list[dict[str, Any]]) -> str:
    """The op, the backward node and the innermost Python lines of an allocation."""
    op = node = ""
    lines: list[str] = []
    for frame in frames:
        name, file = frame["name"], frame["filename"]
        if file.endswith(".py"):
            if len(lines) < 5 and not _SKIP.search(file):
                lines.append(f"{'/'.join(file.split('/')[-2:])}:{frame['line']}:{name}")
            continue
        if found := _OP.search(name):
            op = op if len(op.split("<")) > 3 else f"{op}<{found.group(1)}" if op else found.group(1)
        if not node and (found := _BACKWARD.search(name)):
            node = found.group(1)
    return f"{op}|{node}|{' < '.join(lines)}"


def _history() -> list[list[Any]]:
    events: list[list[Any]] = []
    labels: dict[str, int] = {}
    for e in torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]:
        label = _label(e.get("frames", []))
        events.append([e["action"], e["addr"], e["size"], labels.setdefault(label, len(labels)), e["stream"]])
    return [list(labels), events]


class _Rows(torch.utils.data.Dataset):  # type: ignore[misc]
    """Token rows of `seq_len`; with `padded`, half to all of it, right-padded."""

    def __init__(self, vocab: int, seq_len: int, padded: bool, n: int = 64) -> None:
        g = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(n):
            ids = torch.randint(0, vocab, (seq_len,), generator=g)
            mask, labels = torch.ones(seq_len, dtype=torch.long), ids.clone()
            if padded:
                length = seq_len - (i * 37) % (seq_len // 2)
                mask[length:] = 0
                labels[length:] = -100
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _model(config: dict[str, Any], o: dict[str, Any]) -> Any:
    fields = {k: v for k, v in config.items() if k != "model_type"}
    cfg = transformers.AutoConfig.for_model(config["model_type"], **fields)
    cfg._attn_implementation = o["attention"]
    dtype = _DTYPES[o["weights_dtype"]]
    if o["method"] != "qlora":
        with torch.device("cuda"):
            return transformers.AutoModelForCausalLM.from_config(cfg, dtype=dtype, attn_implementation=o["attention"])
    if o.get("drawn"):
        return _drawn(cfg, o)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=dtype)
        model.save_pretrained(folder)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        quant = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=o.get("double_quant", True),
            bnb_4bit_compute_dtype=dtype if dtype != torch.float32 else torch.bfloat16,
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quant, dtype=dtype, device_map={"": 0}, attn_implementation=o["attention"]
        )


def _drawn(cfg: Any, o: dict[str, Any]) -> Any:
    """A model in 4 bit whose weights are drawn on the GPU one by one and quantised there: any size, no checkpoint."""
    import bitsandbytes as bnb
    from transformers.integrations import replace_with_bnb_linear

    dtype = _DTYPES[o["weights_dtype"]]
    quant = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=o.get("double_quant", True),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=dtype, attn_implementation=o["attention"])
        replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quant)
    model.tie_weights()
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                drawn = torch.randn(p.shape, device="cuda", dtype=dtype)
                weight = drawn * 0.02
                del drawn
                if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                    new = bnb.nn.Params4bit(
                        weight, requires_grad=False, quant_type="nf4", compress_statistics=o.get("double_quant", True)
                    ).to("cuda")
                else:
                    new = torch.nn.Parameter(weight, requires_grad=False)
                del weight
                made[id(p)] = new
            setattr(module, name, made[id(p)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cuda"), persistent=False)
    model.is_quantized, model.is_loaded_in_4bit = True, True
    model.quantization_method = transformers.utils.quantization_config.QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = quant
    model.hf_quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(quant, pre_quantized=False)
    return model.train()


def _tokenizer() -> Any:
    """The smallest tokenizer that trl accepts: the rows are tokens already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class _Marks(transformers.TrainerCallback):  # type: ignore[misc]
    """Counters at the moments shared measurements name."""

    def __init__(self, marks: list[Any]) -> None:
        self.marks = marks

    def _mark(self, name: str) -> None:
        torch.cuda.synchronize()
        self.marks.append(
            [
                name,
                len(self.marks),
                torch.cuda.memory_allocated(),
                torch.cuda.max_memory_allocated(),
                torch.cuda.memory_reserved(),
                torch.cuda.max_memory_reserved(),
                time.perf_counter(),
            ]
        )

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._mark("step_begin")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._mark("before_optimizer")
        torch.cuda.reset_peak_memory_stats()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._mark("after_optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark("step_end")


def run_case(case: dict[str, Any], record: bool = True) -> dict[str, Any]:
    """One case: model, adapter, `steps` training steps; its marks and, when recorded, every event."""
    o = {
        "attention": "sdpa", "weights_dtype": "bf16", "mixed_precision": "bf16", "gradient_checkpointing": True,
        "optimizer": "adamw_torch", "batch_size": 1, "seq_len": 512, "padded": False,
        "gradient_accumulation_steps": 1, "trainer": "transformers", "rank": 16, "lora_dropout": 0.0,
        "target_modules": "all-linear", "prepare_kbit": True, **case["options"],
    }  # fmt: skip
    torch.manual_seed(0)
    marks: list[Any] = []
    note = _Marks(marks)
    if record:
        torch.cuda.memory._record_memory_history(max_entries=400_000, stacks="all")
    model = _model(case["config"], o)
    note._mark("loaded")
    if o["method"] == "qlora" and o["prepare_kbit"]:
        import peft

        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=o["gradient_checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    lora = None
    if o["method"] != "full":
        import peft

        lora = peft.LoraConfig(
            r=o["rank"], lora_alpha=2 * o["rank"], lora_dropout=o["lora_dropout"], bias="none", task_type="CAUSAL_LM",
            target_modules=o["target_modules"],
        )  # fmt: skip
        if o["trainer"] == "transformers":
            model = peft.get_peft_model(model, lora)
    note._mark("ready")
    checkpointing = o["gradient_checkpointing"]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": o["batch_size"],
        "gradient_accumulation_steps": o["gradient_accumulation_steps"],
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "max_steps": o.get("steps", 3),
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "bf16": o["mixed_precision"] == "bf16",
        "fp16": o["mixed_precision"] == "fp16",
        "optim": o["optimizer"],
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        **o.get("args", {}),
    }
    rows = _Rows(case["config"]["vocab_size"], o["seq_len"], o["padded"])
    if o["trainer"] == "trl":
        import datasets
        import trl

        data = datasets.Dataset.from_list(
            [{k: v.tolist() for k, v in r.items() if k != "attention_mask"} for r in rows.rows]
        )
        common.pop("remove_unused_columns")
        args = trl.SFTConfig(**common, max_length=o["seq_len"], packing=False)
        trainer = trl.SFTTrainer(
            model=model, args=args, train_dataset=data, peft_config=lora, processing_class=_tokenizer()
        )
    else:
        if o["gradient_checkpointing"] and o["method"] == "lora":
            model.enable_input_require_grads()
        trainer = transformers.Trainer(model=model, args=transformers.TrainingArguments(**common), train_dataset=rows)
    trainer.add_callback(note)
    note._mark("trainer")
    trainer.train()
    note._mark("end")
    answer: dict[str, Any] = {"name": case["name"], "options": o, "config": case["config"], "marks": marks}
    if record:
        answer["labels"], answer["events"] = _history()
        torch.cuda.memory._record_memory_history(enabled=None)
    free, total = torch.cuda.mem_get_info()
    answer["used"] = total - free
    answer["reserved"] = torch.cuda.memory_reserved()
    if case.get("segments"):
        answer["segments"] = [
            [s["total_size"], s["segment_type"], [[b["size"], b["state"]] for b in s["blocks"]]]
            for s in torch.cuda.memory._snapshot()["segments"]
        ]
    return answer


def clean() -> int:
    """Frees what a case left; the bytes still allocated (0 when nothing leaks into the next case)."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def main(cases_file: str, out: str) -> None:
    """Runs every case of a JSON list and writes OUT_DIR/records.jsonl.gz, a line a case."""
    from importlib.metadata import version

    cases = json.loads(Path(cases_file).read_text())
    stack = {p: version(p) for p in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")}
    started = time.time()
    with gzip.open(Path(out) / f"{Path(cases_file).stem}.jsonl.gz", "wt", compresslevel=6) as file:
        for case in cases:
            if time.time() - started > float(os.environ.get("RECORD_SECONDS", "540")):
                print("out of time before", case["name"])
                break
            left = clean()
            try:
                answer = {"left_bytes": left, "stack": stack, **run_case(case, case.get("record", True))}
            except Exception as error:
                traceback.print_exc(limit=-4)
                answer = {"name": case["name"], "error": f"{type(error).__name__}: {error}"}
                torch.cuda.memory._record_memory_history(enabled=None)
            file.write(json.dumps(answer) + "\n")
            print(
                f"{time.time() - started:6.1f}",
                case["name"],
                answer.get("error", ""),
                left,
                len(answer.get("events", [])),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
