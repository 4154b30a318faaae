"""Errors a user can mend, and the nearest valid names to show in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN = 80  # characters of a value that are repeated in a sentence: enough to recognise, never a flood


class UsageError(ValueError):
    """The question was wrong: one sentence that says what and how to mend it; the command exits with 2."""


class UnknownArchitecture(UsageError):
    """The planner does not know how this model computes; `vramplan trace` may, running its own code."""


class Failure(Exception):
    """The question was right, but this machine cannot answer it: one sentence with the way on; exit code 1."""


def shown(value: object) -> str:
    """`value` as it stands in an error: quoted, printable and at most 80 characters long."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, or an object of the caller's whose repr fails
        return f"something of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[-1]}"


def printable(text: str) -> str:
    """`text` without what ends a line, or what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def reason(error: OSError) -> str:
    """What the system says of a file or a stream, for the inside of a sentence."""
    return (error.strerror or "no reason given").lower()


def nearest(value: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The `n` names closest to `value`, best first; empty when nothing is close."""
    import difflib  # only an error needs it, and every command would wait for it

    by_key: dict[str, str] = {}
    for name in names:
        by_key.setdefault(name.lower(), name)
    # difflib is quadratic in the length: a name of 200 characters is nobody's typing error.
    keys = difflib.get_close_matches(value.lower()[:200], by_key, n=n, cutoff=0.5)
    return [by_key[key] for key in keys]


def unknown(what: str, value: object, names: Iterable[str], option: str | None = None) -> UsageError:
    """The error for a name that is not among `names`, with the nearest of them and the option that mends it."""
    known = list(names)
    close = nearest(value if isinstance(value, str) else shown(value), known)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif len(known) <= 8:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"known are {len(known)}, such as {', '.join(known[:3])}"
    return UsageError(f"unknown {what} {shown(value)}; {hint}" + (f" ({option})" if option else ""))
