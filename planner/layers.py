"""What a model is made of: weights, modules, attention, MLP, layers, and the whole architecture.

Shapes are those of the tensors in transformers' state dict. Legend: V vocabulary, H hidden size, I intermediate size,
N query heads, K key-value heads, D head dimension, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal["linear", "conv1d", "embedding", "norm", "router", "experts", "parameter"]
Role = Literal[
    "token_embedding",
    "position_embedding",
    "norm",
    "attention",
    "mlp",
    "router",
    "experts",
    "head",
    "projection",
    "other",
]


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter: its name within its module ("weight", "bias", "gate_up_proj") and its shape.

    `wide`: it is float32 whatever the model is loaded in (transformers, _keep_in_fp32_modules_strict).
    """

    name: str
    shape: tuple[int, ...]
    wide: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dtype(self, model: str) -> str:
        """The dtype that it has in a model that is loaded in `model`."""
        return "fp32" if self.wide else model


@dataclass(frozen=True, slots=True)
class Module:
    """One module that owns parameters (or a norm without any), as transformers builds it.

    `name` is the path inside its layer ("self_attn.q_proj") or, outside the layers, inside the model ("lm_head").
    `kind` says how PEFT and bitsandbytes see it: "linear" holds its weight as (out, in), "conv1d" (transformers'
    Conv1D) as (in, out). `variant` names the code that runs where a kind has several: for norms

    - llama_rms_norm: x to fp32, times rsqrt of the mean square, back to x's dtype, then weight * x
    - olmo_rms_norm: the same, but weight * x is done in fp32 and cast back afterwards (olmo2, gpt_oss)
    - gemma_rms_norm: in fp32, times (1 + weight in fp32), then cast back
    - layer_norm: torch's nn.LayerNorm
    - layer_norm_1p: F.layer_norm with weight + 1, autocast off (nemotron)
    - cohere_layer_norm: mean and variance by hand in fp32, weight in fp32, cast back
    - olmo_layer_norm: F.layer_norm of the fp32 input without weight or bias, cast back (olmo)

    and for linear modules, where it is a subclass of nn.Linear, which bitsandbytes leaves alone: falcon_linear (x @
    weight.T, then + bias) and router_linear (phimoe's router).
    """

    name: str
    kind: Kind
    role: Role
    weights: tuple[Weight, ...]
    variant: str = ""

    @property
    def numel(self) -> int:
        """Number of elements of all its weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def in_features(self) -> int:
        """Columns that a linear module reads; for an embedding, its number of rows, as PEFT counts it."""
        rows, columns = self._matrix()
        return columns if self.kind == "linear" else rows

    @property
    def out_features(self) -> int:
        """Columns that a linear module or an embedding writes."""
        rows, columns = self._matrix()
        return rows if self.kind == "linear" else columns

    @property
    def bias(self) -> bool:
        """Whether it has a bias."""
        return any(weight.name == "bias" for weight in self.weights)

    def _matrix(self) -> tuple[int, int]:
        if self.kind not in ("linear", "conv1d", "embedding"):
            raise TypeError(f"{self.name} is a {self.kind}: it has no in_features or out_features")
        rows, columns = self.weights[0].shape
        return rows, columns


@dataclass(frozen=True, slots=True)
class Mla:
    """The module names and sizes of DeepSeek's multi-head latent attention; q_a is None when q is one projection."""

    q_a: str | None
    q_a_norm: str | None
    q_b: str | None
    kv_a: str
    kv_a_norm: str
    kv_b: str
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one layer; q, k, v, qkv, o, q_norm and k_norm are module names inside the layer.

    `head_dim` is that of queries and keys, `value_head_dim` that of values. `rotary_dim` is how much of a head is
    rotated (0: no rotary embedding here), `rope` whose code rotates it:

    - llama: q * cos + rotate_half(q) * sin, with cos and sin in x's dtype
    - gpt_neox: slices the rotated part off, rotates it as llama, and concatenates, whatever rotary_dim is
    - glm: as gpt_neox, with pairs interleaved (stack and flatten)
    - olmo: cos and sin stay fp32, so the products are fp32 and are cast back
    - cohere: q and k to fp32, pairs interleaved, cast back
    - ernie4_5: cos and sin fp32, q and rotate_half(q) to fp32, pairs interleaved, cast back
    - gpt_oss: the two halves by chunk, products, concatenated
    - gptj: slices, pairs interleaved, concatenates
    - deepseek_v2: complex multiplication in fp32; deepseek_v3: halves of interleaved pairs

    `qk_norm_over`: "head" normalises each head by itself, "all" all heads of q (or k) together.
    `interleaved`: in a fused qkv each key-value head lies beside its queries (falcon's new architecture). `positions`:
    rows of the table of sines and cosines (gptj), or of the alibi (mpt).
    `dropout` is on the probabilities, `output_dropout` on the branch's output before the residual is added.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    rotary_dim: int
    position: Literal["rotary", "learned", "alibi", "none"]
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm_over: Literal["none", "head", "all"] = "none"
    sliding_window: int | None = None
    logit_softcapping: float | None = None
    sinks: bool = False
    mla: Mla | None = None
    dropout: float = 0.0
    output_dropout: float = 0.0
    rope: str = "llama"
    interleaved: bool = False
    positions: int = 0


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward network by module names; plain ones (fc_in, act, fc_out) have neither `gate` nor `gate_up`.

    `gate_up` is one projection to 2 x I that holds gate and up; then `gate` and `up` are None.
    """

    gate: str | None
    up: str | None
    gate_up: str | None
    down: str
    activation: str
    intermediate_size: int
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts; the experts are 3-D parameters of one module, never nn.Linear (transformers 5)."""

    router: str
    experts: str
    num_experts: int
    top_k: int
    intermediate_size: int
    activation: str
    shared: Mlp | None = None
    shared_gate: str | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One kind of decoder layer: `modules` in registration order, and how they are wired.

    The four norms are module names or None; a `*_post_norm` is applied to the branch's output before the residual is
    added. `post_norm_residual` (opt-350m) applies attention_norm and mlp_norm after the residual addition instead.
    `parallel`: attention and MLP read the same residual and are added together; where both norm names are equal, the
    norm runs once. `scaled_residual`: each branch is multiplied by a scalar before the addition. `family` is the
    model type whose code runs the layer; where an older transformers' does, versions.py names it.
    """

    modules: tuple[Module, ...]
    attention: Attention
    mlp: Mlp | Moe
    attention_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False
    scaled_residual: bool = False
    post_norm_residual: bool = False
    family: str = "llama"

    @property
    def numel(self) -> int:
        """Number of elements of all its weights."""
        return sum(module.numel for module in self.modules)

    def module(self, name: str) -> Module:
        """The module of that name; KeyError when there is none."""
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)


@dataclass(frozen=True)
class Architecture:
    """A causal language model, layer by layer, as transformers' AutoModelForCausalLM builds it.

    `kinds` are the distinct layers and `order` says which of them each layer is. `embeddings` and `final` stand in the
    order in which they run, `before` and `after` in the order in which transformers registers them around the layers.
    `output` is the head as a module; it holds no weight of its own when `tied` (see `head`). `assumed` names the
    fields that the config left to transformers' defaults and that set a size or switch something on.
    `attention_implementations` are those that transformers 5.24 offers for this class.
    """

    model_type: str
    config: Mapping[str, object] = field(hash=False)
    assumed: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    embeddings: tuple[Module, ...]
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    layer_prefix: str
    final: tuple[Module, ...]
    output: Module
    tied: bool
    before: tuple[Module, ...]
    after: tuple[Module, ...]
    embedding_scale: bool = False
    embedding_dropout: float = 0.0
    logit_scale: bool = False
    final_logit_softcapping: float | None = None
    gradient_checkpointing: bool = True
    attention_implementations: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.order)

    @property
    def head(self) -> Module | None:
        """The output projection with weights of its own, None when it is tied to the token embedding."""
        return None if self.tied else self.output

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many layers are of each kind."""
        return tuple(self.order.count(kind) for kind in range(len(self.kinds)))

    @cached_property
    def total_parameters(self) -> int:
        """Number of parameters as transformers counts them over `parameters()`: a tied head once."""
        outside = sum(weight.numel for module in self.outside for weight in self.own_weights(module))
        layers = sum(layer.numel * count for layer, count in zip(self.kinds, self.counts, strict=True))
        return outside + layers

    @property
    def outside(self) -> tuple[Module, ...]:
        """The modules that are not in a layer: those before the layers, those after them, the head."""
        return (*self.before, *self.after, self.output)

    def own_weights(self, module: Module) -> tuple[Weight, ...]:
        """The parameters that a module holds itself: a tied head has the token embedding's matrix.

        Tying shares the matrix only: phi's and gptj's head keep a bias of their own.
        """
        if module.role != "head" or not self.tied:
            return module.weights
        return tuple(weight for weight in module.weights if weight.name != "weight")

    def weights(self) -> Iterator[tuple[str, Module, Weight]]:
        """Every parameter as (full name, module, weight), in transformers' `named_parameters()` order."""
        for path, module, _ in self.modules():
            for weight in self.own_weights(module):
                yield f"{path}.{weight.name}", module, weight

    def modules(self) -> Iterator[tuple[str, Module, int | None]]:
        """Every module as (full name, module, its layer's number or None), in the same order."""
        for module in self.before:
            yield module.name, module, None
        for layer, kind in enumerate(self.order):
            for module in self.kinds[kind].modules:
                yield f"{self.layer_prefix}.{layer}.{module.name}", module, layer
        for module in (*self.after, self.output):
            yield module.name, module, None
