"""The attention of BLOOM, Falcon, GPT-J and MPT, which is like no other family's.

Each function follows its class's forward statement by statement (transformers/models/*/modeling_*.py, BloomAttention,
FalconAttention, GPTJAttention, MptAttention) and was compared with recorded memory histories; `gptj`, of transformers
5.24, with traces. All return the output of the attention module and the weights, where they exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner import attention as kernels
from vramplan.planner import blocks, ops, rotary
from vramplan.planner.paper import Tensor

if TYPE_CHECKING:
    from vramplan.planner.blocks import Held, Settings, Shared
    from vramplan.planner.layers import Layer
    from vramplan.planner.paper import Tape

_Attended = tuple["Tensor", "Tensor | None"]


def bloom(tape: Tape, x: Tensor, residual: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> _Attended:
    """Scores by `baddbmm` on top of alibi; the residual is added inside, while the scores are locals still."""
    a = layer.attention
    b, n, t, d = s.batch, a.num_heads, s.seq, a.head_dim
    fused = _project(tape, x, a.qkv, held, s)
    tape.scope = "self_attn"
    if shared.cache is None:
        q, k, v = (_flat(tape, _selected(tape, fused, (b, n, t, d))) for _ in range(3))
    else:
        q, k, v = (_selected(tape, fused, (b, n, t, d)) for _ in range(3))
        k, v = shared.cache.update(tape, k, v)
        q = _flat(tape, q)
    scores = baddbmm(tape, shared.masks["alibi"], q, k, (b, n, t, k.shape[2]))
    weights = ops.add(tape, scores, shared.masks[blocks.layer_type(a)], "scores, masked")
    probabilities = ops.to(tape, ops.wide_softmax(tape, weights), scores.dtype, "probabilities, cast")
    probabilities = ops.dropout(tape, probabilities, a.dropout)
    context = ops.merge_heads(tape, ops.matmul(tape, probabilities, v, (b, n, t, d), "attention output"))
    tape.scope = a.o
    out = blocks.project(tape, context, held.projections[a.o], s)
    out = ops.add(tape, residual, ops.dropout(tape, out, a.output_dropout), "residual")
    del fused, q, k, v
    del scores, weights, context
    return out, probabilities


def baddbmm(tape: Tape, bias: Tensor, q: Tensor, k: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`bias.baddbmm(q, k, alpha=...)`: saves q and k; each gradient is a product, then scaled (BaddbmmBackward0)."""
    k, q = ops.lower(tape, k), ops.lower(tape, q)
    bias = ops.lower(tape, bias)
    facts = [(x.shape, x.dtype) for x in (q, k)]

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads: ops.Grads = []
        for each in facts:
            product = tape.new(*each, "gradient of an input, unscaled")
            grads.append(tape.new(*each, "gradient of an input"))
            del product
        return grads

    return ops.done(tape.new(shape, q.dtype, "scores"), tape.node((q, k), backward, (k, q)))


