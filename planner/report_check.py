"""What `vramplan check` prints before its plan: what was read, from where, and what a plan does otherwise."""

from __future__ import annotations

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


def print_check(reading: Reading, plan: Plan, *, explain: bool, advice: bool, timeline: bool) -> None:
    """The reading, then the plan as `vramplan plan` prints it."""
    said = f"{printable(' and '.join(reading.files))}: {reading.framework.title}, by {', '.join(reading.evidence)}"
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
    rows = [Row(("model", plan.model.name, reading.sources["model"]))]
    rows += [
        Row((name, _shown(used[name]), reading.sources[name])) for name in reading.options if used.get(name) is not None
    ]
    left = [
        f"{name} {_shown(value)}" for name, value in used.items() if value is not None and name not in reading.options
    ]
    rows.append(Row(("the rest", "", f"vramplan's own: {', '.join(left)}")))
    return Block("Read", "<<<", rows)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _otherwise(reading: Reading) -> Iterator[str]:
    yield from reading.notes
    yield from (f"{each}; it is left out" for each in reading.unknown)
