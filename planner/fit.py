"""Which GPUs hold a plan, and with how much to spare; and how large a run may grow before memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.device import Device
    from vramplan.planner.memory import MemoryEstimate


class Fit(NamedTuple):
    """A plan on one GPU, where it needs `needed_bytes`, its CUDA context included.

    `retries` is given where that is more than the card has and the run survives all the same: so often PyTorch gives
    its whole cache back to make room, in the steps that were replayed within the card's memory.
    """

    gpu: Gpu
    needed_bytes: int
    lacks: tuple[str, ...] = ()  # what the plan uses and the card has not: "bf16", "flash_attention_2"
    retries: int | None = None

    @property
    def headroom_bytes(self) -> int:
        """What CUDA shows a process on this card, less what the plan needs there; negative where it is too small."""
        return self.gpu.budget_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.headroom_bytes >= 0 or self.retries is not None

    def to_dict(self) -> dict[str, Any]:
        """An entry of the contract's "gpus"."""
        return {
            "name": self.gpu.name,
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
            "needed_bytes": self.needed_bytes,
            "budget_bytes": self.gpu.budget_bytes,
            "retries": self.retries,
            "lacks": list(self.lacks),
        }


def fit_on(gpu: Gpu, needed_bytes: int, uses: Iterable[str] = ()) -> Fit:
    """A plan on one GPU; `uses` are the abilities it relies on, by the names of `catalog.Gpu`'s fields."""
    return Fit(gpu, needed_bytes, tuple(ability for ability in uses if getattr(gpu, ability) is False))


def room_bytes(gpu: Gpu, played: MemoryEstimate | Device) -> int:
    """What PyTorch may reserve on `gpu`: what CUDA shows of it, less the context, the driver's own part not counted."""
    return gpu.budget_bytes - (played.context_bytes - played.hidden_bytes)


def judged(gpu: Gpu, played: MemoryEstimate, within: Callable[[int], MemoryEstimate], uses: Iterable[str] = ()) -> Fit:
    """A run on one GPU, from its replay with boundless memory; `within` replays it with so much to reserve.

    Where only the cache is too much, of training or of loading, the second replay says whether the run survives by
    giving it back.
    """
    fit, room = fit_on(gpu, played.needed_bytes, uses), room_bytes(gpu, played)
    if played.peak_allocated_bytes > room or (fit.fits and played.before_reserved_bytes <= room):
        return fit
    limited = within(room)
    if fit.fits:  # it is loading that may not
        beyond = played.before_reserved_bytes - played.most_reserved_bytes
        return fit._replace(needed_bytes=fit.needed_bytes + beyond) if limited.out_of_memory else fit
    return fit if limited.out_of_memory else fit._replace(retries=limited.retries)


class Boundary(NamedTuple):
    """Two neighbouring sizes between which memory runs out; None where the search met no such size."""

    survives: int | None  # the larger of those with which the run survives
    fails: int | None  # the smaller of those with which it does not


def largest(survives: Callable[[int], bool], step: int, most: int) -> Boundary:
    """The boundary of a run's size (a batch, a sequence), among the multiples of `step` up to `most`.

    Sizes are doubled until one fails, then the gap is halved. Where memory does not grow with every step, fragmentation
    being what it is, this is one of several boundaries: what it holds of the two sizes is true all the same.
    """
    good, bad, end = 0, None, most // step  # in steps
    size = min(1, end)
    while size > good:
        if not survives(size * step):
            bad = size
            break
        good, size = size, min(2 * size, end)
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        if survives(middle * step):
            good = middle
        else:
            bad = middle
    return Boundary(good * step or None, None if bad is None else bad * step)


def largest_with(spare: Callable[[int], int], possible: Callable[[int], bool], most: int) -> Boundary:
    """The same from 1 to `most`, where `spare` says of a size what is left, below 0 what is too much.

    Memory grows nearly by a straight line, so the next size to try is where the line through the two sides meets 0.
    `possible` is a cheaper answer, never false where something is left: nothing beyond its own boundary is tried.
    """
    top = largest(possible, 1, most)
    if top.survives is None:
        return top
    good, bad, size, left = 0, top.fails, 1, {}
    while good < top.survives and (bad is None or bad - good > 1):
        before = bad - good if bad is not None and bad in left else None
        left[size] = spare(size)
        good, bad = (size, bad) if left[size] >= 0 else (good, size)
        if bad is None or bad not in left:
            size = top.survives
        elif before and 2 * (bad - good) > before:  # the line is no good
            size = (good + bad) // 2
        elif good:
            zero = (bad - good) * left[good] // (left[good] - left[bad])
            size = good + min(max(zero, 1), bad - good - 1)
    return Boundary(good or None, bad)
