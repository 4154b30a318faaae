"""What a GPU adds of its own: the CUDA context, the workspaces of cuBLAS, the attention kernel.

Sources: aten/src/ATen/cuda/CublasHandlePool.cpp (parseChosenWorkspaceSize), tables/calibrations.json (measured).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vramplan.planner.catalog import Gpu
    from vramplan.planner.stack import Stack

_MIB = 2**20
GIVES_BACK = (2, 15)  # from this torch on, a matrix product gives its workspace back (read in its source, not measured)
WITHOUT_GPU = (9, 0)  # a plan that names no GPU takes the rules of the one whose context is measured


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's share of the answer. `context_measured`: on this very GPU, not on another.

    NVML counts against a GPU what the driver keeps for itself, CUDA does not: `hidden_bytes`, part of `context_bytes`.
    """

    capability: tuple[int, int] | None  # None: not CUDA
    context_bytes: int
    hidden_bytes: int
    context_measured: bool
    workspace_bytes: int


@cache
def _calibrations() -> list[dict[str, object]]:
    path = Path(__file__).resolve().parent.parent / "tables" / "calibrations.json"
    rows: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def device(gpu: Gpu | None, stack: Stack | None = None) -> Device:
    """The rules of `gpu`, or those of a Hopper card where none, or one without a compute capability, is named."""
    rows = _calibrations()
    name = gpu.name if gpu else ""
    own = next((row for row in rows if row["gpu"] == name), None)
    row = own or rows[0]
    context = row["process_bytes"]
    assert isinstance(context, int)
    hidden = gpu.driver_bytes - gpu.budget_bytes if gpu is not None and gpu.driver_bytes is not None else 0
    if gpu is None:
        hidden = int(str(row["hidden_bytes"]))
    capability: tuple[int, int] | None = WITHOUT_GPU
    if gpu is not None and gpu.vendor == "AMD":
        capability = None
    elif gpu is not None and gpu.compute_capability:
        major, minor = gpu.compute_capability.split(".")
        capability = (int(major), int(minor))
    kept = stack is None or stack.torch < GIVES_BACK
    return Device(
        capability,
        context + hidden,
        hidden,
        own is not None,
        workspace_bytes(capability) if kept else 0,
    )


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """cuBLAS's workspace for one thread: 32 MiB on compute capability 9.0, 8.125 MiB elsewhere; hipBLAS 128 MiB."""
    if capability is None:
        return 128 * _MIB  # gfx94x, the only AMD cards of the table
    return 32 * _MIB if capability == (9, 0) else 4096 * 1024 * 2 + 16 * 1024 * 8
