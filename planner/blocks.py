"""The decoder block, op by op: norms, projections with their adapters, rotary embedding, attention, MLP, residuals.

Each function follows the code of transformers (models/*/modeling_*.py), PEFT (tuners/lora/layer.py, bnb.py) and
bitsandbytes (nn/modules.py, autograd/_functions.py) statement by statement, down to which local variable holds a
tensor and for how long, because that decides what is alive at a peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from vramplan.planner import attention as kernels
from vramplan.planner import ops
from vramplan.planner.layers import Mlp
from vramplan.planner.paper import Parameter, Tensor
from vramplan.planner.rotary import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.layers import Attention, Layer, Module
    from vramplan.planner.paper import Tape


@dataclass(frozen=True, slots=True)
class Settings:
    """What the ops of a step depend on beside the weights. B sequences of T tokens."""

    batch: int
    seq: int
    method: str
    weights_dtype: str
    autocast: str | None
    compute_dtype: str  # bitsandbytes' bnb_4bit_compute_dtype
    adapter_dtype: str
    rank: int
    lora_dropout: float
    double_quant: bool
    prepare_kbit: bool
    checkpointing: bool
    kernel: kernels.Kernel
    masked: bool  # a mask is built, because rows are padded

    @property
    def frozen_dtype(self) -> str:
        """The dtype of base weights that are not quantised."""
        return "fp32" if self.method == "qlora" and self.prepare_kbit else self.weights_dtype


@dataclass(slots=True)
class Projection:
    """A linear module as the step holds it: its weight (perhaps quantised), bias and adapter."""

    weight: Parameter
    bias: Parameter | None
    in_features: int
    out_features: int
    quantised: bool = False
    conv1d: bool = False
    lora_a: Parameter | None = None
    lora_b: Parameter | None = None


@dataclass(slots=True)
class Norm:
    """A norm as the step holds it."""

    variant: str
    weight: Parameter | None
    bias: Parameter | None


@dataclass(slots=True)
class Held:
    """The modules of one layer (or of the model around the layers) by name, with their parameters."""

    projections: dict[str, Projection] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    others: dict[str, dict[str, Parameter]] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)  # trainable ones, in registration order


def hold(
    modules: tuple[Module, ...], s: Settings, adapted: frozenset[str], quantised: frozenset[str], prefix: str = ""
) -> Held:
    """The parameters of `modules`: dtypes, which are trained, which carry an adapter."""
    held = Held()
    full = s.method == "full"
    for module in modules:
        made: dict[str, Parameter] = {}
        for weight in module.weights:
            dtype = s.weights_dtype if full else s.frozen_dtype
            made[weight.name] = Parameter(f"{prefix}{module.name}.{weight.name}", weight.shape, dtype, full)
        if full:
            held.parameters += made.values()
        if module.kind in ("linear", "conv1d"):
            p = Projection(
                made["weight"],
                made.get("bias"),
                module.in_features,
                module.out_features,
                module.name in quantised,
                module.kind == "conv1d",
            )
            if module.name in adapted:
                p.lora_a = Parameter(f"{prefix}{module.name}.lora_A", (s.rank, p.in_features), s.adapter_dtype, True)
                p.lora_b = Parameter(f"{prefix}{module.name}.lora_B", (p.out_features, s.rank), s.adapter_dtype, True)
                held.parameters += (p.lora_a, p.lora_b)
            held.projections[module.name] = p
        elif module.kind == "norm":
            held.norms[module.name] = Norm(module.variant, made.get("weight"), made.get("bias"))
        else:
            held.others[module.name] = made
    return held


# --- norms --------------------------------------------------------------------------------------------------------


def norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """The norm that the architecture names; `x` is held by the caller throughout."""
    return _NORMS[n.variant](tape, x, n)


def square(tape: Tape, x: Tensor) -> Tensor:
    """`x.pow(2)`: backward takes `grad * (2 * x.pow(1))`, two temporaries and the gradient (PowBackward0)."""
    shape = x.shape

    def backward(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
        power = tape.new(shape, "fp32", "x to the power 1")
        twice = tape.new(shape, "fp32", "2x")
        grad = tape.new(shape, "fp32", "gradient of a square", ops.layout(grads))
        del twice
        del power
        return [grad]

    node = tape.node((x,), backward, (x,))
    return ops.done(tape.new(shape, "fp32", "square", x.merged), node)


def mean(tape: Tape, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x.mean(-1, keepdim=True)`: its gradient is expanded and divided, so as large as `x` (MeanBackward1)."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda g, _: [tape.new(whole, dtype, "gradient of a mean", ops.layout(g))])
    return ops.done(tape.new(shape, dtype, "mean", x.merged), node)


def rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """LlamaRMSNorm: float32 inside, back to the input's dtype, then the weight."""
    assert n.weight is not None
    input_dtype = x.dtype
    hidden = ops.to(tape, x, "fp32", "float32 copy")
    small = (*hidden.shape[:-1], 1)
    variance = mean(tape, square(tape, hidden), small)
    hidden = ops.mul(tape, hidden, rsqrt(tape, ops.shift(tape, variance)), "normalised, float32")
    return weighted(tape, n.weight, ops.to(tape, hidden, input_dtype, "normalised"))


