"""`vramplan probe`: real training steps on the local GPU beside what the planner said of them.

Without a model it calibrates: a handful of bundled runs, and what no formula gives. With one it measures exactly that
plan, or proves its boundary: the largest size that the planner says survives, and the next, which it says does not.
Every run has a process of its own (probe_runner.py); this one imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vramplan import __version__
from vramplan.planner import calibration, memory
from vramplan.planner.errors import Failure, UsageError, reason, shown
from vramplan.planner.plan import plan
from vramplan.planner.stack import parse_stack
from vramplan.planner.training import SHARING, parse_options, refuse_phases
from vramplan.planner.units import MIB, format_gib, parse_size
from vramplan.probes import probe_cases, probe_gpu, ranks
from vramplan.probes.probe_cases import Case, Machine
from vramplan.probes.probe_runner import Runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vramplan.planner.fit import Boundary
    from vramplan.planner.training import TrainingOptions
    from vramplan.probes.compare import Divergence

BUDGET_S, QUICK_S, GRID_S = 120.0, 30.0, 3600.0
SEVERAL_S = 300.0  # on several GPUs, where each run's ranks import everything anew
AFTER_IMPORTS_S = 20.0  # of it are left in any case: from a cold disk, torch and transformers alone take as long
FIRST_S = 60.0  # the first run may take so long, whatever is left
RUN_S = 600.0  # the longest that one run may take
TOLERANCE = {"peak allocated": 0.015, "peak reserved": 0.05}
_NOTICED = 64 * MIB  # of other processes' memory: below it a display or the driver itself
_READINGS = 12  # a quarter of a second apart
_TRIES = 4  # sizes on each side of a boundary
_PACKAGES = ("torch", "transformers", "accelerate", "peft")


class Figure(NamedTuple):
    """One thing that is predicted and measured; None where there is no such figure."""

    name: str
    predicted: int | None
    measured: int | None

    @property
    def error(self) -> float | None:
        """The prediction's error, relative to what was measured."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a case. `outcome`: "ok", "out_of_memory", "timeout", "crashed", "failed" or "not started".

    `line` is the run in the form of tables/measured, empty where nothing was measured.
    """

    case: Case
    outcome: str
    reason: str
    line: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    divergences: tuple[Divergence, ...] | None = None

    @property
    def verdict(self) -> bool | None:
        """Whether the plan was right; None where the run says nothing about it."""
        if self.outcome == "out_of_memory":
            return not self.case.survives
        if self.outcome != "ok":
            return None
        return self.case.survives and not self.beyond

    @property
    def beyond(self) -> list[str]:
        """The figures whose error is beyond their tolerance."""
        errors = {figure.name: figure.error for figure in self.figures}
        return [name for name, most in TOLERANCE.items() if abs(errors[name] or 0.0) > most]

    @property
    def largest(self) -> list[tuple[Divergence, int]]:
        """The divergences that differ by the most bytes, each with how often it occurs."""
        from vramplan.probes import compare

        return compare.largest(self.divergences or ())

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Predicted against measured, of a run that was measured to its end.

        Where the plan ran out of memory before that, nothing is predicted of the rest.
        """
        if self.outcome != "ok":
            return ()
        case, line = self.case, self.line
        said, step = case.predicted, line["steps"][-1]
        run = memory.run_of(case.plan.architecture, case.plan.options, case.plan.device, case.plan.counts)
        before_update = takewhile(lambda moment: moment.phase != "optimizer step", said.timeline)
        zero = case.plan.options.parallel.startswith("zero")  # which steps within backward, and takes gradients away
        figures = (
            Figure("weights", said.loaded_bytes, line["loaded_bytes"]),
            Figure(
                "adapter and preparation",
                said.ready_bytes - said.loaded_bytes,
                (line["ready_bytes"] or 0) - (line["loaded_bytes"] or 0),
            ),
            Figure("gradients", *((None, None) if zero else (run.gradient_bytes, line["gradient_bytes"]))),
            Figure("optimizer states", run.state_bytes, line["optimizer_state_bytes"]),
            Figure(
                "activations of a step",
                None if zero else max(moment.peak_bytes for moment in before_update) - said.timeline[0].end_bytes,
                None if zero else step["fwd_bwd_peak_bytes"] - step["start_bytes"],
            ),
            Figure("peak allocated", said.peak_allocated_bytes, line["peak_allocated_bytes"]),
            Figure("peak reserved", said.peak_reserved_bytes, line["peak_reserved_bytes"]),
            Figure("CUDA context", said.context_bytes - case.alone * said.nccl_bytes, line["context_bytes"]),
            Figure("device total", None if case.alone else said.device_bytes, line["device_used_bytes"]),
        )
        return figures if case.survives else tuple(each._replace(predicted=None) for each in figures)


