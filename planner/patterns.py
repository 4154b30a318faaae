"""Which layers of a family slide a window, rotate their heads, or have experts: one entry a layer.

Read from the config where it says so, else derived as transformers derives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner.errors import UnknownArchitecture, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.configuration import Config


def _layer_types(config: Config, layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Which layers slide: from `layer_types` where the config has it, else from the family's own pattern."""
    given = config.sequence("layer_types", layers)
    if given is None:
        return [default(index) for index in range(layers)]
    for value in given:
        if value not in ("full_attention", "attention", "sliding_attention"):
            raise UnknownArchitecture(
                f"layer_types of {config.model_type} has {shown(value)}, a layer that is not known yet; "
                "known are full_attention and sliding_attention"
            )
    return [value == "sliding_attention" for value in given]


def _sliding(config: Config, slides: list[bool], window: int | None) -> list[int | None]:
    if window is None and any(slides):
        raise UsageError(f"layer_types of {config.model_type} has sliding_attention, but no sliding_window is set")
    return [window if slide else None for slide in slides]


def no_window(_config: Config, layers: int) -> list[int | None]:
    """Full attention everywhere."""
    return [None] * layers


def window_everywhere(config: Config, layers: int) -> list[int | None]:
    """`sliding_window` in every layer, unless it is null."""
    return [config.optional_size("sliding_window")] * layers


def window_if_used(config: Config, layers: int) -> list[int | None]:
    """`sliding_window` in every layer, if use_sliding_window (qwen3_moe)."""
    return [config.optional_size("sliding_window") if config.flag("use_sliding_window") else None] * layers


def window_by_type(config: Config, layers: int) -> list[int | None]:
    """`layer_types`, by default every layer (ministral)."""
    window = config.optional_size("sliding_window")
    return _sliding(config, _layer_types(config, layers, lambda _: window is not None), window)


def window_above(config: Config, layers: int) -> list[int | None]:
    """From layer max_window_layers on, if use_sliding_window (qwen2, qwen3)."""
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    first = config.size("max_window_layers", least=0)
    return _sliding(config, _layer_types(config, layers, lambda i: window is not None and i >= first), window)


def window_qwen2_moe(config: Config, layers: int) -> list[int | None]:
    """Every other layer below max_window_layers, if use_sliding_window."""
    used = config.flag("use_sliding_window")
    first = config.size("max_window_layers", least=0)
    window = config.optional_size("sliding_window") if used else None
    return _sliding(config, _layer_types(config, layers, lambda i: used and i % 2 == 0 and i < first), window)


def window_but_every(period: int, pattern_field: str | None = None) -> Callable[[Config, int], list[int | None]]:
    """All layers but every `period`-th slide; the period may stand in a legacy field of the config."""

    def windows(config: Config, layers: int) -> list[int | None]:
        window = config.optional_size("sliding_window")
        every = (config.optional_size(pattern_field) if pattern_field else None) or period
        return _sliding(config, _layer_types(config, layers, lambda i: (i + 1) % every != 0), window)

    return windows


def window_exaone4(config: Config, layers: int) -> list[int | None]:
    """All but every sliding_window_pattern-th layer slide; none where sliding_window is null."""
    window = config.optional_size("sliding_window")
    if window is None:
        return [None] * layers
    given = config.raw("layer_types") is not None  # the released 32B also has a pattern of "LLLG", then unused
    every = 1 if given else config.size("sliding_window_pattern")
    return _sliding(config, _layer_types(config, layers, lambda i: (i + 1) % every != 0), window)


def window_smollm3(config: Config, layers: int) -> list[int | None]:
    """`layer_types`, by default the layers without rotary embedding, if use_sliding_window."""
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    rotates = rope_but_every(config, layers, no_window(config, layers))
    return _sliding(config, _layer_types(config, layers, lambda i: window is not None and not rotates[i]), window)


def rope_everywhere(_config: Config, layers: int, _windows: list[int | None]) -> list[bool]:
    """Every layer rotates."""
    return [True] * layers


def rope_but_every(config: Config, layers: int, _windows: list[int | None]) -> list[bool]:
    """`no_rope_layers` (0: no rotation), by default every no_rope_layer_interval-th layer has none (smollm3)."""
    given = config.sequence("no_rope_layers", layers)
    if given is not None:
        if any(value not in (0, 1) for value in given):
            raise config.wrong("no_rope_layers", given, "a list of 0 and 1")
        return [bool(value) for value in given]
    every = config.size("no_rope_layer_interval")
    return [(index + 1) % every != 0 for index in range(layers)]


def rope_where_sliding(_config: Config, _layers: int, windows: list[int | None]) -> list[bool]:
    """Only the sliding layers rotate (cohere2)."""
    return [window is not None for window in windows]


def rope_exaone4(config: Config, _layers: int, windows: list[int | None]) -> list[bool]:
    """Only the sliding layers rotate, unless the model has no window at all."""
    return [window is not None or config.raw("sliding_window") is None for window in windows]


def rope_if_asked(config: Config, layers: int, _windows: list[int | None]) -> list[bool]:
    """All layers if position_embedding_type is "rope", else none (granitemoehybrid)."""
    return [config.raw("position_embedding_type") == "rope"] * layers


def sparse_everywhere(_config: Config, layers: int) -> list[bool]:
    """Every layer has experts."""
    return [True] * layers


def sparse_by_step(config: Config, layers: int) -> list[bool]:
    """Every decoder_sparse_step-th layer, but those in mlp_only_layers (qwen2_moe, qwen3_moe)."""
    given = config.sequence("mlp_only_layers") or []
    if any(isinstance(value, bool) or not isinstance(value, int) for value in given):
        raise config.wrong("mlp_only_layers", given, "a list of layer numbers")
    step, dense = config.size("decoder_sparse_step"), set(given)
    return [index not in dense and (index + 1) % step == 0 for index in range(layers)]


def sparse_after_first(config: Config, layers: int) -> list[bool]:
    """The first first_k_dense_replace layers are dense (deepseek, glm4_moe)."""
    first = config.size("first_k_dense_replace", least=0)
    return [index >= first for index in range(layers)]


def sparse_if_experts(config: Config, layers: int) -> list[bool]:
    """Experts everywhere unless num_local_experts is 0 (granitemoehybrid)."""
    if any(_layer_types_hybrid(config, layers)):
        raise UnknownArchitecture(
            "granitemoehybrid layer_types has mamba layers, which are not known yet; "
            "known are those with attention only, and granite and granitemoe"
        )
    return [config.size("num_local_experts", least=0) > 0] * layers


def _layer_types_hybrid(config: Config, layers: int) -> list[bool]:
    given = config.sequence("layer_types", layers)
    # Without the list, transformers builds mamba layers only.
    return [value not in ("attention", "full_attention") for value in given] if given is not None else [True] * layers
