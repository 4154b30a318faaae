"""What the driver says of the GPU, through NVML: its totals, and what other processes hold of it. No torch, no CUDA."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

from vramplan.planner.errors import Failure

OTHER_WAYS = "plans (vramplan MODEL) and traces (vramplan trace MODEL) need no GPU"


class Memory(NamedTuple):
    """Bytes of the whole device: what the driver keeps for itself is part of `used_bytes`, not of `processes_bytes`.

    The latter is None with a driver before R510, which does not tell the two apart.
    """

    total_bytes: int
    used_bytes: int
    processes_bytes: int | None


def driver() -> str:
    """The driver's version; raises Failure where there is no driver or no GPU."""
    nvml = _nvml()
    try:
        if nvml.nvmlDeviceGetCount() == 0:
            raise Failure(f"no NVIDIA GPU is here, and a probe measures one; {OTHER_WAYS}")
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as error:
        raise Failure(f"the NVIDIA driver does not answer ({_reason(error)}); {OTHER_WAYS}") from None


def count() -> int:
    """How many GPUs CUDA shows a process: all of the driver's, or those that CUDA_VISIBLE_DEVICES names."""
    nvml = _nvml()
    try:
        there = int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError:
        there = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([each for each in visible.split(",") if each.strip()]))


def memory(uuid: str) -> Memory | None:
    """What NVML counts on the GPU, or the MIG slice, of this UUID as CUDA gives it; None where it does not say."""
    nvml = _nvml()
    handle = _handle(uuid)
    if handle is None:
        return None
    try:
        plain = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, used = int(plain.total), int(plain.used)
    except nvml.NVMLError:
        return None
    try:
        apart = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return Memory(total, used, int(apart.used))
    except (nvml.NVMLError, AttributeError):
        return Memory(total, used, None)


def others_bytes(uuid: str, cuda_bytes: int) -> int:
    """What processes hold of the GPU, read before this one holds anything; 0 where NVML does not say.

    An old driver does not tell that from its own share, which is what CUDA's total, `cuda_bytes`, leaves out.
    """
    seen = memory(uuid)
    if seen is None:
        return 0
    if seen.processes_bytes is not None:
        return seen.processes_bytes
    return max(0, seen.used_bytes - (seen.total_bytes - cuda_bytes))


def sliced(uuid: str) -> bool:
    """Whether the GPU is divided by MIG."""
    nvml = _nvml()
    handle = _handle(uuid)
    try:
        if handle is None or nvml.nvmlDeviceIsMigDeviceHandle(handle):
            return handle is not None
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # cards before Ampere know nothing of it
        return False


@cache
def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise Failure("nvidia-ml-py is not installed; pip install 'vramplan[probe]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Failure(
            f"no NVIDIA driver answers ({_reason(error)}); run the probe where the GPU is, with its driver installed; "
            f"{OTHER_WAYS}"
        ) from None
    return pynvml


def _handle(uuid: str) -> Any:
    """NVML's handle; CUDA leaves out the prefix that NVML wants."""
    nvml = _nvml()
    for prefix in ("GPU-", "MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(prefix + uuid.removeprefix(prefix))
        except nvml.NVMLError:
            continue
    return None


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
