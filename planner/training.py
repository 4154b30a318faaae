"""What the user asks for: every option of a training run, its values, its limits, and what contradicts what.

`OPTIONS` is the one place where options are named: the command line, Python, profile files and JSON all read it.
"""

from __future__ import annotations

import operator
import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

from vramplan.planner import optimizer
from vramplan.planner.errors import UsageError, shown, unknown
from vramplan.planner.versions import as_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.layers import Architecture
    from vramplan.planner.stack import Stack

TARGET_GROUPS = ("all-linear", "attention", "mlp")
SUPPORTED_TRAINERS = ("transformers", "trl")  # the others are known, and answered with "planned in a later version"
# SFTTrainer never calls prepare_model_for_kbit_training: there it is the user's own line, if any
_PREPARES_KBIT = {"transformers": True, "trl": False, "unsloth": False}

_LORA = ("rank", "lora_alpha", "lora_dropout", "target_modules")
_KBIT = ("double_quant", "prepare_kbit")
_SHARDING = ("reshard_after_forward", "cpu_offload")
SHARING = ("num_gpus", "parallel", *_SHARDING)
PHASES = ("loading", "training", "evaluation", "saving", "generation", "merging")
OF_TRAINING = frozenset({"training", "evaluation", "saving", "generation"})  # in its process; others have their own
# What belongs to a phase alone
_OF_PHASES = {
    "evaluation": ("per_device_eval_batch_size", "prediction_loss_only", "eval_accumulation_steps", "eval_examples"),
    "generation": ("generation_batch_size", "prompt_len", "max_new_tokens"),
}
PHASE_OPTIONS = ("phases", *(name for names in _OF_PHASES.values() for name in names))
_MOST_TOKENS = 10**8  # ten times the longest context of any model
_INTEGER = r"[+-]?\d{1,40}"
_DECIMAL = r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(e[+-]?\d{1,3})?"  # no inf, no nan, no 1_000


class Option(NamedTuple):
    """One option: its values, its default as help shows it, and what it means.

    Numbers lie in `least` to `most`; with `below`, `most` itself is too much; with `above`, `least` is too little.
    """

    name: str
    kind: Literal["choice", "integer", "number", "flag", "names"]
    default: str
    help: str
    choices: tuple[str, ...] = ()
    least: int = 1
    most: int = 0
    below: bool = False
    above: bool = False

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")


def _options(*options: Option) -> dict[str, Option]:
    return {option.name: option for option in options}


