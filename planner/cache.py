"""The keys and values of the tokens so far, as generation keeps them for each layer.

Source: transformers/cache_utils.py (DynamicLayer, DynamicSlidingWindowLayer): each step puts the new token's behind the
others in a fresh tensor, and lets the old one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.planner import ops

if TYPE_CHECKING:
    from vramplan.planner.paper import Tape, Tensor

KEYS, VALUES = "cached keys", "cached values"


@dataclass(slots=True)
class Cache:
    """One layer's keys and values [B, K, T, D]; where its attention slides, what is kept is less than `window` long."""

    window: int | None
    as_keys: bool = False  # values are held in the keys' dtype where that is wider
    keys: Tensor | None = None
    values: Tensor | None = None

    def holds(self, past: int) -> None:
        """Sets how many tokens came before."""
        if self.keys is not None and self.values is not None:
            kept = past if self.window is None else min(past, self.window - 1)
            self.keys, self.values = (x.view(*x.shape[:2], kept, x.shape[3]) for x in (self.keys, self.values))

    def update(self, tape: Tape, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens'; returns all that they attend to, the caller holding `k` and `v` meanwhile."""
        if self.window is None:
            self.keys = keys = _joined(tape, self.keys, k, KEYS)
            self.values = values = _joined(tape, self.values, v, VALUES, k.dtype if self.as_keys else v.dtype)
            return keys, values
        keys = _joined(tape, self.keys, k, KEYS)
        values = _joined(tape, self.values, v, VALUES, k.dtype if self.as_keys else v.dtype)
        self.keys = keys.view(*keys.shape[:2], min(keys.shape[2], self.window - 1), keys.shape[3])  # the last of them
        self.values = values.view(*values.shape[:2], min(values.shape[2], self.window - 1), values.shape[3])
        return keys, values


def _joined(tape: Tape, old: Tensor | None, new: Tensor, label: str, begun: str = "") -> Tensor:
    """`torch.cat([old, new], dim=-2)`; the first is an empty tensor of dtype `begun`."""
    b, h, t, d = new.shape
    dtype = ops.promote(new.dtype, begun or new.dtype)
    return tape.new((b, h, t + (old.shape[2] if old is not None else 0), d), dtype, label)


def mask_length(past: int, new: int, window: int | None) -> int:
    """How many keys a mask for `new` tokens covers (get_mask_sizes)."""
    return past + new if window is None else min(past, max(window - 1, 0)) + new
