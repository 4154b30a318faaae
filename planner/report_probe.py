"""What a probe measured, beside what was planned, for a terminal; and what it shows on stderr while it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vramplan.planner.report import Block, Row, brief, percent, show, title
from vramplan.planner.units import GIB, format_bytes, format_gib

if TYPE_CHECKING:
    from vramplan.planner.calibration import Calibration
    from vramplan.probes.probe import Figure, Proof, Report, Result
    from vramplan.probes.probe_cases import Case

_SHOWN_DIVERGENCES = 8
_TOTALS = ("peak allocated", "peak reserved", "device total")
# The other figures by the heading of their column, where many runs stand below each other.
_PARTS = {
    "weights": "weights",
    "adapter and preparation": "adapter",
    "gradients": "gradients",
    "optimizer states": "optimizer",
    "activations of a step": "activations",
    "CUDA context": "context",
    "device total": "device",
}
_ENDINGS = {
    "out_of_memory": "ran out of memory",
    "timeout": "timeout",
    "crashed": "crashed",
    "failed": "failed",
    "not started": "not started",
}


def print_probe(report: Report) -> None:
    """The report as text: the verdict, the runs, what was learned."""
    show(page(report))


def page(report: Report) -> list[Block]:
    """The report's blocks: one run figure by figure; of several, tables, and the figures of those planned wrong."""
    blocks, many = [_head(report)], len(report.results) > 1
    if many:
        blocks += [_runs(report.results), *_reasons(report.results), *_parts(report.results)]
    for number, result in enumerate(report.results, 1):
        if result.figures and (not many or result.beyond):
            blocks.append(_run(f"Run {number}, {result.case.plan.model.name}" if many else "This run", result))
        if not many and result.outcome == "ok" and len(result.line.get("ranks", ())) > 1:
            blocks.append(_ranks(result))
        if result.divergences is not None:
            blocks.append(_divergences(result))
    if report.proof:
        blocks.append(_proof(report.proof))
    if report.learned:
        blocks.append(_learned(report.learned))
    notes = [*report.notes, *([f"results are in {report.saved}"] if report.saved else [])]
    if notes:
        blocks.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    return blocks


def _head(report: Report) -> Block:
    machine = report.machine
    rows = [
        Row((f"{machine.name}, {format_gib(machine.card.budget_bytes)} for CUDA, driver {machine.driver}",), "bold"),
        Row((", ".join(f"{package} {version}" for package, version in machine.stack.items()),)),
    ]
    if report.limit_bytes is not None:
        room = {format_gib(result.case.room_bytes) for result in report.results}
        rooms = f": PyTorch may reserve {', '.join(sorted(room))}, the rest is the CUDA context's" if room else ""
        rows.append(Row((f"as a GPU of {format_gib(report.limit_bytes)}{rooms}",)))
    if len(report.results) == 1:
        (result,) = report.results
        rows.append(Row((title(result.case.plan).removesuffix(", one GPU"),)))
        if result.outcome != "ok" or not result.case.survives:
            rows.append(Row((_wrong(result) + _told(result),)))
    rows.append(Row((verdict(report),), "green" if report.good else "bold red"))
    return Block("", "<", rows)


def verdict(report: Report) -> str:
    """One line: how many runs were as planned, and the largest errors."""
    judged = [result for result in report.results if result.verdict is not None]
    right = sum(result.verdict is True for result in judged)
    lost = len(report.results) - len(judged)
    words = ["interrupted"] if report.interrupted else []
    if not judged:
        words.append("nothing was measured")
    else:
        words.append(f"{right} of {len(judged)} {'run' if len(judged) == 1 else 'runs'} as planned")
    for name in _TOTALS:
        found = [f for result in judged for f in result.figures if f.name == name and f.error is not None]
        if found:
            worst = max(found, key=lambda figure: abs(figure.error or 0.0))
            words.append(f"{name} {_error(worst)}{' at worst' * (len(found) > 1)}")
    if lost:
        words.append(f"{lost} ended otherwise")
    return f"{'; '.join(words)}; {report.seconds:.0f} s"


