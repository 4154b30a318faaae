"""The decoder block, op by op: norms, projections with their adapters, rotary embedding, attention, MLP, residuals.

Each function follows the code of transformers (models/*/modeling_*.py), PEFT (tuners/lora/layer.py, bnb.py) and
bitsandbytes (nn/modules.py, autograd/_functions.py) statement by statement, down to which local variable holds a
tensor and for how long, because that decides what is alive at a peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vramplan.planner import activations, few_tokens, latent, moe, older_attention, ops
from vramplan.planner import attention as kernels
from vramplan.planner.layers import Mlp
from vramplan.planner.paper import H200, Multiprocessors, Parameter, Tape, Tensor
from vramplan.planner.rotary import rotate
from vramplan.planner.versions import GPTJ_BY_LAYER

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.cache import Cache
    from vramplan.planner.layers import Attention, Layer, Module, Moe


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
    capability: tuple[int, int] | None = (9, 0)  # the GPU's compute capability; None: not CUDA
    multiprocessors: Multiprocessors = H200
    torch: tuple[int, int] = (2, 11)  # the version whose rules are played
    hooked: bool = False  # fully_shard's hooks run where modules begin and end
    caches_as_keys: bool = False  # generation holds values in the keys' dtype (DynamicLayer.lazy_initialization)
    keeps_wide: bool = True  # weights that are float32 in any model are computed with as such
    masked_experts: bool = True  # transformers 5.17 zeroes rows of other ranks' experts even where there are none
    mode: Literal["training", "evaluation", "generation"] = "training"
    past: int = 0  # tokens of each row that the cache holds: seq is what comes to them
    saves_inputs: bool = False  # linear layers save their input, whether or not their weight is trained

    @property
    def frozen_dtype(self) -> str:
        """The dtype of base weights that are not quantised."""
        return "fp32" if self.method == "qlora" and self.prepare_kbit else self.weights_dtype

    @property
    def tape(self) -> Tape:
        """An empty tape in the modes that a forward begins in."""
        tape = Tape(self.autocast, self.multiprocessors, grad=self.mode == "training")
        tape.saves_inputs = self.saves_inputs
        return tape


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
    adds_bias: bool = False  # after the product, in an op of its own


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
    factors: dict[str, tuple[Parameter, Parameter]] = field(default_factory=dict)  # A and B of what is not linear
    parameters: list[Parameter] = field(default_factory=list)  # trainable ones, in registration order


def hold(
    modules: tuple[Module, ...], s: Settings, adapted: frozenset[str], quantised: frozenset[str], tied: str = ""
) -> Held:
    """The parameters of `modules`: dtypes, which are trained, which carry an adapter.

    `tied` names the token embedding among them whose matrix the head shares.
    """
    held = Held()
    full = s.method == "full"
    for module in modules:
        made: dict[str, Parameter] = {}
        for weight in module.weights:
            if tied and module.role == "head" and weight.name == "weight":
                made[weight.name] = held.others[tied]["weight"]
                continue
            dtype = s.weights_dtype if full else s.frozen_dtype
            dtype = weight.dtype(dtype) if s.keeps_wide else dtype
            made[weight.name] = Parameter(f"{module.name}.{weight.name}", weight.shape, dtype, full)
            if full:
                held.parameters.append(made[weight.name])
        if module.kind in ("linear", "conv1d"):
            p = Projection(
                made["weight"],
                made.get("bias"),
                module.in_features,
                module.out_features,
                module.name in quantised,
                module.kind == "conv1d",
                adds_bias=module.variant == "falcon_linear",
            )
            if module.name in adapted:
                p.lora_a = Parameter(f"{module.name}.lora_A", (s.rank, p.in_features), s.adapter_dtype, True)
                p.lora_b = Parameter(f"{module.name}.lora_B", (p.out_features, s.rank), s.adapter_dtype, True)
                held.parameters += (p.lora_a, p.lora_b)
            held.projections[module.name] = p
        elif module.kind == "norm":
            held.norms[module.name] = Norm(module.variant, made.get("weight"), made.get("bias"))
        else:
            held.others[module.name] = made
            if module.name in adapted and module.kind == "embedding":
                a = Parameter(f"{module.name}.lora_embedding_A", (s.rank, module.in_features), s.adapter_dtype, True)
                b = Parameter(f"{module.name}.lora_embedding_B", (module.out_features, s.rank), s.adapter_dtype, True)
                held.factors[module.name] = (a, b)
                held.parameters += (a, b)
            elif module.name in adapted:
                _wrap(held, module, s)
    return held


def _wrap(held: Held, module: Module, s: Settings) -> None:
    """peft's ParamWrapper: A and B beside each bare weight, of every expert; fused gate and up count twice."""
    for weight in module.weights:
        if "bias" in weight.name:
            continue
        *count, outputs, inputs = weight.shape
        rank = s.rank * (count[0] if count else 1) * (2 if weight.name == "gate_up_proj" else 1)
        name = f"{module.name}.{weight.name}"
        a = Parameter(f"{name}.lora_A", (rank, inputs), s.adapter_dtype, True)
        b = Parameter(f"{name}.lora_B", (outputs, rank), s.adapter_dtype, True)
        held.factors[name] = (a, b)
        held.parameters += (a, b)


