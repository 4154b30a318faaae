"""Tables of plans: every combination of lists of options, each planned by itself. `vramplan table`.

A list of values is an axis, the product of the axes are the cells, and a cell holds what the columns ask for. What a
cell's plan does not need is not worked out: parameters alone take no replay.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from vramplan.planner import catalog, prices
from vramplan.planner.architecture import parse
from vramplan.planner.cost import untimed
from vramplan.planner.errors import UsageError, shown, unknown
from vramplan.planner.plan import _count
from vramplan.planner.plan import plan as make
from vramplan.planner.sources import resolve_model
from vramplan.planner.stack import KNOWN, parse_stack
from vramplan.planner.training import OPTIONS, SHARING, flags, for_gpus, for_method, parse_options, read_value, settle
from vramplan.planner.trial import one_after_another

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from vramplan.planner.cost import Cost
    from vramplan.planner.fit import Fit
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.plan import Plan
    from vramplan.planner.prices import Offer
    from vramplan.planner.training import TrainingOptions

    Asked = dict[str, Any]
    Source = str | os.PathLike[str] | Mapping[str, Any]
    Each = Callable[[Sequence[Callable[[], Any]]], Iterable[Any]]

MOST_CELLS = 100_000
_UNPLAYED = ("examples", "tokens_per_example", "epochs", "lora_alpha")  # no event of a step depends on them
_CHUNK, _LIGHT_CHUNK = 8, 500  # cells that one task works out, with a replay each and without


class Missing(NamedTuple):
    """A value that there is not, and why."""

    why: str


class Column(NamedTuple):
    """What a table can show of a plan.

    `unit` is that of `value`: "B" (shown in GiB), "MiB" (bytes shown in MiB), "count", "%", "s", "/s", "h", "USD",
    "kWh" or "" for words. `light` is what needs no replay, `on_gpu` what needs a named GPU.
    """

    name: str
    title: str
    unit: str
    meaning: str
    value: Callable[[Answer], object]
    light: bool = False
    on_gpu: bool = False


class Axis(NamedTuple):
    """One option's values, as they are typed."""

    name: str
    values: tuple[Any, ...]


class Cell(NamedTuple):
    """One combination: each column's value or why there is none; `refused` says why there can be no such run.

    `labels` are the values on the table's axes; None where the run has no such option. `offer` is the one that hours
    and dollars are of; `calibrated` whether the plan uses what a probe learned on this machine. For a picture, `memory`
    is the plan's and `budget_bytes` what CUDA sees of its GPU where one is named.
    """

    labels: tuple[object, ...]
    values: tuple[object, ...] = ()
    refused: str = ""
    warnings: tuple[str, ...] = ()
    offer: Offer | None = None
    run: TrainingOptions | None = None
    calibrated: bool = False
    memory: MemoryEstimate | None = None
    budget_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Cells in the order of the product, the last axis fastest, and what a reader needs to trace and remake them.

    `pivot` names the axis whose values stand side by side. `missing` is how many cells were not planned because the
    table was interrupted.
    """

    axes: tuple[Axis, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    pivot: str | None
    command: str  # without --format
    date: datetime.date
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    missing: int = 0

    @property
    def varied(self) -> tuple[int, ...]:
        """The places of the axes that tell rows apart: those with several values; the model's where none has."""
        return tuple(i for i, axis in enumerate(self.axes) if len(axis.values) > 1) or (0,)


# ------------------------------------------------------------------------------------------------------- the columns


