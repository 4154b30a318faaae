"""The plan against fine-tuning runs measured on an H200 (tables/measured): every run, every figure it has.

The 84 of h200-single-gpu.jsonl were there while the ops were written; the 92 of h200-other-models.jsonl (other models,
mixtures of experts, trl, expandable segments) were measured when the ops stood, to see whether they hold elsewhere.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import vramplan
from vramplan import plan

MEASURED = Path(vramplan.__file__).parent / "tables" / "measured"
ROWS = [json.loads(line) for line in (MEASURED / "h200-single-gpu.jsonl").read_text().splitlines()]
OTHERS = [json.loads(line) for line in (MEASURED / "h200-other-models.jsonl").read_text().splitlines()]


Planned = list[tuple[dict[str, Any], dict[str, Any]]]


def answers(rows: list[dict[str, Any]]) -> Planned:
    return [(row, plan(row["config"], gpu=row["gpu"], stack=row["stack"], **row["options"]).to_dict()) for row in rows]


@cache
def planned_rows() -> Planned:
    return answers(ROWS)


@cache
def planned_others() -> Planned:
    return answers(OTHERS)


@pytest.fixture
def planned() -> Planned:
    return planned_rows()


@pytest.fixture
def others() -> Planned:
    return planned_others()


def errors(planned: Planned, ours: str, theirs: str) -> list[float]:
    return [
        answer["memory"][ours] / row[theirs] - 1
        for row, answer in planned
        if row[theirs] and not (ours == "device_bytes" and "paged" in row["options"]["optimizer"])
    ]


def p95(found: list[float]) -> float:
    return sorted(map(abs, found))[int(len(found) * 0.95)]


def test_trainable_and_total_parameters_are_exact(planned: Planned) -> None:
    for row, answer in planned:
        assert answer["parameters"]["trainable"] == row["trainable_parameters"], row["id"]


def test_loaded_and_ready_are_within_one_percent(planned: Planned) -> None:
    # What is left is block rounding, which depends on the order in which a loader touches the weights.
    for name in ("loaded_bytes", "ready_bytes"):
        found = errors(planned, name, name)
        assert max(map(abs, found)) < 0.01, name
        assert median(map(abs, found)) < 1e-4, name


def test_peak_allocated(planned: Planned) -> None:
    found = errors(planned, "peak_allocated_bytes", "peak_allocated_bytes")
    assert len(found) == len(ROWS)
    assert median(map(abs, found)) < 0.003
    assert p95(found) < 0.015
    assert max(map(abs, found)) < 0.03


def test_peak_reserved(planned: Planned) -> None:
    found = errors(planned, "peak_reserved_bytes", "peak_reserved_bytes")
    assert median(map(abs, found)) < 0.015
    assert p95(found) < 0.05


def test_no_dangerous_underestimate(planned: Planned) -> None:
    assert min(errors(planned, "device_bytes", "device_used_bytes")) > -0.02


def test_rows_of_the_breakdown_sum_to_the_peak(planned: Planned) -> None:
    for row, answer in planned:
        memory = answer["memory"]
        assert sum(part["bytes"] for part in memory["components"]) == memory["peak_allocated_bytes"], row["id"]


def test_other_models_and_settings(others: Planned) -> None:
    for name in ("loaded_bytes", "ready_bytes"):
        assert max(map(abs, errors(others, name, name))) < 0.01, name
    allocated = errors(others, "peak_allocated_bytes", "peak_allocated_bytes")
    assert len(allocated) == len(OTHERS)
    assert median(map(abs, allocated)) < 0.001
    assert max(map(abs, allocated)) < 0.01
    reserved = errors(others, "peak_reserved_bytes", "peak_reserved_bytes")
    assert median(map(abs, reserved)) < 0.005
    assert p95(reserved) < 0.05
    # Adafactor's leftovers between steps, and trl's padded rows, whose scored positions differ from batch to batch
    assert len([error for error in reserved if error < -0.02]) <= 2
    assert min(reserved) > -0.10
