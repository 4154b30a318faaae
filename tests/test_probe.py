"""`vramplan probe` with a GPU that is played: what it runs, what it says of it, and what it does when things fail."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner import calibration, memory, report_probe
from vramplan.planner.cli import main
from vramplan.planner.errors import Failure
from vramplan.planner.fit import Boundary
from vramplan.planner.plan import plan
from vramplan.planner.report import plain
from vramplan.planner.units import GIB, MIB
from vramplan.planner.verify import read, score
from vramplan.probes import probe as probing
from vramplan.probes import probe_cases, probe_gpu, ranks
from vramplan.probes.probe import Figure, Probe, Proof, Report, Result
from vramplan.probes.probe_runner import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
LEARNED = {
    "stack": {"torch": "2.15.0+cu130"},  # what is planned where nothing is installed
    "problem": "",
    "name": "NVIDIA H200",
    "uuid": "uuid",
    "capability": [9, 0],
    "multiprocessors": 132,
    "total_bytes": 143_156 * MIB,
    "bitsandbytes": "",
    "workspace_bytes": 32 * MIB,
    "kernel": "cudnn",
    "matmul_flops_per_s": 7.9e14,
    "copy_bytes_per_s": 4.3e12,
}
CONTEXT = 775 * MIB


def measured(asked: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """What measure.py answers on a GPU that does what the plan says, or `scale` times as much."""
    made = plan(asked["config"], gpu="h200", **asked["options"])
    said = made.memory
    if asked["limit_bytes"] is not None:
        said = memory.estimate(made.architecture, made.options, made.device, made.counts, asked["limit_bytes"])
    if said.out_of_memory:
        reason = "in forward or backward of step 1, for want of 1.00 GiB"
        return {
            "outcome": "out_of_memory",
            "reason": reason,
            "steps": [],
            "device_used_bytes": None,
            "context_bytes": None,
            "process_bytes": None,
            "retries": 1,
        }
    run = memory.run_of(made.architecture, made.options, made.device, made.counts)
    peak, reserved = int(said.peak_allocated_bytes * scale), int(said.peak_reserved_bytes * scale)
    forward = [
        moment.peak_bytes for moment in said.timeline if moment.phase.startswith(("forward", "loss", "backward"))
    ]
    step = {
        "start_bytes": said.timeline[0].end_bytes,
        "fwd_bwd_peak_bytes": int(max(forward) * scale),
        "with_grads_bytes": said.timeline[-2].end_bytes,
        "optim_peak_bytes": said.timeline[-2].peak_bytes,
        "end_bytes": said.timeline[-1].end_bytes,
        "reserved_peak_bytes": reserved,
        "step_s": 0.125,
    }
    return {
        "outcome": "ok",
        "reason": "",
        "trainable_parameters": made.counts.trainable,
        "gradient_bytes": run.gradient_bytes,
        "optimizer_state_bytes": run.state_bytes,
        "loaded_bytes": said.loaded_bytes,
        "ready_bytes": said.ready_bytes,
        "steps": [step] * asked["steps"],
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": reserved,
        "step_s": 0.125,
        "device_used_bytes": reserved + said.context_bytes,
        "context_bytes": said.context_bytes,
        "process_bytes": CONTEXT,
        "retries": 0,
    }


class PlayedRunner:
    """Stands for probe_runner.Runner: `answer` plays the GPU, `looked` what calibrate.py finds."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = measured, **looked: Any) -> None:
        self.answer, self.looked = answer, LEARNED | looked
        self.asked: list[dict[str, Any]] = []

    def __call__(self) -> PlayedRunner:
        return self

    def __enter__(self) -> PlayedRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, job: str, argument: Any, timeout_s: float) -> Outcome:
        if job.startswith("vramplan.probes.calibrate:"):
            return Outcome("ok", self.looked, "", 3.0)
        json.dumps(argument)  # it goes to another process
        self.asked.append(argument)
        found = self.answer(argument)
        return found if isinstance(found, Outcome) else Outcome("ok", found, "", 6.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, newest_stack: None) -> Callable[..., PlayedRunner]:
    """A machine with an H200 that nobody else uses."""
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(calibration, "installed_driver", lambda: None)
    monkeypatch.setattr(probe_gpu, "driver", lambda: "580.1")
    monkeypatch.setattr(probe_gpu, "sliced", lambda _: False)
    monkeypatch.setattr(probing, "find_spec", lambda _: True)
    monkeypatch.setattr(probing, "_today", lambda: "2026-11-22")
    monkeypatch.setattr(probing, "_READINGS", 1)

    def make(answer: Callable[[dict[str, Any]], Any] = measured, others: int = 0, **looked: Any) -> PlayedRunner:
        runner = PlayedRunner(answer, **looked)
        monkeypatch.setattr(probing, "Runner", runner)
        monkeypatch.setattr(probe_gpu, "memory", lambda _: probe_gpu.Memory(143_771 * MIB, 615 * MIB + others, others))
        return runner

    return make


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["probe", *args])
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --------------------------------------------------------------------------------------------------------- several GPUs


