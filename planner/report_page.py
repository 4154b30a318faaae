"""A plan as one HTML page: pictures to hover, tables, and how each figure came about (`vramplan report`).

The page opens without a network and asks for nothing: Vega draws the pictures from within it (vl-convert holds its
code; pip install 'vramplan[report]'), and a content security policy lets no other script run. Colours follow the
reader's light or dark setting. Names and configs are others': Jinja escapes all that is put in.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.planner import capacity, prices
from vramplan.planner.errors import UsageError, shown
from vramplan.planner.files import save
from vramplan.planner.plan import plan
from vramplan.planner.report import Block, Row, first_of, part_of_step, plan_page, show
from vramplan.planner.report_decide import fit_page
from vramplan.planner.report_plots import bars, colours_of, together
from vramplan.planner.training import OPTIONS
from vramplan.planner.trial import one_after_another
from vramplan.planner.units import GIB, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vramplan.planner.capacity import Capacity
    from vramplan.planner.plan import Plan
    from vramplan.planner.report_plots import Bar

    Spec = dict[str, Any]

_NEEDED = ("jinja2", "vl_convert")
# `ast` keeps Vega from making functions of text, which the page's policy forbids.
_START = """
for (const [id, spec] of Object.entries(JSON.parse(document.getElementById("charts").textContent)))
  vegaEmbed("#" + id, spec, {actions: false, ast: true, renderer: "svg", tooltip: {theme: "custom"}});
"""
# Vega passes colours through, and the page's style sheet says what they are in light and in dark.
_CONFIG: Spec = {
    "autosize": {"type": "fit-x", "contains": "padding"},
    "config": {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--ink)",
            "titleColor": "var(--faint)",
            "gridColor": "var(--line)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 110,
        },
        "text": {"color": "var(--ink)", "fontSize": 12},
        "rule": {"color": "var(--faint)"},
    },
}


def ready(file: str) -> None:
    """Raises UsageError for a file that is no .html by its name, or where what the page needs is not installed."""
    if Path(file).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{shown(file)} is no name of a page; end it in .html (--output)")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"a page needs {' and '.join(missing)}; pip install 'vramplan[report]'")


def write(
    file: str,
    asked: Mapping[str, Any],
    command: str,
    each: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = one_after_another,
) -> Plan:
    """Plans `asked`, as `plan` takes it, writes its page in the place of `file`, says so, and answers the plan.

    `command` makes the page again; `each` runs the searches, as for `capacity.fit`. Raises UsageError where there can
    be no plan, or the file cannot be written.
    """
    made = plan(**asked)
    card = made.gpu or next((fit.gpu for fit in made.gpus if fit.fits and not fit.lacks), None)
    found = None
    if card is not None:
        found = capacity.fit(
            **{name: value for name, value in asked.items() if name != "prices"} | {"gpu": card}, each=each
        )
    save(Path(file), page(made, found, command).encode("utf-8", errors="replace"), "--output")
    top = plan_page(made)[0]
    show([top._replace(rows=[*top.rows, Row((f"written to {file}",))])])
    return made


def page(made: Plan, found: Capacity | None, command: str) -> str:
    """The page of a plan, and of what fits a card where there is one; `command` makes it again."""
    from jinja2 import Environment, StrictUndefined

    top, *blocks = plan_page(made)
    notes = [row.cells[1] for block in blocks if block.heading == "Notes" for row in block.rows]
    stacks = together(bars(made))
    charts = {"timeline": timeline(made), "breakdown": breakdown(stacks)}
    fitting = fit_page(found)[1:] if found else []
    if found and any(cell.batch_size for cell in found.frontier):
        charts["frontier"] = frontier(found)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("vramplan.planner").joinpath("page.html").read_text("utf-8"))
    script = _script()
    written: str = template.render(
        title=top.rows[0].cells[0],
        verdict=top.rows[1:],
        over="the step" if made.memory.phase == "training" else made.memory.phase,
        peak=f"{format_gib(made.memory.peak_allocated_bytes)} at the peak, in {made.memory.peak_phase}",
        blocks=[block for block in blocks if block.heading != "Notes"],
        card=found.gpu.name if found else None,
        fitting=fitting,
        parts=[*made.memory.components, *made.sizes()],
        cards=_cards(made),
        options=_options(made),
        notes=notes,
        command=command,
        version=__version__,
        today=prices._today().isoformat(),
        stack=", ".join(f"{name} {version}" for name, version in dict(made.stack.versions).items()),
        charts={name: spec | _CONFIG for name, spec in charts.items()},
        colours=colours_of([name for bar in stacks for name in bar.parts]),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )
    return written


@cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed, then what draws; with nothing that would end the script's element."""
    import vl_convert

    return str(vl_convert.javascript_bundle(_START)).replace("</script", "<\\/script")