@dataclass(frozen=True, slots=True)
class Proof:
    """A boundary as planned, and of the sizes that were run the largest that survived and the least that ran out."""

    over: str
    step: int
    planned: Boundary
    survived: int | None
    ran_out: int | None

    @property
    def holds(self) -> bool:
        """Whether memory ran out exactly where the planner said."""
        return (self.survived, self.ran_out) == (self.planned.survives, self.planned.fails)


@dataclass(slots=True)
class Report:
    """What a probe found: filled while it runs, so that an interrupt leaves what was measured until then."""

    machine: Machine
    limit_bytes: int | None = None
    results: list[Result] = field(default_factory=list)
    learned: calibration.Calibration | None = None
    proof: Proof | None = None
    notes: list[str] = field(default_factory=list)
    saved: Path | None = None
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether something was measured, nothing crashed, and the planner was right about everything."""
        said = [result.verdict for result in self.results]
        broken = any(result.outcome in ("crashed", "failed") for result in self.results)
        return True in said and False not in said and not broken and (self.proof is None or self.proof.holds)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON. Of one plan's run it has the shape of Plan.to_dict, the rest being in its "probe"."""
        machine, proof, runs = self.machine, self.proof, [run_dict(result) for result in self.results]
        about = {
            "good": self.good,
            "tolerance": TOLERANCE,
            "limit_bytes": self.limit_bytes,
            "machine": {
                "name": machine.name,
                "gpu": machine.card.name,
                "compute_capability": machine.card.compute_capability,
                "budget_bytes": machine.card.budget_bytes,
                "driver_bytes": machine.card.driver_bytes,
                "others_bytes": machine.others_bytes,
                "driver": machine.driver,
                "stack": dict(machine.stack),
            },
            "notes": self.notes,
            "saved": str(self.saved) if self.saved else None,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
        }
        if self.learned is None and proof is None and len(runs) == 1:
            return {**runs[0], "probe": runs[0]["probe"] | about}
        boundary = None
        if proof is not None:
            boundary = {
                "over": proof.over,
                "step": proof.step,
                "planned": {"survives": proof.planned.survives, "fails": proof.planned.fails},
                "measured": {"survives": proof.survived, "fails": proof.ran_out},
                "holds": proof.holds,
            }
        return {
            **about,
            "runs": runs,
            "boundary": boundary,
            "calibration": self.learned.to_dict() if self.learned else {},
            "vramplan_version": __version__,
        }