OPTIONS = _options(
    Option("method", "choice", "qlora", "What is trained, and over what base.", ("qlora", "lora", "full")),
    Option("rank", "integer", "16", "LoRA's rank.", most=10**6),
    Option(
        "lora_alpha", "number", "2 x rank", "LoRA's scaling; no memory depends on it.", least=0, most=10**6, above=True
    ),
    Option("lora_dropout", "number", "0.0", "Dropout before LoRA's A.", least=0, most=1, below=True),
    Option(
        "target_modules",
        "names",
        "all-linear",
        "What LoRA adapts: all-linear, attention, mlp, or PEFT's names, separated by commas.",
    ),
    Option("batch_size", "integer", "1", "Sequences on one GPU in one micro-step.", most=10**6),
    Option("seq_len", "integer", "2048", "Tokens of a sequence.", most=_MOST_TOKENS),
    Option("padded", "flag", "no", "A batch has rows shorter than seq_len, so a mask is built."),
    Option("gradient_accumulation_steps", "integer", "1", "Micro-steps for one optimizer step.", most=10**6),
    Option("gradient_checkpointing", "flag", "yes", "Recompute each decoder layer in backward instead of keeping it."),
    Option("optimizer", "choice", "adamw_torch_fused", "transformers' name of it.", optimizer.NAMES),
    Option("weights_dtype", "choice", "bf16", "What the base is held in.", ("bf16", "fp16", "fp32")),
    Option("mixed_precision", "choice", "bf16", "What autocast computes in.", ("bf16", "fp16", "no")),
    Option("double_quant", "flag", "yes", "qlora: quantise the quantisation constants too."),
    Option("prepare_kbit", "flag", "yes, no with trl", "qlora: call PEFT's prepare_model_for_kbit_training."),
    Option("attention", "choice", "sdpa", "The attention kernel.", ("sdpa", "eager", "flash_attention_2")),
    Option(
        "trainer",
        "choice",
        "transformers",
        "Whose training loop: transformers.Trainer's, or trl's SFTTrainer's with its own loss.",
        ("transformers", "trl", "unsloth"),
    ),
    Option("expandable_segments", "flag", "no", "PyTorch's allocator setting."),
    Option("num_gpus", "integer", "1", "GPUs of the run, each with a process of its own.", most=1024),
    Option(
        "parallel",
        "choice",
        "ddp for several GPUs",
        "How several GPUs share the work.",
        ("none", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    ),
    Option("reshard_after_forward", "flag", "yes", "fsdp: drop gathered weights after the forward pass."),
    Option(
        "cpu_offload",
        "flag",
        "no",
        "fsdp, zero3: keep weights and optimizer states in host memory; zero1, zero2: optimizer states alone.",
    ),
    Option("examples", "integer", "1000", "Training examples, for time and cost.", most=10**12),
    Option("tokens_per_example", "integer", "seq_len", "Tokens of an example, for time and cost.", most=_MOST_TOKENS),
    Option("epochs", "number", "3", "Passes over the examples, for time and cost.", least=0, most=10**6, above=True),
    Option(
        "phases",
        "names",
        "training",
        f"What of a run is planned: {', '.join(PHASES)}, separated by commas. The figures are the highest one's.",
        PHASES,
    ),
    Option("per_device_eval_batch_size", "integer", "8", "evaluation: sequences in one batch.", most=10**6),
    Option("prediction_loss_only", "flag", "yes", "evaluation: no compute_metrics, so that no logits are kept."),
    Option(
        "eval_accumulation_steps",
        "integer",
        "none",
        "evaluation: batches until what is kept moves to the host.",
        most=10**6,
    ),
    Option("eval_examples", "integer", "none", "evaluation: examples in all, where logits are kept.", most=10**9),
    Option("generation_batch_size", "integer", "1", "generation: prompts in one batch.", most=10**6),
    Option("prompt_len", "integer", "seq_len - max_new_tokens", "generation: tokens of a prompt.", most=_MOST_TOKENS),
    Option("max_new_tokens", "integer", "256", "generation: tokens after the prompt.", most=_MOST_TOKENS),
)


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """A training run, validated: every option of the contract with the value that is used.

    What a method does not use is off: without LoRA `rank`, `lora_alpha` and `lora_dropout` are 0 and `target_modules`
    is empty; without qlora `double_quant` and `prepare_kbit` are false; what belongs to a phase that is not asked for
    is 0. `as_dict` shows those as null. `given` names what was asked for, as opposed to default.
    """

    method: str = "qlora"
    rank: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    batch_size: int = 1
    seq_len: int = 2048
    padded: bool = False
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    weights_dtype: str = "bf16"
    mixed_precision: str = "bf16"
    double_quant: bool = True
    prepare_kbit: bool = True
    attention: str = "sdpa"
    trainer: str = "transformers"
    expandable_segments: bool = False
    num_gpus: int = 1
    parallel: str = "none"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    examples: int = 1000
    tokens_per_example: int = 2048
    epochs: float = 3
    phases: tuple[str, ...] = ("training",)
    per_device_eval_batch_size: int = 0
    prediction_loss_only: bool = True
    eval_accumulation_steps: int = 0
    eval_examples: int = 0
    generation_batch_size: int = 0
    prompt_len: int = 0
    max_new_tokens: int = 0
    given: frozenset[str] = frozenset()

    @property
    def lora(self) -> bool:
        """Whether an adapter is trained."""
        return self.method != "full"

    @property
    def bitsandbytes(self) -> bool:
        """Whether the run quantises with bitsandbytes, or steps with its optimizer."""
        return self.method == "qlora" or optimizer.get(self.optimizer).implementation == "bnb"

    @property
    def steps_in_deepspeed(self) -> bool:
        """Whether DeepSpeed's own optimizer steps, in host memory."""
        return self.cpu_offload and self.parallel.startswith("zero")

    @property
    def target(self) -> str | list[str]:
        """`target_modules` as PEFT takes it: a group's name alone, else a list of names."""
        one = self.target_modules[0] if len(self.target_modules) == 1 else None
        return one if one in TARGET_GROUPS else list(self.target_modules)

    def as_dict(self) -> dict[str, Any]:
        """Every option as used; null where the method has no such thing. `parse_options` of it gives the same run."""
        values: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS}
        values["target_modules"], values["phases"] = self.target, list(self.phases)
        values |= {name: values[name] or None for name in ("eval_accumulation_steps", "eval_examples")}
        return values | dict.fromkeys(unused(self.method, self.parallel, self.phases))