def _cards(made: Plan) -> Block:
    rows = [Row(("GPU", "GB", "CUDA sees", "needed", "headroom", ""), "dim")]
    for fit in made.gpus:
        words = "fits" if fit.headroom_bytes >= 0 else "only just" if fit.fits else "too small"
        lacks = f", without {' and '.join(fit.lacks)}" if fit.lacks else ""
        sizes = map(format_gib, (fit.gpu.budget_bytes, fit.needed_bytes, fit.headroom_bytes))
        rows.append(Row((fit.gpu.name, str(fit.gpu.memory_gb or ""), *sizes, words + lacks)))
    return Block("", "<>>>><", rows)


def _options(made: Plan) -> Block:
    values = made.options.as_dict()
    rows = [Row(("option", "value"), "dim")]
    for name in OPTIONS:
        value = values.get(name)
        rows.append(Row((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))))
    return Block("", "<<", rows)


# -------------------------------------------------------------------------------------------------------- the pictures


def timeline(made: Plan) -> Spec:
    """Allocated memory over the step, one stretch after another."""
    moments = made.memory.timeline
    rows: list[Spec] = [
        {
            "at": index,
            "to": index + 1,
            "in": moment.phase,
            "highest": moment.peak_bytes / GIB,
            "end": moment.end_bytes / GIB,
            "at most": _exact(moment.peak_bytes),
            "at its end": _exact(moment.end_bytes),
        }
        for index, moment in enumerate(moments)
    ]
    starts = first_of(part_of_step(moment.phase) for moment in moments)
    phases: list[Spec] = [
        {"from": start, "middle": (start + end) / 2, "to": end, "part": name}
        for (start, name), (end, _) in zip(starts, [*starts[1:], (len(moments), "")], strict=True)
    ]
    across: Spec = {"type": "quantitative", "axis": None, "scale": {"domain": [0, len(moments)], "nice": False}}
    top = 1.2 * max(moment.peak_bytes for moment in moments) / GIB
    up: Spec = {"type": "quantitative", "title": "allocated, GiB", "scale": {"domain": [0, top], "nice": False}}
    return {
        "width": "container",
        "height": 300,
        "data": {"values": [*rows, rows[-1] | {"at": len(rows)}]},  # so that the last step has an end
        "layer": [
            *(_area(name, colour, across, up) for name, colour in (("highest", "#8cc8ec"), ("end", "#2f7fb8"))),
            {
                "data": {"values": phases[1:]},
                "mark": {"type": "rule", "strokeDash": [3, 3]},
                "encoding": {"x": across | {"field": "from"}},
            },
            {
                "data": {"values": [each for each in phases if each["to"] - each["from"] > 0.1 * len(rows)]},
                "mark": {"type": "text", "baseline": "top", "dy": 4},
                "encoding": {"x": across | {"field": "middle"}, "y": {"value": 0}, "text": {"field": "part"}},
            },
            {
                "data": {"values": [row for row in rows if row["in"] == made.memory.peak_phase][:1]},
                "mark": {"type": "text", "dy": -10, "fontWeight": "bold"},
                "encoding": {
                    "x": across | {"field": "at"},
                    "y": up | {"field": "highest"},
                    "text": {"value": format_gib(made.memory.peak_allocated_bytes)},
                },
            },
            {
                "params": [{"name": "over", "select": {"type": "point", "on": "pointerover", "clear": "pointerout"}}],
                "mark": {"type": "rect", "color": "var(--ink)"},
                "encoding": {
                    "x": across | {"field": "at"},
                    "x2": {"field": "to"},
                    "opacity": {"condition": {"param": "over", "empty": False, "value": 0.2}, "value": 0},
                    "tooltip": _tips("in", "at most", "at its end"),
                },
            },
        ],
    }


