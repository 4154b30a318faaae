"""Records what a real training step allocates, one event a line, from PyTorch's own memory history.

This is the ground the planner's ops stand on: each case trains a small model of a real architecture with the
real Trainer (or trl's SFTTrainer) for a few steps and writes every allocation and free of CUDA memory with the
op and the Python line that made it. Needs a CUDA device.

    python -m vramplan.probes.record CASES.json OUT_DIR

A case is {"name", "config", "options"}: the plan's options (DEFAULTS where they are silent), and beside them `steps`
and `args`, further TrainingArguments.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# dladdr names a frame from its symbol table: enough for op names, and fast where addr2line takes minutes.
os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import torch

from vramplan.planner.training import parse_options
from vramplan.probes import history, workload
from vramplan.probes.measure import Marks

DEFAULTS = {"optimizer": "adamw_torch", "seq_len": 512}


def run_case(case: dict[str, Any], record: bool = True) -> dict[str, Any]:
    """One case: model, adapter, `steps` training steps; its marks and, when recorded, every event."""
    given = {**DEFAULTS, **case["options"]}
    steps, more = given.pop("steps", 3), given.pop("args", {})
    options = parse_options(given)
    torch.manual_seed(0)
    note = Marks()
    if record:
        history.start()
    model = workload.load(case["config"], options)
    note.mark("loaded")
    lora = workload.lora_config(options)
    model = workload.adapt(model, options, lora)
    note.mark("ready")
    with tempfile.TemporaryDirectory() as folder:
        arguments = workload.training_arguments(options, folder, steps, **more)
        trainer = workload.trainer(model, options, lora, arguments)
        trainer.add_callback(note)
        note.mark("trainer")
        trainer.train()
    note.mark("end")
    marks = [[mark.name, number, *mark[1:]] for number, mark in enumerate(note.marks)]
    answer: dict[str, Any] = {
        "name": case["name"], "options": options.as_dict(), "config": case["config"], "marks": marks,
    }  # fmt: skip
    if record:
        answer["labels"], answer["events"] = history.events()
        history.stop()
    free, total = torch.cuda.mem_get_info()
    answer["used"] = total - free
    answer["reserved"] = torch.cuda.memory_reserved()
    if case.get("segments"):
        answer["segments"] = [
            [s["total_size"], s["segment_type"], [[b["size"], b["state"]] for b in s["blocks"]]]
            for s in torch.cuda.memory._snapshot()["segments"]
        ]
    return answer


def clean() -> int:
    """Frees what a case left; the bytes still allocated (0 when nothing leaks into the next case)."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def main(cases_file: str, out: str) -> None:
    """Runs every case of a JSON list and writes OUT_DIR/records.jsonl.gz, a line a case."""
    from importlib.metadata import version

    cases = json.loads(Path(cases_file).read_text())
    stack = {p: version(p) for p in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")}
    started = time.time()
    with gzip.open(Path(out) / f"{Path(cases_file).stem}.jsonl.gz", "wt", compresslevel=6) as file:
        for case in cases:
            if time.time() - started > float(os.environ.get("RECORD_SECONDS", "540")):
                print("out of time before", case["name"])
                break
            left = clean()
            try:
                answer = {"left_bytes": left, "stack": stack, **run_case(case, case.get("record", True))}
            except Exception as error:
                traceback.print_exc(limit=-4)
                answer = {"name": case["name"], "error": f"{type(error).__name__}: {error}"}
                history.stop()
            file.write(json.dumps(answer) + "\n")
            print(
                f"{time.time() - started:6.1f}",
                case["name"],
                answer.get("error", ""),
                left,
                len(answer.get("events", [])),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
