"""A plan as a config that other frameworks run, or as a training script.

What a target's keys cannot say (whether rows are padded, how many examples there are) stands in a comment that
`vramplan check` reads. Whether a file says the plan is not assumed but read back: keys that come to another run are
refused, or, where nobody asked for the option, the plan takes what the framework does.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.planner import scripts
from vramplan.planner.configs import interpret
from vramplan.planner.documents import MARK
from vramplan.planner.errors import UsageError, printable, reason, shown, unknown
from vramplan.planner.files import write_text
from vramplan.planner.frameworks import AXOLOTL, LLAMAFACTORY, SFT, TRANSFORMERS, TRL, Framework
from vramplan.planner.launchers import ACCELERATE
from vramplan.planner.links import HOST_GPUS, hosts
from vramplan.planner.training import OPTIONS, TARGET_GROUPS, TrainingOptions, flags, parse_options, unused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vramplan.planner.plan import Plan

_LONG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What data and environment decide, and no key does.
_BESIDE = frozenset(("padded", "examples", "tokens_per_example", "expandable_segments"))


@dataclass(frozen=True, slots=True)
class Export:
    """A file's text, the options it runs, and what the framework made otherwise than vramplan's defaults."""

    text: str
    options: TrainingOptions
    notes: tuple[str, ...]


def read_target(target: str | None) -> str:
    """A target's name as it is; raises UsageError for any other."""
    *names, last = TARGETS
    if target is None:
        raise UsageError(f"no format is named; add --to with {', '.join(names)} or {last}")
    if target == "deepspeed":
        raise UsageError("DeepSpeed's own JSON is not written; ZeRO is written by --to accelerate")
    if target not in TARGETS:
        raise unknown("target", target, TARGETS, "--to")
    return target


def export(plan: Plan, target: str, *, command: str, dataset: str | None = None) -> Export:
    """The plan as `target` runs it; `command`, version and date stand in a comment at its top.

    Raises UsageError for an unknown target and where the target cannot run this plan.
    """
    target = read_target(target)
    if plan.options.num_gpus > 1 and target != "accelerate":
        raise UsageError(
            f"how many GPUs run it is nothing that --to {target} writes, and num_gpus is {plan.options.num_gpus}; "
            "export with --num-gpus 1, and what launches it with --to accelerate"
        )
    model = _hub_name(plan)
    options, notes = _spelled(plan), []
    for _ in OPTIONS:  # each round settles what the last one found; two are enough so far
        framework, keys = TARGETS[target](options, model)
        apart = _beside(options, keys) if target == "accelerate" else _apart(options, _read_back(keys, framework))
        adopted = {name: value for name, value in apart.items() if _adopts(target, name, options)}
        if not adopted:
            break
        notes += [f"{name} is {_typed(value)} there: {_why(name, framework)}" for name, value in adopted.items()]
        options = _with(options, adopted)
    for name, value in apart.items():
        if target != "accelerate" and name not in _BESIDE:
            raise UsageError(
                f"{framework.title} makes {name} {_typed(value)}, and {_typed(getattr(options, name))} is asked for: "
                f"{_why(name, framework)}; choose {flags({name: value})} or --to script"
            )
    beside = {name: getattr(options, name) for name in apart}
    words = [shlex.quote(printable(model))] if target == "accelerate" else []
    marked = " ".join([*words, flags(beside)]).strip()
    top = [
        f"# vramplan {__version__} made this on {date.today().isoformat()}: {printable(command)}",
        f"# {_run(target, options)}",
        *(f"# {note}" for note in (*notes, *(_in_script(options) if target == "accelerate" else ()))),
        *([f"{MARK} {marked}"] if marked else []),
    ]
    said = _accelerate_comments(options) if target == "accelerate" else {}
    body = scripts.script(keys, dataset) if target == "script" else _yaml(keys | _data(target, dataset), said)
    return Export("\n".join([*top, "", body]), options, tuple(notes))


def save(found: Export, file: str, *, force: bool) -> None:
    """Writes the export whole or not at all; raises UsageError where the file exists and `force` does not say so."""
    path = Path(file)
    try:
        if path.exists() and not force:
            raise UsageError(f"{shown(file)} exists; name another file, or add --force to overwrite it (--output)")
        write_text(path, found.text)
    except OSError as error:
        raise UsageError(f"cannot write {shown(file)}: {reason(error)} (--output)") from None


_RUN = {
    "axolotl": "axolotl train FILE",
    "llamafactory": "llamafactory-cli train FILE",
    "trl": "trl sft --config FILE",
    "accelerate": "accelerate launch --config_file FILE your_script.py",
    "script": "python FILE",
}


