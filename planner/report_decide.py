"""What `vramplan fit`, `vramplan choose` and `vramplan compare` print."""

from __future__ import annotations

import shlex
from itertools import groupby
from typing import TYPE_CHECKING

from vramplan.planner import comparison
from vramplan.planner.capacity import GPUS, MOST_TOKENS, loads_alone
from vramplan.planner.errors import UsageError
from vramplan.planner.links import assumed
from vramplan.planner.report import Block, Row, gpus_in_use, offered, recipe, short, show, verdict, whole_run
from vramplan.planner.training import OPTIONS, parse_options
from vramplan.planner.units import GIB, format_bytes, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vramplan.planner.capacity import Capacity, Cell, Limit, Size
    from vramplan.planner.choose import Choice, Tried, Way
    from vramplan.planner.comparison import Side
    from vramplan.planner.trial import Trial

_COMMAND_WIDTH = 76  # of a line; the backslash comes after

# ---------------------------------------------------------------------------------------------------------------- fit


def print_fit(found: Capacity) -> None:
    """The largest sizes, the methods, and the frontier."""
    show(fit_page(found))


def fit_page(found: Capacity) -> list[Block]:
    """The same as blocks."""
    shared = found.gpus[-1][1].options if found.gpus else None
    what = recipe(found.model.name, shared or found.options)
    if shared:
        what = what.replace(f"{shared.num_gpus:,} GPUs", "some number of GPUs")
    top = [Row((what,), "bold")]
    if found.asked.fit and not found.gpus:
        first, style = verdict(found.asked.fit.to_dict())
        top.append(Row((f"as asked it {first[0]}",), style))
    page = [Block("", "<", top)]
    name = found.gpu.name
    if found.limits:
        rows = [Row(("", "largest", "to spare", "beyond it"), "dim"), *map(_limit, found.limits)]
        page.append(Block(f"The largest that fits {name}, each by itself", "<>><", rows))
    if found.methods:
        heading = f"Methods on {name}, batch {found.options.batch_size} x {found.options.seq_len}"
        page.append(Block(heading, "<<", [_method(method, trial) for method, trial in found.methods]))
    if found.gpus:
        counts = [_method(f"{number:,} GPU" + "s" * (number > 1), trial) for number, trial in found.gpus]
        number, last = found.gpus[-1]
        if not last.survives and number < GPUS[-1]:
            counts.append(Row(("more", _no_more(last))))
        page.append(
            Block(
                f"Number of GPUs ({name}), batch {found.options.batch_size} x {found.options.seq_len} on each",
                "<<",
                counts,
            )
        )
    if found.frontier:
        page.append(_frontier(found.frontier, name))
    if notes := list(_fit_notes(found)):
        page.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    return [*page, _commands([found.command])]


def _no_more(last: Trial) -> str:
    if loads_alone(last):
        return "do not help: each loads the whole model, as from_pretrained does without a device_map"
    return "do not help: what each holds by itself, padding included, is too much"


def _limit(limit: Limit) -> Row:
    beyond = [f"{format_count(limit.only_just.value)} fits only just"] if limit.only_just else []
    if limit.fails:
        beyond.append(_failing(limit.fails))
    if not beyond:
        beyond.append(f"no more is tried than {format_count(limit.sizes[-1])}")
    best = limit.largest
    cells = (format_count(best.value), _spare(best.trial)) if best else ("none", "")
    return Row((limit.over, *cells, "; ".join(beyond)), "" if best else "bold red")


def _failing(size: Size) -> str:
    return size.trial.refused or f"{format_count(size.value)} {_lacking(size.trial)}"


def _lacking(trial: Trial) -> str:
    lacking = -trial.fit.headroom_bytes if trial.fit else 0
    too_much = format_gib(lacking) if lacking > GIB // 100 else format_bytes(lacking)
    return f"runs out of memory in {trial.runs_out!r}: {too_much} too much with its cache"


def _spare(trial: Trial) -> str:
    return format_gib(trial.fit.headroom_bytes) if trial.fit else ""


