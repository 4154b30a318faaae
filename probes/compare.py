"""Compares what was planned with what was seen, tensor by tensor: which allocation differs first, and which most.

Both are a `Recording`: the plan's events of one step, those of a trace, or those of PyTorch's memory history. The
allocations of a certain size are aligned in their order, as `diff` aligns lines; then the lifetimes of those that stand
opposite each other are compared, by the allocations they end between. The order of frees between two allocations
decides nothing and is not looked at. No torch is imported here.

The alignment is Myers' greedy one (E. W. Myers, An O(ND) Difference Algorithm and Its Variations, Algorithmica 1986).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vramplan.planner.run import alive
from vramplan.planner.step import NOWHERE
from vramplan.planner.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vramplan.planner.plan import Plan
    from vramplan.planner.run import Program, Stretch

LEAST_BYTES = 100_000  # smaller tensors move no peak of a real model
_EDITS = 300  # differences searched for at once: the search takes time in their square


@dataclass(frozen=True, slots=True)
class Recording:
    """Allocations and frees in their order: `2 * id` and `2 * id + 1`; sizes, labels and scopes are looked up by id.

    An id may be allocated again after its free. A free without an allocation is of a tensor from before. Sizes are
    bytes asked for; `start_bytes` of them are held before the first event. `label` is the op, `scope` the module's
    path. `phases` names stretches of the events: each with the position of its first event.
    """

    events: Sequence[int]
    sizes: Sequence[int]
    labels: Sequence[str]
    scopes: Sequence[str]
    start_bytes: int = 0
    phases: Sequence[tuple[int, str]] = ()

    def held(self) -> list[int]:
        """Bytes held before the first event and after each: one more than there are events."""
        sizes = self.sizes
        changes = [-sizes[e >> 1] if e & 1 else sizes[e >> 1] for e in self.events]
        return list(accumulate(changes, initial=self.start_bytes))

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at once."""
        return max(self.held())

    def phase(self, position: int) -> str:
        """The name of the stretch that event `position` belongs to; empty where none is named."""
        at = bisect_right(self.phases, position, key=lambda phase: phase[0])
        return self.phases[at - 1][1] if at else ""


class Divergence(NamedTuple):
    """One tensor in which plan and reality differ, at the moment from which they do.

    `kind` is "only planned", "only seen", "size", "seen longer" or "planned longer"; the bytes are what each side holds
    for it there. `plan_at` and `seen_at` are positions in the events. `apart_bytes`: all that is held there, seen less
    planned. The scope of a tensor that was only seen is the plan's last one before it, unless the recording knows it.
    """

    kind: str
    phase: str
    scope: str
    planned: str
    seen: str
    planned_bytes: int
    seen_bytes: int
    plan_at: int
    seen_at: int
    apart_bytes: int

    @property
    def bytes(self) -> int:
        """By how much they differ."""
        return abs(self.seen_bytes - self.planned_bytes)

    def __str__(self) -> str:
        what = f"{self.planned} <> {self.seen}" if self.planned and self.seen else self.planned or self.seen
        sizes = f"planned {format_bytes(self.planned_bytes)}, seen {format_bytes(self.seen_bytes)}"
        where = ", ".join(filter(None, (self.phase, self.scope)))
        return f"{self.kind}: {what} ({where}): {sizes}; apart by {format_bytes(self.apart_bytes)} there"


# ------------------------------------------------------------------------------------------------------- recordings


class Played(Protocol):
    """A run as events: planner/run.py's Run, or a trace."""

    @property
    def program(self) -> Program:
        """What is known of each tensor."""

    @property
    def loading(self) -> Sequence[Stretch]:
        """What happens before the first step."""

    def step(self, number: int) -> Sequence[Stretch]:
        """Optimizer step `number`, from 0, once those before it have been played."""


def of_plan(plan: Plan, step: int = 1) -> Recording:
    """The plan's events of optimizer step `step`, from 0; the first makes the optimizer's states, later ones do not."""
    from vramplan.planner.memory import run_of

    run = run_of(plan.architecture, plan.options, plan.device, plan.counts)
    return of_run(run, step, plan.architecture.layer_prefix)


def of_run(run: Played, step: int = 1, layer_prefix: str = "") -> Recording:
    """Optimizer step `step` of a run of which nothing was played yet; `layer_prefix` goes before a layer's number."""
    program = run.program
    before = [event for stretch in run.loading for event in stretch.events]
    before += [event for number in range(step) for stretch in run.step(number) for event in stretch.events]
    events: list[int] = []
    phases: list[tuple[int, str]] = []
    for stretch in run.step(step):
        phases.append((len(events), stretch.name))
        events += stretch.events
    scopes = [
        scope if layer == NOWHERE else f"{layer_prefix}.{layer}.{scope}"
        for scope, layer in zip(program.scopes, program.layers, strict=True)
    ]
    start = sum(program.sizes[i] for i in alive(before))
    return Recording(events, program.sizes, program.labels, scopes, start, phases)


