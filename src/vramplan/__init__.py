"""vramplan: what a fine-tune needs, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Plan", "UsageError", "__version__", "plan"]

if TYPE_CHECKING:
    from vramplan.planner.errors import UsageError
    from vramplan.planner.plan import Plan, plan

_HOMES = {"Plan": "plan", "plan": "plan", "UsageError": "errors"}


def __getattr__(name: str) -> Any:
    """`plan` and what goes with it, imported at first use: `import vramplan` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vramplan.planner.{_HOMES[name]}"), name)
