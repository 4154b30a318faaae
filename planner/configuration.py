"""A config.json as transformers reads it: its own values, then the defaults of its model type, checked on the way.

Defaults and alternative field names (gpt2's n_embd is hidden_size) come from tables/config_defaults.json, which
probes/config_defaults.py writes from transformers' own config classes.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

# Nothing near these sizes exists; beyond them a number is a mistake and would only make the planner slow.
_LARGEST = {
    "vocab_size": 10**8,
    "num_hidden_layers": 1000,
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
    "intermediate_size": 10**7,
    "n_inner": 10**7,
    "ffn_dim": 10**7,
    "ffn_hidden_size": 10**7,
}
_LARGEST_EXPERTS = 10**5
_LARGEST_SIZE = 10**6


@cache
def defaults_table() -> dict[str, Any]:
    """tables/config_defaults.json: {"types": {model_type: {"names", "defaults", "attention"}}, "others": [...]}."""
    text = (Path(__file__).parent.parent / "tables" / "config_defaults.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


class Config:
    """The fields of one config by their common names; every read is checked, and defaults taken are noted."""

    def __init__(self, model_type: str, given: Mapping[str, object]) -> None:
        entry = defaults_table()["types"][model_type]
        names: dict[str, str] = entry["names"]
        self.model_type = model_type
        self.attention_implementations: tuple[str, ...] = tuple(entry["attention"])
        self.assumed: list[str] = []
        self._defaults: dict[str, object] = entry["defaults"]
        self.values: dict[str, object] = {}
        for key, value in given.items():
            name = names.get(key, key)
            if name in self.values and self.values[name] != value:
                both = f"{shown(self.values[name])} and {shown(value)}"
                raise UsageError(f"the config gives {name} twice, as {both}; keep one of {key} and its other name")
            self.values[name] = value

    def raw(self, name: str) -> object:
        """The field as given, else transformers' default for this model type, else None."""
        if name in self.values:
            return self.values[name]
        value = self._defaults.get(name)
        # A default that is off (False, 0, null) changes nothing unless it decides a shape by itself.
        if (value or name in ("num_key_value_heads", "tie_word_embeddings")) and name not in self.assumed:
            self.assumed.append(name)
        return value

    def settle(self, name: str, value: object) -> None:
        """Writes a value derived from other fields into the normalised config."""
        self.values[name] = value

    def normalised(self) -> dict[str, object]:
        """Every field by its common name: the defaults, then what was given or derived."""
        return {**self._defaults, **self.values, "model_type": self.model_type}

    def size(self, name: str, *, least: int = 1) -> int:
        """A whole number from `least` up to a sane limit."""
        return self._size(name, self.raw(name), least)

    def optional_size(self, name: str) -> int | None:
        """A positive whole number, or None where the field is null or absent."""
        value = self.raw(name)
        return None if value is None else self._size(name, value, 1)

    def _size(self, name: str, value: object, least: int) -> int:
        most = _LARGEST.get(name, _LARGEST_EXPERTS if "expert" in name and "size" not in name else _LARGEST_SIZE)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most:,}")
        return value

    def number(self, name: str) -> float:
        """A finite number of 0 or more; null counts as 0."""
        value = self.raw(name)
        return 0.0 if value is None else self._number(name, value)

    def optional_number(self, name: str) -> float | None:
        """A finite number of 0 or more, or None where the field is null or absent."""
        value = self.raw(name)
        return None if value is None else self._number(name, value)

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
            raise self.wrong(name, value, "a number from 0 to 1e9")
        return float(value)

    def probability(self, name: str) -> float:
        """A dropout probability, from 0 up to, but not including, 1."""
        value = self.number(name)
        if not value < 1:
            raise self.wrong(name, value, "a probability below 1")
        return value

    def flag(self, name: str) -> bool:
        """True or false; null counts as false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str:
        """A non-empty string."""
        value = self.raw(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, value, "a name")
        return value

    def sequence(self, name: str, length: int | None = None) -> list[object] | None:
        """A list (of `length` entries, where that is given), or None where the field is null or absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.wrong(name, value, "a list")
        if length is not None and len(value) != length:
            raise UsageError(f"config field {name} has {len(value)} entries for num_hidden_layers of {length}")
        return list(value)

    def mapping(self, name: str) -> dict[str, object]:
        """A JSON object; null and absent count as an empty one."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def wrong(self, name: str, value: object, needed: str) -> UsageError:
        """The error for a field with a wrong value."""
        return UsageError(f"config field {name} of {self.model_type} is {shown(value)}; it must be {needed}")

    def rotary_factor(self, default: float) -> float:
        """`partial_rotary_factor` from wherever transformers looks for it, else `default`; above 0, at most 1."""
        for place in ("rope_scaling", "rope_parameters"):
            inside = self.mapping(place)
            if "partial_rotary_factor" in inside:
                return self._share("partial_rotary_factor", inside["partial_rotary_factor"])
        for name in ("partial_rotary_factor", "rotary_pct"):
            value = self.raw(name)
            if value is not None:
                return self._share(name, value)
        return default

    def _share(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1 or math.isnan(value):
            raise self.wrong(name, value, "a number above 0 and at most 1")
        return float(value)