def run_dict(result: Result) -> dict[str, Any]:
    """A run in the shape of Plan.to_dict: the same keys, measured; "probe" says how it ended and what was predicted."""
    case, line = result.case, result.line
    planned = replace(case.plan, memory=case.predicted).to_dict()
    measured: dict[str, Any] = dict.fromkeys(planned["memory"])
    time_s: dict[str, Any] = {}
    if result.outcome == "ok":
        o = case.plan.options
        held = {
            "weights": line["loaded_bytes"] or 0,
            "adapter and preparation": (line["ready_bytes"] or 0) - (line["loaded_bytes"] or 0),
            "optimizer states": line["optimizer_state_bytes"],
        }
        held["activations, gradients and buffers"] = line["peak_allocated_bytes"] - sum(held.values())
        updating = max(step["optim_peak_bytes"] for step in line["steps"]) == line["peak_allocated_bytes"]
        measured |= {
            "components": [{"name": name, "bytes": nbytes} for name, nbytes in held.items()],
            "device_bytes": line["device_used_bytes"],
            "peak_phase": "optimizer step" if updating else "forward and backward",
            **{name: line[name] for name in measured if name in line},
        }
        tokens = o.batch_size * o.seq_len * o.gradient_accumulation_steps * o.num_gpus
        if line["step_s"] is not None:
            time_s = {"step_s": line["step_s"], "tokens_per_s": tokens / line["step_s"]}
    return {
        **planned,
        "memory": measured,
        "time": time_s,
        "gpus": [],
        "probe": {
            "outcome": result.outcome,
            "reason": result.reason,
            "verdict": result.verdict,
            "room_bytes": case.room_bytes,
            "limited": case.limited,
            "predicted": planned["memory"],
            "figures": [
                {"name": f.name, "predicted_bytes": f.predicted, "measured_bytes": f.measured, "error": f.error}
                for f in result.figures
            ],
            "divergences": None if result.divergences is None else [each._asdict() for each in result.divergences],
            "measured": line,
        },
    }


# ------------------------------------------------------------------------------------------------------------- running


class Watcher(Protocol):
    """Is told what a probe does while it runs."""

    def doing(self, what: str, case: Case | None = None) -> None:
        """Something began: `what` in words, or a run."""

    def done(self, result: Result) -> None:
        """A run ended."""


