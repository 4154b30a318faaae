"""One training run on several GPUs: torchrun starts a process for each, and each is measured as a run on one GPU is.

`launch` runs where the probe runs, and imports no torch. A rank writes its answer to a file of its own; where one
fails, torchrun ends the others, and its error is what the case ends with.

`alone` is rank 0 of any number of GPUs on one of them, with torch's fake process group: collectives fill what they give
from what this rank has, and nothing else is missing. So the memory is that of rank 0, but for NCCL's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.files import write_text
from vramplan.probes import probe_gpu
from vramplan.probes.probe_runner import ENVIRONMENT, Outcome, crash, failure, first_line, print_to

if TYPE_CHECKING:
    from collections.abc import Sequence

_RANK = "vramplan.probes.ranks"  # the module that a rank runs
_ENDS_S = 10.0  # the system gets this long to end processes that were killed


def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
    """The outcome of `measure` of `case` on every GPU; its answer is a list, by rank.

    "ok" where every rank gave an answer, or one ran out of memory; else "failed", "crashed" or "timeout" with the
    reason of the first that did not. Nothing that was started is left behind.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vramplan-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"),
            *("-m", _RANK, folder),
        ]
        try:
            write_text(place / "case.json", json.dumps(case))
            with (place / "output.txt").open("wb") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                    env={**os.environ, **ENVIRONMENT, "TMPDIR": folder},
                )  # fmt: skip
        except OSError as error:
            return Outcome("failed", None, f"torchrun could not be started: {first_line(error)}", 0.0)
        in_time = True
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:  # on KeyboardInterrupt too
            _end(process, folder)
        outcome, answers, reason = _answers(place, num_gpus)
        if outcome == "crashed":
            outcome, reason = "timeout", f"it was stopped after {timeout_s:.0f} s"
            if in_time:
                outcome, reason = "crashed", _crash(place, process.returncode)
        return Outcome(outcome, answers, reason, time.monotonic() - started)


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """Kills torchrun and everything that it has started, each rank of which has a session of its own.

    They are known by their TMPDIR, which is nobody else's, so that no process is killed that has got an old one's id.
    """
    mark, until = f"TMPDIR={folder}".encode(), time.monotonic() + _ENDS_S
    process.kill()
    while (left := _marked(mark)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDS_S)


def _marked(mark: bytes) -> list[int]:
    """The processes that have this in their environment; where there is no /proc, none is found."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _answers(place: Path, num_gpus: int) -> tuple[str, list[dict[str, Any]] | None, str]:
    """What the ranks wrote: all answers, or the first error in time.

    The first that runs out of memory is told as well, and of those that ended because of it nothing is known: {}.
    """
    written: list[dict[str, Any]] = []
    for rank in range(num_gpus):
        try:
            written.append(json.loads((place / f"rank{rank}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            written.append({})
    answers = [each.get("answer", {}) for each in written]
    wrong = [(each["at"], i) for i, each in enumerate(written) if each and answers[i].get("outcome") != "ok"]
    if not wrong:
        return ("ok", answers, "") if all(written) else ("crashed", None, "")
    _, first = min(wrong)
    if error := written[first].get("error"):
        return "failed", None, f"rank {first}: {error}"
    return "ok", answers, ""


def _crash(place: Path, exitcode: int) -> str:
    """How the first rank ended that gave no answer, as torchrun tells it; else how torchrun itself did."""
    output = place / "output.txt"
    cause = r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)"
    if found := re.search(cause, output.read_text(encoding="utf-8", errors="replace"), re.DOTALL):
        return crash(f"rank {found[1]}", int(found[2]), place / f"rank{found[1]}.txt")
    return crash("torchrun", exitcode, output)


def together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: rank 0's, with the highest peak of all ranks, and each rank's own under "ranks".

    Where a rank ran out of memory, so did the run, and its figures are that rank's.
    """
    ran_out = [rank for rank, each in enumerate(answers) if each.get("outcome") == "out_of_memory"]
    first = dict(answers[ran_out[0] if ran_out else 0])
    if ran_out:
        first["reason"] = f"rank {ran_out[0]}: {first['reason']}"
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "step_s")
    for name in ("loaded_bytes", "ready_bytes"):  # a model for fsdp is loaded in host memory
        first[name] = first.get(name) or None
    first["ranks"] = [{name: each.get(name) for name in names} for each in answers]
    for name in names:
        known = [each[name] for each in first["ranks"] if each[name] is not None]
        if len(known) == len(answers):
            first[name] = max(known)
    return first


def main(folder: str) -> int:
    """In a rank: measures the case in `folder` on the GPU of this rank."""
    threading.Thread(target=_end_with_probe, daemon=True).start()
    rank = int(os.environ["RANK"])
    place = Path(folder)
    print_to(place / f"rank{rank}.txt")
    ended: dict[str, Any]
    try:
        ended = {"answer": _measure(json.loads((place / "case.json").read_text(encoding="utf-8")), rank)}
    except Exception as error:
        ended = {"error": failure(error)}
    write_text(place / f"rank{rank}.json", json.dumps(ended | {"at": time.time()}))
    sys.stdout.flush()
    # a rank that failed or ran out of memory leaves the others waiting: torchrun ends them
    os._exit(0 if ended.get("answer", {}).get("outcome") == "ok" else 1)


def _end_with_probe() -> None:
    """Ends this process with the one that `launch` runs in, however that ends: it alone can write to this pipe."""
    os.read(0, 1)
    os._exit(1)


def alone(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures `case` on this GPU as rank 0 of all; the answer is that rank's. Its times are nobody's, and left out."""
    from vramplan.probes import measure

    pretend(case["options"]["num_gpus"])
    found = measure.measure(case)
    for step in found["steps"]:
        step["step_s"] = None
    return [found | {"step_s": None, "device_used_bytes": None}]


def pretend(num_gpus: int) -> None:
    """From now on this process is rank 0 of `num_gpus`, as far as torch, accelerate and DeepSpeed can tell."""
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    torch.cuda.set_device(0)
    distributed.init_process_group("fake", rank=0, world_size=num_gpus, store=FakeStore())
    ddp = torch.nn.parallel.DistributedDataParallel
    wrap = ddp.__init__

    def done(_, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotation but its own
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **kwargs)
        # the group's own answer has no value, and DDP waits for one (c10d/comm.cpp, parseCppCommHookResult)
        self.register_comm_hook(None, done)

    ddp.__init__ = wrapped


def _measure(case: dict[str, Any], rank: int) -> dict[str, Any]:
    import torch

    from vramplan.probes import measure

    device = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.get_device_properties(device)
    uuid = str(gpu.uuid)
    others = probe_gpu.others_bytes(uuid, gpu.total_memory)  # before this process holds anything of its GPU
    torch.cuda.set_device(device)
    record = case["record"] and rank == 0  # the rank that is played
    return measure.measure({**case, "uuid": uuid, "others_bytes": others, "record": record})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
