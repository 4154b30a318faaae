"""Pictures of plans: the step's timeline, memory on each card and of each row of a table, batch against sequence,
planned against measured.

matplotlib draws them (pip install 'vramplan[plot]'), without pyplot and in one style, whatever a matplotlibrc says. The
same question gives the same SVG on the same day. Colours are Okabe and Ito's, which the colour-blind can tell apart
(https://jfly.uni-koeln.de/color/); none says what words or places do not.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan import __version__
from vramplan.planner import prices
from vramplan.planner.errors import UsageError, shown
from vramplan.planner.files import save
from vramplan.planner.report import card_groups, first_of, part_of_step, percent, recipe, title
from vramplan.planner.table import typed
from vramplan.planner.units import GIB, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vramplan.planner import capacity
    from vramplan.planner.capacity import Capacity
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.plan import Plan
    from vramplan.planner.table import Cell, Table
    from vramplan.planner.verify import Score

TYPES = ("svg", "png", "pdf")
PLOTS = ("timeline", "breakdown")  # of a plan
CACHED, NCCL, CONTEXT, SMALLER = "cached by PyTorch, unused", "NCCL", "CUDA context", "smaller parts"
LOADING = "more while it is loaded"
_ENDS = (SMALLER, CACHED, LOADING, NCCL, CONTEXT)  # of every bar, in this order
_MOST_BARS = 60
_SMALL = 0.01  # of the whole: what is less is put together
_COLUMNS = 4  # of the breakdown's legend
_INK, _FAINT, _LIMIT = "#1b1b1b", "#6b6b6b", "#c00000"
_BLUE, _ORANGE, _GREEN = "#0072b2", "#e69f00", "#009e73"
COLOURS = {
    "weights": _BLUE,
    "weights, 4 bit": "#56b4e9",
    "adapter": "#882255",
    "gradients": "#f0e442",
    "optimizer states": _ORANGE,
    "saved activations": _GREEN,
    "logits and loss": "#d55e00",
    "temporary buffers": "#cc79a7",
    "batch": "#332288",
    "cuBLAS workspace": "#44aa99",
    "block rounding": "#999933",
    "master weights": "#661100",
    "gathered weights": "#117733",
    "communication buffers": "#aa4499",
    "gradient buckets": "#ddcc77",
    SMALLER: "#8c8c8c",
    CACHED: "#c4c4c4",
    LOADING: "#e0b0b0",
    NCCL: "#a3a3a3",
    CONTEXT: "#5c5c5c",
}
_OTHERS = ("#88ccee", "#cc6677", "#6699cc", "#997700")  # Paul Tol's, for parts that have no colour above
_METHODS = {"full": ("#d55e00", "s"), "lora": (_BLUE, "o"), "qlora": (_GREEN, "^")}  # colour and marker
_STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a model's name may hold dollars
    "svg.fonttype": "none",  # text stays text: to be searched, read aloud, compared
    "svg.hashsalt": "vramplan",
}


class Bar(NamedTuple):
    """One stack: its label, its parts in bytes from the bottom up, and the bytes that are there, where known."""

    label: str
    parts: Mapping[str, int]
    limit_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """The whole stack."""
        return sum(self.parts.values())


def ready(file: str) -> str:
    """The type of a picture by its name's ending; raises UsageError for another, or where matplotlib is not there."""
    ending = Path(file).suffix.removeprefix(".").lower()
    if ending not in TYPES:
        known = ", ".join(f".{each}" for each in TYPES)
        raise UsageError(f"{shown(file)} ends in no type of picture that can be drawn; known: {known} (--plot)")
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib; pip install 'vramplan[plot]' (--plot)")
    return ending


def provenance(command: str) -> str:
    """Where a picture is from: the command that makes it again, the version and the day."""
    return f"{command}  |  vramplan {__version__}  |  {prices._today().isoformat()}"


