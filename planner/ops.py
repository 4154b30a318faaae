"""The ops of a training step: what each allocates, saves for backward, and needs only for a moment.

Every function here stands for one PyTorch op (or one fixed run of them) and is written in the order in which the
real one allocates and frees, forward and backward; the order inside a backward is that of PyTorch's generated
code, which computes gradients by the alphabet of the op's arguments (torch/csrc/autograd/generated/Functions.cpp).
Each was compared with recorded memory histories (probes/record.py).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from vramplan.planner.paper import ITEMSIZE, Parameter, Tape, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.paper import Node, Shape

Grads = list["Tensor | None"]
FLOATS = {"fp32": 3, "bf16": 2, "fp16": 2}


def promote(a: str, b: str) -> str:
    """The dtype of an op on two tensors (torch.promote_types for the dtypes met in training)."""
    if a == b or b not in FLOATS:
        return a
    if a not in FLOATS:
        return b
    return "fp32"


def done(out: Tensor, node: Node | None, nr: int = 0) -> Tensor:
    """`out` with the node that will give its gradient."""
    out.node, out.nr = node, nr
    return out


def layout(grads: Grads) -> bool:
    """The layout of an elementwise op's gradient: that of the gradient it comes from (TensorIterator.cpp)."""
    return grads[0] is not None and grads[0].merged


# --- dtypes ------------------------------------------------------------------------------------------------------


def to(tape: Tape, x: Tensor, dtype: str, label: str = "cast") -> Tensor:
    """`x.to(dtype)`: itself where it has that dtype, else a copy; the gradient is cast back."""
    if x.dtype == dtype:
        return x
    source, shape = x.dtype, x.shape

    def backward(grads: Grads, _: Grads) -> Grads:
        return [tape.new(shape, source, "cast of a gradient", layout(grads))]

    node = tape.node((x,), backward)
    return done(tape.new(shape, dtype, label, x.merged), node)


def operand(tape: Tape, weight: Tensor | Parameter) -> Tensor:
    """A weight as an operand, cast where autocast casts; casts of trainable float32 weights are kept until it ends.

    aten/src/ATen/autocast_mode.cpp, cached_cast: only float32 leaves that require a gradient are cached.
    """
    if isinstance(weight, Tensor):
        return lower(tape, weight)
    if tape.autocast in (None, weight.dtype):
        return weight.tensor()
    if not weight.requires_grad or weight.dtype != "fp32":
        return to(tape, weight.tensor(), tape.autocast, "weight cast by autocast")
    kept = tape.cache.get(id(weight))
    if kept is None:
        # the cast is made once, so its node is made with gradients even where a later use would not need it
        kept = tape.cache[id(weight)] = to(tape, weight.tensor(), tape.autocast, "weight cast by autocast")
    return kept


def lower(tape: Tape, x: Tensor) -> Tensor:
    """An activation as autocast hands it to a matrix product: in autocast's dtype."""
    if tape.autocast in (None, x.dtype):
        return x
    return to(tape, x, tape.autocast, "input cast by autocast")


# --- elementwise --------------------------------------------------------------------------------------------------


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise op on `a` and `b`."""
    if a == b:
        return a
    n = max(len(a), len(b))
    a, b = (1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b
    return tuple(max(x, y) for x, y in zip(a, b, strict=True))


def mul(tape: Tape, a: Tensor, b: Tensor | Parameter, label: str = "product", dtype: str | None = None) -> Tensor:
    """`a * b`; each operand is saved where the other needs a gradient."""
    b = b.tensor() if isinstance(b, Parameter) else b
    shape = broadcast(a.shape, b.shape)
    dtype = promote(a.dtype, b.dtype)
    needs_a, needs_b = a.node is not None, b.node is not None

    def backward(grads: Grads, _: Grads) -> Grads:
        merged = layout(grads)
        other = tape.new(shape, dtype, "gradient of a product", merged) if needs_b else None
        mine = tape.new(shape, dtype, "gradient of a product", merged) if needs_a else None
        return [mine, other]

    fits = () if a.shape == b.shape and a.dtype == b.dtype else ((a.shape, a.dtype), (b.shape, b.dtype))
    node = tape.node((a, b), backward, (b if needs_a else None, a if needs_b else None), fits=fits)
    return done(tape.new(shape, dtype, label, (a if a.shape == shape else b).merged), node)


def scale(tape: Tape, a: Tensor, label: str = "scaled") -> Tensor:
    """`a * number`: a fresh tensor, and a fresh gradient; nothing saved."""
    shape, dtype = a.shape, a.dtype
    node = tape.node((a,), lambda g, _: [tape.new(shape, dtype, "gradient, scaled", layout(g))])
    return done(tape.new(shape, dtype, label, a.merged), node)


def scale_(tape: Tape, a: Tensor) -> Tensor:
    """`a *= number`: in a's memory; a fresh gradient."""
    shape, dtype = a.shape, a.dtype
    node = tape.node((a,), lambda g, _: [tape.new(shape, dtype, "gradient, scaled", layout(g))])
    return Tensor(a.storage, shape, dtype, node)