def falcon(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> _Attended:
    """Heads beside one key and value (7b), in groups of them (40b), or each with its own (rw), the last with alibi."""
    a = layer.attention
    fused = _project(tape, x, a.qkv, held, s)
    tape.scope = "self_attn"
    kind = blocks.layer_type(a)
    q, k, v = _falcon_heads(tape, fused, layer, s)
    if a.rotary_dim:
        q, k, _ = rotary.rotate(tape, q, k, *shared.tables[kind], a, layer.family)
    if shared.cache is not None:
        k, v = shared.cache.update(tape, k, v)
    weights: Tensor | None = None
    kept: list[Tensor] = []
    if s.kernel == "flash_attention_2":
        out, weights = kernels.attend(tape, q, k, v, a, s, None)
    elif s.kernel != "eager":
        out = kernels.scaled_dot_product_attention(tape, q, k, v, s, shared.masks[kind], grouped=False)
        out = ops.merge_heads(tape, out)
    else:
        b, n, t, d = q.shape
        scores = ops.matmul(tape, q, k, (b, n, t, k.shape[2]), "scores")
        if a.position == "alibi":
            wide = ops.to(tape, scores, "fp32", "scores, float32")
            logits = ops.scale_(tape, ops.add(tape, wide, shared.masks["alibi"], "scores with alibi"))
            kept = [logits, scores, wide]  # a list lets go of its last element first
            del scores, wide
        else:
            logits = ops.scale_(tape, scores)
            del scores
        biased = ops.add(tape, logits, shared.masks[kind], "scores, masked")
        if x.dtype == "fp32":
            weights = ops.wide_softmax(tape, biased)
        else:  # F.softmax(..., dtype=hidden_states.dtype) casts its input first (aten/src/ATen/native/SoftMax.cpp)
            weights = ops.softmax(tape, ops.to(tape, biased, x.dtype, "scores, cast"))
        del biased
        del logits
        if a.position == "alibi":
            weights = ops.dropout(tape, weights, a.dropout)
        out = ops.merge_heads(tape, ops.matmul(tape, weights, v, (b, n, t, d), "attention output"))
    tape.scope = a.o
    out = blocks.project(tape, out, held.projections[a.o], s)
    del kept
    return out, weights


def _falcon_heads(tape: Tape, fused: Tensor, layer: Layer, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """FalconAttention._split_heads: q, k and v [B, N, T, D]; where all share one key and value, those have N = 1."""
    a = layer.attention
    b, t, n, d, kv = s.batch, s.seq, a.num_heads, a.head_dim, a.num_key_value_heads
    if a.interleaved:
        rows = ops.view(tape, fused, (b, t, kv, n // kv + 2, d))
        query = ops.part(tape, rows, (b, t, kv, n // kv, d))
        key, value = (ops.index(tape, rows, (b, t, kv, 1, d)) for _ in range(2))
        key, value = (ops.expand(tape, each, query.shape) for each in (key, value))
        q, k, v = (_copied(tape, each, (b, n, t, d)) for each in (query, key, value))
        del key
        del value
        return q, k, v
    if kv == n:
        q, k, v = (_selected(tape, fused, (b, n, t, d)) for _ in range(3))
        return q, k, v
    rows = ops.view(tape, fused, (b, t, n + 2, d))
    q = ops.part(tape, rows, (b, n, t, d))
    q.merged = True
    k, v = (ops.index(tape, rows, (b, 1, t, d)) for _ in range(2))
    return q, k, v


def gptj(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> _Attended:
    """The model's sines and cosines turn part of each head; eager scores are made of q and k in float32."""
    a = layer.attention
    kind = blocks.layer_type(a)
    query, key, v = _gptj_heads(tape, x, layer, held, s)
    q, k, parts = _gptj_turned(tape, query, key, shared.tables[kind][0])
    del key, query
    if shared.cache is not None:
        k, v = shared.cache.update(tape, k, v)
    weights: Tensor | None
    if s.kernel == "eager":
        weights = ops.scale(tape, _wide_scores(tape, q, k), "scores, scaled")
        weights = ops.add(tape, weights, shared.masks[kind], "scores, masked")
        weights = ops.to(tape, ops.wide_softmax(tape, weights), v.dtype, "probabilities, cast")
        weights = ops.dropout(tape, weights, a.dropout)
        out = ops.merge_heads(tape, ops.matmul(tape, weights, v, q.shape, "attention output"))
    else:
        out, weights = kernels.attend(tape, q, k, v, a, s, shared.masks.get(kind))
    tape.scope = a.o
    out = ops.dropout(tape, blocks.project(tape, out, held.projections[a.o], s), a.output_dropout)
    del q, k, v, parts
    return out, weights


def gptj_by_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> _Attended:
    """Until transformers 5.23 each layer looks its sines and cosines up in a table of its own."""
    a = layer.attention
    t, rotated = s.seq, a.rotary_dim
    query, key, value = _gptj_heads(tape, x, layer, held, s)
    rows = s.batch if s.mode == "generation" else 1
    table = tape.new((rows, a.positions, rotated), "fp32", "sines and cosines of every position")
    positions = tape.new((rows, t, rotated), "int64", "positions, repeated")
    angles = tape.new((rows, t, rotated), "fp32", "sines and cosines")
    angles = ops.to(tape, angles, key.dtype, "sines and cosines, cast")
    q, k, parts = _gptj_turned(tape, query, key, angles)
    del key, query
    if shared.cache is not None:
        k, value = shared.cache.update(tape, k, value)
    weights: Tensor | None
    if s.kernel == "eager":
        out, weights = _gptj_scores(tape, q, k, value, layer, shared.masks[blocks.layer_type(a)])
        out = ops.merge_heads(tape, out)
    else:
        out, weights = kernels.attend(tape, q, k, value, a, s, None)
    tape.scope = a.o
    out = ops.dropout(tape, blocks.project(tape, out, held.projections[a.o], s), a.output_dropout)
    del q, k, value, table, positions, angles, parts
    return out, weights


def _gptj_heads(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B, T, N, D], v [B, N, T, D]."""
    a = layer.attention
    b, n, t, d = s.batch, a.num_heads, s.seq, a.head_dim
    query, key = (ops.view(tape, _project(tape, x, name, held, s), (b, t, n, d)) for name in (a.q, a.k))
    value = ops.heads(tape, _project(tape, x, a.v, held, s), (b, n, t, d))
    tape.scope = "self_attn"
    return query, key, value


def _gptj_turned(tape: Tape, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q and k [B, N, T, D] with the first dimensions of each head turned, and the locals that hold the parts."""
    rotated = table.shape[-1]
    k_rot, k_pass = rotary.cut(tape, key, rotated)
    q_rot, q_pass = rotary.cut(tape, query, rotated)
    k_rot = _turned(tape, k_rot, table)
    q_rot = _turned(tape, q_rot, table)
    k = _permuted(tape, ops.cat(tape, (k_rot, k_pass), key.shape, "rotated k", mixed=True))
    q = _permuted(tape, ops.cat(tape, (q_rot, q_pass), query.shape, "rotated q", mixed=True))
    return q, k, [q_pass, q_rot, k_pass, k_rot]  # a list lets go of its last element first


def _wide_scores(tape: Tape, q: Tensor, k: Tensor) -> Tensor:
    """`torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(2, 3))`."""
    q, k = ops.to(tape, q, "fp32", "q, float32"), ops.to(tape, k, "fp32", "k, float32")
    return ops.matmul(tape, q, k, (*q.shape[:3], k.shape[2]), "scores")


def _gptj_scores(tape: Tape, q: Tensor, k: Tensor, v: Tensor, layer: Layer, mask: Tensor) -> tuple[Tensor, Tensor]:
    """GPTJAttention._attn."""
    b, n, t, _ = q.shape
    q = ops.to(tape, q, "fp32", "q, float32")
    k = ops.to(tape, k, "fp32", "k, float32")
    weights = ops.scale(tape, ops.matmul(tape, q, k, (b, n, t, k.shape[2]), "scores"), "scores, scaled")
    weights = ops.add(tape, weights, mask, "scores, masked")
    weights = ops.wide_softmax(tape, weights)
    weights = ops.to(tape, weights, v.dtype, "probabilities, cast")
    weights = ops.dropout(tape, weights, layer.attention.dropout)
    out = ops.matmul(tape, weights, v, q.shape, "attention output")
    del q
    del k
    return out, weights


def _turned(tape: Tape, x: Tensor, table: Tensor) -> Tensor:
    """`tensor * cos + rotate_every_two(tensor) * sin`, with both repeated for pairs."""
    shape = (table.shape[0], x.shape[1], 1, x.shape[3])
    sin, cos = (tape.new(shape, table.dtype, "rotary table, repeated") for _ in range(2))
    turned = ops.mul(tape, x, cos, "rotary: x cos")
    turned = ops.add(tape, turned, ops.mul(tape, rotary.rotate_half(tape, x), sin, "rotary: x sin"), "rotated")
    return turned  # noqa: RET504 - the name lets go of what it held before


def mpt(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> _Attended:
    """Alibi is float32 and so the scores are; the mask is filled into a copy of them."""
    a = layer.attention
    b, n, t, d = s.batch, a.num_heads, s.seq, a.head_dim
    fused = _project(tape, x, a.qkv, held, s)
    tape.scope = "self_attn"
    cut = ops.split(tape, fused, [(b, t, n * d)] * 3)
    q, k, v = (ops.heads(tape, each, (b, n, t, d), transposed=i == 1) for i, each in enumerate(cut))
    del cut
    if shared.cache is not None:
        k, v = shared.cache.update(tape, k, v)
    of = k.shape[2]
    scores = ops.scale(tape, ops.matmul(tape, q, k, (b, n, t, of), "scores"), "scores, scaled")
    alibi = Tensor(shared.masks["alibi"].storage, (1, n, 1, of), "fp32")  # the last of its positions
    scores = ops.add(tape, scores, alibi, "scores with alibi")
    scores = ops.masked_fill(tape, scores, shared.masks[blocks.layer_type(a)])
    weights = ops.wide_softmax(tape, scores)
    weights = ops.to(tape, weights, v.dtype, "probabilities, cast")
    weights = ops.dropout(tape, weights, a.dropout)
    context = ops.merge_heads(tape, ops.matmul(tape, weights, v, (b, n, t, d), "attention output"))
    tape.scope = a.o
    out = blocks.project(tape, context, held.projections[a.o], s)
    del fused, q, k, v
    del scores
    del context
    return out, weights


# --- shapes -------------------------------------------------------------------------------------------------------


def _project(tape: Tape, x: Tensor, name: str | None, held: Held, s: Settings) -> Tensor:
    assert name is not None
    tape.scope = name
    return blocks.project(tape, x, held.projections[name], s)


def _selected(tape: Tape, fused: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`fused.view(B, T, N, 3, D)[..., i, :].transpose(1, 2)`: a view; its gradient is put into zeros of the whole."""
    out = ops.part(tape, fused, shape)
    out.merged = True
    return out


def _flat(tape: Tape, x: Tensor) -> Tensor:
    """`x.reshape(B * N, T, D)`: a copy where a batch has several rows."""
    return x if x.shape[0] == 1 else ops.contiguous(tape, x)


def _copied(tape: Tape, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x.flatten(2, 3)` of [B, T, K, G, D], then its heads in front: a copy; the gradient is a view."""
    whole = x.shape
    out = ops.done(tape.new(shape, x.dtype, "heads, side by side"), tape.node((x,), lambda g, _: _as(g, whole)))
    out.merged = True
    return out


def _permuted(tape: Tape, x: Tensor) -> Tensor:
    """`x.permute(0, 2, 1, 3)` of [B, T, N, D]: a view, and so is the gradient."""
    whole = x.shape
    b, t, n, d = whole
    out = Tensor(x.storage, (b, n, t, d), x.dtype, tape.node((x,), lambda g, _: _as(g, whole)))
    out.merged = True
    return out


def _as(grads: ops.Grads, shape: tuple[int, ...]) -> ops.Grads:
    grad = grads[0]
    return [None if grad is None else Tensor(grad.storage, shape, grad.dtype).aliased()]