class Probe:
    """Runs cases on one machine and keeps what they give: in `report`, and line by line in the file `output`."""

    def __init__(self, runner: Runner, machine: Machine, output: Path, watcher: Watcher) -> None:
        self.runner, self.machine, self.watcher = runner, machine, watcher
        self.report = Report(machine, notes=list(machine.notes))
        self._output: Path | None = output

    def run(self, case: Case, timeout_s: float = RUN_S) -> Result:
        """Measures one case and keeps its result."""
        self.watcher.doing(case.id, case)
        if reason := probe_cases.needs_more_than_free(case, self.machine):
            return self._keep(Result(case, "not started", reason))
        others = _others_bytes(self.machine.uuid, self.machine.card.budget_bytes)
        asked = {
            "config": case.config,
            "options": case.options,
            "steps": case.steps,
            "limit_bytes": case.room_bytes if case.limited else None,
            "uuid": self.machine.uuid,
            "others_bytes": others,
            "record": case.record,
        }
        num_gpus = case.plan.options.num_gpus
        if case.alone:
            ended = self.runner.run("vramplan.probes.ranks:alone", asked, timeout_s)
        elif num_gpus > 1:
            ended = ranks.launch(asked, num_gpus, timeout_s)
        else:
            ended = self.runner.run("vramplan.probes.measure:measure", asked, timeout_s)
        if ended.outcome != "ok":
            return self._keep(Result(case, ended.outcome, ended.reason, {}, ended.seconds))
        found = dict(ended.answer) if num_gpus == 1 else ranks.together(ended.answer)
        history = found.pop("history", None)
        if self._moved(others):
            found |= {"device_used_bytes": None, "context_bytes": None, "process_bytes": None}
            self._note("other processes' memory changed during a run, so its device total is not measured")
        line = _line(case, self.machine, found, others)
        divergences = None if history is None else _compared(case, *history)
        return self._keep(Result(case, found["outcome"], found["reason"], line, ended.seconds, divergences))

    def _keep(self, result: Result) -> Result:
        self.report.results.append(result)
        self.watcher.done(result)
        if result.line and self._output is not None:
            try:
                _append(self._output, result.line)
                self.report.saved = self._output
            except OSError as error:
                self._note(f"cannot save to {str(self._output)!r}: {reason(error)}; results are shown here only")
                self._output = None
        return result

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)

    def _moved(self, before: int) -> bool:
        """Whether others' memory is another than before."""
        now = _others_bytes(self.machine.uuid, self.machine.card.budget_bytes, before)
        return abs(now - before) > _NOTICED

    # --- what is run ------------------------------------------------------------------------------------------------

    def calibrate(
        self,
        runs: list[dict[str, Any]],
        learned: Mapping[str, Any],
        limit_bytes: int | None,
        deadline: float,
    ) -> None:
        """The bundled `runs` until `deadline`, and what they and `learned` say of this GPU, kept for later plans."""
        try:
            self.measure(runs, learned["matmul_flops_per_s"], limit_bytes, deadline)
        finally:  # an interrupt keeps what was measured
            self._learn(learned)

    def measure(self, runs: list[dict[str, Any]], flops_per_s: float, limit_bytes: int | None, deadline: float) -> None:
        """The bundled `runs` until `deadline`, on the monotonic clock.

        The first that fits is run whatever the time: a probe that measures nothing is of no use.
        """
        runs, notes = probe_cases.possible(runs, self.machine)
        self.report.notes += notes
        self.report.limit_bytes = limit_bytes
        slowness, skipped = 1.0, False
        for case in probe_cases.fitting(runs, self.machine, limit_bytes):
            guess = probe_cases.seconds(case, flops_per_s)
            left = deadline - time.monotonic()
            if not self.report.results:
                left = max(left, FIRST_S)
            if guess * slowness > left:
                skipped = True
                continue
            result = self.run(case, min(left, RUN_S))
            slowness = max(0.5, (slowness + result.seconds / guess) / 2)
        if skipped:
            self._note("there was no time for some of the bundled runs that fit (--full takes it)")

    def _learn(self, learned: Mapping[str, Any]) -> None:
        """Keeps `learned` and the context of the runs, unless an earlier calibration knows more."""
        contexts = [each.line.get("process_bytes") or 0 for each in self.report.results if each.outcome == "ok"]
        contexts = [nbytes for nbytes in contexts if nbytes > 0]
        card = self.machine.card
        earlier, _ = calibration.load(card.name, parse_stack())
        if not contexts and earlier is not None:
            self._note(f"no run was measured to its end, so the calibration of {earlier.date} is kept")
            return
        self.report.learned = calibration.Calibration(
            gpu=card.name,
            driver=self.machine.driver,
            stack=dict(self.machine.stack),
            date=_today(),
            process_bytes=int(median(contexts)) if contexts else None,
            hidden_bytes=None if card.driver_bytes is None else card.driver_bytes - card.budget_bytes,
            workspace_bytes=learned["workspace_bytes"],
            kernel=learned["kernel"],
            matmul_flops_per_s=learned["matmul_flops_per_s"],
            copy_bytes_per_s=learned["copy_bytes_per_s"],
            notes=(f"the context is the median of {len(contexts)} training runs",) if contexts else (),
        )
        try:
            calibration.save(self.report.learned)
        except OSError as error:
            self._note(f"the calibration cannot be saved: {reason(error)}; later plans go without it")

    def prove(self, model: Any, options: Mapping[str, Any], limit_bytes: int | None, over: str) -> None:
        """Runs the largest size that the planner says survives and the next, and looks on where it was wrong."""
        self.report.limit_bytes = limit_bytes
        self.watcher.doing(f"where the planner says that memory runs out over {over}")
        planned, step = probe_cases.boundary(model, options, self.machine, limit_bytes, over)
        assert planned.survives is not None
        assert planned.fails is not None
        ended: dict[int, str] = {}
        for wanted, sizes in (
            ("ok", range(planned.survives, 0, -step)),
            ("out_of_memory", range(planned.fails, planned.fails + step * _TRIES, step)),
        ):
            for size in sizes[:_TRIES]:
                case = probe_cases.case_of(model, {**options, over: size}, self.machine, limit_bytes)
                ended[size] = self.run(case).outcome
                if ended[size] == wanted or ended[size] not in ("ok", "out_of_memory"):
                    break
        survived = max((size for size, outcome in ended.items() if outcome == "ok"), default=None)
        ran_out = min((size for size, outcome in ended.items() if outcome == "out_of_memory"), default=None)
        self.report.proof = Proof(over, step, planned, survived, ran_out)


