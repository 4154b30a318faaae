"""What `vramplan fit` prints."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from vramplan.planner.report import Block, Row, recipe, show, verdict
from vramplan.planner.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vramplan.planner.capacity import Capacity, Cell, Limit, Size
    from vramplan.planner.trial import Trial

# ---------------------------------------------------------------------------------------------------------------- fit


def print_fit(found: Capacity) -> None:
    """The largest sizes, the methods, and the frontier."""
    show(fit_page(found))


def fit_page(found: Capacity) -> list[Block]:
    """The same as blocks."""
    top = [Row((recipe(found.model.name, found.options),), "bold")]
    if found.asked.fit:
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
    if found.frontier:
        page.append(_frontier(found.frontier, name))
    page.append(Block("Notes", "<<", [Row(("-", note)) for note in _fit_notes(found)]))
    return page


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
    too_much = f"{format_gib(-trial.fit.headroom_bytes)} too much" if trial.fit else ""
    return f"runs out of memory in {trial.runs_out!r}: {too_much}"


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
    yield Row(("seq_len", "batch_size", "tokens", "to spare", "tokens/s", ""), "dim")
    fastest = max((cell.time.tokens_per_s for cell in cells if cell.time), default=None)
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
        words.append(f"seq_len in multiples of {sizes[0]} up to {format_count(sizes[-1])}, the model's positions")
    if "rank" in tried:
        words.append("rank in powers of two")
    if words:
        yield f"tried are {' and '.join(words)}"
    if any(limit.only_just for limit in found.limits) or any(t.survives and not t.roomy for _, t in found.methods):
        yield (
            "what fits only just survives because PyTorch gives its cache back, which costs time; the largest fits "
            "with its whole cache"
        )
    yield from found.warnings
    yield f"each answer is the plan's: {found.command}"
