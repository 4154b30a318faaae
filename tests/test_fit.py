"""The verdict on one GPU; and the boundary search: the larger size that survives and the smaller that does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.catalog import Gpu
from vramplan.planner.fit import Boundary, judged, largest, largest_with, room_bytes

CARD = Gpu("card", "a card", budget_bytes=1000, bf16=False)


def played(
    reserved: int, allocated: int | None = None, *, before: int = 0, retries: int = 0, out_of_memory: str = ""
) -> Any:
    """A replay on a card whose context takes 150 bytes, 50 of them the driver's own."""
    return SimpleNamespace(
        peak_allocated_bytes=reserved if allocated is None else allocated,
        needed_bytes=reserved + 100,
        most_reserved_bytes=reserved,
        before_reserved_bytes=before,
        context_bytes=150,
        hidden_bytes=50,
        retries=retries,
        out_of_memory=out_of_memory,
    )


def never(room: int) -> Any:
    raise AssertionError(f"replayed within {room} for nothing")


def test_what_fits_and_what_is_beyond_help_is_replayed_once() -> None:
    assert room_bytes(CARD, played(1)) == 900
    fit = judged(CARD, played(900), never, ["bf16", "flash_attention_2"])
    assert (fit.fits, fit.headroom_bytes, fit.retries, fit.lacks) == (True, 0, None, ("bf16",))
    fit = judged(CARD, played(1000, 901), never)
    assert (fit.fits, fit.headroom_bytes, fit.retries) == (False, -100, None)


@pytest.mark.parametrize(("ending", "fits"), [({"retries": 3}, True), ({"out_of_memory": "forward"}, False)])
def test_too_much_cache_is_judged_by_the_replay_within_the_room(ending: dict[str, Any], fits: bool) -> None:
    asked: list[int] = []

    def within(room: int) -> Any:
        asked.append(room)
        return played(900, **ending)

    fit = judged(CARD, played(1000, 900), within)
    assert (asked, fit.fits, fit.needed_bytes, fit.headroom_bytes) == ([900], fits, 1100, -100)
    assert fit.retries == (3 if fits else None)
    assert fit.to_dict()["fits"] is fits


@pytest.mark.parametrize(("ending", "needed"), [({"retries": 0}, 900), ({"out_of_memory": "loading"}, 1050)])
def test_what_is_cached_while_loading_counts_where_it_cannot_be_given_back(ending: dict[str, Any], needed: int) -> None:
    fit = judged(CARD, played(800, before=950), lambda room: played(room, **ending))
    assert (fit.needed_bytes, fit.fits, fit.retries) == (needed, needed <= 1000, None)


@given(limit=st.integers(0, 3000), step=st.integers(1, 70), most=st.integers(1, 4000))
def test_it_is_what_trying_every_size_gives(limit: int, step: int, most: int) -> None:
    sizes = range(step, most + 1, step)
    good = [size for size in sizes if size <= limit]
    bad = [size for size in sizes if size > limit]
    expected = Boundary(good[-1] if good else None, bad[0] if bad else None)
    assert largest(lambda size: size <= limit, step, most) == expected


@given(
    limit=st.integers(0, 3000), more=st.integers(0, 500), fixed=st.integers(0, 10**6), each=st.integers(1, 10**6),
    bend=st.floats(0.5, 2), most=st.integers(1, 4000),
)  # fmt: skip
def test_following_the_line_finds_the_same(
    limit: int, more: int, fixed: int, each: int, bend: float, most: int
) -> None:
    tried: list[int] = []

    def needed(size: int) -> int:
        return fixed + int(each * size**bend)

    def spare(size: int) -> int:
        tried.append(size)
        return needed(limit) - needed(size)

    top = next((n for n in range(limit, 5000) if needed(n) > needed(limit)), 5000) - 1  # the last that needs no more
    found = largest_with(spare, lambda size: size <= top + more, most)
    assert found == largest(lambda size: size <= top, 1, most)
    assert len(tried) == len(set(tried))
    assert max(tried, default=0) <= top + more
    assert len(tried) <= 2 + 2 * most.bit_length()


@given(fixed=st.integers(0, 10**6), each=st.integers(2, 10**6), limit=st.integers(1, 3000), more=st.integers(0, 500))
def test_a_straight_line_takes_few_trials(fixed: int, each: int, limit: int, more: int) -> None:
    tried: list[int] = []

    def spare(size: int) -> int:
        tried.append(size)
        return fixed + each * limit + each // 2 - fixed - each * size

    assert largest_with(spare, lambda size: size <= limit + more, 4000) == Boundary(limit, limit + 1)
    assert len(tried) <= 5


@given(st.sets(st.integers(1, 60)), st.integers(1, 60))
def test_where_memory_is_ragged_both_sides_are_still_true(survivors: set[int], top: int) -> None:
    def survives(size: int) -> bool:
        return size in survivors and size <= top

    for found in (
        largest(survives, 1, 60),
        largest_with(lambda size: 1 if survives(size) else -1, lambda size: size <= top, 60),
    ):
        assert found.survives is None or survives(found.survives)
        assert found.fails is None or not survives(found.fails)
        assert found.fails is None or found.fails == (found.survives or 0) + 1