def draw(file: str, what: str, made: Plan | Capacity | Table | Sequence[Score], command: str) -> None:
    """Draws `what` ("timeline" or "breakdown" of a Plan, "frontier", "rows" of a Table, "accuracy") into `file`.

    An earlier picture is replaced. `command` stands in the caption. Raises UsageError where matplotlib is not installed
    or the file cannot be written.
    """
    ending = ready(file)
    drawn: Any = {
        "timeline": timeline, "breakdown": breakdown, "frontier": frontier, "rows": rows, "accuracy": accuracy
    }[what]  # fmt: skip
    undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}  # the day is in the caption
    out = io.BytesIO()
    with _style():
        figure = drawn(made)
        height = figure.get_figheight()
        caption = _broken(provenance(command), int(15 * figure.get_figwidth()))
        figure.text(0.01, 0.06 / height, caption, fontsize=7.5, color=_FAINT)
        bottom = 0.1 + 0.16 * (caption.count("\n") + 1)  # inches, up from the edge
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, bottom / height))
            bottom += 0.21 * -(-len(legend.get_texts()) // _COLUMNS) + 0.1
        figure.get_layout_engine().set(rect=(0, bottom / height, 1, 1 - bottom / height))
        figure.savefig(out, format=ending, metadata=undated.get(ending))
    save(Path(file), out.getvalue(), "--plot")


@contextmanager
def _style() -> Iterator[None]:
    """Our style over matplotlib's own defaults, until the end of the block."""
    import warnings

    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a model's name; a box stands for it
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _figure(heading: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_broken(heading, int(11 * width)), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _broken(text: str, width: int) -> str:
    import textwrap

    printable = "".join(each if each.isprintable() else " " for each in text)
    return "\n".join(textwrap.wrap(printable, width, break_on_hyphens=False))


# -------------------------------------------------------------------------------------------------------- the timeline


def timeline(plan: Plan) -> Figure:
    """Allocated memory over the step, or the phase, that holds the peak: how high each stretch goes, where it ends."""
    moments = plan.memory.timeline
    named = "" if plan.memory.phase == "training" else f": {plan.memory.phase}"
    figure = _figure(title(plan) + named, 9, 4.4)
    axes = figure.add_subplot()
    edges = list(range(len(moments) + 1))
    ends = [moment.end_bytes / GIB for moment in moments]
    peaks = [moment.peak_bytes / GIB for moment in moments]
    axes.stairs(peaks, edges, fill=True, color="#56b4e9", alpha=0.45, label="highest within")
    axes.stairs(ends, edges, fill=True, color=_BLUE, label="held at its end")
    top = max(peaks)
    at = next(i for i, moment in enumerate(moments) if moment.phase == plan.memory.peak_phase)
    words = f"peak {format_gib(plan.memory.peak_allocated_bytes)}\n{plan.memory.peak_phase}"
    left = at < len(moments) / 2
    axes.annotate(
        words,
        (at + 0.5, top),
        xytext=(18 if left else -18, 14),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.8},
    )
    axes.set_ylim(0, 1.2 * top)
    axes.set_xlim(0, len(moments))
    axes.set_ylabel("allocated, GiB")
    axes.grid(axis="y")
    _phases(axes, [moment.phase for moment in moments])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, fontsize=9)
    return figure


def _phases(axes: Axes, names: Sequence[str]) -> None:
    """The parts of the step along the axis; a name that has no room goes without."""
    starts = first_of(map(part_of_step, names))
    places, words = [], []
    for (start, name), (end, _) in zip(starts, [*starts[1:], (len(names), "")], strict=True):
        if start:
            axes.axvline(start, color=_FAINT, linewidth=0.8, linestyle=":")
        if end - start >= 0.012 * len(name) * len(names):
            places.append((start + end) / 2)
            words.append(name)
    axes.set_xticks(places, words)
    axes.tick_params(axis="x", length=0)


# ------------------------------------------------------------------------------------------------------- the breakdown


def breakdown(plan: Plan) -> Figure:
    """What is on each of some cards at the peak, and their limits: the named one and one of each size around."""
    figure = stacked(title(plan), bars(plan), "memory that CUDA sees")
    figure.axes[0].set_xlabel(f"GiB at the peak: {plan.memory.peak_phase}")
    return figure


def bars(plan: Plan) -> list[Bar]:
    """A bar for the named card and for each size of card that the plan's table shows, smallest first.

    Only the CUDA context differs between them; it is that part of it which counts against what CUDA sees.
    """
    small, large = card_groups(plan.gpus)
    groups = [*small, *large]
    fits = {group[0].gpu.name + f" and {len(group) - 1} more" * (len(group) > 1): group[0] for group in groups}
    if plan.fit:
        others = {label: fit for label, fit in fits.items() if fit.gpu.memory_gb != plan.fit.gpu.memory_gb}
        fits = {plan.fit.gpu.name: plan.fit} | others
    return [
        Bar(label, _parts(plan.memory, fit.needed_bytes - plan.memory.most_reserved_bytes), fit.gpu.budget_bytes)
        for label, fit in sorted(fits.items(), key=lambda each: each[1].gpu.budget_bytes)
    ]


def _parts(memory: MemoryEstimate, context_bytes: int) -> dict[str, int]:
    """What is on a GPU at the peak, `context_bytes` beside what PyTorch reserves, and what loading takes beyond."""
    beyond = memory.most_reserved_bytes - memory.peak_reserved_bytes
    return {
        **{each.name: each.bytes for each in memory.components},
        CACHED: memory.peak_reserved_bytes - memory.peak_allocated_bytes,
        **({LOADING: beyond} if beyond else {}),
        **({NCCL: memory.nccl_bytes} if memory.nccl_bytes else {}),
        CONTEXT: context_bytes - memory.nccl_bytes,
    }


