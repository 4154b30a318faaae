"""What tests of the probe's runner run in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from vramplan.planner.errors import UsageError


def echo(argument: Any) -> Any:
    print("this is for nobody")
    return argument


def fail(argument: str) -> None:
    raise ValueError(f"{argument}\nand more")


def refuse(argument: str) -> None:
    raise UsageError(argument)


def crash(argument: str) -> None:
    print(argument, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def killed(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int) -> None:
    os._exit(code)


def sleep(seconds: float) -> None:
    time.sleep(seconds)
