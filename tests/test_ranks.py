"""Runs on several GPUs, played by processes on the CPU that torchrun starts: how they end, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vramplan.probes import ranks

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found by Linux's /proc")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks run rank_jobs.py; their temporary folder is this test's."""
    monkeypatch.setattr(ranks, "_RANK", "rank_jobs")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(ranks.tempfile, "tempdir", str(tmp_path / "tmp"))


def launch(tmp_path: Path, *does: str, timeout_s: float = 60) -> tuple[Any, ...]:
    (tmp_path / "pids").mkdir()
    found = ranks.launch({"does": does, "pids": str(tmp_path / "pids")}, len(does), timeout_s)
    nothing_is_left(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())
    return found[:3]


def nothing_is_left(tmp_path: Path) -> None:
    pids = [int(each.name) for each in (tmp_path / "pids").iterdir()]
    assert pids
    until = time.monotonic() + 5
    while (running := [pid for pid in pids if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    assert not running


def runs(pid: int) -> bool:
    """Whether there is such a process that is more than an entry which its parent has not read yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_every_rank_answers(tmp_path: Path) -> None:
    outcome, answers, reason = launch(tmp_path, "answer", "answer")
    assert (outcome, reason) == ("ok", "")
    assert [each["peak_allocated_bytes"] for each in answers] == [5, 5]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    assert launch(tmp_path, "wait", "fail") == ("failed", None, "rank 1: ValueError: no such kernel")


def test_a_rank_that_crashes_is_named(tmp_path: Path) -> None:
    said = "rank 1 died of SIGSEGV; its last words: rank 1 begins"
    assert launch(tmp_path, "wait", "crash") == ("crashed", None, said)


def test_a_rank_that_runs_out_of_memory_is_the_run_s_end(tmp_path: Path) -> None:
    """Though the others, which wait for it, are ended and answer nothing."""
    outcome, answers, _ = launch(tmp_path, "wait", "run out")
    assert outcome == "ok"
    assert answers[0] == {}
    found = ranks.together(answers)
    assert (found["outcome"], found["reason"]) == ("out_of_memory", "rank 1: in step 1")
    assert [each["peak_allocated_bytes"] for each in found["ranks"]] == [None, 5]


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    """With what they started, though they ignore torchrun's signal."""
    assert launch(tmp_path, "hang", "hang", timeout_s=8) == ("timeout", None, "it was stopped after 8 s")


def test_ranks_do_not_outlive_torchrun(tmp_path: Path) -> None:
    outcome, _, reason = launch(tmp_path, "hang", "orphan")
    assert (outcome, reason.partition(":")[0]) == ("crashed", "torchrun was killed from outside")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_ranks_do_not_outlive_the_probe(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "pids").mkdir()
    case = {"does": ["wait", "wait"], "pids": str(tmp_path / "pids")}
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's & has it ignored
        f"from vramplan.probes import ranks; ranks._RANK = 'rank_jobs'; ranks.launch({case!r}, 2, 600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as probe:
        try:
            until = time.monotonic() + 60
            while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            probe.send_signal(ending)
            probe.wait(30)
        finally:
            probe.kill()
    nothing_is_left(tmp_path)


def test_a_process_that_is_not_ours_is_left_alone() -> None:
    own = dict(os.environ) | {"TMPDIR": "/tmp/vramplan-mine"}
    with subprocess.Popen(["sleep", "60"], env=own) as process, subprocess.Popen(["sleep", "60"]) as other:
        try:
            deadline = time.monotonic() + 5
            while not (found := ranks._marked(b"TMPDIR=/tmp/vramplan-mine")) and time.monotonic() < deadline:
                time.sleep(0.01)  # until the child runs sleep
            assert found == [process.pid]
            assert ranks._marked(b"TMPDIR=/tmp/vramplan") == []
        finally:
            process.kill()
            other.kill()


def test_torchrun_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    outcome, _, reason, _ = ranks.launch({}, 2, 60)
    assert (outcome, reason) == (
        "failed",
        "torchrun could not be started: [Errno 2] No such file or directory: '/no/such/python'",
    )
