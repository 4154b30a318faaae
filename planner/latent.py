"""DeepSeek's multi-head latent attention: queries and keys in two parts, keys and values from a compressed latent.

Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py (DeepseekV3Attention.forward, expand_kv), deepseek_v2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner import blocks, ops
from vramplan.planner import rotary as rope

if TYPE_CHECKING:
    from vramplan.planner.blocks import Held, Settings, Shared
    from vramplan.planner.layers import Layer
    from vramplan.planner.paper import Tape, Tensor


def queries_keys_values(
    tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k [B, N, T, D] and v [B, N, T, value D]; and the locals of the forward, in the order in which they go."""
    a = layer.attention
    mla = a.mla
    assert mla is not None
    b, t, n = s.batch, s.seq, a.num_heads
    nope, rot = mla.qk_nope_head_dim, mla.qk_rope_head_dim
    states = ops.heads(tape, _queries(tape, x, layer, held, s), (b, n, t, a.head_dim))
    q_pass, q_rot = ops.split(tape, states, [(b, n, t, nope), (b, n, t, rot)])
    tape.scope = mla.kv_a
    compressed = blocks.project(tape, x, held.projections[mla.kv_a], s)
    kv, k_rot = ops.split(tape, compressed, [(b, t, mla.kv_lora_rank), (b, t, rot)])
    tape.scope = mla.kv_a_norm
    kv = blocks.norm(tape, kv, held.norms[mla.kv_a_norm])
    k_rot = ops.view(tape, k_rot, (b, 1, t, rot))
    tables = shared.tables[blocks.layer_type(a)]
    tape.scope = "self_attn"
    q_rot, k_rot = rope.rotate_latent(tape, q_rot, k_rot, *tables, a)
    of = t
    if shared.cache is not None:  # what is cached is the compressed latent, as one head
        kv, k_rot = shared.cache.update(tape, kv.view(b, 1, t, mla.kv_lora_rank), k_rot)
        of = kv.shape[2]
        kv = kv.view(b, of, mla.kv_lora_rank)
    q = ops.cat(tape, (q_pass, q_rot), (b, n, t, a.head_dim), "q")
    tape.scope = mla.kv_b
    both = ops.heads(tape, blocks.project(tape, kv, held.projections[mla.kv_b], s), (b, n, of, nope + a.value_head_dim))
    k_pass, v = ops.split(tape, both, [(b, n, of, nope), (b, n, of, a.value_head_dim)])
    spread = ops.repeat_kv(tape, k_rot, n)
    k = ops.empty(tape, (b, n, of, a.head_dim), both.dtype, "k")
    k = ops.copy_into(tape, ops.copy_into(tape, k, k_pass), spread)
    kept = [k_rot, kv, compressed, q_rot, q_pass, states]  # a list lets go of its last element first
    return q, k, v, kept


def _queries(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> Tensor:
    """One projection, or down to the latent, normalised and up again."""
    mla, name = layer.attention.mla, layer.attention.q
    assert mla is not None
    if name is not None:
        tape.scope = name
        return blocks.project(tape, x, held.projections[name], s)
    assert mla.q_a is not None
    assert mla.q_a_norm is not None
    assert mla.q_b is not None
    tape.scope = mla.q_a
    latent = blocks.norm(tape, blocks.project(tape, x, held.projections[mla.q_a], s), held.norms[mla.q_a_norm])
    tape.scope = mla.q_b
    return blocks.project(tape, latent, held.projections[mla.q_b], s)
