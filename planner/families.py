"""The register of model families: what each builds, said by how it differs from Llama.

A family's line says how it differs from Llama; those from before Llama have a builder each. All were read from
transformers 5.24's modeling code, and tests compare every name, shape and order with it (5.17 has the same; what else
it builds otherwise is in versions.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vramplan.planner import older
from vramplan.planner.decoder import PARALLEL, POST, SANDWICH, SANDWICH_GLM4, Decoder, Experts
from vramplan.planner.patterns import (
    rope_but_every,
    rope_exaone4,
    rope_if_asked,
    rope_where_sliding,
    sparse_after_first,
    sparse_by_step,
    sparse_if_experts,
    window_above,
    window_but_every,
    window_by_type,
    window_everywhere,
    window_exaone4,
    window_if_used,
    window_qwen2_moe,
    window_smollm3,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.configuration import Config
    from vramplan.planner.layers import Architecture

_QWEN2 = Decoder(qkv_bias=True, out_bias=False, windows=window_above)
_GEMMA2 = Decoder(
    norms=SANDWICH,
    norm="gemma_rms_norm",
    activation="hidden_activation",
    windows=window_but_every(2),
    attention_softcapping=True,
    final_softcapping=True,
    embedding_scale=True,
    whole_heads=True,
)
_MISTRAL = Decoder(qkv_bias=False, out_bias=False, windows=window_everywhere)
_PHI_MLP: dict[str, Any] = {"mlp": "plain", "mlp_bias": True, "mlp_names": ("fc1", "fc2")}
_FUSED_MLP: dict[str, Any] = {"mlp": "fused", "mlp_names": ("gate_up_proj", "down_proj")}
_PLAIN_MLP: dict[str, Any] = {"mlp": "plain", "mlp_names": ("up_proj", "down_proj")}
_GLM = Decoder(out_bias=False, rope="glm", rotary_share=0.5, **_FUSED_MLP)
_GRANITE: dict[str, Any] = {"embedding_scale": True, "logit_scale": True, "scaled_residual": True}
_GRANITE_EXPERTS = Experts(path="block_sparse_moe", router="router")
_DEEPSEEK_EXPERTS = Experts(
    router_first=False,
    wide_router=True,
    count="n_routed_experts",
    width="moe_intermediate_size",
    shared="mlp.shared_experts",
    shared_count="n_shared_experts",
    sparse=sparse_after_first,
)

FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "apertus": Decoder(
        qk_norm="head",
        norms={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        **_PLAIN_MLP,
    ),
    "arcee": Decoder(whole_heads=True, mlp_bias="mlp_bias", **_PLAIN_MLP),
    "bloom": older.bloom,
    "cohere": Decoder(
        qk_norm="rows",
        qk_norm_if="use_qk_norm",
        norms=PARALLEL,
        norm="cohere_layer_norm",
        parallel=True,
        rope="cohere",
        logit_scale=True,
    ),
    "cohere2": Decoder(
        norms=PARALLEL,
        norm="cohere_layer_norm",
        parallel=True,
        rope="cohere",
        logit_scale=True,
        windows=window_but_every(4, "sliding_window_pattern"),
        rotates=rope_where_sliding,
    ),
    "deepseek_v2": Decoder(latent=True, rope="deepseek_v2", mlp_bias="mlp_bias", experts=_DEEPSEEK_EXPERTS),
    "deepseek_v3": Decoder(latent=True, rope="deepseek_v3", experts=_DEEPSEEK_EXPERTS),
    "ernie4_5": Decoder(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", rope="ernie4_5"),
    "exaone4": Decoder(
        qkv_bias=False, out_bias=False, qk_norm="head", norms=POST, windows=window_exaone4, rotates=rope_exaone4
    ),
    "falcon": older.falcon,
    "gemma": Decoder(norm="gemma_rms_norm", embedding_scale=True),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2, attention_softcapping=False, qk_norm="head", windows=window_but_every(6, "sliding_window_pattern")
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, norms=SANDWICH_GLM4),
    "glm4_moe": Decoder(
        out_bias=False,
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        rope="gpt_neox",
        rotary_share=0.5,
        experts=_DEEPSEEK_EXPERTS,
    ),
    "gpt2": older.gpt2,
    "gpt_bigcode": older.gpt_bigcode,
    "gpt_neox": older.gpt_neox,
    "gpt_oss": Decoder(
        sinks=True,
        norm="olmo_rms_norm",
        rope="gpt_oss",
        windows=window_but_every(2),
        experts=Experts(router="router", router_bias=True, expert_bias=True, transposed=True),
    ),
    "gptj": older.gptj,
    "granite": Decoder(mlp_bias="mlp_bias", **_GRANITE),
    "granitemoe": Decoder(order=("attention", "norms", "mlp"), experts=_GRANITE_EXPERTS, **_GRANITE),
    "granitemoehybrid": Decoder(
        order=("norms", "mlp", "attention"),
        rotates=rope_if_asked,
        mlp="fused",
        mlp_path="shared_mlp",
        mlp_names=("input_linear", "output_linear"),
        mlp_width="shared_intermediate_size",
        experts=replace(
            _GRANITE_EXPERTS, shared="shared_mlp", shared_width="shared_intermediate_size", sparse=sparse_if_experts
        ),
        **_GRANITE,
    ),
    "internlm3": Decoder(mlp_bias="mlp_bias", whole_heads=True),
    "llama": Decoder(mlp_bias="mlp_bias", whole_heads=True),
    "ministral": replace(_MISTRAL, windows=window_by_type),
    "ministral3": _MISTRAL,
    "mistral": _MISTRAL,
    "mixtral": replace(_MISTRAL, experts=Experts()),
    "mpt": older.mpt,
    "nemotron": Decoder(
        norm="layer_norm_1p", norm_bias=True, mlp_bias="mlp_bias", rope="gpt_neox", rotary_share=0.5, **_PLAIN_MLP
    ),
    "olmo": Decoder(norm="olmo_layer_norm", norm_weight=False, rope="olmo"),
    "olmo2": Decoder(qk_norm="all", norms=POST, norm="olmo_rms_norm", rope="olmo"),
    "olmo3": Decoder(qk_norm="all", norms=POST, norm="olmo_rms_norm", rope="olmo", windows=window_but_every(4)),
    "olmoe": Decoder(qk_norm="all", experts=Experts(count="num_experts")),
    "opt": older.opt,
    "phi": Decoder(
        qkv_bias=True,
        out_bias=True,
        out="dense",
        qk_norm="head",
        qk_norm_if="qk_layernorm",
        q_norm="q_layernorm",
        k_norm="k_layernorm",
        norms=PARALLEL,
        norm="layer_norm",
        norm_bias=True,
        parallel=True,
        rope="gpt_neox",
        rotary_share=0.5,
        final_norm="final_layernorm",
        head_bias=True,
        attention_output_dropout="resid_pdrop",
        mlp_dropout="resid_pdrop",
        embedding_dropout="embd_pdrop",
        **_PHI_MLP,
    ),
    "phi3": Decoder(
        qkv_bias=False,
        out_bias=False,
        fused=True,
        rope="gpt_neox",
        rotary_share=1.0,
        windows=window_everywhere,
        attention_output_dropout="resid_pdrop",
        mlp_dropout="resid_pdrop",
        **_FUSED_MLP,
    ),
    "phimoe": Decoder(
        norm="layer_norm",
        norm_bias=True,
        windows=window_everywhere,
        head_bias="lm_head_bias",
        experts=Experts(router="router", router_linear=True),
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": Decoder(
        qkv_bias="qkv_bias",
        out_bias=False,
        windows=window_qwen2_moe,
        experts=Experts(
            count="num_experts",
            width="moe_intermediate_size",
            shared="mlp.shared_expert",
            shared_width="shared_expert_intermediate_size",
            shared_gate="shared_expert_gate",
            sparse=sparse_by_step,
        ),
    ),
    "qwen3": Decoder(qk_norm="head", windows=window_above),
    "qwen3_moe": Decoder(
        qk_norm="head",
        windows=window_if_used,
        experts=Experts(
            router_first=False, count="num_local_experts", width="moe_intermediate_size", sparse=sparse_by_step
        ),
    ),
    "seed_oss": Decoder(
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        attention_output_dropout="residual_dropout",
        mlp_dropout="residual_dropout",
    ),
    "smollm3": Decoder(mlp_bias="mlp_bias", windows=window_smollm3, rotates=rope_but_every),
    "stablelm": Decoder(
        qkv_bias="use_qkv_bias",
        out_bias=False,
        qk_norm="each",
        qk_norm_if="qk_layernorm",
        q_norm="q_layernorm",
        k_norm="k_layernorm",
        own_head_dim=False,
        norm="layer_norm",
        norm_bias=True,
        parallel="use_parallel_residual",
        rope="gpt_neox",
        rotary_share=0.25,
        mlp_dropout="hidden_dropout",
    ),
    "starcoder2": Decoder(
        qkv_bias="use_bias",
        out_bias="use_bias",
        norm="layer_norm",
        norm_bias=True,
        windows=window_everywhere,
        mlp="plain",
        mlp_bias="use_bias",
        mlp_names=("c_fc", "c_proj"),
        attention_output_dropout="residual_dropout",
        mlp_dropout="residual_dropout",
        embedding_dropout="embedding_dropout",
    ),
}
