"""A training run for real, from the options that a plan takes: model, adapter, data and Trainer.

Trace, probe and recorder build their runs here, so that what they see is one and the same run. Weights are random and
tokens synthetic: memory depends on neither. Nothing is downloaded, and no code that comes with a model is run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import transformers

from vramplan.planner.errors import UsageError, shown
from vramplan.planner.training import TARGET_GROUPS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import peft

    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.training import TrainingOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_HOST_MEMORY = ("fsdp", "zero1", "zero2")  # where a model is loaded that is not quantised
ROWS = 64  # of the data at least; a Trainer that runs out of them begins again
_REMOVE_NONE = {"remove_unused_columns": False}
# Fields of a config.json that say where it comes from or how it was saved, not what the model is.
_PROVENANCE = (
    "model_type",
    "auto_map",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
)


# ----------------------------------------------------------------------------------------------------------- the model


def hf_config(config: Mapping[str, Any], options: TrainingOptions) -> transformers.PretrainedConfig:
    """transformers' config of a config.json given as a dict; of a composite one, its text model's.

    Raises UsageError for a model_type that the installed transformers does not have, and for what it does not take.
    """
    version, kind = transformers.__version__, config.get("model_type")
    fields = {name: value for name, value in config.items() if name not in _PROVENANCE}
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"transformers {version} has no model_type {shown(kind)}; install a version that has it")
    try:
        whole = transformers.AutoConfig.for_model(kind, **fields)
        found = whole.get_text_config(decoder=True)
        text = fields.get("text_config", {})
        if found is not whole and "tie_word_embeddings" in config and "tie_word_embeddings" not in text:
            found.tie_word_embeddings = config["tie_word_embeddings"]
        found._attn_implementation = options.attention
    except Exception as error:  # each config class judges its fields in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"transformers {version} does not take this {kind} config: {reason} (MODEL)") from None
    return found


def load(config: Mapping[str, Any], options: TrainingOptions) -> transformers.PreTrainedModel:
    """The base model on the current CUDA device, with random weights, quantised for qlora.

    Where it is not quantised, it is in host memory for fsdp, zero1 and zero2, and its weights are not set; for zero3
    each weight is partitioned as it is made, once the arguments are (`deepspeed_arguments`).
    """
    cfg = hf_config(config, options)
    if options.method == "qlora":
        return _quantised(cfg, options)
    if options.parallel in IN_HOST_MEMORY:
        return _in_host_memory(cfg, options)
    if options.parallel == "zero3":
        return from_config(cfg, options)
    with torch.device("cuda"):
        return from_config(cfg, options)


def from_config(cfg: transformers.PretrainedConfig, options: TrainingOptions) -> transformers.PreTrainedModel:
    """The model of a config, on torch's default device."""
    return transformers.AutoModelForCausalLM.from_config(
        cfg, dtype=DTYPES[options.weights_dtype], attn_implementation=options.attention
    )


def _in_host_memory(cfg: transformers.PretrainedConfig, options: TrainingOptions) -> transformers.PreTrainedModel:
    """The model as from_pretrained leaves it for fully_shard, which moves it to the GPU unit by unit, or for DeepSpeed.

    Its weights are pages that nobody has written, so that no rank holds a copy; they are float32 at once where
    accelerate would make them so (fsdp2_prepare_model).
    """
    with torch.device("meta"):
        model = from_config(cfg, options)
    if options.parallel == "fsdp" and options.method == "full" and options.mixed_precision != "no":
        model = model.to(torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():  # tables of frequencies are worked out by their module's constructor
        if any(True for _ in module.buffers(recurse=False)) and hasattr(module, "config"):
            for name, buffer in type(module)(module.config).named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    return model.train()


def fill(model: torch.nn.Module, optimizer: Any) -> None:
    """Random numbers in every weight, or in this rank's shard of it: products of zeros run faster than others.

    DeepSpeed's optimizer holds weights of its own, by which it replaces the model's.
    """
    own = getattr(getattr(optimizer, "optimizer", None), "single_partition_of_fp32_groups", ())
    with torch.no_grad():
        for p in (*model.parameters(), *own):
            local = getattr(p, "_local_tensor", p).data
            if local.is_floating_point():
                local.normal_(0, 0.02)


def quantization_config(options: TrainingOptions) -> transformers.BitsAndBytesConfig:
    """NF4 as QLoRA has it, computing in autocast's dtype, or in the weights' own without autocast.

    Where weights are sharded it is stored in that dtype too: what is stored as uint8 is not.
    """
    compute = options.weights_dtype if options.mixed_precision == "no" else options.mixed_precision
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=DTYPES[compute],
        bnb_4bit_quant_storage=DTYPES[compute] if options.parallel in ("fsdp", "zero3") else torch.uint8,
    )