def parse_options(options: Mapping[str, object]) -> TrainingOptions:
    """The run that `options` describe; None stands for an option that was not given.

    Numbers may be strings of digits, as a command line has them. Raises UsageError, naming the option and its value,
    for an unknown name, a wrong type, a value out of range, and for options that contradict each other.
    """
    for name in options:
        if name not in OPTIONS:
            raise unknown("option", name, OPTIONS)
    given = {name: read_value(OPTIONS[name], value) for name, value in options.items() if value is not None}
    method = given.get("method", "qlora")
    values = dict(given)
    if "num_gpus" in given and given["num_gpus"] > 1:
        values.setdefault("parallel", "ddp")
    phases = given.get("phases", ("training",))
    _refuse_unused(method, phases, given)
    values |= {name: _OFF[name] for name in unused(method, values.get("parallel", "none"), phases) if name in _OFF}
    values.setdefault("prepare_kbit", _PREPARES_KBIT[values.get("trainer", "transformers")])
    values.setdefault("lora_alpha", 2 * values.get("rank", 16))
    values.setdefault("tokens_per_example", values.get("seq_len", 2048))
    if "evaluation" in phases:
        values.setdefault("per_device_eval_batch_size", 8)  # transformers/training_args.py
    if "generation" in phases:
        values.setdefault("generation_batch_size", 1)
        new = values.setdefault("max_new_tokens", 256)
        values.setdefault("prompt_len", max(values.get("seq_len", 2048) - new, 1))
    parsed = TrainingOptions(**values, given=frozenset(given))
    _refuse_contradictions(parsed)
    _refuse_unsupported(parsed)
    return parsed


def for_method(options: Mapping[str, object], method: str) -> dict[str, object]:
    """The same question of another method: what that one does not know is left out."""
    without = unused(method, "", PHASES)
    return {name: value for name, value in options.items() if name not in without} | {"method": method}


def for_gpus(options: Mapping[str, object], num_gpus: object) -> dict[str, object]:
    """The same question of so many GPUs: of one, how the work is shared is left out."""
    without = SHARING if num_gpus == 1 else ("num_gpus",)
    number = {} if num_gpus == 1 else {"num_gpus": num_gpus}
    return {name: value for name, value in options.items() if name not in without} | number


def flags(options: Mapping[str, object]) -> str:
    """Options as they are typed, ready for a shell: "--rank 8 --no-padded"."""
    words: list[str] = []
    for name, option in OPTIONS.items():
        value = options.get(name)
        if value is None:
            continue
        if option.kind == "flag":
            words.append(option.flag if _flag(option, value) else option.flag.replace("--", "--no-", 1))
        else:
            words += [option.flag, shlex.quote(typed(value))]
    return " ".join(words)


