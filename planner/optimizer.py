"""Optimizers: what each keeps for a parameter, and what one step allocates and frees, in the order of the real one.

An optimizer is data (`Optimizer`, `State`); four functions play a step, one for each way the steps are written:
lists of tensors (foreach), one kernel (fused), parameter by parameter (single) and bitsandbytes. A step depends on
the parameters' shapes and dtypes alone, so its events are worked out once and then only moved to their place.

All of it holds for transformers' defaults, above all weight_decay = 0 and sgd and rmsprop without momentum.

Sources: transformers/trainer_optimizer.py (which class and arguments a name stands for), transformers/trainer.py
(parameter groups, 32-bit states for embeddings), torch/optim/, torch/nn/utils/clip_grad.py, torch/amp/grad_scaler.py,
transformers/optimization.py (Adafactor), bitsandbytes/optim/, aten/src/ATen/native/cuda/Reduce.cuh. Each was compared
event by event with recorded memory histories (torch 2.11, transformers 5.17, bitsandbytes 0.50; tests/data).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from vramplan.planner.allocator import change
from vramplan.planner.errors import UsageError, unknown
from vramplan.planner.paper import H200, ITEMSIZE, Multiprocessors, Shape, Storage, Tape, Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from vramplan.planner.paper import Parameter

_Spec = tuple[Shape, str, bool]  # what a step depends on of a parameter: shape, dtype, whether it embeds
_Specs = tuple[_Spec, ...]

BLOCK = 256  # elements that share one absmax (bitsandbytes/optim/optimizer.py, blocksize)
LEAST_8BIT = 4096  # smaller tensors keep float32 states (min_8bit_size)
LEAST_PAGED = 100_000  # smaller tensors stay in ordinary memory (get_state_buffer)
TABLE_BYTES = 256 * 4  # one dynamic quantisation map, float32 (functional.py, create_dynamic_map)
_CHUNK = 65_536  # elements of one block of a foreach kernel (ATen/native/cuda/MultiTensorApply.cuh, kChunkSize)
_INDEX_LIMIT = 2**31  # bytes that a reduction kernel addresses with 32 bits


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that is kept for each parameter: its dtype, how many elements it has, and which parameters have it."""

    name: str
    dtype: str = "fp32"  # "parameter": the parameter's own
    extent: str = "all"  # "all" | "blocks" (one each 256 elements) | "scalar" | "rows" | "columns"
    times: int = 1
    only: str = ""  # "8bit" | "32bit" (parameters whose states are, are not quantised) | "matrix" | "vector"


@dataclass(frozen=True, slots=True, eq=False)  # one object for each: quick to look up in the caches below
class Optimizer:
    """An optimizer of transformers' `optim`: its states in the order in which they are made, and its step."""

    name: str
    implementation: str  # "foreach" | "fused" | "single" | "bnb"
    states: tuple[State, ...]
    source: str
    aliases: tuple[str, ...] = ()
    temporaries: tuple[str, ...] = ()  # foreach: lists with the sizes of all parameters that live through the step
    eager: bool = False  # states are made by the constructor, not at the first step
    paged: bool = False  # states of large parameters lie in managed memory, which torch does not count
    tables: tuple[str, ...] = ()  # quantisation maps, one of each on the GPU
    kernel_dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")  # gradients that the step with 32-bit states takes

    @property
    def quantised(self) -> bool:
        """Whether states of large parameters have 8 bits."""
        return bool(self.tables)


