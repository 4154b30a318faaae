"""The comparison of a plan's events with others: hand-made steps with one thing changed, and the alignment itself."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan import plan
from vramplan.probes import compare
from vramplan.probes.compare import Divergence, Recording, aligned, divergences, largest, of_history, of_plan

if TYPE_CHECKING:
    from collections.abc import Sequence


def recording(*steps: tuple[str, int], start_bytes: int = 0, phases: Sequence[tuple[int, str]] = ()) -> Recording:
    """("a", 100) allocates tensor a, ("a", 0) frees it."""
    names = list(dict.fromkeys(name for name, _ in steps))
    sizes = [max(size for other, size in steps if other == name) for name in names]
    events = [2 * names.index(name) + (not size) for name, size in steps]
    labels, scopes = [f"op {name}" for name in names], [f"model.{name}" for name in names]
    return Recording(events, sizes, labels, scopes, start_bytes, phases)


STEP = [("x", 500), ("a", 100), ("b", 200), ("a", 0), ("c", 300), ("b", 0), ("d", 400), ("c", 0), ("d", 0), ("x", 0)]
PHASES = [(0, "forward"), (6, "backward")]
PLANNED = recording(*STEP, start_bytes=1000, phases=PHASES)


def differing(*steps: tuple[str, int], least_bytes: int = 1, start_bytes: int = 1000) -> tuple[Divergence, ...]:
    return divergences(PLANNED, recording(*steps, start_bytes=start_bytes), least_bytes=least_bytes)


def test_held_and_peak() -> None:
    assert PLANNED.held() == [1000, 1500, 1600, 1800, 1700, 2000, 1800, 2200, 1900, 1500, 1000]
    assert PLANNED.peak_bytes == 2200
    assert PLANNED.phase(5) == "forward"
    assert PLANNED.phase(6) == "backward"
    assert recording(*STEP).phase(6) == ""


def test_equal_recordings_do_not_diverge() -> None:
    assert differing(*STEP) == ()
    assert divergences(recording(), recording()) == ()


def test_order_of_frees_between_two_allocations_is_nothing() -> None:
    assert differing(*STEP[:-3], *reversed(STEP[-3:])) == ()


def test_a_free_that_never_comes_is_nothing_after_the_last_allocation() -> None:
    assert differing(*STEP[:-2]) == ()


def test_an_allocation_that_was_not_planned() -> None:
    (found,) = differing(*STEP[:4], ("new", 250), ("new", 0), *STEP[4:])
    assert found == Divergence(
        "only seen", "forward", "model.new", "", "op new", 0, 250, plan_at=2, seen_at=4, apart_bytes=250
    )


def test_without_scopes_the_plan_says_where_it_was() -> None:
    seen = recording(*STEP[:4], ("new", 250), ("new", 0), *STEP[4:])
    seen = Recording(seen.events, seen.sizes, seen.labels, [""] * len(seen.sizes), 1000)
    (found,) = divergences(PLANNED, seen, least_bytes=1)
    assert found.scope == "model.b"


def test_an_allocation_that_did_not_come() -> None:
    (found,) = differing(*(step for step in STEP if step[0] != "c"))
    assert found == Divergence(
        "only planned", "forward", "model.c", "op c", "", 300, 0, plan_at=4, seen_at=2, apart_bytes=-500
    )


def test_an_end_that_did_not_come() -> None:
    (found,) = differing(*STEP[:6], STEP[7], STEP[9])
    assert (found.kind, found.phase, found.planned_bytes, found.apart_bytes) == ("only planned", "backward", 400, -200)


def test_another_size() -> None:
    (found,) = differing(*((name, 350 if size == 300 else size) for name, size in STEP))
    assert found == Divergence(
        "size", "forward", "model.c", "op c", "op c", 300, 350, plan_at=4, seen_at=4, apart_bytes=50
    )
    assert str(found) == "size: op c <> op c (forward, model.c): planned 300 B, seen 350 B; apart by 50 B there"


def test_a_tensor_that_lives_longer() -> None:
    (found,) = differing(*STEP[:3], STEP[4], STEP[3], *STEP[5:])  # a goes after c has come
    assert found == Divergence(
        "seen longer", "forward", "model.a", "op a", "op a", 0, 100, plan_at=3, seen_at=4, apart_bytes=100
    )


def test_a_tensor_that_goes_earlier() -> None:
    (found,) = differing(*STEP[:4], STEP[5], STEP[4], *STEP[6:])  # b goes before c comes
    assert found == Divergence(
        "planned longer", "forward", "model.b", "op b", "op b", 200, 0, plan_at=5, seen_at=4, apart_bytes=-200
    )


def test_small_tensors_are_left_out_but_count_in_what_is_held() -> None:
    steps = [("small", 50), *((name, 350 if size == 300 else size) for name, size in STEP)]
    (found,) = differing(*steps, least_bytes=100)
    assert (found.kind, found.apart_bytes) == ("size", 100)


def test_what_was_held_before_counts() -> None:
    (found,) = differing(*((name, 350 if size == 300 else size) for name, size in STEP), start_bytes=1007)
    assert found.apart_bytes == 57


def test_divergences_stand_in_the_order_of_the_step() -> None:
    found = differing(*STEP[:3], STEP[4], STEP[3], STEP[5], ("new", 1), *STEP[6:])
    assert [each.kind for each in found] == ["seen longer", "only seen"]


def test_an_id_may_live_twice() -> None:
    twice = [*STEP, *STEP]
    assert divergences(recording(*twice), recording(*twice), least_bytes=1) == ()
    (found,) = divergences(recording(*twice), recording(*STEP, *STEP[:-4], STEP[-3]), least_bytes=1)
    assert (found.kind, found.plan_at) == ("only planned", 16)


def test_what_recurs_counts_once_among_the_largest() -> None:
    layer, changed = [("a", 100), ("b", 200), ("a", 0), ("b", 0)], [("a", 100), ("n", 300), ("a", 0), ("n", 0)]
    planned = recording(("x", 7), *layer * 3, ("y", 5))
    found = divergences(planned, recording(("x", 7), *changed * 3, ("y", 9)), least_bytes=1)
    top = [(each.planned_bytes, each.seen_bytes, times) for each, times in largest(found)]
    assert top == [(200, 300, 3), (5, 9, 1)]
    assert len(largest(found, 1)) == 1


# ------------------------------------------------------------------------------------------------------- the alignment


def longest(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(row[j], above[j + 1])
    return row[-1]


few = st.lists(st.integers(0, 3), max_size=15)


@given(few, few, st.sampled_from([2, 300]))
def test_pairs_are_equal_ascending_and_as_many_as_can_be(a: list[int], b: list[int], edits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_EDITS", edits)
        pairs = aligned(a, b)
    assert all(a[i] == b[j] for i, j in pairs)
    assert all(i < k and j < m for (i, j), (k, m) in pairwise(pairs))
    if edits == 300:
        assert len(pairs) == longest(a, b)


def test_sequences_that_have_nothing_in_common_end() -> None:
    assert aligned([1] * 3000, [2] * 3000) == []


# ---------------------------------------------------------------------------------------------------------- recordings


def test_a_plan_as_a_recording() -> None:
    made = plan("gpt2", method="lora", seq_len=128, target_modules="attention", gradient_accumulation_steps=2)
    found = of_plan(made)
    assert found.peak_bytes <= made.memory.peak_allocated_bytes
    assert found.peak_bytes > 0.98 * made.memory.peak_allocated_bytes
    assert found.start_bytes > made.memory.ready_bytes
    assert {"forward, layer 0", "backward, layer 11", "optimizer step"} <= {name for _, name in found.phases}
    assert any(scope == "transformer.h.11.attn.c_attn" for scope in found.scopes)
    assert found.held()[-1] == found.start_bytes  # a settled step leaves what it found
    assert divergences(found, of_plan(made, 2), least_bytes=1) == ()


def test_the_first_step_makes_the_states() -> None:
    made = plan("gpt2", method="full", seq_len=128, optimizer="adamw_torch", mixed_precision="bf16")
    first = of_plan(made, 0)
    assert first.held()[-1] - first.start_bytes > 2 * 2 * made.counts.trainable  # two states in bf16
    found = divergences(of_plan(made), first)
    assert {each.kind for each in found} == {"only seen", "seen longer"} or {e.kind for e in found} == {"only seen"}
    assert sum(each.seen_bytes for each in found) > 2 * 2 * made.counts.trainable * 0.9


LABELS = ["mm<matmul|MmBackward0|torch/a.py:1:f < torch/b.py:2:g", "zeros||torch/c.py:3:h"]
HISTORY = [
    ["segment_alloc", 1, 2**21, 0, 0],
    ["alloc", 1, 100, 0, 0],
    ["free_completed", 7, 30, 1, 0],  # older than the history, and gone before the step
    ["alloc", 2, 200, 1, 0],
    ["free_requested", 1, 100, 1, 0],
    ["free_completed", 1, 100, 1, 0],
    ["alloc", 1, 50, 0, 0],
    ["free_completed", 9, 40, 1, 0],  # older than the history
    ["alloc", 3, 60, 0, 0],
]


def test_a_memory_history_as_a_recording() -> None:
    found = of_history(LABELS, HISTORY, first=4, last=8)
    assert found.start_bytes == 100 + 200 + 40
    assert found.held() == [340, 240, 290, 250]
    assert [found.labels[event >> 1] for event in found.events] == [
        "mm, MmBackward0, torch/a.py:1:f",
        "mm, MmBackward0, torch/a.py:1:f",
        "zeros, torch/c.py:3:h",
    ]
    assert of_history(LABELS, HISTORY, 8, start_bytes=1000).held() == [1000, 1060]
    assert of_history(LABELS, HISTORY).held() == [70, 170, 140, 340, 240, 290, 250, 310]