def test_every_rank_is_measured(
    gpu: Callable[..., PlayedRunner],
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []

    def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
        asked.append(case)
        own = measured(case)
        return Outcome("ok", [own, own | {"peak_reserved_bytes": own["peak_reserved_bytes"] + MIB}], "", 20.0)

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    gpu()
    output = tmp_path / "runs.jsonl"
    options = ("--method", "full", "--seq-len", "256", "--num-gpus", "2", "--parallel", "fsdp")
    assert run(config, *options, "--output", str(output)) == 0
    assert "2 GPUs, fsdp" in capsys.readouterr().out.replace("\n", " ")
    assert (asked[0]["options"]["num_gpus"], asked[0]["options"]["parallel"]) == (2, "fsdp")
    line = json.loads(output.read_text())
    assert [each["peak_reserved_bytes"] for each in line["ranks"]] == [
        line["peak_reserved_bytes"] - MIB,
        line["peak_reserved_bytes"],
    ]
    (again,) = map(score, read([output]))
    assert again.errors["allocated"] == 0


def test_a_rank_that_fails_ends_the_case_with_its_error(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "rank 1: ValueError: no such thing"
    monkeypatch.setattr(ranks, "launch", lambda *_: Outcome("failed", None, reason, 9.0))
    monkeypatch.setattr(probe_gpu, "count", lambda: 8)
    gpu()
    assert run(config, "--num-gpus", "2") == 1
    assert reason in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--num-gpus", "4"), 1, "the run is on 4 GPUs and 2 are here; with --alone one stands for all"),
        (("--num-gpus", "2", "--boundary"), 2, "--boundary is for one GPU; leave it out, or add --alone"),
        (("--alone",), 2, "--alone is for a run on several GPUs, of which one stands for all; add --num-gpus"),
    ],
)
@pytest.mark.parametrize("model", [True, False])
def test_what_several_gpus_cannot_be_asked(
    gpu: Callable[..., PlayedRunner],
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    said: str,
    model: bool,
) -> None:
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    gpu()
    assert run(*[config] * model, *words) == code
    if not model and "--boundary" in words:
        said = "--boundary is about one plan"
    assert said in capsys.readouterr().err


def test_zero_needs_deepspeed(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "find_spec", lambda name: None if name == "deepspeed" else True)
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    gpu()
    options = ("--method", "full", "--num-gpus", "2")
    assert run(config, *options, "--parallel", "zero2") == 1
    assert "not installed: deepspeed; a probe trains for real: pip install deepspeed" in capsys.readouterr().err
    monkeypatch.setattr(ranks, "launch", lambda case, *_: Outcome("ok", [measured(case)] * 2, "", 20.0))
    assert run(config, *options, "--parallel", "fsdp") == 0


