"""Tables in documents: put between two markers, found again by their captions, and held against what is planned now."""

from __future__ import annotations

import datetime
import re
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner.errors import UsageError, shown
from vramplan.planner.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from markdown_it.token import Token

_LARGEST = 16 * 2**20  # bytes of a document
_MARKER = r"[A-Za-z0-9]+([_.-]?[A-Za-z0-9]+)*"  # no two hyphens, which would end an HTML comment
_COMMENT = {"markdown": ("<!-- ", " -->"), "html": ("<!-- ", " -->"), "latex": ("% ", "")}
_FORMATS = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".tex": "latex"}
_COMMAND = "vramplan table "


class Pasted(NamedTuple):
    """A table that stands in a document: its first line there, the command of its caption, and its cells as read."""

    line: int
    words: list[str]  # after "vramplan table"
    rows: list[list[str]]  # the header first


def format_of(file: str, asked: str | None) -> str:
    """The format in which a table goes into `file`. Raises UsageError for one that holds no markers."""
    suffix = re.sub(r".*(?=\.)", "", file.lower(), flags=re.DOTALL)
    form = asked or _FORMATS.get(suffix)
    if form is None:
        raise UsageError(f"{shown(file)} is neither .md nor .html nor .tex; say what it is (--format)")
    if form not in _COMMENT:
        raise UsageError(f"{form} has no comments to put a table between; choose markdown, html or latex (--format)")
    return form


def read(file: str, option: str) -> bytes:
    """A document's bytes."""
    return read_bytes(file, "a document", option, _LARGEST)


def markers(marker: str, form: str) -> tuple[bytes, bytes]:
    """What stands before and after the table: "<!-- NAME -->" and "<!-- /NAME -->", in LaTeX "% NAME"."""
    if not re.fullmatch(_MARKER, marker):
        raise UsageError(f"{shown(marker)} is no marker; use letters, digits and single hyphens (--between)")
    start, end = _COMMENT[form]
    return f"{start}{marker}{end}".encode(), f"{start}/{marker}{end}".encode()


def between(document: bytes, marker: str, form: str) -> tuple[int, int]:
    """From where to where the table of a marker goes. Raises UsageError where the marks are not there once each."""
    places = []
    for mark in markers(marker, form):
        found = [match.start() for match in re.finditer(rb"(?m)" + re.escape(mark) + rb"(?=[ \t]*\r?$)", document)]
        if len(found) != 1:
            often = "not there" if not found else f"there {len(found)} times"
            raise UsageError(f"{shown(mark.decode())} is {often}; it must stand at a line's end once (--between)")
        places.append(found[0])
    start, end = places[0] + len(markers(marker, form)[0]), places[1]
    if start > end:
        raise UsageError(f"the end of {shown(marker)} stands before its beginning (--between)")
    return start, end


def put(document: bytes, marker: str, form: str, text: str) -> bytes:
    """The document with `text` in a marker's place, its line endings those of the marker's line; else byte for byte."""
    start, end = between(document, marker, form)
    rest = document[start:end]
    line_end = b"\r\n" if re.match(rb"[ \t]*\r\n", rest) else b"\n"
    lines = ["", "", *text.splitlines(), "", ""] if form != "latex" else ["", *text.splitlines(), ""]
    return document[:start] + line_end.join(line.encode() for line in lines) + document[end:]


def renewed(
    document: bytes, marker: str, form: str, day: datetime.date, render: Callable[[datetime.date], str]
) -> bytes:
    """The document with a table in a marker's place, which `render` writes as made on a day; it was made on `day`.

    Where nothing but the day would change, the document stays as it is.
    """
    start, end = between(document, marker, form)
    made = re.search(rb"Made on (\d{4}-\d\d-\d\d) by vramplan", document[start:end])
    with suppress(ValueError):  # no day of any calendar
        earlier = datetime.date.fromisoformat(made[1].decode()) if made else day
        if put(document, marker, form, render(earlier)) == document:
            return document
    return put(document, marker, form, render(day))


# ------------------------------------------------------------------------------------------------------ found again


def tables(document: bytes, file: str) -> list[Pasted]:
    """The tables of a Markdown document whose captions hold their commands: in the paragraph before them.

    Raises UsageError where there are none, or where a command is no command line.
    """
    from markdown_it import MarkdownIt

    try:
        text = document.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{shown(file)} is not UTF-8 text (--check)") from None
    found = list(_tables(MarkdownIt("commonmark").enable("table").parse(text), file))
    if not found:
        raise UsageError(f"no table in {shown(file)} says that vramplan table made it (--check)")
    return found


def _tables(tokens: Sequence[Token], file: str) -> Iterator[Pasted]:
    command: str | None = None
    for i, token in enumerate(tokens):
        if token.type == "inline" and tokens[i - 1].type == "paragraph_open":
            spans = [child.content for child in token.children or () if child.type == "code_inline"]
            command = next((span for span in spans if span.startswith(_COMMAND)), None)
        elif token.type == "table_open" and command is not None and token.map:
            try:
                words = shlex.split(command)[2:]
            except ValueError:  # a quote that does not end
                raise UsageError(
                    f"{shown(file)}, line {token.map[0] + 1}: {shown(command)} is no command line (--check)"
                ) from None
            yield Pasted(token.map[0] + 1, words, list(_rows(tokens[i:])))
            command = None


def _rows(tokens: Sequence[Token]) -> Iterator[list[str]]:
    """The cells of the table that begins with the first token."""
    row: list[str] = []
    for token in tokens:
        if token.type == "table_close":
            return
        if token.type == "tr_open":
            row = []
        elif token.type == "inline":
            row.append("".join(child.content for child in token.children or ()))
        elif token.type == "tr_close":
            yield row


def changes(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], labels: int) -> list[str]:
    """What must change in a table's cells, its header first, to become another; `labels` of a row tell it apart."""
    if list(before[0]) != list(after[0]):
        return [f"the header is {' | '.join(before[0])}, and is now {' | '.join(after[0])}"]
    old, new = ({tuple(row[:labels]): row for row in rows[1:]} for rows in (before, after))
    found = []
    for key, row in new.items():
        if key not in old:
            found.append(f"{_named(key)} is missing")
            continue
        pairs = zip(after[0], old[key], row, strict=True)
        found += [f"{_named(key)}: {head} was {was}, is {now}" for head, was, now in pairs if was != now]
    found += [f"{_named(key)} is there no more" for key in old if key not in new]
    if not found and len(before) != len(after):
        found.append("a row stands there twice")
    return found


def _named(key: Sequence[str]) -> str:
    return ", ".join(key) or "the row"
