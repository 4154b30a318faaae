"""The plan against fine-tuning runs measured on an H200 (tables/measured): every run, every figure it has.

The 84 of h200-single-gpu.jsonl were there while the ops were written; the 91 of h200-other-models.jsonl (other models,
mixtures of experts, trl, expandable segments) were measured when the ops stood, to see whether they hold elsewhere.
`vramplan probe` itself measured the 13 of h200-probe.jsonl (10 of them what it runs without a model) and the 42 of
h200-boundaries.jsonl: QLoRA at sizes on both sides of where memory runs out, PyTorch held to what a card of 8, 16, 24
or 80 GiB would leave it. h200-phases.jsonl is of loading, evaluation, saving, generation and merging, a row each, of 20
whole models and 20 of few layers.

The 19 of h200-two-gpus.jsonl are DDP and FSDP2 on two GPUs: 3 of them were there while that was written, 16 planned
before they were run, as the 5 of h200-four-gpus.jsonl were, and the 8 of h200-two-gpus-probe.jsonl, which the probe
itself measured, two of them under ZeRO. Such a run's figures are those of the rank that had most. In the 26 of
h200-alone.jsonl one GPU stood for 2, 4 or 8; they have no times.
"""

from __future__ import annotations

import json
from functools import cache
from statistics import median
from typing import TYPE_CHECKING

import pytest

from vramplan.planner import verify

if TYPE_CHECKING:
    from pathlib import Path

    from vramplan.planner.verify import Score, Spread

KNOWN, OTHERS = "h200-single-gpu.jsonl", "h200-other-models.jsonl"
PROBED, BOUNDARIES = "h200-probe.jsonl", "h200-boundaries.jsonl"
TWO, FOUR, TWO_PROBED = "h200-two-gpus.jsonl", "h200-four-gpus.jsonl", "h200-two-gpus-probe.jsonl"
ALONE = "h200-alone.jsonl"
PHASES = "h200-phases.jsonl"
# It survived, and is planned to run out.
MISSED = {"llama-3.2-1b-batch_size=3-seq_len=1024-room=7.24GiB"}


@cache
def scores(name: str) -> list[Score]:
    """Every run of a file beside its plan; planned once, for these tests and the README's."""
    return [verify.score(run) for run in verify.read([verify.MEASURED / name])]


def errors(name: str, figure: str) -> list[float]:
    return [each.errors[figure] for each in scores(name) if figure in each.errors]


def spread(name: str, figure: str) -> Spread:
    return verify.spread(errors(name, figure))


def test_these_are_the_files() -> None:
    names = {KNOWN, OTHERS, PROBED, BOUNDARIES, TWO, FOUR, TWO_PROBED, ALONE, PHASES}
    assert names == {file.name for file in verify.bundled()}


@pytest.mark.parametrize("name", [KNOWN, OTHERS, PROBED, TWO, FOUR, TWO_PROBED, ALONE])
def test_every_run_is_planned_and_fits_as_it_did(name: str) -> None:
    assert [each.failed for each in scores(name) if each.failed] == []
    assert [each.run.id for each in scores(name) if not each.fits_as_measured] == []
    assert len(errors(name, "allocated")) == len(scores(name))


@pytest.mark.parametrize("name", [KNOWN, PROBED, TWO, FOUR, TWO_PROBED])
def test_trainable_parameters_are_exact(name: str) -> None:
    assert [each.run.id for each in scores(name) if not each.trainable_exact] == []


@pytest.mark.parametrize("name", [KNOWN, OTHERS, PROBED, BOUNDARIES])
@pytest.mark.parametrize("figure", ["loaded", "ready"])
def test_loaded_and_ready(name: str, figure: str) -> None:
    # What is left is block rounding, which depends on the order in which a loader touches the weights.
    found = spread(name, figure)
    assert abs(found.worst) < 0.01
    assert found.median < 1e-4


def test_peak_allocated() -> None:
    found = spread(KNOWN, "allocated")
    assert found.median < 0.003
    assert found.p95 < 0.015
    assert abs(found.worst) < 0.03


def test_peak_reserved() -> None:
    found = spread(KNOWN, "reserved")
    assert found.median < 0.015
    assert found.p95 < 0.05


def test_no_dangerous_underestimate() -> None:
    assert [each.run.id for each in scores(KNOWN) if each.dangerous] == []


def test_other_models_and_settings() -> None:
    allocated, reserved = spread(OTHERS, "allocated"), spread(OTHERS, "reserved")
    assert allocated.median < 0.001
    assert abs(allocated.worst) < 0.01
    assert reserved.median < 0.005
    assert reserved.p95 < 0.05
    assert abs(reserved.worst) < 0.02


def test_what_a_probe_measures() -> None:
    for name in (PROBED, BOUNDARIES):
        assert abs(spread(name, "allocated").worst) < 0.001
        assert abs(spread(name, "reserved").worst) < 0.01  # with trl, padded: only positions with a label are scored
        assert abs(spread(name, "device").worst) < 0.01


def test_memory_runs_out_where_the_plan_says() -> None:
    found = scores(BOUNDARIES)
    assert [each.failed for each in found if each.failed] == []
    assert {each.run.id for each in found if not each.fits_as_measured} == MISSED
    # neither answer alone is right: half of them survived
    assert sum(each.run.outcome == "ok" for each in found) == 20
    assert len(found) == 42


