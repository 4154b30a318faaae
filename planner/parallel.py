"""Tasks on all cores of this machine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

_FEW = 4  # tasks that are done sooner than other processes are started


def completed(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """The answers of `tasks` as they come, in any order; where tasks are few, one after another and here.

    Tasks and answers must pickle. Whatever ends it early ends those processes. Raises Failure where the system ends
    a process.
    """
    workers = min(_cores(), len(tasks))
    if len(tasks) < _FEW or workers < 2:
        yield from (task() for task in tasks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    futures: list[Future[Any]] = []
    others = set(multiprocessing.active_children())
    # spawned, not forked: a progress bar has a thread
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        with _deaf():
            futures = [pool.submit(task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise Failure("the system ended a process that planned, for want of memory perhaps; plan fewer cells") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not all(future.done() and not future.cancelled() for future in futures):
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # what it is at, nobody waits for any more


def in_order(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """The same in the tasks' own order, each as soon as those before it have come."""
    found: dict[int, Any] = {}
    wanted = 0
    for i, answer in completed([partial(_numbered, i, task) for i, task in enumerate(tasks)]):
        found[i] = answer
        while wanted in found:
            yield found.pop(wanted)
            wanted += 1


def _numbered(i: int, task: Callable[[], Any]) -> tuple[int, Any]:
    return i, task()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """What a new process does first."""
    import gc
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    gc.set_threshold(100_000)  # as in cli.main


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started here never hear Ctrl-C, not even before they have begun."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
