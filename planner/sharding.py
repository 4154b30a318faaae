"""Several GPUs: each rank's share of a run, and the buffers that sharing it takes.

A sharing is put around the micro-steps of run.py: at the places where a library's hooks run it adds what they allocate
and free, on the CUDA stream on which they do. The step itself is played as on one GPU.

DDP holds everything on every rank and adds gradients up in buckets. FSDP2 is torch's fully_shard as accelerate sets it
up for transformers.Trainer: a unit for each decoder layer, one for the token embedding, one for the final norm and the
head. Every rank holds a slice of each weight's first dimension; a unit's weights are gathered before it runs and let go
after it, and its gradients are added up and sliced as soon as its backward is done.

Rank 0 is played. Slices are as long as the first, so no rank holds more than it does.

Sources (torch 2.11, accelerate 1.15): torch/nn/parallel/distributed.py, torch/csrc/distributed/c10d/reducer.cpp,
torch/distributed/fsdp/_fully_shard/, accelerate/accelerator.py (_prepare_fsdp2), accelerate/utils/fsdp_utils.py
(fsdp2_prepare_model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from vramplan.planner import around, loading, optimizer
from vramplan.planner.paper import ITEMSIZE, Parameter, Shape
from vramplan.planner.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.layers import Module
    from vramplan.planner.run import MicroStep, Program, Run, Stretch
    from vramplan.planner.trainer import Trainer
    from vramplan.planner.training import TrainingOptions

COPY_IN, REDUCE = 1, 2  # FSDP's all_gather_copy_in_stream and reduce_scatter_stream
STREAMS = 3
PADDED = 1.1  # so many times as large as without padding is worth a word
GATHERED, BUFFERS = "gathered weights", "communication buffers"
BUCKETS, MASTER = "gradient buckets", "master weights"
SOURCES = {
    BUCKETS: "torch, csrc/distributed/c10d/reducer.cpp: gradients once more, side by side, to be added up",
    MASTER: "deepspeed, runtime/zero/stage_1_and_2.py: this rank's part of the trained weights in float32",
    GATHERED: "torch, fully_shard: the whole weights of the units that run, and what they are gathered in",
    BUFFERS: "gradients side by side, to be added up over the ranks (torch, fully_shard; deepspeed, stage_1_and_2.py)",
}


class Sharing(Protocol):
    """How several GPUs share a run."""

    ranks: int
    sources: ClassVar[Mapping[str, str]]  # what rows of the breakdown stand on, where it is not what it is on one GPU

    def played(self, s: Settings) -> Settings:
        """The settings by which each rank's ops run."""

    def parameters(self, run: Run) -> list[Parameter]:
        """The trained parameters as this rank's optimizer holds them."""

    def trainer(self, trainer: Trainer) -> Trainer:
        """The training loop, as it runs under this."""

    def loading(self, run: Run) -> tuple[Stretch, ...]:
        """What happens before the first step; the first three stretches are those of one GPU."""

    def beginning(self, run: Run, number: int) -> list[Stretch]:
        """What happens before the first forward of step `number`, once those before it were played."""

    def update(self, run: Run, first: bool) -> list[Stretch]:
        """Clipping and the optimizer's step."""

    def in_host_memory(self, run: Run) -> dict[str, int]:
        """Bytes that a rank keeps in host memory while it trains, by what they are."""

    def notes(self, run: Run) -> list[str]:
        """What a reader needs to know of it."""

    def micro_step(self, run: Run, made: MicroStep, first: MicroStep, last: bool) -> tuple[list[Stretch], list[int]]:
        """A micro-step with what sharing adds, and the gradients that are left; `first` made those that it adds to."""


# --------------------------------------------------------------------------------------------------------------- shares


