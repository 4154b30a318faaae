"""Mixtures of experts: the router, the experts by grouped matrix products, shared experts.

Sources: transformers/integrations/moe.py (grouped_mm_experts_forward, the default on a GPU), the router and block of
each family (models/*/modeling_*.py), peft/tuners/lora/layer.py (ParamWrapper),
aten/src/ATen/native/cuda/GroupedBlas.cpp (_grouped_mm).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner import activations, ops
from vramplan.planner.paper import ITEMSIZE, Parameter, Tensor

if TYPE_CHECKING:
    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.layers import Moe
    from vramplan.planner.paper import Tape

# Families whose router computes in float32: both operands are cast, and autocast casts them back.
_WIDE_ROUTERS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe"})
# Families that take the softmax of the chosen experts' logits only.
_SOFTMAX_OF_CHOSEN = frozenset({"gpt_oss", "granitemoe", "granitemoehybrid"})


def route(tape: Tape, x: Tensor, m: Moe, held: Held, family: str) -> tuple[Tensor, Tensor, Tensor]:
    """The router: its logits [T, E], and the weights and ids [T, k] of the chosen experts."""
    tape.scope = m.router
    bias: Parameter | None
    weight: Parameter | Tensor
    delta: Tensor | None = None
    if m.router in held.projections:  # phimoe's, a subclass of nn.Linear
        weight, bias = held.projections[m.router].weight, held.projections[m.router].bias
    else:
        weight, bias = held.others[m.router]["weight"], held.others[m.router].get("bias")
        factors = held.factors.get(f"{m.router}.weight")
        if factors is not None:
            delta = delta_weight(tape, weight, factors)
            tape.moment(weight.numel * ITEMSIZE[weight.dtype], "weight with adapter, tried once")
    t, k = x.shape[0], m.top_k
    if family in _WIDE_ROUTERS:
        x = ops.to(tape, x, "fp32", "router input, float32")
    if delta is not None:
        weight = ops.add(
            tape, weight.tensor() if isinstance(weight, Parameter) else weight, delta, "weight with adapter"
        )
    if family in _WIDE_ROUTERS:
        weight = ops.to(tape, weight if isinstance(weight, Tensor) else weight.tensor(), "fp32", "router, float32")
    logits = ops.linear(tape, x, weight, m.num_experts, bias, "router logits")
    if family in _SOFTMAX_OF_CHOSEN:
        chosen, ids = topk(tape, logits, k)
        return logits, ops.softmax(tape, chosen, "expert weights"), ids
    scores = logits
    if family in ("deepseek_v3", "glm4_moe"):
        scores = ops.unary(tape, logits, "sigmoid", saves="result")
        tape.moment(scores.nbytes, "scores with their correction")
        ids = tape.new((t, k), "int64", "chosen experts")
        chosen = ops.gather(tape, scores, (t, k))
    else:
        # models/phimoe/modeling_phimoe.py, sparsemixer: the dtype is left to autocast; the others ask for float32
        softmax = ops.softmax if family == "phimoe" and not tape.autocast else ops.wide_softmax
        scores = softmax(tape, logits, "router probabilities")
        chosen, ids = topk(tape, scores, k)
    chosen = ops.scale(tape, chosen, "expert weights, normalised")
    if family not in ("mixtral", "phimoe", *_WIDE_ROUTERS):
        chosen = ops.to(tape, chosen, logits.dtype, "expert weights")
    return logits, chosen, ids


def topk(tape: Tape, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`: values and int64 indices, which are saved; the gradient is scattered into zeros."""
    shape, dtype = (x.shape[0], k), x.dtype
    whole = x.shape
    values = tape.new(shape, dtype, "top values")
    ids = tape.new(shape, "int64", "chosen experts")
    node = tape.node((x,), lambda _, __: [tape.new(whole, dtype, "gradient of top values")], (ids,))
    return ops.done(values, node), ids


def cast_factors(tape: Tape, weight: Parameter, factors: tuple[Parameter, Parameter]) -> tuple[Tensor, Tensor]:
    """ParamWrapper.get_delta_factors: B by expert, then A, in the weight's dtype."""
    a, b = factors
    lhs = ops.to(tape, ops.regrouped(tape, b.tensor(), b.shape), weight.dtype, "adapter B, cast to the weight's dtype")
    return lhs, ops.to(tape, a.tensor(), weight.dtype, "adapter A, cast to the weight's dtype")


