"""The plan against fine-tuning runs measured on an H200 (tables/measured): every run, every figure it has."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import vramplan
from vramplan import plan

RUNS = Path(vramplan.__file__).parent / "tables" / "measured" / "h200-single-gpu.jsonl"
ROWS = [json.loads(line) for line in RUNS.read_text().splitlines()]


@pytest.fixture(scope="module")
def planned() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(row, plan(row["config"], gpu=row["gpu"], stack=row["stack"], **row["options"]).to_dict()) for row in ROWS]


def errors(planned: list[tuple[dict[str, Any], dict[str, Any]]], ours: str, theirs: str) -> list[float]:
    return [
        answer["memory"][ours] / row[theirs] - 1
        for row, answer in planned
        if row[theirs] and not (ours == "device_bytes" and "paged" in row["options"]["optimizer"])
    ]


def p95(found: list[float]) -> float:
    return sorted(map(abs, found))[int(len(found) * 0.95)]


def test_trainable_and_total_parameters_are_exact(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for row, answer in planned:
        assert answer["parameters"]["trainable"] == row["trainable_parameters"], row["id"]


def test_loaded_and_ready_are_within_one_percent(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    # What is left is block rounding, which depends on the order in which a loader touches the weights.
    for name in ("loaded_bytes", "ready_bytes"):
        found = errors(planned, name, name)
        assert max(map(abs, found)) < 0.01, name
        assert median(map(abs, found)) < 1e-4, name


def test_peak_allocated(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    found = errors(planned, "peak_allocated_bytes", "peak_allocated_bytes")
    assert len(found) == len(ROWS)
    assert median(map(abs, found)) < 0.003
    assert p95(found) < 0.015
    assert max(map(abs, found)) < 0.03


def test_peak_reserved(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    found = errors(planned, "peak_reserved_bytes", "peak_reserved_bytes")
    assert median(map(abs, found)) < 0.015
    assert p95(found) < 0.05


def test_no_dangerous_underestimate(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    assert min(errors(planned, "device_bytes", "device_used_bytes")) > -0.02


def test_rows_of_the_breakdown_sum_to_the_peak(planned: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for row, answer in planned:
        memory = answer["memory"]
        assert sum(part["bytes"] for part in memory["components"]) == memory["peak_allocated_bytes"], row["id"]
