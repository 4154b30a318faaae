"""Writes data/deepspeed.json.gz: what DeepSpeed's own code allocates in a training step, seen without a GPU.

    python tests/record_deepspeed.py

One process stands for two ranks (torch's fake process group) and trains a small model on the CPU; a dispatch mode sees
every storage come and go. Under ZeRO 1 and 2 it is the second rank, which keeps more gradients here than the first.
Needs deepspeed. test_zero.py holds plans against the file.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "deepspeed.json.gz"
RANKS, SEQ_LEN, LEAST = 2, 64, 1000  # bytes of a storage that is recorded
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
TIED = {**CONFIG, "tie_word_embeddings": True}
# Options of a plan; "tied": of the model whose head shares the embedding's matrix.
CASES: tuple[dict[str, Any], ...] = (
    {"parallel": "zero1", "method": "full"},
    {"parallel": "zero1", "method": "full", "gradient_accumulation_steps": 3},
    {"parallel": "zero1", "method": "lora"},
    {"parallel": "zero2", "method": "full"},
    {"parallel": "zero2", "method": "full", "gradient_accumulation_steps": 3},
    {"parallel": "zero2", "method": "lora"},
    {"parallel": "zero3", "method": "full"},
    {"parallel": "zero3", "method": "full", "gradient_checkpointing": False},
    {"parallel": "zero3", "method": "lora"},
    {"parallel": "zero3", "method": "lora", "rank": 256},
    {"parallel": "zero3", "method": "lora", "gradient_checkpointing": False},
    {"parallel": "zero3", "method": "full", "tied": True},
    {"parallel": "zero3", "method": "lora", "tied": True, "gradient_checkpointing": False},
)


def asked(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case's config and options."""
    options = {"seq_len": SEQ_LEN, "num_gpus": RANKS, **case}
    return TIED if options.pop("tied", False) else CONFIG, options


def main() -> None:
    """Each case in a process of its own."""
    import subprocess

    found = []
    for number in range(len(CASES)):
        part = FILE.with_suffix(".part")
        subprocess.run([sys.executable, __file__, str(number), str(part)], check=True)
        found.append(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
    with gzip.GzipFile(FILE, "wb", mtime=0) as file:
        file.write(json.dumps(found, separators=(",", ":")).encode())


def record(case: dict[str, Any], file: str) -> None:
    """Trains two steps, and writes the second one's events."""
    rank = 0 if case["parallel"] == "zero3" else RANKS - 1
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    import deepspeed
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from vramplan import plan
    from vramplan.probes import workload

    class Seen(TorchDispatchMode):  # type: ignore[misc]
        """The births and deaths of storages: their numbers, and those negated."""

        def __init__(self) -> None:
            super().__init__()
            self.events: list[int] = []
            self.sizes: list[int] = [0]
            self.alive: dict[int, weakref.ref[Any]] = {}

        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, list | tuple) else (out,):
                if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                    self.see(each.untyped_storage())
            return out

        def see(self, storage: Any) -> None:
            key, name = storage._cdata, len(self.sizes)
            if key in self.alive or storage.nbytes() < LEAST:
                return
            self.sizes.append(storage.nbytes())
            self.events.append(name)

            def died(_: object) -> None:
                del self.alive[key]
                self.events.append(-name)

            self.alive[key] = weakref.ref(storage, died)

    distributed.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    deepspeed.init_distributed("gloo")
    config, given = asked(case)
    made = plan(config, **given)
    options, accumulation = made.options, made.options.gradient_accumulation_steps
    settings = {  # what accelerate's DeepSpeedPlugin makes of its defaults
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(options.parallel[-1])}, "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    kept = HfDeepSpeedConfig(settings)  # by which transformers partitions a model as it is made
    seen = Seen()
    with seen:
        model = workload.from_config(workload.hf_config(config, options), options)
        model = workload.adapt(model, options, workload.lora_config(options, made.counts))
        model.train()
        model.config.use_cache = False
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [[p for name, p in trained if ("norm" in name) == norms] for norms in (False, True)]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-5)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        del model, optimizer, trained, groups
        rows = workload.Rows(config["vocab_size"], options)
        marks: list[tuple[str, int]] = []
        for _ in range(3):  # ZeRO 3 knows the order of modules from the third forward on
            marks.append(("step", len(seen.events)))
            for micro in range(accumulation):
                batch = {name: tensor[None].clone() for name, tensor in rows[micro].items()}
                loss = engine(**batch).loss
                engine.backward(loss)
                del loss
                if micro == accumulation - 1:
                    marks.append(("update", len(seen.events)))
                engine.step()
    at = marks[-2][1]
    held: set[int] = set()
    for event in seen.events[:at]:
        held.add(event) if event > 0 else held.discard(-event)
    answer = {
        "case": case,
        "deepspeed": deepspeed.__version__,
        "start_bytes": sum(seen.sizes[name] for name in held),
        "update": marks[-1][1] - at,  # the event at which clipping and the optimizer's step begin
        "events": [seen.sizes[event] if event > 0 else -seen.sizes[-event] for event in seen.events[at:]],
    }
    print(case, len(answer["events"]), answer["start_bytes"])
    Path(file).write_text(json.dumps(answer), encoding="utf-8")
    del kept


if __name__ == "__main__":
    if len(sys.argv) == 3:
        record(CASES[int(sys.argv[1])], sys.argv[2])
    else:
        main()