_ADAM32 = (State("exp_avg"), State("exp_avg_sq"))
_MIX32 = (State("exp_avg, fast and slow", times=2), State("exp_avg_sq"))
_LION32 = (State("exp_avg"),)
_SQUARE32 = (State("square_avg"),)
_ADAM8 = (
    State("exp_avg, 8-bit", "uint8", only="8bit"),
    State("exp_avg_sq, 8-bit", "uint8", only="8bit"),
    State("absmax of exp_avg", extent="blocks", only="8bit"),
    State("absmax of exp_avg_sq", extent="blocks", only="8bit"),
    State("exp_avg", only="32bit"),
    State("exp_avg_sq", only="32bit"),
)
_MIX8 = (
    State("absmax of exp_avg", extent="blocks", times=2, only="8bit"),
    State("absmax of exp_avg_sq", extent="blocks", only="8bit"),
    State("exp_avg, fast and slow, 8-bit", "uint8", times=2, only="8bit"),
    State("exp_avg_sq, 8-bit", "uint8", only="8bit"),
    State("exp_avg, fast and slow", times=2, only="32bit"),
    State("exp_avg_sq", only="32bit"),
)
_LION8 = (
    State("exp_avg, 8-bit", "uint8", only="8bit"),
    State("absmax of exp_avg", extent="blocks", only="8bit"),
    State("exp_avg", only="32bit"),
)
_SQUARE8 = (
    State("square_avg, 8-bit", "uint8", only="8bit"),
    State("absmax of square_avg", extent="blocks", only="8bit"),
    State("square_avg", only="32bit"),
)
_SIGNED, _BOTH = ("signed quantisation map",), ("signed quantisation map", "unsigned quantisation map")
_BNB, _BNB_MIX = "bitsandbytes/optim/optimizer.py", "bitsandbytes/optim/ademamix.py"
# bitsandbytes/backends/cuda/ops.py, str2optimizer32bit: rmsprop has kernels for float32 and float16 alone
_NO_BF16 = ("fp32", "fp16")

OPTIMIZERS = (
    Optimizer(
        "adamw_torch",
        "foreach",
        (State("exp_avg", "parameter"), State("exp_avg_sq", "parameter")),
        "torch/optim/adam.py, _multi_tensor_adam",
        temporaries=("sqrt of exp_avg_sq",),
    ),
    Optimizer(
        "adamw_torch_fused",
        "fused",
        (State("step", extent="scalar"), State("exp_avg", "parameter"), State("exp_avg_sq", "parameter")),
        "torch/optim/adam.py, _fused_adam",
    ),
    Optimizer(
        "adafactor",
        "single",
        (
            State("exp_avg_sq_row", extent="rows", only="matrix"),
            State("exp_avg_sq_col", extent="columns", only="matrix"),
            State("exp_avg_sq", only="vector"),
            State("RMS", extent="scalar"),
        ),
        "transformers/optimization.py, Adafactor",
    ),
    Optimizer("sgd", "foreach", (), "torch/optim/sgd.py, _multi_tensor_sgd"),
    Optimizer(
        "adagrad",
        "foreach",
        # accelerate/optimizer.py moves the step counters, which the constructor makes on the CPU, to the GPU
        (State("sum", "parameter"), State("step", extent="scalar")),
        "torch/optim/adagrad.py, _multi_tensor_adagrad",
        temporaries=("sqrt of sum", "scaled gradient"),
        eager=True,
    ),
    Optimizer(
        "rmsprop",
        "foreach",
        (State("square_avg", "parameter"),),
        "torch/optim/rmsprop.py, _multi_tensor_rmsprop",
        temporaries=("sqrt of square_avg",),
    ),
    Optimizer("adamw_bnb_8bit", "bnb", _ADAM8, _BNB, aliases=("adamw_8bit",), tables=_BOTH),
    Optimizer("paged_adamw_32bit", "bnb", _ADAM32, _BNB, paged=True),
    Optimizer("paged_adamw_8bit", "bnb", _ADAM8, _BNB, paged=True, tables=_BOTH),
    Optimizer("ademamix", "bnb", _MIX32, _BNB_MIX),
    Optimizer("ademamix_8bit", "bnb", _MIX8, _BNB_MIX, tables=_BOTH),
    Optimizer("paged_ademamix_32bit", "bnb", _MIX32, _BNB_MIX, paged=True),
    Optimizer("paged_ademamix_8bit", "bnb", _MIX8, _BNB_MIX, paged=True, tables=_BOTH),
    Optimizer("lion_32bit", "bnb", _LION32, _BNB),
    Optimizer("lion_8bit", "bnb", _LION8, _BNB, tables=_SIGNED),
    Optimizer("paged_lion_32bit", "bnb", _LION32, _BNB, paged=True),
    Optimizer("paged_lion_8bit", "bnb", _LION8, _BNB, paged=True, tables=_SIGNED),
    Optimizer("rmsprop_bnb", "bnb", _SQUARE32, _BNB, aliases=("rmsprop_bnb_32bit",), kernel_dtypes=_NO_BF16),
    Optimizer("rmsprop_bnb_8bit", "bnb", _SQUARE8, _BNB, tables=_SIGNED, kernel_dtypes=_NO_BF16),
)  # fmt: skip
_BY_NAME = {name: optimizer for optimizer in OPTIMIZERS for name in (optimizer.name, *optimizer.aliases)}
NAMES = tuple(_BY_NAME)