def _method(method: str, trial: Trial) -> Row:
    if trial.roomy:
        return Row((method, f"fits, {_spare(trial)} to spare"), "green")
    if trial.survives:
        return Row((method, "fits only just"), "yellow")
    return Row((method, trial.refused or _lacking(trial)))


def _frontier(cells: tuple[Cell, ...], gpu: str) -> Block:
    """Sequence lengths down; of each method across the largest batch, and of a single one more about it."""
    methods = {method: list(group) for method, group in groupby(cells, key=lambda cell: cell.method)}
    heading = f"The largest batch on {gpu} for each sequence length"
    if len(methods) == 1:
        return Block(heading, ">>>>><", list(_one_frontier(cells)))
    rows = [Row(("seq_len", *(word for method in methods for word in (method, "tokens/s"))), "dim")]
    for line in zip(*methods.values(), strict=True):
        pairs = [(_batch(cell), _speed(cell)) for cell in line]
        rows.append(Row((format_count(line[0].seq_len), *(word for pair in pairs for word in pair))))
        if not any(cell.batch_size for cell in line):
            break
    return Block(heading, ">" * len(rows[0].cells), rows)


def _one_frontier(cells: tuple[Cell, ...]) -> Iterator[Row]:
    fastest = max((cell.time.tokens_per_s for cell in cells if cell.time), default=None)
    several = any(cell.trial and cell.trial.options and cell.trial.options.num_gpus > 1 for cell in cells)
    own, all_of_them = ("tokens of each", "tokens/s of all") if several else ("tokens", "tokens/s")
    yield Row(("seq_len", "batch_size", own, "to spare", all_of_them if fastest else "", ""), "dim")
    for cell in cells:
        length = format_count(cell.seq_len)
        if cell.batch_size is None or cell.trial is None:
            yield Row((length, "none", "", "", "", "nor longer" if cell.seq_len < cells[-1].seq_len else ""))
            return
        mark = "fastest" if cell.time and cell.time.tokens_per_s == fastest else ""
        tokens = format_count(cell.batch_size * cell.seq_len)
        yield Row((length, _batch(cell), tokens, _spare(cell.trial), _speed(cell), mark))


def _batch(cell: Cell) -> str:
    return "none" if cell.batch_size is None else format_count(cell.batch_size)


def _speed(cell: Cell) -> str:
    return format_count(round(cell.time.tokens_per_s)) if cell.time else ""


def _fit_notes(found: Capacity) -> Iterator[str]:
    tried = {limit.over: limit.sizes for limit in found.limits}
    words = []
    if "seq_len" in tried:
        sizes = tried["seq_len"]
        every = f" in multiples of {sizes[0]}" if sizes[0] > 1 else ""
        whose = ", the model's positions" if sizes[-1] < MOST_TOKENS else ""
        words.append(f"seq_len{every} up to {format_count(sizes[-1])}{whose}")
    if "rank" in tried:
        words.append("rank in powers of two")
    if words:
        yield f"tried are {' and '.join(words)}"
    if any(limit.only_just for limit in found.limits) or any(t.survives and not t.roomy for _, t in found.methods):
        yield (
            "what fits only just survives because PyTorch gives its cache back, which costs time; the largest fits "
            "with its whole cache"
        )
    yield from found.sharing
    yield from found.warnings


def _commands(lines: Iterable[str]) -> Block:
    """Commands that make the plans again, each once, cut where a shell takes it as one."""
    rows: list[Row] = []
    for line in dict.fromkeys(lines):
        row = ""
        for word in map(shlex.quote, shlex.split(line)):
            if row and len(row) + len(word) > _COMMAND_WIDTH:
                rows.append(Row((f"{row} \\",)))
                row = " "
            row = f"{row} {word}" if row else word
        rows.append(Row((row,)))
    return Block("Reproduce", "<", rows)


# ------------------------------------------------------------------------------------------------------------- choose


def print_choice(found: Choice, *, everything: bool = False) -> None:
    """The cheapest and the fastest way, those between them, and their commands; with `everything` all ways."""
    show(choice_page(found, everything=everything))


