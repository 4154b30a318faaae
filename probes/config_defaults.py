"""Writes tables/config_defaults.json: what transformers assumes about a config of each model type.

    python -m vramplan.probes.config_defaults

For every family of planner/families.py: the defaults of the fields that the planner reads, the other names of a field
(`attribute_map`), and the attention implementations that the model class offers. Run it again for a new transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vramplan import tables
from vramplan.planner import configuration, construction, decoder, families, older, patterns

# The names under which the planner reads these, whatever a family calls them.
COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# Accepted by a class's own code rather than by its attribute_map.
LEGACY = {"falcon": {"n_embed": "hidden_size"}, "bloom": {"n_embed": "hidden_size"}}


def fields_read() -> set[str]:
    """Every field name that stands as a literal in the planner's reading code."""
    modules = (configuration, construction, decoder, families, older, patterns)
    source = "".join(inspect.getsource(module) for module in modules)
    return set(re.findall(r'"([a-z_][a-z_0-9]*)"', source))


def entry(model_type: str, read: set[str]) -> dict[str, Any]:
    """One model type's names, defaults and attention implementations."""
    config_class = CONFIG_MAPPING[model_type]
    common = {stored: name for name, stored in config_class.attribute_map.items() if name in COMMON}
    names = {name: stored for name, stored in config_class.attribute_map.items() if name not in COMMON}
    names |= common | LEGACY.get(model_type, {})
    defaults = {}
    for field in dataclasses.fields(config_class):
        name = names.get(field.name, field.name)
        if name in read and isinstance(field.default, str | int | float | None):
            defaults[name] = field.default
    model_class = AutoModelForCausalLM._model_mapping[config_class]
    offered = {
        "eager": True,
        "sdpa": model_class._supports_sdpa,
        "flash_attention_2": model_class._supports_flash_attn,
    }
    return {
        "names": {name: stored for name, stored in sorted(names.items()) if stored in read},
        "defaults": dict(sorted(defaults.items())),
        "attention": [name for name, supported in offered.items() if supported],
    }


def table() -> dict[str, Any]:
    """The whole table."""
    read = fields_read()
    return {
        "source": f"config classes of transformers {transformers.__version__}",
        "types": {model_type: entry(model_type, read) for model_type in sorted(families.FAMILIES)},
        "others": sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(families.FAMILIES)),
    }


def main() -> None:
    """Writes the table next to the others."""
    path = Path(tables.__file__).with_name("config_defaults.json")
    path.write_text(json.dumps(table(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
