"""Attention kernels: which one runs, what it takes, saves and needs for a moment.

`scaled_dot_product_attention` tries kernels in PyTorch's order (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)
and takes the first whose conditions hold. Sizes of the flash and the memory-efficient kernel follow
flash_attn/flash_api.cpp and attention_backward.cu beside it, and were compared with both on an H200 (torch 2.11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vramplan.planner import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.blocks import Settings
    from vramplan.planner.layers import Attention
    from vramplan.planner.paper import Tape, Tensor

Kernel = Literal["cudnn", "flash", "efficient", "math", "eager", "flash_attention_2"]


def choose(capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, *, masked: bool, grouped: bool) -> Kernel:
    """The kernel that a GPU's compute capability runs for q [B, N, T, D] and k, v [B, K, T, D] of one dtype.

    `grouped` is enable_gqa: without it, k and v with fewer heads than q are broadcast, which only "math" does.
    """
    d, value_d = q.shape[-1], v.shape[-1]
    half = q.dtype in ("bf16", "fp16")
    fewer = k.shape[1] != q.shape[1]
    if fewer and not grouped:
        return "math"
    preferred = capability[0] in (9, 10) and capability[1] in (0, 3)  # check_prefer_cudnn_attention
    if (
        preferred
        and half
        and not d % 8
        and not value_d % 8
        and max(d, value_d) <= (256 if capability == (9, 0) else 128)
    ):
        return "cudnn"
    cramped = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)  # flash's backward of 193 to 224 does not fit
    if half and capability >= (8, 0) and not masked and d == value_d <= 256 and not (cramped and 192 < d <= 224):
        return "flash"
    aligned = 8 if half else 4
    supported = q.dtype != "bf16" or capability >= (8, 0)
    if supported and not fewer and not d % aligned and not value_d % aligned:
        return "efficient"
    return "math"


def attend(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, s: Settings, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [B, N, T, D] over k, v [B, K, T, D], as [B, T, N * D]; and the weights, where they exist."""
    if s.kernel == "eager":
        return eager(tape, q, k, v, a, mask)
    if s.kernel == "flash_attention_2":
        out = flash(tape, ops.lower(tape, q), ops.lower(tape, k), ops.lower(tape, v))
        return ops.merge_heads(tape, out, "attention output, heads merged"), None
    groups = a.num_heads // a.num_key_value_heads
    if mask is not None:  # use_gqa_in_sdpa: with a mask the heads are repeated instead of enable_gqa
        k = ops.repeat_kv(tape, k, groups)
        v = ops.repeat_kv(tape, v, groups)
    out = scaled_dot_product_attention(tape, q, k, v, s, mask)
    return ops.merge_heads(tape, out, "attention output, heads merged"), None


def scaled_dot_product_attention(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, s: Settings, mask: Tensor | None, *, grouped: bool = True
) -> Tensor:
    """The op of that name; autocast casts its arguments, the last first, and is off inside."""
    v = ops.lower(tape, v)
    k = ops.lower(tape, k)
    q = ops.lower(tape, q)
    autocast, tape.autocast = tape.autocast, None
    try:
        return _chosen(tape, q, k, v, s, mask, grouped)
    finally:
        tape.autocast = autocast


def _chosen(tape: Tape, q: Tensor, k: Tensor, v: Tensor, s: Settings, mask: Tensor | None, grouped: bool) -> Tensor:
    bias = None
    if mask is not None:  # convert_boolean_attn_mask
        bias = tape.new(mask.shape, q.dtype, "mask as a bias")
    kernel = choose(s.capability, q, k, v, masked=mask is not None, grouped=grouped)
    if kernel == "cudnn":
        return cudnn(tape, q, k, v, bias)
    if kernel == "flash":
        return flash(tape, q, k, v)
    if kernel == "efficient":
        return efficient(tape, q, k, v, bias)
    out, weights = math(tape, q, k, v, bias, grouped)
    del weights
    return out


def _gradients(tape: Tape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], ops.Grads]:
    """What makes the gradients of q, k and v, each laid out as its input."""
    facts = [
        (x.shape, x.dtype, f"gradient of {name}", x.merged) for name, x in (("q", q), ("k", k), ("v", v))
    ]  # fmt: skip
    return lambda: [tape.new(*each) for each in facts]


def _any_needs_grad(tape: Tape, *inputs: Tensor) -> bool:
    return tape.grad and any(x.node is not None for x in inputs)


