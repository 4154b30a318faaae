"""The families from before Llama, a builder each: GPT-2, GPT-NeoX, OPT, BLOOM, Falcon, GPT-J, MPT."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vramplan.planner.construction import assemble, conv1d, embedding, head_sizes, layer_norm, linear, norm
from vramplan.planner.errors import UsageError
from vramplan.planner.layers import Architecture, Attention, Layer, Mlp, Module, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.configuration import Config


def _plain(up: str, down: str, activation: str, width: int, dropout: float) -> Mlp:
    return Mlp(None, up, None, down, activation, width, dropout)


def _attention(heads: int, head_dim: int, out: str, kv_heads: int | None = None, **rest: Any) -> Attention:
    defaults: dict[str, Any] = {"rotary_dim": 0, "position": "none"} | dict.fromkeys(("q", "k", "v", "qkv"))
    return Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        o=out,
        **{**defaults, **rest},
    )


def _qkv(path: str) -> dict[str, Any]:
    """The names of three projections in one module."""
    return {name: f"{path}.{name}_proj" for name in "qkv"}


def _alike(config: Config, layer: Layer, **rest: Any) -> Architecture:
    """A model whose layers are all of one kind."""
    return assemble(config, kinds=(layer,), order=(0,) * config.size("num_hidden_layers"), **rest)


def gpt2(config: Config) -> Architecture:
    """GPT-2: Conv1D projections, learned positions."""
    heads = config.size("num_attention_heads")
    return _gpt(config, heads, conv1d)


def gpt_bigcode(config: Config) -> Architecture:
    """StarCoder's first generation: GPT-2 with nn.Linear and, as a rule, one key-value head."""
    heads = 1 if config.flag("multi_query") else config.size("num_attention_heads")
    return _gpt(config, heads, partial(linear, bias=True))


def _gpt(config: Config, kv_heads: int, project: Callable[[str, int, int, Role], Module]) -> Architecture:
    if config.flag("add_cross_attention"):
        raise config.wrong("add_cross_attention", True, "false: cross-attention is not known yet")
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    config.settle("num_key_value_heads", kv_heads)
    heads, kv_heads, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = config.optional_size("n_inner") or 4 * hidden
    dropout = config.probability("resid_pdrop")
    layer = Layer(
        modules=(
            layer_norm("ln_1", hidden),
            project("attn.c_attn", hidden, hidden + 2 * kv_heads * head_dim, "attention"),
            project("attn.c_proj", hidden, hidden, "attention"),
            layer_norm("ln_2", hidden),
            project("mlp.c_fc", hidden, width, "mlp"),
            project("mlp.c_proj", width, hidden, "mlp"),
        ),
        attention=_attention(
            heads,
            head_dim,
            "attn.c_proj",
            kv_heads,
            qkv="attn.c_attn",
            position="learned",
            dropout=config.probability("attn_pdrop"),
            output_dropout=dropout,
        ),
        mlp=_plain("mlp.c_fc", "mlp.c_proj", config.text("activation_function"), width, dropout),
        attention_norm="ln_1",
        mlp_norm="ln_2",
    )
    positions = config.size("max_position_embeddings")
    return _alike(
        config,
        layer,
        before=(
            embedding("transformer.wte", vocabulary, hidden),
            embedding("transformer.wpe", positions, hidden, "position_embedding"),
        ),
        after=(layer_norm("transformer.ln_f", hidden),),
        layer_prefix="transformer.h",
        embedding_dropout=config.probability("embd_pdrop"),
    )


