"""Events -> MemoryEstimate: the peaks, where they are, and what is alive at the highest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vramplan.planner import around, blocks, sharding, trl, units
from vramplan.planner.allocator import Allocator, Streams
from vramplan.planner.device import nccl_bytes
from vramplan.planner.errors import UsageError
from vramplan.planner.layers import Moe
from vramplan.planner.parameters import is_quantised
from vramplan.planner.run import Run, Stretch, alive
from vramplan.planner.trainer import TRAINERS
from vramplan.planner.training import OF_TRAINING
from vramplan.planner.versions import as_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vramplan.planner.allocator import OutOfMemory, Replay
    from vramplan.planner.attention import Kernel
    from vramplan.planner.device import Device
    from vramplan.planner.layers import Architecture
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.run import Program
    from vramplan.planner.training import TrainingOptions

MASKS_FEWER_EXPERTS = (5, 18)  # of transformers: integrations/moe.py, only under expert parallelism from here on
CACHES_EACH = (5, 24)  # of transformers: cache_utils.py, keys and values each in their own dtype from here on
PREPARED = 1  # of a run's loading: the stretch that prepares a model in 4 bit
READY = 3  # so many stretches of it are there on one GPU too
STEPS = 4  # the first makes optimizer states and workspaces, the second meets them, the rest settle fragmentation
SETTLED = 1000  # a step that adds less than one part in so many to what is reserved is not worth another replay

# The rows of a breakdown in their order, each with what it stands on.
SOURCES = {
    "weights": "the config's tensors, in the dtype they are held in (transformers, from_pretrained)",
    "weights, 4 bit": "bitsandbytes, functional.quantize_4bit: NF4, one absmax for 64 weights",
    "adapter": "PEFT, tuners/lora/layer.py: A and B, float32",
    "gradients": "torch, AccumulateGrad: one for each trained weight, in its dtype",
    "optimizer states": "the optimizer's step (torch.optim, bitsandbytes.optim, transformers.Adafactor)",
    "saved activations": "torch.autograd: what the ops played so far have saved for backward",
    "logits and loss": "transformers, loss/loss_utils.py: ForCausalLMLoss on float32 logits",
    "temporary buffers": "the op that runs at the peak, and locals of the code around it",
    "batch": "the Trainer's inputs: token ids, mask and labels, int64",
    **sharding.SOURCES,
    "cuBLAS workspace": "torch, aten/src/ATen/cuda/CublasHandlePool.cpp: one for each thread",
    "block rounding": "torch, CUDACachingAllocator: blocks are multiples of 512 B, tails up to 1 MiB stay with them",
}


@dataclass(frozen=True, slots=True)
class Component:
    """One row of the breakdown at the peak: what it is, its bytes, how they come about, and where that is from."""

    name: str
    bytes: int
    formula: str
    source: str


@dataclass(frozen=True, slots=True)
class Moment:
    """One stretch of the step that holds the peak: how high it went, and where it ended, in allocated bytes."""

    phase: str
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: the bytes of its peaks, where the highest is, what is alive there (the rows sum to it).

    `where` says in which process and state it is, where that is not training itself.
    """

    name: str
    where: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_phase: str
    components: tuple[Component, ...]
    timeline: tuple[Moment, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a run needs on one GPU, in bytes; `components` are alive at the peak and sum to it exactly.

    `context_bytes` is as the driver's tools show it; `hidden_bytes` of it are what the driver keeps for itself, beyond
    what CUDA counts as the GPU's memory. `before_allocated_bytes` and `before_reserved_bytes` are the peaks before the
    first step, while the model is loaded and shared; what is cached there goes for nothing. `paged_bytes` are optimizer
    states in managed memory, which the driver moves off the GPU when room is short: they are in none of the other
    figures. Under a limit, `retries` is how often PyTorch gives its whole cache back to make room in training, and
    `out_of_memory` the phase in which that is not enough: figures are then those up to there. `phases` are those that
    were asked for; the figures are of `phase`, which reserves most.
    """

    components: tuple[Component, ...]
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    hidden_bytes: int
    peak_phase: str
    before_allocated_bytes: int
    before_reserved_bytes: int
    loaded_bytes: int
    ready_bytes: int
    timeline: tuple[Moment, ...] = ()
    paged_bytes: int = 0
    nccl_bytes: int = 0  # of `context_bytes`: what NCCL takes where several GPUs share the run
    notes: tuple[str, ...] = ()
    sharing_notes: tuple[str, ...] = ()  # those of `notes` that say how several GPUs share the run
    retries: int = 0
    out_of_memory: str = ""
    phase: str = "training"
    phases: tuple[Phase, ...] = ()

    @property
    def device_bytes(self) -> int:
        """What nvidia-smi shows for a GPU with this process alone: reserved memory and the CUDA context."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def needed_bytes(self) -> int:
        """What a GPU must have in CUDA's count, to be held against the memory that CUDA sees there."""
        return self.most_reserved_bytes + self.context_bytes - self.hidden_bytes

    @property
    def most_reserved_bytes(self) -> int:
        """What PyTorch must be able to reserve, from loading on, so that training has its whole cache."""
        return max(self.peak_reserved_bytes, self.before_allocated_bytes)


def settings(options: TrainingOptions, on: Device) -> blocks.Settings:
    """What the ops depend on, from what the user asked for and the GPU."""
    autocast = None if options.mixed_precision == "no" else options.mixed_precision
    return blocks.Settings(
        batch=options.batch_size,
        seq=options.seq_len,
        method=options.method,
        weights_dtype=options.weights_dtype,
        autocast=autocast,
        compute_dtype=autocast or options.weights_dtype,
        adapter_dtype=TRAINERS[options.trainer].adapter_dtype(options.method),
        rank=options.rank,
        lora_dropout=options.lora_dropout,
        double_quant=options.double_quant,
        prepare_kbit=options.prepare_kbit,
        checkpointing=options.gradient_checkpointing,
        kernel=_kernel(options, on),
        masked=options.padded,
        capability=on.capability,
        multiprocessors=on.multiprocessors,
        torch=on.torch,
        caches_as_keys=on.transformers < CACHES_EACH,
        masked_experts=on.transformers < MASKS_FEWER_EXPERTS,
    )


def _kernel(options: TrainingOptions, on: Device) -> Kernel:
    if options.attention == "eager":
        return "eager"
    if options.attention == "flash_attention_2":
        return "flash_attention_2"
    return on.kernel


def run_of(architecture: Architecture, options: TrainingOptions, on: Device, counts: ParameterCounts) -> Run:
    """The run that `options` describe, ready to be played.

    Raises UsageError where the optimizer has no kernel for what is trained, or where PEFT's adapter cannot run.
    """
    if any(target.module.variant == "router_linear" for target in counts.targets):
        raise UsageError(  # lora.Linear.forward asks the base's result for a dtype, and the router returns a tuple
            f"PEFT adapts the router of {architecture.model_type} too, and then its forward fails; "
            "name other modules, such as attention (--target-modules)"
        )
    architecture = as_of(architecture, on.transformers)
    _refuse_mixed(architecture, options)
    outside = architecture.outside if options.method == "qlora" else ()
    run = Run(
        architecture,
        settings(options, on),
        counts,
        options.optimizer,
        options.gradient_accumulation_steps,
        _quantised(architecture, options),
        on.workspace_bytes,
        TRAINERS[options.trainer],
        frozenset(module.name for module in outside if is_quantised(module, architecture)),
        sharding.of(options),
    )
    run.check()
    return run


def _refuse_mixed(architecture: Architecture, options: TrainingOptions) -> None:
    """torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py: FSDP expects uniform original parameter dtype."""
    alike = options.weights_dtype == "fp32" or options.mixed_precision != "no" or options.method != "full"
    if options.parallel == "fsdp" and not alike and any(weight.wide for _, _, weight in architecture.weights()):
        raise UsageError(
            f"transformers keeps routers of {architecture.model_type} in float32, and fully_shard trains weights of "
            "one dtype; train all in float32, with or without mixed precision (--weights-dtype)"
        )


def estimate(
    architecture: Architecture,
    options: TrainingOptions,
    on: Device,
    counts: ParameterCounts,
    limit_bytes: int | None = None,
    run: Run | None = None,
) -> MemoryEstimate:
    """Plays the run and replays it through the allocator, which may reserve `limit_bytes` if they are given.

    `run` is what `run_of` makes of the rest, where that is at hand. Raises UsageError for what no machine holds.
    """
    run = run or run_of(architecture, options, on, counts)
    allocator = _allocator(run, options, limit_bytes)
    sources = SOURCES | TRAINERS[options.trainer].sources | dict(run.sharing.sources if run.sharing else {})
    made = replay(run, options, on, sources, limit_bytes, allocator)
    steps = Phase(
        "training", "", made.peak_allocated_bytes, made.peak_reserved_bytes, made.peak_phase, made.components,
        made.timeline,
    )  # fmt: skip
    shared_how = tuple(run.sharing.notes(run)) if run.sharing else ()
    made = replace(made, phases=(steps,), sharing_notes=shared_how)
    if options.phases != ("training",) and not (made.out_of_memory and OF_TRAINING.intersection(options.phases)):
        from vramplan.planner import phases

        assert isinstance(allocator, Allocator)  # several GPUs have no phases but training
        made = phases.with_others(made, run, options, on, counts, allocator, sources, limit_bytes)
    nccl, _ = nccl_bytes(options.num_gpus, options.parallel)
    context = made.context_bytes + nccl
    return replace(made, context_bytes=context, nccl_bytes=nccl, notes=_notes(run, on, options, made))


def _allocator(run: Played, options: TrainingOptions, limit_bytes: int | None) -> Allocator | Streams:
    expandable = options.expandable_segments
    if options.parallel in ("none", "ddp"):
        return Allocator(expandable_segments=expandable, limit_bytes=limit_bytes)
    return Streams(run.program.streams, sharding.STREAMS, expandable_segments=expandable, limit_bytes=limit_bytes)


class Played(Protocol):
    """A training run as events over one program: a plan's (run.py) or a trace's (probes/trace.py)."""

    @property
    def program(self) -> Program:
        """What is known of each tensor."""

    @property
    def loading(self) -> tuple[Stretch, ...]:
        """The model on the GPU, k-bit preparation, the adapter, and what sharing the model makes of it."""

    @property
    def paged_bytes(self) -> int:
        """Optimizer states in managed memory."""

    def step(self, number: int) -> list[Stretch]:
        """Optimizer step `number`, from 0."""


def replay(
    run: Played, options: TrainingOptions, on: Device, sources: Mapping[str, str], limit_bytes: int | None = None,
    allocator: Allocator | Streams | None = None,
) -> MemoryEstimate:  # fmt: skip
    """Replays a run through the allocator; see `estimate`. `sources` are the rows of the breakdown, in their order."""
    program = run.program
    if allocator is None:
        allocator = _allocator(run, options, limit_bytes)
    best, phase, failed = -1, "", ""
    timeline: tuple[Moment, ...] = ()
    at_best: tuple[set[int], Sequence[Stretch], int]

    def replayed(held: set[int], played: Sequence[Stretch], position: int) -> Replay:
        nonlocal best, phase, failed, at_best, timeline
        stretch = played[position]
        result = allocator.replay(stretch.events, program.sizes)
        if result.peak_allocated_bytes > best:
            best, phase, timeline = result.peak_allocated_bytes, stretch.name, ()
            at_best = (held, played[: position + 1], result.peak_allocated_event)
        if result.out_of_memory:
            if limit_bytes is None:
                raise no_room(result.out_of_memory, "--batch-size or --seq-len")
            failed = stretch.name
        return result

    beginning = list(run.loading)

    def loaded(position: int) -> Replay:
        stretch = beginning[position]
        if stretch.wanted and limit_bytes is not None:
            free = limit_bytes - allocator.replay([], program.sizes).reserved_bytes
            if free < stretch.wanted:
                beginning[position] = Stretch(stretch.name, [*stretch.otherwise])
        return replayed(set(), beginning, position)

    before_training = _load(allocator, beginning, loaded)
    reserved = before_training[-1].reserved_bytes
    before = before_training if limit_bytes is not None else _least(run, options, before_training)
    if not failed:
        best = -1  # the peak of a plan is that of training
        if len(beginning) <= READY:
            allocator.empty_cache()  # accelerator.free_memory (transformers/trainer.py, _inner_training_loop)
        reserved = allocator.replay([], program.sizes).reserved_bytes
    retries = allocator.retries  # what loading gave back costs nothing
    for number in range(0 if failed else STEPS):
        held, played = allocator.held, run.step(number)
        moments: list[Moment] = []
        reserved_before = reserved
        for position, stretch in enumerate(played):
            result = replayed(held, played, position)
            note(moments, Moment(stretch.name, result.peak_allocated_bytes, result.allocated_bytes))
            reserved = max(reserved, result.peak_reserved_bytes)
            if failed:
                break
        timeline = timeline or tuple(moments)
        settled = number > 0 and (reserved - reserved_before) * SETTLED < reserved
        if failed or (settled and allocator.retries == retries):
            break  # a step that needed hardly more than the one before: the next is nearly the same
    return MemoryEstimate(
        components=components(program, alive_at(*at_best), best, sources),
        peak_allocated_bytes=best,
        peak_reserved_bytes=reserved,
        context_bytes=on.context_bytes,
        hidden_bytes=on.hidden_bytes,
        peak_phase=phase,
        before_allocated_bytes=max(each.peak_allocated_bytes for each in before),
        before_reserved_bytes=max(each.peak_reserved_bytes for each in before),
        loaded_bytes=before_training[0].allocated_bytes,
        ready_bytes=before_training[:READY][-1].allocated_bytes,
        timeline=timeline,
        paged_bytes=run.paged_bytes,
        retries=allocator.retries - retries,
        out_of_memory=failed,
    )


def _load(
    allocator: Allocator | Streams, beginning: Sequence[Stretch], play: Callable[[int], Replay]
) -> Sequence[Replay]:
    """The stretches before the first step, each by `play`, up to one that finds no room."""
    found: list[Replay] = []
    for position, stretch in enumerate(beginning):
        if position >= READY:
            allocator.empty_cache()  # the Trainer does that before accelerate shares the model
        found.append(play(position))
        if found[-1].out_of_memory:
            break
        if stretch.events and position == PREPARED:
            allocator.empty_cache()  # prepare_model_for_kbit_training ends with it (peft/utils/other.py)
    return found


def _least(run: Played, options: TrainingOptions, as_played: Sequence[Replay]) -> Sequence[Replay]:
    """What loading needs at least: where it can do with less it does, on a GPU that has no more."""
    beginning = run.loading
    if not any(stretch.otherwise for stretch in beginning):
        return as_played
    allocator = _allocator(run, options, None)

    def least(position: int) -> Replay:
        stretch = beginning[position]
        return allocator.replay([*stretch.otherwise] or stretch.events, run.program.sizes)

    return _load(allocator, beginning, least)


def no_room(failed: OutOfMemory, flags: str) -> UsageError:
    """What no machine holds, in words."""
    asked = units.format_bytes(failed.requested_bytes)
    return UsageError(f"a tensor of {asked} finds no room on any machine; lower {flags}")


def note(moments: list[Moment], moment: Moment) -> None:
    """Adds a stretch to the timeline; what follows under the same name belongs to it."""
    if moments and moments[-1].phase == moment.phase:
        last = moments.pop()
        moment = Moment(last.phase, max(last.peak_bytes, moment.peak_bytes), moment.end_bytes)
    moments.append(moment)


def _quantised(architecture: Architecture, options: TrainingOptions) -> list[frozenset[str]]:
    """For each layer, the names of its modules that are held in 4 bit."""
    if options.method != "qlora":
        return [frozenset()] * architecture.num_hidden_layers
    known: dict[tuple[int, bool], frozenset[str]] = {}
    answer: list[frozenset[str]] = []
    last = architecture.num_hidden_layers - 1
    for layer, kind in enumerate(architecture.order):
        key = (kind, layer == last)
        if key not in known:
            modules = architecture.kinds[kind].modules
            known[key] = frozenset(m.name for m in modules if is_quantised(m, architecture, layer))
        answer.append(known[key])
    return answer


def alive_at(held: set[int], stretches: Sequence[Stretch], position: int) -> set[int]:
    """What is alive after event `position` of the last of `stretches`, with the tensors `held` before them."""
    *before, last = stretches
    events = [*(e for stretch in before for e in stretch.events), *last.events[: position + 1]]
    return held.difference({e >> 1 for e in events}) | alive(events)


def components(program: Program, held: Iterable[int], total: int, sources: Mapping[str, str]) -> tuple[Component, ...]:
    """The tensors alive at the peak, by part; what the allocator's blocks add is a part of its own."""
    held = sorted(held)
    known = (program.parts, program.labels, program.sizes)
    looked_up = (map(of.__getitem__, held) for of in known)
    counts = Counter(zip(*looked_up, map(program.saved.__contains__, held), strict=True))
    groups: dict[str, Counter[tuple[str, int]]] = {}
    for (part, label, size, saved), n in counts.items():
        name = part or _unnamed_part(label, saved)
        groups.setdefault(name, Counter())[label, size] += n
    rows: list[Component] = []
    for name, source in sources.items():
        if name in groups:
            nbytes = sum(size * n for (_, size), n in groups[name].items())
            rows.append(Component(name, nbytes, _formula(groups[name]), source))
    rounding = total - sum(row.bytes for row in rows)
    if rounding:
        rows.append(Component("block rounding", rounding, "blocks less the bytes asked for", sources["block rounding"]))
    return tuple(rows)


def _unnamed_part(label: str, saved: bool) -> str:
    if around.of_logits(label) or label in trl.TILES:
        return "logits and loss"
    return "saved activations" if saved else "temporary buffers"


def _formula(found: Counter[tuple[str, int]]) -> str:
    """The largest groups of equal tensors in words: count x bytes, label; the rest in one sum."""
    by_size = sorted(found.items(), key=lambda item: -item[0][1] * item[1])
    shown = [f"{n} x {size:,} B ({label})" if n > 1 else f"{size:,} B ({label})" for (label, size), n in by_size[:4]]
    rest = sum(size * n for (_, size), n in by_size[4:])
    return " + ".join([*shown, *([f"{rest:,} B (others)"] if rest else [])])


def _notes(run: Run, on: Device, options: TrainingOptions, made: MemoryEstimate) -> tuple[str, ...]:
    """What a reader needs to know beside the figures."""
    phases = made.phases
    notes = [f"{phase.name}: {phase.where}" for phase in phases if phase.where]
    if made.before_allocated_bytes > made.peak_reserved_bytes:
        notes.append(
            f"before the first step {units.format_gib(made.before_allocated_bytes)} are allocated to load the model"
            f"{' and share it' if run.sharing else ''}, more than training takes; a GPU must hold that too"
        )
    s = run.loaded
    if s.method == "qlora" and s.frozen_dtype == "fp32" and any(phase.name == "generation" for phase in phases):
        notes.append(
            "PEFT's generate goes past accelerate's autocast, so what prepare_kbit made float32 generates in float32, "
            "attention too; a torch.autocast around it keeps that in 16 bit"
        )
    experts = s.method == "qlora" and any(isinstance(layer.mlp, Moe) for layer in run.architecture.kinds)
    if experts:
        notes.append(
            f"the experts of {run.architecture.model_type} are single tensors in transformers, which bitsandbytes does "
            "not quantise: they stay whole, and QLoRA saves little"
        )
    if s.frozen_dtype != s.weights_dtype and options.parallel in ("none", "ddp", "fsdp"):
        wide = 4 * run.plain_parameters
        notes.append(
            f"prepare_kbit holds embeddings, norms{', experts' * experts} and head in float32: "
            f"{units.format_gib(wide)}, twice their size in 16 bit; --no-prepare-kbit keeps them as they are"
        )
    if run.paged_bytes:
        notes.append(
            f"{units.format_gib(run.paged_bytes)} of optimizer states are paged: managed memory that stays on the "
            "GPU while there is room, and in none of these figures"
        )
    if on.gpu is None:
        notes.append("no GPU is named: attention kernel, workspaces and CUDA context are those of an H200 (--gpu)")
    elif not on.context_measured:
        notes.append(f"the CUDA context is not measured on {on.gpu.title}; an H200's is used, and yours may differ")
    title = on.gpu.title if on.gpu else "this GPU"
    if "math" in run.kernels:
        notes.append(
            f"PyTorch has no fused kernel for this attention on {title}: sdpa is planned with its math kernel, which "
            "holds every score in float32"
        )
    elif run.kernels & {"flash", "efficient"}:
        names = " and ".join(sorted(run.kernels))
        notes.append(f"sdpa is planned with the {names} kernel, as PyTorch takes it on {title}")
    if run.sharing is not None:
        notes += made.sharing_notes
        if options.parallel == "zero3" and s.checkpointing:
            notes.append(
                "DeepSpeed 0.19.8's ZeRO 3 with checkpointing failed on a GPU with torch 2.11, and has run on a CPU "
                "alone, with torch 2.13; --no-gradient-checkpointing ran on both"
            )
        nccl, measured = nccl_bytes(options.num_gpus, options.parallel)
        groups = nccl - nccl_bytes(options.num_gpus)[0]
        if groups or measured != options.num_gpus or on.gpu is None or on.gpu.name != "h200":
            own = f", {units.format_gib(groups)} of it DeepSpeed's own, as in one run of ZeRO 2" if groups else ""
            notes.append(
                f"NCCL's buffers are counted with {units.format_gib(nccl)} on each GPU, as measured on {measured} "
                f"H200s{own}"
            )
    return tuple(notes)
