"""The parts that families are put together from: modules, head sizes, and the model around its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError
from vramplan.planner.layers import Architecture, Kind, Layer, Module, Role, Weight

if TYPE_CHECKING:
    from vramplan.planner.configuration import Config


def linear(name: str, inputs: int, outputs: int, role: Role, *, bias: bool = False, variant: str = "") -> Module:
    """An nn.Linear: weight (out, in) and, perhaps, bias (out)."""
    weights = (Weight("weight", (outputs, inputs)), Weight("bias", (outputs,)))
    return Module(name, "linear", role, weights if bias else weights[:1], variant)


def conv1d(name: str, inputs: int, outputs: int, role: Role) -> Module:
    """transformers' Conv1D: weight (in, out) and always a bias."""
    return Module(name, "conv1d", role, (Weight("weight", (inputs, outputs)), Weight("bias", (outputs,))))


def norm(name: str, shape: int | tuple[int, ...], variant: str, *, weight: bool = True, bias: bool = False) -> Module:
    """A norm over the last of `shape`'s dimensions."""
    shape = (shape,) if isinstance(shape, int) else shape
    weights = [Weight("weight", shape)] * weight + [Weight("bias", shape)] * bias
    return Module(name, "norm", "norm", tuple(weights), variant)


def layer_norm(name: str, size: int, *, affine: bool = True) -> Module:
    """torch's nn.LayerNorm with weight and bias."""
    return norm(name, size, "layer_norm", weight=affine, bias=affine)


def embedding(name: str, rows: int, columns: int, role: Role = "token_embedding") -> Module:
    """An nn.Embedding: weight (rows, columns)."""
    return Module(name, "embedding", role, (Weight("weight", (rows, columns)),))


def bare(name: str, kind: Kind, role: Role, wide: bool = False, /, **shapes: tuple[int, ...]) -> Module:
    """A module that holds bare parameters."""
    return Module(name, kind, role, tuple(Weight(key, shape, wide) for key, shape in shapes.items()))


def head_sizes(config: Config, hidden: int, *, own_head_dim: bool, whole: bool = False) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dimension, which must fit each other."""
    heads = config.size("num_attention_heads")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    head_dim = config.optional_size("head_dim") if own_head_dim else None
    if (whole or head_dim is None) and hidden % heads:
        raise UsageError(f"hidden_size {hidden} does not divide by num_attention_heads {heads} ({config.model_type})")
    if heads % kv_heads:
        raise UsageError(
            f"num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads} ({config.model_type})"
        )
    head_dim = head_dim or hidden // heads
    config.settle("num_key_value_heads", kv_heads)
    config.settle("head_dim", head_dim)
    return heads, kv_heads, head_dim


def assemble(
    config: Config,
    *,
    before: tuple[Module, ...],
    kinds: tuple[Layer, ...],
    order: tuple[int, ...],
    after: tuple[Module, ...],
    layer_prefix: str = "model.layers",
    embeddings: tuple[Module, ...] | None = None,
    final: tuple[Module, ...] | None = None,
    head_bias: bool = False,
    head_inputs: int | None = None,
    **rest: Any,
) -> Architecture:
    """The architecture around its layers; `embeddings` and `final` only where they run in another order."""
    vocabulary, hidden = config.size("vocab_size"), config.size("hidden_size")
    tied = config.flag("tie_word_embeddings")
    return Architecture(
        model_type=config.model_type,
        config=config.normalised(),
        assumed=tuple(config.assumed),
        vocab_size=vocabulary,
        hidden_size=hidden,
        embeddings=before if embeddings is None else embeddings,
        kinds=kinds,
        order=order,
        layer_prefix=layer_prefix,
        final=after if final is None else final,
        output=linear("lm_head", head_inputs or hidden, vocabulary, "head", bias=head_bias),
        tied=tied,
        before=before,
        after=after,
        attention_implementations=config.attention_implementations,
        **rest,
    )