def shift(tape: Tape, a: Tensor, label: str = "sum") -> Tensor:
    """`a + number`: a fresh tensor; the gradient passes through."""
    node = tape.node((a,), lambda g, _: [g[0]])
    return done(tape.new(a.shape, a.dtype, label, a.merged), node)


def add(tape: Tape, a: Tensor, b: Tensor | Parameter, label: str = "sum") -> Tensor:
    """`a + b`: nothing saved; the gradient passes to both, cast or summed where one had another dtype or shape."""
    b = b.tensor() if isinstance(b, Parameter) else b
    shape = broadcast(a.shape, b.shape)
    dtype = promote(a.dtype, b.dtype)
    needs_a, needs_b = a.node is not None, b.node is not None
    fits = () if a.shape == b.shape and a.dtype == b.dtype else ((a.shape, a.dtype), (b.shape, b.dtype))
    node = tape.node(
        (a, b), lambda g, _: [g[0] if needs_a else None, g[0] if needs_b else None], fits=fits
    )  # fmt: skip
    return done(tape.new(shape, dtype, label, a.merged), node)


def sub(tape: Tape, a: Tensor, b: Tensor, label: str = "difference") -> Tensor:
    """`a - b`: nothing saved; b's gradient is negated, then summed to its shape (SubBackward0)."""
    shape, dtype = a.shape, a.dtype

    def backward(grads: Grads, _: Grads) -> Grads:
        return [grads[0], tape.new(shape, dtype, "gradient, negated", layout(grads))]

    node = tape.node((a, b), backward, fits=((a.shape, a.dtype), (b.shape, b.dtype)))
    return done(tape.new(shape, dtype, label, a.merged), node)


def add_(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a += b`: in a's memory."""
    node = tape.node((a, b), lambda g, _: [g[0], g[0]])
    return Tensor(a.storage, a.shape, a.dtype, node)


def unary(tape: Tape, x: Tensor, label: str, saves: str = "input", dtype: str | None = None) -> Tensor:
    """An activation function: a fresh output; its input (or its `result`, or nothing) saved; a fresh gradient."""
    shape, kind = x.shape, dtype or x.dtype
    x_dtype = x.dtype

    def backward(grads: Grads, _: Grads) -> Grads:
        return [tape.new(shape, x_dtype, f"gradient of {label}", layout(grads))]

    if saves == "result":
        out = tape.new(shape, kind, label, x.merged)
        return done(out, tape.node((x,), backward, (out,)))
    node = tape.node((x,), backward, (x,) if saves == "input" else ())
    return done(tape.new(shape, kind, label, x.merged), node)


def square(tape: Tape, x: Tensor) -> Tensor:
    """`x.pow(2)`: backward takes `grad * (2 * x.pow(1))`, two temporaries and the gradient (PowBackward0)."""
    shape, dtype = x.shape, x.dtype

    def backward(grads: Grads, _: Grads) -> Grads:
        power = tape.new(shape, dtype, "x to the power 1")
        twice = tape.new(shape, dtype, "2x")
        grad = tape.new(shape, dtype, "gradient of a square", layout(grads))
        del twice
        del power
        return [grad]

    node = tape.node((x,), backward, (x,))
    return done(tape.new(shape, dtype, "square", x.merged), node)


def dropout(tape: Tape, x: Tensor, p: float) -> Tensor:
    """`F.dropout`: CUDA's native_dropout keeps a mask of one byte an element; the identity for 0, and in evaluation."""
    if p == 0.0 or not tape.grad:
        return x
    shape, dtype = x.shape, x.dtype
    mask: Tensor | None = tape.new(shape, "bool", "dropout mask")
    out = tape.new(shape, dtype, "dropped input")
    node = tape.node((x,), lambda _, __: [tape.new(shape, dtype, "gradient of dropout")], (mask,))
    return done(out, node)


# --- shapes -------------------------------------------------------------------------------------------------------


def part(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """A slice of `x`: a view; its gradient is a zeroed tensor of the whole (SliceBackward).

    A slice that takes all is an alias, whose gradient passes through (TensorIndexing.h, applySlice).
    """
    whole, dtype = x.shape, x.dtype
    if shape == whole:
        node = tape.node((x,), lambda g, _: [g[0]])
    else:
        node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient of a slice")])
    return _viewed(x, shape, node)


def _viewed(x: Tensor, shape: Shape, node: Node | None, nr: int = 0) -> Tensor:
    out = Tensor(x.storage, shape, x.dtype, node, nr)
    out.merged = x.merged
    return out


def index(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """`x[..., [i], :]`: a copy; its gradient is put into zeros of the whole (IndexBackward0)."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient of a selection")])
    return done(tape.new(shape, dtype, "selection"), node)


def gather(tape: Tape, x: Tensor, shape: Shape, ids: Tensor | None = None) -> Tensor:
    """`x[ids]` by rows: a copy; saves `ids`; the gradient is put into zeros of the whole (IndexBackward0)."""
    whole, dtype = x.shape, x.dtype
    rows = shape[0]

    def backward(_: Grads, __: Grads) -> Grads:
        grad = tape.new(whole, dtype, "gradient of a selection")
        linear = tape.new((rows,), "int64", "indices, linear")  # index_put_ with accumulation sorts them
        tape.moment(24 * rows, "indices, sorted")
        del linear
        return [grad]

    node = tape.node((x,), backward, (ids,))
    return done(tape.new(shape, dtype, label="selection"), node)


def masked_fill(tape: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x.masked_fill(mask, 0)`: a copy, and a copy of the gradient; the mask is saved."""
    shape, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(shape, dtype, "gradient, masked")], (mask,))
    return done(tape.new(shape, dtype, "masked"), node)


def masked_fill_(tape: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x.masked_fill_(mask, 0)`: in x's memory; the gradient is copied."""
    shape, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(shape, dtype, "gradient, masked")], (mask,))
    return Tensor(x.storage, shape, dtype, node)


