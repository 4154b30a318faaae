"""What sharing a run adds to the work of a step (throughput.py): bytes over the links, copies, and hooks on the host.

FSDP2 gathers a unit's weights before it runs, from where its shards lie side by side, and adds its gradients up
afterwards; DDP adds up buckets while backward goes on. Both run on a stream of their own beside the layers: a layer
waits for its weights, and the next step for the last gradients. Links carry one collective at a time.

A ring moves (n - 1) / n of what is gathered or scattered over each GPU's link, and twice that where all ranks get the
sum (NCCL, docs/usage/collectives). Sources of the copies: torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py
(copy-in, split_with_sizes_copy, chunk_cat), csrc/distributed/c10d/reducer.cpp (mark_variable_ready_dense).
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from vramplan.planner import traffic
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.sharding import BUCKET, Ddp, Fsdp, Unit
from vramplan.planner.traffic import Kernel, Section
from vramplan.planner.zero import REDUCE_BUCKET, Zero, Zero3

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vramplan.planner.run import MicroStep, Run

COPIES = traffic.COPIES


def micro_step(run: Run, sections: Sequence[Section], *, last: bool) -> list[Section]:
    """The sections of a micro-step with what sharing adds; `last`: gradients are added up after it."""
    sharing = run.sharing
    if isinstance(sharing, Fsdp | Zero3):
        return _gathered(run, sections, last=last or isinstance(sharing, Zero3))
    each_time = isinstance(sharing, Zero) and sharing.stage == 2
    return _in_buckets(run, sections) if last or each_time else list(sections)


def unknown(run: Run) -> bool:
    """Whether a step's time is not planned: what DeepSpeed's optimizer takes in host memory has not been measured."""
    return isinstance(run.sharing, Zero) and run.sharing.cpu_offload


def update(run: Run, sections: Sequence[Section]) -> list[Section]:
    """The optimizer's sections: ZeRO 1 and 2 gather the weights that were stepped; FSDP's tensors are DTensors.

    What is offloaded is clipped and stepped where it is, in host memory.
    """
    found = list(sections)
    if isinstance(run.sharing, Zero) and not isinstance(run.sharing, Zero3):
        n, item = run.sharing.ranks, ITEMSIZE[run.settings.weights_dtype]
        gathered = sum(p.numel for p in run.trained) * item * (n - 1) // n
        found[-1] = replace(found[-1], reduced=gathered)
    if isinstance(run.sharing, Fsdp):
        found = [replace(each, sharded=True) for each in found]
        if run.sharing.cpu_offload:
            shares = [s for unit in run.sharing.units(run).all for s in unit.shares if s.trained]
            numel = sum(prod(s.local(run.sharing.ranks)) for s in shares)
            found = [
                Section(name, tensors=len(shares), in_host=numel, sharded=True, by=by)
                for name, by in ((traffic.CLIPPING, ""), (traffic.OPTIMIZER, run.optimizer.name))
            ]
    return found


def summed_gradients(run: Run) -> Section:
    """As on one GPU: whole gradients, which fully_shard adds up over the GPUs in the last micro-step alone.

    ZeRO 2 and 3 have added them up by then, and a rank adds what it keeps of them.
    """
    section = traffic.summed_gradients(run)
    if not isinstance(run.sharing, Zero) or run.sharing.stage == 1:
        return section
    found = Section(section.name)
    for _, numel in run.sharing.touched(run):
        found.kernels[Kernel(traffic.ELEMENTWISE, 0, 3 * numel * ITEMSIZE[run.settings.weights_dtype])] += 1
        found.backward_ops += 1
    return found


def _gathered(run: Run, sections: Sequence[Section], *, last: bool) -> list[Section]:
    """Units gathered before each of their sections, and their gradients added up after the last of them."""
    sharing = run.sharing
    assert isinstance(sharing, Fsdp | Zero3)
    units, played, n = sharing.units(run), run.first_micro_step, sharing.ranks
    reshard = isinstance(sharing, Zero3) or sharing.reshard_after_forward
    tied, layers = units.embedding is None, list(units.layers)
    first = [*([units.root] if units.root.shares else []), units.embedding or units.tail]
    tail = [] if tied else [units.tail]
    again = [[unit] if reshard and runs else [] for unit, runs in zip(layers, played.runs, strict=True)]
    embedding = [units.embedding] if units.embedding and reshard and played.runs[0] else []
    gather = [first, *([unit] for unit in layers), tail, [], *reversed(again), embedding]
    reduce = [[], *([] for _ in layers), [], tail, *([unit] for unit in reversed(layers)), first]
    # ZeRO 3 keeps what is needed again soon: so many bytes it gathers
    exact = _by_section(played, sharing.gathered(run)) if isinstance(sharing, Zero3) else [None] * len(sections)
    alike = {id(u): hash(tuple((s.shape, s.dtype, s.gathered, s.trained) for s in u.shares)) for u in units.all}
    known: dict[object, Section] = {}
    found = []
    for section, before, after, nbytes in zip(sections, gather, reduce, exact, strict=True):
        key = (id(section), *(tuple(alike[id(u)] for u in each) for each in (before, after)), nbytes)
        if key not in known:
            known[key] = _with(section, before, after if last else [], n, nbytes, offload=sharing.cpu_offload)
        found.append(known[key])
    return found


def _by_section(played: MicroStep, by_stretch: Mapping[int, int]) -> list[int]:
    """Figures of a micro-step's stretches, by the sections that these make: each layer one, and what is around them."""
    layers = len(played.runs)
    found = [0] * (2 * layers + 4)
    for i, stretch in enumerate(played.stretches):
        way, _, layer = stretch.name.partition(", layer ")
        if layer:
            at = 1 + int(layer) if way == "forward" else 2 * layers + 2 - int(layer)
        else:
            at = {"forward, embeddings": 0, "loss, backward": layers + 2, "backward, embeddings": 2 * layers + 3}.get(
                stretch.name, layers + 1
            )
        found[at] += by_stretch.get(i, 0)
    return found