def choice_page(found: Choice, *, everything: bool = False) -> list[Block]:
    """The same as blocks."""
    page = [Block("", "<", list(_choice_head(found)))]
    ends = {"cheapest": found.cheapest, "fastest": found.fastest} if found.within else {"closest": found.closest}
    if found.cheapest and found.cheapest is found.fastest:
        ends = {"cheapest and fastest": found.cheapest}
    if any(ends.values()):
        page.append(Block("", "<<", [Row((name, _in_words(way, found))) for name, way in ends.items() if way]))
    ways = found.within or found.ways if everything else found.shortlist
    if ways:
        rows = [Row(("$", "hours", "", "method", "GPU", "offer"), "dim"), *(_way(way, found) for way in ways)]
        heading = f"Ways within {_limits(found)}" if found.within and _limits(found) else "Ways"
        page.append(Block(f"{heading}, the cheapest first", ">>><<<", rows))
        page.append(_commands(way.tried.command for way in ways))
    if notes := list(_choice_notes(found, ways)):
        page.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    return page


def _choice_head(found: Choice) -> Iterator[Row]:
    methods = dict.fromkeys(each.method for each in found.tried)
    cards = {each.gpu.name for each in found.tried}
    on = f"{len(cards)} GPUs" if len(cards) > 1 else " ".join(cards)
    yield Row((f"{found.model.name} by {', '.join(methods)} on {on} let by the hour",), "bold")
    yield Row((whole_run(found.options),))
    limits = _limits(found)
    if not found.ways:
        yield Row((_without_way(found),), "bold red")
    elif not found.within:
        yield Row((f"none of {len(found.ways)} ways is within {limits}",), "bold red")
    elif limits:
        yield Row((f"{len(found.within)} of {len(found.ways)} ways are within {limits}",), "green")


def _without_way(found: Choice) -> str:
    holding = [each for each in found.tried if each.trial.survives]
    if not holding:
        return "no GPU with an offer holds it"
    if all(each.step_s is None for each in holding):
        return "of what holds it no time of a step is known, and so no cost"
    return f"no known offer has {found.options.num_gpus} GPUs in one host; a file of your own may have one (--prices)"


def _limits(found: Choice) -> str:
    words = []
    if found.budget_usd is not None:
        words.append(f"${found.budget_usd:,.2f}".removesuffix(".00"))
    if found.deadline_s is not None:
        unit, seconds = next(each for each in (("h", 3600), ("min", 60), ("s", 1)) if found.deadline_s >= each[1])
        words.append(f"{found.deadline_s / seconds:.4g} {unit}")
    return " and ".join(words)


def _in_words(way: Way, found: Choice) -> str:
    made = way.cost
    kwh = "" if made.kwh is None else f", {short(made.kwh)} kWh"
    span = f"{short(made.hours)} h ({short(made.hours_low)} to {short(made.hours_high)})"
    gpus = gpus_in_use(made.offer.gpu, made.num_gpus)
    words = [f"{way.tried.method} on {gpus} of {made.offer.provider}: ${made.usd:,.2f}, {span}{kwh}"]
    if found.budget_usd is not None and made.usd > found.budget_usd:
        words.append(f"${made.usd - found.budget_usd:,.2f} above the budget")
    if found.deadline_s is not None and 3600 * made.hours > found.deadline_s:
        words.append(f"{short(made.hours - found.deadline_s / 3600)} h beyond the deadline")
    return "; ".join(words)


def _way(way: Way, found: Choice) -> Row:
    made = way.cost
    words = [offered(made)]
    if not way.tried.trial.roomy:
        words.append("only just")
    if found.within and not found.certain(way):
        words.append("beyond if slow")
    ends = {"the cheapest": found.cheapest, "the fastest": found.fastest}
    words += [word for word, end in (ends if found.within else {"the closest": found.closest}).items() if way is end]
    span = f"{short(made.hours_low)}-{short(made.hours_high)}"
    cells = (
        f"{made.usd:,.2f}",
        short(made.hours),
        span,
        way.tried.method,
        gpus_in_use(made.offer.gpu, made.num_gpus),
        ", ".join(words),
    )
    return Row(cells, "" if found.certain(way) else "yellow")


