"""What the project knows of models and GPUs: reads tables/.

tables/models.jsonl holds one model a line and tables/gpus.jsonl one card a line, so that finding one model costs a
text search and one parsed line. Names ignore case, and separators where that leaves one answer: "Llama 3.1 8B",
"llama-3.1-8b" and "meta-llama/Llama-3.1-8B" are one model, "RTX4090", "rtx-4090" and "4090" one card.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError, shown, unknown
from vramplan.planner.units import MIB, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

_TABLES = Path(__file__).parent.parent / "tables"


@dataclass(frozen=True, slots=True)
class Model:
    """A bundled model: its config.json as far as training needs it, its parameter count, and where each is from."""

    name: str
    aliases: tuple[str, ...]
    config: dict[str, Any]
    total_parameters: int  # as transformers builds it: tied weights once, buffers not at all
    published_total: int | None
    published_source: str | None
    config_source: str
    verified: (
        str  # "exact": total_parameters equals a published count; "config-read": the shape was read, no count fits
    )
    license: str
    context_length: int
    released: str  # year-month
    gated: bool  # the Hub asks for an account and consent
    notes: str
    hub_total: int | None = None  # where the Hub counts more than what trains
    hub_total_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card. None is a figure nobody has read; `uncertain` names the fields whose source is weak."""

    name: str
    title: str
    budget_bytes: int  # what CUDA shows a process, its own context included; no other process on the card
    budget_derived: bool = False  # worked out from the driver's total by `cuda_mib_from_driver`
    aliases: tuple[str, ...] = ()
    vendor: str | None = None
    architecture: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None  # or compute units
    memory_gb: int | None = None  # as marketed; most makers mean GiB
    driver_bytes: int | None = None  # the total in nvidia-smi or rocm-smi
    bandwidth_gb_s: float | None = None
    tensor_tflops: float | None = None  # dense bf16 or fp16 with float32 accumulation
    fp32_tflops: float | None = None
    nvlink_gb_s: float | None = None  # both directions together; AMD's Infinity Fabric too
    nvlink_gpus: int | None = None  # how many it joins: 2 by a bridge, 8 on a board, 72 in a rack, 1 with its CPU alone
    nvlink_mesh: int | None = None  # links of each, which lead to single others and to no switch
    host_gpus: int | None = None  # of one host, where that is not 8 at most
    pcie_gen: int | None = None
    tdp_w: int | None = None
    bf16: bool | None = None
    flash_attention_2: bool | None = None
    uncertain: tuple[str, ...] = ()
    memory_source: str = ""
    compute_source: str = ""


def models() -> tuple[Model, ...]:
    """All bundled models, in table order."""
    return tuple(_model(line) for line in _read("models.jsonl").splitlines())


def find_model(name: str) -> Model | None:
    """The bundled model with this name, alias, or alias without its organisation; None if there is none.

    Raises UsageError where a name that is only right up to separators could be several models.
    """
    found = _exact_model(name)
    if found or not (key := _key(name)):
        return found
    close = [model for model in models() if key in _key("|".join(_names(model))).split("|")]
    if len(close) > 1:
        raise UsageError(f"{shown(name)} could be {_listed(model.name for model in close)}; name one (MODEL)")
    return close[0] if close else None


@cache
def gpus() -> tuple[Gpu, ...]:
    """All known cards, in table order."""
    return tuple(_gpu(json.loads(line)) for line in _read("gpus.jsonl").splitlines())


@cache
def _gpus_by_name() -> dict[str, Gpu]:
    return {card.name: card for card in gpus()}


def gpu(name: str) -> Gpu:
    """The card with this name, or for a size such as "24GiB" a nameless card on which a process gets that much.

    Raises UsageError for an unknown name, for one that means cards of different memory, and for an impossible size.
    """
    if not isinstance(name, str):
        raise UsageError(f"a GPU is a name such as h200 or a size such as 24GiB, not {shown(name)} (--gpu)")
    if name in _gpus_by_name():
        return _gpus_by_name()[name]
    key = _gpu_key(name)
    matching = [card for card in gpus() if key in map(_gpu_key, (card.name, card.title, *card.aliases))]
    by_memory = {card.memory_gb: card for card in reversed(matching)}  # of each memory the first in the table
    if len(by_memory) == 1:
        return matching[0]
    if by_memory:
        variants = sorted(by_memory.values(), key=lambda card: card.budget_bytes)
        sizes = _listed(f"{card.memory_gb} GB" for card in variants)
        names = ", ".join(card.name for card in variants)
        raise UsageError(f"{shown(name)} comes with {sizes}; name one: {names} (--gpu)")
    if re.fullmatch(r"\s*[+-]?[\d.,]+\s*([kmgtp]?i?b|[kmgtp])?\s*", name, re.IGNORECASE):
        size = parse_size(name, "--gpu")
        return Gpu(name=name.strip(), title=f"a {name.strip()} GPU", budget_bytes=size)
    raise unknown("GPU", name, (card.name for card in gpus()), "--gpu")


def cuda_mib_from_driver(driver_mib: int) -> int:
    """MiB that CUDA shows on a card of which only the driver's total is known: 400 MiB and 0.6 % less.

    What the driver keeps grows with the card. On every NVIDIA card where both totals were seen, CUDA showed at least
    this much, GH200 alone excepted (tests/test_tables.py): the rule errs towards "does not fit".
    """
    return driver_mib - 400 - driver_mib * 6 // 1000


def _exact_model(name: str) -> Model | None:
    """A text search: parses only the lines in which the name stands."""
    wanted = name.lower()
    text = _read("models.jsonl")
    lower = text.lower()  # the table is ASCII, so positions agree
    for quoted in (f'"{wanted}"', f'/{wanted}"'):
        at = lower.find(quoted)
        while at >= 0:
            end = text.find("\n", at)
            model = _model(text[text.rfind("\n", 0, at) + 1 : end])
            if wanted in (each.lower() for each in _names(model)):  # and not in a note
                return model
            at = lower.find(quoted, end)
    return None


def _names(model: Model) -> list[str]:
    whole = [model.name, *model.aliases]
    return whole + [alias.partition("/")[2] for alias in model.aliases if "/" in alias]


def _key(name: str) -> str:
    """`name` with separators dropped, except between digits: opt-1.3b is not opt-13b."""
    return re.sub(r"(?<!\d)-|-(?!\d)", "", re.sub(r"[\s_.:-]+", "-", name.lower()))


def _gpu_key(name: str) -> str:
    return re.sub("nvidia|geforce|tesla|quadro|amd|instinct", "", _key(name))


def _listed(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def _model(line: str) -> Model:
    row = json.loads(line)
    row["aliases"] = tuple(row["aliases"])
    return Model(**row)


def _gpu(row: dict[str, Any]) -> Gpu:
    driver_mib, cuda_mib = row.pop("driver_mib"), row.pop("cuda_mib")
    seen = cuda_mib is not None
    row["aliases"], row["uncertain"] = tuple(row["aliases"]), tuple(row["uncertain"])
    return Gpu(
        budget_bytes=(cuda_mib if seen else cuda_mib_from_driver(driver_mib)) * MIB,
        budget_derived=not seen,
        driver_bytes=driver_mib * MIB,
        **row,
    )


@cache
def _read(table: str) -> str:
    return (_TABLES / table).read_text(encoding="ascii")
