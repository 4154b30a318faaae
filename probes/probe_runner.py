"""Runs each job in a process of its own with a time limit, so that what goes wrong there costs that job alone.

The processes are forked from a server that has imported torch and transformers once (preload.py) and never touched
CUDA; this process imports neither. A job is a function named by a string, its argument and its answer plain data, as
JSON has it. What it prints goes to a file, of which a crash shows the last line.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner.errors import Failure, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.context import ForkServerProcess

PRELOAD = ("vramplan.probes.preload",)
ENVIRONMENT = {  # of every process that trains, set before it imports torch
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a GPU leaves CUDA alone
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_SYMBOLIZE_MODE": "dladdr",  # names in a memory history: addr2line takes minutes
}
_ENDS_S = 10.0  # a process that has given its answer gets this long to end by itself


class Outcome(NamedTuple):
    """How a job ended: "ok" with its `answer`, or "failed", "crashed" or "timeout" with the `reason`, a sentence."""

    outcome: str
    answer: Any
    reason: str
    seconds: float


class Runner:
    """Runs jobs one after another; `close` or the end of a `with` block removes what they printed."""

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="vramplan-")
        except OSError as error:
            raise Failure(f"no temporary folder can be made ({first_line(error)}); set TMPDIR to another") from None
        with _output_to(self._log), contextlib.suppress(OSError):
            forkserver.ensure_running()  # its imports begin at once, and what they print is not the answer

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "output.txt"

    def close(self) -> None:
        """Removes the file of what was printed."""
        self._folder.cleanup()

    def run(self, job: str, argument: Any, timeout_s: float) -> Outcome:
        """The outcome of `job`, "module:function", called with `argument`; its process is killed after `timeout_s`."""
        answered = False
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(theirs, job, argument, str(self._log)), daemon=True)
        try:
            try:
                process.start()
            except (OSError, EOFError) as error:
                return Outcome("failed", None, f"no process could be started: {first_line(error)}", 0.0)
            started = time.monotonic()  # the first start waits for the server's imports
            theirs.close()
            outcome, answer, reason = self._await(ours, process, timeout_s)
            answered = outcome in ("ok", "failed")
            return Outcome(outcome, answer, reason, time.monotonic() - started)
        finally:  # on KeyboardInterrupt too: nothing of ours stays behind on the GPU
            ours.close()
            if process.pid is not None:
                process.join(_ENDS_S if answered else 0)
                process.kill()
                process.join()

    def _await(self, ours: connection.Connection, process: ForkServerProcess, timeout_s: float) -> tuple[str, Any, str]:
        if not connection.wait([ours, process.sentinel], timeout_s):
            return "timeout", None, f"it was stopped after {timeout_s:.0f} s"
        try:
            if ours.poll():
                outcome, answer, reason = json.loads(ours.recv_bytes())
                return outcome, answer, reason
        except (EOFError, OSError):
            pass
        process.join(_ENDS_S)
        return "crashed", None, crash("the process", process.exitcode, self._log)


def _child(theirs: connection.Connection, job: str, argument: Any, log: str) -> None:
    """In the job's process: calls it, and sends (outcome, answer, reason)."""
    print_to(log)
    module, _, name = job.partition(":")
    try:
        answer = ["ok", getattr(import_module(module), name)(argument), ""]
    except KeyboardInterrupt:
        os._exit(130)  # the terminal's Ctrl-C reaches this process too; the parent tells
    except Exception as error:
        answer = ["failed", None, failure(error)]
    theirs.send_bytes(json.dumps(answer).encode())  # not pickled: a type of torch's would import torch over there


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What this process and those it starts print goes to a file meanwhile."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for stream in (1, 2):
            os.dup2(file, stream)
        yield
    finally:
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(file)


def print_to(file: str | Path) -> None:
    """From now on, what this process prints goes to a file."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(opened, stream)


def failure(error: Exception) -> str:
    """What a job that raised an error ends with; the traceback is printed."""
    import traceback

    traceback.print_exc()
    said, kind = first_line(error), type(error).__name__
    return said if isinstance(error, UsageError) or said == kind else f"{kind}: {said}"


def crash(who: str, exitcode: int | None, log: Path) -> str:
    """How a process ended that gave no answer, and the last line of what it printed to a file."""
    if exitcode == -signal.SIGKILL:
        return f"{who} was killed from outside: most often by the system, for want of host memory"
    how = f"exited with {exitcode}"
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            how = f"died of {signal.Signals(-exitcode).name}"
    last = _last_line(log)
    return f"{who} {how}" + (f"; its last words: {last}" if last else "")


def _last_line(file: Path) -> str:
    try:
        lines = file.read_bytes()[-4000:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    return _printable(next((line for line in reversed(lines) if line.strip()), ""))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return _printable(str(error).strip().split("\n")[0]) or type(error).__name__


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()[:200]
