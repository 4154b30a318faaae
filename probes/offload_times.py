"""What CPU offload takes of the host, measured by itself: the ground of throughput.py's figures, and of sizes.py's.

    python -m vramplan.probes.offload_times OUT.json

Copies between pinned host memory and the GPU by their size; the steps of optimizers and clipping in host memory, with
one thread, as torchrun leaves each rank, and with all; and whole trainings under FSDP2 with `cpu_offload`, in which one
GPU stands for two (ranks.py, `alone`), with the host memory that the process holds at their end.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vramplan.planner.catalog import find_model
from vramplan.planner.files import write_text
from vramplan.probes import calibrate, ranks
from vramplan.probes.sharing_times import ALONE, trained

if TYPE_CHECKING:
    from collections.abc import Callable

_MIB = 2**20
_SIZES = (1, 16, 256)  # MiB
_ELEMENTS = 2**25
_PIECES = (4, 1024)  # tensors of that many elements together
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
_RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-0.5b", {"method": "full", "seq_len": 1024}),
    ("llama-3.2-1b", {"method": "lora", "seq_len": 1024}),
    ("llama-3.2-1b", {"method": "full", "seq_len": 1024}),
    ("qwen2.5-0.5b", {"method": "full", "seq_len": 1024, "optimizer": "adamw_torch"}),
    ("qwen2.5-1.5b", {"method": "full", "seq_len": 2048, "mixed_precision": "no"}),
)
_TRAINED_STEPS, _WARM = 4, 1


def copies() -> list[dict[str, Any]]:
    """Seconds of copies by size, both ways."""
    found = []
    for mib in _SIZES:
        here = torch.empty(mib * _MIB, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(mib * _MIB, dtype=torch.uint8, device="cuda")
        for way, call in (
            ("to the GPU", partial(there.copy_, here, non_blocking=True)),
            ("to the host", partial(here.copy_, there, non_blocking=True)),
        ):
            found.append({"copy": way, "bytes": mib * _MIB, "s": calibrate.timed(call)[1]})
    return found


def updates(threads: int) -> list[dict[str, Any]]:
    """Seconds of the optimizers' steps and of clipping in host memory, float32."""
    torch.set_num_threads(threads)
    found = []
    for pieces in _PIECES:
        weights = [torch.zeros(_ELEMENTS // pieces, requires_grad=True) for _ in range(pieces)]
        for w in weights:
            w.grad = torch.full_like(w, 1e-3)
        calls: dict[str, Callable[[], Any]] = {
            name: make(weights, lr=1e-6).step for name, make in _OPTIMIZERS.items()
        } | {"clipping": partial(torch.nn.utils.clip_grad_norm_, weights, 1.0)}
        for name, call in calls.items():
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            found.append(
                {"what": name, "threads": threads, "elements": _ELEMENTS, "tensors": pieces, "s": min(seconds[1:])}
            )
        del calls, weights
        gc.collect()
    return found


def held() -> dict[str, int]:
    """Bytes of host memory that this process holds: the kernel's account, and what PyTorch has pinned."""
    words = dict(
        re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    )
    found = {name: 1024 * int(words[name]) for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")}
    stats = torch.cuda.host_memory_stats()
    return found | {name: stats[name] for name in stats if name.startswith("allocated_bytes.")}


def main(out: str) -> None:
    """Measures everything, and writes what there is so far."""
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_properties(0).name, "stack": calibrate.stack()}
    threads = torch.get_num_threads()

    def save() -> None:
        write_text(Path(out), json.dumps(found, indent=1) + "\n")

    found["copies"] = copies()
    found["updates"] = updates(1)
    save()
    torch.set_num_threads(1)
    ranks.pretend(ALONE)
    found["steps"] = []
    for name, setting in _RUNS:
        model = find_model(name)
        assert model is not None
        before = held()
        made = trained(model.config, "fsdp", {**setting, "cpu_offload": True}, ALONE, _TRAINED_STEPS, _WARM, held)
        found["steps"].append({"model": name, "before": before, **made})
        print(json.dumps(found["steps"][-1]), flush=True)
        save()
        gc.collect()
        torch.cuda.empty_cache()
    found["updates"] += updates(threads)
    save()


if __name__ == "__main__":
    main(sys.argv[1])
