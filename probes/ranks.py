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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vramplan.planner.errors import UsageError
from vramplan.probes.probe_runner import Outcome, first_line, last_line

_ENDS_S = 10.0  # torchrun gets this long to end its ranks
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
    """The outcome of `measure` of `case` on every GPU; its answer is a list, by rank.

    "ok" where every rank gave an answer; else "failed", "crashed" or "timeout" with the reason of the first that did
    not. Nothing that was started is left behind.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vramplan-") as folder:
        place = Path(folder)
        (place / "case.json").write_text(json.dumps(case), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"),
            *("-m", "vramplan.probes.ranks", folder),
        ]
        with (place / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                reason = f"it was stopped after {timeout_s:.0f} s"
                return Outcome("timeout", None, reason, time.monotonic() - started)
            finally:  # on KeyboardInterrupt too
                _end(process)
        outcome, answers, reason = _answers(place, num_gpus)
        if outcome == "crashed":
            reason = f"{reason}: torchrun exited with {process.returncode}"
            words = last_line(place / "output.txt")
            reason += f"; its last words: {words}" if words else ""
        return Outcome(outcome, answers, reason, time.monotonic() - started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends torchrun and its ranks, all of them in a session of their own."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_S)


def _answers(place: Path, num_gpus: int) -> tuple[str, list[dict[str, Any]] | None, str]:
    """What the ranks wrote: all answers, or the first error in time."""
    found: list[dict[str, Any]] = []
    errors: list[tuple[float, int, str]] = []
    missing = []
    for rank in range(num_gpus):
        try:
            answer = json.loads((place / f"rank{rank}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            missing.append(rank)
            continue
        if "error" in answer:
            errors.append((answer["at"], rank, answer["error"]))
        else:
            found.append(answer)
    if errors:
        _, rank, error = min(errors)
        return "failed", None, f"rank {rank}: {error}"
    if missing:
        return "crashed", None, f"rank {missing[0]} gave no answer"
    return "ok", found, ""


def together(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: rank 0's, with the highest peak of all ranks, and each rank's own under "ranks".

    Where a rank ran out of memory, so did the run.
    """
    first = dict(answers[0])
    ran_out = [(rank, each["reason"]) for rank, each in enumerate(answers) if each["outcome"] == "out_of_memory"]
    if ran_out:
        first |= {"outcome": "out_of_memory", "reason": f"rank {ran_out[0][0]}: {ran_out[0][1]}"}
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
    rank = int(os.environ["RANK"])
    place = Path(folder)
    try:
        answer = _measure(json.loads((place / "case.json").read_text(encoding="utf-8")), rank)
    except Exception as error:
        import traceback

        traceback.print_exc()
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        answer = {"error": f"{kind}{first_line(error)}", "at": time.time()}
    part = place / f"rank{rank}.part"
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(place / f"rank{rank}.json")
    sys.stdout.flush()
    # a rank that failed or ran out of memory leaves the others waiting: torchrun ends them
    os._exit(1 if "error" in answer or answer["outcome"] != "ok" else 0)


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

    from vramplan.probes import measure, probe_gpu

    device = int(os.environ["LOCAL_RANK"])
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    held = probe_gpu.memory(uuid)  # before this process holds anything of its GPU
    others = 0 if held is None else held.processes_bytes or 0
    torch.cuda.set_device(device)
    record = case["record"] and rank == 0  # the rank that is played
    return measure.measure({**case, "uuid": uuid, "others_bytes": others, "record": record})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
