"""What a probe learned about a GPU on this machine, kept in the user's data folder for later plans.

Only what no formula gives is learned: the CUDA context, workspaces, the attention kernel, the speed. There is one JSON
file for each GPU and minor version of torch. It is used for plans of that GPU and version while the NVIDIA driver is
the one it was measured with; whatever else stands there is left alone with a warning, and the plan made without it.

VRAMPLAN_DATA_DIR names another folder; otherwise platformdirs knows the user's.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError, reason, shown
from vramplan.planner.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vramplan.planner.attention import Kernel
    from vramplan.planner.stack import Stack

SCHEMA = 1
FOLDER = "VRAMPLAN_DATA_DIR"
KERNELS = ("cudnn", "flash", "efficient", "math")
_AGAIN = "`vramplan probe` makes a new one"
_LARGEST = 2**16  # bytes of a file; real ones have a few hundred
_MOST_BYTES = 2**40  # of a context or a workspace: beyond it the file is wrong
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one GPU; None is what was not.

    `gpu` is a name of tables/gpus.jsonl, else NVML's; `driver` the NVIDIA driver's version; `stack` the versions of
    the packages; `date` ISO's. `process_bytes` is what CUDA counts for a training process beside PyTorch's reserved
    memory, `hidden_bytes` what NVML counts besides and CUDA does not, `workspace_bytes` cuBLAS's for one thread.
    `kernel` is the attention kernel that scaled_dot_product_attention takes for 16-bit tensors without a mask.
    """

    gpu: str
    driver: str
    stack: dict[str, str]
    date: str
    process_bytes: int | None = None
    hidden_bytes: int | None = None
    workspace_bytes: int | None = None
    kernel: Kernel | None = None
    matmul_flops_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {"schema": SCHEMA, **asdict(self), "notes": list(self.notes)}


def folder() -> Path:
    """Where calibrations are kept; it need not exist."""
    if named := os.environ.get(FOLDER):
        return Path(named) / "calibrations"
    import platformdirs  # only plans of a named GPU come here

    return platformdirs.user_data_path("vramplan", appauthor=False) / "calibrations"


def save(calibration: Calibration) -> Path:
    """Writes it whole or not at all, over an earlier one of this GPU and torch; the file's path.

    Raises UsageError for one that `load` would not take, and OSError where it cannot be written.
    """
    content = calibration.to_dict()
    _checked(content)
    file = _file(calibration.gpu, _minor(calibration.stack["torch"]))
    write_text(file, json.dumps(content, indent=2) + "\n")
    return file


def load(gpu: str, stack: Stack) -> tuple[Calibration | None, tuple[str, ...]]:
    """What is known of `gpu` for plans of `stack`, and a warning where a file is there that cannot be used."""
    planned = _minor(stack.versions["torch"])
    file = _file(gpu, planned)
    try:
        if not file.is_file():
            beside = file.parent.glob(f"{_slug(gpu)}_torch-*.json")
            others = sorted(each.stem.rpartition("torch-")[2] for each in beside)
            if not others:
                return None, ()
            made = f"was made with torch {' and '.join(others)}, and {planned} is planned"
            return None, (f"the calibration of {gpu} {made}, so it is not used; {_AGAIN}",)
        found = _read(file)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        return None, (f"the calibration {str(file)!r} is not used: {why}; {_AGAIN}",)
    driver = installed_driver()
    if driver is not None and driver != found.driver:
        changed = f"was made with driver {found.driver}, and {driver} is installed"
        return None, (f"the calibration of {gpu} {changed}, so it is not used; {_AGAIN}",)
    return found, ()


def installed_driver() -> str | None:
    """The version of this machine's NVIDIA driver, as Linux's kernel module tells it; None where there is none."""
    try:
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", _DRIVER.read_text("ascii", errors="replace")[:1000])
    except OSError:
        return None
    return match[1] if match else None


def _file(gpu: str, torch: str) -> Path:
    return folder() / f"{_slug(gpu)}_torch-{torch}.json"


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", gpu.lower()).strip("-.")[:80]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _read(file: Path) -> Calibration:
    """Raises ValueError, saying what is wrong, for a file that is no calibration of a known schema."""
    with file.open("rb") as stream:
        raw = stream.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError("it is larger than 64 KiB")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        raise ValueError("it is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    schema = content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(f"it is of schema {schema}, which a newer vramplan wrote")
    if schema != SCHEMA:
        raise ValueError(f"its schema is {shown(schema)}, not {SCHEMA}")
    return _checked(content)


def _checked(content: Mapping[str, Any]) -> Calibration:
    """The calibration in a file's content; fields that are not known are passed over."""
    values = {field.name: content[field.name] for field in fields(Calibration) if content.get(field.name) is not None}
    for name, (what, holds) in _RULES.items():
        if name in values and not holds(values[name]):
            raise UsageError(f"{name} is {shown(values[name])}; it must be {what}")
    missing = [name for name in ("gpu", "driver", "stack", "date") if name not in values]
    if missing:
        raise UsageError(f"it has no {missing[0]}")
    return Calibration(**{**values, "notes": tuple(values.get("notes", ()))})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_BYTES


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e21


def _is_stack(value: object) -> bool:
    return isinstance(value, dict) and "torch" in value and all(map(_is_text, (*value, *value.values())))


_RULES = {
    **dict.fromkeys(("gpu", "driver", "date"), ("a text", _is_text)),
    "stack": ("an object of packages and versions, with torch", _is_stack),
    **dict.fromkeys(("process_bytes", "hidden_bytes", "workspace_bytes"), ("a whole number of bytes", _is_size)),
    "kernel": (f"one of {', '.join(KERNELS)}", KERNELS.__contains__),
    **dict.fromkeys(("matmul_flops_per_s", "copy_bytes_per_s"), ("a number above 0", _is_rate)),
    "notes": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
}
