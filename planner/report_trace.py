"""What `vramplan trace` prints: the traced run, its plan beside it, and where they part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan.planner.report import Block, Row, recipe, show, verdict
from vramplan.planner.training import parse_options
from vramplan.planner.units import GIB, format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOTALS = (
    ("= peak allocated", "peak_allocated_bytes"),
    ("= peak reserved", "peak_reserved_bytes"),
    ("= device total", "device_bytes"),
)


def print_trace(found: Mapping[str, Any]) -> None:
    """A trace as `Trace.to_dict` gives it."""
    options = {name: value for name, value in found["options"].items() if name not in ("gpu", "stack")}
    top = [Row((f"traced: {recipe(found['model']['name'], parse_options(options))}",), "bold")]
    if found["gpu"]:
        top.append(verdict(found["gpu"]))
    page = [Block("", "<", top), _parameters(found["parameters"]), _memory(found)]
    if found["plan"]:
        page.append(_differences(found["plan"]["differences"]))
    if notes := [*found["warnings"], *found["memory"]["notes"]]:
        page.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    show(page)


def _parameters(counts: Mapping[str, Any]) -> Block:
    rows = [("base model", counts["total"]), ("trainable", counts["trainable"])]
    return Block("Parameters", "<>", [Row((name, format_count(number))) for name, number in rows])


def _memory(found: Mapping[str, Any]) -> Block:
    """The parts alive at the peak, traced and planned."""
    traced, planned = found["memory"], (found["plan"] or {}).get("memory")
    digits = 2 if traced["device_bytes"] >= GIB else 4

    def row(name: str, ours: int | None, theirs: int, style: str = "") -> Row:
        cells = [name, _decimal(theirs, digits)]
        if ours is not None:
            apart = ours - theirs
            cells += [_decimal(ours, digits), f"{'+' if apart > 0 else ''}{format_bytes(apart)}" if apart else "same"]
        return Row(tuple(cells), style)

    if planned is None:
        parts = [row(part["name"], None, part["bytes"]) for part in traced["components"]]
        header = Row(("", "GiB"), "dim")
    else:
        parts = [
            row(part["name"], part["planned_bytes"], part["traced_bytes"])
            for part in found["plan"]["differences"]["components"]
        ]
        header = Row(("GiB", "trace", "plan", "plan less trace"), "dim")
    totals = [row(name, planned and planned[field], traced[field], "bold") for name, field in _TOTALS]
    columns = "<>" if planned is None else "<>>>"
    return Block(f"Memory at the peak: {traced['peak_phase']}", columns, [header, *parts, *totals])


def _decimal(nbytes: int, digits: int) -> str:
    return f"{nbytes / GIB:,.{digits}f}"


def _differences(found: Mapping[str, Any]) -> Block:
    """The first tensor in which the two differ, and the largest."""
    if not found["tensors"]:
        return Block(
            "", "<", [Row(("trace and plan hold the same tensors of 100 KB and more, event by event",), "green")]
        )
    rows = [Row(("first", _tensor(found["first"])))]
    rows += [Row((f"{each['occurs']} x" if each["occurs"] > 1 else "", _tensor(each))) for each in found["largest"]]
    return Block(f"{format_count(found['tensors'])} tensors of 100 KB and more differ", "<<", rows)


def _tensor(each: Mapping[str, Any]) -> str:
    names = " <> ".join(filter(None, (each["planned"], each["seen"])))
    where = ", ".join(filter(None, (each["phase"], each["scope"])))
    sizes = f"planned {format_bytes(each['planned_bytes'])}, traced {format_bytes(each['seen_bytes'])}"
    return f"{each['kind'].replace('seen', 'traced')}: {names} ({where}): {sizes}"