def cudnn(tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """cuDNN's kernel: saves q, k, v, the output and the row sums of the softmax in float32.

    The output lies in memory as q does, each gradient as its input (aten/src/ATen/native/cudnn/MHA.cpp,
    alloc_with_matching_layout; attention_backward.cu).
    """
    b, n, t, d = q.shape
    value_d = v.shape[-1]
    grouped = k.shape[1] != n
    gradients = _gradients(tape, q, k, v)

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads = gradients()
        # dq is summed in float32, beside one float32 number a row; under GQA dk and dv are made for every head first
        work = 4 * b * n * t * d + 4 * b * n * t + 256
        if grouped:
            work += 2 * b * n * t * (d + value_d)
        tape.moment(work, "attention backward workspace")
        return grads

    seed = tape.new((1,), "int64", "philox seed")
    offset = tape.new((1,), "int64", "philox offset")
    out = tape.new((b, n, t, value_d), q.dtype, "attention output", q.merged and d == value_d)
    sums = tape.new((b, n, t, 1), "fp32", "log-sum-exp") if _any_needs_grad(tape, q, k, v) else None
    tape.moment(256, "attention workspace")
    node = tape.node((q, k, v), backward, (bias, k, q, v, sums, out, offset, seed))
    del sums, offset, seed
    return ops.done(out, node)


def flash(tape: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash kernel, PyTorch's or the flash-attn package's: saves what cuDNN's does (mha_fwd, mha_bwd)."""
    b, n, t, d = q.shape
    dtype, kv_shape = q.dtype, (b, n, t, d)
    rows, width = 128 * -(-t // 128), 256 if d > 192 else 32 * -(-d // 32)
    grouped, merged = k.shape[1] != n, q.merged
    gradients = _gradients(tape, q, k, v)

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        copied = None if merged else tape.new(kv_shape, dtype, "attention output, contiguous")
        grads = gradients()
        sums = tape.new((b, n, rows), "fp32", "sums of gradient times output")
        total = tape.new((b, rows, n, width), "fp32", "gradient of q, float32")
        if grouped:
            every_k = tape.new(kv_shape, dtype, "gradient of k for every head")
            tape.moment(ops.bytes_of(kv_shape, dtype), "gradient of v for every head")
            del every_k
        del total, sums, copied
        return grads

    out = tape.new((b, n, t, d), dtype, "attention output", merged)
    sums = tape.new((b, n, t), "fp32", "log-sum-exp")
    splits = flash_splits(
        b * n * -(-t // 64), -(-t // (256 if d <= 64 else 128 if d <= 128 else 64)), tape.multiprocessors
    )
    sums_by_split = out_by_split = None
    if splits > 1:
        sums_by_split = tape.new((splits, b, n, t), "fp32", "log-sum-exp by split")
        out_by_split = tape.new((splits, b, n, t, width), "fp32", "output by split")
    rng = tape.new((2,), "int64", "philox state")
    unused = tape.new((1,), "int64", "philox offset")
    del sums_by_split, out_by_split
    node = tape.node((q, k, v), backward, (k, q, v, sums, out, rng, unused))
    del sums, rng, unused
    return ops.done(out, node)


def flash_splits(blocks: int, key_blocks: int, multiprocessors: int) -> int:
    """Over how many parts of the keys the flash kernel splits where too few blocks of rows would fill the GPU.

    flash_api.cpp, num_splits_heuristic: the fewest within 85 % of the best occupancy.
    """
    slots = 2 * multiprocessors
    if blocks >= 0.8 * slots:
        return 1
    most = min(128, slots, key_blocks)
    occupancy = {}
    for splits in range(1, most + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = blocks * splits / slots
            occupancy[splits] = waves / -(-blocks * splits // slots)
    return next(splits for splits, share in occupancy.items() if share >= 0.85 * max(occupancy.values()))


def efficient(tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The memory-efficient kernel: saves q, k, v, the output, the bias and the row sums in float32.

    Backward adds up dq in float32 (beyond 128 elements a head dk and dv too), each head padded to what the kernel was
    compiled for; in float32 the sums of gradient times output are made by three ops.
    """
    b, n, t, d = q.shape
    value_d, dtype = v.shape[-1], q.dtype
    size = next((most for most in (64, 128) if max(d, value_d) <= most), max(d, value_d))
    sums_of = 3 if size > 128 and dtype != "fp32" else 1
    block = 32 if size > 128 else 128 if size > 64 and dtype != "fp32" else 64  # rows that one counter stands for
    work = sums_of * 4 * b * n * 128 * -(-t // 128) * size + 16 * b * n * -(-t // block)
    facts = [(x.shape, dtype, f"gradient of {name}", True) for name, x in (("q", q), ("k", k), ("v", v))]
    out_shape = (b, n, t, value_d)

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads: ops.Grads = [tape.new(*each) for each in facts]
        if dtype == "fp32":
            product = tape.new(out_shape, dtype, "gradient times output")
            reduced = tape.new((b, t, n), "fp32", "sums of gradient times output")
            delta = tape.new((b, n, t), "fp32", "sums of gradient times output")
            del reduced, product
        else:
            delta = tape.new((b, n, t), "fp32", "sums of gradient times output")
        held = tape.new((work,), "uint8", "attention backward workspace")
        del delta
        del held
        return grads

    if bias is not None and t % 8:  # pad_bias
        bias = tape.new((*bias.shape[:-1], 8 * -(-t // 8)), dtype, "bias, padded")
    out = tape.new(out_shape, dtype, "attention output", True)
    sums = tape.new((b, n, 32 * -(-t // 32)), "fp32", "log-sum-exp") if _any_needs_grad(tape, q, k, v) else None
    if size > 128 and dtype != "fp32":
        tape.moment(4 * out.numel, "output, float32")
    node = tape.node((q, k, v), backward, (bias, k, q, v, sums, out))
    del sums
    return ops.done(out, node)


def eager(tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None) -> tuple[Tensor, Tensor]:
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
    if a.sinks:  # gpt_oss: one more column, less the greatest of each row, softmax, the column dropped again
        combined = ops.cat(tape, (weights,), (b, n, t, t + 1), "scores and sinks")
        combined = ops.sub(tape, combined, greatest(tape, combined), "scores, less the greatest")
        probabilities = ops.softmax(tape, combined)
        weights = ops.part(tape, probabilities, weights.shape)
        out = ops.matmul(tape, weights, values, (b, n, t, v.shape[-1]), "attention output")
        out = ops.merge_heads(tape, out, "attention output, heads merged")
        return out, weights
    weights = ops.to(
        tape, ops.softmax(tape, ops.to(tape, weights, "fp32", "scores, float32")), q.dtype, "probabilities, cast"
    )
    weights = ops.dropout(tape, weights, a.dropout)
    out = ops.matmul(tape, weights, values, (b, n, t, v.shape[-1]), "attention output")
    out = ops.merge_heads(tape, out, "attention output, heads merged")
    return out, weights


def greatest(tape: Tape, x: Tensor) -> Tensor:
    """`x.max(-1, keepdim=True).values`: saves int64 indices; the gradient is scattered into zeros."""
    whole, dtype = x.shape, x.dtype
    shape = (*whole[:-1], 1)
    values = tape.new(shape, dtype, "greatest scores")
    ids = tape.new(shape, "int64", "where the greatest are")
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient of the greatest")], (ids,))
    return ops.done(values, node)


def math(tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grouped: bool) -> tuple[Tensor, Tensor]:
    """The composite kernel, _scaled_dot_product_attention_math: the output and the probabilities.

    Half precision is computed in float32; a causal mask is made as a bias; q and k are both scaled.
    """
    given = q.dtype
    q_acc = ops.to(tape, q, "fp32", "q, float32")
    k_acc = ops.to(tape, k, "fp32", "k, float32")
    v_acc = ops.to(tape, v, "fp32", "v, float32")
    scaled = ops.scale(tape, q_acc, "q, scaled")
    b, n, t, _ = q.shape
    if bias is None:
        ones = tape.new((t, t), "bool", "causal mask")
        lower = tape.new((t, t), "bool", "causal mask")
        del ones
        bias = tape.new((t, t), "fp32", "causal mask as a bias")
        del lower
    groups = n // k.shape[1]
    keys, values = k_acc, v_acc
    if grouped:
        keys = ops.repeat_kv(tape, k_acc, groups)
        values = ops.repeat_kv(tape, v_acc, groups)
    scaled_keys = ops.scale(tape, keys, "k, scaled")
    if not grouped:  # matmul broadcasts
        scaled_keys = ops.repeat_kv(tape, scaled_keys, groups)
    scores = ops.matmul(tape, scaled, scaled_keys, (b, n, t, t), "scores")
    del scaled_keys
    probabilities = safe_softmax(tape, scores)
    del scores
    weights = ops.to(tape, probabilities.detach(), given, "probabilities, cast")
    if not grouped:
        values = ops.repeat_kv(tape, v_acc, groups)
    out = ops.matmul(tape, probabilities, values, (b, n, t, v.shape[-1]), "attention output")
    out = ops.to(tape, out, given, "attention output, cast back")
    del probabilities, values, keys, scaled, v_acc, k_acc, q_acc, bias
    return out, weights


def safe_softmax(tape: Tape, scores: Tensor) -> Tensor:
    """`_safe_softmax`: a softmax that looks for rows without any key."""
    out = ops.softmax(tape, scores)
    empty = tape.new(scores.shape, "bool", "scores that are -inf")
    tape.moment(scores.numel // scores.shape[-1], "rows without a key")
    del empty
    return out
