"""Which GPUs hold a plan, and with how much to spare."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vramplan.planner.catalog import Gpu


class Fit(NamedTuple):
    """A plan on one GPU, where it needs `needed_bytes`, its CUDA context included."""

    gpu: Gpu
    needed_bytes: int
    lacks: tuple[str, ...] = ()  # what the plan uses and the card has not: "bf16", "flash_attention_2"

    @property
    def headroom_bytes(self) -> int:
        """What CUDA shows a process on this card, less what the plan needs there; negative where it is too small."""
        return self.gpu.budget_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.headroom_bytes >= 0


def fit_on(gpu: Gpu, needed_bytes: int, uses: Iterable[str] = ()) -> Fit:
    """A plan on one GPU; `uses` are the abilities it relies on, by the names of `catalog.Gpu`'s fields."""
    return Fit(gpu, needed_bytes, tuple(ability for ability in uses if getattr(gpu, ability) is False))
