"""What a GPU adds of its own: the CUDA context, the workspaces of cuBLAS, the attention kernel.

By rule and by table, or as a probe measured it on this very machine (calibration.py).

Sources: aten/src/ATen/cuda/CublasHandlePool.cpp (parseChosenWorkspaceSize), aten/src/ATen/native/transformers/cuda/
sdp_utils.cpp (check_prefer_cudnn_attention), tables/calibrations.json (measured).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.paper import H200, Multiprocessors
from vramplan.planner.stack import KNOWN

if TYPE_CHECKING:
    from vramplan.planner.attention import Kernel
    from vramplan.planner.calibration import Calibration
    from vramplan.planner.catalog import Gpu
    from vramplan.planner.stack import Stack

_MIB = 2**20
GIVES_BACK = (2, 15)  # from this torch on, a matrix product gives its workspace back (read in its source, not measured)
WITHOUT_GPU = (9, 0)  # a plan that names no GPU takes the rules of the one whose context is measured
# Threads of a multiprocessor where they are not 2,048 (CUDA C++ Programming Guide, technical specifications).
_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
_CUDNN_FIRST = ((9, 0), (9, 3), (10, 0), (10, 3))


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's share of the answer; `gpu` is None where none is named. `context_measured`: on this very GPU.

    NVML counts against a GPU what the driver keeps for itself, CUDA does not: `hidden_bytes`, part of `context_bytes`.
    `kernel` is the first attention kernel that PyTorch tries there. `calibration` is the user's own, where it was used.
    """

    gpu: Gpu | None
    capability: tuple[int, int] | None  # None: not CUDA
    context_bytes: int
    hidden_bytes: int
    context_measured: bool
    workspace_bytes: int
    kernel: Kernel
    multiprocessors: Multiprocessors = H200
    torch: tuple[int, int] = KNOWN["torch"][1]
    transformers: tuple[int, int] = KNOWN["transformers"][1]
    calibration: Calibration | None = None


@cache
def _calibrations() -> list[dict[str, object]]:
    path = Path(__file__).resolve().parent.parent / "tables" / "calibrations.json"
    rows: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def device(gpu: Gpu | None, stack: Stack | None = None, calibration: Calibration | None = None) -> Device:
    """The rules of `gpu`, or those of a Hopper card where none, or one without a compute capability, is named.

    What `calibration` knows of this GPU goes before rules and tables.
    """
    rows = _calibrations()
    name = gpu.name if gpu else ""
    own = next((row for row in rows if row["gpu"] == name), None)
    row = own or rows[0]
    process = row["process_bytes"]
    assert isinstance(process, int)
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
    workspace = workspace_bytes(capability) if kept else 0
    kernel: Kernel = "cudnn" if capability in _CUDNN_FIRST else "flash"
    measured = own is not None
    if calibration is not None:
        measured = measured or calibration.process_bytes is not None
        process = process if calibration.process_bytes is None else calibration.process_bytes
        hidden = hidden if calibration.hidden_bytes is None else calibration.hidden_bytes
        workspace = workspace if calibration.workspace_bytes is None else calibration.workspace_bytes
        kernel = calibration.kernel or kernel
    number = gpu.multiprocessors if gpu is not None and gpu.multiprocessors else H200.number
    multiprocessors = Multiprocessors(number, _THREADS.get(capability or WITHOUT_GPU, H200.threads))
    return Device(
        gpu, capability, process + hidden, hidden, measured, workspace, kernel, multiprocessors,
        stack.torch if stack else KNOWN["torch"][1], stack.transformers if stack else KNOWN["transformers"][1],
        calibration,
    )  # fmt: skip


def nccl_bytes(num_gpus: int, parallel: str = "") -> tuple[int, int]:
    """What NCCL takes of each GPU beside PyTorch's memory for its buffers and kernels, and with how many GPUs measured.

    The number of GPUs nearest to `num_gpus` of those that were measured; nothing for one GPU. Under ZeRO DeepSpeed
    makes groups of its own besides.
    """
    if num_gpus == 1:
        return 0, 1
    known: Any = _calibrations()[0]
    row = min(known["nccl"], key=lambda each: abs(each["num_gpus"] - num_gpus))
    more = known["deepspeed"]["bytes"] if parallel.startswith("zero") else 0
    return row["bytes"] + more, row["num_gpus"]


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """cuBLAS's workspace for one thread: 32 MiB on compute capability 9.0, 8.125 MiB elsewhere; hipBLAS 128 MiB."""
    if capability is None:
        return 128 * _MIB  # gfx94x, the only AMD cards of the table
    return 32 * _MIB if capability == (9, 0) else 4096 * 1024 * 2 + 16 * 1024 * 8
