"""Total, trainable and adapter parameters: which modules PEFT adapts, and what bitsandbytes quantises.

Rules read from peft 0.21 and transformers 5.24 (5.17 alike), and tested against both on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from vramplan.planner.errors import UsageError, shown, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vramplan.planner.layers import Architecture, Module

_OPTION = "--target-modules"
_ADAPTABLE = ("linear", "conv1d", "embedding")
_SAVED_WITH_BASE = ("embed_tokens", "lm_head")  # peft's EMBEDDING_LAYER_NAMES

# Where transformers 5 fused the experts of transformers 4 into parameters, peft translates the old module names into
# parameter names, and so "all-linear" reaches experts and router there, and nowhere else. Types without an entry keep
# their experts frozen. A dense or shared MLP of such a model is named like the old experts, so peft skips it.
_QWEN2_MOE = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_OLD_EXPERT_NAMES = {
    "deepseek_v2": _QWEN2_MOE,
    "deepseek_v3": _QWEN2_MOE,
    "glm4_moe": _QWEN2_MOE,
    "mixtral": _MIXTRAL,
    "olmoe": _QWEN2_MOE,
    "qwen3_moe": _QWEN2_MOE,
}


@dataclass(frozen=True, slots=True)
class Target:
    """One module that gets an adapter, or one of its parameters.

    `layer_kind` is the index into Architecture.kinds, None outside the layers; `layers` are the layers that have it,
    empty outside them. `parameter` is the weight adapted; where it is not "weight" of a linear module, peft wraps the
    parameter itself and the rank is `rank_factor` times the one asked for (once for every expert, twice for gate and
    up fused). A is (rank, in_features), B is (out_features, rank).
    """

    module: Module
    layer_kind: int | None
    layers: tuple[int, ...]
    in_features: int
    out_features: int
    parameter: str = "weight"
    rank_factor: int = 1

    @property
    def count(self) -> int:
        """How many modules of the model this stands for."""
        return 1 if self.layer_kind is None else len(self.layers)

    @property
    def wraps_parameter(self) -> bool:
        """Whether peft's ParamWrapper adapts a bare parameter: without dropout, adding B A to the weight each time."""
        return self.module.kind in ("experts", "router")

    def numel(self, rank: int) -> tuple[int, int]:
        """Elements of A and of B in one module."""
        return self.rank_factor * rank * self.in_features, self.rank_factor * rank * self.out_features