def clamp(tape: Tape, x: Tensor, bounds: int) -> Tensor:
    """`x.clamp(...)` with one bound or two: saves its input; backward compares with each bound (ClampBackward1)."""
    shape, dtype = x.shape, x.dtype

    def backward(_: Grads, __: Grads) -> Grads:
        inside = [tape.new(shape, "bool", "within a bound") for _ in range(bounds)]
        grad = tape.new(shape, dtype, "gradient of a clamp")
        del inside
        return [grad]

    node = tape.node((x,), backward, (x,))
    return done(tape.new(shape, dtype, "clamped"), node)


def split(tape: Tape, x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """`x.split` or `x.chunk`: views; one gradient of the whole is put together from the parts (SplitBackward)."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradients put together")], (), len(shapes))
    return [_viewed(x, shape, node, i) for i, shape in enumerate(shapes)]


def cat(
    tape: Tape, parts: Sequence[Tensor], shape: Shape, label: str = "concatenation", *, mixed: bool = False
) -> Tensor:
    """`torch.cat`: a fresh tensor; its gradient is handed back in views. `mixed`: a part may have another dtype."""
    shapes = [p.shape for p in parts]

    def backward(grads: Grads, _: Grads) -> Grads:
        g = grads[0]
        return [None if g is None else Tensor(g.storage, s, g.dtype).aliased() for s in shapes]

    fits = [(p.shape, p.dtype) for p in parts] if mixed else ()
    node = tape.node(parts, backward, fits=fits)
    return done(tape.new(shape, parts[0].dtype, label), node)


def empty(tape: Tape, shape: Shape, dtype: str, label: str) -> Tensor:
    """`new_empty`."""
    return tape.new(shape, dtype, label)


def copy_into(tape: Tape, base: Tensor, x: Tensor) -> Tensor:
    """`base[...] = x`: in base's memory; the gradient of the whole is copied, then x's part of it (CopySlices)."""
    whole, shape, dtype = base.shape, x.shape, x.dtype
    needs_base = base.node is not None

    def backward(_: Grads, __: Grads) -> Grads:
        rest = tape.new(whole, dtype, "gradient of a whole, copied")
        mine = tape.new(shape, dtype, "gradient of a part, copied")
        if needs_base:
            tape.moment(mine.nbytes, "zeros")
        return [rest if needs_base else None, mine]

    return Tensor(base.storage, whole, dtype, tape.node((base, x), backward))


def copy(tape: Tape, x: Tensor, label: str = "copy") -> Tensor:
    """`clone`: a fresh tensor, laid out alike; the gradient passes through."""
    node = tape.node((x,), lambda g, _: [g[0]])
    return done(tape.new(x.shape, x.dtype, label, x.merged), node)


def contiguous(tape: Tape, x: Tensor, label: str = "copy") -> Tensor:
    """A copy in the order of its shape; the gradient passes through."""
    node = tape.node((x,), lambda g, _: [g[0]])
    return done(tape.new(x.shape, x.dtype, label), node)


def view(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """`x.view(shape)`: the gradient is a view too."""
    whole = x.shape

    def backward(grads: Grads, _: Grads) -> Grads:
        return [None if grads[0] is None else Tensor(grads[0].storage, whole, grads[0].dtype).aliased()]

    return Tensor(x.storage, shape, x.dtype, tape.node((x,), backward))


def regrouped(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """A view with its dimensions permuted: the way back copies the gradient (ViewBackward0, reshape)."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient, put in order")])
    return Tensor(x.storage, shape, dtype, node)


