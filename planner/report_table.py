"""What `vramplan table` prints: one layout of cells, and the formats it is written in."""

from __future__ import annotations

import csv
import html
import io
import re
import shutil
import sys
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan import __version__
from vramplan.planner.errors import unknown
from vramplan.planner.parallel import completed
from vramplan.planner.report import Block, Row, print_json, short, show, tracked
from vramplan.planner.table import Missing, heading, typed
from vramplan.planner.units import MIB, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vramplan.planner.table import Cell, Column, Table

FORMATS = ("terminal", "markdown", "csv", "json", "html", "latex")
_SHOWN = 8  # warnings of a caption
_RAW = {"B": "_bytes", "MiB": "_bytes", "s": "_s", "USD": "_usd"}  # what a unit adds to a column's name


class Sheet(NamedTuple):
    """A table as cells of text; `columns` aligns each by its letter of "<>", `labels` of them tell rows apart."""

    header: list[str]
    columns: str
    rows: list[list[str]]
    notes: list[str]
    labels: int


def planning(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """The answers of tasks, worked out on all cores with a bar on stderr; up to there, where Ctrl-C ends them."""
    try:
        yield from tracked(completed(tasks), len(tasks), "planning")
    except KeyboardInterrupt:
        return


def print_table(table: Table, form: str) -> None:
    """The table on stdout."""
    if form == "json":
        print_json(to_dict(table))
    elif form == "terminal":
        show(page(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    else:
        sys.stdout.write(render(table, form))


def render(table: Table, form: str) -> str:
    """The table as text of a format that documents hold, with a newline at its end."""
    return {"markdown": markdown, "csv": comma_separated, "html": hypertext, "latex": latex}[form](table)


def check_format(form: str) -> None:
    """Raises UsageError where a table has no such format."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, "--format")


# --------------------------------------------------------------------------------------------------------- the layout


def layout(table: Table) -> Sheet:
    """The rows as they are read: figures in the units of the header; a value that there is not is a numbered dash."""
    notes: dict[str, int] = {}

    def text(column: Column, cell: Cell, value: object) -> str:
        why = cell.refused or (value.why if isinstance(value, Missing) else "")
        return f"- ({notes.setdefault(why, len(notes) + 1)})" if why else _text(column.unit, value)

    rows = [
        [*labels, *(text(column, cell, value) for cell in cells for column, value in _values(table, cell))]
        for labels, cells in _rows(table)
    ]
    names, heads = _heads(table, heading)
    left = "<" * len(names) + "".join("<" if column.unit == "" else ">" for column in table.columns) * len(heads)
    return Sheet([*names, *(head for group in heads for head in group)], left, rows, list(notes), len(names))


def _rows(table: Table) -> Iterator[tuple[list[str], list[Cell]]]:
    """Each row's labels and its cells: one, or one for each value of the pivoted axis.

    Where none of a row's cells has an option, its label is a dash, and rows that become alike by that are one.
    """
    down, across = _sides(table)
    coordinates = product(*(axis.values for axis in table.axes))
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for place, cell in zip(coordinates, table.cells, strict=True):
        groups.setdefault(tuple(place[i] for i in down), []).append(cell)
    seen: set[tuple[str, ...]] = set()
    for cells in groups.values():
        labels = tuple(_row_label([cell.labels[i] for cell in cells]) for i in down)
        if labels not in seen:
            seen.add(labels)
            yield list(labels), cells if across is not None else cells[:1]


def _row_label(values: list[object]) -> str:
    return next((typed(value) for value in values if value is not None), "-")


def _sides(table: Table) -> tuple[tuple[int, ...], int | None]:
    """The axes whose values stand in rows, and the one whose values stand side by side."""
    names = [axis.name for axis in table.axes]
    if table.pivot is None:
        return table.varied, None
    across = names.index(table.pivot)
    down = tuple(i for i in table.varied if i != across)
    return down or ((0,) if across else ()), across


def _heads(table: Table, name: Callable[[Column], str]) -> tuple[list[str], list[list[str]]]:
    """The header: the names of the rows' axes, then the columns', once for each value of the pivoted axis."""
    down, across = _sides(table)
    names = [table.axes[i].name for i in down]
    titles = [name(column) for column in table.columns]
    if across is None:
        return names, [titles]
    axis = table.axes[across]
    values = [_head(axis.name, value) for value in axis.values]
    return names, [[f"{value}: {title}" for title in titles] if len(titles) > 1 else [value] for value in values]


def _head(name: str, value: object) -> str:
    """A value of the pivoted axis; a number has the axis' name with it."""
    number = isinstance(value, int | float) or str(value).replace(".", "", 1).isdigit()
    return f"{name} {typed(value)}" if number else typed(value)


def _values(table: Table, cell: Cell) -> list[tuple[Column, object]]:
    return list(zip(table.columns, cell.values or (None,) * len(table.columns), strict=True))


def _text(unit: str, value: Any) -> str:
    """A value in its unit, without the unit's name."""
    if unit == "B":
        return format_gib(value).removesuffix(" GiB")
    if unit == "s":
        return f"{value:.3f}"
    if unit == "h":
        return short(value)
    forms = {"MiB": lambda: f"{value / MIB:,.2f}", "%": lambda: f"{value:.4f}", "/s": lambda: f"{value:,.0f}"}
    forms |= {"count": lambda: format_count(value), "USD": lambda: f"{value:,.2f}", "kWh": lambda: f"{value:.1f}"}
    return forms[unit]() if unit in forms else str(value)


def _assumptions(table: Table) -> str:
    """The caption's sentences."""
    one = f"{heading(table.columns[0])}. " if table.pivot and len(table.columns) == 1 else ""
    return one + "".join(f"{line[0].upper()}{line[1:]}. " for line in table.assumptions).rstrip()


def _made(table: Table) -> str:
    return f"Made on {table.date.isoformat()} by vramplan {__version__}:"


def _remarks(table: Table, notes: Sequence[str]) -> list[str]:
    """Notes by their numbers, then warnings."""
    warnings = list(table.warnings)
    if table.missing:
        warnings.insert(0, f"interrupted: {len(table.cells) - table.missing} of {len(table.cells)} cells are planned")
    if len(warnings) > _SHOWN:
        warnings[_SHOWN - 1 :] = [f"and {len(warnings) - _SHOWN + 1} more warnings"]
    return [*(f"({number}) {note}" for number, note in enumerate(notes, 1)), *warnings]


# -------------------------------------------------------------------------------------------------------- the formats


def page(table: Table, width: int | None = None) -> list[Block]:
    """The table for a terminal of `width` columns: where it is wider, one part of its columns below the other."""
    sheet = layout(table)
    blocks = []
    for columns in _parts(sheet, width):
        rows = [Row((*(row[i] for i in columns), "")) for row in (sheet.header, *sheet.rows)]
        aligned = "".join(sheet.columns[i] for i in columns)
        # the last column of a block may be wrapped: an empty one
        blocks.append(Block("", f"{aligned}<", [rows[0]._replace(style="dim"), *rows[1:]]))
    if remarks := _remarks(table, sheet.notes):
        blocks.append(Block("Notes", "<<", [Row(("-", remark)) for remark in remarks]))
    lines = [*table.assumptions, f"{_made(table)} {table.command}"]
    return [*blocks, Block("How it was made", "<<", [Row(("-", line)) for line in lines])]


def _parts(sheet: Sheet, width: int | None) -> list[list[int]]:
    """The columns in as many parts as `width` makes needful, each with the labels before it: no figure may be cut."""
    wide = [2 + max(map(len, column)) for column in zip(sheet.header, *sheet.rows, strict=True)]
    labels = list(range(sheet.labels))
    parts: list[list[int]] = [labels]
    for i in range(sheet.labels, len(wide)):
        full = width is not None and sum(wide[j] for j in (*parts[-1], i)) > width
        if full and len(parts[-1]) > len(labels):
            parts.append(labels)
        parts[-1] = [*parts[-1], i]
    return parts


_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is itself


def markdown(table: Table) -> str:
    """GitHub's Markdown: a paragraph that says how the table was made, the table, and a list of notes."""
    sheet = layout(table)
    aligned = ["---:" if letter == ">" else "---" for letter in sheet.columns]
    rows = [[_in_markdown(cell) for cell in row] for row in (sheet.header, *sheet.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], aligned, *rows[1:])]
    command = _code(f"{table.command} --format markdown")
    lines = [f"**Table.** {_in_markdown(_assumptions(table))}", f"{_made(table)} {command}", "", *lines]
    remarks = [f"- {_in_markdown(remark)}" for remark in _remarks(table, sheet.notes)]
    return "\n".join([*lines, *([""] if remarks else []), *remarks]) + "\n"


def _in_markdown(text: str) -> str:
    return _MARKDOWN.sub(lambda match: "\\" + match[0], " ".join(_printable(text).split()))


def _code(text: str) -> str:
    """A code span that holds any text: fenced by more backticks than stand in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _printable(text: str) -> str:
    """Without what a terminal would obey, and without line breaks."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def comma_separated(table: Table) -> str:
    """CSV for programs: bytes and seconds as they are; after the rows the caption, a line of one field each."""
    names, heads = _heads(table, lambda column: column.name + _RAW.get(column.unit, ""))
    rows = [[*map(_field, [*names, *(head for group in heads for head in group)]), "notes"]]
    for labels, cells in _rows(table):
        reasons: dict[str, None] = {}
        values = []
        for cell in cells:
            for _, value in _values(table, cell):
                if why := cell.refused or (value.why if isinstance(value, Missing) else ""):
                    reasons[why] = None
                values.append("" if value is None or isinstance(value, Missing) else _field(value))
        rows.append([*map(_field, labels), *values, _field("; ".join(reasons))])
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows(rows)
    remarks = [*table.assumptions, *_remarks(table, ()), f"{_made(table)} {table.command} --format csv"]
    writer.writerows([_printable(f"# {remark}")] for remark in remarks)
    return out.getvalue()


def _field(value: object) -> str:
    """A field on one line; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return repr(value)
    text = _printable(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text != "-" else text


_STYLE = (
    "<style>.vramplan-table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".vramplan-table caption{text-align:left;padding-bottom:.5em}"
    ".vramplan-table th,.vramplan-table td{padding:.2em .8em;text-align:left;"
    "border-bottom:1px solid rgba(128,128,128,.5)}"
    ".vramplan-table .number{text-align:right}.vramplan-table th{font-weight:normal}"
    ".vramplan-table thead th{font-weight:bold}.vramplan-table code{overflow-wrap:anywhere}</style>"
)  # neither text nor ground has a colour of its own: the page's are legible, light or dark


def hypertext(table: Table) -> str:
    """A fragment of HTML: a table with its caption, which takes the page's own colours and typeface."""
    sheet = layout(table)
    command = f"{table.command} --format html"
    caption = f"{_in_html(_assumptions(table))}<br>{_in_html(_made(table))} <code>{html.escape(command)}</code>"
    numbers = [' class="number"' if letter == ">" else "" for letter in sheet.columns]
    heads = "".join(f'<th scope="col"{n}>{_in_html(cell)}</th>' for n, cell in zip(numbers, sheet.header, strict=True))
    lines = [_STYLE, '<table class="vramplan-table">', f"<caption>{caption}</caption>"]
    lines += ["<thead>", f"<tr>{heads}</tr>", "</thead>", "<tbody>"]
    for row in sheet.rows:
        cells = [f'<th scope="row">{_in_html(cell)}</th>' for cell in row[: sheet.labels]]
        values = zip(numbers[sheet.labels :], row[sheet.labels :], strict=True)
        cells += [f"<td{number}>{_in_html(cell)}</td>" for number, cell in values]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody>")
    if remarks := _remarks(table, sheet.notes):
        notes = "<br>".join(map(_in_html, remarks))
        lines += ["<tfoot>", f'<tr><td colspan="{len(sheet.header)}">{notes}</td></tr>', "</tfoot>"]
    return "\n".join([*lines, "</table>"]) + "\n"


def _in_html(text: str) -> str:
    return html.escape(_printable(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # after \\\\ they would be its arguments
}


def latex(table: Table) -> str:
    """A LaTeX table by booktabs. The command stands in a comment, to be copied, and in the caption, to be read."""
    sheet = layout(table)
    command = f"{table.command} --format latex"
    caption = f"{_in_latex(_assumptions(table))} {_in_latex(_made(table))} \\texttt{{{_in_latex(command)}}}"
    columns = sheet.columns.replace("<", "l").replace(">", "r")
    rows = [f"{' & '.join(map(_in_latex, row))} \\\\" for row in (sheet.header, *sheet.rows)]
    lines = [
        f"% {command}",
        r"% in the preamble: \usepackage[T1]{fontenc}, \usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    lines += [rf"\par {_in_latex(remark)}" for remark in _remarks(table, sheet.notes)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _in_latex(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in _printable(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two of them would make one dash


def to_dict(table: Table) -> dict[str, Any]:
    """The table as JSON: every combination, pivoted or not; bytes and seconds as they are, null where there is none."""
    return {
        "caption": {
            "command": f"{table.command} --format json",
            "vramplan_version": __version__,
            "date": table.date.isoformat(),
            "assumptions": list(table.assumptions),
        },
        "axes": {axis.name: [_plain(value) for value in axis.values] for axis in table.axes},
        "columns": [{"name": c.name, "unit": "B" if c.unit == "MiB" else c.unit} for c in table.columns],
        "cells": [_cell_dict(table, cell) for cell in table.cells],
        "missing": table.missing,
        "warnings": list(table.warnings),
    }


def _cell_dict(table: Table, cell: Cell) -> dict[str, Any]:
    values = _values(table, cell)
    return {
        **{axis.name: _plain(label) for axis, label in zip(table.axes, cell.labels, strict=True)},
        "values": {column.name: None if isinstance(value, Missing) else value for column, value in values},
        "why": {column.name: value.why for column, value in values if isinstance(value, Missing)},
        "refused": cell.refused or None,
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def print_changes(found: Iterable[tuple[str, list[str]]]) -> None:
    """For each pasted table where it stands, and how its cells changed."""
    rows = []
    for where, changes in found:
        how = "stale" if changes else f"as vramplan {__version__} makes it"
        rows.append(Row((f"{where}: {how}",), "bold red" if changes else "green"))
        rows += [Row((f"  {change}",)) for change in changes]
    show([Block("", "<", rows)])