def _runs(results: list[Result]) -> Block:
    rows = [Row(("", "allocated", "%", "reserved", "%", "step, s", "run"), "dim")]
    for number, result in enumerate(results, 1):
        what = _wrong(result) + _brief(result.case).replace(_gpus(result.case), "")
        cells = ["-"] * 5
        if result.outcome == "ok":
            found = {figure.name: figure for figure in result.figures}
            peaks = [found["peak allocated"], found["peak reserved"]]
            cells = [cell for peak in peaks for cell in (f"{(peak.measured or 0) / GIB:.2f}", _share(peak))]
            cells.append("-" if result.line["step_s"] is None else f"{result.line['step_s']:.3f}")
        if result.outcome != "ok" or not result.case.survives:
            what += f": {_ending(result)}"
        rows.append(Row((str(number), *cells, what), "bold red" if result.verdict is False else ""))
    several = _gpus(results[0].case)  # the same for all
    where = f"Runs on {several.removesuffix(', ')}" if several else "Runs"
    return Block(f"{where}: peaks in GiB as measured, and how far the plan is off", ">>>>>><", rows)


def _gpus(case: Case) -> str:
    """How many GPUs a run is on, as `_brief` says it; empty for one."""
    return "" if case.plan.options.num_gpus == 1 else f"{case.plan.options.num_gpus:,} GPUs, "


def _reasons(results: list[Result]) -> list[Block]:
    """Why runs ended early that should not have: `_runs` has no room for whole sentences."""
    rows = [
        Row((str(number), result.reason))
        for number, result in enumerate(results, 1)
        if _early(result) and result.reason
    ]
    return [Block("Why runs ended early", "><", rows)] if rows else []


def _parts(results: list[Result]) -> list[Block]:
    """The errors of the figures that `_runs` leaves out."""
    rows = [Row(("", *_PARTS.values()), "dim")]
    for number, result in enumerate(results, 1):
        if not result.case.survives:
            continue
        if found := {figure.name: _share(figure) for figure in result.figures}:
            rows.append(Row((str(number), *(found[name] for name in _PARTS))))
    return [Block("How far the plan is off in the rest, percent", ">" * len(rows[0].cells), rows)] if rows[1:] else []


def _share(figure: Figure) -> str:
    if figure.predicted == figure.measured == 0:
        return percent(0.0)
    return "-" if figure.error is None else percent(figure.error)


def _brief(case: Case) -> str:
    return brief(case.plan.model.name, case.plan.options)


def _wrong(result: Result) -> str:
    return "WRONG: " if result.verdict is False else ""


def _ending(result: Result) -> str:
    """How a run ended, other than measured to its end as planned."""
    if result.outcome == "ok":
        return "survived, though it was planned to run out"
    words = _ENDINGS.get(result.outcome, result.outcome)
    if result.outcome == "out_of_memory":
        words += " as planned" if result.verdict else ", though it was planned to fit"
    return words


def _told(result: Result) -> str:
    """The same with the reason, where it ended early and should not have."""
    return f"{_ending(result)} ({result.reason})" if _early(result) and result.reason else _ending(result)


def _early(result: Result) -> bool:
    return result.outcome != "ok" and not result.verdict


def _run(name: str, result: Result) -> Block:
    rows = [Row(("", "predicted", "measured", "error"), "dim")]
    rows += [_figure(figure) for figure in result.figures]
    rows.append(_step_time(result))
    said = "as planned" if result.verdict else f"WRONG in {' and '.join(result.beyond) or 'its outcome'}"
    return Block(f"{name}: {said}", "<>>>", rows)


def _ranks(result: Result) -> Block:
    """Each GPU's own figures; those above are the highest of each."""
    rows = [Row(("rank", "allocated", "reserved", "device", "step, s"), "dim")]
    for rank, found in enumerate(result.line["ranks"]):
        sizes = (found["peak_allocated_bytes"], found["peak_reserved_bytes"], found["device_used_bytes"])
        cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
        seconds = "-" if found["step_s"] is None else f"{found['step_s']:.3f}"
        rows.append(Row((str(rank), *cells, seconds)))
    return Block("Every GPU: peaks in GiB as measured", ">>>>>", rows)


def _step_time(result: Result) -> Row:
    """The last step's, beside the plan's: shown, and no part of the verdict, because it is the host's as well."""
    measured, planned = result.line["step_s"], result.case.plan.time
    if measured is None:
        return Row(("step time", "" if planned is None else f"{planned.step_s:.3f} s", "-", ""))
    if planned is None or not result.case.survives:
        return Row(("step time", "", f"{measured:.3f} s", ""))
    error = 100 * (planned.step_s / measured - 1)
    return Row(("step time", f"{planned.step_s:.3f} s", f"{measured:.3f} s", f"{error:+.0f} %"))


