"""Hypothesis strategies that tests share."""

from __future__ import annotations

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-2, 130)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "16", "-1", "1e3", "nan", "True", "all-linear", "\x00", "\ud800", "../..", "bf16", "llama"])
)
JSON = st.recursive(
    SCALARS, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
)
