"""Sizes in bytes, read and written exactly: GiB = 2**30 bytes, GB = 10**9 bytes, integers inside."""

from __future__ import annotations

import re

from vramplan.planner.errors import UsageError, shown

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_SIZE = r"\s*([0-9]{1,15})(?:\.([0-9]{1,15}))?\s*([a-z]+)\s*"
_SECONDS = {"d": 86_400, "h": 3600, "min": 60, "m": 60, "s": 1}
_LARGEST = 64 * TIB  # more than any machine holds: beyond it the unit was mistyped


def parse_size(text: str, option: str | None = None) -> int:
    """Bytes of a size such as "24GiB", "1.5 GB" or "512 mib": a number and its unit, rounded down to whole bytes.

    Raises UsageError, naming `option`, for anything else, and for sizes of nothing or above 64 TiB.
    """
    where = f" ({option})" if option else ""
    match = re.fullmatch(_SIZE, text, re.IGNORECASE)
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{shown(text)} is no size; write a number and its unit, such as 24GiB or 24GB{where}")
    decimals = match[2] or ""
    size: int = int(match[1] + decimals) * unit // 10 ** len(decimals)
    if not 0 < size <= _LARGEST:
        raise UsageError(f"the size {shown(text)} is out of range; write one above 0 and up to 64TiB{where}")
    return size


def parse_usd(text: str, option: str) -> float:
    """Dollars of "50usd", "$50" or "50". Raises UsageError, naming `option`, for anything else."""
    match = re.fullmatch(r"\s*\$?\s*(\d{1,9}(?:\.\d{1,9})?)\s*(?:usd|\$)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise UsageError(f"{shown(text)} is no sum of dollars; write one such as 50usd ({option})")
    return float(match[1])


def parse_duration(text: str, option: str) -> int:
    """Seconds of "8h", "90min", "2d" or "1h30m", rounded down. Raises UsageError, naming `option`, for all else."""
    part = r"(\d{1,6}(?:\.\d{1,6})?)\s*(d|h|min|m|s)\s*"
    seconds = 0.0
    if re.fullmatch(rf"\s*({part})+", text, re.ASCII | re.IGNORECASE):
        seconds = sum(float(n) * _SECONDS[unit.lower()] for n, unit in re.findall(part, text, re.IGNORECASE))
    if seconds < 1:
        raise UsageError(f"{shown(text)} is no length of time; write one such as 8h, 90min or 2d ({option})")
    return int(seconds)


def format_gib(size: int, digits: int = 2) -> str:
    """`size` bytes in GiB: format_gib(13_690_208_256) is "12.75 GiB"."""
    return f"{_decimal(size, GIB, digits)} GiB"


def format_bytes(size: int, digits: int = 2) -> str:
    """`size` bytes in the largest unit of B, KiB, MiB, GiB and TiB that shows at least 1."""
    if abs(size) < KIB:
        return f"{size} B"
    for name, unit in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if _scaled(size, unit, digits) < KIB * 10**digits:  # as printed, so that never "1024.00 MiB"
            return f"{_decimal(size, unit, digits)} {name}"
    return f"{_decimal(size, TIB, digits)} TiB"


def format_count(count: int) -> str:
    """`count` with thousands separated: 41,943,040."""
    return f"{count:,}"


def _scaled(size: int, unit: int, digits: int) -> int:
    """|size| / unit in steps of 10**-digits, halves rounded up, in integers: floats lose bytes above 2**53."""
    scaled: int = (2 * abs(size) * 10**digits + unit) // (2 * unit)
    return scaled


def _decimal(size: int, unit: int, digits: int) -> str:
    scaled = _scaled(size, unit, digits)
    whole, rest = divmod(scaled, 10**digits)
    sign = "-" if size < 0 and scaled else ""
    return f"{sign}{whole}.{rest:0{digits}d}" if digits else f"{sign}{whole}"
