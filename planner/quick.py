"""The peak of a steady step without putting it together: layers of one kind add up, so each is summed once.

For sweeps and for comparing plans. Sizes are rounded to the allocator's 512 bytes; what segments add to single blocks
(`block rounding` in a plan) is left to the replay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner.allocator import block_bytes, change
from vramplan.planner.loading import held_bytes
from vramplan.planner.run import CUBLASLT_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vramplan.planner.run import Run

_SCALAR = block_bytes(4)
_Change = tuple[int, int]  # what a run of events adds, and the most it adds on the way


def _without(events: Sequence[int], held: Collection[int]) -> Sequence[int]:
    """`events` but for the frees of the tensors `held`."""
    return [e for e in events if not (e & 1 and e >> 1 in held)] if held else events


def peak_bytes(run: Run) -> int:
    """The highest sum of 512-byte blocks in a step after the first, when states and workspaces are there."""
    if run.sharing is not None:
        return _played(run)
    s = run.settings
    states, *update = run.update_changes()
    now = held_bytes(run) + states
    now += len(run.trainer.batch) * run.accumulation * block_bytes(8 * s.batch * s.seq)
    now += 3 * _SCALAR  # the number of tokens, the loss so far, that of the last micro-step
    now += 2 * run.workspace_bytes + (CUBLASLT_BYTES * (1 + s.checkpointing) if run.uses_cublaslt else 0)
    now += 2 * _SCALAR * run.scaled  # the loss scale and its growth tracker
    highest = now
    micro_steps = (False, True)[: min(run.accumulation, 2)]
    for net, most in (*(each for again in micro_steps for each in _micro_step(run, again)), *update):
        highest = max(highest, now + most)
        now += net
    return highest


def _played(run: Run) -> int:
    """The same of a run on several GPUs: its events one by one, without an allocator."""
    before = [stretch.events for stretch in (*run.loading, *run.step(0))]
    after = [stretch.events for stretch in run.step(1)]
    return steady_peak(([*before, *after], run.program.sizes, ()), len(before))


def steady_peak(seen: tuple[Sequence[Sequence[int]], Sequence[int], object], before: int) -> int:
    """The peak of a run's events by stretches, with sizes, from the stretch `before` on."""
    stretches, sizes, _ = seen
    first, second = ([e for stretch in part for e in stretch] for part in (stretches[:before], stretches[before:]))
    return change(first, sizes)[0] + change(second, sizes)[1]


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
            held = {*piece.shared.values(), *([piece.given] if first else [])}
            sums[key] = change(_without(getattr(piece, what), held), piece.sizes)
        return sums[key]

    yield change(_without(around.events[:start], beside), around.tape.sizes)
    yield from (layer(i, "forward") for i in range(len(pieces)))
    yield change(_without(around.events[start:left], beside), around.tape.sizes)
    yield from (layer(i, "leaving") for i in range(len(pieces)))
    yield change(_without(around.events[left:back], beside), around.tape.sizes)
    yield from (layer(i, "backward") for i in reversed(range(len(pieces))))
    yield change(_without(around.events[back:], beside), around.tape.sizes)
    yield -sum(block_bytes(around.tape.sizes[i]) for i in around.shared.values()), 0
