"""How many tokens bitsandbytes multiplies with a packed 4-bit weight, by hand from its ladder of thresholds."""

from __future__ import annotations

import pytest

from vramplan.planner.few_tokens import is_fused

# Llama-3.1-8B's projections, (out, in)
GATE, DOWN, KEY, QUERY = (14336, 4096), (4096, 14336), (1024, 4096), (4096, 4096)


def most(shape: tuple[int, int], capability: tuple[int, int] | None, multiprocessors: int, dtype: str = "bf16") -> int:
    """The largest number of tokens up to 1,600 that need no dequantised copy."""
    return max(m for m in range(1, 1601) if is_fused(m, *shape, dtype, capability, multiprocessors))


@pytest.mark.parametrize(
    ("shape", "capability", "multiprocessors", "dtype", "tokens"),
    [
        (GATE, (9, 0), 132, "bf16", 32),  # 224 blocks of 64 columns: between one and two for each multiprocessor
        (DOWN, (9, 0), 132, "bf16", 5),  # 64 blocks of a tall weight: less than three quarters
        ((4608, 4096), (9, 0), 132, "bf16", 16),  # 72 blocks: more than half
        ((28672, 4096), (9, 0), 132, "bf16", 64),  # 448 blocks: more than three
        ((2048, 512), (9, 0), 132, "bf16", 512),  # below 4 Mi elements and short: 32 blocks are less than a third
        (KEY, (8, 0), 108, "bf16", 16),  # exactly 4 Mi elements is not small
        (DOWN, (8, 0), 108, "bf16", 5),
        (GATE, (8, 9), 128, "bf16", 128),  # 1.75 for each, and more than 200 blocks
        (QUERY, (8, 6), 82, "bf16", 64),
        (GATE, (12, 0), 170, "bf16", 64),
        (GATE, (7, 5), 40, "fp16", 128),
        (GATE, (7, 5), 40, "bf16", 7),  # no tensor-core kernel
        (GATE, (9, 0), 132, "fp32", 7),
        (GATE, (10, 0), 148, "bf16", 8),
        (GATE, None, 304, "bf16", 4),
    ],
)
def test_the_most_tokens(
    shape: tuple[int, int], capability: tuple[int, int] | None, multiprocessors: int, dtype: str, tokens: int
) -> None:
    assert most(shape, capability, multiprocessors, dtype) == tokens


def test_a_row_must_be_whole_blocks_of_64_weights() -> None:
    assert is_fused(1, 4096, 4096, "bf16", (9, 0), 132)
    assert not is_fused(1, 4096, 4095, "bf16", (9, 0), 132)


def test_six_tokens_may_be_too_many_where_five_are_not() -> None:
    # the authors measured 6 and 7 apart, on cards with HBM
    assert [m for m in range(1, 10) if is_fused(m, *DOWN, "bf16", (9, 0), 132)] == [1, 2, 3, 4, 5]