# Names of transformers' `optim` that need a further package (trainer_optimizer.py), and the nearest that needs none.
ELSEWHERE = {
    "adamw_torch_4bit": ("torchao", "adamw_8bit"),
    "adamw_torch_8bit": ("torchao", "adamw_8bit"),
    "adamw_torch_xla": ("torch_xla", "adamw_torch"),
    "adamw_torch_npu_fused": ("torch_npu", "adamw_torch_fused"),
    "adamw_anyprecision": ("torchdistx", "adamw_torch"),
    "galore_adamw": ("galore_torch", "adafactor"),
    "galore_adamw_8bit": ("galore_torch", "adamw_8bit"),
    "galore_adafactor": ("galore_torch", "adafactor"),
    "galore_adamw_layerwise": ("galore_torch", "adafactor"),
    "galore_adamw_8bit_layerwise": ("galore_torch", "adamw_8bit"),
    "galore_adafactor_layerwise": ("galore_torch", "adafactor"),
    "lomo": ("lomo-optim", "sgd"),
    "adalomo": ("lomo-optim", "adafactor"),
    "grokadamw": ("grokadamw", "adamw_torch"),
    "schedule_free_radam": ("schedulefree", "adamw_torch"),
    "schedule_free_adamw": ("schedulefree", "adamw_torch"),
    "schedule_free_sgd": ("schedulefree", "sgd"),
    "apollo_adamw": ("apollo_torch", "adafactor"),
    "apollo_adamw_layerwise": ("apollo_torch", "adafactor"),
    "stable_adamw": ("torch-optimi", "adamw_torch"),
}


def optimizer_names() -> list[str]:
    """Every name that can be planned, in alphabetical order."""
    return sorted(NAMES)


def get(name: str) -> Optimizer:
    """The optimizer that transformers' `optim` calls `name`.

    Raises UsageError for a name that needs a further package, with the package and the nearest optimizer that needs
    none, and for an unknown one, with the nearest names.
    """
    found = _BY_NAME.get(name)
    if found is not None:
        return found
    if name in ELSEWHERE:
        package, near = ELSEWHERE[name]
        raise UsageError(
            f"optimizer '{name}' needs the package {package}, which is not planned for; "
            f"the nearest that works is {near} (--optimizer)"
        )
    raise unknown("optimizer", name, NAMES, "--optimizer")


def check(optimizer: Optimizer, parameters: Iterable[Parameter], embeddings: Collection[str] = ()) -> None:
    """Raises UsageError where the optimizer has no kernel for a parameter's gradient.

    bitsandbytes' RMSprop takes no bfloat16 gradient where states have 32 bits: always without 8bit in the name, else
    for tensors under 4,096 elements and for embeddings.
    """
    for p in parameters:
        if p.dtype not in optimizer.kernel_dtypes and not _in_8bit(optimizer, p.numel, p.name in embeddings):
            raise UsageError(
                f"bitsandbytes' {optimizer.name} has no kernel for the {p.dtype} gradient of {p.name}; "
                "train float32 weights (--weights-dtype fp32) or take rmsprop (--optimizer)"
            )


# --- bytes --------------------------------------------------------------------------------------------------------


def state_bytes(optimizer: Optimizer, shape: Shape, dtype: str, embedding: bool = False) -> int:
    """Bytes that torch is asked for to keep one parameter's states between steps, without quantisation maps.

    `embedding`: the weight of an nn.Embedding, whose states transformers keeps in 32 bits (trainer.py,
    create_optimizer). Shared maps are TABLE_BYTES for each of `optimizer.tables`.
    """
    return sum(n for _, n, paged in _kept(optimizer, (shape, dtype, embedding)) if not paged)