def rows_of(rows: int, ranks: int, rank: int) -> int:
    """How many of `rows` a rank holds: torch.chunk's slices, all of the first's length but the last ones."""
    length = -(-rows // ranks)
    return min(length, max(0, rows - rank * length))


@dataclass(frozen=True, slots=True)
class Share:
    """One parameter: its whole shape, the dtype that its shards are held in, and the dtype in which it is gathered.

    `quantised`: they are pairs of 4-bit weights, stored as numbers of that dtype. `flat`: it is cut as one row of
    numbers (DeepSpeed), and not along its first dimension; `stays`: it is always whole there.
    """

    name: str
    shape: Shape
    dtype: str
    gathered: str
    trained: bool
    quantised: bool = False
    flat: bool = False
    stays: bool = False

    @property
    def kept(self) -> str:
        """What a shard of it is called."""
        return f"shard, {'4 bit' if self.quantised else self.dtype}"

    def part(self, method: str) -> str:
        """The row of the breakdown in which its shards count."""
        if self.quantised:
            return "weights, 4 bit"
        return "adapter" if self.trained and method != "full" else "weights"

    def local(self, ranks: int) -> Shape:
        """The first rank's slice, which all others are padded to (_fsdp_param.py, padded_sharded_param_size)."""
        return _slice(self.shape, ranks, self.flat)


@lru_cache(maxsize=4096)  # a model has few shapes, and each many times
def _slice(shape: Shape, ranks: int, flat: bool) -> Shape:
    if flat:
        return (-(-prod(shape) // ranks),)
    return (rows_of(shape[0], ranks, 0), *shape[1:])


_BLOCK_BYTES = 128 * 16  # that a block of threads copies


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered and let go together (FSDPParamGroup); `reshard`: after the forward too."""

    shares: tuple[Share, ...]
    reshard: bool

    def shards(self, ranks: int) -> list[int]:
        """Bytes of each parameter's shard."""
        return [prod(s.local(ranks)) * ITEMSIZE[s.dtype] for s in self.shares]

    def cast(self, ranks: int) -> int:
        """Bytes of the shards that are cast before they are gathered (_get_param_all_gather_inputs)."""
        return sum(prod(s.local(ranks)) * ITEMSIZE[s.gathered] for s in self.shares if s.gathered != s.dtype)

    def whole(self, ranks: int) -> list[int]:
        """Bytes of each parameter as it comes out of an all-gather: every rank's padded slice."""
        return [ranks * prod(s.local(ranks)) * ITEMSIZE[s.gathered] for s in self.shares]

    def reduced(self, ranks: int) -> tuple[int, int]:
        """Elements of this rank's slices of all gradients, and bytes of an element in the trained weights' dtype."""
        trained = [s for s in self.shares if s.trained]
        return sum(prod(s.local(ranks)) for s in trained), ITEMSIZE[trained[0].dtype] if trained else 0

    def places(self, ranks: int) -> int:
        """Bytes of the tables by which chunk_cat's kernel finds what to copy where (ATen/native/cuda/TensorShape.cu).

        A number for each block of threads, six for each tensor, and two.
        """
        slices = [prod(s.local(ranks)) * ITEMSIZE[s.gathered] for s in self.shares if s.trained]
        return 8 * (sum(-(-nbytes // _BLOCK_BYTES) for nbytes in slices) + 6 * len(slices) + 2)


# ------------------------------------------------------------------------------------------------------------------ DDP

FIRST_BUCKET, BUCKET, BROADCAST = 2**20, 25 * 2**20, 250 * 2**20  # torch/nn/parallel/distributed.py
_IN_FLIGHT = 2  # flat tensors that a broadcast of parameters holds at once (comm.cpp, broadcast_coalesced)


class Bucket(NamedTuple):
    """Tensors of one dtype side by side: the place of the first among all, how many they are, their bytes together."""

    first: int
    tensors: int
    bytes: int


def buckets(sizes: Iterable[tuple[int, str]], limits: Sequence[int]) -> list[Bucket]:
    """The buckets that tensors of (bytes, dtype) are put in, in the order in which they become full.

    reducer.cpp, compute_bucket_assignment_by_size: a bucket is closed once it has reached its limit; the first of a
    dtype has the first limit, the last limit holds for all further ones.
    """
    found: list[Bucket] = []
    filling: dict[str, Bucket] = {}
    closed: dict[str, int] = {}
    for place, (nbytes, dtype) in enumerate(sizes):
        first, tensors, before = filling.get(dtype, (place, 0, 0))
        filling[dtype] = Bucket(first, tensors + 1, before + nbytes)
        if before + nbytes >= limits[min(closed.get(dtype, 0), len(limits) - 1)]:
            found.append(filling.pop(dtype))
            closed[dtype] = closed.get(dtype, 0) + 1
    return found + list(filling.values())


class Ddp:
    """DistributedDataParallel, as accelerate wraps a model for the Trainer: everything on every rank.

    `find_unused` parameters is what the Trainer asks for with an adapter, and without checkpointing: then buckets are
    those of the beginning, and outputs are cloned. Else one bucket of each dtype is made first, and after the first
    step they are made anew in the order in which gradients came.
    """

    sources: ClassVar[Mapping[str, str]] = {}

    def __init__(self, ranks: int, *, find_unused: bool) -> None:
        self.ranks, self.find_unused = ranks, find_unused
        self._buckets: list[int] = []

    def played(self, s: Settings) -> Settings:
        """As on one GPU."""
        return s

    def trainer(self, trainer: Trainer) -> Trainer:
        """The outputs are cloned where unused parameters are looked for."""
        if not self.find_unused or trainer.loss is not around.loss:
            return trainer
        return replace(trainer, loss=partial(around.loss, cloned=True))

    def parameters(self, run: Run) -> list[Parameter]:
        """All of them."""
        return run.trained

    def loading(self, run: Run) -> tuple[Stretch, ...]:
        """Rank 0's parameters are sent to all others, some 250 MiB at a time; then buckets are made."""
        from vramplan.planner.run import Stretch

        before, new = loading.play(run), run.program.new
        sent = buckets(_tensors(run), [BROADCAST])
        events: list[int] = []
        flying: list[list[int]] = []  # a tensor that is alone is sent from where it lies
        for bucket in sorted(sent):
            if len(flying) == _IN_FLIGHT:
                events += [2 * i + 1 for i in flying.pop(0)]
            flying.append([new(bucket.bytes, "parameters, to be sent", BUFFERS)] if bucket.tensors > 1 else [])
            events += [2 * i for i in flying[-1]]
        events += [2 * i + 1 for each in flying for i in each]
        limits = [FIRST_BUCKET, BUCKET] if self.find_unused else [2**62]
        sizes = [(p.numel * ITEMSIZE[p.dtype], p.dtype) for p in run.trained]
        made = sorted(buckets(sizes, limits), reverse=True)
        self._buckets = [new(bucket.bytes, "gradient bucket", BUCKETS) for bucket in made]
        events += [2 * i for i in self._buckets]
        return (*before, Stretch("sharing", events))

    def beginning(self, run: Run, number: int) -> list[Stretch]:
        """The second step begins with new buckets (rebuild_buckets); the old ones go before those are made."""
        from vramplan.planner.run import Stretch

        if number != 1 or self.find_unused:
            return []
        made = run.first_micro_step
        grads = set(made.grads)
        came = (e >> 1 for stretch in made.stretches for e in stretch.events if not e & 1 and e >> 1 in grads)
        dtype = dict(zip(made.grads, (p.dtype for p in run.trained), strict=True))
        sizes = [(run.program.sizes[g], dtype[g]) for g in came]
        old = self._buckets
        made_anew = buckets(sizes, [FIRST_BUCKET, BUCKET])
        self._buckets = [run.program.new(bucket.bytes, "gradient bucket", BUCKETS) for bucket in made_anew]
        return [Stretch("gradient buckets", [*(2 * i + 1 for i in old), *(2 * i for i in self._buckets)])]

    def update(self, run: Run, first: bool) -> list[Stretch]:
        """As on one GPU."""
        return run.update_alone(first)

    def in_host_memory(self, run: Run) -> dict[str, int]:  # noqa: ARG002
        """Nothing."""
        return {}

    def notes(self, run: Run) -> list[str]:
        """What DDP holds twice."""
        wide = sum(run.program.sizes[i] for i in self._buckets)
        clones = ", and clones the logits, because the Trainer has it look for unused parameters" * self.find_unused
        return [f"DDP holds gradients twice, as such and in buckets of {format_bytes(wide)} together{clones}"]

    def micro_step(self, run: Run, made: MicroStep, first: MicroStep, last: bool) -> tuple[list[Stretch], list[int]]:  # noqa: ARG002
        """Gradients are copied to their buckets and back: nothing is allocated."""
        return made.stretches, first.grads


def _tensors(run: Run) -> Iterator[tuple[int, str]]:
    """Bytes and dtype of every parameter and buffer, in the order of named_parameters."""
    a, s = run.architecture, run.loaded
    for _, module, layer in a.modules():
        held, quantised = (
            (run.outer, run.quantised_outside) if layer is None else (run.layers[layer], run.quantised[layer])
        )
        for weight in a.own_weights(module):
            if module.name in quantised and weight.name == "weight":
                yield -(-weight.numel // 2), "uint8"
            else:
                dtype = weight.dtype(s.frozen_dtype)
                yield weight.numel * ITEMSIZE[dtype], dtype
        for p in held.parameters:
            if s.method != "full" and _adapts(p, module):
                yield p.numel * ITEMSIZE[p.dtype], p.dtype
    for _, nbytes in loading.buffers(a):
        yield nbytes, "fp32"


def alive_in_order(events: Iterable[int]) -> list[int]:
    """The tensors that are there after `events`, in the order in which they were made."""
    there: dict[int, None] = {}
    for event in events:
        if event & 1:
            del there[event >> 1]
        else:
            there[event >> 1] = None
    return list(there)


# ---------------------------------------------------------------------------------------------------------------- FSDP2


class Fsdp:
    """FSDP2 over `ranks` GPUs, as accelerate prepares a model for the Trainer (fsdp2_prepare_model)."""

    sources: ClassVar[Mapping[str, str]] = {
        "weights": "torch, fully_shard: of each of the config's tensors rank 0's slice, in the dtype it is held in",
        "weights, 4 bit": "bitsandbytes, NF4: rank 0's slice of the packed weights, and the absmax of all",
        "adapter": "torch, fully_shard: rank 0's slice of PEFT's A and B",
        "gradients": "torch, fully_shard: rank 0's slice of the sums, in the trained weights' dtype; before, whole",
    }

    def __init__(self, ranks: int, *, reshard_after_forward: bool = True, cpu_offload: bool = False) -> None:
        self.ranks = ranks
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self._units: Units | None = None

    def played(self, s: Settings) -> Settings:
        """Without autocast: fully_shard gathers weights in the dtype that mixed precision names, and casts inputs.

        accelerate gives MixedPrecisionPolicy one dtype for parameters, reduction and outputs (set_mixed_precision).
        """
        if s.autocast is None:
            return replace(s, hooked=True)
        low = s.autocast
        return replace(
            s, weights_dtype=low, autocast=None, compute_dtype=low, adapter_dtype=low, prepare_kbit=False, hooked=True,
            keeps_wide=False,
        )  # fmt: skip

    def trainer(self, trainer: Trainer) -> Trainer:
        """As on one GPU."""
        return trainer

    def beginning(self, run: Run, number: int) -> list[Stretch]:  # noqa: ARG002
        """Nothing."""
        return []

    def units(self, run: Run) -> Units:
        """What fully_shard makes of the model."""
        if self._units is None:
            self._units = units_of(run, reshard=self.reshard_after_forward)
        return self._units

    def parameters(self, run: Run) -> list[Parameter]:
        """The shards of rank 0, in the order of the model's parameters; none where they are in host memory."""
        if self.cpu_offload:
            return []
        shares = {s.name: s for unit in self.units(run).all for s in unit.shares}
        found = (shares[p.name] for p in run.trained)
        return [Parameter(s.name, s.local(self.ranks), s.dtype, True) for s in found]

    def loading(self, run: Run) -> tuple[Stretch, ...]:
        """A 4-bit model is quantised on each GPU as a whole; any other is loaded in host memory, and comes by units."""
        from vramplan.planner.run import Stretch

        units, program = self.units(run), run.program
        if run.loaded.method == "qlora":
            before = loading.play(run)
            there = alive_in_order(e for stretch in before for e in stretch.events)
            gone = [2 * i + 1 for i in there if program.labels[i] not in STAYS]
            run.biases.clear()  # a bias is gathered in the dtype in which it is added
        else:
            before = (Stretch("loading", []), Stretch("k-bit preparation", []), Stretch("adapter", []))
            gone = []
        tables = [f"{m.name}.weight" for m in (run.token_embedding, run.architecture.output)]
        events: list[int] = []
        for unit in units.all:
            moved = []
            if run.loaded.method != "qlora":  # _init_utils' _move_states_to_device, parameter by parameter
                moved = [
                    program.new(prod(s.shape) * ITEMSIZE[s.dtype], "weight, moved", "", s.name) for s in unit.shares
                ]
                events += [2 * i for i in moved]
            for share, nbytes in zip(unit.shares, unit.shards(self.ranks), strict=True):
                shard = program.new(nbytes, share.kept, share.part(run.loaded.method), share.name)
                events += [2 * shard, *([2 * shard + 1] if self.cpu_offload else [])]
            for i in moved:  # fsdp2_prepare_model has names for the embedding's and the head's weight until it returns
                (gone if program.scopes[i] in tables else events).append(2 * i + 1)
        if run.loaded.method != "qlora":
            events += [2 * program.new(size, label, "weights") for label, size in loading.buffers(run.architecture)]
        return (*before, Stretch("sharding", [*events, *gone]))

    def in_host_memory(self, run: Run) -> dict[str, int]:
        """Bytes that a rank keeps in host memory while it trains: what is offloaded.

        Shards are pinned, and so are their gradients, whose memory PyTorch keeps for the next step; each block of
        pinned memory is rounded up to a power of two (CachingHostAllocator.h, PowerOf2Ceil).
        """
        if not self.cpu_offload:
            return {}
        units = self.units(run).all
        shards = [each for unit in units for each in zip(unit.shares, unit.shards(self.ranks), strict=True)]
        states = [optimizer.state_bytes(run.optimizer, s.local(self.ranks), s.dtype) for s, _ in shards if s.trained]
        return {
            "shards": sum(_pinned(nbytes) for _, nbytes in shards),
            "gradients": sum(_pinned(nbytes) for s, nbytes in shards if s.trained),
            "optimizer states": sum(states),
        }

    def update(self, run: Run, first: bool) -> list[Stretch]:
        """As on one GPU, on the shards; nothing where they are in host memory."""
        return [] if self.cpu_offload else run.update_alone(first)

    def notes(self, run: Run) -> list[str]:
        """What accelerate makes of the options."""
        s, found = run.loaded, []
        if s.method == "full" and s.autocast and s.weights_dtype != "fp32":
            found.append(
                "accelerate holds trained weights in float32 under fsdp with mixed precision, whole in each rank's "
                f"host memory until it has sharded them (with fsdp_config's cpu_ram_efficient_loading in the first's "
                f"alone), and gathers them in {s.autocast}; --mixed-precision no keeps them in {s.weights_dtype}"
            )
        if s.method == "qlora":
            found.append(
                f"4-bit weights are stored as {s.autocast or s.weights_dtype} (bnb_4bit_quant_storage), so that they "
                "are sharded; as uint8, the default, each GPU would keep them whole"
            )
        shares = [share for unit in self.units(run).all for share in unit.shares]
        padded = self.ranks * sum(prod(share.local(self.ranks)) for share in shares)
        real = sum(prod(share.shape) for share in shares)
        if padded > PADDED * real:
            worst = max(shares, key=lambda share: self.ranks * prod(share.local(self.ranks)) - prod(share.shape))
            found.append(
                f"fully_shard cuts weights along their first dimension, so over {self.ranks:,} GPUs all together are "
                f"padded to {padded / real:.1f} times their size: {worst.name} has {worst.shape[0]} rows; "
                "--parallel zero3 cuts them as one row"
            )
        if run.accumulation > 1:
            whole = sum(run.program.sizes[g] for g in run.first_micro_step.grads)
            found.append(
                f"between micro-steps each GPU keeps whole gradients, {format_bytes(whole)}: accelerate adds them up "
                "over the GPUs in the last one alone"
            )
        if self.cpu_offload:
            found.append(
                "offloaded gradients are added up in host memory too: accelerate launch sets a backend for that, and "
                "torchrun needs TrainingArguments(ddp_backend='cuda:nccl,cpu:gloo')"
            )
        return found

    def micro_step(self, run: Run, made: MicroStep, first: MicroStep, last: bool) -> tuple[list[Stretch], list[int]]:
        """The hooks of fully_shard around forward and backward; without `last` no gradient is added up (no_sync)."""
        return _Hooks(self, run, made, first, last).play()


def _pinned(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


# What of a 4-bit weight is no parameter, so that every rank keeps it whole (bitsandbytes, QuantState); and buffers.
STAYS = frozenset(
    {label for double in (False, True) for label, _ in loading.nf4_tensors(64, double)} - {"weight, 4 bit"}
    | {"map of 8-bit values", "rotary frequencies", "embedding scale", "rotary table", "causal mask of every position"}
)


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a model. `embedding` is None where the head shares its matrix: it belongs to `tail` then."""

    embedding: Unit | None
    layers: tuple[Unit, ...]
    tail: Unit
    root: Unit  # what no other unit has; it may have nothing
    norm_in_tail: bool

    @property
    def all(self) -> list[Unit]:
        """In the order in which accelerate shards them."""
        return [*self.layers, *([self.embedding] if self.embedding else []), self.tail, self.root]


def units_of(run: Run, *, reshard: bool) -> Units:
    """The units that accelerate makes of a model."""
    a, s = run.architecture, run.loaded
    tied = a.tied
    token = run.token_embedding
    # accelerate's _find_final_norm looks among the direct children of the base model, and PeftModel hides those
    norms = [m for m in a.final if m.kind == "norm"] if s.method == "full" else []
    tail = [*norms[-1:], *([token] if tied else []), a.output]
    own = {m.name for m in (token, *tail)}
    rest = [m for m in a.outside if m.name not in own]
    quantised = run.quantised_outside

    def shares(modules: Iterable[Module], held: Held, quantised: frozenset[str]) -> tuple[Share, ...]:
        return tuple(share for m in modules for share in _shares(run, m, held, m.name in quantised))

    known: dict[object, tuple[Share, ...]] = {}  # of layers that are alike

    def of_layer(i: int) -> tuple[Share, ...]:
        signature = run.signatures[i]
        if signature not in known:
            known[signature] = shares(a.kinds[a.order[i]].modules, run.layers[i], run.quantised[i])
        return tuple(replace(share, name=f"{a.layer_prefix}.{i}.{share.name}") for share in known[signature])

    return Units(
        None if tied else Unit(shares([token], run.outer, quantised), reshard),
        tuple(Unit(of_layer(i), reshard) for i in range(a.num_hidden_layers)),
        Unit(shares(tail, run.outer, quantised), False),
        Unit(shares(rest, run.outer, quantised), False),
        bool(norms),
    )


def _shares(run: Run, module: Module, held: Held, quantised: bool) -> list[Share]:
    """A module's parameters: its own weights, then its adapter's."""
    s = run.loaded
    low, full = s.autocast, s.method == "full"
    # accelerate makes what is trained float32 under mixed precision, but not beside 4-bit weights
    own = ("fp32" if low else s.weights_dtype) if full else s.frozen_dtype
    found: list[Share] = []
    for weight in run.architecture.own_weights(module):
        name = f"{module.name}.{weight.name}"
        if quantised and weight.name == "weight":
            storage = low or s.weights_dtype
            packed = -(-weight.numel // 2) // ITEMSIZE[storage]  # two weights a byte, stored as numbers of that dtype
            found.append(Share(name, (packed, 1), storage, storage, False, True))
        else:
            dtype = weight.dtype(own)
            found.append(Share(name, weight.shape, dtype, low or dtype, full))
    if not full:
        dtype = s.adapter_dtype
        found += [Share(p.name, p.shape, dtype, low or dtype, True) for p in held.parameters if _adapts(p, module)]
    return found


def _adapts(p: Parameter, module: Module) -> bool:
    """Whether an adapter's weight is one of this module, or of a parameter that it holds by itself."""
    owner = p.name.rpartition(".lora_")[0]
    return owner == module.name or any(owner == f"{module.name}.{weight.name}" for weight in module.weights)


def of(options: TrainingOptions) -> Sharing | None:
    """How the run is shared; None on one GPU."""
    if options.parallel == "fsdp":
        return Fsdp(
            options.num_gpus, reshard_after_forward=options.reshard_after_forward, cpu_offload=options.cpu_offload
        )
    if options.parallel.startswith("zero"):
        from vramplan.planner import zero

        return zero.of(options)
    if options.parallel == "ddp":
        # transformers/trainer.py, _build_accelerator_args: a PeftModel is no PreTrainedModel
        return Ddp(options.num_gpus, find_unused=options.lora or not options.gradient_checkpointing)
    return None


class _Hooks:
    """One micro-step under fully_shard: which units are gathered, and which buffers are held for how long.

    The names are those of _fsdp_param_group.py. A unit is known by its number in the order in which forward leaves it.
    """

    def __init__(self, sharing: Fsdp, run: Run, made: MicroStep, first: MicroStep, last: bool) -> None:
        self.program: Program = run.program
        self.ranks = sharing.ranks
        self.offload = sharing.cpu_offload
        self.made, self.last, self.left = made, last, first.grads
        units = sharing.units(run)
        self.units = units
        self.stretches = [list(stretch.events) for stretch in made.stretches]
        grads = {p.name: g for p, g in zip(run.trained, first.grads, strict=True)}
        self.order = [*([units.embedding] if units.embedding else []), *units.layers, units.tail]
        if units.root.shares:
            self.order.append(units.root)
        self.grads = [[grads[s.name] for s in unit.shares if s.trained] for unit in self.order]
        self.pending: dict[int, int] = {}  # unit -> the output of its all-gather
        self.unsharded: dict[int, list[int]] = {}
        self.kept: int | None = None  # the all-gather's output that the next unit's forward lets go
        self.reduce_input: int | None = None
        self.reduced: list[int] = []
        self.done: set[int] = set()  # units whose post_backward has run

    def play(self) -> tuple[list[Stretch], list[int]]:
        """The stretches with the hooks' events, and the gradients that are left."""
        from vramplan.planner.run import Stretch

        self._forward()
        self._backward()
        names = [stretch.name for stretch in self.made.stretches]
        played = [Stretch(name, events) for name, events in zip(names, self.stretches, strict=True)]
        return played, self.reduced if self.last else self.left

    def _before(self, place: int, *each: list[int]) -> None:
        """Adds events before a stretch, after those that were added before; past the last one, at the end."""
        events = [e for one in each for e in one]
        if place < len(self.stretches):
            at = self._added.setdefault(place, 0)
            self.stretches[place][at:at] = events
            self._added[place] = at + len(events)
        else:
            self.stretches[-1] += events

    @cached_property
    def _added(self) -> dict[int, int]:
        return {}

    def _forward(self) -> None:
        places, units = self.made.places, self.units
        tail = self.order.index(units.tail)
        root = len(self.order) - 1 if units.root.shares else None
        if root is not None:
            self._before(0, self._gather(root), self._wait(root, forward=True))
        if units.embedding is None:  # tied: the matrix is there from the embedding to the end of backward
            self._before(0, self._gather(tail), self._wait(tail, forward=True))
        else:
            self._before(0, self._gather(0), self._wait(0, forward=True))
            self._before(places.get("embedded", 1), self._reshard(0, forward=True))
        first = 1 if units.embedding else 0
        layer = places["forward, embeddings"] + sum(s.name == "forward, embeddings" for s in self.made.stretches)
        for i in range(len(units.layers)):
            self._before(layer + i, self._gather(first + i), self._wait(first + i, forward=True))
            self._before(layer + i + 1, self._reshard(first + i, forward=True))
        if units.embedding is not None:
            at = places["loss, forward"] if units.norm_in_tail else places.get("head", places["loss, forward"])
            self._before(at, self._gather(tail), self._wait(tail, forward=True))
        if self.kept is not None:  # the root's post_forward
            self._before(places["autocast ends"], [2 * self.kept + 1])
            self.kept = None

    def _backward(self) -> None:
        places, units, made = self.made.places, self.units, self.made
        tail = self.order.index(units.tail)
        logits = places.get("logits, backward", places["loss, backward"])
        if units.root.shares:
            self._before(places["loss, backward"], self._pre_backward(len(self.order) - 1))
        self._before(logits, self._pre_backward(tail))
        behind = places["loss, backward"] + sum(s.name == "loss, backward" for s in made.stretches)
        if units.embedding is not None and (made.grads or made.runs[-1]):
            at = behind if units.norm_in_tail else places.get("head, backward", behind)
            self._before(at, self._post_backward(tail))
        first, n = (1 if units.embedding else 0), len(units.layers)
        for back, i in enumerate(reversed(range(n))):
            if made.runs[i]:
                self._before(behind + back, self._pre_backward(first + i))
            if made.needs[i]:
                self._before(behind + back + 1, self._post_backward(first + i))
        if units.embedding is not None and made.needs[0]:
            self._before(behind + n, self._pre_backward(0))
        # _root_post_backward_final_callback, in the order of named_modules: a shared matrix comes with the embedding
        end = len(self.stretches)
        numbers = list(range(len(self.order)))
        early = ([numbers[-1]] if units.root.shares else []) + ([tail] if units.embedding is None else [])
        for i in [*early, *numbers]:
            if i not in self.done:
                self._before(end, self._post_backward(i))
        self._before(end, [2 * i + 1 for i in self.pending.values()])
        if self.reduce_input is not None:
            self._before(end, [2 * self.reduce_input + 1])

    # --- what the hooks allocate and free ------------------------------------------------------------------------

    def _gather(self, i: int) -> list[int]:
        """unshard: shards that need it are cast, and all are gathered in one buffer (foreach_all_gather)."""
        if i in self.pending or i in self.unsharded:
            return []
        unit, new = self.order[i], self.program.new
        events: list[int] = []
        given: list[int] = []  # what is gathered, where that is not the shards themselves
        if self.offload:  # each shard is copied to the GPU, and cast there by itself
            for share, nbytes in zip(unit.shares, unit.shards(self.ranks), strict=True):
                given.append(new(nbytes, "shard, copied from host memory", GATHERED, share.name, COPY_IN))
                events.append(2 * given[-1])
                if share.gathered != share.dtype:
                    copied, low = given.pop(), nbytes // ITEMSIZE[share.dtype] * ITEMSIZE[share.gathered]
                    given.append(new(low, "shard, cast", GATHERED, share.name, COPY_IN))
                    events += [2 * given[-1], 2 * copied + 1]
        elif nbytes := unit.cast(self.ranks):
            given.append(new(nbytes, "shards, cast", GATHERED, "", COPY_IN))
            events.append(2 * given[-1])
        out = self.pending[i] = new(sum(unit.whole(self.ranks)), "weights, gathered", GATHERED, "", COPY_IN)
        return [*events, 2 * out, *(2 * g + 1 for g in given)]

    def _wait(self, i: int, *, forward: bool) -> list[int]:
        """wait_for_unshard: each weight is copied out of the buffer, which forward keeps until the next one returns."""
        if i not in self.pending:
            return []
        unit = self.order[i]
        made = self.unsharded[i] = [
            self.program.new(nbytes, "weight, gathered", GATHERED, share.name)
            for share, nbytes in zip(unit.shares, unit.whole(self.ranks), strict=True)
        ]
        events = [2 * m for m in made]
        out = self.pending.pop(i)
        if forward:
            if self.kept is not None:
                events.append(2 * self.kept + 1)
            self.kept = out
        else:
            events.append(2 * out + 1)
        return events

    def _reshard(self, i: int, *, forward: bool = False) -> list[int]:
        if forward and not self.order[i].reshard:
            return []
        return [2 * m + 1 for m in self.unsharded.pop(i, [])]

    def _pre_backward(self, i: int) -> list[int]:
        """pre_backward: the unit's weights, and the all-gather of the unit that forward left before it."""
        events = [*self._gather(i), *self._wait(i, forward=False)]
        return events + (self._gather(i - 1) if i else [])

    def _post_backward(self, i: int) -> list[int]:
        """post_backward: weights go, gradients are added up over the ranks, and each rank keeps its slice.

        Gradients of a unit lie side by side in one buffer until the next unit's come (foreach_reduce); what is left of
        them is in the trained weights' dtype.
        """
        self.done.add(i)
        events = self._reshard(i)
        grads = self.grads[i]
        if not self.last or not grads:
            return events
        unit, new = self.order[i], self.program.new
        numel, wide = unit.reduced(self.ranks)
        low = next(ITEMSIZE[s.gathered] for s in unit.shares if s.trained)
        if self.reduce_input is not None:
            events.append(2 * self.reduce_input + 1)
        self.reduce_input = new(self.ranks * numel * low, "gradients, to be added up", BUFFERS)
        places = new(unit.places(self.ranks), "places of the gradients' parts", "")
        out = new(numel * low, "gradients, added up", "gradients", "", REDUCE)
        events += [2 * self.reduce_input, 2 * places, 2 * places + 1, *(2 * g + 1 for g in grads[:-1]), 2 * out]
        if wide != low:
            narrow, out = out, new(numel * wide, "gradients, added up", "gradients", "", REDUCE)
            events += [2 * out, 2 * narrow + 1]
        events.append(2 * grads[-1] + 1)  # foreach_reduce's loop variable holds the last one until it returns
        if self.offload:
            events.append(2 * out + 1)
        else:
            self.reduced.append(out)
        return events