def rows(table: Table) -> Figure:
    """What is on a GPU in each row of a table that was made to be drawn: bars in its order."""
    given: dict[str, Bar] = {}  # cells that one GPU makes alike are one row
    for cell in table.cells:
        if (memory := cell.memory) is not None:
            hidden = 0 if cell.budget_bytes is None else memory.hidden_bytes
            label = _label(table, cell)
            given[label] = Bar(label, _parts(memory, memory.context_bytes - hidden), cell.budget_bytes)
    if len(given) > _MOST_BARS:
        raise UsageError(f"these are {len(given)} bars, and a picture holds {_MOST_BARS}; leave values out (--plot)")
    names = {axis.name: axis.values for axis in table.axes}
    model = f": {names['model'][0]}" if len(names["model"]) == 1 else ""
    return stacked(f"Memory of each GPU at the peak{model}", list(given.values()), "memory that CUDA sees")


def _label(table: Table, cell: Cell) -> str:
    """A row's values on the axes that tell rows apart; an option's with its name."""
    words = []
    for place in table.varied:
        name, value = table.axes[place].name, cell.labels[place]
        if name == "num_gpus":
            words.append("1 GPU" if value == 1 else f"{value:,} GPUs")
        elif value is not None:
            words.append(typed(value) if name in ("model", "gpu", "method", "parallel") else f"{name} {typed(value)}")
    return ", ".join(words)