def typed(value: Any) -> str:
    """An option's value as it is typed."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def refuse_phases(options: Mapping[str, object], what: str) -> None:
    """Raises UsageError where phases are asked of what runs training steps alone."""
    for name in PHASE_OPTIONS:
        if options.get(name) is not None:
            raise UsageError(f"{name} is for plans, and {what} runs training steps alone; leave it out")


def settle(
    options: TrainingOptions, architecture: Architecture, gpu: Gpu | None = None, stack: Stack | None = None
) -> tuple[TrainingOptions, tuple[str, ...]]:
    """The options as this model takes them, and warnings where it or the GPU does not take them well.

    Raises UsageError for what transformers refuses for this model: an attention kernel, checkpointing, or sequences
    longer than its table of learned positions.
    """
    warnings: list[str] = []
    name = architecture.model_type
    offered = (as_of(architecture, stack.transformers) if stack else architecture).attention_implementations
    if options.attention not in offered:
        if "attention" in options.given:
            choices = " or ".join(f"--attention {each}" for each in offered)
            raise UsageError(f"transformers has no {options.attention} attention for {name}; choose {choices}")
        warnings.append(f"transformers has no sdpa attention for {name}, so it takes {offered[0]}")
        options = replace(options, attention=offered[0])
    if options.trainer == "trl" and options.lora and architecture.output.name in options.target_modules:
        # sft_trainer.py: "Applying a PEFT adapter to `lm_head` is not supported"
        raise UsageError(
            f"target_modules names {architecture.output.name}, and SFTTrainer refuses an adapter on the head; "
            "leave it out or choose --trainer transformers"
        )
    if options.gradient_checkpointing and not architecture.gradient_checkpointing:
        raise UsageError(f"transformers cannot checkpoint {name}; add --no-gradient-checkpointing")
    warnings += _positions(options, architecture)
    options, more = _on_gpu(options, gpu)
    return options, (*warnings, *more)


# ---------------------------------------------------------------------------------------------------------- one value


def read_value(option: Option, value: object) -> Any:
    """One option's value as `parse_options` takes it; raises UsageError for what it cannot be."""
    if option.name == "optimizer" and isinstance(value, str):
        optimizer.get(value)  # knows more to say of a wrong name
    if option.kind == "choice":
        if not isinstance(value, str) or value not in option.choices:
            raise unknown(option.name, value, option.choices, option.flag)
        return value
    if option.kind == "flag":
        return _flag(option, value)
    if option.kind == "names":
        return _names(option, value)
    return _number(option, value)