def olmo_rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """Olmo2RMSNorm: the weight is applied in float32 and the product cast back."""
    assert n.weight is not None
    input_dtype = x.dtype
    hidden = ops.to(tape, x, "fp32", "float32 copy")
    small = (*hidden.shape[:-1], 1)
    variance = mean(tape, square(tape, hidden), small)
    hidden = ops.mul(tape, hidden, rsqrt(tape, ops.shift(tape, variance)), "normalised, float32")
    return ops.to(tape, weighted(tape, n.weight, hidden), input_dtype, "norm output")


def gemma_rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """GemmaRMSNorm: float32, times (1 + weight), cast back."""
    assert n.weight is not None
    # output = self._norm(x.float()): the float32 copy lives as the argument until _norm returns
    copy = ops.to(tape, x, "fp32", "float32 copy")
    small = (*copy.shape[:-1], 1)
    output = ops.mul(
        tape, copy, rsqrt(tape, ops.shift(tape, mean(tape, square(tape, copy), small))), "normalised, float32"
    )
    del copy
    one_plus = ops.shift(tape, ops.to(tape, n.weight.tensor(), "fp32", "weight, float32"), "1 + weight")
    output = ops.mul(tape, output, one_plus, "norm output, float32")
    del one_plus
    return ops.to(tape, output, x.dtype, "norm output")