def expand(tape: Tape, x: Tensor, shape: Shape) -> Tensor:
    """`torch.broadcast_to`: a view; the gradient is summed over what was repeated."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient of repeated heads")])
    return Tensor(x.storage, shape, dtype, node)


def heads(tape: Tape, x: Tensor, shape: Shape, *, transposed: bool = False) -> Tensor:
    """`x.view(B, T, N, D).transpose(1, 2)`: a view; the way back copies a gradient whose heads are apart (reshape).

    `transposed`: the gradient is that of keys which go into a product as [D, T]: a token's heads are one row of it.
    """
    whole, dtype = x.shape, x.dtype

    def backward(grads: Grads, _: Grads) -> Grads:
        grad = grads[0]
        if grad is not None and (grad.one_row or transposed):
            return [Tensor(grad.storage, whole, dtype).aliased()]
        return [tape.new(whole, dtype, "gradient, heads merged").aliased()]

    out = Tensor(x.storage, shape, dtype, tape.node((x,), backward))
    out.merged = True
    return out


def merge_heads(tape: Tape, x: Tensor, label: str = "heads merged") -> Tensor:
    """`x.transpose(1, 2).reshape(B, T, N * D)`: a copy where the heads are apart; the gradient is a view."""
    b, n, t, d = x.shape

    def backward(grads: Grads, _: Grads) -> Grads:
        if grads[0] is None:
            return [None]
        grad = Tensor(grads[0].storage, (b, n, t, d), grads[0].dtype).aliased()
        grad.merged = True
        return [grad]

    node = tape.node((x,), backward)
    if x.one_row:
        return Tensor(x.storage, (b, t, n * d), x.dtype, node)
    return done(tape.new((b, t, n * d), x.dtype, label), node)


class Expanded(Tensor):
    """[B, N, T, D] of one head's memory, by a stride of 0; any op on it, and a flattening of B and N, writes all."""

    __slots__ = ()


def repeat_kv(tape: Tape, x: Tensor, times: int, *, interleave: bool = False) -> Tensor:
    """`repeat_kv` of transformers: expand and reshape, so a copy; the gradient is summed over the repeats.

    `interleave`: torch's `repeat_interleave`, which copies a single head too (aten/src/ATen/native/Repeat.cpp).
    """
    if times == 1:
        return x
    b, h, t, d = x.shape
    dtype = x.dtype
    node = tape.node((x,), lambda g, _: [tape.new((b, h, t, d), dtype, "gradient of repeated heads", layout(g))])
    if h == 1 and not interleave:
        return Expanded(x.storage, (b, times, t, d), dtype, node)
    return done(tape.new((b, h * times, t, d), dtype, "heads repeated"), node)


# --- matrix products ----------------------------------------------------------------------------------------------


def linear(
    tape: Tape,
    x: Tensor,
    weight: Parameter | Tensor,
    out_features: int,
    bias: Parameter | None = None,
    label: str = "projection",
) -> Tensor:
    """`F.linear`: saves its input where the weight is trained and the weight where the input needs a gradient.

    With a bias it is addmm, else mm; their backwards take the operands in alphabetical order (mat1, mat2, self;
    mat2, self). Autocast casts the arguments from the last to the first: a C++ compiler evaluates them so.
    """
    c = None if bias is None else operand(tape, bias)
    m = operand(tape, weight)
    a = lower(tape, x)
    dtype, a_shape, m_shape = a.dtype, a.shape, m.shape
    needs_a, needs_m, needs_c = a.node is not None, m.node is not None, c is not None and c.node is not None
    biased = c is not None

    def backward(grads: Grads, _: Grads) -> Grads:
        into_a = into_m = None
        if biased and needs_a:
            into_a = _unfolded(tape.new(a_shape, dtype, "gradient of an input"))
        if needs_m:
            into_m = tape.new(m_shape, dtype, "gradient of a weight").aliased()  # of the transpose
        if not biased and needs_a:
            into_a = _unfolded(tape.new(a_shape, dtype, "gradient of an input"))
        return [into_a, into_m, grads[0] if needs_c else None]

    kept = (a if needs_m or tape.saves_inputs else None, m if needs_a else None)
    # the bias's gradient is summed over the rows when the engine fits it to the bias
    fits = ((a_shape, dtype), (m_shape, dtype), ((out_features,), dtype)) if needs_c else ()
    node = tape.node((a, m, c), backward, kept if biased else kept[::-1], fits=fits)
    del kept
    out = tape.new((*a_shape[:-1], out_features), dtype, label)
    del a, m, c  # the casts, if any, go in the reverse of their order
    return done(out, node)