class Answer:
    """A run whose parts are worked out when a column first asks for them."""

    def __init__(self, place: _Place, gpu: str | None, stack: str, asked: Asked) -> None:
        self._place, self._gpu, self._stack, self._asked = place, gpu, stack, asked
        architecture, card = place.architecture, None if gpu is None else catalog.gpu(gpu)
        self.run, self.warnings = settle(parse_options(asked), architecture, card, parse_stack(stack))

    @cached_property
    def counts(self) -> ParameterCounts:
        """Parameters."""
        return _count(self._place.architecture, self.run)

    @cached_property
    def plan(self) -> Plan:
        """Everything that a plan says."""
        played = {name: value for name, value in self._asked.items() if name not in _UNPLAYED}
        key = (self._gpu, self._stack, *sorted(played.items()))
        if key not in self._place.plans:
            self._place.plans[key] = make(
                self._place.model, gpu=self._gpu, stack=self._stack, calibration=self._place.calibration, **played
            )
        return replace(self._place.plans[key], options=self.run, prices=self._place.prices)

    @cached_property
    def cheapest(self) -> Cost | Missing:
        """On the cheapest offer."""
        costs, _ = self.plan.costs()
        return costs[0] if costs else Missing(self.plan.unpriced())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What stands beside the GPU."""
        return {part.name: part.bytes for part in self.plan.sizes()}


def _headroom(fit: Fit) -> int:
    return fit.headroom_bytes


def _parts(*names: str) -> Callable[[Answer], int]:
    return lambda answer: sum(part.bytes for part in answer.plan.memory.components if part.name in names)


def _memory(name: str) -> Callable[[Answer], object]:
    return lambda answer: getattr(answer.plan.memory, name)


def _cost(of: Callable[[Cost], object]) -> Callable[[Answer], object]:
    return lambda answer: answer.cheapest if isinstance(answer.cheapest, Missing) else of(answer.cheapest)


def _fit(of: Callable[[Fit], object]) -> Callable[[Answer], object]:
    return lambda answer: of(cast("Fit", answer.plan.fit))


def _time(of: Callable[[Any], object]) -> Callable[[Answer], object]:
    return lambda a: (
        of(a.plan.time) if a.plan.time else Missing(untimed(a.run, a.plan.gpu.name if a.plan.gpu else "this GPU"))
    )


def _smallest(answer: Answer) -> object:
    holds = [fit.gpu for fit in answer.plan.gpus if fit.fits and not fit.lacks]
    return f"{holds[0].name} ({holds[0].memory_gb} GB)" if holds else Missing("no known GPU holds it")


def _adapter(answer: Answer) -> object:
    return answer.counts.adapter_bytes if answer.run.lora else Missing("full fine-tuning saves no adapter")


def _share(answer: Answer) -> float:
    counts = answer.counts
    return 100 * counts.trainable / (counts.total + counts.trainable) if answer.run.lora else 100.0


def _checkpoint(answer: Answer) -> object:
    size = answer.sizes.get("adapter_model.safetensors" if answer.run.lora else "model.safetensors")
    return Missing("DeepSpeed's own folder holds the weights") if size is None else size


def _electricity(answer: Answer) -> object:
    found = answer.cheapest
    if isinstance(found, Missing):
        return found
    return found.kwh if found.kwh is not None else Missing(f"the TDP of {found.offer.gpu} is not known")


def _offered(found: Cost) -> str:
    spot = " spot" if found.offer.spot else ""
    paid = found.instances * found.offer.gpu_count
    return f"{found.offer.gpu}, {found.offer.provider}{spot}" + f", {paid} GPUs" * (paid > found.num_gpus)


_CHEAPEST = "on the cheapest known offer of what holds it, which lets whole instances"
_RESERVED = "what PyTorch reserves and the CUDA context, and NCCL's buffers where there are several GPUs"
COLUMNS = {
    column.name: column
    for column in (
        Column("total", "parameters", "count", "of the base model", lambda a: a.counts.total, light=True),
        Column("trainable", "trainable", "count", "as PEFT counts", lambda a: a.counts.trainable, light=True),
        Column("trainable_percent", "trainable", "%", "of base and adapter together", _share, light=True),
        Column("adapter", "adapter", "MiB", "the file that PEFT saves", _adapter, light=True),
        Column("memory", "memory", "B", _RESERVED, _memory("device_bytes")),
        Column("allocated", "allocated", "B", "peak of the tensors", _memory("peak_allocated_bytes")),
        Column("reserved", "reserved", "B", "peak of PyTorch's allocator", _memory("peak_reserved_bytes")),
        Column("context", "context", "B", "the CUDA context", _memory("context_bytes")),
        Column("weights", "weights", "B", "at the peak, quantised or not", _parts("weights", "weights, 4 bit")),
        Column("gradients", "gradients", "B", "at the peak", _parts("gradients")),
        Column("optimizer_states", "optimizer states", "B", "at the peak", _parts("optimizer states")),
        Column("activations", "activations", "B", "saved for backward, at the peak", _parts("saved activations")),
        Column("logits", "logits and loss", "B", "at the peak", _parts("logits and loss")),
        Column("peak_phase", "peak in", "", "where allocated memory is highest", _memory("peak_phase")),
        Column("gpu", "smallest GPU", "", "the smallest known one that holds it", _smallest),
        Column(
            "fits", "fits", "", "only just means that PyTorch must give its cache back, which costs time",
            _fit(lambda fit: "no" if not fit.fits else "yes" if fit.retries is None else "only just"), on_gpu=True,
        ),
        Column("headroom", "headroom", "B", "what CUDA sees less what is needed", _fit(_headroom), on_gpu=True),
        Column("step_time", "step", "s", "one optimizer step", _time(lambda time: time.step_s), on_gpu=True),
        Column("tokens_per_s", "tokens", "/s", "in training", _time(lambda time: time.tokens_per_s), on_gpu=True),
        Column("hours", "time", "h", f"of the whole run, {_CHEAPEST}", _cost(lambda cost: cost.hours)),
        Column("cost", "cost", "USD", f"of the whole run, {_CHEAPEST}", _cost(lambda cost: cost.usd)),
        Column("kwh", "electricity", "kWh", f"at most, {_CHEAPEST}", _electricity),
        Column("offer", "offer", "", "the cheapest", _cost(_offered)),
        Column("download", "download", "B", "the base as published", lambda a: a.sizes["download"]),
        Column("checkpoint", "checkpoint", "B", "the weights' file of a checkpoint", _checkpoint),
        Column("disk", "disk", "B", "for the download and all checkpoints", lambda a: a.sizes["disk"]),
    )
}  # fmt: skip
_DEFAULT = ("memory", "gpu", "cost")
_DEFAULT_ON_GPU = ("memory", "fits", "headroom", "step_time", "cost")
_OF_AN_OFFER = {"hours", "cost", "kwh", "offer"}
_TIMED = {"step_time", "tokens_per_s", *_OF_AN_OFFER}


# ------------------------------------------------------------------------------------------------------- the product


def table(
    models: Sequence[Source],
    *,
    columns: str | Sequence[str] | None = None,
    pivot: str | None = None,
    gpu: object = None,
    stack: object = None,
    calibration: bool = True,
    prices: str | os.PathLike[str] | None = None,
    today: datetime.date | None = None,
    each: Each = one_after_another,
    drawn: bool = False,
    **options: object,
) -> Table:
    """Every combination of `models` and of the options' values, in the order they are named; arguments as `plan`'s.

    A list of values makes an axis; one set of target_modules is a text with commas, or a list inside the list. Where
    methods are compared, what a method does not have is left out of its runs. `pivot` names the axis whose values stand
    side by side. `each` works tasks out, possibly elsewhere and in any order, and yields their answers; what it does
    not yield is missing. `drawn`: cells keep what a picture of them takes. Raises UsageError for what is wrong in
    itself, and where no combination can be planned.
    """
    sources = _named(models)
    axes = [Axis("model", tuple(sources)), *_axes(options, gpu, stack)]
    if not axes[0].values:
        raise UsageError("no model is named; name one before the options, such as vramplan table llama-3.1-8b (MODEL)")
    names = {axis.name for axis in axes}
    shown_columns = _columns(columns, "gpu" in names)
    if pivot is not None and pivot not in names:
        raise unknown("axis", pivot, names, "--pivot")
    count = prod(len(axis.values) for axis in axes)
    if count > MOST_CELLS:
        raise UsageError(f"these are {count:,} cells, more than {MOST_CELLS:,}; leave values out")
    questions = [Question(i, *_asked(axes, values)) for i, values in enumerate(product(*(a.values for a in axes)))]
    chunk = _LIGHT_CHUNK if all(column.light for column in shown_columns) else _CHUNK
    tasks: list[Callable[[], list[tuple[int, Cell]]]] = []
    for model, of_model in groupby(questions, key=lambda question: question.model):
        resolved = resolve_model(sources[model])
        given = resolved.name if resolved.source == "bundled" else resolved.config
        asked, names_shown = tuple(of_model), tuple(column.name for column in shown_columns)
        for start in range(0, len(asked), chunk):
            tasks.append(partial(work, given, names_shown, calibration, prices, asked[start : start + chunk], drawn))
    found = {place: cell for answers in each(tasks) for place, cell in answers}
    cells = tuple(found.get(q.place, Cell(q.labels, refused="interrupted before it was planned")) for q in questions)
    if found and all(cell.refused for cell in found.values()):
        raise UsageError(next(iter(found.values())).refused)
    # what was not calibrated here must not be where the table is remade
    calibrated = calibration and ("gpu" not in names or any(cell.calibrated for cell in cells))
    return Table(
        axes=tuple(axes),
        columns=tuple(shown_columns),
        cells=cells,
        pivot=pivot,
        command=_command(axes, shown_columns, pivot, calibrated, None if prices is None else str(prices)),
        date=today or datetime.date.today(),
        assumptions=tuple(_assumptions(axes, shown_columns, cells)),
        warnings=tuple(_warnings(cells, prices, today)),
        missing=len(questions) - len(found),
    )


class Question(NamedTuple):
    """One combination: its place in the product, its labels, and what is asked of which model."""

    place: int
    labels: tuple[object, ...]
    model: str
    gpu: str | None
    stack: str
    asked: Asked


def work(
    model: str | Mapping[str, Any],
    columns: tuple[str, ...],
    calibration: bool,
    prices: str | os.PathLike[str] | None,
    questions: Iterable[Question],
    drawn: bool = False,
) -> list[tuple[int, Cell]]:
    """The cells of some combinations of one model, each with its place."""
    try:
        place = _Place(model, calibration, prices)
    except UsageError as error:
        return [(q.place, Cell(q.labels, refused=str(error))) for q in questions]
    return [(question.place, _cell(place, columns, question, drawn)) for question in questions]


@dataclass(slots=True)
class _Place:
    """What the cells of one model share."""

    model: str | Mapping[str, Any]
    calibration: bool
    prices: str | os.PathLike[str] | None
    architecture: Any = field(init=False)
    plans: dict[Any, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.architecture = parse(resolve_model(self.model).config)


def _cell(place: _Place, columns: tuple[str, ...], question: Question, drawn: bool) -> Cell:
    memory, budget = None, None
    try:
        answer = Answer(place, question.gpu, question.stack, question.asked)
        values = tuple(COLUMNS[name].value(answer) for name in columns)
        if drawn:
            memory, fit = answer.plan.memory, answer.plan.fit
            budget = fit.gpu.budget_bytes if fit else None
    except UsageError as error:
        return Cell(question.labels, refused=str(error))
    warnings, offer, calibrated = answer.warnings, None, False
    if _OF_AN_OFFER & set(columns) and not isinstance(answer.cheapest, Missing):
        offer = answer.cheapest.offer
    if not all(COLUMNS[name].light for name in columns):
        warnings = (*answer.plan.warnings, *answer.plan.memory.sharing_notes)
        if _TIMED & set(columns) and answer.plan.time and answer.plan.time.assumed:
            warnings += (f"{question.gpu}: {answer.plan.time.assumed}",)
        if learned := answer.plan.device.calibration:
            calibrated = True
            warnings += (f"calibrated by {learned.gpu} of the machine that made the table, {learned.date}",)
    return Cell(question.labels, values, "", warnings, offer, answer.run, calibrated, memory, budget)


def _named(models: Sequence[Source]) -> dict[str, Source]:
    """The models by their names as they were given; a config.json that is a dict has only its type's."""
    found: dict[str, Source] = {}
    for model in models:
        label = resolve_model(model).name if isinstance(model, Mapping) else str(model)
        if found.setdefault(label, model) != model:
            raise UsageError(f"two models are called {label}; give configs as files, whose names differ (MODEL)")
    return found


