"""The verdict on one GPU; and the boundary search: the larger size that survives and the smaller that does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.catalog import Gpu
from vramplan.planner.fit import Boundary, judged, largest, room_bytes

CARD = Gpu("card", "a card", budget_bytes=1000, bf16=False)


def played(reserved: int, allocated: int | None = None, *, retries: int = 0, out_of_memory: str = "") -> Any:
    """A replay on a card whose context takes 150 bytes, 50 of them the driver's own."""
    return SimpleNamespace(
        peak_allocated_bytes=reserved if allocated is None else allocated,
        needed_bytes=reserved + 100,
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


@given(limit=st.integers(0, 3000), step=st.integers(1, 70), most=st.integers(1, 4000))
def test_it_is_what_trying_every_size_gives(limit: int, step: int, most: int) -> None:
    sizes = range(step, most + 1, step)
    good = [size for size in sizes if size <= limit]
    bad = [size for size in sizes if size > limit]
    expected = Boundary(good[-1] if good else None, bad[0] if bad else None)
    assert largest(lambda size: size <= limit, step, most) == expected


@given(limit=st.integers(0, 3000), more=st.integers(0, 500), step=st.integers(1, 70), most=st.integers(1, 4000))
def test_a_cheaper_answer_changes_nothing_but_the_effort(limit: int, more: int, step: int, most: int) -> None:
    tried: list[int] = []

    def survives(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(survives, step, most, possible=lambda size: size <= limit + more)
    assert found == largest(lambda size: size <= limit, step, most)
    assert max(tried, default=0) <= limit + more
    assert len(tried) <= 2 * (more // step + 1).bit_length()


@given(st.sets(st.integers(1, 60)), st.integers(1, 60))
def test_where_memory_is_ragged_both_sides_are_still_true(survivors: set[int], top: int) -> None:
    for possible in (None, lambda size: size <= top):
        found = largest(lambda size: size in survivors and size <= top, 1, 60, possible)
        assert found.survives is None or found.survives in survivors
        assert found.fails is None or found.fails not in survivors or found.fails > top
        assert found.fails is None or found.fails == (found.survives or 0) + 1
