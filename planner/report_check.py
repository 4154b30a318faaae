"""What `vramplan check` prints before its plan: what was read, from where, and what a plan does otherwise."""

from __future__ import annotations

import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import printable
from vramplan.planner.report import Block, Row, print_plan, show
from vramplan.planner.training import flags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vramplan.planner.configs import Reading
    from vramplan.planner.plan import Plan

_MOST_KEYS = 12  # without an effect on memory, shown by name
_MOST_UNKNOWN = 20  # a sentence for each
_WIDTH = 80  # of report's plain text


def print_check(reading: Reading, plan: Plan, *, explain: bool, advice: bool, timeline: bool) -> None:
    """The reading, then the plan as `vramplan plan` prints it."""
    whose = [reading, *([reading.launcher] if reading.launcher else [])]
    by = "; ".join(f"{each.framework.title}, by {', '.join(each.evidence)}" for each in whose)
    said = f"{printable(' and '.join(reading.files))}: {by}"
    page = [Block("", "<", [Row((said,), "bold")]), _options(reading, plan)]
    if others := list(_otherwise(reading)):
        page.append(Block("Otherwise than in the file", "<<", [Row(("-", text)) for text in others]))
    if reading.harmless:
        keys = reading.harmless[:_MOST_KEYS]
        rest = f" and {len(reading.harmless) - len(keys)} more" if len(reading.harmless) > len(keys) else ""
        page.append(Block("Without an effect on memory", "<", [Row((f"{', '.join(keys)}{rest}",))]))
    line = f"vramplan {shlex.quote(printable(reading.model))} {flags(reading.options)}"
    page.append(Block("The same without the file, also for vramplan probe and trace", "<", [Row((line,))]))
    show(page)
    sys.stdout.write("\n")
    print_plan(plan, explain=explain, advice=advice, timeline=timeline)


def _options(reading: Reading, plan: Plan) -> Block:
    used = plan.options.as_dict()
    read = [("model", plan.model.name, reading.sources["model"])]
    read += [
        (name, _shown(used[name]), reading.sources[name]) for name in reading.options if used.get(name) is not None
    ]
    beside = sum(max(len(row[i]) for row in read) + 2 for i in range(2))
    rows = [row for each in read for row in _rows(*each, _WIDTH - beside)]
    if plan.options.parallel.startswith("zero"):
        used.pop("reshard_after_forward")  # FSDP's own
    left = [
        f"{name} {_shown(value)}" for name, value in used.items() if value is not None and name not in reading.options
    ]
    rows.append(Row(("the rest", "", f"vramplan's own: {', '.join(left)}")))
    return Block("Read", "<<<", rows)


def _rows(name: str, value: str, source: str, room: int) -> list[Row]:
    """A line, or several where a key's path is longer than the room; it is broken after a dot then."""
    if all(len(word) <= room for word in source.split()):
        return [Row((name, value, source))]
    lines = [""]
    for part in re.findall(r"[^\s.]+\.?\s*|\.", source):
        if lines[-1] and len(lines[-1] + part.rstrip()) > room:
            lines.append("")
        lines[-1] += part
    return [Row((name, value, lines[0].rstrip())), *(Row(("", "", line.rstrip())) for line in lines[1:])]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _otherwise(reading: Reading) -> Iterator[str]:
    yield from reading.notes
    yield from (f"{each}; it is left out" for each in reading.unknown[:_MOST_UNKNOWN])
    if (more := len(reading.unknown) - _MOST_UNKNOWN) > 0:
        yield f"and {more} more unknown keys, which are left out"
