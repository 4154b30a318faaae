"""Plans against measured runs: what is read, how it is scored, what is said, and when the exit code is 1."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from test_plan import TINY

from vramplan import plan
from vramplan.planner import calibration, cli, report, verify
from vramplan.planner.errors import UsageError
from vramplan.planner.report import Block, plain
from vramplan.planner.verify import Run, Score, parse_tolerance, read, score, spread, spreads, to_dict

if TYPE_CHECKING:
    from pathlib import Path

STACK = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "peft": "0.21.0"}
OPTIONS = {"method": "lora", "seq_len": 64, "optimizer": "adamw_torch"}
MADE = plan(TINY, gpu="h200", stack=STACK, **OPTIONS)


def row(**changes: Any) -> dict[str, Any]:
    """A run that went as its plan says, with changes; None leaves a field out."""
    memory = MADE.memory
    made = {
        "id": "tiny-lora",
        "config": TINY,
        "options": OPTIONS,
        "gpu": "h200",
        "stack": STACK,
        "outcome": "ok",
        "trainable_parameters": MADE.counts.trainable,
        "loaded_bytes": memory.loaded_bytes,
        "ready_bytes": memory.ready_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_bytes,
        "later_field": [1],
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def written(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows) + "\n")
    return file


def scored(tmp_path: Path, **changes: Any) -> Score:
    (run,) = read([written(tmp_path, row(**changes))])
    return score(run)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, "", row(stack={**STACK, "python": "3.12", "driver": "580"}), "  ", row(id="other"))
    first, second = read([file])
    assert (first.id, first.file, first.line, first.outcome) == ("tiny-lora", "runs.jsonl", 2, "ok")
    assert (second.id, second.line) == ("other", 4)
    assert first.stack == STACK
    assert first.figures["reserved"] == MADE.memory.peak_reserved_bytes
    assert [run.id for run in read([file, file])] == ["tiny-lora", "other"] * 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ('"text"', "it is no JSON object"),
        (row(id=None), "it has no id"),
        (row(id=""), "id is '', not a text of at most 200 characters"),
        (row(id="a\nb"), r"id is 'a\nb', not a text of at most 200 characters"),
        (row(config=None), "it has no config"),
        (row(config=[1]), "config is [1], not an object"),
        (row(options="x"), "options is 'x', not an object"),
        (row(options={"gpu": "h200"}), "'gpu' is no option of a plan"),
        (row(gpu=7), "gpu is 7, not a text of at most 200 characters"),
        (row(stack=["torch"]), "stack is ['torch'], not an object"),
        (row(outcome="fine"), "outcome is 'fine', not ok or out_of_memory"),
        (row(peak_allocated_bytes=None), "it has no peak_allocated_bytes"),
        (row(peak_allocated_bytes=0), "peak_allocated_bytes is 0, not a whole number above 0"),
        (row(peak_reserved_bytes=1.5), "peak_reserved_bytes is 1.5, not a whole number above 0"),
        (row(trainable_parameters=True), "trainable_parameters is True, not a whole number above 0"),
        (row(limit_bytes=-1), "limit_bytes is -1, not a whole number above 0"),
        (row(compute_capability="new"), "compute_capability is 'new', not a text such as 8.6"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, why: str) -> None:
    with pytest.raises(UsageError) as error:
        read([written(tmp_path, row(), line)])
    assert str(error.value).startswith("line 2 of '")
    assert str(error.value).endswith(f" is no measured run: {why} (FILE)")


def test_what_is_no_file_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, why in (
        (tmp_path, "is no file"),
        (tmp_path / "missing.jsonl", "is no file"),
        (tmp_path / "nul\0", "is no file"),
        (written(tmp_path), "holds no measured run"),
    ):
        with pytest.raises(UsageError, match=why):
            read([file])
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(UsageError, match=r"line 1 of .* it is not JSON"):
        read([tmp_path / "latin.jsonl"])
    monkeypatch.setattr(verify, "_LARGEST", 100)
    with pytest.raises(UsageError, match="larger than"):
        read([written(tmp_path, row())])


def test_the_runs_that_come_with_it() -> None:
    assert {"h200-single-gpu.jsonl", "h200-two-gpus.jsonl"} <= {file.name for file in verify.bundled()}
    assert len(read(verify.bundled())) >= 230


# ------------------------------------------------------------------------------------------------------------- scoring


def test_a_run_as_planned(tmp_path: Path) -> None:
    found = scored(tmp_path)
    assert found.errors == dict.fromkeys(verify.FIGURES, 0.0)
    assert (found.trainable_exact, found.fits_as_measured, found.failed, found.method) == (True, True, "", "lora")
    assert found.beyond({"allocated": 0.0}) == []


def test_errors_are_planned_over_measured(tmp_path: Path) -> None:
    memory = MADE.memory
    found = scored(
        tmp_path,
        peak_allocated_bytes=2 * memory.peak_allocated_bytes,
        peak_reserved_bytes=None,
        device_used_bytes=memory.device_bytes * 4 // 3,
        trainable_parameters=1,
    )
    assert found.errors["allocated"] == -0.5
    assert "reserved" not in found.errors
    assert found.dangerous
    assert found.beyond({"allocated": 0.6, "reserved": 0.0}) == ["trainable parameters differ"]
    assert found.beyond({"allocated": 0.4, "device": 0.2}) == [
        "trainable parameters differ", "allocated -50.00%", "device -25.00%",
    ]  # fmt: skip
    assert not scored(tmp_path, device_used_bytes=memory.device_bytes * 101 // 100).dangerous


def test_a_paged_optimizer_is_not_judged_on_the_device(tmp_path: Path) -> None:
    found = scored(tmp_path, options={**OPTIONS, "optimizer": "paged_adamw_8bit"})
    assert "allocated" in found.errors
    assert "device" not in found.errors


def test_what_cannot_be_planned_is_a_score(tmp_path: Path) -> None:
    for changes, why in (
        ({"config": {"model_type": "unheard"}}, "unheard"),
        ({"gpu": "abacus"}, "unknown GPU 'abacus'"),
        ({"options": {**OPTIONS, "seq_len": "x"}}, "--seq-len"),
        ({"stack": {"torch": []}}, "no version of torch"),
    ):
        found = scored(tmp_path, **changes)
        assert why in found.failed
        assert found.beyond({}) == [f"not planned: {found.failed}"]
        assert found.errors == {}


def test_out_of_memory_is_foreseen_under_the_limit(tmp_path: Path) -> None:
    peak = MADE.memory.peak_reserved_bytes
    nothing = {name: None for _, name in verify.FIGURES.values()}
    tight = scored(tmp_path, outcome="out_of_memory", limit_bytes=peak // 2, **nothing)
    assert (tight.fits_as_measured, tight.errors, tight.beyond({})) == (True, {}, [])
    wide = scored(tmp_path, outcome="out_of_memory", limit_bytes=2 * peak, **nothing)
    assert wide.beyond({}) == ["planned to fit, and ran out of memory"]
    survived = scored(tmp_path, limit_bytes=peak // 2)
    assert survived.beyond({}) == ["planned not to fit, and ran"]
    assert survived.errors == {}  # the plan ends where it runs out
    assert scored(tmp_path, limit_bytes=2 * peak).beyond({"allocated": 0, "reserved": 0}) == []


def test_out_of_memory_without_a_limit_is_the_gpus(tmp_path: Path) -> None:
    assert scored(tmp_path, outcome="out_of_memory").fits_as_measured is False
    large = {**OPTIONS, "batch_size": 4096, "seq_len": 4096, "gradient_checkpointing": False}
    assert scored(tmp_path, outcome="out_of_memory", options=large).fits_as_measured is True


def test_what_ships_is_judged_not_what_a_probe_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path))
    calibration.save(calibration.Calibration("h200", "1", STACK, "2026-11-20", process_bytes=2**33))
    assert plan(TINY, gpu="h200", stack=STACK, **OPTIONS).memory.context_bytes > 2**33
    assert scored(tmp_path).errors["device"] == 0.0


def test_a_spread_by_hand() -> None:
    errors = [0.01 * n for n in range(1, 20)] + [-0.5]
    found = spread(errors)
    assert found.n == 20
    assert found.median == pytest.approx(0.105)  # of 0.01 ... 0.19 and 0.5
    assert found.p95 == 0.5  # score.py's: the entry at 95 % of 20, from 0
    assert found.worst == -0.5
    assert found.bias == pytest.approx(0.095)
    assert spread([-0.25]) == (1, 0.25, 0.25, -0.25, -0.25)


def named(name: str, method: str, outcome: str = "ok", **errors: float) -> Score:
    run = Run(name, "a.jsonl", 3, {}, {"method": method}, "h200", None, {}, outcome, None, None, {})
    return Score(run, errors, fits_as_measured=True)


SCORES = [
    named("one", "full", allocated=0.01, reserved=-0.08, device=-0.03),
    named("two", "lora", allocated=-0.002, reserved=0.0),
    named("three", "lora", allocated=0.00001, reserved=0.01, device=0.0),
    named("four", "qlora", outcome="out_of_memory"),
    Score(Run("five", "a.jsonl", 9, {}, {}, "h200", None, {}, "ok", None, 7, {}), {}, False, False),
]


def test_spreads_by_method() -> None:
    found = spreads(SCORES)
    assert {group: each.n for group, each in found["allocated"].items()} == {"all": 3, "full": 1, "lora": 2}
    assert found["reserved"]["all"].worst == -0.08
    assert found["loaded"] == {}


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("2", {"allocated": 0.02}),
        ("0", {"allocated": 0.0}),
        (" 1.5 ", {"allocated": 0.015}),
        ("allocated=1.5,reserved=5", {"allocated": 0.015, "reserved": 0.05}),
        ("3, device = 4", {"allocated": 0.03, "device": 0.04}),
    ],
)
def test_tolerances(text: str, shares: dict[str, float]) -> None:
    assert parse_tolerance(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1,2", "reserved=", "=2", "speed=1", "2%"])
def test_what_is_no_tolerance(text: str) -> None:
    with pytest.raises(UsageError, match=r"\(--tolerance\)$"):
        parse_tolerance(text)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", *map(str, words)])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return command


def test_the_exit_code(run: Any, tmp_path: Path) -> None:
    off = row(id="off", peak_allocated_bytes=MADE.memory.peak_allocated_bytes * 100 // 103)
    file = written(tmp_path, row(), off)
    assert run(file)[0] == 0
    code, out, err = run(file, "--tolerance", "2")
    assert (code, err) == (1, "")
    assert "1 of 2 beyond the tolerance (allocated 2 %)" in out
    assert "-  off (runs.jsonl, line 2): allocated +3.00%" in out
    code, out, _ = run(file, "--tolerance", "allocated=3.5,reserved=1")
    assert code == 0
    assert "all within the tolerance (allocated 3.5 %, reserved 1 %)" in out
    assert run(written(tmp_path, row(gpu="abacus")), "--tolerance", "99")[0] == 1
    assert run(written(tmp_path, row(gpu="abacus")))[0] == 0


def test_errors_are_one_sentence(run: Any, tmp_path: Path) -> None:
    for words in ([tmp_path / "no.jsonl"], [written(tmp_path, "{")], ["--tolerance", "much"]):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_json(run: Any, tmp_path: Path) -> None:
    file = written(tmp_path, row(), row(id="off", peak_allocated_bytes=2**20))
    code, out, _ = run(file, "--json", "--tolerance", "1")
    answer = json.loads(out)
    assert code == 1
    assert (answer["runs"], answer["planned"], answer["trainable_exact"], answer["beyond"]) == (2, 2, 2, 1)
    assert answer["errors"]["allocated"]["lora"]["n"] == 2
    first, second = answer["scores"]
    assert (first["id"], first["file"], first["line"], first["beyond"]) == ("tiny-lora", "runs.jsonl", 1, [])
    assert first["errors"] == dict.fromkeys(verify.FIGURES, 0.0)
    assert len(second["beyond"]) == 1
    assert json.loads(run(file, "--json")[1])["beyond"] is None
    assert to_dict(SCORES, None)["dangerous"] == 1


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_scores(SCORES, None)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "5 of 5 measured runs planned",
        "trainable parameters exact in 0 of 1",
        "ended as planned: 4 of 5, of which 1 ran out of memory",
        "dangerous, the device planned more than 2 % too small: 1",
        "allocated all 3 0.20 1.00 1.00 <0.01",
        "full 1 1.00 1.00 1.00 1.00",
        "reserved all 3 1.00 8.00 -8.00 0.00",
        "1.00 -8.00 -3.00 one",
        "-0.20 0.00 two",
        "- five (a.jsonl, line 9): trainable parameters differ; planned not to fit, and",
    ):
        assert line in lines
    allocated, reserved = (lines.index(f"Furthest off in {name} memory") for name in ("allocated", "reserved"))
    assert [line.split()[-1] for line in lines[allocated + 2 : allocated + 5]] == ["one", "two", "three"]
    assert [line.split()[-1] for line in lines[reserved + 2 : reserved + 5]] == ["one", "three", "two"]


def test_long_names_are_wrapped() -> None:
    block = Block("", "<<", [report.Row(("-", "a long name of a run " * 10))])
    assert max(map(len, plain([block]))) <= 80


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report.tracked(iter("ab"), 2, "planning")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(report.tracked(iter("ab"), 2, "planning")) == ["a", "b"]
    assert "planning" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert capsys.readouterr().out == ""