def _choice_notes(found: Choice, ways: Sequence[Way]) -> Iterator[str]:
    hidden = len(found.within or found.ways) - len(ways)
    if hidden:
        yield (
            f"{hidden} more are left out, most because another of the same method is as cheap, as fast and as firm; "
            "--all shows them"
        )
    for method, group in groupby(found.tried, key=lambda each: each.method):
        tries = list(group)
        if not any(each.trial.survives for each in tries):
            yield f"{method}: {_nowhere(tries)}"
    lacking = ((" and ".join(each.trial.fit.lacks) if each.trial.fit else "", each.gpu.name) for each in found.tried)
    for ability, cards in _grouped(lacking):
        yield f"left out, since they lack {ability}: {cards}"
    halves = (("fp16" if _in_fp16(way, found) else "", way.cost.offer.gpu) for way in ways)
    for _, cards in _grouped(halves):
        yield f"without bf16, and so planned in fp16: {cards}"
    if any(not way.tried.trial.roomy for way in ways):
        yield "what fits only just survives because PyTorch gives its cache back, which costs time that is not counted"
    joined = dict.fromkeys(
        (assumed(way.tried.gpu, way.cost.num_gpus), gpus_in_use(way.cost.offer.gpu, way.cost.num_gpus)) for way in ways
    )
    for words, cards in _grouped(joined):
        yield f"{cards}: {words}"
    if any(way.cost.num_gpus > 1 for way in ways):
        yield "each of several GPUs takes batch_size, so a step's batch is so much larger, and steps are fewer"
    yield "hours and dollars are those of training alone, with the options as asked on every GPU"
    yield from found.warnings


def _nowhere(tries: Sequence[Tried]) -> str:
    """Why a method fits no GPU."""
    fits = [
        (each.trial.fit.headroom_bytes, gpus_in_use(each.gpu.name, each.num_gpus)) for each in tries if each.trial.fit
    ]
    if not fits:
        return tries[0].trial.refused
    room, name = max(fits)
    less = format_gib(-room)
    return f"no GPU with an offer holds it; {name} comes closest, at least {less} too small{' each' * (' x ' in name)}"


def _in_fp16(way: Way, found: Choice) -> bool:
    options = way.tried.trial.options
    return options is not None and options.mixed_precision == "fp16" != found.options.mixed_precision


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """For each first word that is not empty its second words, each once, in one text."""
    groups: dict[str, dict[str, None]] = {}
    for first, second in pairs:
        if first:
            groups.setdefault(first, {})[second] = None
    return [(first, ", ".join(seconds)) for first, seconds in groups.items()]


# ------------------------------------------------------------------------------------------------------------ compare

_PEAKS = {
    "peak_allocated_bytes": "= peak allocated",
    "peak_reserved_bytes": "= peak reserved",
    "device_bytes": "= device total",
}
_DELTAS = 3  # up to so many plans each has a column of its difference to the first


def print_comparison(sides: Sequence[Side]) -> None:
    """The sides beside each other."""
    show(comparison_page(sides))


