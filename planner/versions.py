"""What earlier versions of transformers build otherwise: changes to an architecture, by model type.

Builders (families.py) and ops follow the newest known version. Sources: models/*/modeling_*.py of transformers 5.17 to
5.24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.layers import Architecture, Layer, Module
    from vramplan.planner.stack import Version

GPTJ_BY_LAYER = "gptj before 5.24"  # a layer's family: each looks sines and cosines up in a table of its own


def as_of(architecture: Architecture, transformers: Version) -> Architecture:
    """`architecture` as this version of transformers builds and runs it."""
    last, change = _UNTIL.get(architecture.model_type, ((0, 0), None))
    return architecture if change is None or transformers > last else change(architecture)


def _with_sdpa(a: Architecture) -> Architecture:
    """gemma2 took sdpa, which cannot cap attention's logits."""
    return replace(a, attention_implementations=("sdpa", "eager", "flash_attention_2"))


def _gptj(a: Architecture) -> Architecture:
    """GPTJAttention and GPTJFlashAttention2 were written out, without transformers' attention interface."""
    kinds = tuple(replace(layer, family=GPTJ_BY_LAYER) for layer in a.kinds)
    return replace(a, kinds=kinds, attention_implementations=("eager", "flash_attention_2"))


def _narrow_routers(a: Architecture) -> Architecture:
    """Routers had the model's dtype, and were cast to float32 for each product."""

    def module(m: Module) -> Module:
        return replace(m, weights=tuple(replace(w, wide=False) for w in m.weights)) if m.kind == "router" else m

    def layer(kind: Layer) -> Layer:
        return replace(kind, modules=tuple(map(module, kind.modules)))

    return replace(a, kinds=tuple(map(layer, a.kinds)))


# The last version that did so, and what it did.
_UNTIL: dict[str, tuple[Version, Callable[[Architecture], Architecture]]] = {
    "deepseek_v2": ((5, 23), _narrow_routers),
    "deepseek_v3": ((5, 23), _narrow_routers),
    "gemma2": ((5, 20), _with_sdpa),
    "glm4_moe": ((5, 23), _narrow_routers),
    "gptj": ((5, 23), _gptj),
}