def wrapped(tape: Tape, weight: Parameter, lhs: Tensor, rhs: Tensor) -> Tensor:
    """`baddbmm(weight, lhs, rhs, alpha=scaling)`, with B by expert made contiguous for a moment."""
    dtype = weight.dtype
    l_shape, r_shape, l_bytes = lhs.shape, rhs.shape, lhs.nbytes

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        product = tape.new(l_shape, dtype, "gradient of an adapter, unscaled")
        into_lhs = tape.new(l_shape, dtype, "gradient of an adapter")
        del product
        product = tape.new(r_shape, dtype, "gradient of an adapter, unscaled")
        tape.moment(l_bytes, "adapter B by expert")
        into_rhs = tape.new(r_shape, dtype, "gradient of an adapter")
        del product
        return [into_lhs, into_rhs]

    node = tape.node((lhs, rhs), backward, (lhs, rhs))
    out = ops.done(tape.new(weight.shape, dtype, "weight with adapter"), node)
    tape.moment(l_bytes, "adapter B by expert")
    return out


def delta_weight(tape: Tape, weight: Parameter, factors: tuple[Parameter, Parameter]) -> Tensor:
    """ParamWrapper.get_delta_weight of a single matrix: `B @ A * scaling`, in the weight's dtype."""
    a, b = factors
    product = ops.linear(tape, ops.lower(tape, b.tensor()), a, a.shape[1], label="adapter product")
    return ops.to(tape, ops.scale(tape, product, "adapter product, scaled"), weight.dtype, "adapter product, cast")


def activate(tape: Tape, module: str, held: Held) -> dict[str, tuple[Tensor, Tensor]]:
    """ParamWrapper._activate_lora of each wrapper, the last first: register_parametrization tries the sum once."""
    active: dict[str, tuple[Tensor, Tensor]] = {}
    for name, weight in reversed(held.others[module].items()):
        factors = held.factors.get(f"{module}.{name}")
        if factors is not None:
            active[name] = cast_factors(tape, weight, factors)
            grad, tape.grad = tape.grad, False
            wrapped(tape, weight, *active[name])
            tape.grad = grad
    return active


