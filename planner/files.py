"""Files of the user's: read with a limit, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vramplan.planner.errors import UsageError, reason, shown


def read_bytes(file: str | os.PathLike[str], what: str, option: str, largest: int) -> bytes:
    """What is in a file of at most `largest` bytes.

    `what` says what it should be ("a CSV file of prices"), `option` where it was named. Raises UsageError for
    whatever is no such file.
    """
    path, where = Path(file), shown(str(file))
    try:
        if not path.is_file():  # a pipe or a device would block, or never end
            raise UsageError(f"{where} is no file; name {what} ({option})")
        with path.open("rb") as stream:
            raw = stream.read(largest + 1)
        if len(raw) > largest:
            limit = f"{largest >> 20} MiB" if largest >= 2**20 else f"{largest >> 10} KiB"
            raise UsageError(f"{where} is larger than {limit}, too much for {what} ({option})")
        return raw
    except OSError as error:
        raise UsageError(f"cannot read {where}: {reason(error)} ({option})") from None


def read_text(file: str | os.PathLike[str], what: str, option: str, largest: int, encoding: str = "utf-8") -> str:
    """The same as text; `encoding` "utf-8-sig" passes over a byte order mark."""
    raw = read_bytes(file, what, option, largest)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise UsageError(f"{shown(str(file))} is not UTF-8 text ({option})") from None


def write_text(file: Path, text: str) -> None:
    """Puts `text` in the place of `file` at once, making its folder; an earlier file stays where that fails.

    Raises OSError.
    """
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """The same of bytes; an earlier file's permissions stay, and a link goes on pointing to it."""
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def save(file: Path, content: bytes, option: str) -> None:
    """The same for a file that the user named with `option`: raises UsageError where it cannot be written."""
    where = shown(str(file))
    try:
        if file.exists() and not file.is_file():  # a device would be replaced, too
            raise UsageError(f"{where} is no file; name one to be written ({option})")
        write_bytes(file, content)
    except OSError as error:
        raise UsageError(f"cannot write {where}: {reason(error)} ({option})") from None
