"""Attention kernels: what each takes, saves and needs for a moment.

Which kernel `scaled_dot_product_attention` takes is PyTorch's choice (aten/src/ATen/native/transformers/cuda/
sdp_utils.cpp): on compute capability 9.0 and 10.0 cuDNN's comes first, elsewhere flash, then memory-efficient, then
the composite "math"; flash takes no mask, cuDNN and flash take only half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vramplan.planner import ops

if TYPE_CHECKING:
    from vramplan.planner.layers import Attention
    from vramplan.planner.paper import Tape, Tensor

Kernel = Literal["cudnn", "flash", "efficient", "math", "eager", "flash_attention_2"]


def attend(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, kernel: Kernel, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [B, N, T, D] over k, v [B, K, T, D], as [B, T, N * D]; and the weights, where they exist."""
    if kernel == "eager":
        return eager(tape, q, k, v, a, mask)
    return sdpa(tape, q, k, v, a, mask), None


def sdpa(tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None) -> Tensor:
    """transformers' sdpa_attention_forward; under autocast the call casts its arguments, the last first."""
    groups = a.num_heads // a.num_key_value_heads
    if mask is not None:  # use_gqa_in_sdpa: with a mask the heads are repeated instead of enable_gqa
        k = ops.repeat_kv(tape, k, groups)
        v = ops.repeat_kv(tape, v, groups)
    v_low, k_low, q_low = (ops.lower(tape, x) for x in (v, k, q))
    if q_low.dtype == "fp32":
        out = math(tape, q_low, k_low, v_low, mask)
    else:
        out = fused(tape, q_low, k_low, v_low, mask)
    del q_low, k_low, v_low
    return ops.merge_heads(tape, out, "attention output, heads merged")


def fused(tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """cuDNN's kernel: saves q, k, v, the output and the row sums of the softmax in float32.

    The output lies in memory as q does, each gradient as its input (aten/src/ATen/native/cudnn/MHA.cpp,
    alloc_with_matching_layout; attention_backward.cu).
    """
    b, n, t, _ = q.shape
    d = v.shape[-1]
    dtype, grouped = q.dtype, k.shape[1] != n
    shapes = (q.shape, k.shape, v.shape)
    layouts = (q.merged, k.merged, v.merged)
    names = ("gradient of q", "gradient of k", "gradient of v")

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads: ops.Grads = [tape.new(*facts) for facts in zip(shapes, (dtype,) * 3, names, layouts, strict=True)]
        # dq is summed in float32, beside one float32 number a row; under GQA dk and dv are made for every head first
        work = 4 * b * n * t * d + 4 * b * n * t + 256
        if grouped:
            work += 2 * 2 * b * n * t * d
        tape.moment(work, "attention backward workspace")
        return grads

    bias = None
    if mask is not None:
        bias = tape.new(mask.shape, dtype, "mask as a bias")
    seed = tape.new((1,), "int64", "philox seed")
    offset = tape.new((1,), "int64", "philox offset")
    out = tape.new((b, n, t, d), dtype, "attention output", q.merged)
    sums = tape.new((b, n, t, 1), "fp32", "log-sum-exp")
    tape.moment(256, "attention workspace")
    node = tape.node((q, k, v), backward, (bias, k, q, v, sums, out, offset, seed))
    del sums, offset, seed, bias
    return ops.done(out, node)


def eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """eager_attention_forward: scores, softmax in float32, probabilities, all materialised and returned."""
    groups = a.num_heads // a.num_key_value_heads
    keys = ops.repeat_kv(tape, k, groups)
    values = ops.repeat_kv(tape, v, groups)
    b, n, t, _ = q.shape
    weights = ops.scale(tape, ops.matmul(tape, q, keys, (b, n, t, t), "scores"), "scores, scaled")
    if a.logit_softcapping is not None:
        weights = ops.scale(tape, weights, "scores, divided by the cap")
        weights = ops.unary(tape, weights, "tanh", saves="result")
        weights = ops.scale(tape, weights, "scores, capped")
    if mask is not None:
        weights = ops.add(tape, weights, mask, "scores, masked")
    weights = ops.to(
        tape, ops.softmax(tape, ops.to(tape, weights, "fp32", "scores, float32")), q.dtype, "probabilities, cast"
    )
    weights = ops.dropout(tape, weights, a.dropout)
    out = ops.matmul(tape, weights, values, (b, n, t, v.shape[-1]), "attention output")
    out = ops.merge_heads(tape, out, "attention output, heads merged")
    return out, weights


def math(tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The composite kernel (aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math).

    Half precision is computed in float32; a causal mask is made as a bias; q and k are both scaled.
    """
    given = q.dtype
    q = ops.to(tape, q, "fp32", "q, float32")
    k = ops.to(tape, k, "fp32", "k, float32")
    v = ops.to(tape, v, "fp32", "v, float32")
    q = ops.scale(tape, q, "q, scaled")
    b, n, t, _ = q.shape
    if mask is None:
        ones = tape.new((t, t), "bool", "causal mask")
        lower = tape.new((t, t), "bool", "causal mask")
        del ones
        bias = tape.new((t, t), "fp32", "causal mask as a bias")
        del lower
    else:
        bias = tape.new(mask.shape, "fp32", "mask as a bias")
    groups = n // k.shape[1]
    k = ops.repeat_kv(tape, k, groups)
    v = ops.repeat_kv(tape, v, groups)
    weights = safe_softmax(tape, ops.matmul(tape, q, ops.scale(tape, k, "k, scaled"), (b, n, t, t), "scores"))
    out = ops.matmul(tape, weights, v, (b, n, t, v.shape[-1]), "attention output")
    del weights, v, k, bias
    return ops.to(tape, out, given, "attention output, cast back")


def safe_softmax(tape: Tape, scores: Tensor) -> Tensor:
    """`_safe_softmax`: a softmax that looks for rows without any key."""
    out = ops.softmax(tape, scores)
    empty = tape.new(scores.shape, "bool", "scores that are -inf")
    tape.moment(scores.numel // scores.shape[-1], "rows without a key")
    del empty
    return out
