"""Rotary embeddings as each family writes them (transformers/models/*/modeling_*.py, apply_rotary_pos_emb)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner import ops

if TYPE_CHECKING:
    from vramplan.planner.layers import Attention
    from vramplan.planner.paper import Tape, Tensor

# Families that rotate inside the attention's forward, whose locals keep the parts until it returns.
_IN_FORWARD = frozenset({"phi", "stablelm"})


def rotate(
    tape: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, a: Attention, family: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """q and k rotated by tables [1, T, .], and what the attention's forward keeps of it in locals until it returns."""
    if family in _IN_FORWARD and a.rotary_dim < a.head_dim:
        parts = [*cut(tape, q, a.rotary_dim), *cut(tape, k, a.rotary_dim)]
        parts[0], parts[2] = (_whole(tape, parts[i], cos, sin, family) for i in (0, 2))
        q, k = ops.cat(tape, parts[:2], q.shape, "rotated q"), ops.cat(tape, parts[2:], k.shape, "rotated k")
        parts.reverse()  # a list lets go of its last element first
        return q, k, parts
    if a.rope in ("glm", "ernie4_5"):  # halves of the tables, each value twice
        cos, sin = (tape.new(x.shape, x.dtype, "rotary table, repeated") for x in (cos, sin))
    if a.rope in ("gpt_neox", "glm"):
        return *_partial(tape, q, k, cos, sin, a, family), []
    if a.rope == "gpt_oss":
        return _halves(tape, q, cos, sin), _halves(tape, k, cos, sin), []
    dtypes = q.dtype, k.dtype
    if a.rope == "cohere":
        q, k = ops.to(tape, q, "fp32", "q, float32"), ops.to(tape, k, "fp32", "k, float32")
    q_embed = _whole(tape, q, cos, sin, a.rope)
    k_embed = _whole(tape, k, cos, sin, a.rope)
    if a.rope not in ("olmo", "cohere", "ernie4_5"):
        return q_embed, k_embed, []
    return ops.to(tape, q_embed, dtypes[0], "q, cast back"), ops.to(tape, k_embed, dtypes[1], "k, cast back"), []


def rotate_latent(tape: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, a: Attention) -> tuple[Tensor, Tensor]:
    """The rotated parts of DeepSeek's queries and keys: v2's as complex numbers, v3's pair by pair."""
    if a.rope == "deepseek_v2":
        q_wide = ops.to(tape, q, "fp32", "float32 copy")
        k_wide = ops.to(tape, k, "fp32", "float32 copy")
        turned = _complex(tape, q_wide, q.dtype), _complex(tape, k_wide, k.dtype)
        del q_wide, k_wide
        return turned
    pairs = [ops.part(tape, x, (*x.shape[:-1], x.shape[-1] // 2)) for x in (q, q, k, k)]
    return _turned(tape, pairs[0], pairs[1], cos, sin), _turned(tape, pairs[2], pairs[3], cos, sin)


def _turned(tape: Tape, x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`cat([x1 cos - x2 sin, x2 cos + x1 sin])` with tables of half a head."""
    table = (1, 1, *x1.shape[2:])
    cos, sin = cos.view(*table), sin.view(*table)
    turned = [
        ops.sub(tape, ops.mul(tape, x1, cos), ops.mul(tape, x2, sin), "rotary: first half"),
        ops.add(tape, ops.mul(tape, x2, cos), ops.mul(tape, x1, sin), "rotary: second half"),
    ]
    return ops.cat(tape, turned, (*x1.shape[:-1], 2 * x1.shape[-1]), "rotated")


def _whole(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """`x * cos + rotate_half(x) * sin`."""
    table = (1, 1, x.shape[2], x.shape[3])
    wide = "fp32" if rope == "ernie4_5" else x.dtype
    swap = _rotate_pairs if rope in ("glm", "cohere", "ernie4_5") else rotate_half
    return ops.add(
        tape,
        ops.mul(tape, ops.to(tape, x, wide, "float32 copy"), cos.view(*table), "rotary: x cos"),
        ops.mul(tape, ops.to(tape, swap(tape, x), wide, "float32 copy"), sin.view(*table), "rotary: x sin"),
        "rotated",
    )


def rotate_half(tape: Tape, x: Tensor) -> Tensor:
    """`cat((-x2, x1), -1)` with x1, x2 the two halves (slices)."""
    half = (*x.shape[:-1], x.shape[-1] // 2)
    x1 = ops.part(tape, x, half)
    x2 = ops.part(tape, x, half)
    return ops.cat(tape, (ops.scale(tape, x2, "half, negated"), x1), x.shape, "halves swapped")


# `stack((-x2, x1), -1).flatten(-2)` with x1, x2 every second element: the same in memory
_rotate_pairs = rotate_half


def cut(tape: Tape, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`x[..., :dim], x[..., dim:]`."""
    return ops.part(tape, x, (*x.shape[:-1], dim)), ops.part(tape, x, (*x.shape[:-1], x.shape[-1] - dim))


def _partial(
    tape: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, a: Attention, family: str
) -> tuple[Tensor, Tensor]:
    """The first `rotary_dim` of each head rotated, the rest passed by (slices and a concatenation)."""
    (q_rot, q_pass), (k_rot, k_pass) = cut(tape, q, a.rotary_dim), cut(tape, k, a.rotary_dim)
    if family == "nemotron":  # both in the return statement
        q_turned, k_turned = _whole(tape, q_rot, cos, sin, a.rope), _whole(tape, k_rot, cos, sin, a.rope)
        return ops.cat(tape, (q_turned, q_pass), q.shape), ops.cat(tape, (k_turned, k_pass), k.shape)
    if family == "phi3":
        q_embed = ops.cat(tape, (_whole(tape, q_rot, cos, sin, a.rope), q_pass), q.shape, "rotated and the rest")
        k_embed = ops.cat(tape, (_whole(tape, k_rot, cos, sin, a.rope), k_pass), k.shape, "rotated and the rest")
        return q_embed, k_embed
    q_embed, k_embed = _whole(tape, q_rot, cos, sin, a.rope), _whole(tape, k_rot, cos, sin, a.rope)
    q_embed = ops.cat(tape, (q_embed, q_pass), q.shape, "rotated and the rest")
    return q_embed, ops.cat(tape, (k_embed, k_pass), k.shape, "rotated and the rest")


def _halves(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """gpt_oss: `cat((x1 cos - x2 sin, x2 cos + x1 sin))` with x1, x2 by chunk and tables of half a head."""
    half = (*x.shape[:-1], x.shape[-1] // 2)
    table = (1, 1, *half[2:])
    x1, x2 = ops.split(tape, x, [half, half])
    cos, sin = cos.view(*table), sin.view(*table)
    first = ops.sub(tape, ops.mul(tape, x1, cos), ops.mul(tape, x2, sin), "rotary: first half")
    second = ops.add(tape, ops.mul(tape, x2, cos), ops.mul(tape, x1, sin), "rotary: second half")
    return ops.cat(tape, (first, second), x.shape, "rotated")


def _complex(tape: Tape, wide: Tensor, dtype: str) -> Tensor:
    """deepseek_v2: `view_as_real(view_as_complex(x.float()) * freqs).flatten(3).type_as(x)`."""
    return ops.to(tape, ops.scale(tape, wide, "rotated, float32"), dtype, "rotated")