def _others_bytes(uuid: str, budget_bytes: int, expected: int = 0) -> int:
    """What other processes hold of the GPU, once a run's process that just ended has given back its own."""
    held = 0
    for _ in range(_READINGS):
        held = probe_gpu.others_bytes(uuid, budget_bytes)
        if held - expected < _NOTICED:
            break
        time.sleep(0.25)
    return held


def _line(case: Case, machine: Machine, found: Mapping[str, Any], others: int) -> dict[str, Any]:
    """The run in the form of tables/measured."""
    return {
        "id": case.id,
        "model": case.plan.model.name,
        "config": case.config,
        "options": case.options,
        "gpu": machine.card.name,
        "stack": dict(machine.stack),
        "compute_capability": machine.card.compute_capability,
        **found,
        "limit_bytes": case.room_bytes if case.limited else None,
        "others_bytes": others,
        **({"alone": True} if case.alone else {}),
        "gpu_name": machine.name,
        "driver": machine.driver,
        "vramplan_version": __version__,
        "date": _today(),
    }


def _append(file: Path, line: Mapping[str, Any]) -> None:
    """One line more, on the disk before this returns; a line that could not be written whole is taken back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        end = stream.tell()
        try:
            stream.write((json.dumps(line) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # a device cannot be cut
                os.truncate(file, end)
            raise


def _compared(
    case: Case, start_bytes: int, labels: Sequence[str], events: Sequence[Sequence[Any]]
) -> tuple[Divergence, ...]:
    from vramplan.probes import compare

    planned = compare.of_plan(case.plan, case.steps - 1)
    return compare.divergences(planned, compare.of_history(labels, events, start_bytes=start_bytes))


# --------------------------------------------------------------------------------------------------------- the machine


def look(runner: Runner, job: str) -> tuple[Machine, dict[str, Any]]:
    """The GPU here, by `look` or `calibrate` of calibrate.py; raises Failure where a probe cannot use it."""
    driver = probe_gpu.driver()
    ended = runner.run(f"vramplan.probes.calibrate:{job}", None, RUN_S)
    if ended.outcome != "ok":
        raise Failure(f"the GPU could not be looked at: {ended.reason}; {probe_gpu.OTHER_WAYS}")
    seen = ended.answer
    if seen["problem"]:
        raise Failure(f"{seen['problem']}; {probe_gpu.OTHER_WAYS}")
    total = seen["total_bytes"]
    held, sliced = probe_gpu.memory(seen["uuid"]), probe_gpu.sliced(seen["uuid"])
    card = probe_cases.card_of(
        seen["name"],
        tuple(seen["capability"]),
        total,
        held.total_bytes if held else None,
        multiprocessors=seen["multiprocessors"],
        sliced=sliced,
    )
    others = _others_bytes(seen["uuid"], total)
    notes = []
    if held is None:
        notes.append("NVML does not tell this GPU's memory, so the device total and others' memory are not measured")
    if sliced:
        notes.append("the GPU is divided by MIG: figures are those of this slice, and the others are left alone")
    if card.memory_gb is None:
        notes.append(f"no table knows this {seen['name']}: for plans it is named by its size, --gpu {card.name}")
    if others > _NOTICED:
        notes.append(f"other processes hold {format_gib(others)} of the GPU; it is subtracted")
    machine = Machine(
        card, seen["name"], seen["uuid"], driver, seen["stack"], others, seen["bitsandbytes"], tuple(notes)
    )
    return machine, seen


def budget_s(model: Any, options: Mapping[str, Any], *, quick: bool, full: bool) -> float | None:
    """Seconds that the bundled runs may take; None for a plan's own."""
    if model is not None:
        return None
    return QUICK_S if quick else GRID_S if full else SEVERAL_S if _several(options) else BUDGET_S