def _run(target: str, options: TrainingOptions) -> str:
    """How to run the file, in the environment that the plan is for."""
    setting = options.expandable_segments
    allocator = "" if target == "script" or setting == (target == "axolotl") else f"{_ALLOCATOR}:{setting} "
    machines = _machines(options.num_gpus)
    if machines == 1:
        return f"Run: {allocator}{_RUN[target]}"
    each = f"on each of the {machines} machines, RANK from 0 to {machines - 1}"
    return f"Run {each}: {allocator}{_RUN[target].replace('FILE', 'FILE --machine_rank RANK')}"


def _machines(num_gpus: int) -> int:
    """As few as hold the GPUs; accelerate starts as many processes on each (num_processes // num_machines)."""
    machines = hosts(num_gpus)
    if num_gpus % machines:
        fewer = num_gpus // machines * machines
        raise UsageError(
            f"num_gpus is {num_gpus}, on {machines} machines of up to {HOST_GPUS} GPUs, and accelerate starts as many "
            f"on each; choose --num-gpus {fewer} or {fewer + machines}"
        )
    return machines


_ALLOCATOR = "PYTORCH_ALLOC_CONF=expandable_segments"


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def _read_back(
    keys: Mapping[str, Any], framework: Framework, marked: Mapping[str, Any] | None = None
) -> TrainingOptions:
    try:
        reading = interpret(keys, framework, marked=marked, asked={"model": "given"})
        for text in (*(f"{key}: {each.text}" for key, each in reading.refused.items()), *reading.notes):
            raise UsageError(text)
        return parse_options(reading.options)
    except UsageError as error:
        raise UsageError(f"{framework.title} cannot run this plan: {error} (--to)") from None


def _apart(options: TrainingOptions, found: TrainingOptions) -> dict[str, Any]:
    """What the file would make of options that the plan has otherwise."""
    ours, theirs = options.as_dict(), found.as_dict()
    return {
        name: getattr(found, name)
        for name in OPTIONS
        if ours[name] != theirs[name] and name not in unused(options.method, options.parallel, options.phases)
    }


def _adopts(target: str, name: str, options: TrainingOptions) -> bool:
    """Whether the plan takes what the framework does: nobody asked, and it is not for data to decide."""
    return target != "accelerate" and name not in options.given and name not in _BESIDE - {"expandable_segments"}


def _with(options: TrainingOptions, adopted: dict[str, Any]) -> TrainingOptions:
    asked = {name: value for name, value in options.as_dict().items() if value is not None}
    return replace(parse_options(asked | adopted), given=options.given)


def _beside(options: TrainingOptions, keys: Mapping[str, Any]) -> dict[str, Any]:
    """All that accelerate's own keys do not say, where it is not vramplan's default."""
    # other defaults follow from these
    first = {name: getattr(options, name) for name in ("method", "trainer", "num_gpus", "parallel")}
    default = parse_options(first).as_dict() | {name: getattr(TrainingOptions(), name) for name in first}
    said = interpret(keys, ACCELERATE, asked={"model": "given"}).options
    beside = {
        name: getattr(options, name)
        for name, value in options.as_dict().items()
        if value is not None and value != default[name] and name not in said
    }
    for name in _apart(options, _read_back(keys, ACCELERATE, beside)):
        raise UsageError(f"{ACCELERATE.title} does not run this plan's {name}; {_why(name, ACCELERATE)} (--to)")
    return beside


def _why(name: str, framework: Framework) -> str:
    if name in framework.fixed:
        return framework.fixed[name][1]
    keys = framework.rules[name].keys if name in framework.rules else ()
    return f"{', '.join(keys)} {'decides' if len(keys) == 1 else 'decide'} it" if keys else "no key says it"


def _hub_name(plan: Plan) -> str:
    """The model as other frameworks find it: on the Hub, or by its path."""
    reference = plan.model
    if reference.source == "dict":
        raise UsageError("a config given as a dict has no name that another framework could load; name a model (MODEL)")
    if reference.source == "file":
        return reference.detail.removesuffix("/config.json")
    if plan.bundled:
        return next((alias for alias in plan.bundled.aliases if "/" in alias), reference.name)
    return reference.name


def _spelled(plan: Plan) -> TrainingOptions:
    """The plan's options, with what attention and mlp mean for this model spelled out."""
    options = plan.options
    group = any(name in TARGET_GROUPS[1:] for name in options.target_modules)
    return replace(options, target_modules=tuple(plan.counts.names)) if group else options


def _yaml(keys: Mapping[str, Any], said: Mapping[str, str]) -> str:
    """The keys as YAML; what is `said` of one stands in a comment above it."""
    import yaml

    text: str = yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True, width=100)
    lines = []
    for line in text.split("\n"):
        name = line.strip().partition(":")[0]
        if name in said:
            lines.append(f"{' ' * (len(line) - len(line.lstrip()))}# {said[name]}")
        lines.append(line)
    return "\n".join(lines)