def paged_bytes(optimizer: Optimizer, shape: Shape, dtype: str, embedding: bool = False) -> int:
    """Bytes of one parameter's states in managed memory: resident while there is room, never counted by torch."""
    return sum(n for _, n, paged in _kept(optimizer, (shape, dtype, embedding)) if paged)


def _in_8bit(optimizer: Optimizer, numel: int, embedding: bool) -> bool:
    return optimizer.quantised and numel >= LEAST_8BIT and not embedding


@lru_cache(maxsize=1024)
def _kept(optimizer: Optimizer, spec: _Spec) -> tuple[tuple[State, int, bool], ...]:
    """The states of one parameter, their bytes, and whether they are paged."""
    shape, dtype, embedding = spec
    numel = prod(shape)
    traits = (
        "",
        "8bit" if _in_8bit(optimizer, numel, embedding) else "32bit",
        "matrix" if len(shape) > 1 else "vector",
    )
    kept: list[tuple[State, int, bool]] = []
    for state in optimizer.states:
        if state.only in traits:
            if state.extent == "all":
                n = numel
            elif state.extent == "blocks":
                n = -(-numel // BLOCK)
            elif state.extent == "scalar":
                n = 1
            elif state.extent == "rows":
                n = prod(shape[:-1])
            else:
                n = prod(shape[:-2]) * shape[-1]
            nbytes = n * state.times * ITEMSIZE[dtype if state.dtype == "parameter" else state.dtype]
            kept.append((state, nbytes, optimizer.paged and state.extent == "all" and numel >= LEAST_PAGED))
    return tuple(kept)


# --- playing a step -----------------------------------------------------------------------------------------------


class Held:
    """Tensors of a tape that live until this object goes."""

    __slots__ = ("ids", "tape")

    def __init__(self, tape: Tape, ids: list[int]) -> None:
        self.tape = tape
        self.ids = ids

    def __del__(self) -> None:
        self.tape.events.extend([2 * i + 1 for i in self.ids])


# transformers/trainer.py, get_decay_parameter_names
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@lru_cache(maxsize=16_384)
def _decays(name: str) -> bool:
    lower = name.lower()  # most names need no regular expression
    return ("norm" not in lower and "bias" not in lower) or _NO_DECAY.search(lower) is None


def groups(
    parameters: Iterable[Parameter], layer_norms: Collection[str] = ()
) -> tuple[list[Parameter], list[Parameter]]:
    """transformers' two parameter groups: with weight decay, and without (biases, norms); order kept within each.

    `layer_norms`: names of parameters of nn.LayerNorm modules, which go without decay whatever they are called.
    """
    decay: list[Parameter] = []
    others: list[Parameter] = []
    for p in parameters:
        (decay if p.name not in layer_norms and _decays(p.name) else others).append(p)
    return decay, others


def play_creation(
    tape: Tape,
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    state: dict[str, Held],
    *,
    layer_norms: Collection[str] = (),
) -> None:
    """What making the optimizer allocates, before the first step: nothing but for Adagrad."""
    if optimizer.eager:
        state["states"] = Held(tape, _place(tape, _creation(optimizer, _specs(parameters, (), layer_norms))))


def play(
    tape: Tape,
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    state: dict[str, Held],
    first: bool,
    *,
    embeddings: Collection[str] = (),
    layer_norms: Collection[str] = (),
    scaled: bool = False,
    gpu: Multiprocessors = H200,
) -> None:
    """One `optimizer.step()` on `tape`.

    `parameters`: the trained ones, each with a gradient, in the order of the model's named_parameters(). `state` is
    the caller's: what outlives the step stays in it and is freed when it goes. `first`: states are created (an eager
    optimizer's too, unless `play_creation` has). `embeddings`: names of the weights of nn.Embedding modules.
    `layer_norms`: see `groups`. `scaled`: under a GradScaler, after `play_unscale`.
    """
    specs = _specs(parameters, embeddings if optimizer.quantised else (), layer_norms)
    if first and optimizer.eager and "states" not in state:
        play_creation(tape, optimizer, parameters, state, layer_norms=layer_norms)
    program = _program(optimizer, specs, first, scaled, gpu)
    old = state.get("replaced")
    kept = _place(tape, program, old.ids if old and old.tape is tape else ())
    if first and not optimizer.eager:
        state["states"] = Held(tape, kept[program.replaced :])
    if program.replaced:
        if old and old.tape is tape:
            old.ids = []  # the step has freed them
        state["replaced"] = Held(tape, kept[: program.replaced])


def changes(
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    *,
    embeddings: Collection[str] = (),
    layer_norms: Collection[str] = (),
    scaled: bool = False,
    gpu: Multiprocessors = H200,
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """In bytes of blocks: what a step leaves, and what clipping and a later step add, each with the most on the way.

    As `play_unscale`, `play_clip` and `play` have it, without a tape. The norm of the step before goes before all that.
    """
    specs = _specs(parameters, embeddings if optimizer.quantised else (), layer_norms)
    made = _program(optimizer, specs, True, False, gpu).change[0]
    if optimizer.eager:
        made += _creation(optimizer, specs).change[0]
    norm, most = _clip(parameters).change
    clip, step = (0, most - norm), _program(optimizer, specs, False, scaled, gpu).change
    if scaled:  # found_inf stays from before clipping until after the step
        found_inf, most = _unscale_program().change
        clip = (found_inf, max(most - norm, found_inf + clip[1]))
        step = (step[0] - found_inf, step[1])
    return made + norm, clip, step


def play_clip(tape: Tape, parameters: Sequence[Parameter]) -> Held:
    """`clip_grad_norm_` over all gradients, in the order of model.parameters(); returns the norm, which lives on.

    transformers holds it as grad_norm until just before the next step's clipping.
    """
    return Held(tape, _place(tape, _clip(parameters)))


def _clip(parameters: Iterable[Parameter]) -> _Program:
    return _clip_program(tuple([(p.shape, p.dtype, False) for p in parameters]))


def play_unscale(tape: Tape) -> Held:
    """`GradScaler.unscale_`, before clipping in float16; returns found_inf, which `GradScaler.update` lets go."""
    return Held(tape, _place(tape, _unscale_program()))


def _specs(
    parameters: Iterable[Parameter], embeddings: Collection[str], layer_norms: Collection[str]
) -> tuple[_Specs, ...]:
    both = groups(parameters, layer_norms)
    return tuple([tuple([(p.shape, p.dtype, p.name in embeddings) for p in group]) for group in both if group])


@dataclass(frozen=True, slots=True)
class _Program:
    """A step's events with ids from 0; the first `replaced` stand for tensors kept since the step before."""

    sizes: tuple[int, ...]
    labels: tuple[str, ...]
    events: tuple[int, ...]
    kept: tuple[int, ...]  # ids that live on; the first of them replace those kept before
    change: tuple[int, int]  # what its events add in bytes of blocks, and the most on the way
    replaced: int = 0
    carried: tuple[tuple[int, int], ...] = ()  # events that free a tensor kept before: (position, which)


def _place(tape: Tape, program: _Program, before: Sequence[int] = ()) -> list[int]:
    """Adds the program's events to the tape; returns the ids of what lives on."""
    shift = len(tape.sizes)
    tape.sizes.extend(program.sizes)
    tape.labels.extend(program.labels)
    tape.scopes.extend([tape.scope] * len(program.sizes))
    events = list(map((2 * shift).__add__, program.events))
    if before:
        for position, i in program.carried:
            events[position] = 2 * before[i] + 1
    elif program.carried:  # the step before was not played: nothing of it can be freed
        gone = {position for position, _ in program.carried}
        events = [e for position, e in enumerate(events) if position not in gone]
    tape.events.extend(events)
    return [i + shift for i in program.kept]


def _finish(tape: Tape, kept: Iterable[int], replaced: int = 0, before: int = 0) -> _Program:
    """The program of a tape on which a step was played; ids below `before` are those of the step before."""
    events = tape.events.copy()
    carried = tuple([(position, e >> 1) for position, e in enumerate(events) if e >> 1 < before])
    return _Program(
        tuple(tape.sizes[before:]),
        tuple(tape.labels[before:]),
        tuple([e - 2 * before for e in events]),
        tuple([i - before for i in kept]),
        change(events, tape.sizes),
        replaced,
        carried,
    )


@lru_cache(maxsize=64)
def _program(
    optimizer: Optimizer, specs: tuple[_Specs, ...], first: bool, scaled: bool, gpu: Multiprocessors
) -> _Program:
    if optimizer.implementation == "single":
        return _adafactor(optimizer, specs, first, gpu)
    tape = Tape()
    kept: list[Storage] = []
    create = first and not optimizer.eager
    if optimizer.implementation == "fused":
        # the scaler hands found_inf, summed over devices, to a fused step and holds it meanwhile
        found_inf = Storage(tape, 4, "found_inf, summed") if scaled else None
        for group in specs if create else ():
            kept += _created(tape, optimizer, group)
        del found_inf
    elif optimizer.implementation == "foreach":
        for group in specs:
            if create:
                kept += _created(tape, optimizer, group)
            _foreach(tape, optimizer, group)
    elif create:
        kept += _created_8bit(tape, optimizer, specs)
    return _finish(tape, [s.id for s in kept])


@lru_cache(maxsize=64)
def _creation(optimizer: Optimizer, specs: tuple[_Specs, ...]) -> _Program:
    """Adagrad's constructor, then accelerate's move of the step counters."""
    tape = Tape()
    every = [(s, n) for group in specs for spec in group for s, n, _ in _kept(optimizer, spec)]
    kept = [Storage(tape, n, s.name) for s, n in every if s.extent == "all"]
    kept += [Storage(tape, n, s.name) for s, n in every if s.extent == "scalar"]
    return _finish(tape, [s.id for s in kept])


def _created(tape: Tape, optimizer: Optimizer, group: Iterable[_Spec]) -> list[Storage]:
    """The states of a group, parameter by parameter; paged ones are not torch's."""
    return [Storage(tape, n, state.name) for spec in group for state, n, paged in _kept(optimizer, spec) if not paged]


def _created_8bit(tape: Tape, optimizer: Optimizer, specs: Iterable[_Specs]) -> list[Storage]:
    """bitsandbytes' init_state for every parameter; the maps move to the GPU with the first quantised one.

    The kernels update in place: a step allocates nothing else.
    """
    made: list[Storage] = []
    tables = False
    for group in specs:
        for shape, dtype, embedding in group:
            if not tables and _in_8bit(optimizer, prod(shape), embedding):
                tables = True
                made += [Storage(tape, TABLE_BYTES, name) for name in optimizer.tables]
            made += _created(tape, optimizer, [(shape, dtype, embedding)])
    return made


def _by_dtype(group: Iterable[_Spec]) -> list[list[_Spec]]:
    """As _group_tensors_by_device_and_dtype returns them: the dtype met last comes first (an unordered_map)."""
    by_dtype: dict[str, list[_Spec]] = {}
    for spec in group:
        by_dtype.setdefault(spec[1], []).append(spec)
    return list(by_dtype.values())[::-1]


def _foreach(tape: Tape, optimizer: Optimizer, group: Iterable[_Spec]) -> None:
    """A _multi_tensor_* function: its lists of temporaries, dtype by dtype; lists let go of their last item first."""
    live: list[list[Tensor]] = [[] for _ in optimizer.temporaries]
    for same in _by_dtype(group):
        for i, label in enumerate(optimizer.temporaries):
            live[i] = [tape.new(shape, dtype, label) for shape, dtype, _ in same]
    for i in range(len(live)):
        live[i] = []


# --- Adafactor ----------------------------------------------------------------------------------------------------


def _adafactor(optimizer: Optimizer, specs: Iterable[_Specs], first: bool, gpu: Multiprocessors) -> _Program:
    """Adafactor.step, parameter after parameter; after the first step each one's RMS is there to be replaced."""
    every = [spec for group in specs for spec in group]
    tape = Tape()
    before = 0 if first else len(every)
    for items, item in ((tape.sizes, 4), (tape.labels, "RMS"), (tape.scopes, "")):
        items.extend([item] * before)  # type: ignore[list-item]
    rms: list[int] = []
    kept: list[int] = []
    left: list[int] = []  # what the step's variables hold of the parameter before
    for i, spec in enumerate(every):
        one = _adafactor_parameter(optimizer, spec, len(left), first, gpu)
        made = _place(tape, one, left if first else [*left, i])
        variables = len(made) - (3 if spec[1] != "fp32" else 1)
        rms.append(made[0])
        kept += made[1:variables]
        left = made[variables:]
    tape.events.extend([2 * i + 1 for i in left])
    return _finish(tape, [*rms, *kept], len(rms), before)


@lru_cache(maxsize=1024)
def _adafactor_parameter(optimizer: Optimizer, spec: _Spec, left: int, first: bool, gpu: Multiprocessors) -> _Program:
    """One parameter's turn, statement by statement, in float32 throughout.

    The variables grad, p_data_fp32 and update hold the tensors of the parameter before until they are assigned anew:
    `left` of them, all three or, where that one is float32 itself, the update. RMS is a tensor on the GPU.
    """
    tape = Tape()
    shape, dtype, _ = spec
    nbytes, half = prod(shape) * 4, dtype != "fp32"
    held = [Storage(tape, 0, "") for _ in range(left if first else left + 1)]
    before = len(held)
    tape.events.clear()
    rms = None if first else held.pop()
    update = held.pop() if held else None
    p_fp32 = held.pop() if held else None
    grad = held.pop() if held else None
    grad = None
    if half:
        grad = Storage(tape, nbytes, "gradient, float32")
    states = [Storage(tape, n, s.name) for s, n, _ in _kept(optimizer, spec) if s.name != "RMS"] if first else []
    p_fp32 = None
    if half:
        p_fp32 = Storage(tape, nbytes, "parameter, float32")
    rms = _root_mean_square(tape, shape, gpu)
    square = Storage(tape, nbytes, "squared gradient")
    shifted = Storage(tape, nbytes, "squared gradient, shifted")
    del square
    update = shifted
    del shifted
    update = _factored(tape, shape, gpu) if len(shape) > 1 else Storage(tape, nbytes, "update")
    norm = _root_mean_square(tape, shape, gpu)
    clipped = Storage(tape, 4, "norm of the update, clipped")
    del norm, clipped
    tape.moment(nbytes, "update, negated")
    variables = [s for s in (grad, p_fp32, update) if s is not None]
    return _finish(tape, [s.id for s in (rms, *states, *variables)], before=before)


def _factored(tape: Tape, shape: Shape, gpu: Multiprocessors) -> Storage:
    """Means over rows and columns, and the update from their product (_approx_sq_grad)."""
    outer, rows, columns = prod(shape[:-2]), shape[-2], shape[-1]
    row_bytes, column_bytes = outer * rows * 4, outer * columns * 4
    mean = Storage(tape, row_bytes, "mean over columns")
    _reduce(tape, columns, outer * rows, False, gpu)
    del mean
    mean = Storage(tape, column_bytes, "mean over rows")
    _reduce(tape, rows, outer * columns, True, gpu, columns)
    del mean
    mean = Storage(tape, outer * 4, "mean of exp_avg_sq_row")
    _reduce(tape, rows, outer, False, gpu)
    r_factor = Storage(tape, row_bytes, "row factor")
    del mean
    c_factor = Storage(tape, column_bytes, "column factor")
    update = Storage(tape, outer * rows * columns * 4, "update")
    del r_factor, c_factor
    return update


def _root_mean_square(tape: Tape, shape: Shape, gpu: Multiprocessors) -> Storage:
    """`tensor.norm(2) / numel ** 0.5`."""
    norm = Storage(tape, 4, "norm")
    _reduce(tape, prod(shape), 1, False, gpu)
    out = Storage(tape, 4, "RMS")
    del norm
    return out


def _reduce(tape: Tape, inputs: int, outputs: int, across: bool, gpu: Multiprocessors, columns: int = 1) -> None:
    """The buffers of one float32 reduction: partial results of blocks and a semaphore for each output block."""
    if inputs * outputs * 4 > _INDEX_LIMIT:  # halved until 32 bits address it (TensorIterator::with_32bit_indexing)
        if outputs > columns:
            half = outputs // columns // 2 * columns
            parts = ((inputs, half), (inputs, outputs - half))
        else:
            parts = ((inputs // 2, outputs), (inputs - inputs // 2, outputs))
        for part_inputs, part_outputs in parts:
            _reduce(tape, part_inputs, part_outputs, across, gpu, columns)
        return
    partial, semaphores = reduction_buffers(inputs, outputs, across, gpu, columns)
    if partial:
        buffer = Storage(tape, partial, "partial results of a reduction")
        tape.moment(semaphores, "semaphores of a reduction")
        del buffer


def _power(n: int) -> int:
    """The largest power of two up to `n`, at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


@lru_cache(maxsize=1024)
def reduction_buffers(
    inputs: int, outputs: int, across: bool, gpu: Multiprocessors, columns: int = 1
) -> tuple[int, int]:
    """Bytes that a float32 reduction takes for partial results and for semaphores; (0, 0) where no block needs help.

    `inputs` elements go into each of `outputs`; `across`: the summed elements are not neighbours in memory (a mean
    over rows), and `columns` is the length of a row. Source: Reduce.cuh, setReduceConfig.
    """
    most, vector = 512, 1
    if across:
        vector = 4 if columns % 4 == 0 else 2 if columns % 2 == 0 else 1
        most //= vector
        dim0, dim1 = outputs // vector, inputs
    else:
        dim0, dim1 = (inputs // 4 if inputs >= 128 else inputs), outputs
    across_power = _power(dim0) if dim0 < most else most
    height = min(_power(dim1) if dim1 < most else most, most // min(across_power, 32))
    width = min(across_power, most // height)
    step_input, step_output = (1, width) if across else (width, 1)
    split_warps = -(-inputs // step_input) >= min(height * 16, 256)
    if split_warps:
        step_input *= height
    else:
        step_output *= height
    values = -(-inputs // step_input)
    grid = -(-(outputs // vector) // step_output)
    target = gpu.number * (gpu.threads // (width * height))
    if not split_warps or values < 256 or grid > target:
        return 0, 0
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    if blocks < 2:
        return 0, 0
    return 4 * outputs * blocks * (width * vector if across else 1), 4 * grid


# --- clipping and float16 -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _clip_program(specs: _Specs) -> _Program:
    """_get_total_norm and _clip_grads_with_norm_ of clip_grad.py."""
    tape = Tape()
    norms: list[Tensor] = []
    for same in _by_dtype(specs):
        chunks = max(-(-prod(shape) // _CHUNK) for shape, _, _ in same)
        partial = tape.new((len(same) * chunks,), "fp32", "partial norms of gradients")
        norms += [tape.new((), dtype, "norm of a gradient") for _, dtype, _ in same]
        del partial
    dtypes = {dtype for _, dtype, _ in specs}
    dtype = dtypes.pop() if len(dtypes) == 1 else "fp32"
    stacked = tape.new((len(norms),), dtype, "norms of gradients")
    total = tape.new((), dtype, "norm of all gradients")
    del stacked
    del norms
    shifted = tape.new((), dtype, "norm, shifted")
    inverse = tape.new((), dtype, "norm, inverse")
    factor = tape.new((), dtype, "clipping factor")
    del inverse
    del shifted
    clamped = tape.new((), dtype, "clipping factor, clamped")
    del factor
    del clamped
    assert total.storage is not None
    return _finish(tape, [total.storage.id])


@lru_cache(maxsize=1)
def _unscale_program() -> _Program:
    """GradScaler.unscale_: the inverse scale by way of float64, and found_inf with a copy of each for the device."""
    tape = Tape()
    double = Storage(tape, 8, "scale, float64")
    inverse = Storage(tape, 8, "inverse scale, float64")
    del double
    inv_scale = Storage(tape, 4, "inverse scale")
    del inverse
    found_inf = Storage(tape, 4, "found_inf")
    on_device = Storage(tape, 4, "found_inf of the device")
    scale_on_device = Storage(tape, 4, "inverse scale of the device")
    del scale_on_device
    del inv_scale
    del found_inf
    return _finish(tape, [on_device.id])