# --- norms --------------------------------------------------------------------------------------------------------


def norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """The norm that the architecture names; `x` is held by the caller throughout."""
    return _NORMS[n.variant](tape, x, n)


def mean(tape: Tape, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x.mean(-1, keepdim=True)`: its gradient is expanded and divided, so as large as `x` (MeanBackward1)."""
    whole, dtype = x.shape, x.dtype
    node = tape.node((x,), lambda g, _: [tape.new(whole, dtype, "gradient of a mean", ops.layout(g))])
    return ops.done(tape.new(shape, dtype, "mean", x.merged), node)


# The norms repeat each other's first lines on purpose: in a function of their own its locals would go when it returns,
# and the mean square lives until the whole norm does.


def rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """LlamaRMSNorm: float32 inside, back to the input's dtype, then the weight."""
    assert n.weight is not None
    input_dtype = x.dtype
    hidden = ops.to(tape, x, "fp32", "float32 copy")
    small = (*hidden.shape[:-1], 1)
    variance = mean(tape, ops.square(tape, hidden), small)
    hidden = ops.mul(tape, hidden, rsqrt(tape, ops.shift(tape, variance)), "normalised, float32")
    return weighted(tape, n.weight, ops.to(tape, hidden, input_dtype, "normalised"))


def olmo_rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """Olmo2RMSNorm: the weight is applied in float32 and the product cast back."""
    assert n.weight is not None
    input_dtype = x.dtype
    hidden = ops.to(tape, x, "fp32", "float32 copy")
    small = (*hidden.shape[:-1], 1)
    variance = mean(tape, ops.square(tape, hidden), small)
    hidden = ops.mul(tape, hidden, rsqrt(tape, ops.shift(tape, variance)), "normalised, float32")
    return ops.to(tape, weighted(tape, n.weight, hidden), input_dtype, "norm output")


def cohere_layer_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """CohereLayerNorm: mean and variance by hand in float32, the weight in float32, cast back."""
    assert n.weight is not None
    input_dtype = x.dtype
    hidden = ops.to(tape, x, "fp32", "float32 copy")
    small = (*hidden.shape[:-1], 1)
    average = mean(tape, hidden, small)
    variance = mean(tape, ops.square(tape, ops.sub(tape, hidden, average)), small)
    hidden = ops.mul(
        tape, ops.sub(tape, hidden, average), rsqrt(tape, ops.shift(tape, variance)), "normalised, float32"
    )
    wide = ops.to(tape, n.weight.tensor(), "fp32", "weight, float32")
    *heads, size = wide.shape
    wide = wide.view(*heads, *[1] * len(heads), size)  # of q and k: each head's own, before the tokens here
    hidden = ops.mul(tape, wide, hidden, "norm output, float32")
    return ops.to(tape, hidden, input_dtype, "norm output")


def gemma_rms_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """GemmaRMSNorm: float32, times (1 + weight), cast back."""
    assert n.weight is not None
    # output = self._norm(x.float()): the float32 copy lives as the argument until _norm returns
    copy = ops.to(tape, x, "fp32", "float32 copy")
    small = (*copy.shape[:-1], 1)
    output = ops.mul(
        tape, copy, rsqrt(tape, ops.shift(tape, mean(tape, ops.square(tape, copy), small))), "normalised, float32"
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
    needs_w, needs_x = w.node is not None, x.node is not None

    def backward(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
        into_x = into_w = None
        if needs_x:
            into_x = tape.new(shape, dtype, "gradient of a norm", ops.layout(grads))
        if needs_w:
            into_w = tape.new(shape, dtype, "gradient of a norm weight, unsummed")
        return [into_w, into_x]

    fits = ((w.shape, w.dtype), (x.shape, x.dtype))
    node = tape.node((w, x), backward, (x if needs_w else None, w if needs_x else None), fits=fits)
    return ops.done(tape.new(shape, dtype, "norm output", x.merged), node)


def layer_norm(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """nn.LayerNorm; autocast runs it in float32 and casts its arguments, the last first (autocast_mode.h)."""
    bias = None if n.bias is None else n.bias.tensor()
    weight = None if n.weight is None else n.weight.tensor()
    if tape.autocast is None:
        return native_layer_norm(tape, x, weight, bias)
    bias = None if bias is None else ops.to(tape, bias, "fp32", "bias, float32")
    weight = None if weight is None else ops.to(tape, weight, "fp32", "weight, float32")
    return native_layer_norm(tape, ops.to(tape, x, "fp32", "float32 copy"), weight, bias)


def layer_norm_1p(tape: Tape, x: Tensor, n: Norm) -> Tensor:
    """NemotronLayerNorm1P: weight + 1, everything in autocast's dtype, autocast off."""
    assert n.weight is not None
    weight = ops.lower(tape, ops.shift(tape, n.weight.tensor(), "1 + weight"))
    return native_layer_norm(
        tape, ops.lower(tape, x), weight, None if n.bias is None else ops.lower(tape, n.bias.tensor())
    )


def olmo_layer_norm(tape: Tape, x: Tensor, _: Norm) -> Tensor:
    """OlmoLayerNorm: F.layer_norm of the float32 input without weight or bias, cast back."""
    out = native_layer_norm(tape, ops.to(tape, x, "fp32", "float32 copy"), None, None)
    return ops.to(tape, out, x.dtype, "norm output, cast back")


def native_layer_norm(tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`F.layer_norm`: saves its input, mean and reciprocal deviation."""
    shape, dtype = x.shape, x.dtype
    rows = (*shape[:-1], 1)
    needs = [
        x.node is not None,
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
    node = tape.node((x, weight, bias), backward, (bias, x, weight, average, spread))
    del spread, average
    return ops.done(out, node)


_NORMS = {
    "llama_rms_norm": rms_norm,
    "olmo_rms_norm": olmo_rms_norm,
    "helium_rms_norm": olmo_rms_norm,
    "gemma_rms_norm": gemma_rms_norm,
    "layer_norm": layer_norm,
    "layer_norm_1p": layer_norm_1p,
    "olmo_layer_norm": olmo_layer_norm,
    "cohere_layer_norm": cohere_layer_norm,
}


# --- projections --------------------------------------------------------------------------------------------------


def project(tape: Tape, x: Tensor, p: Projection, s: Settings, label: str = "projection") -> Tensor:
    """A linear module with its adapter, if it has one."""
    if p.lora_a is None:
        return base(tape, x, p, s, label)
    if p.quantised:
        return lora_4bit(tape, x, p, s)
    return lora(tape, x, p, s, label)


def base(tape: Tape, x: Tensor, p: Projection, s: Settings, label: str = "projection") -> Tensor:
    """The module without adapter."""
    if p.quantised:
        return linear_4bit(tape, x, p, s)
    if p.conv1d:
        return conv1d(tape, x, p)
    if p.adds_bias and p.bias is not None:  # FalconLinear
        return ops.add(tape, ops.linear(tape, x, p.weight, p.out_features), p.bias, f"{label} with bias")
    return ops.linear(tape, x, p.weight, p.out_features, p.bias, label)


def lora(tape: Tape, x: Tensor, p: Projection, s: Settings, label: str = "projection") -> Tensor:
    """peft.tuners.lora.layer.Linear.forward."""
    assert p.lora_a is not None
    assert p.lora_b is not None
    result = base(tape, x, p, s, label)
    given = result.dtype
    x = ops.to(tape, x, p.lora_a.dtype, "adapter input, cast to the adapter's dtype")
    result = ops.add(
        tape, result, ops.scale(tape, down_up(tape, x, p, s, label), f"{label}: adapter output, scaled"),
        f"{label} with adapter",
    )  # fmt: skip
    result = ops.to(tape, result, given, f"{label} with adapter, cast back")
    return result  # noqa: RET504 - the name lets go of what it held before


def down_up(tape: Tape, x: Tensor, p: Projection, s: Settings, label: str = "projection") -> Tensor:
    """`lora_B(lora_A(dropout(x)))`; each argument lives until the module that takes it returns."""
    assert p.lora_a is not None
    assert p.lora_b is not None
    dropped = ops.dropout(tape, x, s.lora_dropout)
    low = ops.linear(tape, dropped, p.lora_a, s.rank, label="adapter, rank r")
    del dropped
    return ops.linear(tape, low, p.lora_b, p.out_features, label=f"{label}: adapter output")


def lora_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """peft.tuners.lora.bnb.Linear4bit.forward: the base's result is cloned, the input cast only without autocast."""
    assert p.lora_a is not None
    result = linear_4bit(tape, x, p, s)
    result = ops.copy(tape, result, "projection, cloned by PEFT")
    if tape.autocast is None:
        expected = result.dtype
        x = ops.to(tape, x, p.lora_a.dtype, "adapter input, cast to the adapter's dtype")
        output = ops.scale(tape, down_up(tape, x, p, s), "projection: adapter output, scaled")
        output = ops.to(tape, output, expected, "projection: adapter output, cast")
    else:
        output = ops.scale(tape, down_up(tape, x, p, s), "projection: adapter output, scaled")
    result = ops.add(tape, result, output, "projection with adapter")
    return result  # noqa: RET504 - the name lets go of what it held before


def conv1d(tape: Tape, x: Tensor, p: Projection) -> Tensor:
    """transformers' Conv1D: `torch.addmm(bias, x, weight)`."""
    return ops.linear(tape, x, p.weight, p.out_features, p.bias)


def linear_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """bitsandbytes' Linear4bit.forward: input to the compute dtype, product, back to the input's dtype.

    A bias has the compute dtype: the first forward casts it for good.
    """
    given = x.dtype
    x = ops.to(tape, x, s.compute_dtype, "input cast to the compute dtype")
    return ops.to(tape, matmul_4bit(tape, x, p, s), given, "projection, cast back")


def matmul_4bit(tape: Tape, x: Tensor, p: Projection, s: Settings) -> Tensor:
    """MatMul4Bit: saves no input, and the weight is dequantised into a temporary, in forward unless tokens are few.

    Backward dequantises into the dtype that the weight was quantised from.
    """
    shape, dtype = x.shape, x.dtype
    numel = p.in_features * p.out_features
    blocks = -(-numel // 64)
    rows = x.numel // p.in_features

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        absmax = tape.new((blocks,), "fp32", "absmax, dequantised") if s.double_quant else None
        weight = tape.new((numel,), s.weights_dtype, "weight, dequantised")
        del absmax
        if s.weights_dtype != dtype:
            weight = tape.new((numel,), dtype, "weight, dequantised and cast")
        grad = tape.new(shape, dtype, "gradient of an input")
        del weight
        return [grad]

    node = tape.node((x,), backward)
    if few_tokens.is_fused(rows, p.out_features, p.in_features, dtype, s.capability, s.multiprocessors.number):
        return ops.done(tape.new((*shape[:-1], p.out_features), dtype, "projection"), node)
    if s.double_quant:
        plain = tape.new((blocks,), "fp32", "absmax, dequantised")
        absmax = tape.new((blocks,), "fp32", "absmax with its offset")
    weight = tape.new((numel,), dtype, "weight, dequantised")
    out = tape.new((*shape[:-1], p.out_features), dtype, "projection")
    if s.double_quant:
        del absmax
        del plain
    del weight
    return ops.done(out, node)


# --- attention ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Shared:
    """What the model makes once for all layers: rotary tables (cos, sin) and masks, by the layers' type; alibi.

    Layers are given `positions` too: they read the tables instead, but a checkpointed call holds its arguments.
    """

    positions: Tensor | None = None
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    cache: Cache | None = None  # of the one layer that reads this, while it generates
    returned: list[Tensor] = field(default_factory=list)  # what that layer returns beside its output

    def of(self, kind: str, made: Callable[[Tensor, str], Tensor]) -> Shared:
        """What a layer of one type reads, each tensor as `made` gives it."""
        mine = Shared()
        if self.positions is not None:
            mine.positions = made(self.positions, "position_ids")
        if kind in self.tables:
            cos, sin = self.tables[kind]
            mine.tables[kind] = made(cos, "cosines"), made(sin, "sines")
        for name in (kind, "alibi"):
            if name in self.masks:
                mine.masks[name] = made(self.masks[name], "mask" if name == kind else name)
        return mine

    def ids(self) -> dict[str, int]:
        """The storage id of each tensor by a name."""
        named = {f"mask, {kind}": mask for kind, mask in self.masks.items()}
        if self.positions is not None:
            named["position_ids"] = self.positions
        for kind, (cos, sin) in self.tables.items():
            named |= {f"cosines, {kind}": cos, f"sines, {kind}": sin}
        return {name: tensor.storage.id for name, tensor in named.items() if tensor.storage is not None}


def layer_type(a: Attention) -> str:
    """transformers' name for a layer by its attention: config.layer_types."""
    return "full_attention" if a.sliding_window is None else "sliding_attention"


# q, k, v and what else the attention's forward keeps in locals
_Heads = tuple["Tensor", "Tensor", "Tensor", list["Tensor"]]


def self_attention(
    tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    """The attention module: projections, norms of q and k, rotary embedding, the kernel, the output projection."""
    a = layer.attention
    if layer.family in _ATTENTION:
        return _ATTENTION[layer.family](tape, x, layer, held, s, shared)
    if a.mla is not None:
        return _latent_attention(tape, x, layer, held, s, shared)
    q, k, v, whole = _fused(tape, x, layer, held, s) if a.qkv is not None else _separate(tape, x, layer, held, s)
    tape.scope = "self_attn"
    kind = layer_type(a)
    parts: list[Tensor] = []
    if a.rotary_dim:
        q, k, parts = rotate(tape, q, k, *shared.tables[kind], a, layer.family)
    if shared.cache is not None:
        k, v = shared.cache.update(tape, k, v)
    mask = shared.masks.get(kind)
    out, weights = kernels.attend(tape, q, k, v, a, s, mask, family=layer.family)
    tape.scope = a.o
    out = project(tape, out, held.projections[a.o], s)
    if layer.family in _DROPS_INSIDE:
        out = ops.dropout(tape, out, a.output_dropout)
    del whole, q, k, v, parts  # locals of the module's forward until here
    return out, weights


def _latent_attention(
    tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    a = layer.attention
    q, k, v, kept = latent.queries_keys_values(tape, x, layer, held, s, shared)
    tape.scope = "self_attn"
    out, weights = kernels.attend(tape, q, k, v, a, s, shared.masks.get(layer_type(a)))
    tape.scope = a.o
    out = project(tape, out, held.projections[a.o], s)
    del kept, q, k, v
    return out, weights


# Families whose attention drops its own output; elsewhere the layer does.
_DROPS_INSIDE = frozenset({"gpt2", "gpt_bigcode", "gptj", GPTJ_BY_LAYER, "seed_oss", "starcoder2"})
# Families whose attention is a function of its own.
_ATTENTION = {
    "falcon": older_attention.falcon,
    "gptj": older_attention.gptj,
    GPTJ_BY_LAYER: older_attention.gptj_by_layer,
    "mpt": older_attention.mpt,
}


def _separate(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> _Heads:
    """q, k and v from a projection each, normalised before or after they are cut into heads."""
    a = layer.attention
    assert a.q is not None
    assert a.k is not None
    assert a.v is not None
    late = layer.family in _LATE_HEADS or a.qk_norm_over == "all"
    later = layer.family in _LATE_NORMS
    parts = []
    for name, norm_name, heads, size in (
        (a.q, a.q_norm, a.num_heads, a.head_dim),
        (a.k, a.k_norm, a.num_key_value_heads, a.head_dim),
        (a.v, None, a.num_key_value_heads, a.value_head_dim),
    ):
        tape.scope = name
        part = project(tape, x, held.projections[name], s)
        if layer.family == "opt" and name == a.q:
            part = ops.scale(tape, part, "q, scaled")
        if norm_name is not None and a.qk_norm_over == "all":
            part = norm(tape, part, held.norms[norm_name])
        if not late:
            part = ops.heads(tape, part, (s.batch, heads, s.seq, size))
        if norm_name is not None and a.qk_norm_over != "all" and not later:
            part = norm(tape, part, held.norms[norm_name])
        parts.append(part)
        del part
    if late:
        for i, part in enumerate(parts):
            parts[i] = ops.heads(tape, part, _head_shape(part, i, a, s))
            del part
    if later and a.q_norm is not None and a.k_norm is not None:
        parts[0] = norm(tape, parts[0], held.norms[a.q_norm])
        parts[1] = norm(tape, parts[1], held.norms[a.k_norm])
    q, k, v = parts
    return q, k, v, []


# Families whose forward projects q, k and v before it cuts any of them into heads.
_LATE_HEADS = frozenset({"olmo", "opt", "stablelm"})


# Families that normalise q and k when all three are cut into heads.
_LATE_NORMS = frozenset({"apertus", "cohere", "exaone4", "gemma3_text", "glm4_moe", "phi", "stablelm"})


def _head_shape(part: Tensor, i: int, a: Attention, s: Settings) -> tuple[int, ...]:
    size = a.value_head_dim if i == 2 else a.head_dim
    return (s.batch, part.shape[-1] // size, s.seq, size)


def _fused(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> _Heads:
    """q, k and v out of one projection: views of its output, or copies beside it."""
    a = layer.attention
    assert a.qkv is not None
    tape.scope = a.qkv
    qkv = project(tape, x, held.projections[a.qkv], s)
    b, t, d = s.batch, s.seq, a.head_dim
    counts = (a.num_heads, a.num_key_value_heads, a.num_key_value_heads)
    if layer.family == "gpt_neox":  # each head's q, k and v side by side
        heads = ops.heads(tape, qkv, (b, a.num_heads, t, 3 * d))
        q, k, v = ops.split(tape, heads, [(b, n, t, d) for n in counts])
        return q, k, v, []
    flat = [(b, t, n * d) for n in counts]
    sliced = layer.family == "phi3"
    cut = [ops.part(tape, qkv, shape) for shape in flat] if sliced else ops.split(tape, qkv, flat)
    k, v, q = (ops.heads(tape, cut[i], (b, counts[i], t, d)) for i in (1, 2, 0))
    return q, k, v, []


# --- MLP ----------------------------------------------------------------------------------------------------------


def mlp(tape: Tape, x: Tensor, m: Mlp, held: Held, s: Settings, residual: Tensor | None = None) -> Tensor:
    """Gated (`down(act(gate(x)) * up(x))`), with gate and up fused, or plain (`down(act(up(x)))`).

    A plain one that is given the residual adds it itself.
    """
    if m.gate_up is not None:
        tape.scope = m.gate_up
        up = project(tape, x, held.projections[m.gate_up], s)
        half = (*up.shape[:-1], m.intermediate_size)
        gate, up = ops.split(tape, up, [half, half])
        up = ops.mul(tape, up, activations.activation(tape, gate, m.activation, trained=s.method == "full"), "gated")
        tape.scope = m.down
        out = project(tape, up, held.projections[m.down], s)
        del up, gate
        return out
    assert m.up is not None
    if m.gate is not None:
        tape.scope = m.gate
        inner = activations.activation(tape, project(tape, x, held.projections[m.gate], s), m.activation)
        tape.scope = m.up
        inner = ops.mul(tape, inner, project(tape, x, held.projections[m.up], s), "gated")
    else:
        tape.scope = m.up
        inner = project(tape, x, held.projections[m.up], s)
        inner = activations.activation(tape, inner, m.activation, trained=s.method == "full")
    tape.scope = m.down
    out = project(tape, inner, held.projections[m.down], s)
    if residual is None:
        return out
    total = ops.add(tape, residual, ops.dropout(tape, out, m.dropout), "residual")
    del inner
    return total


# --- the layer ----------------------------------------------------------------------------------------------------


def decoder_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """One decoder layer; `x` is [B, T, H], held by the caller.

    Where the family's class returns the attention weights too, evaluation and generation hold them beyond the layer.
    """
    if layer.family in _LAYERS:
        return _LAYERS[layer.family](tape, x, layer, held, s, shared)
    if layer.parallel:
        return _parallel_layer(tape, x, layer, held, s, shared)
    residual = x
    hidden = _norm(tape, residual, layer.attention_norm, held)
    hidden, _weights = self_attention(tape, hidden, layer, held, s, shared)  # `_weights` stay until the layer returns
    if layer.attention_post_norm is not None:
        hidden = _norm(tape, hidden, layer.attention_post_norm, held)
    if layer.family not in _DROPS_INSIDE:
        hidden = ops.dropout(tape, hidden, layer.attention.output_dropout)
    hidden = _add_residual(tape, residual, hidden, layer)
    residual = hidden
    hidden = _norm(tape, residual, layer.mlp_norm, held)
    hidden = _feed_forward(tape, hidden, layer, held, s)
    if layer.family == "gpt_oss":
        _weights = None  # the MLP returns a second value too, under the same name
    if layer.mlp_post_norm is not None:
        hidden = _norm(tape, hidden, layer.mlp_post_norm, held)
    hidden = _add_residual(tape, residual, hidden, layer)
    return hidden  # noqa: RET504 - the name lets go of what it held before


def _add_residual(tape: Tape, residual: Tensor, hidden: Tensor, layer: Layer) -> Tensor:
    if layer.scaled_residual:
        return ops.add(tape, residual, ops.scale(tape, hidden, "branch, scaled"), "residual")
    return ops.add(tape, residual, hidden, "residual")


def _parallel_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """Attention and MLP read the same input (gpt_neox, phi, cohere, gptj)."""
    given = [_norm(tape, x, layer.attention_norm, held)]
    second = given[0] if layer.mlp_norm == layer.attention_norm else None
    attended, _weights = self_attention(tape, given.pop(), layer, held, s, shared)
    if layer.family == GPTJ_BY_LAYER:
        _return(tape, _weights, shared)
    if layer.family not in _DROPS_INSIDE:
        attended = ops.dropout(tape, attended, layer.attention.output_dropout)
    fed = _feed_forward(tape, second if second is not None else _norm(tape, x, layer.mlp_norm, held), layer, held, s)
    if layer.family in ("cohere", "cohere2"):
        return ops.add(tape, ops.add(tape, x, attended, "residual and attention"), fed, "residual")
    return ops.add(tape, ops.add(tape, fed, attended, "both branches"), x, "residual")


def _falcon_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """FalconDecoderLayer: in parallel the branches are added in place; all stays in locals until it returns."""
    residual = x
    first = _norm(tape, x, layer.attention_norm, held)
    second = first
    if layer.parallel and layer.mlp_norm != layer.attention_norm:
        second = _norm(tape, x, layer.mlp_norm, held)
    attended, _weights = self_attention(tape, first, layer, held, s, shared)
    _return(tape, _weights, shared)
    if not layer.parallel:
        residual = ops.add(tape, residual, ops.dropout(tape, attended, layer.attention.output_dropout), "residual")
        second = _norm(tape, residual, layer.mlp_norm, held)
    fed = _feed_forward(tape, second, layer, held, s)
    if layer.parallel:
        fed = ops.add_(tape, fed, attended)
    return ops.add(tape, residual, fed, "residual")


def _return(tape: Tape, weights: Tensor | None, shared: Shared) -> None:
    """The block's tuple of outputs stays until the next block has returned (a training step saves them anyway)."""
    if weights is not None and not tape.grad:
        shared.returned.append(weights)


def _bloom_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """BloomBlock: the attention adds the residual itself."""
    normed = _norm(tape, x, layer.attention_norm, held)
    hidden, _weights = older_attention.bloom(tape, normed, x, layer, held, s, shared)
    _return(tape, _weights, shared)
    normed = _norm(tape, hidden, layer.mlp_norm, held)
    assert isinstance(layer.mlp, Mlp)
    return mlp(tape, normed, layer.mlp, held, s, residual=hidden)


def _mpt_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """MptBlock: the attention's output and the norms' stay in locals until the block returns."""
    normed = _norm(tape, x, layer.attention_norm, held)
    attended, _weights = self_attention(tape, normed, layer, held, s, shared)
    _return(tape, _weights, shared)
    hidden = ops.add(tape, attended, x, "residual")
    normed = _norm(tape, hidden, layer.mlp_norm, held)
    assert isinstance(layer.mlp, Mlp)
    return mlp(tape, normed, layer.mlp, held, s, residual=hidden)


def _gpt2_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """GPT2Block: the attention's output stays in a local until the block returns."""
    hidden = _norm(tape, x, layer.attention_norm, held)
    attended, _weights = self_attention(tape, hidden, layer, held, s, shared)
    hidden = ops.add(tape, attended, x, "residual")
    residual = hidden
    hidden = _norm(tape, hidden, layer.mlp_norm, held)
    fed = _feed_forward(tape, hidden, layer, held, s)
    hidden = ops.add(tape, residual, fed, "residual")
    del residual
    del attended
    return hidden


def _opt_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """OPTDecoderLayer: norms before the branches, or after the additions; the MLP runs in the layer's forward."""
    before = not layer.post_norm_residual
    hidden = _norm(tape, x, layer.attention_norm, held) if before else x
    hidden, _weights = self_attention(tape, hidden, layer, held, s, shared)
    hidden = ops.dropout(tape, hidden, layer.attention.output_dropout)
    hidden = ops.add(tape, x, hidden, "residual")
    if not before:
        hidden = _norm(tape, hidden, layer.attention_norm, held)
    residual = hidden = ops.view(tape, hidden, (s.batch * s.seq, hidden.shape[-1]))
    if before:
        hidden = _norm(tape, hidden, layer.mlp_norm, held)
    assert isinstance(layer.mlp, Mlp)
    assert layer.mlp.up is not None
    tape.scope = layer.mlp.up
    hidden = project(tape, hidden, held.projections[layer.mlp.up], s)
    hidden = activations.activation(tape, hidden, layer.mlp.activation)
    tape.scope = layer.mlp.down
    hidden = project(tape, hidden, held.projections[layer.mlp.down], s)
    hidden = ops.dropout(tape, hidden, layer.mlp.dropout)
    hidden = ops.view(tape, ops.add(tape, residual, hidden, "residual"), x.shape)
    return hidden if before else _norm(tape, hidden, layer.mlp_norm, held)


def _stablelm_layer(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: Shared) -> Tensor:
    """StableLmDecoderLayer: the first norm's output and the attention's stay in locals until it returns."""
    residual = x
    hidden = _norm(tape, x, layer.attention_norm, held)
    attended, _weights = self_attention(tape, hidden, layer, held, s, shared)
    if layer.parallel:
        fed = _feed_forward(tape, hidden, layer, held, s)
        return ops.add(tape, ops.add(tape, residual, attended, "residual and attention"), fed, "residual")
    residual = ops.add(tape, residual, attended, "residual")
    fed = _feed_forward(tape, _norm(tape, residual, layer.mlp_norm, held), layer, held, s)
    hidden = ops.add(tape, residual, fed, "residual")
    del residual
    del attended
    return hidden


_LAYERS = {
    "bloom": _bloom_layer,
    "falcon": _falcon_layer,
    "gpt2": _gpt2_layer,
    "gpt_bigcode": _gpt2_layer,
    "mpt": _mpt_layer,
    "opt": _opt_layer,
    "stablelm": _stablelm_layer,
}


def _norm(tape: Tape, x: Tensor, name: str | None, held: Held) -> Tensor:
    if name is None:
        return x
    tape.scope = name
    return norm(tape, x, held.norms[name])


def _feed_forward(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings) -> Tensor:
    if isinstance(layer.mlp, Mlp):
        out = mlp(tape, x, layer.mlp, held, s)
        return ops.dropout(tape, out, layer.mlp.dropout)
    return mixture(tape, x, layer, layer.mlp, held, s)


def mixture(tape: Tape, x: Tensor, layer: Layer, m: Moe, held: Held, s: Settings) -> Tensor:
    """The sparse block: router, experts, and the experts that all tokens share."""
    rows = (s.batch * s.seq, x.shape[-1])
    if m.shared is not None and m.shared_gate is None:
        return _with_shared_experts(tape, x, rows, layer, m, m.shared, held, s)
    flat = ops.view(tape, x, rows)
    shared = mlp(tape, flat, m.shared, held, s) if m.shared is not None else None
    logits, weights, ids = moe.route(tape, flat, m, held, layer.family)
    out = moe.experts(tape, flat, weights, m, held, s, layer.family)
    if shared is not None and m.shared_gate is not None:
        tape.scope = m.shared_gate
        opened = ops.unary(tape, project(tape, flat, held.projections[m.shared_gate], s), "sigmoid", saves="result")
        shared = ops.mul(tape, opened, shared, "shared expert, gated")
        out = ops.add(tape, out, shared, "output of all experts")
    out = ops.view(tape, out, x.shape)
    del flat, shared, logits, weights, ids
    return out


def _with_shared_experts(
    tape: Tape, x: Tensor, rows: tuple[int, int], layer: Layer, m: Moe, shared: Mlp, held: Held, s: Settings
) -> Tensor:
    """DeepseekV3MoE: router and experts each on a view of their own, the shared experts on the block's input."""
    logits, weights, ids = moe.route(tape, ops.view(tape, x, rows), m, held, layer.family)
    out = moe.experts(tape, ops.view(tape, x, rows), weights, m, held, s, layer.family)
    out = ops.add(tape, ops.view(tape, out, x.shape), mlp(tape, x, shared, held, s), "output of all experts")
    del logits, weights, ids
    return out
