"""Small configs of every family, and transformers' own models of them, for the tests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vramplan.planner.architecture import Architecture, Module

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 448}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20}
GROUPS = {"n_group": 1, "topk_group": 1}

# One or more small configs of every family; together they take every branch that changes a shape.
CASES: dict[str, list[dict[str, Any]]] = {
    "apertus": [GROUPED, {"hidden_act": "silu", "attention_bias": True}],
    "arcee": [GROUPED, {"mlp_bias": True, "attention_bias": True, "head_dim": 8}],
    "bloom": [{}, {"tie_word_embeddings": False}],
    "cohere": [GROUPED, {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}],
    "cohere2": [{"sliding_window_pattern": 2, "sliding_window": 32}, GROUPED | {"num_hidden_layers": 5}],
    "deepseek_v2": [
        GROUPED | ROUTED | LATENT | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
        GROUPED
        | ROUTED
        | LATENT
        | {"q_lora_rank": None, "mlp_bias": True, "attention_bias": True, "num_key_value_heads": 4},
    ],
    "deepseek_v3": [
        GROUPED | ROUTED | LATENT | GROUPS | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
        GROUPED
        | ROUTED
        | LATENT
        | GROUPS
        | {"q_lora_rank": None, "num_key_value_heads": 4, "attention_bias": True, "n_shared_experts": 2},
    ],
    "ernie4_5": [GROUPED, GROUPED | {"use_bias": True, "head_dim": None, "tie_word_embeddings": False}],
    "exaone4": [GROUPED | {"sliding_window_pattern": 2, "head_dim": 8}, GROUPED | {"num_hidden_layers": 5}],
    "falcon": [
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100},
        {"multi_query": False, "alibi": True, "parallel_attn": False, "tie_word_embeddings": False},
    ],
    "gemma": [GROUPED | {"head_dim": 24}, GROUPED | {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [GROUPED | {"head_dim": 24}, GROUPED | {"attention_bias": True, "final_logit_softcapping": None}],
    "gemma3_text": [GROUPED | {"head_dim": 24, "sliding_window_pattern": 2}, GROUPED | {"num_hidden_layers": 7}],
    "glm": [GROUPED, {"attention_bias": False, "head_dim": 24}],
    "glm4": [GROUPED, {"attention_bias": False, "head_dim": 24, "partial_rotary_factor": 0.25}],
    "glm4_moe": [
        GROUPED | ROUTED | {"head_dim": 16},
        GROUPED | ROUTED | {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1},
    ],
    "gpt2": [{}, {"n_inner": 100, "tie_word_embeddings": False, "n_positions": 40}],
    "gpt_bigcode": [{}, {"n_inner": 100, "multi_query": False, "tie_word_embeddings": False}],
    "gpt_neox": [{}, {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 0.5}],
    "gpt_oss": [GROUPED | EXPERTS | {"head_dim": 24}, GROUPED | EXPERTS | {"attention_bias": False}],
    "gptj": [{"rotary_dim": 8}, {"rotary_dim": 8, "n_inner": 100, "tie_word_embeddings": True}],
    "granite": [GROUPED, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "granitemoe": [GROUPED | EXPERTS, EXPERTS | {"attention_bias": True}],
    "granitemoehybrid": [
        GROUPED | {"layer_types": ["attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 40},
        GROUPED | EXPERTS | {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"},
    ],
    "internlm3": [GROUPED, {"qkv_bias": True, "bias": True, "head_dim": None}],
    "llama": [GROUPED, {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True}],
    "ministral": [GROUPED | {"head_dim": 16}, GROUPED | {"head_dim": 24, "sliding_window": None}],
    "ministral3": [GROUPED, GROUPED | {"head_dim": 24, "tie_word_embeddings": True}],
    "mistral": [GROUPED, GROUPED | {"head_dim": 24, "sliding_window": None}],
    "mixtral": [GROUPED | EXPERTS, GROUPED | EXPERTS | {"head_dim": 24, "sliding_window": 32}],
    "mpt": [{}, {"tie_word_embeddings": False}],
    "nemotron": [GROUPED, GROUPED | {"attention_bias": True, "mlp_bias": True, "head_dim": 24}],
    "olmo": [GROUPED, {"attention_bias": True, "tie_word_embeddings": True}],
    "olmo2": [GROUPED, {"attention_bias": True}],
    "olmo3": [{"sliding_window": 32}, GROUPED | {"num_hidden_layers": 5}],
    "olmoe": [GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, {"num_experts": 8, "attention_bias": True}],
    "opt": [
        {},
        {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "tie_word_embeddings": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "ffn_dim": 100, "word_embed_proj_dim": 32},
    ],
    "phi": [GROUPED, {"qk_layernorm": True, "tie_word_embeddings": True, "partial_rotary_factor": 0.25}],
    "phi3": [GROUPED, {"sliding_window": 32, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}],
    "phimoe": [GROUPED | EXPERTS, GROUPED | EXPERTS | {"attention_bias": True, "lm_head_bias": True}],
    "qwen2": [GROUPED, GROUPED | {"use_sliding_window": True, "max_window_layers": 1}, GROUPED | {"head_dim": 24}],
    "qwen2_moe": [
        GROUPED | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        GROUPED | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "qkv_bias": False},
        GROUPED | {"num_experts": 4, "mlp_only_layers": [1], "use_sliding_window": True, "max_window_layers": 2},
    ],
    "qwen3": [GROUPED, GROUPED | {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 1}],
    "qwen3_moe": [
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        GROUPED | EXPERTS | {"decoder_sparse_step": 2, "head_dim": 24, "attention_bias": True},
    ],
    "seed_oss": [GROUPED, GROUPED | {"head_dim": None, "attention_out_bias": True, "mlp_bias": True}],
    "smollm3": [
        GROUPED | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 32},
        GROUPED | {"num_hidden_layers": 5},
    ],
    "stablelm": [
        GROUPED,
        GROUPED | {"qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True},
    ],
    "starcoder2": [GROUPED, {"use_bias": False, "sliding_window": 32, "tie_word_embeddings": False}],
}
# (model type, index of its case), for parametrize
FLAT = [(model_type, index) for model_type, cases in CASES.items() for index in range(len(cases))]


def small(model_type: str, index: int = 0) -> dict[str, Any]:
    """A small config of a family, as a config.json holds it."""
    return {"model_type": model_type, **SMALL, **CASES[model_type][index]}


def real_model(config: dict[str, Any]) -> Any:
    """transformers' own model of a config, on the meta device."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {config['model_type']}")
    fields = {key: value for key, value in json.loads(json.dumps(config)).items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**fields))


def modules(planned: Architecture) -> list[tuple[str, Module]]:
    """Every module of an architecture with its full path, a tied head included."""
    layers = [
        (f"{planned.layer_prefix}.{index}.{module.name}", module)
        for index, kind in enumerate(planned.order)
        for module in planned.kinds[kind].modules
    ]
    return [(module.name, module) for module in (*planned.before, *planned.after, planned.output)] + layers


# Llama-3.1-8B, for counts worked out by hand.
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
