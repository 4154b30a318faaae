"""Jobs in processes of their own: what each way of ending looks like, and that it costs that job alone."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from vramplan.planner.errors import Failure
from vramplan.probes import probe_runner
from vramplan.probes.probe_runner import Runner

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner(preload=()) as made:
        yield made


def test_an_answer_comes_back_and_what_was_printed_does_not(runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = runner.run("probe_jobs:echo", {"steps": [1, 2]}, 30)
    assert outcome[:3] == ("ok", {"steps": [1, 2]}, "")
    assert capfd.readouterr() == ("", "")


def test_an_error_is_a_sentence(runner: Runner) -> None:
    assert runner.run("probe_jobs:fail", "no such kernel", 30)[:3] == ("failed", None, "ValueError: no such kernel")
    assert runner.run("probe_jobs:refuse", "nope is no model", 30)[:3] == ("failed", None, "nope is no model")


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(probe_runner.tempfile, "TemporaryDirectory", full)
    with pytest.raises(Failure, match=r"^no temporary folder can be made \(No usable .*\); set TMPDIR to another$"):
        Runner(preload=())


def test_a_job_that_is_not_there_fails(runner: Runner) -> None:
    assert runner.run("no_such_module:job", None, 30).outcome == "failed"


@pytest.mark.parametrize(
    ("job", "argument", "reason"),
    [
        ("crash", "a kernel went wrong", "the process died of SIGSEGV; its last words: a kernel went wrong"),
        ("leave", 3, "the process exited with 3"),
        ("killed", None, "the process was killed from outside: most often by the system, for want of host memory"),
    ],
)
def test_a_crash_costs_one_job(runner: Runner, job: str, argument: object, reason: str) -> None:
    assert runner.run(f"probe_jobs:{job}", argument, 30)[:3] == ("crashed", None, reason)
    assert runner.run("probe_jobs:echo", 1, 30).answer == 1


def test_a_job_that_takes_too_long_is_stopped(runner: Runner) -> None:
    started = time.monotonic()
    assert runner.run("probe_jobs:sleep", 60, 0.5)[:3] == ("timeout", None, "it was stopped after 0 s")
    assert time.monotonic() - started < 20
    assert runner.run("probe_jobs:echo", 1, 30).answer == 1


def test_an_interrupt_ends_the_job(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_runner.connection, "wait", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run("probe_jobs:sleep", 60, 60)
    assert time.monotonic() - started < 20


def test_what_is_imported_before_the_fork_leaves_cuda_alone() -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys, vramplan.probes.preload, torch, os\n"
        "assert 'transformers.modeling_utils' in sys.modules\n"
        "assert 'bitsandbytes' not in sys.modules, 'it asks CUDA for the capability'\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '3'\n"
    )
    import os

    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "3,1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
