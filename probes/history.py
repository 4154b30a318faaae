"""PyTorch's own memory history: every allocation and free of CUDA memory, with the op and the line that made it."""

from __future__ import annotations

import re
from typing import Any

import torch

MOST = 400_000  # events: a large model's step has some ten thousand
_BACKWARD = re.compile(r"(\w+Backward\d*|AccumulateGrad|CopyBackwards|CopySlices)::apply")
_OP = re.compile(r"at::_ops::(\w+)::(?:call|redispatch)")
_SKIP = re.compile(r"nn/modules/module\.py|_jit_internal|autograd/function\.py|utils/_contextlib\.py")


def _label(frames: list[dict[str, Any]]) -> str:
    """The op, the backward node and the innermost Python lines of an allocation."""
    op = node = ""
    lines: list[str] = []
    for frame in frames:
        name, file = frame["name"], frame["filename"]
        if file.endswith(".py"):
            if len(lines) < 5 and not _SKIP.search(file):
                lines.append(f"{'/'.join(file.split('/')[-2:])}:{frame['line']}:{name}")
            continue
        if found := _OP.search(name):
            op = op if len(op.split("<")) > 3 else f"{op}<{found.group(1)}" if op else found.group(1)
        if not node and (found := _BACKWARD.search(name)):
            node = found.group(1)
    return f"{op}|{node}|{' < '.join(lines)}"


def start() -> None:
    """Records from now on."""
    torch.cuda.memory._record_memory_history(max_entries=MOST, stacks="all")


def stop() -> None:
    """Ends recording, and forgets what was recorded."""
    torch.cuda.memory._record_memory_history(enabled=None)


def events() -> tuple[list[str], list[list[Any]]]:
    """What was recorded: labels, and for each event its action, address, size, label's number and stream."""
    found: list[list[Any]] = []
    labels: dict[str, int] = {}
    for e in torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]:
        label = _label(e.get("frames", []))
        found.append([e["action"], e["addr"], e["size"], labels.setdefault(label, len(labels)), e["stream"]])
    return list(labels), found