def with_4bit_linears(
    cfg: transformers.PretrainedConfig, options: TrainingOptions
) -> tuple[transformers.PreTrainedModel, transformers.BitsAndBytesConfig]:
    """The model on the meta device, its linear layers replaced as from_pretrained(quantization_config=...) does."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    quant = quantization_config(options)
    with torch.device("meta"):
        model = from_config(cfg, options)
        skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
        replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=quant)
    model.tie_weights()
    return model, quant


def mark_quantised(model: transformers.PreTrainedModel, quant: transformers.BitsAndBytesConfig) -> None:
    """Sets what from_pretrained sets on a quantised model, and what PEFT and the Trainer look for."""
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = transformers.utils.quantization_config.QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = quant
    model.hf_quantizer = transformers.quantizers.auto.AutoHfQuantizer.from_config(quant, pre_quantized=False)


def _quantised(cfg: transformers.PretrainedConfig, options: TrainingOptions) -> transformers.PreTrainedModel:
    """Weights drawn on the GPU one by one and quantised there: any size, no checkpoint (planner/loading.py)."""
    import bitsandbytes as bnb

    model, quant = with_4bit_linears(cfg, options)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        narrow = isinstance(module, bnb.nn.Linear4bit)  # which is built in float32
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                dtype = DTYPES[options.weights_dtype] if narrow else p.dtype
                drawn = torch.randn(p.shape, device="cuda", dtype=dtype)
                weight = drawn * 0.02
                del drawn
                if narrow and name == "weight":
                    made[id(p)] = bnb.nn.Params4bit(
                        weight,
                        requires_grad=False,
                        quant_type="nf4",
                        compress_statistics=options.double_quant,
                        quant_storage=quant.bnb_4bit_quant_storage,
                        module=module,  # which keeps the quantisation state where fully_shard replaces the weight
                    ).to("cuda")
                else:
                    made[id(p)] = torch.nn.Parameter(weight, requires_grad=False)
                del weight
            setattr(module, name, made[id(p)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cuda"), persistent=False)
    mark_quantised(model, quant)
    return model.train()


# --------------------------------------------------------------------------------------------------------- the adapter


def lora_config(options: TrainingOptions, counts: ParameterCounts | None = None) -> peft.LoraConfig | None:
    """PEFT's config of the adapter; None for full fine-tuning.

    `counts` spell out what "attention" and "mlp" mean for this architecture; without them only all-linear and names
    can be asked for, and UsageError is raised otherwise.
    """
    if not options.lora:
        return None
    import peft

    names: Any = options.target if counts is None else counts.names
    if counts is None and options.target in TARGET_GROUPS[1:]:
        raise UsageError(
            f"what {options.target} means is not known for this architecture; use all-linear or names "
            "(--target-modules)"
        )
    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=names if isinstance(names, str) else list(names),
    )


def adapt(model: Any, options: TrainingOptions, lora: peft.LoraConfig | None) -> Any:
    """The model as it is handed to the trainer: with its adapter, unless SFTTrainer adds that itself."""
    if options.prepare_kbit:
        import peft

        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if lora is not None and options.trainer == "transformers":
        import peft

        model = peft.get_peft_model(model, lora)
        if options.gradient_checkpointing and options.method == "lora":
            model.enable_input_require_grads()
    return model


# ----------------------------------------------------------------------------------------------------- data and Trainer


class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
    """Whole steps' worth of rows of `seq_len` random tokens; with `padded`, half to all of it, right-padded."""

    def __init__(self, vocab_size: int, options: TrainingOptions) -> None:
        a_step = options.batch_size * options.gradient_accumulation_steps * options.num_gpus
        self.length = a_step * -(-ROWS // a_step)  # else an epoch would end in a smaller batch
        self.vocab_size, self.seq_len, self.padded = vocab_size, options.seq_len, options.padded

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.vocab_size, (self.seq_len,), generator=torch.Generator().manual_seed(i))
        mask, labels = torch.ones(self.seq_len, dtype=torch.long), ids.clone()
        if self.padded:
            length = self.seq_len - (i * 37) % max(self.seq_len // 2, 1)
            mask[length:] = 0
            labels[length:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_arguments(options: TrainingOptions, folder: str | Path, steps: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments and of trl's SFTConfig for `steps` optimizer steps.

    `folder` is where a Trainer may write; nothing is saved there. `more` overrides.
    """
    checkpointing = options.gradient_checkpointing
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "bf16": options.mixed_precision == "bf16",
        "fp16": options.mixed_precision == "fp16",
        "optim": options.optimizer,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **(_fsdp(options) if options.parallel == "fsdp" else {}),
        **more,
    }


def _fsdp(options: TrainingOptions) -> dict[str, Any]:
    """FSDP2, each decoder layer a unit; offloaded gradients are added up in host memory, by gloo."""
    config = {"reshard_after_forward": options.reshard_after_forward, "cpu_offload": options.cpu_offload}
    return {
        "fsdp": True,
        "fsdp_config": config,
        **({"ddp_backend": "cuda:nccl,cpu:gloo"} if options.cpu_offload else {}),
    }


def deepspeed_arguments(options: TrainingOptions, arguments: Mapping[str, Any]) -> transformers.TrainingArguments:
    """The arguments of a run under DeepSpeed, made before the model: those of zero3 partition what is made after them.

    Its configuration is accelerate's own where the user gives none: what `accelerate launch --use_deepspeed` sets
    (accelerate/utils/launch.py), and accelerate/utils/dataclasses.py, DeepSpeedPlugin, reads.
    """
    device = "cpu" if options.cpu_offload else "none"
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": options.parallel[-1],
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": device,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": device if options.parallel == "zero3" else "none",
    }
    return transformers.TrainingArguments(**_REMOVE_NONE, **arguments)


def trainer(
    model: Any,
    options: TrainingOptions,
    lora: peft.LoraConfig | None,
    arguments: Mapping[str, Any] | transformers.TrainingArguments,
) -> transformers.Trainer:
    """The trainer that `options` name, on `model` as `adapt` left it, with synthetic rows."""
    rows = Rows(model.config.vocab_size, options)
    if isinstance(arguments, transformers.TrainingArguments):
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    if options.trainer == "trl":
        import datasets
        import trl

        steps = arguments["max_steps"] * options.batch_size * options.gradient_accumulation_steps
        columns: list[dict[str, list[int]]] = []
        for row in (rows[i] for i in range(min(len(rows), steps))):  # each is made in Python: no more than are trained
            length = int(row["attention_mask"].sum())
            columns.append({name: row[name][:length].tolist() for name in ("input_ids", "labels")})
        # its collator pads to the longest row of a batch, and a padded batch is to be seq_len long
        multiple = options.seq_len if options.padded else None
        args = trl.SFTConfig(**arguments, max_length=options.seq_len, packing=False, pad_to_multiple_of=multiple)
        return trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(columns),
            peft_config=lora,
            processing_class=_tokenizer(),
        )
    args = transformers.TrainingArguments(**{**_REMOVE_NONE, **arguments})
    return transformers.Trainer(model=model, args=args, train_dataset=rows)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The smallest tokenizer that trl accepts: the rows are tokens already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