def test_a_run_that_breaks_leaves_the_others(
    gpu: Callable[..., PlayedRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Which rank, what, in a sentence of its own; the others go on."""
    nccl = (
        "DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error "
        "(run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5"
    )
    started = 0

    def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
        nonlocal started
        started += 1
        if started == 2:
            return Outcome("failed", None, f"rank 1: {nccl}", 9.0)
        if started == 3:
            return Outcome("ok", [measured(case) | {"outcome": "out_of_memory", "reason": "in step 2"}, {}], "", 1.0)
        return Outcome("ok", [measured(case)] * num_gpus, "", 1.0)

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    gpu()
    monkeypatch.chdir(tmp_path)  # a path in a note may be as long as it likes
    asked = ("--num-gpus", "2", "--parallel", "fsdp", "--output", "runs.jsonl")
    assert run(*asked) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "Runs on 2 GPUs: peaks in GiB" in out
    assert started == len(probe_cases._table()["several"])
    told = " ".join(out.partition("Why runs ended early\n")[2].partition("\n\n")[0].split())
    assert told == f"2 rank 1: {nccl} 3 rank 0: in step 2"
    assert f"{started - 2} of {started - 1} runs as planned; " in out
    started = 0
    assert run(*asked, "--json") == 1
    probes = [each["probe"] for each in json.loads(capsys.readouterr().out)["runs"]]
    assert [each["outcome"] for each in probes[:4]] == ["ok", "failed", "out_of_memory", "ok"]
    assert (probes[1]["reason"], probes[2]["reason"]) == (f"rank 1: {nccl}", "rank 0: in step 2")


def test_one_gpu_is_not_several(
    gpu: Callable[..., PlayedRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs.jsonl"
    runs = []
    for asked in ((), ("--num-gpus", "1"), ("--num-gpus", "1", "--parallel", "none")):
        runner = gpu()
        assert run("--memory-limit", "8GiB", *asked, "--output", str(output)) == 0
        assert "Calibration of this GPU, kept for later plans" in capsys.readouterr().out
        runs.append(runner.asked)
    assert runs[0] == runs[1] == runs[2]
    assert probing.budget_s(None, {"num_gpus": 1}, quick=False, full=False) == probing.BUDGET_S
    assert probing.budget_s(None, {"num_gpus": "2"}, quick=False, full=False) == probing.SEVERAL_S


def test_a_grid_for_several_gpus_that_has_no_such_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(*_: object) -> None:
        raise AssertionError("a wrong question is answered before anything is imported")

    monkeypatch.setattr(probing, "Runner", look)
    monkeypatch.setattr(probing, "find_spec", look)
    for way in ("zero1", "none"):
        assert run("--full", "--num-gpus", "2", "--parallel", way) == 2
        said = f"--full has no runs with parallel '{way}'; choose --parallel fsdp, ddp or zero3, or leave out --full"
        assert capsys.readouterr().err == f"vramplan: {said}\n"
    assert run("--full", "--num-gpus", "2", "--parallel", "ddp", "--cpu-offload") == 2
    assert "cpu_offload belongs to fsdp and zero, and parallel is ddp; add --parallel fsdp" in capsys.readouterr().err


def test_a_grid_in_host_memory(
    gpu: Callable[..., PlayedRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its runs that can be offloaded, each shared in its own way."""
    asked: list[dict[str, Any]] = []

    def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
        asked.append(case["options"])
        return Outcome("ok", [measured(case)] * num_gpus, "", 1.0)

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    monkeypatch.setattr(probe_cases, "find_spec", lambda _: True)
    grid = {
        "models": ["qwen2.5-0.5b"],
        "settings": [{"method": "full", "seq_len": 512, "parallel": way} for way in ("ddp", "fsdp", "zero3")],
    }
    monkeypatch.setattr(probe_cases, "_table", lambda: {"several_full": [grid]})
    gpu()
    assert run("--full", "--num-gpus", "2", "--cpu-offload", "--output", str(tmp_path / "runs.jsonl")) == 0
    assert [(each["parallel"], each["cpu_offload"]) for each in asked] == [("fsdp", True), ("zero3", True)]


def test_without_a_model_several_gpus_share_the_bundled_runs(
    gpu: Callable[..., PlayedRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []

    def launch(case: dict[str, Any], num_gpus: int, timeout_s: float) -> Outcome:
        asked.append(case)
        return Outcome("ok", [measured(case)] * num_gpus, "", 1.0)

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(probe_gpu, "count", lambda: 4)
    runner = gpu()
    assert run("--num-gpus", "4", "--parallel", "ddp", "--output", str(tmp_path / "runs.jsonl")) == 0
    assert runner.asked == []
    assert len(asked) == len(probe_cases._table()["several"])
    assert {(case["options"]["num_gpus"], case["options"]["parallel"]) for case in asked} == {(4, "ddp")}
    out = capsys.readouterr().out
    assert f"{len(asked)} of {len(asked)} runs as planned" in out
    assert "Runs on 4 GPUs: peaks in GiB" in out
    assert "qwen2.5-0.5b full 1 x 2048, ddp\n" in out
    assert not list((tmp_path / "data").glob("calibrations/*"))  # nothing is learnt from them


def test_one_gpu_stands_for_all(
    gpu: Callable[..., PlayedRunner],
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What NCCL takes is not there, and neither are times nor the device's total."""

    def answer(asked: dict[str, Any]) -> list[dict[str, Any]]:
        found = measured(asked)
        context = found["context_bytes"] - plan(SMALL, gpu="h200", **asked["options"]).memory.nccl_bytes
        monkeypatch.setattr(ranks, "pretend", lambda _: None)
        monkeypatch.setattr("vramplan.probes.measure.measure", lambda _: found | {"context_bytes": context})
        return ranks.alone(asked)

    monkeypatch.setattr(probe_gpu, "count", lambda: 1)
    runner = gpu(answer)
    output = tmp_path / "runs.jsonl"
    options = ("--method", "full", "--num-gpus", "64", "--parallel", "fsdp")
    assert run(config, *options, "--alone", "--output", str(output)) == 0
    assert runner.asked[0]["options"]["num_gpus"] == 64
    out = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in out.splitlines()}
    assert rows["CUDA context"] == ["0", "%"]
    assert rows["device total"] == ["-", "-"]
    assert "one GPU stood for all: neither NCCL's memory" in out
    assert "Every GPU" not in out
    line = json.loads(output.read_text())
    assert line["alone"] is True
    (again,) = map(score, read([output]))
    assert again.errors == {"allocated": 0.0, "reserved": 0.0}


def test_every_gpu_has_a_row(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(case: dict[str, Any], *_: object) -> Outcome:
        own = measured(case)
        return Outcome("ok", [own, own | {"peak_allocated_bytes": own["peak_allocated_bytes"] - GIB}], "", 20.0)

    monkeypatch.setattr(ranks, "launch", launch)
    monkeypatch.setattr(probe_gpu, "count", lambda: 2)
    gpu()
    assert run(config, "--method", "full", "--num-gpus", "2") == 0
    rows = capsys.readouterr().out.partition("Every GPU: peaks in GiB as measured")[2].splitlines()
    first, second = (row.split() for row in rows[2:4])
    assert (first[0], second[0]) == ("0", "1")
    assert float(first[1]) - float(second[1]) == pytest.approx(1, abs=0.011)


def test_zero_takes_gradients_away_within_backward(gpu: Callable[..., PlayedRunner]) -> None:
    """So neither they nor a step's activations can be told apart in what was measured."""
    gpu(lambda asked: [measured(asked) | {"device_used_bytes": None}])
    asked = {"alone": True, "watcher": report_probe.Progress(None), "method": "full", "num_gpus": 2}
    (result,) = probing.probe(SMALL, parallel="zero2", **asked).results
    found = {figure.name: figure for figure in result.figures}
    assert found["gradients"].error is found["activations of a step"].error is None
    assert found["optimizer states"].error == 0


def test_what_ranks_wrote(tmp_path: Path) -> None:
    def write(rank: int, at: float, **ended: Any) -> None:
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(ended | {"at": at}))

    good = {"outcome": "ok", "reason": "", "peak_allocated_bytes": 5, "peak_reserved_bytes": 8, "step_s": 0.5}
    write(0, 1.0, answer=good)
    assert ranks._answers(tmp_path, 2) == ("crashed", None, "")
    write(1, 2.0, error="RuntimeError: NCCL")
    write(0, 1.0, error="ValueError: first")
    assert ranks._answers(tmp_path, 2) == ("failed", None, "rank 0: ValueError: first")
    ran_out = {"outcome": "out_of_memory", "reason": "in step 1"}
    write(0, 1.0, answer=ran_out)  # for which rank 1 waited in vain
    assert ranks._answers(tmp_path, 2) == ("ok", [ran_out, {}], "")
    write(0, 1.0, answer=good)
    write(1, 1.0, answer=good | {"peak_reserved_bytes": 9, "step_s": 0.25})
    outcome, answers, _ = ranks._answers(tmp_path, 2)
    assert outcome == "ok"
    assert answers is not None
    both = ranks.together(answers)
    assert (both["peak_allocated_bytes"], both["peak_reserved_bytes"], both["step_s"]) == (5, 9, 0.5)
    short = ranks.together([good, good | {"outcome": "out_of_memory", "reason": "in step 1"}])
    assert (short["outcome"], short["reason"]) == ("out_of_memory", "rank 1: in step 1")


# ------------------------------------------------------------------------------------------------------------- one plan


def test_one_plan_is_measured_and_kept(
    gpu: Callable[..., PlayedRunner], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = gpu()
    output = tmp_path / "runs.jsonl"
    assert run(config, "--method", "lora", "--seq-len", "256", "--output", str(output)) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 run as planned; peak allocated 0 %; peak reserved 0 %; device total 0 %" in out
    assert "run 1: small-method=lora-seq_len=256: measured" in err
    (asked,) = runner.asked
    assert (asked["steps"], asked["limit_bytes"], asked["others_bytes"], asked["record"]) == (4, None, 0, False)
    assert run(config, "--method", "lora", "--seq-len", "512", "--output", str(output)) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["options"]["seq_len"] for line in lines] == [256, 512]
    assert lines[0]["gpu"] == "h200"
    assert lines[0]["driver"] == "580.1"
    assert "total_parameters" not in lines[0]  # nobody has counted them
    # what it writes is what `vramplan verify` reads
    for each in map(score, read([output])):
        assert each.failed == ""
        assert each.trainable_exact
        assert {error for figure, error in each.errors.items() if figure != "step"} == {0.0}  # its time is made up


def test_json_has_the_shape_of_a_plan(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu()
    assert run(config, "--seq-len", "256", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    planned = plan(config, gpu="h200", seq_len=256).to_dict()
    assert planned.keys() <= found.keys()
    assert planned["memory"].keys() <= found["memory"].keys()
    assert found["options"]["seq_len"] == 256
    assert found["parameters"] == planned["parameters"]
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "loaded_bytes", "ready_bytes"):
        assert found["memory"][name] == planned["memory"][name], name
    assert sum(part["bytes"] for part in found["memory"]["components"]) == found["memory"]["peak_allocated_bytes"]
    assert found["time"] == {"step_s": 0.125, "tokens_per_s": 2048.0}
    assert found["probe"]["outcome"] == "ok"
    assert {figure["name"]: figure["error"] for figure in found["probe"]["figures"]}["peak allocated"] == 0.0
    assert found["probe"]["machine"]["gpu"] == "h200"
    assert found["probe"]["good"] is True


def test_a_plan_beyond_tolerance_exits_with_1(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(lambda asked: measured(asked, 1.02))
    assert run(config, "--seq-len", "256") == 1
    out = capsys.readouterr().out
    assert "0 of 1 run as planned; peak allocated -1.96 %" in out
    assert "This run: WRONG in peak allocated" in out


@pytest.mark.parametrize(
    ("outcome", "reason", "said"),
    [
        ("timeout", "it was stopped after 600 s", "timeout (it was stopped after 600 s)"),
        ("crashed", "the process died of SIGSEGV", "crashed (the process died of SIGSEGV)"),
        ("failed", "RuntimeError: no kernel image", "failed (RuntimeError: no kernel image)"),
    ],
)
def test_a_run_that_breaks_is_a_result(
    gpu: Callable[..., PlayedRunner],
    config: str,
    capsys: pytest.CaptureFixture[str],
    outcome: str,
    reason: str,
    said: str,
) -> None:
    gpu(lambda _: Outcome(outcome, None, reason, 1.0))
    assert run(config, "--seq-len", "256") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert "nothing was measured" in out


def test_running_out_as_planned_is_right(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = gpu()
    assert run(config, "--batch-size", "64", "--memory-limit", "4GiB") == 0
    (asked,) = runner.asked
    assert asked["limit_bytes"] == 4 * GIB - CONTEXT
    out = " ".join(capsys.readouterr().out.split())
    assert "PyTorch may reserve 3.24 GiB, the rest is the CUDA context's" in out
    assert "ran out of memory as planned 1 of 1 run as planned" in out


def test_running_out_unexpectedly_is_wrong(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran_out = {"outcome": "out_of_memory", "reason": "", "steps": [], "device_used_bytes": None, "process_bytes": None}
    gpu(lambda _: ran_out)
    assert run(config, "--seq-len", "256") == 1
    assert "ran out of memory, though it was planned to fit" in " ".join(capsys.readouterr().out.split())


def test_surviving_unexpectedly_is_wrong(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan's figures end where it runs out of memory: they are held against nothing."""
    gpu(lambda asked: measured({**asked, "limit_bytes": None}))
    assert run(config, "--batch-size", "64", "--memory-limit", "4GiB") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "WRONG: survived, though it was planned to run out 0 of 1 run as planned; " in out
    assert "This run: WRONG in its outcome predicted measured error weights - " in out
    assert "%" not in out


def test_a_snapshot_is_compared(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [["alloc", 4096, 3 * MIB, 0, 0], ["free_completed", 4096, 3 * MIB, 0, 0]]
    runner = gpu(lambda asked: measured(asked) | {"history": (5 * MIB, ["mm<mm|MmBackward0|a.py:1:f"], events)})
    assert run(config, "--method", "lora", "--seq-len", "256", "--snapshot") == 0
    assert runner.asked[0]["record"] is True
    out = capsys.readouterr().out
    assert "Memory history of the last step: " in out
    assert "first  only planned" in out


def test_a_snapshot_that_is_the_plan_has_no_divergence(gpu: Callable[..., PlayedRunner]) -> None:
    """The plan's own events, as PyTorch's history would have them: neither tensors nor what is held are apart."""
    from vramplan.probes import compare

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        plays = compare.of_plan(plan(asked["config"], gpu="h200", **asked["options"]), asked["steps"] - 1)
        if shift:
            plays = replace(plays, events=[*plays.events[:40], 2 * len(plays.sizes), *plays.events[40:]],
                            sizes=[*plays.sizes, 7 * MIB], labels=[*plays.labels, "more"])  # fmt: skip
        seen = [["free_completed" if e & 1 else "alloc", e >> 1, plays.sizes[e >> 1], 0, 0] for e in plays.events]
        return measured(asked) | {"history": (plays.start_bytes, ["op||"], seen)}

    gpu(answer)
    shift = False
    asked = {"snapshot": True, "watcher": report_probe.Progress(None), "method": "lora", "seq_len": 256}
    assert probing.probe(SMALL, **asked).results[0].divergences == ()
    shift = True
    (more,) = probing.probe(SMALL, **asked).results[0].divergences or ()
    assert (more.kind, more.seen_bytes) == ("only seen", 7 * MIB)
    assert more.apart_bytes == pytest.approx(7 * MIB, abs=compare.LEAST_BYTES)  # smaller tensors stand in between


# ----------------------------------------------------------------------------------------------------------- boundaries


def boundary_of(gpu: Callable[..., PlayedRunner], off: int) -> Report:
    """The report of a GPU on which a size runs out `off` later than planned."""

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        options = asked["options"]
        return measured({**asked, "options": options | {"batch_size": max(1, options["batch_size"] - off)}})

    gpu(answer)
    return probing.probe(
        SMALL, boundary="batch_size", memory_limit="3GiB", watcher=report_probe.Progress(None), method="lora"
    )


def test_a_boundary_is_proven(gpu: Callable[..., PlayedRunner]) -> None:
    report = boundary_of(gpu, 0)
    assert report.proof is not None
    assert report.proof.holds
    assert [result.outcome for result in report.results] == ["ok", "out_of_memory"]
    sizes = [result.case.plan.options.batch_size for result in report.results]
    assert sizes == [report.proof.planned.survives, report.proof.planned.fails]
    assert report.good


def test_a_boundary_as_json(gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu()
    asked = ("--method", "lora", "--boundary", "--over", "seq_len", "--memory-limit", "2GiB", "--batch-size", "4")
    assert run(config, *asked, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["boundary"]["over"] == "seq_len"
    assert answer["boundary"]["planned"] == answer["boundary"]["measured"]
    assert answer["boundary"]["planned"]["fails"] == answer["boundary"]["planned"]["survives"] + 64
    assert [each["probe"]["outcome"] for each in answer["runs"]] == ["ok", "out_of_memory"]
    assert answer["runs"][1]["memory"]["peak_allocated_bytes"] is None
    assert answer["limit_bytes"] == 2 * GIB


@pytest.mark.parametrize("off", [1, -1])
def test_a_boundary_elsewhere_is_looked_for(gpu: Callable[..., PlayedRunner], off: int) -> None:
    report = boundary_of(gpu, off)
    proof = report.proof
    assert proof is not None
    assert proof.planned.survives is not None
    assert proof.planned.fails is not None
    assert (proof.survived, proof.ran_out) == (proof.planned.survives + off, proof.planned.fails + off)
    assert not proof.holds
    said = f"WRONG: the plan is 1 too {'low' if off > 0 else 'high'}"
    assert said in "\n".join(plain(report_probe.page(report)))
    assert not report.good


# ---------------------------------------------------------------------------------------------------------- calibrating


def test_calibrating_measures_and_keeps_what_no_formula_gives(
    gpu: Callable[..., PlayedRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    runner = gpu()
    assert run("--memory-limit", "8GiB") == 0
    assert len(runner.asked) >= 3
    out = capsys.readouterr().out
    assert f"{len(runner.asked)} of {len(runner.asked)} runs as planned" in out
    known, warnings = calibration.load("h200", probing_stack())
    assert warnings == ()
    assert known is not None
    assert (known.process_bytes, known.hidden_bytes, known.kernel) == (CONTEXT, 615 * MIB, "cudnn")
    assert known.matmul_flops_per_s == 7.9e14
    assert "calibrated: CUDA context" in " ".join(printed_plan(capsys).split())


def probing_stack() -> Any:
    from vramplan.planner.stack import parse_stack

    return parse_stack({"torch": "2.15.0"})


def printed_plan(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["gpt2", "--seq-len", "128", "--gpu", "h200", "--stack", "torch=2.15"])
    return capsys.readouterr().out


def test_the_time_budget_is_kept(
    gpu: Callable[..., PlayedRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(probing.time, "monotonic", lambda: now[0])
    timeouts: list[float] = []

    class Slow(PlayedRunner):
        def run(self, job: str, argument: Any, timeout_s: float) -> Outcome:
            found = super().run(job, argument, timeout_s)
            now[0] += 9.0
            if "measure" in job:
                timeouts.append(timeout_s)
            return found._replace(seconds=9.0)

    gpu()
    slow = Slow()
    monkeypatch.setattr(probing, "Runner", slow)
    assert run("--quick", "--memory-limit", "8GiB") == 0
    assert len(slow.asked) == 2
    assert now[0] - 1000.0 <= 30.0
    assert timeouts == [60.0, 12.0]  # after the first never beyond what is left
    assert "there was no time for some of the bundled runs that fit" in capsys.readouterr().out


def test_one_run_is_measured_even_when_the_imports_took_all_the_time(
    gpu: Callable[..., PlayedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(probing.time, "monotonic", lambda: now[0])

    class Cold(PlayedRunner):
        def run(self, job: str, argument: Any, timeout_s: float) -> Outcome:
            now[0] += 50.0 if "calibrate" in job else 8.0
            return super().run(job, argument, timeout_s)

    gpu()
    cold = Cold()
    monkeypatch.setattr(probing, "Runner", cold)
    assert run("--quick", "--memory-limit", "8GiB") == 0
    assert len(cold.asked) == 2  # 20 s are left for runs of 8 s, however long the imports took
    hurry = Cold(lambda asked: now.__setitem__(0, now[0] + 30) or measured(asked))
    monkeypatch.setattr(probing, "Runner", hurry)
    assert run("--quick", "--memory-limit", "8GiB") == 0
    assert len(hurry.asked) == 1


def test_an_interrupt_keeps_what_was_measured(
    gpu: Callable[..., PlayedRunner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        if len(runner.asked) == 2:
            raise KeyboardInterrupt
        return measured(asked)

    runner = gpu(answer)
    output = tmp_path / "runs.jsonl"
    assert run("--memory-limit", "8GiB", "--output", str(output)) == 130
    assert "interrupted; 1 of 1 run as planned" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 1
    known, _ = calibration.load("h200", probing_stack())
    assert known is not None
    assert known.process_bytes == CONTEXT


def test_an_earlier_calibration_is_not_lost_to_one_that_knows_less(
    gpu: Callable[..., PlayedRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu()
    assert run("--quick", "--memory-limit", "4GiB") == 0
    gpu(lambda _: Outcome("crashed", None, "the process died of SIGSEGV", 1.0))
    assert run("--quick", "--memory-limit", "4GiB") == 1
    assert "the calibration of 2026-11-22 is kept" in " ".join(capsys.readouterr().out.split())
    known, _ = calibration.load("h200", probing_stack())
    assert known is not None
    assert known.process_bytes == CONTEXT


def test_contexts_that_cannot_be_are_not_learned(gpu: Callable[..., PlayedRunner]) -> None:
    """Counters of other processes that move may leave less than nothing."""
    gpu(lambda asked: measured(asked) | {"process_bytes": -5 * MIB}, total_bytes=143_780 * MIB)
    report = probing.probe(quick=True, memory_limit="4GiB", watcher=report_probe.Progress(None))
    assert report.learned is not None
    assert (report.learned.process_bytes, report.learned.hidden_bytes) == (None, None)
    assert calibration.load("h200", probing_stack())[0] == report.learned


def test_a_crash_costs_one_run_and_is_told(
    gpu: Callable[..., PlayedRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: dict[str, Any]) -> Any:
        return (
            Outcome("crashed", None, "the process died of SIGSEGV", 1.0) if len(runner.asked) == 1 else measured(asked)
        )

    runner = gpu(answer)
    assert run("--memory-limit", "8GiB") == 1
    assert "; 1 ended otherwise; " in " ".join(capsys.readouterr().out.split())
    assert len(runner.asked) >= 3


# ------------------------------------------------------------------------------------------------------------ bad cases


def test_a_full_disk_loses_nothing_that_is_shown(
    gpu: Callable[..., PlayedRunner],
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu()
    output = tmp_path / "runs.jsonl"
    output.write_text('{"earlier": 1}\n')

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(probing.os, "fsync", full)
    assert run(config, "--seq-len", "256", "--output", str(output)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no space left on device; results are shown here only" in out
    assert "1 of 1 run as planned" in out
    assert output.read_text() == '{"earlier": 1}\n'


def test_a_calibration_that_cannot_be_saved_is_said(
    gpu: Callable[..., PlayedRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gpu()
    monkeypatch.setattr(calibration, "save", full)
    assert run("--quick", "--memory-limit", "4GiB") == 0
    assert "the calibration cannot be saved: no space left on device" in " ".join(capsys.readouterr().out.split())


def test_others_memory_is_noticed_and_refused_where_it_is_in_the_way(
    gpu: Callable[..., PlayedRunner], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = gpu(others=20 * GIB)
    assert run(config, "--seq-len", "256") == 0
    assert runner.asked[0]["others_bytes"] == 20 * GIB
    assert "other processes hold 20.00 GiB of the GPU; it is subtracted" in " ".join(capsys.readouterr().out.split())
    runner = gpu(others=139 * GIB)
    assert run(config, "--seq-len", "1024", "--batch-size", "8") == 1
    assert not runner.asked
    assert "other processes hold 139.00 GiB; end them, or choose a smaller run" in " ".join(
        capsys.readouterr().out.split()
    )


def test_others_memory_that_moves_takes_the_device_total_away(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(probe_gpu, "memory", lambda _: probe_gpu.Memory(143_771 * MIB, 5 * GIB, 4 * GIB))
        return measured(asked)

    gpu(answer)
    assert run(config, "--seq-len", "256") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "other processes' memory changed during a run, so its device total is not measured" in out
    (result,) = re.findall(r"device total (\d\S+ GiB) (\S+) (\S+)", out)
    assert result[1:] == ("-", "-")


def test_nvml_that_does_not_tell_the_memory(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(lambda asked: measured(asked) | {"device_used_bytes": None, "context_bytes": None})
    monkeypatch.setattr(probe_gpu, "memory", lambda _: None)
    assert run(config, "--seq-len", "256") == 0
    assert "NVML does not tell this GPU's memory" in capsys.readouterr().out


def test_others_memory_of_a_driver_that_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one counts its own share as used, which CUDA's total leaves out."""
    seen: probe_gpu.Memory | None = None
    monkeypatch.setattr(probe_gpu, "memory", lambda _: seen)
    assert probe_gpu.others_bytes("uuid", 78 * GIB) == 0
    seen = probe_gpu.Memory(80 * GIB, 5 * GIB, 4 * GIB)
    assert probe_gpu.others_bytes("uuid", 78 * GIB) == 4 * GIB
    seen = probe_gpu.Memory(80 * GIB, 5 * GIB, None)
    assert probe_gpu.others_bytes("uuid", 78 * GIB) == 3 * GIB
    seen = probe_gpu.Memory(80 * GIB, GIB, None)
    assert probe_gpu.others_bytes("uuid", 78 * GIB) == 0


def test_a_mig_slice_is_said(
    gpu: Callable[..., PlayedRunner], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu()
    monkeypatch.setattr(probe_gpu, "sliced", lambda _: True)
    assert run(config, "--seq-len", "256") == 0
    assert "divided by MIG: figures are those of this slice" in " ".join(capsys.readouterr().out.split())
    # and what it teaches is not said of the whole GPU
    assert run("--quick", "--memory-limit", "4GiB") == 0
    assert calibration.load("h200", probing_stack()) == (None, ())
    assert calibration.load("143156MiB", probing_stack())[0] is not None


@pytest.mark.parametrize(
    ("looked", "args", "code", "said"),
    [
        ({"problem": "torch 2.11.0 is built without CUDA; install a CUDA build"}, (), 1, "is built without CUDA"),
        (
            {"bitsandbytes": "bitsandbytes does not work with this CUDA"},
            (),
            1,
            "without it, choose --method lora or full",
        ),
        ({"bitsandbytes": "bitsandbytes does not work"}, ("--method", "lora"), 0, "1 of 1 run as planned"),
        (
            {"name": "Tesla T4", "capability": [7, 5], "total_bytes": 14_913 * MIB, "bf16": False},
            ("--weights-dtype", "bf16"),
            2,
            "Tesla T4 has no bf16; add --weights-dtype fp16 --mixed-precision fp16",
        ),
        ({}, ("--memory-limit", "200GiB"), 2, "the limit of 200.00 GiB is more than the 139.80 GiB that are free"),
    ],
)
def test_what_a_gpu_or_its_libraries_cannot(
    gpu: Callable[..., PlayedRunner],
    config: str,
    capsys: pytest.CaptureFixture[str],
    looked: dict[str, Any],
    args: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    gpu(**looked)
    assert run(config, "--seq-len", "256", *args) == code
    out, err = capsys.readouterr()
    assert said in " ".join((out + err).split())


def test_a_gpu_that_no_table_knows_can_be_verified(
    gpu: Callable[..., PlayedRunner], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        here = probe_cases.card_of("NVIDIA Q9000", (8, 6), 20_000 * MIB, None, multiprocessors=46)
        return measured(asked) | {
            "peak_allocated_bytes": plan(config, gpu=here, seq_len=256).memory.peak_allocated_bytes
        }

    gpu(answer, name="NVIDIA Q9000", capability=[8, 6], total_bytes=20_000 * MIB)
    output = tmp_path / "runs.jsonl"
    run(config, "--seq-len", "256", "--output", str(output))
    said = "no table knows this NVIDIA Q9000: for plans it is named by its size, --gpu 20000MiB"
    assert said in " ".join(capsys.readouterr().out.split())
    line = json.loads(output.read_text())
    assert (line["gpu"], line["compute_capability"], line["gpu_name"]) == ("20000MiB", "8.6", "NVIDIA Q9000")
    (found,) = map(score, read([output]))
    assert found.failed == ""
    assert found.errors["allocated"] == pytest.approx(0, abs=1e-3)  # by the workspaces of an 8.6, not of an H200


def test_nothing_is_left_behind_by_a_probe_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> str:
        raise Failure("no NVIDIA driver answers")

    monkeypatch.setattr(probing, "find_spec", lambda _: object())
    monkeypatch.setattr(probe_gpu, "driver", none)
    assert run("gpt2", "--seq-len", "64", "--output", str(tmp_path / "runs.jsonl")) == 1
    assert not list(tmp_path.iterdir())


def test_a_machine_that_cannot_be_looked_at(
    gpu: Callable[..., PlayedRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    runner = gpu()
    runner.run = lambda *_: Outcome("crashed", None, "the process exited with 1", 0.1)  # type: ignore[method-assign]
    assert run() == 1
    err = capsys.readouterr().err
    assert err.startswith("vramplan: the GPU could not be looked at: the process exited with 1; plans")
    assert len(err.splitlines()) == 1


def test_without_the_libraries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probing, "find_spec", lambda name: None if name in ("torch", "peft") else object())
    assert run() == 1
    said = "not installed: torch, peft; a probe trains for real: pip install 'vramplan[probe]'\n"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(probing, "find_spec", lambda name: None if name == "trl" else object())
    assert run("gpt2", "--trainer", "trl", "--seq-len", "64") == 1
    assert "pip install trl\n" in capsys.readouterr().err
    monkeypatch.setattr(probing, "find_spec", lambda _: None)
    assert run("gpt2", "--trainer", "trl", "--seq-len", "64") == 1
    assert (
        "peft, trl, datasets; a probe trains for real: pip install 'vramplan[probe]' trl\n" in capsys.readouterr().err
    )


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> str:
        raise Failure("no NVIDIA driver answers (Driver Not Loaded); run the probe where the GPU is")

    monkeypatch.setattr(probe_gpu, "driver", none)
    monkeypatch.setattr(probing, "find_spec", lambda _: object())
    assert run("--quick") == 1
    assert capsys.readouterr().err.startswith("vramplan: no NVIDIA driver answers (Driver Not Loaded)")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--quick", "--full"), "--quick and --full contradict each other"),
        (("gpt2", "--quick"), "--quick is for calibrating, which takes no MODEL"),
        (("--boundary",), "--boundary is about one plan; name its model (MODEL)"),
        (("--snapshot",), "--snapshot is about one plan"),
        (("--rank", "4"), "--rank is about one plan; name its model (MODEL), or leave it out to calibrate"),
        (("gpt2", "--boundary", "--snapshot"), "two questions"),
        (("gpt2", "--boundary", "--batch-size", "2"), "batch_size is what --boundary searches"),
        (("gpt2", "--over", "seq_len"), "add --boundary"),
        (("gpt2", "--boundary", "--over", "rank"), "unknown size 'rank'"),
        (("gpt2", "--memory-limit", "16"), "'16' is no size"),
        (("gpt2", "--memory-limit", "x", "--seq-len", "0"), "'x' is no size"),
        (("gpt2", "--seq-len", "9999"), "longer than the 1024 learned positions"),
        (("gpt2", "--seq-len", "64", "--output", "/no/such/folder/x"), "cannot write to '/no/such/folder/x'"),
    ],
)
def test_wrong_questions(
    args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "find_spec", lambda _: object())
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_profile_says_nothing_about_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "plan.toml"
    profile.write_text('model = "gpt2"\ngpu = "t4"\n')
    assert run("--config", str(profile)) == 2
    assert "names a gpu, and a probe measures what is here" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the report


def golden_report() -> Report:
    machine = probe_cases.Machine(
        probe_cases.card_of("NVIDIA H200", (9, 0), 143_156 * MIB, 143_771 * MIB),
        "NVIDIA H200",
        "uuid",
        "580.1",
        {"torch": "2.11.0", "transformers": "5.17.0"},
    )
    fits = probe_cases.case_of(SMALL, {"method": "lora", "seq_len": 256}, machine, 3 * GIB)
    line = measured({"config": SMALL, "options": fits.options, "limit_bytes": None, "steps": 4}, 1.001)
    too_large = probe_cases.case_of(SMALL, {"method": "lora", "batch_size": 99}, machine, 3 * GIB)
    return Report(
        machine,
        limit_bytes=3 * GIB,
        results=[
            Result(fits, "ok", "", line, 6.0),
            Result(too_large, "out_of_memory", "while the model was loaded", {}, 2.0),
            Result(fits, "timeout", "it was stopped after 9 s", {}, 9.0),
        ],
        proof=Proof("batch_size", 1, Boundary(7, 8), 7, None),
        learned=calibration.Calibration(
            "h200", "580.1", {"torch": "2.11.0"}, "2026-11-22", CONTEXT, 615 * MIB, 32 * MIB, "cudnn", 7.9e14, 4.3e12
        ),
        notes=["a note"],
        seconds=41.2,
    )


GOLDEN = """\
NVIDIA H200, 139.80 GiB for CUDA, driver 580.1
torch 2.11.0, transformers 5.17.0
as a GPU of 3.00 GiB: PyTorch may reserve 2.24 GiB, the rest is the CUDA
context's
2 of 2 runs as planned; peak allocated +1.00 %; peak reserved 0 %; 1 ended
otherwise; 41 s

Runs: peaks in GiB as measured, and how far the plan is off
   allocated     %  reserved     %  step, s  run
1       0.10  1.00      1.50  0.00    0.125  llama LoRA 1 x 256
2          -     -         -     -        -  llama LoRA 99 x 2048: ran out of
                                             memory as planned
3          -     -         -     -        -  llama LoRA 1 x 256: timeout

Why runs ended early
3  it was stopped after 9 s

How far the plan is off in the rest, percent
   weights  adapter  gradients  optimizer  activations  context  device
1    <0.01     0.00       0.00       0.00        -2.00        -       -

Boundary over batch_size, by 1: WRONG: even 7 survived
          planned   measured
survives        7          7
runs out        8  none seen

Calibration of this GPU, kept for later plans
CUDA context of a process      775.00 MiB
kept by the driver             615.00 MiB
cuBLAS workspace of a thread    32.00 MiB
attention kernel                    cudnn
16-bit products               790 TFLOP/s
copies                           4.3 TB/s

Notes
-  a note"""
ALONE = """
llama, LoRA r=16 on all linear layers, batch 1 x 256, adamw_torch_fused,
checkpointing
1 of 1 run as planned; peak allocated +1.00 %; peak reserved 0 %; 41 s

This run: as planned
                          predicted    measured    error
weights                    1.00 GiB    1.00 GiB  <0.01 %
adapter and preparation         0 B         0 B      0 %
gradients                  1.00 MiB    1.00 MiB      0 %
optimizer states           2.00 MiB    2.00 MiB      0 %
activations of a step     49.00 MiB   50.00 MiB  -2.00 %
peak allocated           101.00 MiB  100.00 MiB  +1.00 %
peak reserved              1.50 GiB    1.50 GiB      0 %
CUDA context             775.00 MiB           -        -
device total               2.26 GiB           -        -
step time                   0.049 s     0.125 s    -61 %"""
FIGURES = (
    Figure("weights", GIB, GIB + 512),
    Figure("adapter and preparation", 0, 0),
    Figure("gradients", MIB, MIB),
    Figure("optimizer states", 2 * MIB, 2 * MIB),
    Figure("activations of a step", 49 * MIB, 50 * MIB),
    Figure("peak allocated", 101 * MIB, 100 * MIB),
    Figure("peak reserved", 3 * GIB // 2, 3 * GIB // 2),
    Figure("CUDA context", CONTEXT, None),
    Figure("device total", 3 * GIB // 2 + CONTEXT, None),
)


def test_the_report_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "figures", property(lambda self: FIGURES if self.outcome == "ok" else ()))
    assert "\n".join(plain(report_probe.page(golden_report()))) == GOLDEN


def test_one_run_is_shown_figure_by_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "figures", property(lambda _: FIGURES))
    report = golden_report()
    alone = replace(report, results=report.results[:1], proof=None, learned=None, notes=[])
    assert "\n".join(plain(report_probe.page(alone))).endswith(ALONE)


def test_the_report_is_readable_at_any_width() -> None:
    for width in (80, 120):
        assert max(map(len, plain(report_probe.page(golden_report()), width))) <= width


def test_a_figure_without_a_measure_has_no_error() -> None:
    assert Figure("device total", 10, None).error is None
    assert Figure("gradients", 11, 10).error == pytest.approx(0.1)
    assert Figure("adapter and preparation", 0, 0).error is None


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "runs.jsonl"
    probing._append(file, {"id": 1})
    probing._append(file, {"id": 2})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"id": 1}, {"id": 2}]


def test_machine_notes_reach_the_report(tmp_path: Path, gpu: Callable[..., PlayedRunner]) -> None:
    machine = replace(golden_report().machine, notes=("said once",))
    made = Probe(gpu(), machine, tmp_path / "x", report_probe.Progress(None))  # type: ignore[arg-type]
    assert made.report.notes == ["said once"]