def _area(name: str, colour: str, across: Spec, up: Spec) -> Spec:
    """Steps as high as `name` says."""
    return {
        "mark": {"type": "area", "interpolate": "step-after", "color": colour, "opacity": 1},
        "encoding": {"x": across | {"field": "at"}, "y": up | {"field": name}},
    }


def _exact(size: int) -> str:
    return f"{format_gib(size)}, {format_count(size)} B"


def _tips(*names: str) -> list[Spec]:
    return [{"field": name, "type": "nominal"} for name in names]


def breakdown(given: Sequence[Bar]) -> Spec:
    """What is on each card at the peak, and its limit."""
    colours = colours_of([name for bar in given for name in bar.parts])
    rows: list[Spec] = []
    limits: list[Spec] = []
    for bar in given:
        shown, limit, place = bar.label.split(" and ")[0], bar.limit_bytes or 0, 0
        for name, size in bar.parts.items():
            row = {"shown": shown, "card": bar.label, "part": name, "size": _exact(size)}
            rows.append(row | {"from": place / GIB, "to": (place + size) / GIB})
            place += size
        seen = {"shown": shown, "card": bar.label, "CUDA sees": format_gib(limit)}
        limits.append(seen | {"limit": limit / GIB, "headroom": format_gib(limit - place)})
    cards = {
        "field": "shown",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"domain": False, "ticks": False},
    }
    across: Spec = {"type": "quantitative", "title": "GiB", "axis": {"tickCount": 8}}
    colour = {"field": "part", "type": "nominal", "legend": None}
    return {
        "width": "container",
        "height": 34 * len(given),
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "bar", "stroke": "var(--card)", "strokeWidth": 1, "height": {"band": 0.7}},
                "encoding": {
                    "y": cards,
                    "x": across | {"field": "from"},
                    "x2": {"field": "to"},
                    "color": colour | {"scale": {"domain": [*colours], "range": [*colours.values()]}},
                    "tooltip": _tips("card", "part", "size"),
                },
            },
            {
                "data": {"values": limits},
                "mark": {
                    "type": "tick",
                    "color": "var(--limit)",
                    "thickness": 3,
                    "height": {"band": 0.95},
                    "opacity": 1,
                },
                "encoding": {
                    "y": cards,
                    "x": across | {"field": "limit"},
                    "tooltip": _tips("card", "CUDA sees", "headroom"),
                },
            },
        ],
    }


def frontier(found: Capacity) -> Spec:
    """The largest batch for each sequence length."""
    rows: list[Spec] = [
        {
            "seq_len": cell.seq_len,
            "batch_size": cell.batch_size,
            "tokens": format_count(cell.seq_len * cell.batch_size),
            "to spare": format_gib(cell.trial.fit.headroom_bytes) if cell.trial and cell.trial.fit else "",
            "tokens a second": format_count(round(cell.time.tokens_per_s)) if cell.time else "not known",
        }
        for cell in found.frontier
        if cell.batch_size
    ]
    lengths = sorted(row["seq_len"] for row in rows)
    highest = max(row["batch_size"] for row in rows)
    doublings = [2**i for i in range(highest.bit_length() + 1)]
    return {
        "width": "container",
        "height": 280,
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "seq_len",
                "type": "quantitative",
                "title": "seq_len, tokens",
                "scale": {"type": "log", "base": 2, "domain": [lengths[0] / 1.2, lengths[-1] * 1.2], "nice": False},
                "axis": {"values": lengths, "format": ",d"},
            },
            "y": {
                "field": "batch_size",
                "type": "quantitative",
                "title": "largest batch_size",
                "scale": {"type": "log", "base": 2, "domain": [0.7, highest * 1.5], "nice": False},
                "axis": {"values": doublings, "format": ",d"},
            },
        },
        "layer": [
            {"mark": {"type": "line", "color": "#009e73", "strokeWidth": 2}},
            {
                "mark": {"type": "point", "filled": True, "size": 120, "color": "#009e73"},
                "encoding": {"tooltip": _tips(*rows[0])},
            },
            {
                "mark": {"type": "text", "dy": -14},
                "encoding": {"text": {"field": "batch_size", "type": "quantitative", "format": ",d"}},
            },
        ],
    }