def _data(target: str, dataset: str | None) -> dict[str, Any]:
    """The data set's keys; a name that the reader has to put in where none was given."""
    name = dataset or scripts.PLACEHOLDER
    keys: dict[str, dict[str, Any]] = {
        "axolotl": {"datasets": [{"path": name, "type": "chat_template"}]},
        "llamafactory": {"dataset": name, "template": "default"},
        "trl": {"dataset_name": name},
    }
    return keys.get(target, {})


# -------------------------------------------------------------------------------------------------------- the targets


def _trl(o: TrainingOptions, model: str) -> tuple[Framework, dict[str, Any]]:
    keys = {
        "model_name_or_path": model,
        "dtype": _LONG[o.weights_dtype],
        "attn_implementation": o.attention,
        **({"load_in_4bit": True, "use_bnb_nested_quant": o.double_quant} if o.method == "qlora" else {}),
        **(_lora(o, "use_peft", True, "lora_r", "lora_target_modules", o.target)),
        "max_length": o.seq_len,
        **_arguments(o),
        "gradient_checkpointing": o.gradient_checkpointing,
        "bf16": o.mixed_precision == "bf16",
        "fp16": o.mixed_precision == "fp16",
        "output_dir": "out",
    }
    return TRL, keys


def _llamafactory(o: TrainingOptions, model: str) -> tuple[Framework, dict[str, Any]]:
    pure = o.weights_dtype == "bf16" and o.mixed_precision == "no"
    kernels = {"sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2"}
    keys = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if o.lora else "full",
        **({"quantization_bit": 4, "double_quantization": o.double_quant} if o.method == "qlora" else {}),
        **_lora(o, None, None, "lora_rank", "lora_target", "all" if o.target == "all-linear" else ",".join(o.target)),
        "cutoff_len": o.seq_len,
        **_arguments(o),
        "disable_gradient_checkpointing": not o.gradient_checkpointing,
        "use_reentrant_gc": False,
        "flash_attn": kernels[o.attention],
        **({"pure_bf16": True} if pure else {"bf16": o.mixed_precision == "bf16", "fp16": o.mixed_precision == "fp16"}),
        "output_dir": "out",
    }
    return LLAMAFACTORY, keys


# axolotl's words for what weights are held in and autocast's dtype.
_AXOLOTL_PRECISION: dict[tuple[str, str], dict[str, Any]] = {
    ("bf16", "bf16"): {"bf16": True},
    ("bf16", "no"): {"bf16": "full"},
    ("fp16", "fp16"): {"fp16": True, "bf16": False},
    ("fp16", "no"): {"bf16": False, "float16": True},
    ("fp32", "no"): {"bf16": False},
}


def _axolotl(o: TrainingOptions, model: str) -> tuple[Framework, dict[str, Any]]:
    nested = {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}} if not o.double_quant else {}
    off = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    linear = {"lora_target_linear": True} if o.target == "all-linear" else {"lora_target_modules": o.target}
    keys = {
        "base_model": model,
        **({"load_in_4bit": True, **nested} if o.method == "qlora" else {}),
        **(_lora(o, "adapter", o.method, "lora_r", "", None) | linear | off if o.lora else {}),
        "sequence_len": o.seq_len,
        "micro_batch_size": o.batch_size,
        "gradient_accumulation_steps": o.gradient_accumulation_steps,
        "num_epochs": o.epochs,
        "optimizer": o.optimizer,
        "learning_rate": 0.0002 if o.lora else 0.00002,
        "gradient_checkpointing": o.gradient_checkpointing,
        "attn_implementation": o.attention,
        **_AXOLOTL_PRECISION.get((o.weights_dtype, o.mixed_precision), {"bf16": True}),
        "output_dir": "out",
    }
    return AXOLOTL, keys


def _accelerate(o: TrainingOptions, _: str) -> tuple[Framework, dict[str, Any]]:
    how, config, machines = "NO" if o.num_gpus == 1 else "MULTI_GPU", {}, _machines(o.num_gpus)
    if o.parallel == "fsdp":
        how = "FSDP"
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": o.reshard_after_forward,
            "fsdp_offload_params": o.cpu_offload,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
    elif o.parallel.startswith("zero"):
        how = "DEEPSPEED"
        device = "cpu" if o.cpu_offload else "none"
        third = o.parallel == "zero3"
        config["deepspeed_config"] = {
            "zero_stage": int(o.parallel[-1]),
            "offload_optimizer_device": device,
            "offload_param_device": device if third else "none",
            "gradient_accumulation_steps": o.gradient_accumulation_steps,
            "zero3_init_flag": third,
            **({"zero3_save_16bit_model": False} if third else {}),
            # torchrun's own, as with FSDP: any other needs a hostfile
            **({"deepspeed_multinode_launcher": "standard"} if machines > 1 else {}),
        }
    keys = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": how,
        **config,
        "mixed_precision": o.mixed_precision,
        "num_machines": machines,
        "num_processes": o.num_gpus,
        "machine_rank": 0,
        **({"main_process_ip": _ADDRESS, "main_process_port": 29500} if machines > 1 else {}),
        "main_training_function": "main",
        "use_cpu": False,
    }
    return ACCELERATE, keys


