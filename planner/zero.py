"""DeepSpeed's ZeRO 1, 2 and 3: what each rank holds, and what gathering and adding up takes.

As sharding.py's, put around the micro-steps of run.py. The configuration is accelerate's where the user gives none of
his own (accelerate/utils/dataclasses.py, DeepSpeedPlugin): buckets of 500,000,000 elements, overlap_comm for stage 3.

Sources (deepspeed 0.19): deepspeed/runtime/engine.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/zero/parameter_offload.py, runtime/zero/partitioned_param_coordinator.py, runtime/zero/partition_parameters.py.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from math import prod
from typing import TYPE_CHECKING, ClassVar

from vramplan.planner import loading, optimizer
from vramplan.planner.paper import ITEMSIZE, Parameter
from vramplan.planner.sharding import (
    BUFFERS,
    COPY_IN,
    GATHERED,
    MASTER,
    REDUCE,
    STAYS,
    Fsdp,
    Share,
    Unit,
    Units,
    alive_in_order,
    units_of,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from vramplan.planner.blocks import Settings
    from vramplan.planner.run import MicroStep, Program, Run, Stretch
    from vramplan.planner.trainer import Trainer
    from vramplan.planner.training import TrainingOptions

REDUCE_BUCKET = 500_000_000  # elements (deepspeed/runtime/zero/config.py, reduce_bucket_size)
_ALIGNED = 2  # elements at whose multiples a rank's part begins (stage_1_and_2.py, nccl_start_alignment_factor)
_SAME_NODE = "gradient of an input"  # which the node that makes a weight's gradient makes next


def of(options: TrainingOptions) -> Zero:
    """ZeRO of the stage that the options name."""
    if options.parallel == "zero3":
        return Zero3(options.num_gpus, cpu_offload=options.cpu_offload)
    return Zero(options.num_gpus, int(options.parallel[-1]), cpu_offload=options.cpu_offload)


def with_hooks(
    events: Sequence[int], program: Program, grads: Collection[int], arrived: Callable[[int], list[int]],
    before: Mapping[int, list[int]],
) -> list[int]:  # fmt: skip
    """The events with those that `arrived` gives for each of `grads`, and those that come `before` a position.

    A gradient's hook runs once the node that made it is done, and before another node allocates: AccumulateGrad goes
    before all others (torch/csrc/autograd/engine.cpp).
    """
    found: list[int] = []
    came: list[int] = []
    inside = False
    for at, event in enumerate(events):
        if came and not event & 1:
            if inside and program.labels[event >> 1] == _SAME_NODE:
                inside = False
            else:
                found += [e for g in came for e in arrived(g)]
                came = []
        found += before.get(at, ())
        if not event & 1 and event >> 1 in grads:
            came.append(event >> 1)
            inside = True
        found.append(event)
    found += [e for g in came for e in arrived(g)]
    return found + before.get(len(events), [])


class _Bucket:
    """Gradients that were copied to the bucket, until the next one finds no room there: then they are added up.

    One that is larger than the bucket is itself until then. `summed` gives the events of what is kept of them.
    """

    def __init__(
        self, program: Program, limit: int, summed: Callable[[Sequence[int]], list[int]] = lambda _: [], stream: int = 0
    ) -> None:
        self.program, self.limit, self.summed, self.stream = program, limit, summed, stream
        self.waiting: list[int] = []

    def add(self, g: int) -> list[int]:
        """The events as a gradient comes."""
        sizes = self.program.sizes
        full = sum(sizes[w] for w in self.waiting) + sizes[g] > self.limit
        found = self.empty() if full else []
        self.waiting.append(g)
        return found if sizes[g] > self.limit else [*found, 2 * g + 1]

    def empty(self) -> list[int]:
        """The events as those that wait are added up."""
        if not self.waiting:
            return []
        sizes, came = self.program.sizes, [*self.waiting]
        self.waiting.clear()
        flat = self.program.new(sum(sizes[g] for g in came), "gradients, to be added up", BUFFERS, "", self.stream)
        return [2 * flat, 2 * flat + 1, *self.summed(came), *(2 * g + 1 for g in came if sizes[g] > self.limit)]


# ----------------------------------------------------------------------------------------------------------- ZeRO 1, 2


class Zero:
    """DeepSpeed's ZeRO 1 or 2 over `ranks` GPUs, with accelerate's configuration where the user gives none of his own.

    The model is held whole, in 16 bits, and what is trained of it in one flat tensor for each group of parameters. Each
    rank's optimizer holds one part of that in float32. The first gradient of a backward makes a bucket of 500,000,000
    elements; gradients are copied there, added up when it is full, and of the sums a rank keeps those of the parameters
    that its part touches. Stage 2 copies each gradient as it comes, stage 1 all of them once the last micro-step is
    done: until then they are whole.
    """

    sources: ClassVar[Mapping[str, str]] = {
        "weights": "the config's tensors, cast by DeepSpeed's engine; what is trained of them is flat",
        "adapter": "PEFT's A and B, cast by DeepSpeed's engine, and flat",
        "gradients": "deepspeed, stage_1_and_2.py: those of the parameters that this rank's part touches",
    }

    def __init__(self, ranks: int, stage: int, *, cpu_offload: bool = False) -> None:
        self.ranks, self.stage, self.cpu_offload = ranks, stage, cpu_offload
        self._bucket = self._sums = -1  # the gradients that this rank keeps until the step
        self._item = 2

    def played(self, s: Settings) -> Settings:
        """DeepSpeed's engine casts the whole model to 16 bits, and runs it without autocast (engine.py)."""
        return replace(Fsdp(self.ranks).played(s), hooked=False)

    def trainer(self, trainer: Trainer) -> Trainer:
        """As on one GPU."""
        return trainer

    def groups(self, run: Run) -> list[list[Parameter]]:
        """The trained parameters of each of the optimizer's groups."""
        return [group for group in optimizer.groups(run.trained, run.layer_norms) if group]

    def part(self, group: Iterable[Parameter]) -> int:
        """Elements of one rank's part of a group, which is padded to a multiple of twice the number of ranks."""
        step = _ALIGNED * self.ranks
        return -(-sum(p.numel for p in group) // step) * _ALIGNED

    def in_host_memory(self, run: Run) -> dict[str, int]:
        """Bytes that a rank keeps in host memory while it trains: what is offloaded, and 16-bit buffers beside it.

        stage_1_and_2.py: single_partition_of_fp32_groups with their gradients,
        param_buffer_of_bit16_for_cpu_offload_groups, temp_grad_buffer_for_cpu_offload.
        """
        if not self.cpu_offload:
            return {}
        item = ITEMSIZE[run.settings.weights_dtype]
        parts = [self.part(group) for group in self.groups(run)]
        largest = max((p.numel for p in run.trained), default=0)
        return self._stepped(run, parts) | {"16-bit buffers": (sum(parts) + largest) * item}

    def _stepped(self, run: Run, parts: Iterable[int]) -> dict[str, int]:
        """What the optimizer in host memory holds of parts of so many elements, in float32."""
        numels = list(parts)
        states = [optimizer.state_bytes(run.optimizer, (n,), "fp32") for n in numels]
        return {"master weights": 4 * sum(numels), "gradients": 4 * sum(numels), "optimizer states": sum(states)}

    def touched(self, run: Run) -> list[tuple[Parameter, int]]:
        """The parameters that a rank's parts touch, and how many of their elements lie in there (get_partition_info).

        Those of the rank that keeps the most: a parameter at the edge of two parts is kept whole by both.
        """
        placed = []
        kept = [0] * (self.ranks + 1)
        for group in self.groups(run):
            part = self.part(group)
            for p, start in zip(group, accumulate((p.numel for p in group), initial=0), strict=False):
                placed.append((p, start, part))
                kept[start // part] += p.numel
                kept[(start + p.numel - 1) // part + 1] -= p.numel
        totals = list(accumulate(kept[:-1]))
        rank = totals.index(max(totals))
        inside = ((p, min(start + p.numel, (rank + 1) * part) - max(start, rank * part)) for p, start, part in placed)
        return [(p, numel) for p, numel in inside if numel > 0]

    def parameters(self, run: Run) -> list[Parameter]:
        """This rank's part of each group, in float32."""
        if self.cpu_offload:
            return []
        names = ("part", "part.norm")  # by which the groups stay apart: the second goes without decay
        return [
            Parameter(name, (self.part(g),), "fp32", True) for name, g in zip(names, self.groups(run), strict=False)
        ]

    def loading(self, run: Run) -> tuple[Stretch, ...]:
        """The model is cast, each group of what is trained is made flat, and each rank copies its part (__init__).

        Each group begins with empty_cache. Where its flat tensor has no room beside it, it is made in host memory.
        """
        from vramplan.planner.run import Stretch

        before, program, s = loading.play(run), run.program, run.settings
        low = s.weights_dtype
        item = self._item = ITEMSIZE[low]
        part = "weights" if s.method == "full" else "adapter"
        events: list[int] = []
        whole: list[int] = []  # in the order of run.trained
        for i in alive_in_order(e for stretch in before for e in stretch.events):
            label = program.labels[i]
            own = program.parts[i] == part and label not in STAYS
            wide = "float32" in label or label.endswith("fp32") or label == "adapter weight"
            if wide and item < 4 and label not in STAYS and program.sizes[i] >= 4:
                narrow = program.new(
                    program.sizes[i] // 4 * item, f"weight, {low}", program.parts[i], program.scopes[i]
                )
                events += (2 * narrow, 2 * i + 1)
                i = narrow
            if own:
                whole.append(i)
        if item < 4:
            run.biases.clear()  # they are in the dtype in which they are added
        trained = {p.name: i for p, i in zip(run.trained, whole, strict=True)}
        stretches = [Stretch("sharing", events)]
        gradients: list[int] = []
        groups = self.groups(run)
        for group in groups:
            size = self.part(group)
            flat = program.new(size * self.ranks * item, "trained weights, flat", part)
            let_go = [2 * trained[p.name] + 1 for p in group]
            copied = program.new(size * item, "part of the weights", "")
            parts = [2 * copied]
            if not self.cpu_offload:
                parts.append(2 * program.new(size * 4, "part of the weights, float32", MASTER))
                gradients.append(2 * program.new(size * 4, "gradient of the part, float32", ""))
            parts.append(2 * copied + 1)
            if group is groups[-1]:
                if self.cpu_offload:
                    largest = max(p.numel for p in run.trained)
                    there = program.new(largest * item, "gradient, to be copied to host memory", BUFFERS)
                    parts.append(2 * there)
                parts += [*gradients, *(g + 1 for g in gradients)]
            stretches.append(
                Stretch("sharing", [2 * flat, *let_go, *parts], program.sizes[flat], (*let_go, 2 * flat, *parts))
            )
        return (*before, *stretches)

    def beginning(self, run: Run, number: int) -> list[Stretch]:  # noqa: ARG002
        """Nothing."""
        return []

    def micro_step(self, run: Run, made: MicroStep, first: MicroStep, last: bool) -> tuple[list[Stretch], list[int]]:
        """Gradients go to the bucket, and from it to what this rank keeps (setup_buckets, reduce_ipg_grads).

        Under stage 2 each micro-step makes its gradients anew, and adds what is kept of them to what the first one
        left.
        """
        from vramplan.planner.run import Stretch

        again = made is not first
        gathering = self.stage == 2  # each gradient is added up in the micro-step that made it
        made = first if gathering else made
        new, item = run.program.new, self._item
        names = {g: p.name for g, p in zip(first.grads, run.trained, strict=True)}
        touched = [p for p, _ in self.touched(run)]
        kept = {p.name for p in touched}
        total = 0 if self.cpu_offload else sum(p.numel for p in touched) * item
        if self._bucket < 0:
            self._bucket = new(REDUCE_BUCKET * item, "bucket of gradients", BUFFERS)
        if self._sums < 0:
            self._sums = new(total, "gradients that this rank keeps", "gradients")
        adding = again and gathering
        sums = new(total, "gradients that this rank keeps, to be added", "gradients") if adding else self._sums
        there, begun = False, again and not gathering

        def summed(grads: Sequence[int]) -> list[int]:
            nonlocal there
            first_kept = not there and total > 0 and any(names[g] in kept for g in grads)
            there = there or first_kept
            return [2 * sums] if first_kept else []

        bucket = _Bucket(run.program, REDUCE_BUCKET * item, summed)

        def arrived(g: int) -> list[int]:
            nonlocal begun
            found = [] if begun else [2 * self._bucket]
            begun = True
            return found + (bucket.add(g) if gathering else [])

        stretches = [Stretch(s.name, with_hooks(s.events, run.program, names, arrived, {})) for s in made.stretches]
        if gathering or last:
            end = stretches[-1].events
            for g in () if gathering else first.grads:
                end += bucket.add(g)
            end += [*bucket.empty(), 2 * self._bucket + 1, *([2 * sums + 1] if adding and there else [])]
        return stretches, []

    def update(self, run: Run, first: bool) -> list[Stretch]:
        """The norm in float64, tensor by tensor; then each group's part of the gradients in float32, and its step.

        get_grad_norm_direct, step.
        """
        from vramplan.planner.run import Stretch

        if self.cpu_offload:
            return []
        new, item = run.program.new, self._item
        norm: list[int] = []
        for _, numel in self.touched(run):
            double = new(8 * numel, "gradient, float64", "")
            norm += (2 * double, 2 * double + 1)
        events: list[int] = []
        groups = self.groups(run)
        for i, group in enumerate(groups):
            flat = new(self.part(group) * item, "gradients, flat", "gradients")
            events.append(2 * flat)
            if item < 4:
                flat, low = new(self.part(group) * 4, "gradients, flat, float32", "gradients"), flat
                events += (2 * flat, 2 * low + 1)
            if i == len(groups) - 1 and self._sums >= 0:
                events.append(2 * self._sums + 1)
            events += run.optimize(first, run.parameters[i : i + 1])
            events.append(2 * flat + 1)
        return [Stretch("gradient clipping", norm), Stretch("optimizer step", events)]

    def notes(self, run: Run) -> list[str]:  # noqa: ARG002
        """What is assumed."""
        untimed = "what DeepSpeed's optimizer takes in host memory has not been measured, so there is no time of a step"
        return [
            *([untimed] if self.cpu_offload else []),
            f"ZeRO {self.stage} is planned with accelerate's configuration of DeepSpeed 0.19: buckets of 500,000,000 "
            f"elements, {'with' if self.stage == 3 else 'without'} overlap_comm",
        ]


# --------------------------------------------------------------------------------------------------------------- ZeRO 3

# Elements (deepspeed/runtime/zero/config.py): weights so small are always whole; how soon one must be used again to
# stay; how many may be whole at once; how many are fetched ahead each time; of a sub-group of the optimizer.
PERSISTENT, REUSED, LIVE, PREFETCHED, SUB_GROUP = 100_000, 1_000_000_000, 1_000_000_000, 50_000_000, 1_000_000_000


class Zero3(Zero):
    """ZeRO 3: weights are partitioned too, each on its own, and gathered for the modules that run (Coordinator).

    Gradients are added up as under ZeRO 2, from a bucket that is always there into a buffer for all of them.
    """

    sources: ClassVar[Mapping[str, str]] = {
        "weights": "deepspeed, partition_parameters.py: this rank's part of each tensor, small ones whole",
        "weights, 4 bit": "bitsandbytes, NF4: this rank's part of the packed weights, and the absmax of all",
        "adapter": "deepspeed, partition_parameters.py: this rank's part of PEFT's A and B, small ones whole",
        "gradients": "deepspeed, stage3.py: this rank's part of the sums, for all parameters",
    }

    def __init__(self, ranks: int, *, cpu_offload: bool = False) -> None:
        super().__init__(ranks, 3, cpu_offload=cpu_offload)
        self._units: Units | None = None
        self._gathered: Counter[int] = Counter()

    def gathered(self, run: Run) -> Counter[int]:
        """Bytes that a micro-step gathers, by the stretch that first waits for them."""
        run.micro_step(False)
        return self._gathered

    def played(self, s: Settings) -> Settings:
        """As under ZeRO 2, but an adapter stays as PEFT made it.

        engine.py, _configure_distributed_model: a model that was partitioned as it was loaded is not cast any more.
        """
        made = replace(super().played(s), hooked=True, saves_inputs=True)  # runtime/zero/linear.py
        return replace(made, adapter_dtype=s.adapter_dtype) if s.method == "lora" else made

    def units(self, run: Run) -> Units:
        """The layers and what is around them, each weight in the dtype in which it is computed with."""
        if self._units is None:
            made = units_of(run, reshard=True)

            def held(share: Share) -> Share:
                dtype = share.dtype if share.trained and run.loaded.method == "lora" else share.gathered
                return replace(share, dtype=dtype, gathered=dtype, flat=True, stays=prod(share.shape) <= PERSISTENT)

            def each(unit: Unit) -> Unit:
                return Unit(tuple(map(held, unit.shares)), True)

            self._units = replace(
                made,
                embedding=each(made.embedding) if made.embedding else None,
                layers=tuple(map(each, made.layers)),
                tail=each(made.tail),
                root=each(made.root),
            )
        return self._units

    def part(self, group: Iterable[Parameter]) -> int:
        """Elements of one rank's parts of the parameters, each padded by itself."""
        return sum(-(-p.numel // self.ranks) for p in group)

    def groups(self, run: Run) -> list[list[Parameter]]:
        """The optimizer's groups, cut into sub-groups of 1,000,000,000 elements at most (_create_fp16_sub_groups)."""
        found: list[list[Parameter]] = []
        for group in super().groups(run):
            numel = SUB_GROUP
            for p in group:
                if numel >= SUB_GROUP:
                    found.append([])
                    numel = 0
                found[-1].append(p)
                numel += p.numel
        return found

    def in_host_memory(self, run: Run) -> dict[str, int]:
        """Bytes that a rank keeps in host memory while it trains: what is offloaded, and 16-bit gradients beside it.

        partition_parameters.py: a part of every weight; stage3.py: fp32_partitioned_groups_flat with their gradients,
        grad_partitions_flat_buffer.
        """
        if not self.cpu_offload:
            return {}
        shares = [s for unit in self.units(run).all for s in unit.shares]
        item = ITEMSIZE[run.settings.weights_dtype]
        parts = [self.part(group) for group in self.groups(run)]
        return {
            "parts of the weights": sum(-(-prod(s.shape) // self.ranks) * ITEMSIZE[s.dtype] for s in shares),
            **self._stepped(run, parts),
            "16-bit gradients": sum(parts) * item,
        }

    def touched(self, run: Run) -> list[tuple[Parameter, int]]:
        """Every parameter: a rank has a part of each."""
        return [(p, -(-p.numel // self.ranks)) for p in run.trained]

    def parameters(self, run: Run) -> list[Parameter]:
        """This rank's part of each sub-group, in float32."""
        if self.cpu_offload:
            return []
        return [Parameter(f"part {i}", (self.part(g),), "fp32", True) for i, g in enumerate(self.groups(run))]

    def loading(self, run: Run) -> tuple[Stretch, ...]:
        """Weights are partitioned as they are loaded; then come the parts in float32, the bucket, the gradients."""
        from vramplan.planner.run import Stretch

        program, quantised = run.program, run.loaded.method == "qlora"
        item = self._item = ITEMSIZE[run.settings.weights_dtype]
        base: list[int] = []
        adapter: list[int] = []
        events: list[int] = []
        for share in (share for unit in self.units(run).all for share in unit.shares):
            added = share.trained and run.loaded.method != "full"
            part, size = share.part(run.loaded.method), prod(share.shape)
            whole = program.new(size * ITEMSIZE[share.dtype], "weight, always whole", part, share.name)
            shard = program.new(-(-size // self.ranks) * ITEMSIZE[share.dtype], share.kept, part, share.name)
            parted = [*([] if self.cpu_offload else [2 * shard]), *([] if share.stays else [2 * whole + 1])]
            if added and not quantised:  # PEFT makes an adapter whole, and the engine partitions it
                adapter.append(2 * whole)
                events += parted
            else:
                (events if quantised else base).extend([2 * whole, *parted])
        if quantised:
            before = loading.play(run)
            there = alive_in_order(e for stretch in before for e in stretch.events)
            events += [2 * i + 1 for i in there if program.labels[i] not in STAYS]
        else:
            base += [2 * program.new(size, label, "weights") for label, size in loading.buffers(run.architecture)]
            before = (Stretch("loading", base), Stretch("k-bit preparation", []), Stretch("adapter", adapter))
        run.biases.clear()
        if not self.cpu_offload:
            for group in self.groups(run):
                events.append(2 * program.new(self.part(group) * 4, "part of the weights, float32", MASTER))
            numel = sum(self.part(group) for group in self.groups(run))
            events.append(2 * program.new(numel * item, "parts of the gradients", "gradients"))
        self._bucket = program.new(REDUCE_BUCKET * item, "bucket of gradients", BUFFERS)
        return (*before, Stretch("sharing", [*events, 2 * self._bucket]))

    def micro_step(self, run: Run, made: MicroStep, first: MicroStep, last: bool) -> tuple[list[Stretch], list[int]]:  # noqa: ARG002
        """Weights are gathered for the modules that run; each gradient goes to the bucket as it comes."""
        from vramplan.planner.run import Stretch

        made, names = first, set(first.grads)
        bucket = _Bucket(run.program, REDUCE_BUCKET * self._item, stream=REDUCE)
        coordinator = Coordinator(run.program, self.ranks)
        fetched = coordinator.play(list(_visits(run, made, self.units(run))))
        self._gathered = coordinator.gathered
        played = [
            Stretch(s.name, with_hooks(s.events, run.program, names, bucket.add, fetched.get(i, {})))
            for i, s in enumerate(made.stretches)
        ]
        played[-1].events.extend(bucket.empty())
        return played, []


Place = tuple[int, int]  # a stretch, and an event in it


@dataclass(frozen=True, slots=True)
class Visit:
    """A module's forward or backward, and the weights that it needs: none where they are always whole or its parts'.

    `end` is None where nothing can be let go: a module with parts begins, or backward follows at once.
    """

    begin: Place
    end: Place | None
    weights: tuple[Share, ...]


def _visits(run: Run, made: MicroStep, units: Units) -> Iterator[Visit]:
    """The modules in the order in which hooks meet them; where they begin and end is read off the events' scopes."""
    program, places = run.program, made.places
    prefix, checkpointing = run.architecture.layer_prefix, run.settings.checkpointing

    def wanted(shares: Iterable[Share]) -> tuple[Share, ...]:
        return tuple(s for s in shares if not s.stays)

    def after(place: int) -> Place:
        return (place, len(made.stretches[place].events))

    def at(mark: str, otherwise: str) -> Place:
        return (places.get(mark, places[otherwise]), 0)

    def of_layer(i: int, stretch: int, backward: bool) -> Iterator[Visit]:
        start = len(f"{prefix}.{i}.")
        modules = {
            name: wanted(shares)
            for name, shares in groupby(units.layers[i].shares, lambda s: s.name[start:].rpartition(".")[0])
        }
        modules = {name: shares for name, shares in modules.items() if shares}
        again = not backward or checkpointing
        order, ends, markers, split = _in_order(made.stretches[stretch].events, program, modules)
        if again:
            yield Visit((stretch, 0), None, ())  # the layer
            for above, names in groupby(order, lambda name: name.rpartition(".")[0]):
                each = list(names)
                if above:
                    yield Visit((stretch, ends[each[0]][0]), None, ())
                for name in each:
                    yield Visit((stretch, ends[name][0]), None if backward else (stretch, ends[name][1]), modules[name])
        if backward:
            pos = split if again else 0
            if not (again or made.needs[i]):
                order = [name for name in order if _goes_on(made.stretches[stretch].events, program, markers, name)]
            for name in reversed(order or list(modules)):
                begin, pos = pos, max(pos, markers.get(name, pos))
                yield Visit((stretch, begin), (stretch, pos), modules[name])

    number = {s.name: i for i, s in reversed(list(enumerate(made.stretches)))}
    outside = [*units.root.shares, *(units.embedding.shares if units.embedding else units.tail.shares)]
    looked_up = tuple(s for s in wanted(outside) if not s.name.startswith((f"{run.architecture.output.name}.",)))
    yield Visit((0, 0), None, ())  # the model
    yield Visit((0, 0), (places.get("embedded", 1), 0), looked_up)
    for i in range(len(units.layers)):
        yield from of_layer(i, number[f"forward, layer {i}"], backward=False)
    head = wanted(units.tail.shares)
    yield Visit(at("head", "loss, forward"), at("logits", "loss, backward"), head)
    yield Visit(at("logits, backward", "loss, backward"), at("head, backward", "loss, backward"), head)
    for i in reversed(range(len(units.layers))):
        if made.runs[i]:
            yield from of_layer(i, number[f"backward, layer {i}"], backward=True)
    if run.settings.method == "full" or checkpointing:  # which wants a gradient of what the embedding gives
        yield Visit((places["backward, embeddings"], 0), after(len(made.stretches) - 1), looked_up)


def _in_order(
    events: Sequence[int], program: Program, modules: Collection[str]
) -> tuple[list[str], dict[str, tuple[int, int]], dict[str, int], int]:
    """Of a layer's events: its modules in the order in which they first run, where each of those runs begins and ends,
    where each one's last gradient is made, and where the first gradient of all is.

    Modules without events of their own begin with the layer.
    """
    ends: dict[str, tuple[int, int]] = {}
    markers: dict[str, int] = {}
    split = len(events)
    position = 0
    for scope, run in groupby(events, lambda e: "" if e & 1 else program.scopes[e >> 1]):
        begin, position = position, position + sum(1 for _ in run)
        if scope in modules:
            ends.setdefault(scope, (begin, position))
        elif (module := scope.rpartition(".")[0]) in modules and scope:
            markers[module] = position
            split = min(split, begin)
    order = [*(name for name in modules if name not in ends), *ends]
    return order, dict.fromkeys(modules, (0, 0)) | ends, markers, split


def _goes_on(events: Sequence[int], program: Program, markers: Mapping[str, int], name: str) -> bool:
    """Whether the gradient of a module's input is made after its adapter's: else its own backward is no part of it."""
    if name not in markers:
        return True
    end = min((other for other in markers.values() if other > markers[name]), default=len(events))
    made = [program.labels[e >> 1] for e in events[markers[name] : end] if not e & 1]
    if "gradient" in made:  # of the next module's adapter
        made = made[: made.index("gradient")]
    return "gradient of an input" in made


@dataclass(slots=True, eq=False)
class _Group:
    """Weights that one all-gather brings: the buffer, and for several what each is copied out to."""

    flat: int
    copies: dict[str, int]
    awaited: set[str] = field(default_factory=set)
    copied: bool = False
    known: bool = False  # in Coordinator.gathered


class Coordinator:
    """PartitionedParameterCoordinator: fetches what a module needs and some of what comes next, lets go what can wait.

    It knows the order of a whole micro-step (from the third on, as DeepSpeed does; the first two are played alike).
    Weights that are gathered together come in one buffer, which is there until the last of them has been waited for;
    one that is gathered alone stays in it.
    """

    def __init__(self, program: Program, ranks: int) -> None:
        self.program, self.ranks = program, ranks
        self.events: dict[int, dict[int, list[int]]] = {}
        self.groups: dict[str, _Group] = {}  # in flight, by weight
        self.held: dict[str, int] = {}  # what holds each weight that is whole
        self.live = 0  # elements that are whole or under way
        self.gathered: Counter[int] = Counter()  # bytes, by the stretch that first waits for them
        self.queue: deque[tuple[Share, int]] = deque()  # weights that are still to be needed, each with its visit
        self.fetched_for: dict[str, int] = {}  # the last visit for which each weight was fetched

    def play(self, visits: Sequence[Visit]) -> dict[int, dict[int, list[int]]]:
        """What is allocated and freed before each place: by stretch, then by position."""
        self.queue.extend((share, number) for number, visit in enumerate(visits) for share in visit.weights)
        busy: dict[str, int] = {}
        for number, visit in enumerate(visits):
            self._fetch(visit, number)
            for share in visit.weights:
                busy[share.name] = busy.get(share.name, 0) + 1
            if visit.end is None:  # the weights stay for the backward that follows at once
                for share in visit.weights:
                    busy[share.name] -= 1
                continue
            soon = self._soon(visits, number + 1)
            for share in visit.weights:
                busy[share.name] -= 1
                later = self.fetched_for.get(share.name, -1) > number
                if share.name in self.held and not busy[share.name] and share.name not in soon and not later:
                    self._at(visit.end, [2 * self.held.pop(share.name) + 1])
                    self.live -= prod(share.shape)
        if visits and self.held:
            end = visits[-1].end or visits[-1].begin
            self._at(end, [2 * i + 1 for i in self.held.values()])
        return self.events

    def _soon(self, visits: Sequence[Visit], number: int) -> set[str]:
        """Weights of the visits from `number` on that come before 1,000,000,000 elements have passed."""
        found: set[str] = set()
        passed = 0
        for visit in visits[number:]:
            if passed >= REUSED:
                break
            for share in visit.weights:
                found.add(share.name)
                passed += prod(share.shape)
        return found

    def _at(self, place: Place, events: list[int]) -> None:
        self.events.setdefault(place[0], {}).setdefault(place[1], []).extend(events)

    def _fetch(self, visit: Visit, number: int) -> None:
        self._gather([s for s in visit.weights if s.name not in self.held and s.name not in self.groups], visit.begin)
        for share in visit.weights:
            if share.name in self.groups:
                self._wait(share, visit.begin)
        expected = {s.name for s in visit.weights if self.fetched_for.get(s.name, -1) < number}
        passed: set[str] = set()
        while self.queue and len(passed) < len(expected):
            share, at = self.queue.popleft()
            self.fetched_for[share.name] = at
            passed.add(share.name)
        most = min(LIVE - self.live, PREFETCHED)
        ahead: dict[str, Share] = {}
        numel = 0
        while self.queue and numel < most:
            share, at = self.queue.popleft()
            self.fetched_for[share.name] = max(at, self.fetched_for.get(share.name, -1))
            if share.name not in self.held and share.name not in self.groups and share.name not in ahead:
                ahead[share.name] = share
                numel += prod(share.shape)
        self._gather(list(ahead.values()), visit.begin)

    def _gather(self, shares: Sequence[Share], place: Place) -> None:
        if not shares:
            return
        new = self.program.new
        padded = sum(-(-prod(s.shape) // self.ranks) * self.ranks * ITEMSIZE[s.gathered] for s in shares)
        flat = new(padded, "weights, gathered", GATHERED, shares[0].name, COPY_IN)
        copies: dict[str, int] = {}
        if len(shares) > 1:
            for s in shares:
                nbytes = prod(s.shape) * ITEMSIZE[s.gathered]
                copies[s.name] = new(nbytes, "weight, gathered", GATHERED, s.name, COPY_IN)
        group = _Group(flat, copies, {s.name for s in shares})
        self.groups |= {s.name: group for s in shares}
        self.live += sum(prod(s.shape) for s in shares)
        self._at(place, [2 * flat])

    def _wait(self, share: Share, place: Place) -> None:
        group = self.groups.pop(share.name)
        if not group.known:
            group.known = True
            self.gathered[place[0]] += self.program.sizes[group.flat]
        if not group.copies:
            self.held[share.name] = group.flat
            return
        if not group.copied:
            group.copied = True
            self.held |= group.copies
            self._at(place, [2 * i for i in group.copies.values()])
        group.awaited.discard(share.name)
        if not group.awaited:
            self._at(place, [2 * group.flat + 1])