def test_the_time_of_a_step() -> None:
    """Steps from the second on. Most of these runs wait for the host, whose speed differs by a third between days."""
    found = [abs(error) for name in (KNOWN, OTHERS, PROBED, BOUNDARIES) for error in errors(name, "step")]
    assert len(found) > 200
    assert median(found) < 0.15
    assert sum(error < 0.35 for error in found) > 0.9 * len(found)


@pytest.mark.parametrize(("name", "runs"), [(TWO, 19), (FOUR, 5), (TWO_PROBED, 8)])
def test_several_gpus(name: str, runs: int) -> None:
    allocated, reserved, device = (spread(name, figure) for figure in ("allocated", "reserved", "device"))
    assert len(errors(name, "allocated")) == runs
    assert allocated.median < 1e-5
    assert abs(allocated.worst) < 0.0013
    assert abs(reserved.worst) < 0.001
    assert abs(device.worst) < 0.001


def test_one_gpu_for_several() -> None:
    """Under ZeRO 3 DeepSpeed frees what another stream has read when that is done, which no plan can foresee."""
    under_zero3 = [s for s in scores(ALONE) if s.run.options["parallel"] == "zero3"]
    others = [s for s in scores(ALONE) if s.run.options["parallel"] != "zero3"]
    assert {n for s in scores(ALONE) if (n := s.run.options["num_gpus"])} == {2, 4, 8}
    assert (len(others), len(under_zero3)) == (23, 3)
    for name, most, most_under_zero3 in (("allocated", 0.0006, 0.0025), ("reserved", 0.002, 0.1)):
        assert max(abs(s.errors[name]) for s in others) < most
        assert max(abs(s.errors[name]) for s in under_zero3) < most_under_zero3
    assert median(abs(s.errors["allocated"]) for s in others) < 1e-5


def test_the_time_of_a_step_on_several_gpus() -> None:
    """No figure of it was chosen by these runs. Of three beyond a quarter two had a faster host than the table's."""
    found = [abs(error) for name in (TWO, FOUR, TWO_PROBED) for error in errors(name, "step")]
    assert len(found) == 32
    assert median(found) < 0.1
    assert sum(error < 0.25 for error in found) == 29
    assert max(found) < 0.45


@pytest.mark.parametrize("phase", ["loading", "evaluation", "saving", "generation", "merging"])
def test_the_other_phases(phase: str) -> None:
    found = [each for each in scores(PHASES) if each.run.options["phases"] == [phase]]
    assert [each.failed for each in found if each.failed] == []
    allocated = verify.spread([each.errors["allocated"] for each in found])
    assert allocated.n >= 3
    assert allocated.median < 1e-5
    assert abs(allocated.worst) < 0.01
    reserved = [each.errors["reserved"] for each in found if "reserved" in each.errors]
    if phase == "saving":  # an evaluation ran before it there
        assert reserved == []
    else:
        assert verify.spread(reserved).median < 1e-5
        assert verify.spread(reserved).p95 < 0.05


@pytest.mark.parametrize(
    ("page", "name"),
    [
        *(("accuracy.md", name) for name in ("errors", "methods", "edge", "phases", "time", "covered")),
        *(("several-gpus.md", name) for name in ("gpus", "scaling", "hosts", "pairs", "predicted")),
    ],
)
def test_the_pages_of_what_was_measured(page: str, name: str) -> None:
    """Here and not in test_docs.py, because the runs are planned here."""
    import test_docs

    assert test_docs.shown(page, name) == test_docs.BLOCKS[page][name](), "python tests/test_docs.py writes it anew"


def test_what_is_predicted_of_four_and_eight_gpus() -> None:
    """What was written down before anything was run; a plan that says otherwise today has to say why, and be dated."""
    from test_docs import PREDICTED, predicted_rows

    written = [json.loads(line) for line in PREDICTED.read_text("utf-8").splitlines()]
    assert {row["predicted"] for row in written} == {"2026-11-29"}
    for row, today in zip(written, predicted_rows(), strict=True):
        assert row["step_s"] == pytest.approx(today.pop("step_s"), rel=0.02)
        assert {name: row[name] for name in today} == today, "python tests/test_docs.py --predict writes it anew"


def test_one_gpu_for_all_and_all_of_them() -> None:
    """docs/accuracy.md and docs/several-gpus.md say so in words."""
    from test_docs import pairs

    assert len(pairs()) == 10
    assert sum(not any(map(pair.differs, ("allocated", "reserved"))) for pair in pairs()) == 8
    assert max(abs(pair.differs(figure)) for pair in pairs() for figure in ("allocated", "reserved")) < 0.0011


@pytest.mark.parametrize(
    ("picture", "drawn_by"), [("PICTURE", "draw"), ("GPUS_PICTURE", "draw_gpus"), ("SCALING_PICTURE", "draw_scaling")]
)
def test_the_pictures_of_what_was_measured(picture: str, drawn_by: str, tmp_path: Path) -> None:
    import test_docs
    from test_pictures import words

    getattr(test_docs, drawn_by)(tmp_path / "drawn.svg")
    there = getattr(test_docs, picture)
    assert words(there) == words(tmp_path / "drawn.svg"), "python tests/test_docs.py draws it anew"


def test_what_the_readme_says_of_accuracy() -> None:
    from test_readme import accuracy, block  # which takes its scores from here

    assert block("accuracy") == accuracy(), "python tests/test_readme.py writes it anew"
