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
    from collections.abc import Sequence

    from vramplan.planner.run import Run

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


def _gathered(run: Run, sections: Sequence[Section], *, last: bool) -> list[Section]:
    """Units gathered before each of their sections, and their gradients added up after the last of them."""
    sharing = run.sharing
    assert isinstance(sharing, Fsdp | Zero3)
    units, n = sharing.units(run), sharing.ranks
    reshard = not isinstance(sharing, Fsdp) or sharing.reshard_after_forward
    layers = len(units.layers)
    tail, embedding = units.tail, units.embedding or units.tail
    start, forward, loss, loss_back, backward, back = (
        sections[0], sections[1 : 1 + layers], sections[1 + layers], sections[2 + layers], sections[3 + layers : -1],
        sections[-1],
    )  # fmt: skip
    tied = units.embedding is None
    known: dict[tuple[int, int, bool, bool], Section] = {}

    def made(section: Section, unit: Unit | None, *, gather: bool, reduce: bool) -> Section:
        if unit is None:
            return section
        key = (id(section), hash(tuple((s.shape, s.dtype, s.gathered, s.trained) for s in unit.shares)), gather, reduce)
        if key not in known:
            known[key] = _with(section, unit, n, gather=gather, reduce=reduce and last, offload=sharing.cpu_offload)
        return known[key]

    return [
        made(start, embedding, gather=True, reduce=False),
        *(made(s, unit, gather=True, reduce=False) for s, unit in zip(forward, units.layers, strict=True)),
        made(loss, None if tied else tail, gather=True, reduce=False),
        made(loss_back, None if tied else tail, gather=False, reduce=True),
        *(made(s, unit, gather=reshard, reduce=True) for s, unit in zip(backward, reversed(units.layers), strict=True)),
        made(back, embedding, gather=reshard and not tied and bool(run.settings.method == "full"), reduce=True),
    ]


def _with(section: Section, unit: Unit, n: int, *, gather: bool, reduce: bool, offload: bool) -> Section:
    """A section with a unit's gathering before it, the reduction of its gradients after it, and the copies for both.

    `offload`: shards come from host memory as they are held there, and gradients go there.
    """
    whole, cast = sum(unit.whole(n)), unit.cast(n)
    numel, wide = unit.reduced(n)
    low = next((ITEMSIZE[s.gathered] for s in unit.shares if s.trained), 0)
    kernels = section.kernels.copy()
    hooks = section.hooks
    gathered = reduced = fetched = stored = 0
    shards = list(zip(unit.shares, unit.shards(n), strict=True))
    if gather and whole:
        fetched = sum(nbytes for s, nbytes in shards if not s.stays) if offload else 0
        gathered = whole * (n - 1) // n
        held = sum(nbytes for s, nbytes in shards if s.gathered != s.dtype and not s.stays)
        if cast:
            kernels[Kernel(COPIES, 0, held + cast)] += 1
        kernels[Kernel(COPIES, 0, 2 * whole // n)] += 1  # into the buffer
        kernels[Kernel(COPIES, 0, 2 * whole)] += 1  # and out of it
        hooks = hooks._replace(gathers=1, weights=sum(not s.stays for s in unit.shares))
    if reduce and numel:
        reduced = numel * low * (n - 1)
        stored = sum(nbytes for s, nbytes in shards if s.trained) if offload else 0
        kernels[Kernel(COPIES, 0, 2 * n * numel * low)] += 1  # side by side
        if wide != low:
            kernels[Kernel(COPIES, 0, numel * (low + wide))] += 1
        hooks = hooks._replace(reductions=1, gradients=sum(s.trained for s in unit.shares))
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

    def of(section: Section, grads: Sequence[int], end: bool = False) -> Section:
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
    first = of(sections[2 + layers], late)
    inner = [of(s, grads) for s, grads in zip(sections[3 + layers : -1], reversed(made.layer_grads), strict=True)]
    return [
        *sections[: 2 + layers], first, *inner, of(sections[-1], early, end=True),
    ]  # fmt: skip
