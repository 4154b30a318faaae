"""The boundary search: the larger size that survives and the smaller that does not, side by side."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.fit import Boundary, largest


@given(limit=st.integers(0, 3000), step=st.integers(1, 70), most=st.integers(1, 4000))
def test_it_is_what_trying_every_size_gives(limit: int, step: int, most: int) -> None:
    sizes = range(step, most + 1, step)
    good = [size for size in sizes if size <= limit]
    bad = [size for size in sizes if size > limit]
    expected = Boundary(good[-1] if good else None, bad[0] if bad else None)
    assert largest(lambda size: size <= limit, step, most) == expected


def test_few_sizes_are_tried() -> None:
    tried: list[int] = []

    def survives(size: int) -> bool:
        tried.append(size)
        return size <= 1234

    assert largest(survives, 1, 10**6) == (1234, 1235)
    assert len(tried) < 25
    assert len(tried) == len(set(tried))


def test_where_memory_does_not_grow_with_every_step_the_pair_is_still_true() -> None:
    found = largest(lambda size: size not in (5, 6, 9), 1, 16)
    assert found.survives is not None
    assert found.fails in (None, found.survives + 1)
