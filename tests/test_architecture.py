"""The architecture against transformers' own models on the meta device, and against configs that make no sense."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CASES, FLAT, LLAMA_8B, modules, real_model, small

from vramplan.planner import catalog, families
from vramplan.planner.architecture import Moe, model_types, parse
from vramplan.planner.configuration import defaults_table
from vramplan.planner.errors import UsageError

if TYPE_CHECKING:
    from vramplan.planner.architecture import Architecture

NORM_CLASSES = {
    "llama_rms_norm": "RMSNorm",
    "olmo_rms_norm": "RMSNorm",
    "gemma_rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "layer_norm_1p": "NemotronLayerNorm1P",
    "cohere_layer_norm": "LayerNorm",
    "olmo_layer_norm": "OlmoLayerNorm",
}


# ------------------------------------------------------------------------------------------------ against transformers


def test_every_family_has_a_case() -> None:
    assert sorted(CASES) == sorted(families.FAMILIES)


@pytest.mark.parametrize(("model_type", "index"), FLAT)
def test_names_shapes_order_and_classes_are_those_of_transformers(model_type: str, index: int) -> None:
    config = small(model_type, index)
    model = real_model(config)
    planned = parse(config)
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(name, weight.shape) for name, _, weight in planned.weights()] == expected
    assert planned.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.tied == model.config.tie_word_embeddings
    assert planned.gradient_checkpointing == model.supports_gradient_checkpointing
    _check_classes(planned, model)
    _check_attention(planned, model)


def _check_classes(planned: Architecture, model: Any) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    for path, module in modules(planned):
        real = model.get_submodule(path)
        assert isinstance(real, torch.nn.Linear) == (module.kind == "linear"), path
        assert isinstance(real, Conv1D) == (module.kind == "conv1d"), path
        assert isinstance(real, torch.nn.Embedding) == (module.kind == "embedding"), path
        assert ("Norm" in type(real).__name__) == (module.kind == "norm"), path
        if module.kind == "linear":
            assert (real.in_features, real.out_features) == (module.in_features, module.out_features)
            assert (real.bias is not None) == module.bias
            assert (type(real) is torch.nn.Linear) == (module.variant == "")
        if module.kind == "norm":
            assert type(real).__name__.endswith(NORM_CLASSES[module.variant])
            assert (type(real) is torch.nn.LayerNorm or "Bloom" in str(type(real))) == (module.variant == "layer_norm")
    assert model.get_input_embeddings() is model.get_submodule(planned.embeddings[0].name)
    assert model.get_output_embeddings() is model.get_submodule(planned.output.name)


def _check_attention(planned: Architecture, model: Any) -> None:
    """Where the model keeps a head dimension, a window or rotary frequencies, they are the planned ones."""
    path = planned.kinds[0].attention.o.rpartition(".")[0]
    for index, kind in enumerate(planned.order):
        attention = planned.kinds[kind].attention
        real = model.get_submodule(f"{planned.layer_prefix}.{index}.{path}")
        if hasattr(real, "head_dim") and attention.mla is None:
            assert real.head_dim == attention.head_dim
        if hasattr(real, "num_key_value_groups"):
            assert real.num_key_value_groups == attention.num_heads // attention.num_key_value_heads
        if hasattr(real, "sliding_window") and planned.model_type != "exaone4":
            assert real.sliding_window == attention.sliding_window
        if hasattr(real, "is_sliding"):
            assert real.is_sliding == (attention.sliding_window is not None)
    rotating = [layer.attention for layer in planned.kinds if layer.attention.rotary_dim]
    frequencies = [
        buffer for name, buffer in model.named_buffers() if re.search("rotary_emb.*(?<!original_)inv_freq", name)
    ]
    if frequencies and rotating:
        assert {2 * len(buffer) for buffer in frequencies} == {attention.rotary_dim for attention in rotating}


def test_norm_variants_are_the_code_that_runs() -> None:
    """One variant, one behaviour to the last bit in bfloat16, whatever the class is called."""
    torch = pytest.importorskip("torch")
    seen: dict[str, set[str]] = {}
    for model_type, index in FLAT:
        if index or model_type in ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "falcon", "gptj", "mpt"):
            continue
        planned = parse(small(model_type))
        variant = planned.final[-1].variant
        if variant == "layer_norm":
            continue
        folder = {"gemma3_text": "gemma3", "internlm3": "llama"}.get(model_type, model_type)
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        norm = getattr(modeling, next(name for name in vars(modeling) if name.endswith(NORM_CLASSES[variant])))(8)
        for parameter in norm.parameters():
            parameter.data = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        out = norm(torch.rand(4, 8, generator=torch.Generator().manual_seed(2)).bfloat16())
        seen.setdefault(variant, set()).add(str(out.tolist()))
    assert {variant: len(outputs) for variant, outputs in seen.items()} == dict.fromkeys(seen, 1)
    assert len(seen) >= 5


# Without these, transformers itself fails on its defaults.
NEEDED = {"ministral": {"head_dim": 128}, "nemotron": {"num_key_value_heads": 8}}
# What transformers' own defaults leave out: mamba layers, a head dimension that fits, how many experts a token visits.
UNBUILDABLE = {"granitemoehybrid": "mamba", "glm4_moe": "num_attention_heads", "deepseek_v2": "num_experts_per_tok"}


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_sparse_configs_take_the_defaults_of_transformers(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 2, **NEEDED.get(model_type, {})}
    if model_type in UNBUILDABLE:
        with pytest.raises(UsageError, match=UNBUILDABLE[model_type]):
            parse(config)
        return
    planned = parse(config)
    assert planned.total_parameters == sum(p.numel() for p in real_model(config).parameters())
    assert "vocab_size" in planned.assumed
    assert "num_hidden_layers" not in planned.assumed


@pytest.mark.parametrize("model", catalog.models(), ids=lambda model: model.name)
def test_bundled_models_have_their_parameters(model: catalog.Model) -> None:
    if model.config["model_type"] not in model_types() or model.name.startswith("granite-4.0-h-"):
        with pytest.raises(UsageError, match="not known yet"):
            parse(model.config)
        return
    planned = parse(model.config)
    assert planned.total_parameters == model.total_parameters
    assert sum(weight.numel for _, _, weight in planned.weights()) == model.total_parameters


def test_the_table_is_what_the_installed_transformers_says() -> None:
    transformers = pytest.importorskip("transformers")
    if not defaults_table()["source"].endswith(f" {transformers.__version__}"):
        pytest.skip("the table was written from another transformers")
    from vramplan.probes import config_defaults

    assert config_defaults.table() == defaults_table()


# ----------------------------------------------------------------------------------------------------- worked by hand


def test_llama_8b_by_hand() -> None:
    planned = parse(LLAMA_8B)
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    assert planned.total_parameters == 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert planned.kinds[0].numel == layer
    assert planned.order == (0,) * 32
    assert planned.counts == (32,)
    assert planned.head is planned.output
    attention = planned.kinds[0].attention
    assert (attention.num_heads, attention.num_key_value_heads, attention.head_dim) == (32, 8, 128)
    assert planned.kinds[0].module("mlp.down_proj").in_features == 14336
    with pytest.raises(KeyError):
        planned.kinds[0].module("mlp")


def test_gpt2_by_hand() -> None:
    planned = parse({"model_type": "gpt2"})
    layer = 768 * 2304 + 2304 + 768 * 768 + 768 + 2 * (768 * 3072) + 3072 + 768 + 4 * 768
    assert planned.total_parameters == 50257 * 768 + 1024 * 768 + 12 * layer + 2 * 768 == 124_439_808
    assert planned.head is None
    assert planned.output.numel == 50257 * 768
    assert planned.embedding_dropout == planned.kinds[0].attention.output_dropout == 0.1
    assert planned.config["hidden_size"] == 768


def test_layers_of_one_kind_are_described_once() -> None:
    gemma = parse(small("gemma3_text", 1) | {"num_hidden_layers": 13})
    assert gemma.order == (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0)
    assert [layer.attention.sliding_window for layer in gemma.kinds] == [4096, None]
    deepseek = parse(small("deepseek_v3") | {"num_hidden_layers": 4, "first_k_dense_replace": 2})
    assert deepseek.order == (0, 0, 1, 1)
    assert [isinstance(layer.mlp, Moe) for layer in deepseek.kinds] == [False, True]
    smollm = parse(small("smollm3", 1))
    assert [smollm.kinds[kind].attention.position for kind in smollm.order] == ["rotary"] * 3 + ["none", "rotary"]


def test_wiring() -> None:
    """What no parameter count can check: norms, residuals, scales."""
    llama, olmo, gemma = (parse(small(name)).kinds[0] for name in ("llama", "olmo2", "gemma2"))
    assert (llama.attention_norm, llama.mlp_norm) == ("input_layernorm", "post_attention_layernorm")
    assert (llama.attention_post_norm, llama.mlp_post_norm) == (None, None)
    assert (olmo.attention_norm, olmo.mlp_norm) == (None, None)
    assert (olmo.attention_post_norm, olmo.mlp_post_norm) == ("post_attention_layernorm", "post_feedforward_layernorm")
    assert olmo.attention.qk_norm_over == "all"
    assert gemma.mlp_norm == "pre_feedforward_layernorm"
    assert parse(small("gemma2")).final_logit_softcapping == 30.0
    assert parse(small("gemma2")).embedding_scale
    assert "sdpa" not in parse(small("gemma2")).attention_implementations
    cohere = parse(small("cohere"))
    assert cohere.kinds[0].parallel
    assert cohere.kinds[0].attention_norm == cohere.kinds[0].mlp_norm == "input_layernorm"
    assert cohere.logit_scale
    assert parse(small("granite")).kinds[0].scaled_residual
    assert parse(small("gpt_neox")).kinds[0].parallel
    assert not parse(small("stablelm")).kinds[0].parallel
    assert parse(small("stablelm", 1)).kinds[0].parallel
    opt = parse(small("opt", 1))
    assert [module.name for module in opt.embeddings] == [
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.project_in",
    ]
    assert [module.name for module in opt.final] == ["model.decoder.project_out"]
    assert opt.kinds[0].post_norm_residual
    assert parse(small("gpt_oss")).kinds[0].attention.sinks
    assert parse(small("mixtral")).kinds[0].mlp.top_k == 2  # type: ignore[union-attr]


def test_composite_config_is_read_as_text() -> None:
    text = {key: value for key, value in small("gemma3_text").items() if key != "model_type"}
    planned = parse({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}})
    assert planned.model_type == "gemma3_text"
    assert planned.assumed[-1] == "text_config" or "text_config" in planned.assumed
    assert planned.total_parameters == parse(small("gemma3_text")).total_parameters
    untied = parse({"model_type": "mistral3", "text_config": small("ministral3"), "tie_word_embeddings": True})
    assert untied.model_type == "ministral3"


def test_assumed_names_what_the_config_left_out() -> None:
    assert parse(LLAMA_8B).assumed == ("hidden_act",)
    sparse = {key: value for key, value in LLAMA_8B.items() if key not in ("intermediate_size", "num_key_value_heads")}
    planned = parse(sparse)
    assert set(planned.assumed) == {"hidden_act", "intermediate_size", "num_key_value_heads"}
    assert planned.config["num_key_value_heads"] == 32
    assert planned.config["intermediate_size"] == 11008


def test_parsing_is_fast() -> None:
    parse(LLAMA_8B)
    started = time.perf_counter()
    for _ in range(50):
        parse(LLAMA_8B)
    assert (time.perf_counter() - started) / 50 < 0.002  # 0.3 ms as a rule


# ----------------------------------------------------------------------------------------------------- wrong questions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"hidden_size": 0}, ["hidden_size", "is 0"]),
        ({"hidden_size": 4096.0}, ["hidden_size", "4096.0", "whole number"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"hidden_size": 4095}, ["hidden_size 4095", "num_attention_heads 32"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
        ({"vocab_size": 10**9}, ["vocab_size", "1000000000", "100,000,000"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "1,000"]),
        ({"num_hidden_layers": 10**400}, ["num_hidden_layers"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'", "true or false"]),
        ({"attention_dropout": 1.5}, ["attention_dropout", "1.5", "probability"]),
        ({"attention_dropout": float("nan")}, ["attention_dropout", "nan"]),
        ({"hidden_act": 3}, ["hidden_act", "3"]),
        ({"model_type": "lama"}, ["model_type", "'lama'", "llama"]),
        ({"model_type": 7}, ["model_type", "7"]),
        ({"model_type": "mamba"}, ["'mamba'", "not known yet"]),
        ({"model_type": "qwen3_next"}, ["'qwen3_next'", "not known yet", "qwen3_moe"]),
        ({"model_type": "gemma3"}, ["text_config"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised with gptq", "unquantised"]),
        ({"quantization_config": []}, ["quantised", "unquantised"]),
        ({"model_type": "gpt2", "n_embd": 768}, ["hidden_size", "twice", "768", "4096"]),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8"]),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, ["layer_types", "1 entries", "32"]),
        ({"model_type": "olmo3", "layer_types": ["conv"] * 32}, ["layer_types", "'conv'"]),
        ({"model_type": "olmo3", "layer_types": 3}, ["layer_types", "3"]),
        ({"model_type": "olmo3", "sliding_window": None}, ["sliding_attention", "sliding_window"]),
        ({"model_type": "gpt_neox", "rotary_pct": 2}, ["rotary_pct", "2"]),
        ({"model_type": "gpt_neox", "rope_scaling": "yarn"}, ["rope_scaling", "'yarn'"]),
        ({"model_type": "gptj", "rotary_dim": 256}, ["rotary_dim", "256", "128"]),
        ({"model_type": "granitemoehybrid"}, ["granitemoehybrid", "mamba"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["a"]}, ["mlp_only_layers"]),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 32}, ["no_rope_layers"]),
        ({"model_type": "gpt2", "add_cross_attention": True}, ["add_cross_attention"]),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False},
            ["falcon", "parallel_attn"],
        ),
    ],
)
def test_wrong_configs_are_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse({**LLAMA_8B, **change})
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("config", [{}, [], None, "llama", 7, {"hidden_size": 1}, {1: 2}, {"architectures": ["GPT2"]}])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(UsageError):
        parse(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted(
    {name for entry in defaults_table()["types"].values() for name in (*entry["defaults"], *entry["names"])}
)
PLAUSIBLE = st.integers(-1, 40) | st.sampled_from([0.5, 1.0, None, True, False, "full_attention", "rope", [1, 0], []])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "model_type", "text_config"]) | st.text(max_size=3), JSON, max_size=6))
def test_any_json_gives_a_usage_error_or_an_architecture(config: dict[str, Any]) -> None:
    _parse_or_refuse(config)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FLAT), st.dictionaries(st.sampled_from(FIELDS), PLAUSIBLE | JSON, max_size=4))
def test_any_change_of_a_config_gives_a_usage_error_or_an_architecture(
    case: tuple[str, int], change: dict[str, Any]
) -> None:
    _parse_or_refuse({**small(*case), **change})


def _parse_or_refuse(config: dict[str, Any]) -> None:
    with contextlib.suppress(UsageError):
        planned = parse(config)
        assert planned.total_parameters == sum(weight.numel for _, _, weight in planned.weights())
        assert json.dumps(planned.config, default=str)
