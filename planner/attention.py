"""Attention kernels: which one runs, what it takes, saves and needs for a moment.

`scaled_dot_product_attention` tries kernels in PyTorch's order (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)
and takes the first whose conditions hold. Sizes of the flash and the memory-efficient kernel follow
flash_attn/flash_api.cpp and attention_backward.cu beside it, and were compared with both on an H200 (torch 2.11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vramplan.planner import ops
from vramplan.planner.paper import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.blocks import Settings
    from vramplan.planner.layers import Attention
    from vramplan.planner.paper import Tape

Kernel = Literal["cudnn", "flash", "efficient", "math", "eager", "flash_attention_2"]


_ORDER: tuple[Kernel, ...] = ("cudnn", "flash", "efficient", "math")
# From which torch on a kernel's conditions are these (sdp_utils.cpp)
SIXTEENTHS = (2, 12)  # cuDNN's dropout probabilities are sixteenths (pytorch#174245)
GROUPED_EFFICIENT = (2, 15)  # the memory-efficient kernel takes fewer heads of k and v (pytorch#191085)
WHOLE_256 = (2, 15)  # cuDNN's backward takes heads of 256, but nothing else above 128 (check_cudnn_d256_bprop_head_dim)

# Less shared memory for a block of threads: 99 KiB (CUDA C++ Programming Guide, technical specifications)
_CRAMPED = frozenset({(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)})


def choose(
    capability: tuple[int, int] | None, q: Tensor, k: Tensor, v: Tensor, *, masked: bool, grouped: bool,
    first: Kernel = "cudnn", dropout: float = 0.0, torch: tuple[int, int] = (2, 11), grad: bool = True,
) -> Kernel:  # fmt: skip
    """The kernel that a GPU's compute capability runs for q [B, N, T, D] and k, v [B, K, T, D] of one dtype.

    `first` is the first that is tried: those before it in PyTorch's order are off there. `grouped` is enable_gqa:
    without it, k and v with fewer heads than q are broadcast, which only "math" does. `capability` None is an AMD
    card: there is no cuDNN. `grad`: a backward is to follow.
    """
    d, value_d = q.shape[-1], v.shape[-1]
    half = q.dtype in ("bf16", "fp16")
    fewer = k.shape[1] != q.shape[1]
    if fewer and not (grouped or (torch >= GROUPED_EFFICIENT and k.shape[1] == 1)):
        return "math"
    tried = _ORDER[_ORDER.index(first) :]
    rounded = torch >= SIXTEENTHS and dropout * 16 != int(dropout * 16)
    if "cudnn" in tried and half and not rounded and _cudnn_takes(capability, d, value_d, torch, grad):
        return "cudnn"
    capability = capability or (8, 0)
    # flash's backward of large heads does not fit into the shared memory of some cards
    fits = not grad or capability not in _CRAMPED or d <= 192 or (d > 224 and not dropout)
    if "flash" in tried and half and capability >= (8, 0) and not masked and d == value_d <= 256 and fits:
        return "flash"
    aligned = _alignment(capability, half)
    supported = q.dtype != "bf16" or capability >= (8, 0)
    alike = not fewer or torch >= GROUPED_EFFICIENT
    if "efficient" in tried and supported and alike and not d % aligned and not value_d % aligned:
        return "efficient"
    return "math"


def _cudnn_takes(capability: tuple[int, int] | None, d: int, value_d: int, torch: tuple[int, int], grad: bool) -> bool:
    """check_prefer_cudnn_attention and check_cudnn_tensor_shapes."""
    if capability is None or capability[0] not in (9, 10) or capability[1] not in (0, 3) or d % 8 or value_d % 8:
        return False
    if max(d, value_d) <= 128 or (d, value_d) == (192, 128):
        return True
    if torch >= WHOLE_256:
        return (d, value_d) == (256, 256) if grad else max(d, value_d) <= 256
    return capability == (9, 0) and max(d, value_d) <= 256


def _alignment(capability: tuple[int, int], half: bool) -> int:
    """Of how many elements a head must be a multiple (minimum_gemm_alignment)."""
    if capability >= (7, 0) and half:
        return 8
    return 4 if capability >= (8, 0) else 1


def planned(a: Attention, s: Settings, *, masked: bool, grouped: bool = True) -> Kernel:
    """The kernel that a layer's attention is played with; `masked`: a mask is handed over, and heads are repeated."""
    if s.kernel in ("eager", "flash_attention_2"):
        return s.kernel
    dtype = s.autocast or s.weights_dtype
    grad = s.mode == "training"
    every = (masked and grouped) or a.interleaved or a.mla is not None  # each head has a key and a value of its own
    kv = a.num_heads if every else a.num_key_value_heads
    shapes = ((a.num_heads, a.head_dim), (kv, a.head_dim), (kv, a.value_head_dim))
    q, k, v = (Tensor(None, (s.batch, n, s.seq, d), dtype) for n, d in shapes)
    return choose(
        s.capability, q, k, v, masked=masked, grouped=grouped, first=s.kernel, dropout=a.dropout if grad else 0.0,
        torch=s.torch, grad=grad,
    )  # fmt: skip