def stacked(heading: str, given: Sequence[Bar], limit: str = "the limit") -> Figure:
    """Lying stacks, one a bar: labels at the left, the sum and what is left at the right, `limit`s as lines.

    Parts below a hundredth of the largest bar are put together.
    """
    given = together(given)
    names = sorted(dict.fromkeys(name for bar in given for name in bar.parts), key=lambda name: name in _ENDS)
    colours = colours_of(names)
    figure = _figure(heading, 9, 1.7 + 0.42 * len(given) + 0.21 * -(-len(names) // _COLUMNS))
    axes = figure.add_subplot()
    rows = list(range(len(given)))
    left = [0.0] * len(given)
    for name in names:
        sizes = [bar.parts.get(name, 0) / GIB for bar in given]
        axes.barh(
            rows, sizes, left=left, color=colours[name], label=name, height=0.62, edgecolor="white", linewidth=0.6
        )
        left = [at + size for at, size in zip(left, sizes, strict=True)]
    most = max(max(left), *(bar.limit_bytes / GIB for bar in given if bar.limit_bytes is not None), 0.0)
    for row, bar in enumerate(given):
        if bar.limit_bytes is not None:
            line = axes.plot([bar.limit_bytes / GIB] * 2, [row - 0.44, row + 0.44], color=_LIMIT, linewidth=2.2)
            line[0].set_label("" if row else limit)
        axes.text(
            max(left[row], (bar.limit_bytes or 0) / GIB) + 0.012 * most, row, _spare(bar), va="center", fontsize=9
        )
    axes.set_yticks(rows, [bar.label for bar in given])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.24)
    axes.set_xlabel("GiB")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    figure.legend(loc="lower left", ncols=_COLUMNS, fontsize=9, columnspacing=1.4)
    return figure


def _spare(bar: Bar) -> str:
    if bar.limit_bytes is None:
        return format_gib(bar.bytes)
    spare = bar.limit_bytes - bar.bytes
    return f"{format_gib(abs(spare))} {'to spare' if spare >= 0 else 'too much'}"


def together(given: Sequence[Bar]) -> list[Bar]:
    """The bars with the parts that are small in each of them put together."""
    least = _SMALL * max(bar.bytes for bar in given)
    names = list(dict.fromkeys(name for bar in given for name in bar.parts))
    small = {name for name in names if max(bar.parts.get(name, 0) for bar in given) < least}
    answer = []
    for bar in given:
        parts = {name: bar.parts.get(name, 0) for name in names if name not in small}
        rest = sum(size for name, size in bar.parts.items() if name in small)
        ends = {name: parts.pop(name) for name in _ENDS if name in parts}
        answer.append(bar._replace(parts=parts | ({SMALLER: rest} if rest else {}) | ends))
    return answer


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each part, the same in every picture."""
    others = iter(_OTHERS * len(names))
    return {name: COLOURS.get(name) or next(others) for name in dict.fromkeys(names)}


# -------------------------------------------------------------------------------------------------------- the frontier


def frontier(found: Capacity) -> Figure:
    """The largest batch for each sequence length, of each method that was tried."""
    lines = {name: [cell for cell in cells if cell.batch_size] for name, cells in groupby(found.frontier, _method)}
    if not any(lines.values()):
        reason = "nothing fits" if lines else "it takes batch_size and seq_len, both varied (--over)"
        raise UsageError(f"there is no frontier of batch and sequence to draw: {reason}")
    run = found.options
    what = recipe(found.model.name, run).replace(f", batch {run.batch_size} x {run.seq_len}", "")
    if len(lines) > 1:
        what = f"{found.model.name} by {', '.join(lines)}"
    figure = _figure(f"The largest batch on {found.gpu.name}: {what}", 8, 4.8)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for name, cells in lines.items():
        colour, marker = _METHODS[name]
        across, up = [cell.seq_len for cell in cells], [cell.batch_size or 0 for cell in cells]
        axes.plot(across, up, color=colour, marker=marker, label=name, linewidth=1.6)
        if len(lines) == 1:
            axes.fill_between(across, up, 0.5, color=colour, alpha=0.12, linewidth=0)
            for cell in cells:
                speed = f"\n{format_count(round(cell.time.tokens_per_s))} tokens/s" if cell.time else ""
                words, at = f"{format_count(cell.batch_size or 0)}{speed}", (cell.seq_len, cell.batch_size or 0)
                axes.annotate(words, at, (5, 6), textcoords="offset points", fontsize=8)
    lengths = sorted({cell.seq_len for cell in found.frontier if cell.batch_size})
    highest = max(cell.batch_size or 0 for cell in found.frontier)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.5)
    axes.set_ylim(0.75, highest * 2.2)
    axes.set_xticks(lengths, [format_count(length) for length in lengths])
    doublings = [2**i for i in range(highest.bit_length() + 1)]
    axes.set_yticks(doublings, [format_count(size) for size in doublings])
    axes.minorticks_off()
    axes.set_xlabel("seq_len, tokens" + _beyond(found))
    axes.set_ylabel("largest batch_size")
    axes.grid()
    axes.legend(loc="upper right", fontsize=9)
    return figure


def _method(cell: capacity.Cell) -> str:
    return cell.method


def _beyond(found: Capacity) -> str:
    longer = [cell.seq_len for cell in found.frontier if not cell.batch_size]
    last = max(cell.seq_len for cell in found.frontier if cell.batch_size)
    return f" (at {format_count(min(longer))} not one sequence fits)" if longer and min(longer) > last else ""


# ------------------------------------------------------------------------------------------------------------ accuracy


def accuracy(scores: Sequence[Score]) -> Figure:
    """Planned against measured: peak reserved memory of each run, and the errors of both peaks."""
    from vramplan.planner.verify import spreads

    measured = [each for each in scores if "allocated" in each.errors]
    if not measured:
        raise UsageError("no measured run has figures to hold a plan against, so there is nothing to draw (--plot)")
    figure = _figure(f"Peak memory planned and measured, {len(measured)} runs", 10, 4.8)
    first, second = figure.subplots(1, 2)
    figures = [name for name in ("allocated", "reserved") if any(name in each.errors for each in measured)]
    sizes = [each.run.figures[name] / GIB for each in measured for name in figures if name in each.errors]
    ends = [min(sizes) / 1.3, max(sizes) * 1.3]
    first.plot(ends, ends, color=_FAINT, linewidth=0.9, label="as measured")
    second.axhline(0, color=_FAINT, linewidth=0.9)
    for method, (colour, marker) in _METHODS.items():
        for name in figures:
            group = [each for each in measured if each.method == method and name in each.errors]
            real = [each.run.figures[name] / GIB for each in group]
            filled = {"facecolor": colour if name == "allocated" else "none", "edgecolor": colour, "marker": marker}
            style: dict[str, Any] = filled | {"s": 22, "linewidth": 0.9, "alpha": 0.8}
            planned = [size * (1 + each.errors[name]) for size, each in zip(real, group, strict=True)]
            first.scatter(real, planned, label=f"{method}, {name}" if group else "", **style)
            second.scatter(real, [100 * each.errors[name] for each in group], **style)
    for axes in (first, second):
        axes.set_xscale("log")
        axes.set_xlabel("measured, GiB")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid()
    first.set_yscale("log")
    first.yaxis.set_major_formatter("{x:g}")
    first.set_ylabel("planned, GiB")
    first.legend(fontsize=8, loc="upper left")
    second.set_ylabel("planned / measured - 1, percent")
    found = spreads(measured)
    words = [
        f"{n}: median {percent(s.median)} %, worst {percent(s.worst)} %" for n in figures if (s := found[n]["all"])
    ]
    second.set_title("\n".join(words), loc="left", fontsize=9)
    return figure
