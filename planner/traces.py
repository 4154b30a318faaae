"""Answers of `vramplan trace`, kept so that a model that cannot be planned can be answered from its trace.

Each is one JSON file in the user's cache folder, named by a digest of everything it depends on: the config, the
options, the GPU, the installed versions. What is broken, too large or of another schema is passed over.
VRAMPLAN_CACHE_DIR names another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.planner import catalog
from vramplan.planner.files import write_text
from vramplan.planner.sources import resolve_model
from vramplan.planner.stack import parse_stack
from vramplan.planner.training import parse_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vramplan.planner.training import TrainingOptions

SCHEMA = 1
FOLDER = "VRAMPLAN_CACHE_DIR"
_LARGEST = 2**20  # bytes of a file; real ones have some ten thousand
_MOST = 200  # files that are kept; the oldest goes first


def folder() -> Path:
    """Where traces are kept; it need not exist."""
    if named := os.environ.get(FOLDER):
        return Path(named) / "traces"
    import platformdirs  # only a model that cannot be planned needs it

    return platformdirs.user_cache_path("vramplan", appauthor=False) / "traces"


def key(config: Mapping[str, Any], options: TrainingOptions, gpu: str | None, versions: Mapping[str, str]) -> str:
    """The name of the file of one question."""
    asked = [SCHEMA, __version__, config, options.as_dict(), gpu, dict(versions)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def answered(
    model: Any, gpu: str | None = None, stack: str | Mapping[str, object] | None = None, calibration: bool = True,
    **options: object,
) -> dict[str, Any] | None:  # fmt: skip
    """What `vramplan trace` said to this question; None where it was not asked. Arguments as `plan`'s."""
    del calibration  # a trace that is kept uses none
    card = None if gpu is None else catalog.gpu(gpu)
    asked, config = parse_options(options), resolve_model(model).config
    found = find(key(config, asked, card.name if card else None, parse_stack(stack).versions))
    if found is not None:
        found["memory"]["notes"].insert(0, "answered from an earlier `vramplan trace` of the same question")
    return found


def find(name: str) -> dict[str, Any] | None:
    """The answer kept under `key`; None where there is none that can be read."""
    file = folder() / f"{name}.json"
    try:
        with file.open("rb") as stream:
            raw = stream.read(_LARGEST + 1)
        answer = json.loads(raw.decode("utf-8")) if len(raw) <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or answer.get("schema") != SCHEMA or not isinstance(answer.get("answer"), dict):
        return None
    kept: dict[str, Any] = answer["answer"]
    return kept


def keep(name: str, answer: Mapping[str, Any]) -> Path:
    """Writes an answer whole or not at all, and drops the oldest beyond `_MOST`; the file's path.

    Raises OSError where it cannot be written.
    """
    file = folder() / f"{name}.json"
    write_text(file, json.dumps({"schema": SCHEMA, "answer": answer}))
    by_age = sorted(file.parent.glob("*.json"), key=_age)
    for old in by_age[:-_MOST]:
        old.unlink(missing_ok=True)
    return file


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0