def _axes(options: Mapping[str, object], gpu: object, stack: object) -> Iterable[Axis]:
    for name, given in options.items():
        if given is None:
            continue
        if name not in OPTIONS:
            raise unknown("option", name, OPTIONS)
        values = given if isinstance(given, list | tuple) else [given]
        read = dict.fromkeys(read_value(OPTIONS[name], value) for value in values)
        if not read:
            raise UsageError(f"{name} names no value; give one or leave it out ({OPTIONS[name].flag})")
        yield Axis(name, tuple(read))
    if gpu is not None:
        cards: Sequence[Any] = gpu if isinstance(gpu, list | tuple) else [gpu]
        yield Axis("gpu", tuple(dict.fromkeys(catalog.gpu(card).name for card in cards)))
    stacks = stack if isinstance(stack, list | tuple) else [stack]
    yield Axis("stack", tuple(dict.fromkeys(map(_pinned, stacks))))


def _pinned(stack: Any) -> str:
    """All versions that are planned for, so that the table is the same wherever it is remade."""
    rules = parse_stack(stack)
    return ",".join(f"{package}={'.'.join(map(str, getattr(rules, package)))}" for package in KNOWN)


def _columns(given: str | Sequence[str] | None, on_gpu: bool) -> list[Column]:
    if given is None:
        return [COLUMNS[name] for name in (_DEFAULT_ON_GPU if on_gpu else _DEFAULT)]
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    for name in names:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS, "--columns")
        if COLUMNS[name].on_gpu and not on_gpu:
            raise UsageError(f"the column {name} is about one GPU; add one or several, such as --gpu rtx-4090,h100")
    return [COLUMNS[name] for name in dict.fromkeys(names)]