def gpt_neox(config: Config) -> Architecture:
    """GPT-NeoX and Pythia: a fused qkv, a quarter of each head rotated, both branches read the same residual."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    heads, _, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = config.size("intermediate_size")
    bias, dropout = config.flag("attention_bias"), config.probability("hidden_dropout")
    qkv, out = "attention.query_key_value", "attention.dense"
    layer = Layer(
        modules=(
            layer_norm("input_layernorm", hidden),
            layer_norm("post_attention_layernorm", hidden),
            linear(qkv, hidden, 3 * hidden, "attention", bias=bias),
            linear(out, hidden, hidden, "attention", bias=bias),
            linear("mlp.dense_h_to_4h", hidden, width, "mlp", bias=True),
            linear("mlp.dense_4h_to_h", width, hidden, "mlp", bias=True),
        ),
        attention=_attention(
            heads,
            head_dim,
            out,
            qkv=qkv,
            position="rotary",
            rotary_dim=int(head_dim * config.rotary_factor(0.25)),
            rope="gpt_neox",
            dropout=config.probability("attention_dropout"),
            output_dropout=dropout,
        ),
        mlp=_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", config.text("hidden_act"), width, dropout),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        parallel=config.flag("use_parallel_residual"),
    )
    return _alike(
        config,
        layer,
        before=(embedding("gpt_neox.embed_in", vocabulary, hidden),),
        after=(layer_norm("gpt_neox.final_layer_norm", hidden),),
        layer_prefix="gpt_neox.layers",
        embedding_dropout=dropout,
    )


def opt(config: Config) -> Architecture:
    """OPT: learned positions (two rows more than positions); the 350m projects its embeddings and norms afterwards."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    heads, _, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = config.size("ffn_dim")
    narrow = config.optional_size("word_embed_proj_dim") or hidden
    bias, affine = config.flag("enable_bias"), config.flag("layer_norm_elementwise_affine")
    norm_first = config.flag("do_layer_norm_before")
    dropout = config.probability("dropout")
    # fc1 and fc2 hang on the layer itself, and k comes before v and q.
    layer = Layer(
        modules=(
            linear("self_attn.k_proj", hidden, hidden, "attention", bias=bias),
            linear("self_attn.v_proj", hidden, hidden, "attention", bias=bias),
            linear("self_attn.q_proj", hidden, hidden, "attention", bias=bias),
            linear("self_attn.out_proj", hidden, hidden, "attention", bias=bias),
            layer_norm("self_attn_layer_norm", hidden, affine=affine),
            linear("fc1", hidden, width, "mlp", bias=bias),
            linear("fc2", width, hidden, "mlp", bias=bias),
            layer_norm("final_layer_norm", hidden, affine=affine),
        ),
        attention=_attention(
            heads,
            head_dim,
            "self_attn.out_proj",
            position="learned",
            **_qkv("self_attn"),
            dropout=config.probability("attention_dropout"),
            output_dropout=dropout,
        ),
        mlp=_plain("fc1", "fc2", config.text("activation_function"), width, dropout),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        post_norm_residual=not norm_first,
    )
    path = "model.decoder."
    tokens = embedding(f"{path}embed_tokens", vocabulary, narrow)
    # OPTLearnedPositionalEmbedding keeps two rows for the padding offset.
    positions = embedding(
        f"{path}embed_positions", config.size("max_position_embeddings") + 2, hidden, "position_embedding"
    )
    project_in = (linear(f"{path}project_in", narrow, hidden, "projection"),) if narrow != hidden else ()
    project_out = (linear(f"{path}project_out", hidden, narrow, "projection"),) if narrow != hidden else ()
    has_norm = norm_first and not config.flag("_remove_final_layer_norm")
    last_norm = (layer_norm(f"{path}final_layer_norm", hidden, affine=affine),) if has_norm else ()
    return _alike(
        config,
        layer,
        before=(tokens, positions, *project_out, *project_in, *last_norm),
        after=(),
        layer_prefix=f"{path}layers",
        embeddings=(tokens, positions, *project_in),
        final=(*last_norm, *project_out),
        head_inputs=narrow,
    )


def bloom(config: Config) -> Architecture:
    """BLOOM: alibi, a norm after the embedding, fused qkv."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    heads, _, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = 4 * hidden
    dropout = config.probability("hidden_dropout")
    qkv, out = "self_attention.query_key_value", "self_attention.dense"
    layer = Layer(
        modules=(
            layer_norm("input_layernorm", hidden),
            linear(qkv, hidden, 3 * hidden, "attention", bias=True),
            linear(out, hidden, hidden, "attention", bias=True),
            layer_norm("post_attention_layernorm", hidden),
            linear("mlp.dense_h_to_4h", hidden, width, "mlp", bias=True),
            linear("mlp.dense_4h_to_h", width, hidden, "mlp", bias=True),
        ),
        attention=_attention(
            heads,
            head_dim,
            out,
            qkv=qkv,
            position="alibi",
            dropout=config.probability("attention_dropout"),
            output_dropout=dropout,
        ),
        mlp=_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "bloom_gelu", width, dropout),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
    )
    return _alike(
        config,
        layer,
        before=(
            embedding("transformer.word_embeddings", vocabulary, hidden),
            layer_norm("transformer.word_embeddings_layernorm", hidden),
        ),
        after=(layer_norm("transformer.ln_f", hidden),),
        layer_prefix="transformer.h",
    )


def falcon(config: Config) -> Architecture:
    """Falcon: one key-value head (7b), groups of them and two norms (40b), or plain heads with alibi (rw)."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    new, parallel = config.flag("new_decoder_architecture"), config.flag("parallel_attn")
    heads = config.size("num_attention_heads")
    kv_heads = config.optional_size("num_kv_heads") or heads
    if not new:
        kv_heads = 1 if config.flag("multi_query") else heads
    config.settle("num_key_value_heads", kv_heads)
    heads, kv_heads, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = config.optional_size("ffn_hidden_size") or 4 * hidden
    bias, dropout = config.flag("bias"), config.probability("hidden_dropout")
    given_norms = config.optional_size("num_ln_in_parallel_attn")
    two_norms = (given_norms or (2 if new else 1)) == 2
    if parallel and two_norms and not new:
        raise config.wrong("num_ln_in_parallel_attn", 2, "1 unless new_decoder_architecture is true")
    if new and not (parallel and (two_norms or given_norms == 1)):
        raise UsageError("falcon with new_decoder_architecture needs parallel_attn true and 1 or 2 norms")
    if not parallel:
        names = ["post_attention_layernorm", "input_layernorm"]
        attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    elif two_norms:
        names = ["ln_attn", "ln_mlp"]
        attention_norm, mlp_norm = names
    else:
        names = ["input_layernorm"]
        attention_norm = mlp_norm = "input_layernorm"
    qkv, out = "self_attention.query_key_value", "self_attention.dense"

    def falcon_linear(name: str, inputs: int, outputs: int, role: Role) -> Module:
        return linear(name, inputs, outputs, role, bias=bias, variant="falcon_linear")

    alibi = config.flag("alibi")
    layer = Layer(
        modules=(
            falcon_linear(qkv, hidden, (heads + 2 * kv_heads) * head_dim, "attention"),
            falcon_linear(out, hidden, hidden, "attention"),
            falcon_linear("mlp.dense_h_to_4h", hidden, width, "mlp"),
            falcon_linear("mlp.dense_4h_to_h", width, hidden, "mlp"),
            *(layer_norm(name, hidden) for name in names),
        ),
        attention=_attention(
            heads,
            head_dim,
            out,
            kv_heads,
            qkv=qkv,
            position="alibi" if alibi else "rotary",
            interleaved=new,
            rotary_dim=0 if alibi else head_dim,
            # Without alibi, falcon's attention applies no dropout.
            dropout=config.probability("attention_dropout") if alibi else 0.0,
            output_dropout=0.0 if parallel else config.probability("attention_dropout"),
        ),
        mlp=_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", config.text("activation"), width, dropout),
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        parallel=parallel,
    )
    return _alike(
        config,
        layer,
        before=(embedding("transformer.word_embeddings", vocabulary, hidden),),
        after=(layer_norm("transformer.ln_f", hidden),),
        layer_prefix="transformer.h",
    )