def _several(options: Mapping[str, Any]) -> bool:
    """Whether they are of several GPUs."""
    return parse_options({"num_gpus": options.get("num_gpus")}).num_gpus > 1


def probe(
    model: Any = None,
    *,
    quick: bool = False,
    full: bool = False,
    memory_limit: str | None = None,
    boundary: str | None = None,
    alone: bool = False,
    snapshot: bool = False,
    output: str | None = None,
    watcher: Watcher,
    **options: Any,
) -> Report:
    """What `vramplan probe` does: calibrates without a `model`, measures or proves the plan of one.

    Without one, options may say how several GPUs share the bundled runs; then nothing is calibrated. `alone`: this one
    stands for all of them.
    Raises UsageError for a wrong question and Failure where this machine cannot answer. An interrupt ends it early,
    with what was measured until then.
    """
    started = time.monotonic()
    options = {name: value for name, value in options.items() if value is not None}
    limit_bytes = None if memory_limit is None else parse_size(memory_limit, "--memory-limit")
    _refuse(model, options, quick=quick, full=full, boundary=boundary, snapshot=snapshot)
    # a wrong question is answered at once, not after the imports
    budget, several = budget_s(model, options, quick=quick, full=full), _several(options)
    runs: list[dict[str, Any]] = []
    if model is not None:
        asked = plan(model, **options).options
    else:
        runs = probe_cases.bundled(grid=full, sharing=options if several else {})
        # each of the grid's runs is shared in a way of its own; what else is asked of it, fsdp has
        asked = parse_options({"parallel": "fsdp"} | options if full and several else options)
    _refuse_parallel(asked, boundary=boundary, alone=alone)
    if lacking := [name for name in _needed(asked) if find_spec(name) is None]:
        raise Failure(f"not installed: {', '.join(lacking)}; a probe trains for real: {_install(lacking)}")
    file = None if output is None else _writable(output)
    probe_gpu.driver()
    with Runner() as runner:
        watcher.doing("importing torch and transformers, looking at the GPU")
        machine, learned = look(runner, "look" if model is not None else "calibrate")
        machine = replace(machine, alone=alone)
        looked = time.monotonic()
        if limit_bytes is not None and limit_bytes > machine.free_bytes:
            raise UsageError(
                f"the limit of {format_gib(limit_bytes)} is more than the {format_gib(machine.free_bytes)} that are "
                f"free on {machine.name}; give less (--memory-limit)"
            )
        made = Probe(runner, machine, file or _own_file(machine), watcher)
        if alone:
            made.report.notes.append(
                "one GPU stood for all: neither NCCL's memory, the device total nor times are measured"
            )
        try:
            if budget is not None:
                deadline = max(started + budget, looked + AFTER_IMPORTS_S)
                if several:  # nothing is learnt from what GPUs share
                    made.measure(runs, learned["matmul_flops_per_s"], limit_bytes, deadline)
                else:
                    made.calibrate(runs, learned, limit_bytes, deadline)
            else:
                case = probe_cases.case_of(model, options, machine, limit_bytes)
                _usable(case, machine)
                if boundary is not None:
                    made.prove(model, options, limit_bytes, boundary)
                else:
                    made.report.limit_bytes = limit_bytes
                    made.run(replace(case, record=snapshot))
        except KeyboardInterrupt:
            made.report.interrupted = True
    made.report.seconds = time.monotonic() - started
    return made.report


