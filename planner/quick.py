"""The peak of a steady step without putting it together: layers of one kind add up, so each is summed once.

For sweeps and for comparing plans. Sizes are rounded to the allocator's 512 bytes; what segments add to single blocks
(`block rounding` in a plan) is left to the replay.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from vramplan.planner.allocator import block_bytes
from vramplan.planner.loading import held_bytes
from vramplan.planner.run import CUBLASLT_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vramplan.planner.run import Run

_Change = tuple[int, int]  # what a run of events adds, and the most it adds on the way
_NOTHING: frozenset[int] = frozenset()


def change(events: Sequence[int], sizes: Sequence[int], without: Collection[int] = _NOTHING) -> _Change:
    """What `events` add in bytes of blocks; frees of the tensors `without` are passed over."""
    blocks = {i: block_bytes(sizes[i]) for i in {e >> 1 for e in events}}
    if without:
        events = [e for e in events if not (e & 1 and e >> 1 in without)]
    running = list(accumulate([-blocks[e >> 1] if e & 1 else blocks[e >> 1] for e in events], initial=0))
    return running[-1], max(running)


def peak_bytes(run: Run) -> int:
    """The highest sum of 512-byte blocks in a step after the first, when states and workspaces are there."""
    s, sizes = run.settings, run.program.sizes
    held = held_bytes(run)
    held += len(run.trainer.batch) * run.accumulation * block_bytes(8 * s.batch * s.seq)
    held += 2 * run.workspace_bytes + (CUBLASLT_BYTES * (1 + s.checkpointing) if run.uses_cublaslt else 0)
    held += sum(change(stretch.events, sizes)[0] for stretch in run.update(first=True))
    highest = now = held
    for again in (False, True)[: min(run.accumulation, 2)]:
        for net, most in _micro_step(run, again):
            highest = max(highest, now + most)
            now += net
    for stretch in run.update(first=False):
        net, most = change(stretch.events, sizes)
        highest = max(highest, now + most)
        now += net
    return highest


def _micro_step(run: Run, again: bool) -> Iterator[_Change]:
    """Forward and backward, stretch by stretch in their order."""
    pieces, around = run.play(again)
    start, left, back = around.split
    # The embeddings go when the base model returns, or with the first layer if that keeps them longer: whoever lets
    # go first is passed over. Rotary tables and masks stay to the end here: a few rows against the layers' many.
    early = 2 * pieces[0].given + 1 in pieces[0].backward
    beside = {*around.shared.values(), *([around.embeds] if early else [])}
    sums: dict[tuple[int, str, bool], _Change] = {}

    def layer(i: int, what: str) -> _Change:
        piece, first = pieces[i], i == 0 and not (early and what == "backward")
        key = (id(piece), what, first)
        if key not in sums:
            without = {*piece.shared.values(), *([piece.given] if first else [])}
            sums[key] = change(getattr(piece, what), piece.sizes, without)
        return sums[key]

    yield change(around.events[:start], around.tape.sizes, beside)
    yield from (layer(i, "forward") for i in range(len(pieces)))
    yield change(around.events[start:left], around.tape.sizes, beside)
    yield from (layer(i, "leaving") for i in range(len(pieces)))
    yield change(around.events[left:back], around.tape.sizes, beside)
    yield from (layer(i, "backward") for i in reversed(range(len(pieces))))
    yield change(around.events[back:], around.tape.sizes, beside)
    yield -sum(block_bytes(around.tape.sizes[i]) for i in around.shared.values()), 0
