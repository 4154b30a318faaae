"""What would lower the peak, and by how much: each change planned, not guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError
from vramplan.planner.memory import run_of
from vramplan.planner.quick import peak_bytes
from vramplan.planner.training import (
    OPTIONS,
    SUPPORTED_TRAINERS,
    TrainingOptions,
    flags,
    for_method,
    parse_options,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vramplan.planner.device import Device
    from vramplan.planner.layers import Architecture
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.stack import Stack

WORTH = 0.005  # of the peak: what saves less is not shown


@dataclass(frozen=True, slots=True)
class Advice:
    """One change of the options and the allocated bytes that it saves at the peak; negative where it costs them."""

    change: dict[str, Any]
    saves_bytes: int

    @property
    def flags(self) -> str:
        """The change as it is typed."""
        return flags(self.change)


def advise(
    architecture: Architecture,
    options: TrainingOptions,
    on: Device,
    stack: Stack,
    count: Callable[[Architecture, TrainingOptions], ParameterCounts],
) -> tuple[Advice, ...]:
    """The changes worth making, the best first, then what twice the batch would cost."""

    def peak(run: TrainingOptions) -> int:
        return peak_bytes(run_of(architecture, run, on, count(architecture, run)))

    now = peak(options)
    found: list[Advice] = []
    for change in _changes(options):
        try:
            changed, _ = settle(_with(options, change), architecture, on.gpu, stack)
            found.append(Advice(change, now - peak(changed)))
        except UsageError:  # not for this model or method
            continue
    better = sorted((a for a in found if a.saves_bytes > WORTH * now), key=lambda a: -a.saves_bytes)
    twice = {"batch_size": 2 * options.batch_size}
    if twice["batch_size"] > OPTIONS["batch_size"].most:
        return tuple(better)
    return (*better, Advice(twice, now - peak(_with(options, twice))))


def _with(options: TrainingOptions, change: dict[str, Any]) -> TrainingOptions:
    """The options as they were asked for, with a change: what the new method does not know is left out."""
    known = {name: value for name, value in options.as_dict().items() if value is not None}
    asked = for_method(known, change.get("method", options.method))
    if "trainer" in change and "prepare_kbit" not in options.given:
        asked.pop("prepare_kbit", None)  # each trainer has its own default
    return parse_options(asked | change)


def _changes(o: TrainingOptions) -> Iterator[dict[str, Any]]:
    """Single changes that may lower the peak."""
    if not o.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if o.attention == "eager":
        yield {"attention": "sdpa"}
    if o.method == "full":
        yield {"method": "lora"}
    if o.method == "lora":
        yield {"method": "qlora"}
    if o.method == "qlora" and not o.double_quant:
        yield {"double_quant": True}
    if o.method == "qlora" and o.prepare_kbit:
        yield {"prepare_kbit": False}
    if o.trainer != "trl" and "trl" in SUPPORTED_TRAINERS:
        yield {"trainer": "trl"}
    if o.weights_dtype == "fp32" and o.mixed_precision != "fp16":
        yield {"weights_dtype": "bf16"}
    if o.lora_dropout:
        yield {"lora_dropout": 0.0}
    for optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        if o.optimizer != optimizer:
            yield {"optimizer": optimizer}
    if o.num_gpus > 1:
        yield from _shared(o)
    if o.batch_size > 1:
        yield {"batch_size": o.batch_size // 2}
    if o.seq_len > 1:
        yield {"seq_len": o.seq_len // 2}


def _shared(o: TrainingOptions) -> Iterator[dict[str, Any]]:
    """Changes of how several GPUs share the run."""
    if o.parallel != "fsdp":
        yield {"parallel": "fsdp"}
    if o.parallel == "fsdp" and not o.reshard_after_forward:
        yield {"reshard_after_forward": True}
    if o.parallel == "fsdp" and o.method == "full" and o.weights_dtype != "fp32" and o.mixed_precision != "no":
        yield {"mixed_precision": "no"}  # else accelerate holds what is trained in float32
    if o.parallel != "ddp":
        yield {"num_gpus": 2 * o.num_gpus}
        if not o.cpu_offload:
            yield {"cpu_offload": True}
