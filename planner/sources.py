"""Where a model's config.json comes from: a bundled name, a file, a folder, the Hub, or a dict.

Which is meant, in this order:

1. A mapping is a config.json already read.
2. A path object, and a string that begins with ".", "/" or "~" or ends in ".json", is a path.
3. A bundled name or alias (tables/models.jsonl): a folder that happens to be called gpt2 is "./gpt2".
4. Anything that exists as a file or folder.
5. "organisation/name" is a model of the Hugging Face Hub: from its local cache if there, else over the network.

Everything read is untrusted: regular files of at most 4 MiB, JSON only, nothing run.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.planner import catalog
from vramplan.planner.errors import UsageError, nearest, printable, shown, unknown

_LARGEST = 4 * 2**20  # bytes of a config.json; real ones have a few thousand
_HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}"
_HUB_FILES = ("config.json", "adapter_config.json")
_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model's config.json and where it was found."""

    name: str
    config: dict[str, Any]
    source: str  # "bundled", "file", "hub" or "dict"
    detail: str  # the table's source, the file's path, or the Hub's id and commit; empty for a dict


def resolve_model(model: str | os.PathLike[str] | Mapping[str, Any]) -> ModelReference:
    """The config.json that `model` names, by the rules above.

    Raises UsageError when there is none, when it cannot be read, or when it is an adapter's and not a model's.
    """
    if isinstance(model, Mapping):
        config = _model_config(dict(model), "the given config")
        return ModelReference(printable(str(config.get("model_type", "config")))[:80], config, "dict", "")
    if isinstance(model, os.PathLike):
        return _from_path(Path(model))
    if not isinstance(model, str):
        raise UsageError(f"a model is a name, a path or a config.json as a dict, not {shown(model)} (MODEL)")
    if model.startswith((".", "~", os.sep)) or model.endswith(".json"):
        return _from_path(Path(model))
    if bundled := catalog.find_model(model):
        return ModelReference(bundled.name, bundled.config, "bundled", bundled.config_source)
    if _exists(model):
        return _from_path(Path(model))
    if re.fullmatch(_HUB_ID, model, re.ASCII):
        return _from_hub(model)
    raise unknown("model", model, _bundled_names(), "MODEL")


def _from_path(path: Path) -> ModelReference:
    try:
        path = path.expanduser()
        folder = path.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, no home
        raise UsageError(f"{shown(str(path))} is no readable path (MODEL)") from None
    file = path / "config.json" if folder else path
    if folder and not _exists(file):
        file = path / "adapter_config.json"
        if not _exists(file):
            raise UsageError(f"no config.json in the folder {shown(str(path))} (MODEL)")
    config = _model_config(_read_json(file), str(path))
    name = file.absolute().parent.name if file.name == "config.json" else file.stem
    return ModelReference(printable(name) or "config", config, "file", printable(str(file)))


def _read_json(file: Path) -> dict[str, Any]:
    where = shown(str(file))
    try:
        regular = stat.S_ISREG(file.stat().st_mode)  # a pipe or a device would block, or never end
        raw = b""
        if regular:
            with file.open("rb") as stream:
                raw = stream.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not a path"
        raise UsageError(f"cannot read {where}: {reason} (MODEL)") from None
    if not regular:
        raise UsageError(f"{where} is not a regular file; name a config.json or a model folder (MODEL)")
    if len(raw) > _LARGEST:
        raise UsageError(f"{where} is larger than 4 MiB, which no config.json is (MODEL)")
    try:
        config = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits, or nested too deeply
        raise UsageError(f"{where} is not JSON; name a model's config.json (MODEL)") from None
    if not isinstance(config, dict):
        raise UsageError(f"{where} holds no JSON object; name a model's config.json (MODEL)")
    return config


def _model_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """`config`, unless it is that of a PEFT adapter, which lacks the model's shape."""
    if "peft_type" in config and "model_type" not in config:
        base = config.get("base_model_name_or_path")
        raise UsageError(f"{shown(where)} is an adapter; plan its base model, {shown(base)} (MODEL)")
    return config


def _from_hub(repo: str) -> ModelReference:
    """config.json of the Hub's model `repo`: the cached copy if there is one, so that most plans need no network."""
    from huggingface_hub import try_to_load_from_cache  # takes longer to import than a plan to make

    for name in _HUB_FILES:
        try:
            cached = try_to_load_from_cache(repo, name)
        except ValueError:  # the Hub's own rules for names
            raise unknown("model", repo, _bundled_names(), "MODEL") from None
        if isinstance(cached, str):
            return _hub_reference(repo, cached)
    for name in _HUB_FILES:
        if downloaded := _download(repo, name):
            return _hub_reference(repo, downloaded)
    raise UsageError(f"{repo} on the Hub has no config.json, so it is not a transformers model{_instead(repo)} (MODEL)")


def _download(repo: str, name: str) -> str | None:
    """The path of the file `name` of `repo` in the Hub's cache after fetching it; None if the model has no such file.

    huggingface_hub finds the user's token, and raises OfflineModeIsEnabled by itself under HF_HUB_OFFLINE.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        size = get_hf_file_metadata(hf_hub_url(repo, name), timeout=_TIMEOUT_S).size
        if size is None or size <= _LARGEST:
            return hf_hub_download(repo, name, etag_timeout=_TIMEOUT_S)
        problem = f"the Hub's {name} is larger than 4 MiB, which no config.json is"
    except errors.OfflineModeIsEnabled:
        problem = "not in the Hub's cache, and HF_HUB_OFFLINE is set"
    except errors.GatedRepoError:
        problem = "gated: accept its terms on the Hub, then log in with `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "not on the Hub, or private: then log in with `hf auth login` or set HF_TOKEN"
    except errors.LocalEntryNotFoundError:  # what hf_hub_download makes of a failed connection
        problem = "not in the Hub's cache, and the Hub cannot be reached"
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # connection errors: each major version has another HTTP library
        problem = f"not in the Hub's cache, and the Hub cannot be reached ({type(error).__name__})"
    raise UsageError(f"cannot read {repo}: {problem}{_instead(repo)} (MODEL)")


def _hub_reference(repo: str, file: str) -> ModelReference:
    path = Path(file)  # .../snapshots/COMMIT/config.json
    return ModelReference(repo, _model_config(_read_json(path), repo), "hub", f"{repo}@{path.parent.name}")


def _instead(repo: str) -> str:
    """The bundled model that could be meant: of the same name under another organisation, else the nearest name."""
    try:
        twin = catalog.find_model(repo.partition("/")[2])
    except UsageError:
        twin = None
    close = [twin.name] if twin else nearest(repo, _bundled_names(), n=1)
    return f"; bundled is {close[0]}" if close else ""


def _bundled_names() -> list[str]:
    return [name for model in catalog.models() for name in (model.name, *model.aliases)]


def _exists(path: str | Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a NUL byte
        return False
