"""What a whole run takes: tokens, steps, hours, dollars and electricity, offer by offer.

The time of a step is given, with its range (throughput.py). Only training counts: neither setting up, downloading,
evaluating and saving, nor what a spot instance that is taken back repeats.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from vramplan.planner import catalog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vramplan.planner.prices import Offer
    from vramplan.planner.throughput import Range
    from vramplan.planner.training import TrainingOptions


@dataclass(frozen=True, slots=True)
class Work:
    """A run's size: `tokens` of the examples over all epochs, `sequences` of one epoch, `steps` of the optimizer."""

    tokens: int
    sequences: int
    steps: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes on one offer.

    `hours` come of a step's `step_s`, `hours_low` and `hours_high` of its fast and its slow end; the rest is that of
    `hours`. `usd` is for whole instances, whose other GPUs idle where they have more than the run uses. `kwh` is what
    those in use take at most, drawing their TDP all the time; None where that is not known. `sessions` is into how many
    the provider's limit cuts the run, each but the first resumed from a checkpoint.
    """

    offer: Offer
    num_gpus: int
    instances: int
    step_s: float
    hours: float
    hours_low: float
    hours_high: float
    usd: float
    kwh: float | None
    sessions: int

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON: the offer's fields and its own, side by side."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "offer"}
        return asdict(self.offer) | own


def work(run: TrainingOptions) -> Work:
    """The size of a run, in steps as transformers.Trainer counts them (trainer.py, set_initial_training_values).

    A sequence is full, of `seq_len` tokens, as packed ones are (trl's `packing`); with `padded` it is one example, cut
    where it is longer. An epoch's last batch and last step may be smaller than the others.
    """
    per_example = min(run.tokens_per_example, run.seq_len) if run.padded else run.tokens_per_example
    sequences = run.examples if run.padded else -(-run.examples * per_example // run.seq_len)
    batches = -(-sequences // (run.batch_size * run.num_gpus))
    steps_of_epoch = -(-batches // run.gradient_accumulation_steps)
    return Work(
        tokens=math.ceil(run.epochs * run.examples * per_example),
        sequences=sequences,
        steps=math.ceil(run.epochs * steps_of_epoch),
    )


def cost(size: Work, offer: Offer, step_s: Range, num_gpus: int = 1) -> Cost:
    """What `size` takes on an offer where an optimizer step takes `step_s` seconds, on `num_gpus` of its GPUs.

    Every step is taken to last as long, so an epoch's smaller last one is counted in full.
    """
    instances = -(-num_gpus // offer.gpu_count)
    hours, low, high = (size.steps * each / 3600 for each in step_s)
    seconds = size.steps * step_s.middle
    tdp_w = _tdp_w(offer.gpu)
    return Cost(
        offer=offer,
        num_gpus=num_gpus,
        instances=instances,
        step_s=step_s.middle,
        hours=hours,
        hours_low=low,
        hours_high=high,
        usd=hours * offer.usd_per_hour * instances,
        kwh=None if tdp_w is None else hours * num_gpus * tdp_w / 1000,
        sessions=1 if offer.session_limit_s is None else max(1, math.ceil(seconds / offer.session_limit_s)),
    )


def unpriced(run: TrainingOptions, gpu: str, found: Iterable[Offer], *, timed: bool) -> str:
    """Why a run that fits `gpu` has no price there, in words; `timed`: whether a step's time is known there."""
    from vramplan.planner.links import host_gpus

    counts = [offer.gpu_count for offer in found if offer.gpu == gpu]
    if not counts:
        return f"no known offer of {gpu}; a file of your own may have one (--prices)"
    needed = min(run.num_gpus, host_gpus(catalog.gpu(gpu)))
    if not timed:
        return f"{untimed(run, gpu)}, and so no cost"
    return f"no known offer has {needed} {gpu} in one host, the largest {max(counts)}; a file may (--prices)"


def untimed(run: TrainingOptions, gpu: str) -> str:
    """Why no time of a step is known, in words."""
    if run.steps_in_deepspeed:
        return "what DeepSpeed's optimizer takes in host memory is not measured, so no time of a step is known"
    return f"the rates of {gpu} are not known, so no time of a step is"


def costs(
    run: TrainingOptions, found: Iterable[Offer], fits: Callable[[str], bool], step_s: Callable[[str], Range | None]
) -> tuple[Cost, ...]:
    """What `run` costs on each offer that has enough GPUs and where it fits, the cheapest first.

    More GPUs than a host joins are several instances of that many or more.

    `fits` and `step_s` answer for a GPU's name; each is asked once for a GPU, `step_s` only where the run fits. A GPU
    whose rates nobody has read has no `step_s`, and its offers are left out.
    """
    from vramplan.planner.links import host_gpus  # who asks for a step's time has it

    size = work(run)
    seconds: dict[str, Range | None] = {}
    answers = []
    for offer in found:
        if offer.gpu not in seconds:
            seconds[offer.gpu] = step_s(offer.gpu) if fits(offer.gpu) else None
        each = seconds[offer.gpu]
        if each is not None and offer.gpu_count >= min(run.num_gpus, host_gpus(catalog.gpu(offer.gpu))):
            answers.append(cost(size, offer, each, run.num_gpus))
    return cheapest_first(answers)


def cheapest_first(found: Iterable[Cost]) -> tuple[Cost, ...]:
    """By dollars; of equal ones the faster goes first."""
    return tuple(sorted(found, key=lambda each: (each.usd, each.hours, *_name(each.offer))))


def fastest_first(found: Iterable[Cost]) -> tuple[Cost, ...]:
    """By hours; of equal ones the cheaper goes first."""
    return tuple(sorted(found, key=lambda each: (each.hours, each.usd, *_name(each.offer))))


def _name(offer: Offer) -> tuple[str, str, str]:
    return offer.provider, offer.instance, offer.region


@cache
def _tdp_w(gpu: str) -> int | None:
    return catalog.gpu(gpu).tdp_w