def _refuse(
    model: Any, options: Mapping[str, Any], *, quick: bool, full: bool, boundary: str | None, snapshot: bool
) -> None:
    if model is None:
        if boundary is not None or snapshot:
            what = "--snapshot" if boundary is None else "--boundary"
            raise UsageError(f"{what} is about one plan; name its model (MODEL)")
        if others := [name for name in options if name not in SHARING]:
            first = others[0].replace("_", "-")
            raise UsageError(f"--{first} is about one plan; name its model (MODEL), or leave it out to calibrate")
        if quick and full:
            raise UsageError("--quick and --full contradict each other; choose one")
        return
    refuse_phases(options, "a probe")
    if quick or full:
        what = "--quick" if quick else "--full"
        raise UsageError(f"{what} is for calibrating, which takes no MODEL; leave one of them out")
    if boundary is not None and snapshot:
        raise UsageError("--boundary and --snapshot are two questions; ask one at a time")
    if boundary is not None and boundary in options:
        raise UsageError(f"{boundary} is what --boundary searches; leave out --{boundary.replace('_', '-')}, or --over")


def _refuse_parallel(asked: TrainingOptions, *, boundary: str | None, alone: bool) -> None:
    if alone and asked.num_gpus == 1:
        raise UsageError("--alone is for a run on several GPUs, of which one stands for all; add --num-gpus")
    if asked.num_gpus == 1 or alone:
        return
    if boundary is not None:
        raise UsageError("--boundary is for one GPU; leave it out, or add --alone")
    here = probe_gpu.count()
    if asked.num_gpus > here:
        there = "1 is" if here == 1 else f"{here} are"
        raise Failure(
            f"the run is on {asked.num_gpus} GPUs and {there} here; with --alone one stands for all, and "
            f"{probe_gpu.OTHER_WAYS}"
        )


def _needed(asked: TrainingOptions) -> tuple[str, ...]:
    trl = ("trl", "datasets") if asked.trainer == "trl" else ()
    return (*_PACKAGES, *trl, *(("deepspeed",) if asked.parallel.startswith("zero") else ()))


def _install(lacking: Sequence[str]) -> str:
    names = [name for name in ("trl", "datasets", "deepspeed") if name in lacking]
    if "trl" in names and "datasets" in names:
        names.remove("datasets")  # comes with it
    return " ".join(["pip install", *(["'vramplan[probe]'"] if lacking[0] in _PACKAGES else []), *names])


def _usable(case: Case, machine: Machine) -> None:
    """Refuses what this GPU or its libraries cannot run."""
    o = case.plan.options
    if machine.card.bf16 is False and "bf16" in (o.weights_dtype, o.mixed_precision):
        weights = "fp32" if o.method == "full" else "fp16"
        raise UsageError(f"{machine.name} has no bf16; add --weights-dtype {weights} --mixed-precision fp16")
    if machine.bitsandbytes and o.bitsandbytes:
        raise Failure(f"{machine.bitsandbytes}; without it, choose --method lora or full, and an optimizer of torch's")


def _writable(output: str) -> Path:
    try:
        file = Path(output).expanduser()
        new = not file.exists()
        with file.open("ab"):
            pass
        if new:  # and none is left behind where nothing comes of it
            file.unlink()
        return file
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a user's home that is not known
        why = reason(error) if isinstance(error, OSError) else "no path"
        raise UsageError(f"cannot write to {shown(output)}: {why} (--output)") from None


def _own_file(machine: Machine) -> Path:
    """Where results are kept that nobody named a file for: beside the calibrations, one file a GPU and day."""
    name = re.sub(r"[^a-z0-9.]+", "-", machine.card.name.lower()).strip("-.")
    return calibration.folder().parent / "probes" / f"{name}-{_today()}.jsonl"


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()
