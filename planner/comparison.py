"""Answers side by side: plans just made, and plans and traces that were saved as JSON.

A saved answer is untrusted: what is compared is taken out of it field by field, each checked, and the rest is left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.planner.errors import UsageError, shown
from vramplan.planner.files import read_text
from vramplan.planner.memory import SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LETTERS = "ABCDEFGH"  # one for each answer
_LARGEST = 4 * 2**20  # bytes of a saved answer; real ones have some hundred thousand
_MOST_BYTES = 2**60
_WHAT = "an answer of vramplan, saved with --json"


@dataclass(frozen=True, slots=True)
class Side:
    """What is compared of one answer. `label` is how it was named; sizes are bytes, None is what is not known.

    `gpu` is its entry of the contract's "gpu"; `cost` the cheapest offer: usd, hours, provider and gpu. Of time and
    cost what is not known is left out.
    """

    label: str
    model: str
    options: Mapping[str, Any]
    counts: Mapping[str, int | None]
    components: Mapping[str, int]
    peaks: Mapping[str, int]
    peak_phase: str
    gpu: Mapping[str, Any] | None
    time: Mapping[str, float]
    cost: Mapping[str, Any]
    host_memory: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The side as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


_COUNTS = ("total", "trainable", "adapter_bytes")
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "context_bytes", "device_bytes")
_TIME = ("step_s", "low_s", "high_s", "tokens_per_s")


def differing(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """The options in which any two sides differ, the model first, each with its values; None where one has none.

    What a method does not have differs from nothing: that is the method's difference. What keeps its weights on the GPU
    alone offloads none.
    """
    rows: dict[str, list[Any]] = {"model": [side.model for side in sides]}
    for name in dict.fromkeys(name for side in sides for name in side.options):
        rows[name] = [side.options.get(name) for side in sides]
    if "cpu_offload" in rows:
        rows["cpu_offload"] = [bool(value) for value in rows["cpu_offload"]]
    known = {name: [value for value in values if value is not None] for name, values in rows.items()}
    return {name: rows[name] for name, values in known.items() if any(value != values[0] for value in values)}


def components(sides: Sequence[Side]) -> dict[str, list[int]]:
    """The parts alive at the peaks, in a plan's order, with their bytes on each side."""
    named = dict.fromkeys(name for side in sides for name in side.components)
    names = [*(name for name in SOURCES if name in named), *(name for name in named if name not in SOURCES)]
    return {name: [side.components.get(name, 0) for side in sides] for name in names}


def host_memory(sides: Sequence[Side]) -> dict[str, list[int]]:
    """What the runs take of a host's memory, by when; what neither takes is left out."""
    named = dict.fromkeys(name for side in sides for name in side.host_memory)
    found = {name: [side.host_memory.get(name, 0) for side in sides] for name in named}
    return {name: sizes for name, sizes in found.items() if any(sizes)}


def to_dict(sides: Sequence[Side]) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "sides": [side.to_dict() for side in sides],
        "options": differing(sides),
        "components": components(sides),
        "vramplan_version": __version__,
    }


def saved(file: str | Path) -> dict[str, Any] | None:
    """The answer in a JSON file; None where that is no answer of vramplan, and so perhaps a model's config.

    Raises UsageError for what is no file of JSON.
    """
    text = read_text(file, _WHAT, "PLAN", _LARGEST)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{shown(str(file))} is no JSON; name {_WHAT} (PLAN)") from None
    return found if isinstance(found, dict) and {"memory", "options", "parameters"} <= found.keys() else None


