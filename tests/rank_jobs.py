"""A rank that needs no GPU: it does what its case says, in the place of a measured run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vramplan.probes import ranks

OK = {"outcome": "ok", "reason": "", "peak_allocated_bytes": 5}


def act(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Leaves its id in the folder `pids`, and does the rank's part of `does`."""
    (Path(case["pids"]) / str(os.getpid())).touch()
    print(f"rank {rank} begins", flush=True)
    does = case["does"][rank]
    if does == "fail":
        raise ValueError("no such kernel\nand more")
    if does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "run out":
        return OK | {"outcome": "out_of_memory", "reason": "in step 1"}
    if does == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
    if does in ("hang", "orphan"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        own = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (Path(case["pids"]) / str(own.pid)).touch()
        time.sleep(600)
    if does == "wait":
        time.sleep(600)
    return OK


if __name__ == "__main__":
    ranks._measure = act
    sys.exit(ranks.main(sys.argv[1]))