def _unfolded(grad: Tensor) -> Tensor:
    """The gradient of a linear layer's input: rows of more than two dimensions are unfolded again by a view."""
    return grad.aliased() if len(grad.shape) > 2 else grad


def matmul(tape: Tape, a: Tensor, b: Tensor, shape: Shape, label: str) -> Tensor:
    """`torch.matmul` of two [B, N, ., .]: flattened to [B * N, ., .], which copies where that is no view, then bmm.

    A single head of b is expanded to a's first (aten/src/ATen/native/LinearAlgebra.cpp, _matmul_impl). BmmBackward
    saves both and takes them by the alphabet (mat2, self).
    """
    low_b = lower(tape, b)
    low_a = lower(tape, a)
    a = _flat(tape, low_a)
    b = _flat(tape, repeat_kv(tape, low_b, low_a.shape[1] // low_b.shape[1]))
    a_shape, b_shape, dtype = a.shape, b.shape, a.dtype
    needs_a, needs_b = a.node is not None, b.node is not None

    def backward(_: Grads, __: Grads) -> Grads:
        into_b = tape.new(b_shape, dtype, "gradient of an input") if needs_b else None
        into_a = tape.new(a_shape, dtype, "gradient of an input") if needs_a else None
        return [into_a, into_b]

    def unflat(grads: Grads, _: Grads) -> Grads:
        grad = grads[0]
        if grad is None or _flattens(grad):
            return [grad]
        return [tape.new(shape, dtype, "gradient, made contiguous")]

    node = tape.node((a, b), backward, (b if needs_a else None, a if needs_b else None))
    out = done(tape.new(shape, dtype, label), node)
    del a, b, low_a, low_b
    return done(out, tape.node((out,), unflat))


def _flattens(x: Tensor) -> bool:
    """Whether [B, N, T, D] is [B * N, T, D] by a view."""
    if x.shape[0] == 1:
        return True
    return not (isinstance(x, Expanded) or (x.merged and x.shape[1] > 1 and x.shape[2] > 1))


def _flat(tape: Tape, x: Tensor) -> Tensor:
    return x if _flattens(x) else contiguous(tape, x, "made contiguous")


def softmax(tape: Tape, x: Tensor, label: str = "probabilities") -> Tensor:
    """`softmax`: saves its result; backward takes `grad * result` as a temporary."""
    shape, dtype = x.shape, x.dtype

    def backward(_: Grads, __: Grads) -> Grads:
        grad = tape.new(shape, dtype, "gradient of a softmax")
        tape.moment(grad.nbytes, "gradient times probabilities")
        return [grad]

    out = tape.new(shape, dtype, label)
    return done(out, tape.node((x,), backward, (out,)))


def wide_softmax(tape: Tape, x: Tensor, label: str = "probabilities") -> Tensor:
    """`softmax(x, dtype=float32)`, which autocast makes of any: float16 is read as it is, bfloat16 copied first.

    aten/src/ATen/native/SoftMax.cpp, softmax: half_to_float. The gradient of the one op is float16 then.
    """
    if x.dtype != "fp16":
        return softmax(tape, to(tape, x, "fp32", "scores, float32"), label)
    shape = x.shape

    def backward(_: Grads, __: Grads) -> Grads:
        grad = tape.new(shape, "fp16", "gradient of a softmax")
        tape.moment(2 * grad.nbytes, "gradient times probabilities")
        return [grad]

    out = tape.new(shape, "fp32", label)
    return done(out, tape.node((x,), backward, (out,)))


def bytes_of(shape: Shape, dtype: str) -> int:
    """Bytes of a tensor."""
    return prod(shape) * ITEMSIZE[dtype]
