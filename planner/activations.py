"""Activation functions as transformers writes them (transformers/activations.py), op by op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner import ops
from vramplan.planner.paper import ACCUMULATE, Node, Tensor

if TYPE_CHECKING:
    from vramplan.planner.paper import Tape

# One fused kernel each, which saves its input.
FUSED = frozenset({"silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_fast_tanh"})


def activation(tape: Tape, x: Tensor, name: str, *, trained: bool = False) -> Tensor:
    """An activation by its transformers name; `trained`: with the base model, where it has weights of its own."""
    if name in FUSED:
        return ops.unary(tape, x, name)
    if name == "relu":
        return ops.unary(tape, x, name, saves="result")
    if name in ("gelu_new", "gelu_fast"):
        return gelu_new(tape, x)
    if name == "relu2":
        return power(tape, ops.unary(tape, x, "relu", saves="result"))
    if name == "xielu":
        return xielu(tape, x, trained)
    if name == "bloom_gelu":
        return bloom_gelu(tape, x)
    if name == "quick_gelu":
        opened = ops.unary(tape, ops.scale(tape, x), "sigmoid", saves="result")
        return ops.mul(tape, x, opened, "gelu")
    return ops.unary(tape, x, name)


def power(tape: Tape, x: Tensor) -> Tensor:
    """`torch.pow`, which autocast runs in float32."""
    return ops.square(tape, ops.to(tape, x, "fp32", "float32 copy") if tape.autocast else x)


def gelu_new(tape: Tape, x: Tensor) -> Tensor:
    """NewGELUActivation: `0.5 * x * (1.0 + tanh(sqrt(2 / pi) * (x + 0.044715 * pow(x, 3.0))))`."""
    half = ops.scale(tape, x, "half")
    return ops.mul(tape, half, ops.shift(tape, _tanh_of_cubic(tape, x), "1 + tanh"), "gelu")


def _tanh_of_cubic(tape: Tape, x: Tensor) -> Tensor:
    inner = ops.scale(tape, ops.add(tape, x, ops.scale(tape, power(tape, x), "cube, scaled")), "tanh argument")
    return ops.unary(tape, inner, "tanh", saves="result")


def bloom_gelu(tape: Tape, x: Tensor) -> Tensor:
    """BloomGelu: written out in Python as one autograd function, which saves its input (GeLUFunction)."""
    shape, dtype = x.shape, x.dtype

    def new(label: str) -> Tensor:
        return tape.new(shape, dtype, label)

    def tanh() -> Tensor:
        """`torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))`."""
        scaled = new("x, scaled")
        last = new("0.044715 x")
        last = new("0.044715 x x")
        last = new("1 + 0.044715 x x")
        argument = new("tanh argument")
        del scaled, last
        out = new("tanh")
        del argument
        return out

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        tanh_out = tanh()
        half = new("half")
        last = new("tanh squared")
        left = new("1 - tanh squared")
        del last
        last = new("0.1070322243 x")
        last = new("0.1070322243 x x")
        last = new("slope")
        inner = new("left part")
        del left, last
        first = new("first part")
        del half, inner
        last = new("1 + tanh")
        last = new("second part")
        slope = new("slope of gelu")
        del first, last
        grad = new("gradient of gelu")
        del tanh_out, slope
        return [grad]

    half = new("half")
    last = tanh()
    last = new("1 + tanh")
    out = new("gelu")
    del half, last
    return ops.done(out, tape.node((x,), backward, (x,)))


def xielu(tape: Tape, x: Tensor, trained: bool = False) -> Tensor:
    """XIELUActivation in Python: `where(x > 0, ap x x + b x, (expm1(min(x, eps)) - x) an + b x)`.

    ap and an are one number each, float32 under autocast (softplus).
    """
    leaf = Node(ACCUMULATE, [], lambda _, __: [], []) if trained else None
    number = Tensor(None, (1,), "fp32" if tape.autocast else x.dtype, leaf)
    inside = tape.new(x.shape, "bool", "x > 0")
    above = ops.add(
        tape, ops.mul(tape, ops.mul(tape, number, x, "ap x"), x, "ap x x"), ops.scale(tape, x, "b x"), "branch above"
    )
    below = ops.add(
        tape, ops.mul(tape, ops.sub(tape, _expm1(tape, _least(tape, x)), x), number, "curved"),
        ops.scale(tape, x, "b x"), "branch below",
    )  # fmt: skip
    return _where(tape, inside, above, below)


def _least(tape: Tape, x: Tensor) -> Tensor:
    """`torch.min(x, eps)`: saves x; backward halves the gradient where both are equal (MinimumBackward0)."""
    shape, dtype = x.shape, x.dtype

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        half = tape.new(shape, dtype, "gradient, halved")
        equal = tape.new(shape, "bool", "x is eps")
        grad = tape.new(shape, dtype, "gradient of a minimum")
        tape.moment(equal.nbytes, "x above eps")
        del equal, half
        return [grad]

    node = tape.node((x,), backward, (x,))
    return ops.done(tape.new(shape, dtype, "minimum"), node)


def _expm1(tape: Tape, x: Tensor) -> Tensor:
    """`expm1`, which autocast runs in float32: saves its result; backward takes result + 1 as a temporary."""
    wide = ops.to(tape, x, "fp32", "float32 copy") if tape.autocast else x  # `x` lives until expm1 returns
    shape, dtype = wide.shape, wide.dtype

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        more = tape.new(shape, dtype, "expm1 + 1")
        grad = tape.new(shape, dtype, "gradient of expm1")
        del more
        return [grad]

    out = tape.new(shape, dtype, "expm1")
    return ops.done(out, tape.node((wide,), backward, (out,)))


def _where(tape: Tape, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where`: saves the condition; a gradient for each branch."""
    shape, dtype = a.shape, a.dtype
    node = tape.node(
        (a, b), lambda _, __: [tape.new(shape, dtype, "gradient of a branch") for _ in range(2)], (condition,)
    )
    return ops.done(tape.new(shape, dtype, "activation"), node)