def of_history(
    labels: Sequence[str],
    history: Iterable[Sequence[Any]],
    first: int = 0,
    last: int | None = None,
    start_bytes: int | None = None,
) -> Recording:
    """Events `first` up to `last` of PyTorch's memory history, as probes/history.py gives them.

    Each event is its action, address, size, the number of its label, and its stream. `start_bytes` are the bytes asked
    for and held before `first` (memory_stats, "requested_bytes.all.current"); None counts them as far as the history
    goes back.
    """
    at: dict[int, int] = {}  # the tensor at an address
    sizes: list[int] = []
    names: list[str] = []
    events: list[int] = []
    start = 0
    for position, (action, address, nbytes, label, *_) in enumerate(islice(history, last)):
        if action == "alloc":
            at[address] = len(sizes)
        elif action != "free_completed":  # segments, and requests to free that are carried out later
            continue
        elif address not in at:  # older than the history
            if position < first:
                continue
            at[address] = len(sizes)
            start += nbytes
        tensor = at[address] if action == "alloc" else at.pop(address)
        if tensor == len(sizes):
            sizes.append(nbytes)
            names.append(_name(labels[label]))
        if position >= first:
            events.append(2 * tensor + (action != "alloc"))
        else:
            start += nbytes if action == "alloc" else -nbytes
    return Recording(events, sizes, names, [""] * len(sizes), start if start_bytes is None else start_bytes)


def _name(label: str) -> str:
    """The op, the backward node and the innermost line of a label: "op<op<op|node|line < line"."""
    ops, node, lines = [*label.split("|"), "", ""][:3]
    return ", ".join(filter(None, (ops.split("<")[0], node, lines.split(" < ")[0])))


# --------------------------------------------------------------------------------------------------------- comparison


def divergences(plan: Recording, seen: Recording, *, least_bytes: int = LEAST_BYTES) -> tuple[Divergence, ...]:
    """Where the two differ in tensors of `least_bytes` and more, in the order of the step."""
    ours, theirs = _Side(plan, least_bytes), _Side(seen, least_bytes)
    rows = _rows(ours.sizes, theirs.sizes)
    ours.rows = [row for row, (i, _) in enumerate(rows) if i is not None]
    theirs.rows = [row for row, (_, j) in enumerate(rows) if j is not None]
    found: list[tuple[int, Divergence]] = []
    for row, (i, j) in enumerate(rows):
        if i is None or j is None or ours.sizes[i] != theirs.sizes[j]:
            kind = "only seen" if i is None else "only planned" if j is None else "size"
            found.append((row, _divergence(ours, theirs, kind, row, i, j)))
            continue
        (our_last, our_next), (their_last, their_next) = ours.end(i, len(rows)), theirs.end(j, len(rows))
        if our_next <= their_last:
            found.append((our_next, _divergence(ours, theirs, "seen longer", our_next, i, j)))
        elif their_next <= our_last:
            found.append((their_next, _divergence(ours, theirs, "planned longer", their_next, i, j)))
    return tuple(divergence for _, divergence in sorted(found, key=lambda each: each[0]))


def largest(found: Iterable[Divergence], n: int = 10) -> list[tuple[Divergence, int]]:
    """The `n` that differ by the most bytes, each with how often it occurs: what recurs in every layer counts once."""
    alike: dict[tuple[object, ...], list[Divergence]] = {}
    for each in found:
        alike.setdefault((each.kind, each.planned, each.seen, each.planned_bytes, each.seen_bytes), []).append(each)
    groups = sorted(alike.values(), key=lambda group: -group[0].bytes)
    return [(group[0], len(group)) for group in groups[:n]]


class _Side:
    """The tensors of one recording that are large enough to compare, in the order of their allocation."""

    def __init__(self, recording: Recording, least_bytes: int) -> None:
        self.recording = recording
        self.held = recording.held()
        self.ids: list[int] = []
        self.born: list[int] = []  # positions of the allocations in the events
        self.died: list[int] = []  # positions of the frees; the number of events where there is none
        self.rows: list[int] = []  # of the alignment
        living: dict[int, int] = {}
        for position, event in enumerate(recording.events):
            tensor = event >> 1
            if recording.sizes[tensor] < least_bytes:
                continue
            if not event & 1:
                living[tensor] = len(self.ids)
                self.ids.append(tensor)
                self.born.append(position)
                self.died.append(len(recording.events))
            elif tensor in living:
                self.died[living.pop(tensor)] = position
        self.sizes = [recording.sizes[tensor] for tensor in self.ids]

    def end(self, index: int, rows: int) -> tuple[int, int]:
        """The rows of the allocations before and after a tensor's free."""
        following = bisect_left(self.born, self.died[index])
        return self.rows[following - 1], self.rows[following] if following < len(self.rows) else rows

    def at(self, row: int, index: int | None) -> int:
        """Bytes held once tensor `index` is there, or else just before the first allocation in or after `row`.

        After the last allocation nothing tells the moment: then what was held with it.
        """
        following = bisect_left(self.rows, row)
        if index is None and following < len(self.born):
            return self.held[self.born[following]]
        last = self.born[-1] + 1 if self.born else 0
        return self.held[last if index is None else self.born[index] + 1]

    def position(self, row: int) -> int:
        """The last allocation before `row`; 0 where there is none."""
        return self.born[max(bisect_left(self.rows, row) - 1, 0)] if self.born else 0