def _flag(option: Option, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        no = option.flag.replace("--", "--no-", 1)
        raise UsageError(f"{option.name} is {shown(value)}; it must be true or false ({option.flag} or {no})")
    return value


def _names(option: Option, value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{option.name} is {shown(value)}; it must be a name or a list of names ({option.flag})")
    found = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not found:
        raise UsageError(
            f"{option.name} is {shown(value)}, which names nothing; name one or leave it out ({option.flag})"
        )
    for name in found:
        if option.choices and name not in option.choices:
            raise unknown(option.name, name, option.choices, option.flag)
    return tuple(name for name in option.choices if name in found) or found


def _number(option: Option, value: object) -> int | float:
    number = _as_number(value)
    low, high = option.least, option.most
    if number is not None and low <= number <= high:  # false for nan
        edge = (option.above and number == low) or (option.below and number == high)
        if option.kind == "number" and not edge:
            return number
        if option.kind == "integer" and number == int(number):
            return int(number)
    what = "a whole number" if option.kind == "integer" else "a number"
    start = f"above {low} and" if option.above else f"from {low} and" if option.below else f"from {low}"
    end = f"below {high:,}" if option.below else f"up to {high:,}"
    raise UsageError(f"{option.name} is {shown(value)}; it must be {what} {start} {end} ({option.flag})")


def _as_number(value: object) -> int | float | None:
    """The number that `value` is or spells in plain decimals; None for anything else, booleans included."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(_INTEGER, text, re.ASCII):
            return int(text)
        return float(text) if re.fullmatch(_DECIMAL, text, re.ASCII | re.IGNORECASE) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    return operator.index(value) if isinstance(value, SupportsIndex) else None  # numpy's integers


# ------------------------------------------------------------------------------------------------------ contradictions

_OFF: dict[str, Any] = {
    "rank": 0,
    "lora_alpha": 0,
    "lora_dropout": 0.0,
    "target_modules": (),
    "double_quant": False,
    "prepare_kbit": False,
    "prediction_loss_only": True,
}


def unused(method: str, parallel: str, phases: Sequence[str]) -> list[str]:
    """The options that mean nothing in such a run."""
    return [
        *(name for phase, names in _OF_PHASES.items() if phase not in phases for name in names),
        *(_LORA if method == "full" else ()),
        *(_KBIT if method != "qlora" else ()),
        *(_SHARDING if parallel in ("none", "ddp") else ()),
    ]


def _refuse_unused(method: str, phases: Sequence[str], given: Mapping[str, Any]) -> None:
    for phase, names in _OF_PHASES.items():
        for name in names:
            if name in given and phase not in phases:
                raise UsageError(
                    f"{name} {str(given[name]).lower()} belongs to {phase}, and the phases are {', '.join(phases)}; "
                    f"leave it out or add --phases {','.join([*phases, phase])}"
                )
    for name in unused(method, "", PHASES):
        if name in given:
            owners = "lora and qlora" if name in _LORA else "qlora"
            value = given[name]
            value = ",".join(value) if isinstance(value, tuple) else str(value).lower()
            raise UsageError(
                f"{name} {shown(value).strip(chr(39))} belongs to {owners}, and the method is {method}; "
                f"leave it out or change --method"
            )


def _refuse_contradictions(run: TrainingOptions) -> None:
    low = {run.weights_dtype, run.mixed_precision}
    if {"fp16", "bf16"} <= low:
        raise UsageError(
            f"weights_dtype {run.weights_dtype} and mixed_precision {run.mixed_precision} contradict each other; "
            "choose the same for both, or --weights-dtype fp32"
        )
    if run.method == "full" and run.weights_dtype == run.mixed_precision == "fp16" and run.parallel in ("none", "ddp"):
        # torch/amp/grad_scaler.py: "Attempting to unscale FP16 gradients."; fsdp's are float32
        raise UsageError(
            "mixed_precision fp16 cannot train fp16 weights, since torch's GradScaler refuses to unscale fp16 "
            "gradients; add --weights-dtype fp32 or --mixed-precision no"
        )
    if run.attention == "flash_attention_2" and run.weights_dtype == "fp32" and run.mixed_precision == "no":
        raise UsageError(
            "attention flash_attention_2 computes in fp16 or bf16 only, and here everything is fp32; "
            "add --mixed-precision bf16 or choose --attention sdpa"
        )
    _refuse_phases(run)
    _refuse_parallel(run)


def _refuse_phases(run: TrainingOptions) -> None:
    if "merging" in run.phases and not run.lora:
        raise UsageError(
            "phases names merging, and full fine-tuning has no adapter to merge; leave it out or choose --method lora"
        )
    if not run.prediction_loss_only and not (run.eval_accumulation_steps or run.eval_examples):
        raise UsageError(
            "without prediction_loss_only an evaluation keeps the logits of all its batches; say how many examples "
            "those are (--eval-examples) or after how many batches they move to the host (--eval-accumulation-steps)"
        )
    if run.prediction_loss_only and run.eval_examples:
        raise UsageError(
            f"eval_examples {run.eval_examples} matters only where logits are kept; leave it out or add "
            "--no-prediction-loss-only"
        )
    if run.num_gpus > 1 and run.phases != ("training",):
        raise UsageError(
            f"num_gpus is {run.num_gpus}, and only training is planned for several GPUs; leave out --phases"
        )


def _refuse_parallel(run: TrainingOptions) -> None:
    parallel = run.parallel
    if parallel == "fsdp":
        _refuse_fsdp(run)
    if parallel.startswith("zero"):
        _refuse_zero(run)
    if parallel != "none" and run.num_gpus == 1:
        raise UsageError(f"parallel {parallel} needs several GPUs and num_gpus is 1; add --num-gpus or leave it out")
    if parallel == "none" and run.num_gpus > 1:
        raise UsageError(f"num_gpus {run.num_gpus} needs a way to share the work; choose --parallel ddp")
    for name in _SHARDING:
        if name in run.given and parallel in ("none", "ddp"):
            owners = "fsdp" if name == "reshard_after_forward" else "fsdp and zero"
            raise UsageError(f"{name} belongs to {owners}, and parallel is {parallel}; add --parallel fsdp")


def _refuse_fsdp(run: TrainingOptions) -> None:
    used = optimizer.get(run.optimizer)
    if used.implementation == "bnb":
        # torch/distributed/tensor/_sharding_prop.py: "... does not have a sharding strategy registered"
        raise UsageError(
            f"optimizer {run.optimizer} cannot step fsdp's sharded tensors, since bitsandbytes' kernels have no rule "
            "for them; choose --optimizer adamw_torch_fused or --parallel ddp"
        )
    if used.name == "adafactor":
        # transformers/optimization.py: "aten.add_.Tensor got mixed torch.Tensor and DTensor"
        raise UsageError(
            "optimizer adafactor cannot step fsdp's sharded tensors, since its factors are plain ones; "
            "choose --optimizer adamw_torch_fused or --parallel ddp"
        )
    if run.trainer != "transformers":
        raise UsageError(
            f"trainer {run.trainer} is not planned under fsdp, whose hooks its fused head goes past; "
            "choose --trainer transformers or --parallel ddp"
        )


def _refuse_zero(run: TrainingOptions) -> None:
    if run.mixed_precision == "no" and run.weights_dtype != "fp32":
        # deepspeed/runtime/engine.py, __check_params
        raise UsageError(
            f"parallel {run.parallel} without mixed precision takes fp32 weights alone, and weights_dtype is "
            f"{run.weights_dtype}; add --mixed-precision {run.weights_dtype} or --weights-dtype fp32"
        )
    if run.mixed_precision == "fp16":
        raise UsageError(
            f"mixed_precision fp16 is not planned under {run.parallel}: DeepSpeed scales the loss by itself, and what "
            "its checks of the gradients take has not been recorded; choose --parallel fsdp, or bf16 if the GPU has it"
        )
    if run.steps_in_deepspeed and run.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        # accelerate/utils/deepspeed.py, map_pytorch_optim_to_deepspeed
        raise UsageError(
            f"optimizer {run.optimizer} is not what steps offloaded weights under {run.parallel}: accelerate puts "
            "DeepSpeed's own CPU optimizer in its place; choose --optimizer adamw_torch, or leave out --cpu-offload"
        )
    if not run.reshard_after_forward:
        raise UsageError(
            f"reshard_after_forward false is fsdp's, and the parallel is {run.parallel}, whose stage says what is "
            "shared: zero2 keeps weights whole, zero3 partitions them; leave it out or choose --parallel fsdp"
        )
    if run.trainer != "transformers":
        raise UsageError(
            f"trainer {run.trainer} is not planned under {run.parallel}; "
            "choose --trainer transformers or --parallel ddp"
        )


def _refuse_unsupported(run: TrainingOptions) -> None:
    if run.trainer not in SUPPORTED_TRAINERS:
        raise UsageError(
            f"trainer {run.trainer} is planned in a later version; "
            f"known now: {', '.join(SUPPORTED_TRAINERS)} (--trainer)"
        )


# ------------------------------------------------------------------------------------------------- the model, the GPU


def _positions(options: TrainingOptions, architecture: Architecture) -> list[str]:
    most = architecture.config.get("max_position_embeddings")
    if not isinstance(most, int):
        return []
    ways = {layer.attention.position for layer in architecture.kinds}
    warnings = []
    for name, length, flag in (
        ("seq_len", options.seq_len, "--seq-len"),
        ("prompt_len + max_new_tokens", options.prompt_len + options.max_new_tokens, "--prompt-len"),
    ):
        if length > most and "learned" in ways:
            raise UsageError(
                f"{name} {length} is longer than the {most} learned positions of this {architecture.model_type} "
                f"(max_position_embeddings); choose at most {most} ({flag})"
            )
        if length > most and "rotary" in ways:
            warnings.append(f"{name} {length} is beyond the {most} positions of the model (max_position_embeddings)")
    return warnings


def _on_gpu(options: TrainingOptions, gpu: Gpu | None) -> tuple[TrainingOptions, list[str]]:
    """The options as this GPU takes them: what would be bf16 by default is fp16 where there is no bf16."""
    warnings: list[str] = []
    if gpu is None:
        return options, warnings
    low = [name for name in ("weights_dtype", "mixed_precision") if getattr(options, name) == "bf16"]
    if gpu.bf16 is False and low:
        weights = "fp32" if options.method == "full" else "fp16"  # GradScaler refuses fp16 weights' gradients
        as_fp16: dict[str, Any] = {"weights_dtype": weights, "mixed_precision": "fp16"}
        flags = " ".join(f"{OPTIONS[name].flag} {as_fp16[name]}" for name in low)
        if options.given.isdisjoint(low):
            options = replace(options, **{name: as_fp16[name] for name in low})
            _refuse_contradictions(options)
            warnings.append(f"{gpu.name} has no bf16, so this is the plan with {flags}")
        else:
            warnings.append(f"{gpu.name} has no bf16, which this plan asks for; there, train with {flags}")
    if gpu.flash_attention_2 is False and options.attention == "flash_attention_2":
        warnings.append(f"{gpu.name} cannot run flash_attention_2; choose --attention sdpa there")
    return options, warnings