def lora_numel(module: Module, rank: int) -> tuple[int, int]:
    """Elements of LoRA's A and B on a linear, Conv1D or embedding module: r x in and out x r."""
    return rank * module.in_features, rank * module.out_features


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a LoRA run, all as element counts but for `adapter_bytes`; `trainable` is peft's own count.

    `total` is the base model as transformers counts it, a tied head once.
    """

    total: int
    trainable: int
    targets: tuple[Target, ...]
    rank: int
    layer_prefix: str
    names: tuple[str, ...] | Literal["all-linear"]
    base_dtype: str = "BF16"
    adapter_dtype: str = "F32"

    @property
    def frozen(self) -> int:
        """Parameters of the base, none of which train."""
        return self.total

    @property
    def adapted_modules(self) -> int:
        """How many modules (or bare parameters) carry an adapter."""
        return sum(target.count for target in self.targets)

    @cached_property
    def adapter_bytes(self) -> int:
        """Size of the adapter_model.safetensors that peft saves: the adapters and the file's header, exactly.

        Where embed_tokens or lm_head is adapted by that name, peft saves the base's embedding with it, in the dtype
        that the base is held in.
        """
        return safetensors_bytes([*self.saved_adapters(), *self._saved_embeddings()])

    def saved_adapters(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every adapter weight that peft saves, as (name, dtype, shape)."""
        for target in self.targets:
            rank = target.rank_factor * self.rank
            a, b = (rank, target.in_features), (target.out_features, rank)
            if target.module.kind == "embedding":
                suffixes = ("lora_embedding_A", "lora_embedding_B")
            elif target.parameter == "gate_up_proj":  # wrapped first, so it sits inside the wrapper of down_proj
                suffixes = ("base_layer.lora_A.weight", "base_layer.lora_B.weight")
                if not self._has_down_proj:
                    suffixes = ("lora_A.weight", "lora_B.weight")
            else:
                suffixes = ("lora_A.weight", "lora_B.weight")
            for prefix in self._prefixes(target):
                yield f"{prefix}{suffixes[0]}", self.adapter_dtype, a
                yield f"{prefix}{suffixes[1]}", self.adapter_dtype, b

    def _saved_embeddings(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        if not any(name in self.names for name in _SAVED_WITH_BASE):
            return
        for target in self.targets:
            if target.module.role in ("token_embedding", "head"):
                for weight in target.module.weights:
                    name = f"base_model.model.{target.module.name}.base_layer.{weight.name}"
                    yield name, self.base_dtype, weight.shape

    def _prefixes(self, target: Target) -> list[str]:
        if target.layer_kind is None:
            return [f"base_model.model.{target.module.name}."]
        return [f"base_model.model.{self.layer_prefix}.{index}.{target.module.name}." for index in target.layers]

    @cached_property
    def _has_down_proj(self) -> bool:
        return any(target.parameter == "down_proj" for target in self.targets)


def count(
    architecture: Architecture,
    target_modules: str | Sequence[str],
    rank: int,
    *,
    lora_dropout: float = 0.0,
    base_dtype: str = "BF16",
    adapter_dtype: str = "F32",
) -> ParameterCounts:
    """The parameters of a LoRA adapter of this rank; the dtypes are safetensors' names of the base's and its own.

    Raises UsageError for unknown target modules and for a rank that is below 1 or above every adapted matrix.
    """
    found = targets(architecture, target_modules, lora_dropout=lora_dropout)
    check_rank(rank, found)
    return ParameterCounts(
        total=architecture.total_parameters,
        trainable=sum(sum(target.numel(rank)) * target.count for target in found),
        targets=found,
        rank=rank,
        layer_prefix=architecture.layer_prefix,
        names=target_names(architecture, target_modules),
        base_dtype=base_dtype,
        adapter_dtype=adapter_dtype,
    )


def check_rank(rank: int, found: Sequence[Target]) -> None:
    """Raises UsageError for a rank below 1, or one larger than the largest side of every adapted matrix."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank is {shown(rank)}; it must be a whole number of 1 or more (--rank)")
    largest = max(max(target.in_features, target.out_features) for target in found)
    if rank > largest:
        raise UsageError(f"rank {rank} is larger than the largest side of every adapted matrix, {largest} (--rank)")


# ------------------------------------------------------------------------------------------------------ target modules


def target_names(
    architecture: Architecture, target_modules: str | Sequence[str]
) -> tuple[str, ...] | Literal["all-linear"]:
    """What to hand to peft as LoraConfig(target_modules=...), with "attention" and "mlp" spelt out.

    `target_modules` is "all-linear", "attention", "mlp", or names as a list or separated by commas.
    """
    asked = target_modules.split(",") if isinstance(target_modules, str) else list(target_modules)
    if any(not isinstance(name, str) for name in asked):
        raise UsageError(f"target modules {shown(target_modules)} must be names ({_OPTION})")
    asked = [name.strip() for name in asked if name.strip()]
    if not asked:
        raise UsageError(f"no target modules are named; use all-linear, attention, mlp or names ({_OPTION})")
    if any(name.lower() == "all-linear" for name in asked):
        if len(asked) > 1:
            raise UsageError(f"all-linear stands alone, without further names ({_OPTION})")
        return "all-linear"
    names: dict[str, None] = {}
    for name in asked:
        names |= dict.fromkeys(_by_role(architecture, name) if name in ("attention", "mlp") else [name])
    return tuple(names)


def _by_role(architecture: Architecture, role: str) -> list[str]:
    """The names inside a layer of its attention or MLP projections."""
    old_names = _OLD_EXPERT_NAMES.get(architecture.model_type)
    if role == "mlp" and old_names:
        return [name for name in old_names if name != "gate"]
    names = [
        module.name
        for layer in architecture.kinds
        for module in layer.modules
        if module.role == role and module.kind in ("linear", "conv1d")
    ]
    if not names:
        raise UsageError(
            f"the {role} of {architecture.model_type} has no linear layer that peft can adapt, its experts being bare "
            f"parameters; use attention or all-linear ({_OPTION})"
        )
    return list(dict.fromkeys(names))


def targets(
    architecture: Architecture, target_modules: str | Sequence[str], *, lora_dropout: float = 0.0
) -> tuple[Target, ...]:
    """The modules that peft adapts, in model order.

    "all-linear" is every nn.Linear and Conv1D but the output embedding; a name matches a module whose path equals it
    or ends with it after a dot. Raises UsageError where a name matches nothing that can be adapted, and where
    lora_dropout is set but experts are adapted, which peft refuses.
    """
    names = target_names(architecture, target_modules)
    old_names = _OLD_EXPERT_NAMES.get(architecture.model_type, {})
    found = _all_linear(architecture, old_names) if names == "all-linear" else _named(architecture, names, old_names)
    if lora_dropout and any(target.wraps_parameter for target in found):
        raise UsageError(
            f"peft adapts the experts of {architecture.model_type} only without dropout; "
            "set lora_dropout to 0 or choose attention (--lora-dropout, --target-modules)"
        )
    return found


def _all_linear(architecture: Architecture, old_names: dict[str, str]) -> tuple[Target, ...]:
    linear = [
        (module, kind, layers)
        for module, kind, layers in _modules(architecture)
        if module.kind in ("linear", "conv1d") and module.role != "head"
    ]
    if not old_names:
        return tuple(_whole(module, kind, layers) for module, kind, layers in linear)
    leaves = {module.name.rpartition(".")[2] for module, _, _ in linear}
    return _named(architecture, tuple(sorted(leaves | old_names.keys())), old_names)


def _named(architecture: Architecture, names: tuple[str, ...], old_names: dict[str, str]) -> tuple[Target, ...]:
    """Targets for names; those of transformers 4's experts (`old_names`) stand for parameters."""
    parameters: dict[str, set[str]] = {}
    modules = []
    for name in names:
        old = next((old for old in old_names if name == old or name.endswith(f".{old}")), None)
        if old is None:
            modules.append(name)
        else:
            parameters.setdefault(old_names[old], set()).add(old)
    fused = {old for old, new in old_names.items() if new == "gate_up_proj"}
    missing = fused - parameters.get("gate_up_proj", fused)
    if missing:
        raise UsageError(
            f"{architecture.model_type} fuses {' and '.join(sorted(fused))} into one parameter, so peft needs both: "
            f"add {', '.join(sorted(missing))} ({_OPTION})"
        )
    found: list[Target] = []
    matched: set[str] = set()
    for module, kind, layers in _modules(architecture):
        if module.kind in ("experts", "router"):
            found += _wrapped(module, kind, layers, parameters)
        hits = {
            name: hit for name in modules if (hit := _matching_layers(architecture, name, module, layers)) is not None
        }
        if not hits:
            continue
        if module.kind not in _ADAPTABLE:
            raise UsageError(
                f"target module {shown(next(iter(hits)))} is a {module.kind} of {architecture.model_type}, which LoRA "
                f"cannot adapt; name linear layers or embeddings ({_OPTION})"
            )
        matched |= hits.keys()
        everywhere = any(hit == layers for hit in hits.values())
        found.append(
            _whole(module, kind, layers if everywhere else tuple(sorted({i for hit in hits.values() for i in hit})))
        )
    for name in modules:
        if name not in matched:
            raise _unknown_name(architecture, name, old_names)
    if not found:
        raise UsageError(f"no module of {architecture.model_type} matches {shown(', '.join(names))} ({_OPTION})")
    return tuple(found)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matching_layers(
    architecture: Architecture, name: str, module: Module, layers: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The layers whose module of this path `name` matches, () for a module outside them, None for no match."""
    if _ends_with(module.name, name):
        return layers
    if not layers or not name.endswith(f".{module.name}"):
        return None
    # A longer name carries the layer's number: "3.self_attn.q_proj" or a full path.
    head = name[: -len(module.name) - 1]
    prefix, _, index = head.rpartition(".")
    if not index.isdecimal() or len(index) > 6 or str(int(index)) != index or int(index) not in layers:
        return None
    return (int(index),) if not prefix or _ends_with(architecture.layer_prefix, prefix) else None


def _modules(architecture: Architecture) -> Iterator[tuple[Module, int | None, tuple[int, ...]]]:
    """Every module with its layer kind and the layers of that kind, in model order, the tied head included."""
    for module in architecture.before:
        yield module, None, ()
    for kind, layer in enumerate(architecture.kinds):
        layers = tuple(index for index, which in enumerate(architecture.order) if which == kind)
        for module in layer.modules:
            yield module, kind, layers
    for module in architecture.after:
        yield module, None, ()
    yield architecture.output, None, ()


def _whole(module: Module, kind: int | None, layers: tuple[int, ...]) -> Target:
    return Target(module, kind, layers, module.in_features, module.out_features)


def _wrapped(
    module: Module, kind: int | None, layers: tuple[int, ...], parameters: dict[str, set[str]]
) -> Iterator[Target]:
    """The parameters of an experts module or a router that are adapted directly."""
    for weight in module.weights:
        wanted = "gate.weight" if module.kind == "router" else weight.name
        if wanted not in parameters or (module.kind == "router" and weight.name != "weight"):
            continue
        if len(weight.shape) == 2:
            outputs, inputs = weight.shape
            yield Target(module, kind, layers, inputs, outputs)
        else:
            experts, outputs, inputs = weight.shape
            fused = len(parameters[wanted])
            yield Target(module, kind, layers, inputs, outputs, weight.name, experts * fused)


def _unknown_name(architecture: Architecture, name: str, old_names: dict[str, str]) -> UsageError:
    known: dict[str, None] = dict.fromkeys(("all-linear", "attention", "mlp"))
    for module, _, _ in _modules(architecture):
        if module.kind in _ADAPTABLE:
            known[module.name.rpartition(".")[2]] = None
    known |= dict.fromkeys(old_names)
    containers = {part for module, _, _ in _modules(architecture) for part in module.name.split(".")[:-1]}
    if name.rpartition(".")[2] in containers:
        return UsageError(
            f"target module {shown(name)} of {architecture.model_type} holds others, and LoRA adapts linear layers and "
            f"embeddings only; use attention, mlp or names such as {', '.join(list(known)[3:6])} ({_OPTION})"
        )
    return unknown(f"target module of {architecture.model_type}", name, known, _OPTION)


# --------------------------------------------------------------------------------------------------------- quantisation


def is_quantised(module: Module, architecture: Architecture, layer: int | None = None) -> bool:
    """Whether transformers puts this module's weight into bitsandbytes' 4-bit form.

    nn.Linear itself (no subclass, so nothing of falcon) and Conv1D; not the head, tied or not, and never experts,
    routers or embeddings. Bare norms at the end (a tied olmo) make transformers also skip the last linear module, for
    which `layer` must be given.
    """
    if module.kind not in ("linear", "conv1d") or module.variant or module.role == "head":
        return False
    return not (
        layer is not None and layer == architecture.num_hidden_layers - 1 and module is _last_weight(architecture)
    )


def _last_weight(architecture: Architecture) -> Module | None:
    """The layer module that owns the very last parameter, None if something after the layers does."""
    if any(weight for module in architecture.after for weight in module.weights):
        return None
    if not architecture.tied or architecture.output.bias:
        return None
    last = [module for module in architecture.kinds[architecture.order[-1]].modules if module.weights][-1]
    return last if last.weights[-1].name == "weight" else None


# ---------------------------------------------------------------------------------------------------------- safetensors

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def safetensors_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> int:
    """Exact size of a safetensors file with these (name, dtype, shape) tensors and {"format": "pt"} as metadata.

    The format: eight bytes of header length, a JSON header padded with spaces to a multiple of eight, the data. The
    writer sorts by dtype, widest first, then by name.
    """
    header = len('{"__metadata__":{"format":"pt"}}')
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-_ITEM_BYTES[tensor[1]], tensor[1], tensor[0])):
        end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
        sides = ",".join(map(str, shape))
        # Written out here because json.dumps takes most of a plan's time.
        header += len(f',"{name}":{{"dtype":"{dtype}","shape":[{sides}],"data_offsets":[{offset},{end}]}}')
        offset = end
    return 8 + header + -header % 8 + offset