def attend(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, s: Settings, mask: Tensor | None,
    *, family: str = "",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of q [B, N, T, D] over k, v [B, K, T, D], as [B, T, N * D]; and the weights, where they exist."""
    if s.kernel == "eager":
        return eager(tape, q, k, v, a, mask, narrow=family == "gpt2")
    if s.kernel == "flash_attention_2":
        q, k, v = (ops.lower(tape, x) for x in (q, k, v))
        out = varlen(tape, q, k, v) if s.masked else flash(tape, q, k, v)
        return ops.merge_heads(tape, out, "attention output, heads merged"), None
    groups = a.num_heads // a.num_key_value_heads
    if mask is not None:  # use_gqa_in_sdpa: with a mask the heads are repeated instead of enable_gqa
        k = ops.repeat_kv(tape, k, groups)
        v = ops.repeat_kv(tape, v, groups)
    out = scaled_dot_product_attention(tape, q, k, v, s, mask, dropout=a.dropout if tape.grad else 0.0)
    return ops.merge_heads(tape, out, "attention output, heads merged"), None


def scaled_dot_product_attention(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, s: Settings, mask: Tensor | None, *, grouped: bool = True,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The op of that name; autocast casts its arguments, the last first, and is off inside."""
    if mask is not None and mask.dtype != "bool":  # falcon's with alibi (aten/src/ATen/autocast_mode.cpp, cached_cast)
        mask = ops.lower(tape, mask)
    v = ops.lower(tape, v)
    k = ops.lower(tape, k)
    q = ops.lower(tape, q)
    autocast, tape.autocast = tape.autocast, None
    try:
        return _chosen(tape, q, k, v, s, mask, grouped, dropout)
    finally:
        tape.autocast = autocast


def _chosen(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, s: Settings, mask: Tensor | None, grouped: bool, dropout: float
) -> Tensor:
    bias = None
    if mask is not None:  # convert_boolean_attn_mask
        bias = tape.new(mask.shape, q.dtype, "mask as a bias") if mask.dtype == "bool" else mask
    kernel = choose(
        s.capability, q, k, v, masked=mask is not None, grouped=grouped, first=s.kernel, dropout=dropout, torch=s.torch,
        grad=tape.grad,
    )  # fmt: skip
    if kernel == "cudnn":
        return cudnn(tape, q, k, v, bias)
    if kernel == "flash":
        size = q.shape[-1]
        if not size % 8:
            return flash(tape, q, k, v)
        q, k, v = (_padded(tape, x) for x in (q, k, v))
        return ops.part(tape, flash(tape, q, k, v), (*q.shape[:-1], size))
    if kernel == "efficient":
        return efficient(tape, q, k, v, bias, s.capability or (8, 0))
    out, weights = math(tape, q, k, v, bias, grouped, dropout)
    del weights
    return out


def _padded(tape: Tape, x: Tensor) -> Tensor:
    """`pad_last_dim`: heads of a multiple of 8, by a copy; so is the gradient."""
    shape, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(shape, dtype, "gradient, not padded")])
    return ops.done(tape.new((*shape[:-1], 8 * -(-shape[-1] // 8)), dtype, "heads, padded"), node)


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
        b * n * -(-t // 64), -(-k.shape[2] // (256 if d <= 64 else 128 if d <= 128 else 64)),
        tape.multiprocessors.number,
    )  # fmt: skip
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


def varlen(tape: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn on rows of which the padding is cut out, as if there were none: its share is what a batch holds.

    Rows of q, k and v are copied out, the output is put back into zeros (transformers,
    modeling_flash_attention_utils.py, _upad_input and _pad_input; flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd).
    """
    b, n, t, d = q.shape
    dtype, tokens, groups = q.dtype, b * t, n // k.shape[1]
    ids = tape.new((tokens,), "int64", "positions that are not padding")
    rows = {}
    for name, x in (("k", k), ("v", v), ("q", q)):
        flat = ops.view(tape, x, (tokens, x.shape[1], d)) if x.one_row else ops.contiguous(tape, x)
        rows[name] = ops.gather(tape, ops.view(tape, flat, (tokens, x.shape[1], d)), (tokens, x.shape[1], d), ids)
        del flat
    width, padded = 256 if d > 192 else 32 * -(-d // 32), tokens + 128 * b
    facts = [(rows[name].shape, dtype, f"gradient of {name}") for name in "qkv"]

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads: ops.Grads = [tape.new(*each) for each in facts]
        sums = tape.new((n, padded), "fp32", "sums of gradient times output")
        total = tape.new((padded, n, width), "fp32", "gradient of q, float32")
        if groups > 1:
            every_k = tape.new((tokens, n, d), dtype, "gradient of k for every head")
            tape.moment(ops.bytes_of((tokens, n, d), dtype), "gradient of v for every head")
            del every_k
        del total, sums
        return grads

    out = tape.new((tokens, n, d), dtype, "attention output, without padding")
    sums = tape.new((n, tokens), "fp32", "log-sum-exp")
    node = tape.node((rows["q"], rows["k"], rows["v"]), backward, (rows["q"], rows["k"], rows["v"], out, sums))
    del sums
    rows.clear()
    ops.done(out, node)

    def cut(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        return [tape.new((tokens, n, d), dtype, "gradient without padding")]

    whole = ops.done(tape.new((b, n, t, d), dtype, "attention output"), tape.node((out,), cut, (ids,)))
    whole.merged = True
    return whole


def efficient(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, capability: tuple[int, int] = (9, 0)
) -> Tensor:
    """The memory-efficient kernel: saves q, k, v, the output, the bias and the row sums in float32.

    In float32 the sums of gradient times output are made by three ops. With fewer heads of k and v, their gradients
    are made for every head first (torch 2.15, from the change's own words; never run here).
    """
    b, n, t, d = q.shape
    value_d, dtype = v.shape[-1], q.dtype
    size = max(d, value_d)
    work, in_registers = workspace(b, n, t, d, value_d, dtype, capability)
    kernel_sums = dtype != "fp32" and (in_registers or capability[0] != 7 or capability >= (7, 5))
    fewer = k.shape[1] != n
    facts = [(x.shape, dtype, f"gradient of {name}", True) for name, x in (("q", q), ("k", k), ("v", v))]
    out_shape = (b, n, t, value_d)

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grads: ops.Grads = [tape.new(*each) for each in facts]
        every = [tape.new((b, n, *each[0][2:]), dtype, f"{each[2]} for every head") for each in facts[1:] if fewer]
        if kernel_sums:
            delta = tape.new((b, n, t), "fp32", "sums of gradient times output")
        else:
            product = tape.new(out_shape, "fp32", "gradient times output")
            reduced = tape.new((b, t, n), "fp32", "sums of gradient times output")
            delta = tape.new((b, n, t), "fp32", "sums of gradient times output")
            del reduced, product
        held = tape.new((work,), "uint8", "attention backward workspace") if work else None
        del delta
        del held
        del every
        return grads

    keys = k.shape[2]
    if bias is not None and keys % 8:  # pad_bias
        bias = tape.new((*bias.shape[:-1], 8 * -(-keys // 8)), dtype, "bias, padded")
    out = tape.new(out_shape, dtype, "attention output", True)
    sums = tape.new((b, n, 32 * -(-t // 32)), "fp32", "log-sum-exp") if _any_needs_grad(tape, q, k, v) else None
    if size > 128 and dtype != "fp32":
        tape.moment(4 * out.numel, "output, float32")
    node = tape.node((q, k, v), backward, (bias, k, q, v, sums, out))
    del sums
    return ops.done(out, node)


def workspace(
    b: int, n: int, t: int, d: int, value_d: int, dtype: str, capability: tuple[int, int]
) -> tuple[int, bool]:
    """Bytes of the memory-efficient backward's workspace, and whether dk and dv stay in registers.

    A thread block makes `rows` rows against `keys` keys and was compiled for heads up to `most`; which is taken is told
    by mem_eff_attention/kernels/generate_kernels.py and by shared memory, sizes by kernel_backward.h
    (workspace_elements_gq and _gk, GradQTempStorage). Compared with an H200 alone.
    """
    half, size, modern = dtype != "fp32", max(d, value_d), capability >= (8, 0)
    cramped = capability in _CRAMPED
    if size <= 64:
        rows, keys, most = 64, 64, 32 if size <= 32 else 64
    elif half and size <= 96 and capability in ((8, 6), (8, 9)):
        rows, keys, most = 128, 64, 96
    elif size <= 128:
        large = not cramped and (modern or (half and capability >= (7, 0)))
        rows, keys, most = 128 if large else 64, 128 if half and modern and large else 64, 128
    else:
        rows, keys, most = 128 if modern or (half and capability >= (7, 0)) else 64, 64, 2**16
    in_registers = half and most <= rows
    width = most if in_registers else keys
    splits = capability >= (7, 0)  # over keys, which needs a sum for dq
    elements = 0
    if half or splits:
        elements = -(-t // rows) * -(-d // width) * (rows * width + 4)
    if half and not in_registers:
        parts = max(1, min(-(-t // keys), 200 // (b * n))) if splits else 1
        if b * n >= 256 and t <= 2 * keys:
            parts = 1
        elements += sum(parts * keys * rows * -(-each // rows) for each in (d, value_d))
    return 4 * b * n * 4 * -(-elements // 4), in_registers


def eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, *, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """eager_attention_forward: scores, softmax in float32, probabilities, all materialised and returned.

    `narrow`: only autocast makes the softmax float32 (models/gpt2/modeling_gpt2.py, eager_attention_forward).
    """
    groups = a.num_heads // a.num_key_value_heads
    keys = ops.repeat_kv(tape, k, groups)
    values = ops.repeat_kv(tape, v, groups)
    b, n, t, _ = q.shape
    of = keys.shape[2]
    weights = ops.scale(tape, ops.matmul(tape, q, keys, (b, n, t, of), "scores"), "scores, scaled")
    if a.logit_softcapping is not None:
        weights = ops.scale(tape, weights, "scores, divided by the cap")
        weights = ops.unary(tape, weights, "tanh", saves="result")
        weights = ops.scale(tape, weights, "scores, capped")
    if mask is not None:
        weights = ops.add(tape, weights, mask, "scores, masked")
    if a.sinks:  # gpt_oss: one more column, less the greatest of each row, softmax, the column dropped again
        combined = ops.cat(tape, (weights,), (b, n, t, of + 1), "scores and sinks")
        combined = ops.sub(tape, combined, greatest(tape, combined), "scores, less the greatest")
        probabilities = ops.softmax(tape, combined)
        weights = ops.part(tape, probabilities, weights.shape)
        out = ops.matmul(tape, weights, values, (b, n, t, v.shape[-1]), "attention output")
        out = ops.merge_heads(tape, out, "attention output, heads merged")
        return out, weights
    softmax = ops.softmax if narrow and not tape.autocast else ops.wide_softmax
    weights = ops.to(tape, softmax(tape, weights), q.dtype, "probabilities, cast")
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


def math(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grouped: bool, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The composite kernel, _scaled_dot_product_attention_math: the output and the probabilities.

    Half precision is computed in float32; a causal mask is made as a bias; q and k are both scaled.
    """
    given = q.dtype
    q_acc = ops.to(tape, q, "fp32", "q, float32")
    k_acc = ops.to(tape, k, "fp32", "k, float32")
    v_acc = ops.to(tape, v, "fp32", "v, float32")
    scaled = ops.scale(tape, q_acc, "q, scaled")
    b, n, t, _ = q.shape
    of = k.shape[2]
    if bias is None and t == of:  # is_causal, which a single new token needs not
        ones = tape.new((t, t), "bool", "causal mask")
        lower = tape.new((t, t), "bool", "causal mask")
        del ones
        bias = tape.new((t, t), "fp32", "causal mask as a bias")
        del lower
    groups = n // k.shape[1]
    keys, values = k_acc, v_acc
    if grouped:
        keys = ops.repeat_kv(tape, k_acc, groups, interleave=True)
        values = ops.repeat_kv(tape, v_acc, groups, interleave=True)
    scaled_keys = ops.scale(tape, keys, "k, scaled")
    scores = ops.matmul(tape, scaled, scaled_keys, (b, n, t, of), "scores")
    del scaled_keys
    probabilities = ops.dropout(tape, safe_softmax(tape, scores), dropout)
    del scores
    weights = ops.to(tape, probabilities.detach(), given, "probabilities, cast")
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