def _with(
    section: Section, before: Sequence[Unit], after: Sequence[Unit], n: int, exact: int | None, *, offload: bool
) -> Section:
    """A section with the gathering of units before it, the reduction of their gradients after it, the copies for both.

    `exact` are the bytes that are gathered, where that is not all of the units. `offload`: shards come from host
    memory as they are held there, and gradients go there.
    """
    kernels, hooks = section.kernels.copy(), section.hooks
    gathered = reduced = fetched = stored = 0
    gathers = [(sum(unit.whole(n)), sum(unit.shards(n)), len(unit.shares)) for unit in before]
    if exact is not None:
        gathers = [(exact, exact // n, sum(not s.stays for unit in before for s in unit.shares))] if exact else []
    for whole, shards, weights in gathers:
        fetched += shards if offload else 0
        gathered += whole * (n - 1) // n
        kernels[Kernel(COPIES, 0, 2 * whole // n)] += 1  # into the buffer
        kernels[Kernel(COPIES, 0, 2 * whole)] += 1  # and out of it
        hooks = hooks._replace(gathers=hooks.gathers + 1, weights=hooks.weights + weights)
    for unit in before:
        if cast := unit.cast(n):
            held = (nbytes for s, nbytes in zip(unit.shares, unit.shards(n), strict=True) if s.gathered != s.dtype)
            kernels[Kernel(COPIES, 0, sum(held) + cast)] += 1
    for unit in after:
        numel, wide = unit.reduced(n)
        if not numel:
            continue
        low = next(ITEMSIZE[s.gathered] for s in unit.shares if s.trained)
        reduced += numel * low * (n - 1)
        trained = [nbytes for s, nbytes in zip(unit.shares, unit.shards(n), strict=True) if s.trained]
        stored += sum(trained) if offload else 0
        kernels[Kernel(COPIES, 0, 2 * n * numel * low)] += 1  # side by side
        if wide != low:
            kernels[Kernel(COPIES, 0, numel * (low + wide))] += 1
        hooks = hooks._replace(reductions=hooks.reductions + 1, gradients=hooks.gradients + len(trained))
    return replace(
        section, kernels=kernels, gathered=gathered, reduced=reduced, fetched=fetched, stored=stored, hooks=hooks
    )


def _in_buckets(run: Run, sections: Sequence[Section]) -> list[Section]:
    """Backward's sections with their share of the gradients, copied to buckets and back, and added up.

    DeepSpeed without overlap_comm does so on the stream that computes (stage_1_and_2.py, average_tensor).
    """
    assert isinstance(run.sharing, Ddp | Zero)
    n, waits = run.sharing.ranks, isinstance(run.sharing, Zero)
    bucket = REDUCE_BUCKET * ITEMSIZE[run.settings.weights_dtype] if waits else BUCKET
    layers = len(run.layers)
    made = run.first_micro_step
    sizes = run.program.sizes
    known: dict[tuple[int, int, int], Section] = {}
    filled = 0

    def of(section: Section, grads: Sequence[int], end: bool) -> Section:
        nonlocal filled
        sums = 0
        for g in grads:
            filled += sizes[g]
            if filled >= bucket:
                filled, sums = 0, sums + 1
        sums += end and filled > 0
        nbytes = sum(sizes[g] for g in grads)
        key = (id(section), nbytes, sums)
        if grads and key not in known:
            kernels = section.kernels.copy()
            kernels[Kernel(COPIES, 0, 2 * nbytes // len(grads))] += 2 * len(grads)
            known[key] = replace(
                section, kernels=kernels, reduced=2 * nbytes * (n - 1) // n, sums=sums,
                waits=waits, hooks=section.hooks._replace(bucketed=len(grads)),
            )  # fmt: skip
        return known.get(key, section)

    outer = list(made.outer_grads.items())
    early = [g for name, g in outer if name in run.early]
    late = [g for name, g in outer if name not in run.early]
    back = sections[2 + layers :]
    came = [late, *reversed(made.layer_grads), early]
    last = max((i for i, grads in enumerate(came) if grads), default=0)
    reduced = [of(s, grads, i == last) for i, (s, grads) in enumerate(zip(back, came, strict=True))]
    return [*sections[: 2 + layers], *reduced]
