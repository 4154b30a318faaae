"""A config.json -> Architecture: every weight of the model with its name, shape and role, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vramplan.planner.configuration import Config, defaults_table
from vramplan.planner.errors import UnknownArchitecture, UsageError, nearest, shown, unknown
from vramplan.planner.families import FAMILIES
from vramplan.planner.layers import Architecture, Attention, Layer, Mla, Mlp, Module, Moe, Weight

__all__ = ["Architecture", "Attention", "Layer", "Mla", "Mlp", "Module", "Moe", "Weight", "model_types", "parse"]

# Composite configs that are read as their text model; the value is the type of a text_config that names none.
_COMPOSITE = {"gemma3": "gemma3_text", "mistral3": "mistral"}


def model_types() -> list[str]:
    """The model types whose layers are known, in alphabetical order."""
    return sorted([*FAMILIES, *_COMPOSITE])


def parse(config: Mapping[str, object]) -> Architecture:
    """The architecture of a config.json given as a dict.

    Fields that are absent take transformers' defaults for the model type; `Architecture.assumed` names them. Raises
    UsageError naming the field and its value for anything that transformers could not build, for a model type that
    is not known, and for a base that is already quantised.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"a config must be a JSON object, not {shown(config)}; pass the content of a config.json")
    if not config:
        raise UsageError("the config is empty; pass the content of a config.json with model_type and sizes")
    for key in config:
        if not isinstance(key, str):
            raise UsageError(f"the config has the key {shown(key)}, which is not a string; pass a JSON object")
    model_type, given = _text_config(config)
    _refuse_quantised(config)
    _refuse_quantised(given)
    reader = Config(model_type, {key: value for key, value in given.items() if key != "model_type"})
    if given is not config:
        reader.assumed.append("text_config")
    architecture = FAMILIES[model_type](reader)
    return replace(architecture, kinds=tuple(replace(layer, family=model_type) for layer in architecture.kinds))


def _text_config(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """The model type and the fields to read: of a composite config, those of its text model."""
    model_type = _model_type(config)
    if model_type not in _COMPOSITE:
        if model_type not in FAMILIES:
            raise _not_known(model_type)
        return model_type, config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UsageError(
            f"text_config of {model_type} is {shown(text)}; it must be an object with the text model's sizes"
        )
    if "tie_word_embeddings" in config:
        text = {"tie_word_embeddings": config["tie_word_embeddings"], **text}
    inner = _model_type(text) if "model_type" in text else _COMPOSITE[model_type]
    if inner not in FAMILIES:
        raise _not_known(inner)
    return inner, text


def _model_type(config: Mapping[str, object]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    if "model_type" in config:
        raise UsageError(f"model_type is {shown(model_type)}; it must be a name such as 'llama'")
    likely = nearest(str(config.get("architectures") or ""), FAMILIES, 1) or ["llama"]
    raise UsageError(
        f"the config has no model_type, which says how to read its {len(config)} fields; "
        f"add one, such as {likely[0]!r}, beside hidden_size, num_hidden_layers and num_attention_heads"
    )


def _not_known(model_type: str) -> UsageError:
    if model_type in defaults_table()["others"]:
        close = nearest(model_type, FAMILIES) or ["llama", "qwen3", "mixtral"]
        return UnknownArchitecture(
            f"the layers of model_type {shown(model_type)} are not known yet; nearest known types: {', '.join(close)}"
        )
    return UnknownArchitecture(str(unknown("model_type", model_type, model_types())))


def _refuse_quantised(config: Mapping[str, object]) -> None:
    quantised = config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    how = f" with {method}" if isinstance(method, str) and len(method) < 40 else ""
    raise UsageError(
        f"the base is already quantised{how} (quantization_config); point to the unquantised model that it came from"
    )