def rsqrt(tape: Tape, x: Tensor) -> Tensor:
    """`torch.rsqrt`: saves its result; backward is `-0.5 * grad * result.pow(3)` (RsqrtBackward0)."""
    shape = x.shape

    def backward(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
        cube = tape.new(shape, "fp32", "cube")
        half = tape.new(shape, "fp32", "half of a gradient")
        grad = tape.new(shape, "fp32", "gradient of rsqrt", ops.layout(grads))
        del half
        del cube
        return [grad]

    out = tape.new(shape, "fp32", "rsqrt", x.merged)
    return ops.done(out, tape.node((x,), backward, (out,)))


def weighted(tape: Tape, weight: Parameter, x: Tensor) -> Tensor:
    """`weight * x`: with the weight first, so its gradient comes last (MulBackward0: other, then self)."""
    w = weight.tensor()
    shape, dtype = x.shape, ops.promote(w.dtype, x.dtype)
    x_dtype, w_dtype, w_shape = x.dtype, w.dtype, w.shape
    needs_w, needs_x = w.node is not None, x.node is not None

    def backward(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
        into_x = into_w = None
        if needs_x:
            into_x = tape.new(shape, dtype, "gradient of a norm", ops.layout(grads))
        if needs_w:
            into_w = ops.fitted(tape, tape.new(shape, dtype, "gradient of a norm weight, unsummed"), w_shape, w_dtype)
        if into_x is not None:
            into_x = ops.to(tape, into_x, x_dtype, "cast of a gradient")
        return [into_w, into_x]

    node = tape.node((w, x), backward, (x if needs_w else None, w if needs_x else None))
    return ops.done(tape.new(shape, dtype, "norm output", x.merged), node)


def layer_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """nn.LayerNorm: saves its input, mean and rstd; autocast runs it in float32 (autocast_mode.h, fp32 list)."""
    if tape.autocast is not None:
        bias = None if n.bias is None else ops.to(tape, n.bias.tensor(), "fp32", "bias, float32")
        weight = None if n.weight is None else ops.to(tape, n.weight.tensor(), "fp32", "weight, float32")
        source = ops.to(tape, x, "fp32", "float32 copy")
    else:
        bias = None if n.bias is None else n.bias.tensor()
        weight = None if n.weight is None else n.weight.tensor()
        source = x
    shape, dtype = source.shape, source.dtype
    rows = (*shape[:-1], 1)
    needs = [
        source.node is not None,
        weight is not None and weight.node is not None,
        bias is not None and bias.node is not None,
    ]
    small = shape[-1:]

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        into_x = tape.new(shape, dtype, "gradient of a norm") if needs[0] else None
        into_w = tape.new(small, dtype, "gradient of a norm weight") if needs[1] else None
        into_b = tape.new(small, dtype, "gradient of a norm bias") if needs[2] else None
        return [into_x, into_w, into_b]

    out = tape.new(shape, dtype, "norm output")
    average = tape.new(rows, "fp32", "mean")
    spread = tape.new(rows, "fp32", "reciprocal deviation")
    node = tape.node((source, weight, bias), backward, (bias, source, weight, average, spread))
    del spread, average
    return ops.done(out, node)


_NORMS = {
    "llama_rms_norm": rms_norm,
    "olmo_rms_norm": olmo_rms_norm,
    "helium_rms_norm": olmo_rms_norm,
    "gemma_rms_norm": gemma_rms_norm,
    "layer_norm": layer_norm,
    "layer_norm_1p": layer_norm,
    "olmo_layer_norm": layer_norm,
    "cohere_layer_norm": olmo_rms_norm,
}


# --- projections --------------------------------------------------------------------------------------------------


def project(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """A linear module with its adapter, if it has one."""
    if p.lora_a is None:
        return base(tape, x, p, s)
    if p.quantised:
        return lora_4bit(tape, x, p, s)
    return lora(tape, x, p, s)


def base(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """The module without adapter."""
    if p.quantised:
        return linear_4bit(tape, x, p, s)
    if p.conv1d:
        return conv1d(tape, x, p)
    return ops.linear(tape, x, p.weight, p.out_features, p.bias)


def lora(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """peft.tuners.lora.layer.Linear.forward."""
    assert p.lora_a is not None
    assert p.lora_b is not None
    result = base(tape, x, p, s)
    given = result.dtype
    x = ops.to(tape, x, p.lora_a.dtype, "adapter input, cast to the adapter's dtype")
    result = ops.add(
        tape, result, ops.scale(tape, down_up(tape, x, p, s), "adapter output, scaled"), "projection with adapter"
    )
    result = ops.to(tape, result, given, "projection with adapter, cast back")
    return result


def down_up(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """`lora_B(lora_A(dropout(x)))`; each argument lives until the module that takes it returns."""
    assert p.lora_a is not None
    assert p.lora_b is not None
    dropped = ops.dropout(tape, x, s.lora_dropout)
    low = ops.linear(tape, dropped, p.lora_a, s.rank, label="adapter, rank r")
    del dropped
    return ops.linear(tape, low, p.lora_b, p.out_features, label="adapter output")


def lora_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """peft.tuners.lora.bnb.Linear4bit.forward: the base's result is cloned, the input cast only without autocast."""
    assert p.lora_a is not None
    result = linear_4bit(tape, x, p, s)
    result = ops.copy(tape, result, "projection, cloned by PEFT")
    if tape.autocast is None:
        expected = result.dtype
        x = ops.to(tape, x, p.lora_a.dtype, "adapter input, cast to the adapter's dtype")
        output = ops.scale(tape, down_up(tape, x, p, s), "adapter output, scaled")
        output = ops.to(tape, output, expected, "adapter output, cast")
    else:
        output = ops.scale(tape, down_up(tape, x, p, s), "adapter output, scaled")
    result = ops.add(tape, result, output, "projection with adapter")
    return result


def conv1d(tape: Tape, x: Tensor, p: Projection) -> Tensor:
    """transformers' Conv1D: `torch.addmm(bias, x, weight)`."""
    return ops.linear(tape, x, p.weight, p.out_features, p.bias)


def linear_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """bitsandbytes' Linear4bit.forward: input to the compute dtype, product, back to the input's dtype."""
    given = x.dtype
    x = ops.to(tape, x, s.compute_dtype, "input cast to the compute dtype")
    return ops.to(tape, matmul_4bit(tape, x, p, s), given, "projection, cast back")


def matmul_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """MatMul4Bit: the weight is dequantised into a temporary, forward and backward; no input is saved."""
    shape, dtype = x.shape, x.dtype
    numel = p.in_features * p.out_features
    blocks = -(-numel // 64)

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        absmax = tape.new((blocks,), "fp32", "absmax, dequantised") if s.double_quant else None
        weight = tape.new((numel,), dtype, "weight, dequantised")
        del absmax
        grad = tape.new(shape, dtype, "gradient of an input")
        del weight
        return [grad]

    if s.double_quant:
        plain = tape.new((blocks,), "fp32", "absmax, dequantised")
        absmax = tape.new((blocks,), "fp32", "absmax with its offset")
    weight = tape.new((numel,), dtype, "weight, dequantised")
    out = tape.new((*shape[:-1], p.out_features), dtype, "projection")
    if s.double_quant:
        del absmax
        del plain
    del weight
    node = tape.node((x,), backward)
    return ops.done(out, node)


# --- attention ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Shared:
    """What the model makes once for all layers: rotary tables (cos, sin) and masks, by the layers' type."""

    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def of(self, kind: str, made: Callable[[Tensor, str], Tensor]) -> Shared:
        """What a layer of one type reads, each tensor as `made` gives it."""
        mine = Shared()
        if kind in self.tables:
            cos, sin = self.tables[kind]
            mine.tables[kind] = made(cos, "cosines"), made(sin, "sines")
        if kind in self.masks:
            mine.masks[kind] = made(self.masks[kind], "mask")
        return mine

    def ids(self) -> dict[str, int]:
        """The storage id of each tensor by a name."""
        named = {f"mask, {kind}": mask for kind, mask in self.masks.items()}
        for kind, (cos, sin) in self.tables.items():
            named |= {f"cosines, {kind}": cos, f"sines, {kind}": sin}
        return {name: tensor.storage.id for name, tensor in named.items() if tensor.storage is not None}


def layer_type(a: Attention) -> str:
    """transformers' name for a layer by its attention: config.layer_types."""
    return "full_attention" if a.sliding_window is None else "sliding_attention"


def self_attention(
    tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    """The attention module: projections, norms of q and k, rotary embedding, the kernel, the output projection."""
    a = layer.attention
    if a.mla is not None:
        raise NotImplementedError("latent attention")
    q, k, v = _fused(tape, x, layer, held, s) if a.qkv is not None else _separate(tape, x, a, held, s)
    tape.scope = "self_attn"
    kind = layer_type(a)
    kept: list[Tensor] = []
    if a.rotary_dim:
        q, k, kept = rotate(tape, q, k, *shared.tables[kind], a, layer.family)
    out, weights = kernels.attend(tape, q, k, v, a, s.kernel, shared.masks.get(kind))
    tape.scope = a.o
    out = project(tape, out, held.projections[a.o], s)
    del kept
    return out, weights  # q, k and v are locals of the module's forward until here


def _separate(tape: Tape, x: Tensor, a: Attention, held: Held, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from a projection each, normalised before or after they are cut into heads."""
    assert a.q is not None
    assert a.k is not None
    assert a.v is not None
    parts = []
    for name, norm_name, heads, size in (
        (a.q, a.q_norm, a.num_heads, a.head_dim),
        (a.k, a.k_norm, a.num_key_value_heads, a.head_dim),
        (a.v, None, a.num_key_value_heads, a.value_head_dim),
    ):
        tape.scope = name
        part = project(tape, x, held.projections[name], s)
        shape = (s.batch, heads, s.seq, size)
        if norm_name is None:
            part = ops.heads(tape, part, shape)
        elif a.qk_norm_over == "all":
            part = ops.heads(tape, norm(tape, part, held.norms[norm_name]), shape)
        else:
            part = norm(tape, ops.heads(tape, part, shape), held.norms[norm_name])
        parts.append(part)
        del part
    q, k, v = parts
    return q, k, v


def _fused(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v out of one projection: views of its output."""
    a = layer.attention
    assert a.qkv is not None
    tape.scope = a.qkv
    qkv = project(tape, x, held.projections[a.qkv], s)
    b, t = s.batch, s.seq
    flat = [(b, t, n * a.head_dim) for n in (a.num_heads, a.num_key_value_heads, a.num_key_value_heads)]
    cut = ops.split(tape, qkv, flat) if layer_splits(layer) else [ops.part(tape, qkv, shape) for shape in flat]
    q, k, v = (ops.heads(tape, part, (b, part.shape[-1] // a.head_dim, t, a.head_dim)) for part in cut)
    return q, k, v


def layer_splits(layer: Layer) -> bool:
    """Whether the fused projection is cut by split or chunk (one gradient) or by slices (one each)."""
    return layer.attention.qkv != "self_attn.qkv_proj"


# --- MLP ----------------------------------------------------------------------------------------------------------


def mlp(tape: Tape, x: Tensor, m: Mlp, held: Held, s: Settings) -> Tensor:
    """Gated (`down(act(gate(x)) * up(x))`), with gate and up fused, or plain (`down(act(up(x)))`)."""
    if m.gate_up is not None:
        tape.scope = m.gate_up
        both = project(tape, x, held.projections[m.gate_up], s)
        half = (*both.shape[:-1], m.intermediate_size)
        gate, up = ops.split(tape, both, [half, half])
        up = ops.mul(tape, up, activation(tape, gate, m.activation), "gated")
        tape.scope = m.down
        return project(tape, up, held.projections[m.down], s)
    assert m.up is not None
    if m.gate is not None:
        tape.scope = m.gate
        inner = activation(tape, project(tape, x, held.projections[m.gate], s), m.activation)
        tape.scope = m.up
        inner = ops.mul(tape, inner, project(tape, x, held.projections[m.up], s), "gated")
    else:
        tape.scope = m.up
        inner = project(tape, x, held.projections[m.up], s)
        inner = activation(tape, inner, m.activation)
    tape.scope = m.down
    return project(tape, inner, held.projections[m.down], s)


def activation(tape: Tape, x: Tensor, name: str) -> Tensor:
    """An activation by its transformers name."""
    if name in ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_fast_tanh", "quick_gelu"):
        return ops.unary(tape, x, name)
    if name == "relu":
        return ops.unary(tape, x, name, saves="result")
    if name in ("gelu_new", "gelu_fast"):
        return gelu_new(tape, x)
    if name == "relu2":
        return square_any(tape, ops.unary(tape, x, "relu", saves="result"))
    return ops.unary(tape, x, name)


def square_any(tape: Tape, x: Tensor) -> Tensor:
    """`torch.square`: pow, saved input; autocast runs pow in float32."""
    return square(tape, ops.to(tape, x, "fp32", "float32 copy") if tape.autocast else x)


def gelu_new(tape: Tape, x: Tensor) -> Tensor:
    """NewGELUActivation: `0.5 * x * (1.0 + tanh(sqrt(2 / pi) * (x + 0.044715 * pow(x, 3.0))))`, op by op."""
    half = ops.scale(tape, x, "half")
    wide = ops.to(tape, x, "fp32", "float32 copy") if tape.autocast else x
    cube = ops.scale(tape, square(tape, wide), "cube, scaled")
    del wide
    inner = ops.scale(tape, ops.add(tape, x, cube), "tanh argument")
    del cube
    bent = ops.shift(tape, ops.unary(tape, inner, "tanh", saves="result"), "1 + tanh")
    del inner
    return ops.mul(tape, half, bent, "gelu")


# --- the layer ----------------------------------------------------------------------------------------------------


def decoder_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """One decoder layer; `x` is [B, T, H], held by the caller."""
    if layer.parallel:
        return _parallel_layer(tape, x, layer, held, s, shared)
    residual = x
    hidden = _norm(tape, residual, layer.attention_norm, held)
    hidden, weights = self_attention(tape, hidden, layer, held, s, shared)  # `weights` stay until the layer returns
    if layer.attention_post_norm is not None:
        hidden = _norm(tape, hidden, layer.attention_post_norm, held)
    hidden = ops.dropout(tape, hidden, layer.attention.output_dropout)
    hidden = _add_residual(tape, residual, hidden, layer)
    residual = hidden
    hidden = _norm(tape, residual, layer.mlp_norm, held)
    hidden = _feed_forward(tape, hidden, layer, held, s)
    if layer.mlp_post_norm is not None:
        hidden = _norm(tape, hidden, layer.mlp_post_norm, held)
    hidden = _add_residual(tape, residual, hidden, layer)
    return hidden


def _add_residual(tape: Tape, residual: Tensor, hidden: Tensor, layer: Layer) -> Tensor:
    if layer.scaled_residual:
        return ops.add(tape, residual, ops.scale(tape, hidden, "branch, scaled"), "residual")
    return ops.add(tape, residual, hidden, "residual")


def _parallel_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """Attention and MLP read the same input (gpt_neox, phi, falcon, cohere, gptj)."""
    first = _norm(tape, x, layer.attention_norm, held)
    second = first if layer.mlp_norm == layer.attention_norm else None
    attended, weights = self_attention(tape, first, layer, held, s, shared)  # `weights` stay until the layer returns
    if second is None:
        second = _norm(tape, x, layer.mlp_norm, held)
    fed = _feed_forward(tape, second, layer, held, s)
    return ops.add(tape, ops.add(tape, fed, attended, "both branches"), x, "residual")


def _norm(tape: Tape, x: Tensor, name: str | None, held: Held) -> Tensor:
    if name is None:
        return x
    tape.scope = name
    return norm(tape, x, held.norms[name])


def _feed_forward(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> Tensor:
    if isinstance(layer.mlp, Mlp):
        out = mlp(tape, x, layer.mlp, held, s)
        return ops.dropout(tape, out, layer.mlp.dropout)
    raise NotImplementedError("mixture of experts")


def token_count(s: Settings) -> int:
    """Tokens of one micro-step."""
    return prod((s.batch, s.seq))