def comparison_page(sides: Sequence[Side]) -> list[Block]:
    """The same as blocks: who is who, the options that differ, and row by row the figures."""
    letters = comparison.LETTERS[: len(sides)]
    who = [Row((letter, _described(side))) for letter, side in zip(letters, sides, strict=True)]
    for letter, side in zip(letters, sides, strict=True):
        if side.gpu:
            (words,), style = verdict(side.gpu)
            who.append(Row((letter, words), style))
    parameters = [("base model", "total"), ("trainable", "trainable"), ("adapter file, B", "adapter_bytes")]
    counted = [(name, [side.counts[key] for side in sides]) for name, key in parameters]
    page = [Block("", "<<", who), _options(sides, letters), _figures("Parameters", counted, _whole, letters, few=False)]
    page.append(_peaks(sides, letters))
    host = comparison.host_memory(sides)
    if host:
        rows = [(name, [size / GIB for size in sizes]) for name, sizes in host.items()]
        page.append(_figures("Host memory, GiB", rows, lambda n: f"{n:,.2f}", letters, few=len(sides) <= _DELTAS))
    run = [
        ("a step, seconds", [side.time.get("step_s") for side in sides]),
        ("tokens a second", [side.time.get("tokens_per_s") for side in sides]),
        ("cheapest offer, $", [side.cost.get("usd") for side in sides]),
        ("hours there", [side.cost.get("hours") for side in sides]),
    ]
    if any(value is not None for _, values in run for value in values):
        page.append(_figures("Time and cost", run, _number, letters, few=len(sides) <= _DELTAS))
    return page


def _described(side: Side) -> str:
    options = {name: value for name, value in side.options.items() if name in OPTIONS}
    try:
        words = recipe(side.model, parse_options(options))
    except UsageError:  # a saved answer of another version may have options that this one does not know
        words = side.model
    return f"{side.label}: {words}" if side.label.endswith((".json", ".toml")) else words


def _options(sides: Sequence[Side], letters: str) -> Block:
    differing = comparison.differing(sides)
    if not differing:
        return Block("Options", "<", [Row(("no option differs",))])
    rows = [Row(("", *letters), "dim")]
    rows += [Row((name, *map(_option, values))) for name, values in differing.items()]
    return Block("Options that differ", "<" * (1 + len(sides)), rows)


def _option(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _peaks(sides: Sequence[Side], letters: str) -> Block:
    """The parts at each side's peak, those that print as nothing put together; differences are of what is printed."""
    digits = 2 if max(side.peaks["device_bytes"] for side in sides) >= GIB else 4
    unit = GIB / 10**digits
    parts = comparison.components(sides)
    small = [name for name, sizes in parts.items() if max(sizes) < unit / 2]
    table = {name: sizes for name, sizes in parts.items() if name not in small}
    if small:
        table["smaller parts"] = [sum(parts[name][i] for name in small) for i in range(len(sides))]
    table |= {name: [side.peaks[key] for side in sides] for key, name in _PEAKS.items()}
    shown = [(name, [round(size / unit) for size in sizes]) for name, sizes in table.items()]
    few = len(sides) <= _DELTAS
    made = _figures("Memory at the peak, GiB", shown, lambda n: f"{n / 10**digits:,.{digits}f}", letters, few=few)
    return made._replace(rows=[row._replace(style="bold" * (row.cells[0] in _PEAKS.values())) for row in made.rows])


def _figures(
    heading: str,
    table: Iterable[tuple[str, Sequence[float | None]]],
    words: Callable[[float], str],
    letters: str,
    *,
    few: bool,
) -> Block:
    """Each figure of every side: with `few` its difference to the first beside it, else "=" where it is the same."""
    head = [letters[0]]
    for letter in letters[1:]:
        head += [letter, f"{letter} - A"] if few else [letter]
    rows = [Row(("", *head), "dim")]
    for name, (base, *others) in table:
        if base is not None or any(value is not None for value in others):
            beside = [cell for value in others for cell in _beside(value, base, words, few)]
            rows.append(Row((name, _cell(base, words), *beside)))
    return Block(heading, "<" + ">" * len(head), rows)


def _cell(value: float | None, words: Callable[[float], str]) -> str:
    return "-" if value is None else words(value)


def _beside(value: float | None, base: float | None, words: Callable[[float], str], few: bool) -> list[str]:
    if not few:
        return ["=" if value == base else _cell(value, words)]
    if value is None or base is None:
        return [_cell(value, words), ""]
    apart = value - base
    return [words(value), f"{'-' if apart < 0 else '+'}{words(abs(apart))}" if apart else "same"]


def _whole(value: float) -> str:
    return format_count(round(value))


def _number(value: float) -> str:
    return format_count(round(value)) if value >= 100 else f"{value:.2f}"