def _asked(axes: Sequence[Axis], values: Sequence[Any]) -> tuple[tuple[object, ...], str, str | None, str, Asked]:
    """A combination's labels, model, GPU, stack and options; what its method or one GPU does not have is left out."""
    chosen = dict(zip((axis.name for axis in axes), values, strict=True))
    asked = {name: value for name, value in chosen.items() if name in OPTIONS}
    compared = {axis.name for axis in axes if len(axis.values) > 1}
    if "method" in compared:
        asked = for_method(asked, chosen["method"])
    if "num_gpus" in compared:
        asked = for_gpus(asked, chosen["num_gpus"]) | {"num_gpus": chosen["num_gpus"]}
    labels = tuple(None if name in OPTIONS and name not in asked else value for name, value in chosen.items())
    return labels, chosen["model"], chosen.get("gpu"), chosen["stack"], asked


# ------------------------------------------------------------------------------------------------------- the caption


def typed(value: object) -> str:
    """A value as it is typed, and as it stands in a row."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _command(
    axes: Sequence[Axis], columns: Sequence[Column], pivot: str | None, calibration: bool, prices: str | None
) -> str:
    """The command that remakes the table, ready for a shell."""
    words = ["vramplan", "table", *(shlex.quote(model) for model in axes[0].values)]
    for name, values in axes[1:]:
        option = OPTIONS.get(name)
        if option and option.kind == "flag":
            words += [flags({name: value}) for value in values]
        elif name == "stack" or (option and option.kind == "names"):
            words += [f"--{name.replace('_', '-')}", *(shlex.quote(typed(value)) for value in values)]
        else:
            words += [f"--{name.replace('_', '-')}", shlex.quote(",".join(map(typed, values)))]
    words += ["--columns", ",".join(column.name for column in columns)]
    words += ["--pivot", pivot] if pivot else []
    words += [] if calibration else ["--no-calibration"]
    words += ["--prices", shlex.quote(prices)] if prices else []
    command = " ".join(words)
    if not command.isprintable():
        raise UsageError(f"{shown(command)} has characters that no caption can hold; rename what it names (MODEL)")
    return command


def _assumptions(axes: Sequence[Axis], columns: Sequence[Column], cells: Sequence[Cell]) -> Iterable[str]:
    """What all cells share, what the columns mean, and of which days the prices are."""
    single = {axis.name: axis.values[0] for axis in axes if len(axis.values) == 1 and axis.name in ("model", "gpu")}
    varied = {axis.name for axis in axes if len(axis.values) > 1}
    common = single | dict(_common([cell.run for cell in cells if cell.run], varied, columns))
    if common:
        yield "all with " + ", ".join(f"{name} {typed(value)}" for name, value in common.items())
    yield "; ".join(f"{heading(column)}: {column.meaning}" for column in columns)
    if any(column.unit in ("B", "MiB") for column in columns):
        yield "a GiB is 2^30 bytes, a MiB 2^20"
    dates = sorted({cell.offer.date for cell in cells if cell.offer})
    if dates:
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        yield f"prices of {days}" + (", partly fetched by vramplan prices refresh" if prices.cached().exists() else "")


_ALWAYS = ("method", "rank", "target_modules")
_OF_A_STEP = ("batch_size", "seq_len", "gradient_checkpointing", "optimizer")
_OF_A_RUN = ("examples", "tokens_per_example", "epochs")


def _common(runs: Sequence[TrainingOptions], varied: set[str], columns: Sequence[Column]) -> Iterable[tuple[str, Any]]:
    """The options that all runs have alike: the weightiest always, others where they are not at their default."""
    if not runs:
        return
    weighty = set(_ALWAYS)
    weighty |= set() if all(column.light for column in columns) else set(_OF_A_STEP)
    weighty |= set(_OF_A_RUN) if _OF_AN_OFFER & {column.name for column in columns} else set()
    rows = [run.as_dict() for run in runs]
    default = parse_options({"method": runs[0].method}).as_dict()
    for name, value in rows[0].items():
        alike = all(row[name] == value for row in rows) and value is not None and name not in varied
        if alike and (name in weighty or (name not in _UNPLAYED and value != default[name])):
            yield name, tuple(value) if isinstance(value, list) else value
    several = [row for row in rows if row["num_gpus"] > 1]
    if 0 < len(several) < len(rows):  # one GPU shares with none
        for name in SHARING[1:]:
            value = several[0][name]
            if name not in varied and value not in (None, default[name]) and all(row[name] == value for row in several):
                yield name, f"{typed(value)} where there are several GPUs"


def heading(column: Column) -> str:
    """A column's title with its unit."""
    unit = {"B": "GiB", "count": "", "": ""}.get(column.unit, column.unit)
    return f"{column.title}{unit}" if unit == "/s" else ", ".join(filter(None, [column.title, unit]))


def _warnings(cells: Sequence[Cell], file: str | os.PathLike[str] | None, today: datetime.date | None) -> Iterable[str]:
    yield from dict.fromkeys(warning for cell in cells for warning in cell.warnings)
    if offers := {cell.offer: None for cell in cells if cell.offer}:
        yield from prices.offers(file)[1]
        yield from filter(None, [prices.stale(offers, today)])
