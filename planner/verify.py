"""Plans held against measured runs: JSON Lines as in tables/measured, as `vramplan probe` writes them.

A line is one run: its `config`, its `options`, the `gpu` and `stack` it ran on, and what was measured. It is planned
for that GPU and stack with what vramplan ships, and without what a probe taught it on this machine. An error is
planned / measured - 1.

A run that ended with "outcome": "out_of_memory" has no figures: there the plan should say that it does not fit, into
`limit_bytes` of reserved memory where the run had such a limit, otherwise into the GPU. A GPU that no table knows is
given as its size, with its `compute_capability` beside it. The files are untrusted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner import catalog, memory
from vramplan.planner.errors import UsageError, shown, unknown
from vramplan.planner.files import read_bytes
from vramplan.planner.plan import plan
from vramplan.planner.stack import KNOWN
from vramplan.planner.training import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MEASURED = Path(__file__).parent.parent / "tables" / "measured"
# Each figure by its name in a plan's memory and in a measured run.
FIGURES = {
    "allocated": ("peak_allocated_bytes", "peak_allocated_bytes"),
    "reserved": ("peak_reserved_bytes", "peak_reserved_bytes"),
    "device": ("device_bytes", "device_used_bytes"),
    "loaded": ("loaded_bytes", "loaded_bytes"),
    "ready": ("ready_bytes", "ready_bytes"),
}
STEP = "step"  # seconds: the median of a run's steps from the second on, since the first warms up
OUTCOMES = ("ok", "out_of_memory")
DANGEROUS = -0.02  # planned so much below what the device used: "fits" is said of what may not
_LARGEST = 2**26  # bytes of a file; a run has about 2,000
_LONGEST = 200  # characters of a name
_MOST_BYTES = 2**50
_LONGEST_S = 10**6  # of a step


class Run(NamedTuple):
    """One line of a file: a run that was measured. `figures` are its bytes by the names of `FIGURES`, and `STEP`."""

    id: str
    file: str
    line: int
    config: dict[str, Any]
    options: dict[str, Any]
    gpu: str
    compute_capability: str | None
    stack: dict[str, str]
    outcome: str
    limit_bytes: int | None
    trainable_parameters: int | None
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Score:
    """A run's plan beside it. `errors` are planned / measured - 1 for each figure that was measured.

    `trainable_exact` and `fits_as_measured` are None where the run does not tell; `failed` says why there is no plan.
    """

    run: Run
    errors: dict[str, float] = field(default_factory=dict)
    trainable_exact: bool | None = None
    fits_as_measured: bool | None = None
    failed: str = ""

    @property
    def method(self) -> str:
        """The run's method."""
        return str(self.run.options.get("method", OPTIONS["method"].default))

    @property
    def dangerous(self) -> bool:
        """Whether the device is planned more than 2 % too small."""
        return self.errors.get("device", 0.0) < DANGEROUS

    def beyond(self, tolerance: dict[str, float]) -> list[str]:
        """What is wrong with this plan: errors above `tolerance` (shares, by figure), and whatever is not exact."""
        wrong = [f"not planned: {self.failed}"] if self.failed else []
        if self.trainable_exact is False:
            wrong.append("trainable parameters differ")
        if self.fits_as_measured is False:
            ran_out = self.run.outcome == "out_of_memory"
            wrong.append("planned to fit, and ran out of memory" if ran_out else "planned not to fit, and ran")
        for figure, most in tolerance.items():
            if abs(error := self.errors.get(figure, 0.0)) > most:
                wrong.append(f"{figure} {error:+.2%}")
        return wrong


class Spread(NamedTuple):
    """How errors are spread: median and 95th percentile of their sizes, the worst, and `bias`, the median of errors."""

    n: int
    median: float
    p95: float
    worst: float
    bias: float


# ------------------------------------------------------------------------------------------------------------- reading


def bundled() -> list[Path]:
    """The measured runs that are shipped."""
    return sorted(MEASURED.glob("*.jsonl"))


def read(files: Iterable[str | Path]) -> list[Run]:
    """The runs of `files`. Raises UsageError, naming file and line, for what cannot be read or is no measured run."""
    return [run for file in files for run in _read(Path(file))]


def _read(file: Path) -> list[Run]:
    where = shown(str(file))
    raw = read_bytes(file, "a JSON Lines file of measured runs", "FILE", _LARGEST)
    runs = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                runs.append(_run(line, file, number))
            except ValueError as error:
                raise UsageError(f"line {number} of {where} is no measured run: {error} (FILE)") from None
    if not runs:
        raise UsageError(f"{where} holds no measured run (FILE)")
    return runs