def batched(tape: Tape, x: Tensor, weights: Tensor, m: Moe, held: Held, family: str) -> Tensor:
    """batched_mm_experts_forward, which decoding takes: the weights of its expert are copied for every token."""
    tape.scope = m.experts
    t, h = x.shape
    rows = t * m.top_k
    parameters = held.others[m.experts]
    active = activate(tape, m.experts, held)

    made: list[Tensor] = []  # parametrize.cached keeps what a wrapper has made until the forward ends

    def copied(name: str) -> Tensor:
        whole = wrapped(tape, parameters[name], *active[name]) if name in active else parameters[name].tensor()
        made.append(whole)
        return tape.new((rows, *whole.shape[1:]), whole.dtype, "experts' weights, one for each token")

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return tape.new((rows, weight.numel // (rows * x.shape[1])), x.dtype, "expert projection")

    selected = tape.new((rows, h), x.dtype, "tokens, repeated")
    ids = tape.new((rows,), "int64", "experts, clamped")
    chosen = copied("gate_up_proj")
    out = product(selected, ops.lower(tape, chosen))
    out = gate(tape, out, m, family)
    chosen = copied("down_proj")
    out = product(out, ops.lower(tape, chosen))
    weighted = ops.mul(tape, out, weights.view(rows, 1), "expert outputs, weighted")
    total = sum_of_experts(tape, weighted, (t, h))
    answer = ops.to(tape, total, x.dtype, "output of experts")
    del selected, ids, chosen, out, weighted
    return answer


def experts(tape: Tape, x: Tensor, weights: Tensor, m: Moe, held: Held, s: Settings, family: str) -> Tensor:
    """grouped_mm_experts_forward: tokens sorted by expert, two grouped products, weighted, unsorted and summed."""
    if s.mode == "generation" and s.past:  # generation/utils.py, _optimize_model_for_decode
        return batched(tape, x, weights, m, held, family)
    tape.scope = m.experts
    t, h = x.shape
    rows = t * m.top_k
    biases = parameters = held.others[m.experts]
    active = activate(tape, m.experts, held)

    def weight(name: str) -> Parameter | Tensor:
        return wrapped(tape, parameters[name], *active[name]) if name in active else parameters[name]

    ids = tape.new((rows,), "int64", "experts, sorted")
    order = tape.new((rows,), "int64", "order of tokens")
    tape.moment(8 * rows, "order before sorting")
    positions = tape.new((rows,), "int64", "rows of tokens")
    selected = ops.gather(tape, x, (rows, h), positions)
    del positions
    sample_weights = ops.gather(tape, weights, (rows, 1), order)
    tape.moment(4 * rows, "experts, int32")
    sentinel = tape.new((rows,), "bool", "rows of other ranks' experts") if s.masked_experts else None
    up_weight = weight("gate_up_proj")
    bias_rows = _bias_rows(tape, biases.get("gate_up_proj_bias"), ids)
    if sentinel is not None:
        selected = ops.masked_fill_(tape, selected, sentinel)
    out = _grouped_linear(tape, selected, up_weight, bias_rows, m)
    if sentinel is not None:
        out = ops.masked_fill(tape, out, sentinel)
    out = gate(tape, out, m, family)
    down_weight = weight("down_proj")
    bias_rows = _bias_rows(tape, biases.get("down_proj_bias"), ids)
    out = _grouped_linear(tape, out, down_weight, bias_rows, m)
    if sentinel is not None:
        out = ops.masked_fill(tape, out, sentinel)
    weighted = ops.mul(tape, out, sample_weights, "expert outputs, weighted")
    back = tape.new((rows,), "int64", "inverse order")
    weighted = ops.gather(tape, weighted, (rows, h), back)
    total = sum_of_experts(tape, weighted, (t, h))
    answer = ops.to(tape, total, x.dtype, "output of experts")
    del ids, order, selected, sample_weights, sentinel, bias_rows, out, weighted, back
    return answer


def sum_of_experts(tape: Tape, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """`x.view(T, k, H).sum(1)`, which autocast runs in float32; the gradient is expanded, then copied by a view."""
    dtype = "fp32" if tape.autocast else x.dtype
    rows, given = x.shape, x.dtype
    node = tape.node((x,), lambda _, __: [tape.new(rows, given, "gradient of a sum, expanded")])
    return ops.done(tape.new(shape, dtype, "sum of experts"), node)


def _bias_rows(tape: Tape, bias: Parameter | None, ids: Tensor) -> Tensor | None:
    """`bias[expert_ids]`: the bias of its expert for every row."""
    if bias is None:
        return None
    return ops.gather(tape, bias.tensor(), (ids.numel, bias.shape[-1]), ids)


def _grouped_linear(tape: Tape, x: Tensor, weight: Parameter | Tensor, bias_rows: Tensor | None, m: Moe) -> Tensor:
    """The grouped product with the weights' dtype, and each expert's bias added in place."""
    w = weight.tensor() if isinstance(weight, Parameter) else weight
    out_features = w.numel // (m.num_experts * x.shape[1])
    out = grouped_mm(tape, ops.to(tape, x, w.dtype, "tokens, cast to the experts' dtype"), w, out_features)
    return out if bias_rows is None else ops.add_(tape, out, bias_rows)


def grouped_mm(tape: Tape, x: Tensor, w: Tensor, out_features: int) -> Tensor:
    """`F.grouped_mm`: saves its input where the weight is trained, the weight where the input needs a gradient."""
    shape, dtype, w_shape = x.shape, x.dtype, w.shape
    needs_x, needs_w = x.node is not None, w.node is not None
    descriptors = 60 * w_shape[0] if dtype == "bf16" else 0

    def product(shape: tuple[int, ...], label: str) -> Tensor:
        out = tape.new(shape, dtype, label)
        tape.moment(descriptors, "descriptors of a grouped product")
        return out

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        into_w = product(w_shape, "gradient of a weight") if needs_w else None
        into_x = product(shape, "gradient of an input") if needs_x else None
        return [into_x, into_w]

    node = tape.node((x, w), backward, (w if needs_x else None, x if needs_w else None))
    return ops.done(product((shape[0], out_features), "expert projection"), node)


def gate(tape: Tape, both: Tensor, m: Moe, family: str) -> Tensor:
    """_apply_gate: `act(gate) * up`, gpt_oss's with both clamped and interleaved."""
    half = (both.shape[0], both.shape[1] // 2)
    if family != "gpt_oss":
        first, up = ops.split(tape, both, [half, half])
        return ops.mul(tape, activations.activation(tape, first, m.activation), up, "gated")
    first, up = ops.part(tape, both, half), ops.part(tape, both, half)
    first = ops.clamp(tape, first, 1)
    up = ops.clamp(tape, up, 2)
    glu = ops.mul(tape, first, ops.unary(tape, ops.scale(tape, first, "gate, scaled"), "sigmoid", "result"), "glu")
    out = ops.mul(tape, ops.shift(tape, up, "up + 1"), glu, "gated")
    del first, up, glu
    return out