def side(answer: Mapping[str, Any], label: str) -> Side:
    """What is compared of `answer`, of the shape of Plan.to_dict; raises UsageError where a field is of another."""
    top = _Fields(answer, label)
    memory, counts = top.inner("memory"), top.inner("parameters")
    options = dict(top.inner("options").values)
    if options.get("stack"):
        versions = top.inner("options").inner("stack").values
        options |= {f"stack {package}": version for package, version in versions.items()}
    options.pop("stack", None)
    parts = memory.rows("components")
    gpu = top.optional("gpu")
    time, cost = top.optional("time"), top.rows("cost") if "cost" in answer else []
    return Side(
        label=label,
        model=top.inner("model").text("name"),
        options={_clean(name): _plain(value) for name, value in options.items()},
        counts={name: counts.size(name) if counts.values.get(name) is not None else None for name in _COUNTS},
        components={part.text("name"): part.size("bytes") for part in parts},
        peaks={name: memory.size(name) for name in _PEAKS},
        peak_phase=memory.text("peak_phase"),
        gpu=gpu.gpu() if gpu else None,
        time={name: time.number(name) for name in _TIME} if time else {},
        cost=min((each.cost() for each in cost), key=lambda each: (each["usd"], each["hours"]), default={}),
        host_memory=_host_memory(top.rows("sizes")) if "sizes" in answer else {},
    )


_HOST = "host memory, "


def _host_memory(parts: Sequence[_Fields]) -> dict[str, int]:
    named = {part.text("name"): part.size("bytes") for part in parts}
    return {name.removeprefix(_HOST): size for name, size in named.items() if name.startswith(_HOST)}


class _Fields:
    """A JSON object of which nothing is known; what is asked for is there and of its type, or a UsageError says so."""

    def __init__(self, values: object, label: str, path: str = "") -> None:
        self.label, self.path = label, path
        if not isinstance(values, dict):
            raise self._wrong("", "an object")
        self.values: dict[str, Any] = values

    def _wrong(self, name: str, what: str) -> UsageError:
        where = f"{self.path}{name}".rstrip(".") or "it"
        return UsageError(f"{shown(self.label)} is no answer of vramplan: {where} is not {what} (PLAN)")

    def inner(self, name: str) -> _Fields:
        return _Fields(self.values.get(name), self.label, f"{self.path}{name}.")

    def optional(self, name: str) -> _Fields | None:
        return self.inner(name) if self.values.get(name) else None

    def rows(self, name: str) -> list[_Fields]:
        found = self.values.get(name)
        if not isinstance(found, list):
            raise self._wrong(name, "a list")
        return [_Fields(each, self.label, f"{self.path}{name}[{i}].") for i, each in enumerate(found)]

    def text(self, name: str) -> str:
        found = self.values.get(name)
        if not isinstance(found, str):
            raise self._wrong(name, "a text")
        return _clean(found)

    def size(self, name: str, least: int = 0) -> int:
        found = self.values.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= _MOST_BYTES:
            raise self._wrong(name, "a whole number")
        return found

    def number(self, name: str) -> float:
        found = self.values.get(name)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 <= found <= _MOST_BYTES:
            raise self._wrong(name, "a number from 0")
        return found

    def flag(self, name: str) -> bool:
        found = self.values.get(name)
        if not isinstance(found, bool):
            raise self._wrong(name, "true or false")
        return found

    def gpu(self) -> dict[str, Any]:
        sizes = {name: self.size(name, -_MOST_BYTES) for name in ("needed_bytes", "budget_bytes", "headroom_bytes")}
        retries = None if self.values.get("retries") is None else self.size("retries")
        return {"name": self.text("name"), "fits": self.flag("fits"), **sizes, "retries": retries}

    def cost(self) -> dict[str, Any]:
        return {name: self.number(name) for name in ("usd", "hours")} | {
            name: self.text(name) for name in ("provider", "gpu")
        }


def _plain(value: object) -> Any:
    """An option's value as JSON has it, made safe to print."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, list):
        return [_plain(each) for each in value[:100]]
    return value if value is None or isinstance(value, bool | int | float) else shown(value)


def _clean(text: str) -> str:
    """`text` without what a terminal would obey, cut where it is too long for a table."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])