def _figure(figure: Figure) -> Row:
    predicted, measured = ("-" if size is None else format_bytes(size) for size in (figure.predicted, figure.measured))
    return Row((figure.name, predicted, measured, _error(figure)), "bold" if figure.name in _TOTALS else "")


def _error(figure: Figure) -> str:
    """In percent; "0 %" is exact, "<0.01 %" only nearly so."""
    if figure.predicted is not None and figure.predicted == figure.measured:
        return "0 %"
    if figure.error is None:
        return "-"
    return f"{'+' * (figure.error >= 0.00005)}{percent(figure.error)} %"


def _divergences(result: Result) -> Block:
    """The first tensor in which plan and GPU differ, and those that differ most."""
    found = result.divergences or ()
    if not found:
        return Block("Memory history of the last step", "<", [Row(("as planned, in all tensors of 100 KB and more",))])
    rows = [Row(("first", str(found[0])))]
    for each, times in result.largest[:_SHOWN_DIVERGENCES]:
        rows.append(Row((f"{times} x", str(each))))
    heading = f"Memory history of the last step: {len(found)} tensors differ; the first, and the largest"
    return Block(heading, "><", rows)


def _proof(proof: Proof) -> Block:
    def cell(size: int | None) -> str:
        return "none seen" if size is None else str(size)

    gap = "memory ran out exactly where the plan said"
    if proof.survived is None and proof.ran_out is None:
        gap = "not found, since a run ended otherwise"
    elif proof.survived is None:
        gap = f"WRONG: even {proof.ran_out} ran out"
    elif proof.ran_out is None:
        gap = f"WRONG: even {proof.survived} survived"
    elif not proof.holds:
        off = proof.survived - (proof.planned.survives or 0)
        gap = f"WRONG: the plan is {abs(off)} too {'low' if off > 0 else 'high'}"
    return Block(
        f"Boundary over {proof.over}, by {proof.step}: {gap}",
        "<>>",
        [
            Row(("", "planned", "measured"), "dim"),
            Row(("survives", cell(proof.planned.survives), cell(proof.survived))),
            Row(("runs out", cell(proof.planned.fails), cell(proof.ran_out))),
        ],
    )


def _learned(known: Calibration) -> Block:
    rates = {"16-bit products": (known.matmul_flops_per_s, "TFLOP/s"), "copies": (known.copy_bytes_per_s, "TB/s")}
    sizes = {
        "CUDA context of a process": known.process_bytes,
        "kept by the driver": known.hidden_bytes,
        "cuBLAS workspace of a thread": known.workspace_bytes,
    }
    rows = [Row((name, format_bytes(size))) for name, size in sizes.items() if size is not None]
    rows.append(Row(("attention kernel", known.kernel or "-")))
    rows += [Row((name, f"{rate / 1e12:.4g} {unit}")) for name, (rate, unit) in rates.items() if rate]
    return Block("Calibration of this GPU, kept for later plans", "<>", rows)


# ------------------------------------------------------------------------------------------------ while it is running


class Progress:
    """Tells on stderr what a probe does: a line that moves on a terminal, one line a run elsewhere."""

    def __init__(self, budget_s: float | None) -> None:
        self._budget_s = budget_s
        self._live: Any = None
        self._number = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def doing(self, what: str, case: Case | None = None) -> None:
        """Something began: `what` in words, or a run."""
        if case is not None:
            self._number += 1
            what = f"run {self._number}: {_brief(case)}"
        if sys.stderr.isatty():
            self._show(what)

    def done(self, result: Result) -> None:
        """A run ended."""
        if not sys.stderr.isatty():
            ended = "measured" if result.outcome == "ok" else _told(result)
            print(f"run {self._number}: {result.case.id}: {ended}, {result.seconds:.1f} s", file=sys.stderr, flush=True)

    def _show(self, what: str) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            of = f"of {self._budget_s:.0f} s" if self._budget_s else ""
            words = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn(of), words)
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task(what, total=None)
        self._live.update(self._task, description=what)
