"""What no formula gives, learnt from the local GPU in a process of its own: kernels, workspaces, speeds.

The CUDA context is learnt elsewhere: it grows with the kernels that a run loads, so measure.py reads it after real
training steps.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vramplan.planner.stack import KNOWN, installed
from vramplan.planner.units import MIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Callable

_WARM, _REPEATS = 5, 10
_KERNELS = {"Cudnn": "cudnn", "Flash": "flash", "Efficient": "efficient"}


def stack() -> dict[str, str]:
    """The versions of the known packages here, torch's as it says itself."""
    here = installed() | {"torch": str(torch.__version__)}
    return {package: here[package] for package in KNOWN if package in here}


def look(_: object = None) -> dict[str, Any]:
    """What CUDA shows of the first GPU, as torch sees it; "problem" says in words why it cannot be used, if so."""
    found: dict[str, Any] = {"stack": stack(), "problem": ""}
    if torch.version.cuda is None:
        return found | {
            "problem": f"torch {torch.__version__} is built without CUDA; install a CUDA build of it (pytorch.org)"
        }
    try:
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        torch.zeros(1, device="cuda").item()  # a torch without kernels for this GPU fails here
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        return found | {"problem": f"torch {torch.__version__} cannot use the GPU: {reason}"}
    capability = (properties.major, properties.minor)
    return found | {
        "name": properties.name,
        "uuid": str(properties.uuid),
        "capability": list(capability),
        "multiprocessors": properties.multi_processor_count,
        "total_bytes": total,
        "free_bytes": free,
        "bf16": capability >= (8, 0),
        "bitsandbytes": _bitsandbytes_problem(),
    }


def _bitsandbytes_problem() -> str:
    """Why bitsandbytes cannot quantise on this GPU, in words; empty where it can."""
    try:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(torch.zeros(64, 64, device="cuda", dtype=torch.float16), quant_type="nf4")
        bnb.dequantize_4bit(packed, state)
        torch.cuda.synchronize()
    except ImportError:
        return "bitsandbytes is not installed; pip install 'vramplan[probe]'"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (
            f"bitsandbytes does not work with this CUDA ({lines[0] if lines else type(error).__name__}); "
            "`python -m bitsandbytes` says why"
        )
    return ""


def calibrate(_: object = None) -> dict[str, Any]:
    """`look`, and this GPU's "workspace_bytes", "kernel", "matmul_flops_per_s" and "copy_bytes_per_s"."""
    found = look()
    if found["problem"]:
        return found
    dtype = torch.bfloat16 if found["bf16"] else torch.float16
    small = found["free_bytes"] < 4096 * MIB
    try:
        return found | {
            "workspace_bytes": _workspace_bytes(dtype),
            "kernel": _kernel(dtype),
            "matmul_flops_per_s": _matmul_flops_per_s(dtype, 4096 if small else 8192),
            "copy_bytes_per_s": _copy_bytes_per_s((128 if small else 1024) * MIB),
        }
    except torch.OutOfMemoryError:
        free = format_gib(found["free_bytes"])
        return found | {"problem": f"only {free} of the GPU's memory are free, too little; end what else runs there"}


def _workspace_bytes(dtype: torch.dtype) -> int:
    """What the first matrix product of a thread leaves allocated: cuBLAS's workspace (CublasHandlePool.cpp)."""
    a = torch.zeros(256, 256, device="cuda", dtype=dtype)
    out = torch.empty_like(a)
    before = torch.cuda.memory_allocated()
    torch.mm(a, a, out=out)
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated() - before)


def _kernel(dtype: torch.dtype) -> str:
    """Which of its kernels scaled_dot_product_attention takes for causal attention, as its backward node is named."""
    q = torch.zeros(1, 8, 256, 64, device="cuda", dtype=dtype, requires_grad=True)
    node = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn.name()
    return next((name for word, name in _KERNELS.items() if word in node), "math")


def _matmul_flops_per_s(dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n x n x n product of random numbers (zeros draw less power and run faster)."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / timed(lambda: torch.mm(a, b, out=out))[1]


def _copy_bytes_per_s(nbytes: int) -> float:
    """Bytes read and written in a second of copying on the GPU."""
    a = torch.zeros(nbytes, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * nbytes / timed(lambda: b.copy_(a))[1]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds in which the host has launched `work`, and in which the GPU has done it: medians, once it is warm."""
    host, gpu = [], []
    for _ in range(_WARM + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        work()
        end.record()
        host.append(time.perf_counter() - began)
        end.synchronize()
        gpu.append(begin.elapsed_time(end) / 1000)
    return median(host[_WARM:]), median(gpu[_WARM:])