_ADDRESS = "PUT-THE-ADDRESS-OF-MACHINE-0-HERE"


def _accelerate_comments(o: TrainingOptions) -> dict[str, str]:
    """What to know of accelerate's keys, by key."""
    last = _machines(o.num_gpus) - 1
    several = {
        "num_machines": f"with {o.num_gpus // (last + 1)} GPUs each: num_processes is shared out evenly",
        "machine_rank": f"each machine's own, from 0 to {last}; --machine_rank goes before it",
        "main_process_ip": "where all the others reach machine 0",
    }
    if o.method == "qlora":  # accelerate/utils/fsdp_utils.py, fsdp2_prepare_model
        loading = "without effect on a 4-bit model, which each rank loads on its GPU"
    else:
        loading = (
            "false, as planned: each rank loads the whole model in host memory; true: the first rank alone does, by "
            "accelerate's documentation"
        )
    if o.lora:  # transformers/trainer.py, save_model
        saving = "without effect here: the adapter is gathered and saved by itself"
    else:
        saving = (
            "only DeepSpeed's checkpoint is saved then, which zero_to_fp32.py turns into weights; true also writes "
            "model.safetensors, which the first rank puts together in host memory"
        )
    return {
        "zero3_save_16bit_model": saving,
        "fsdp_cpu_ram_efficient_loading": loading,
        "fsdp_activation_checkpointing": "TrainingArguments' gradient_checkpointing takes the same memory; never both",
        **(several if last else {}),
    }


def _in_script(o: TrainingOptions) -> list[str]:
    """What the script that accelerate launches has to say, so that the plan is what runs."""
    if o.num_gpus == 1:
        return []
    first = [
        "your_script.py has to make its TrainingArguments before from_pretrained: they choose each process's GPU, and",
        "let ZeRO 3 shard the model while it loads",
    ]
    if o.method != "qlora" or o.parallel not in ("fsdp", "zero3"):
        return first
    dtype = _compute_dtype(o)
    return [
        *first,
        f"your_script.py has to load the model with BitsAndBytesConfig(bnb_4bit_quant_storage=torch.{dtype}),",
        "the dtype that it computes in: 4-bit weights stored as uint8, the default, are not sharded",
    ]


def _compute_dtype(o: TrainingOptions) -> str:
    return _LONG[o.weights_dtype if o.mixed_precision == "no" else o.mixed_precision]


def _script(o: TrainingOptions, model: str) -> tuple[Framework, dict[str, Any]]:
    """The arguments of the script's calls, by the names that `documents` reads them under."""
    keys = {
        "MODEL": model,
        "SEQ_LEN": o.seq_len,
        "PADDED": o.padded,
        **({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if o.expandable_segments else {}),
        **(
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": o.double_quant,
                "bnb_4bit_quant_storage": _compute_dtype(o),
            }
            if o.method == "qlora"
            else {}
        ),
        "dtype": _LONG[o.weights_dtype],
        "attn_implementation": o.attention,
        "prepare_model_for_kbit_training": o.prepare_kbit,
        **_lora(o, "LoraConfig()", True, "r", "target_modules", o.target),
        **_arguments(o),
        "gradient_checkpointing": o.gradient_checkpointing,
        "bf16": o.mixed_precision == "bf16",
        "fp16": o.mixed_precision == "fp16",
    }
    if o.trainer == "trl":
        return SFT, keys | {"max_length": o.seq_len}
    return TRANSFORMERS, keys


def _arguments(o: TrainingOptions) -> dict[str, Any]:
    """TrainingArguments that every framework on them shares."""
    return {
        "per_device_train_batch_size": o.batch_size,
        "gradient_accumulation_steps": o.gradient_accumulation_steps,
        "num_train_epochs": o.epochs,
        "optim": o.optimizer,
        "learning_rate": 0.0002 if o.lora else 0.00002,
    }


def _lora(o: TrainingOptions, switch: str | None, on: Any, rank: str, target: str, modules: Any) -> dict[str, Any]:
    if not o.lora:
        return {}
    switched = {switch: on} if switch else {}
    named = {target: modules} if target else {}
    return {**switched, rank: o.rank, "lora_alpha": o.lora_alpha, "lora_dropout": o.lora_dropout, **named}


TARGETS: dict[str, Callable[[TrainingOptions, str], tuple[Framework, dict[str, Any]]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "accelerate": _accelerate,
    "script": _script,
}
