from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.errors import UsageError
from vramplan.planner.units import (
    GB,
    GIB,
    MIB,
    TIB,
    format_bytes,
    format_count,
    format_gib,
    parse_duration,
    parse_size,
    parse_usd,
)

sizes = st.integers(-64 * TIB, 64 * TIB)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 25_769_803_776),
        ("24GB", 24_000_000_000),
        (" 80 gb ", 80 * GB),
        ("1.5GiB", 1_610_612_736),
        ("0.1GB", 100_000_000),
        ("0.1GiB", 107_374_182),  # 107374182.4, rounded down
        ("16376MiB", 16376 * MIB),
        ("1KiB", 1024),
        ("1B", 1),
        ("64TiB", 64 * TIB),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "24G", "GiB", "-3GiB", "1e3GiB", "nanGiB", "1,5GiB", "1.GiB", "٣GiB", "9" * 16 + "GiB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no size; write .* such as 24GiB or 24GB \(--gpu\)$"):
        parse_size(text, "--gpu")


@pytest.mark.parametrize("text", ["0GiB", "0.0B", "0.5B", "64.1TiB", "999999GiB"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"out of range; write one above 0 and up to 64TiB$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "gib", "largest_unit"),
    [
        (0, "0.00 GiB", "0 B"),
        (1023, "0.00 GiB", "1023 B"),
        (1024, "0.00 GiB", "1.00 KiB"),
        (13_690_208_256, "12.75 GiB", "12.75 GiB"),
        (-GIB // 2, "-0.50 GiB", "-512.00 MiB"),
        (-1, "0.00 GiB", "-1 B"),
        (5_368_709, "0.00 GiB", "5.12 MiB"),
        (5_368_710, "0.01 GiB", "5.12 MiB"),  # 0.005 GiB is 5368709.12 bytes
        (MIB - 1, "0.00 GiB", "1.00 MiB"),  # never "1024.00 KiB"
        (TIB + TIB // 2, "1536.00 GiB", "1.50 TiB"),
    ],
)
def test_formats(size: int, gib: str, largest_unit: str) -> None:
    assert (format_gib(size), format_bytes(size)) == (gib, largest_unit)


@given(sizes, st.integers(0, 6))
def test_format_gib_rounds_exactly(size: int, digits: int) -> None:
    exact = (Decimal(size) / GIB).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    number, unit = format_gib(size, digits).split()
    assert (Decimal(number), unit) == (exact, "GiB")


@given(st.integers(1, 64 * TIB))
def test_a_printed_size_reads_back_within_its_last_digit(size: int) -> None:
    printed = format_bytes(size)
    unit = parse_size("1" + printed.split()[1])
    assert abs(parse_size(printed) - size) <= unit // 200 + 1
    assert unit == 1 or parse_size(printed) >= unit


def test_format_count() -> None:
    assert [format_count(n) for n in (0, 999, 41_943_040)] == ["0", "999", "41,943,040"]


@pytest.mark.parametrize(
    ("text", "usd"),
    [("50usd", 50), ("$50", 50), ("50", 50), (" 12.50 USD ", 12.5), ("0", 0), ("0.05$", 0.05)],
)
def test_dollars(text: str, usd: float) -> None:
    assert parse_usd(text, "--budget") == usd


@pytest.mark.parametrize(
    "text", ["", "$", "usd", "-5", "5eur", "5 0", "1e3", "nan", "inf", "1,000", "9" * 10, "٣", "5k"]
)
def test_no_dollars(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no sum of dollars; write one such as 50usd \(--budget\)"):
        parse_usd(text, "--budget")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 28_800),
        ("90min", 5400),
        ("30m", 1800),
        ("2d", 172_800),
        ("1.5 H", 5400),
        ("1h30m", 5400),
        ("1d 2h 3min 4s", 93_784),
        ("1s", 1),
    ],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text, "--deadline") == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "h", "-8h", "0h", "0.5s", "8 hours", "8h 30", "1e3h", "nanh", "9999999h", "8h" * 500 + "x"]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no length of time; write one such as 8h, 90min or 2d \(--deadline\)"):
        parse_duration(text, "--deadline")