def gptj(config: Config) -> Architecture:
    """GPT-J: one norm feeds both branches, part of each head rotated, a head with a bias."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    heads, _, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = config.optional_size("n_inner") or 4 * hidden
    rotary_dim = config.optional_size("rotary_dim") or head_dim
    if rotary_dim > head_dim:
        raise config.wrong("rotary_dim", rotary_dim, f"at most the head dimension, {head_dim}")
    dropout = config.probability("resid_pdrop")
    layer = Layer(
        modules=(
            layer_norm("ln_1", hidden),
            linear("attn.k_proj", hidden, hidden, "attention"),
            linear("attn.v_proj", hidden, hidden, "attention"),
            linear("attn.q_proj", hidden, hidden, "attention"),
            linear("attn.out_proj", hidden, hidden, "attention"),
            linear("mlp.fc_in", hidden, width, "mlp", bias=True),
            linear("mlp.fc_out", width, hidden, "mlp", bias=True),
        ),
        attention=_attention(
            heads,
            head_dim,
            "attn.out_proj",
            rotary_dim=rotary_dim,
            position="rotary",
            **_qkv("attn"),
            dropout=config.probability("attn_pdrop"),
            output_dropout=dropout,
            rope="gptj",
            positions=config.size("max_position_embeddings"),
        ),
        mlp=_plain("mlp.fc_in", "mlp.fc_out", config.text("activation_function"), width, dropout),
        attention_norm="ln_1",
        mlp_norm="ln_1",
        parallel=True,
    )
    return _alike(
        config,
        layer,
        before=(embedding("transformer.wte", vocabulary, hidden),),
        after=(layer_norm("transformer.ln_f", hidden),),
        layer_prefix="transformer.h",
        head_bias=True,
        embedding_dropout=config.probability("embd_pdrop"),
    )


def mpt(config: Config) -> Architecture:
    """MPT: alibi, norms without bias, no biases at all; its dropout field takes whole numbers only, so it has none."""
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    heads, _, head_dim = head_sizes(config, hidden, own_head_dim=False)
    width = 4 * hidden  # transformers builds 4 x hidden whatever expansion_ratio says
    layer = Layer(
        modules=(
            norm("norm_1", hidden, "layer_norm"),
            linear("attn.Wqkv", hidden, 3 * hidden, "attention"),
            linear("attn.out_proj", hidden, hidden, "attention"),
            norm("norm_2", hidden, "layer_norm"),
            linear("ffn.up_proj", hidden, width, "mlp"),
            linear("ffn.down_proj", width, hidden, "mlp"),
        ),
        attention=_attention(
            heads,
            head_dim,
            "attn.out_proj",
            qkv="attn.Wqkv",
            position="alibi",
            positions=config.size("max_seq_len"),
        ),
        mlp=_plain("ffn.up_proj", "ffn.down_proj", "gelu", width, 0.0),
        attention_norm="norm_1",
        mlp_norm="norm_2",
    )
    return _alike(
        config,
        layer,
        before=(embedding("transformer.wte", vocabulary, hidden),),
        after=(norm("transformer.norm_f", hidden, "layer_norm"),),
        layer_prefix="transformer.blocks",
    )