def _divergence(ours: _Side, theirs: _Side, kind: str, row: int, i: int | None, j: int | None) -> Divergence:
    """The divergence of a row's tensors; for a lifetime, `row` is the first allocation that only one of them meets."""
    plan, seen = ours.recording, theirs.recording
    lifetime = kind.endswith("longer")
    plan_at = ours.position(row) if i is None else (ours.died if lifetime else ours.born)[i]
    seen_at = theirs.position(row) if j is None else (theirs.died if lifetime else theirs.born)[j]
    mine = None if i is None else ours.ids[i]
    other = None if j is None else theirs.ids[j]
    planned_bytes = 0 if mine is None or kind == "seen longer" else plan.sizes[mine]
    seen_bytes = 0 if other is None or kind == "planned longer" else seen.sizes[other]
    scope = plan.scopes[mine] if mine is not None else seen.scopes[other] if other is not None else ""
    if not scope and ours.ids:
        scope = plan.scopes[plan.events[ours.position(row)] >> 1]
    at = plan_at if kind != "planned longer" else ours.position(row)
    return Divergence(
        kind=kind,
        phase=(i is None and seen.phase(seen_at)) or plan.phase(at) or seen.phase(seen_at),
        scope=scope,
        planned="" if mine is None else plan.labels[mine],
        seen="" if other is None else seen.labels[other],
        planned_bytes=planned_bytes,
        seen_bytes=seen_bytes,
        plan_at=plan_at,
        seen_at=seen_at,
        apart_bytes=theirs.at(row, None if lifetime else j) - ours.at(row, None if lifetime else i),
    )


def _rows(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """The alignment, a row for each pair and for each that stands alone."""
    rows: list[tuple[int | None, int | None]] = []
    i = j = 0
    for i_next, j_next in [*aligned(ours, theirs), (len(ours), len(theirs))]:
        if i_next - i == j_next - j:  # as many on both sides: the same tensors in other sizes
            rows += zip(range(i, i_next), range(j, j_next), strict=True)
        else:
            rows += [(each, None) for each in range(i, i_next)]
            rows += [(None, each) for each in range(j, j_next)]
        rows.append((i_next, j_next))
        i, j = i_next + 1, j_next + 1
    return rows[:-1]


def aligned(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions of equal values in ascending order: as many as can be, but for sequences hardly alike."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        path, (x, y) = _path(ours[i:], theirs[j:])
        pairs += [(i + x, j + y) for x, y in path]
        i, j = i + x, j + y
    return pairs


def _path(a: Sequence[int], b: Sequence[int]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Pairs of equal values, with the fewest edits to the end of both or to where `_EDITS` lead; that point."""
    rounds: list[dict[int, int]] = []  # for each number of edits: the furthest x on each diagonal k = x - y
    for edits in range(_EDITS + 1):
        reached: dict[int, int] = {}
        for k in range(-edits, edits + 1, 2):
            x = _step(rounds[-1], k, len(a), len(b))[0] if rounds else 0
            if x < 0:
                continue
            while x < len(a) and x - k < len(b) and a[x] == b[x - k]:
                x += 1
            reached[k] = x
        rounds.append(reached)
        if reached.get(len(a) - len(b)) == len(a):
            break
    end = len(a) - len(b)
    k = end if rounds[-1].get(end) == len(a) else max(rounds[-1], key=lambda k: 2 * rounds[-1][k] - k)
    x = rounds[-1][k]
    point, pairs = (x, x - k), []
    while rounds:
        rounds.pop()
        entered, before = _step(rounds[-1], k, len(a), len(b)) if rounds else (0, k)
        pairs += [(each, each - k) for each in range(x - 1, entered - 1, -1)]
        if rounds:
            k, x = before, rounds[-1][before]
    return pairs[::-1], point


def _step(before: dict[int, int], k: int, len_a: int, len_b: int) -> tuple[int, int]:
    """Where one edit more, past one of `a` or one of `b`, enters diagonal `k`, and from which; -1 where none does."""
    past_a = before.get(k - 1, len_a) + 1
    past_b = before.get(k + 1, -1)
    if past_a > len_a:
        past_a = -1
    if past_b - k > len_b:
        past_b = -1
    return (past_a, k - 1) if past_a > past_b else (past_b, k + 1)