def _run(line: bytes, file: Path, number: int) -> Run:
    """Raises ValueError that says what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    outcome = row.get("outcome", "ok")
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome is {shown(outcome)}, not {' or '.join(OUTCOMES)}")
    figures: dict[str, float | None] = {name: _size(row, theirs) for name, (_, theirs) in FIGURES.items()}
    figures[STEP] = _step_s(row)
    if outcome == "ok" and figures["allocated"] is None:
        raise ValueError("it has no peak_allocated_bytes")
    options, stack = _field(row, "options", dict), _field(row, "stack", dict)
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{shown(name)} is no option of a plan")
    return Run(
        id=_field(row, "id", str),
        file=file.name,
        line=number,
        config=_field(row, "config", dict),
        options=options,
        gpu=_field(row, "gpu", str),
        compute_capability=_capability(row),
        stack={package: version for package, version in stack.items() if package in KNOWN},
        outcome=outcome,
        limit_bytes=_size(row, "limit_bytes"),
        trainable_parameters=_size(row, "trainable_parameters"),
        figures={name: size for name, size in figures.items() if size is not None},
    )


def _field(row: dict[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if value is None:
        raise ValueError(f"it has no {name}")
    if kind is dict and not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not an object")
    if kind is str and not (isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST):
        raise ValueError(f"{name} is {shown(value)}, not a text of at most {_LONGEST} characters")
    return value


def _capability(row: dict[str, Any]) -> str | None:
    value = row.get("compute_capability")
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9]{1,2}\.[0-9]", value)):
        raise ValueError(f"compute_capability is {shown(value)}, not a text such as 8.6")
    return value


def _step_s(row: dict[str, Any]) -> float | None:
    """Seconds of a settled step, None where a run has no second one."""
    steps = row.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"steps is {shown(steps)}, not a list of objects")
    times = [step["step_s"] for step in steps[1:] if step.get("step_s") is not None]
    for time in times:
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 < time < _LONGEST_S:
            raise ValueError(f"step_s is {shown(time)}, not seconds above 0")
    return median(times) if times else None


def _size(row: dict[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST_BYTES:
        raise ValueError(f"{name} is {shown(value)}, not a whole number above 0")
    return value


# ------------------------------------------------------------------------------------------------------------- scoring


def score(run: Run) -> Score:
    """The run's plan against it. What cannot be planned is a score too.

    A plan that runs out of memory where the run did not has figures up to there only, and no errors.
    """
    try:
        card = catalog.gpu(run.gpu)
        if card.compute_capability is None:
            card = replace(card, compute_capability=run.compute_capability)
        made = plan(run.config, gpu=card, stack=run.stack, calibration=False, **run.options)
        found = made.memory
        if run.limit_bytes is not None:
            found = memory.estimate(made.architecture, made.options, made.device, made.counts, run.limit_bytes)
    except UsageError as error:
        return Score(run, failed=str(error))
    fits = not found.out_of_memory if run.limit_bytes is not None else made.fit is None or made.fit.fits
    measured = dict(run.figures) if run.outcome == "ok" and not found.out_of_memory else {}
    planned: dict[str, float] = {name: getattr(found, attribute) for name, (attribute, _) in FIGURES.items()}
    if made.time:
        planned[STEP] = made.time.step_s
    if "paged" in made.options.optimizer:  # managed memory lies on the device while there is room, and in no plan
        measured.pop("device", None)
    return Score(
        run,
        {name: planned[name] / size - 1 for name, size in measured.items() if name in planned},
        None if run.trainable_parameters is None else made.counts.trainable == run.trainable_parameters,
        fits == (run.outcome == "ok"),
    )


def spread(errors: Sequence[float]) -> Spread:
    """The spread of at least one error."""
    sizes = sorted(map(abs, errors))
    p95 = sizes[min(len(sizes) - 1, int(len(sizes) * 0.95))]
    return Spread(len(sizes), median(sizes), p95, max(errors, key=abs), median(errors))


def spreads(scores: Iterable[Score]) -> dict[str, dict[str, Spread]]:
    """The spread of each figure, for all methods together and for each."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in (*FIGURES, STEP)}
    for each in scores:
        for name, error in each.errors.items():
            for group in ("all", each.method):
                found[name].setdefault(group, []).append(error)
    return {name: {group: spread(errors) for group, errors in groups.items()} for name, groups in found.items()}


def parse_tolerance(given: str) -> dict[str, float]:
    """Shares by figure of "2" (percent of peak allocated memory) or "allocated=1.5,reserved=5"; raises UsageError."""
    found: dict[str, float] = {}
    for part in given.split(","):
        name, equals, percent = part.rpartition("=")
        name = name.strip() if equals else "allocated"
        if name not in (*FIGURES, STEP):
            raise unknown("figure", name, (*FIGURES, STEP), "--tolerance")
        try:
            share = float(percent) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf") or name in found:
            raise UsageError(
                f"{shown(given)} is no tolerance; write percent, such as 2 or allocated=1.5,reserved=5 (--tolerance)"
            )
        found[name] = share
    return found


def to_dict(scores: Sequence[Score], tolerance: dict[str, float] | None) -> dict[str, Any]:
    """The scores as JSON; errors and tolerances are shares. `beyond` is null where no tolerance was given."""
    exact = [each.trainable_exact for each in scores if each.trainable_exact is not None]
    return {
        "runs": len(scores),
        "planned": sum(not each.failed for each in scores),
        "trainable_told": len(exact),
        "trainable_exact": sum(exact),
        "out_of_memory": sum(each.run.outcome != "ok" for each in scores),
        "fits_as_measured": sum(each.fits_as_measured is True for each in scores),
        "dangerous": sum(each.dangerous for each in scores),
        "errors": {
            name: {group: found._asdict() for group, found in groups.items()}
            for name, groups in spreads(scores).items()
        },
        "tolerance": tolerance,
        "beyond": None if tolerance is None else sum(bool(each.beyond(tolerance)) for each in scores),
        "scores": [
            {
                "id": each.run.id,
                "file": each.run.file,
                "line": each.run.line,
                "method": each.method,
                "outcome": each.run.outcome,
                "errors": each.errors,
                "trainable_exact": each.trainable_exact,
                "fits_as_measured": each.fits_as_measured,
                "failed": each.failed or None,
                "beyond": None if tolerance is None else each.beyond(tolerance),
            }
            for each in scores
        ],
    }
