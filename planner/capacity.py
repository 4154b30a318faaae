"""How large a run may grow on one GPU: the largest batch, sequence and rank, the method, and batch against sequence.

`vramplan fit`. Each answer is found by planning runs: a size is the largest when it fits with its whole cache and the
next one is seen not to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan import __version__
from vramplan.planner import catalog
from vramplan.planner.architecture import parse
from vramplan.planner.errors import UsageError, shown, unknown
from vramplan.planner.fit import largest, largest_with
from vramplan.planner.links import host_gpus, hosts
from vramplan.planner.sources import resolve_model
from vramplan.planner.stack import parse_stack
from vramplan.planner.training import for_gpus, for_method, parse_options, settle
from vramplan.planner.trial import Bench, command, one_after_another

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.sources import ModelReference
    from vramplan.planner.stack import Stack
    from vramplan.planner.throughput import StepTime
    from vramplan.planner.training import TrainingOptions
    from vramplan.planner.trial import Trial

    Asked = dict[str, object]

METHODS = ("full", "lora", "qlora")  # the most demanding first
OVER = ("batch_size", "seq_len", "rank", "method", "num_gpus")
ALONE = ("loading", "k-bit preparation", "adapter")  # stretches that each GPU plays as if it had no other
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_TOKENS = 2**20  # of a sequence, where the model has no limit of its own
# Sizes that are tried; of sequences up to the model's positions.
_SIZES: dict[str, Sequence[int]] = {
    "batch_size": range(1, 2**16 + 1),
    "seq_len": range(128, MOST_TOKENS + 1, 128),
    "rank": [2**i for i in range(20)],
}
_COARSE = 32
_FEWEST_TOKENS = 512  # of the frontier's sequences


class Size(NamedTuple):
    """One value of an option, and what became of it."""

    value: int
    trial: Trial


@dataclass(frozen=True, slots=True)
class Limit:
    """How far one option may grow over `sizes`, the others as asked.

    `largest` fits with its whole cache; `only_just` is the largest of those beyond it that survive by giving cache
    back, within a few percent, and `fails` the next that runs out of memory or cannot be. None is what was not met: no
    size fits, none survives so, or all do.
    """

    over: str
    sizes: Sequence[int]
    largest: Size | None
    only_just: Size | None
    fails: Size | None

    def to_dict(self) -> dict[str, Any]:
        """The limit as JSON."""
        return {
            "over": self.over,
            "tried_up_to": self.sizes[-1],
            **{name: _size_dict(getattr(self, name)) for name in ("largest", "only_just", "fails")},
        }


class Cell(NamedTuple):
    """The largest batch of sequences of `seq_len` tokens that fits with its whole cache; None where none does."""

    method: str
    seq_len: int
    batch_size: int | None
    trial: Trial | None
    time: StepTime | None

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON."""
        return {
            "method": self.method,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "headroom_bytes": self.trial.fit.headroom_bytes if self.trial and self.trial.fit else None,
            "step_s": self.time.step_s if self.time else None,
            "tokens_per_s": self.time.tokens_per_s if self.time else None,
        }


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Capacity:
    """What fits one GPU, or how many of it a run takes. `asked` is the run as it was asked for.

    `methods`, `gpus` and `frontier` are empty where not asked. `gpus` doubles to the first number that holds the run
    with its whole cache, or beyond which no more will; among them are the fewest that hold it so, and only just.
    `command` plans the run, on the fewest that hold it, be it only just, or the last.
    """

    model: ModelReference
    gpu: Gpu
    over: tuple[str, ...]
    options: TrainingOptions
    asked: Trial
    limits: tuple[Limit, ...]
    methods: tuple[tuple[str, Trial], ...]
    gpus: tuple[tuple[int, Trial], ...]
    frontier: tuple[Cell, ...]
    stack: Stack
    command: str
    warnings: tuple[str, ...]
    sharing: tuple[str, ...] = ()  # how several GPUs share the run

    @property
    def fits(self) -> bool:
        """Whether anything that was tried fits, be it only just."""
        found = [size.trial for limit in self.limits for size in (limit.largest, limit.only_just) if size]
        found += [trial for _, trial in (*self.methods, *self.gpus)]
        return any(trial.survives for trial in found) or any(cell.batch_size for cell in self.frontier)

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON; integers are bytes where a name says so."""
        return {
            "model": {"name": self.model.name, "source": self.model.source, "detail": self.model.detail},
            "options": self.options.as_dict() | {"gpu": self.gpu.name, "stack": dict(self.stack.versions)},
            "fits": self.fits,
            "asked": self.asked.to_dict(),
            "over": list(self.over),
            "limits": [limit.to_dict() for limit in self.limits],
            "methods": [{"method": method, **trial.to_dict()} for method, trial in self.methods],
            "gpus": [{"num_gpus": number, **trial.to_dict()} for number, trial in self.gpus],
            "frontier": [cell.to_dict() for cell in self.frontier],
            "command": self.command,
            "warnings": list(self.warnings),
            "vramplan_version": __version__,
        }


def _size_dict(size: Size | None) -> dict[str, Any] | None:
    return {"value": size.value, **size.trial.to_dict()} if size else None


def fit(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    gpu: str | Gpu | None,
    over: str | Sequence[str] = ("batch_size", "seq_len"),
    stack: str | Mapping[str, object] | None = None,
    calibration: bool = True,
    each: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = one_after_another,
    **options: object,
) -> Capacity:
    """How large a run of `model` may grow on `gpu`; arguments as `plan`'s.

    `over` names what is varied, each by itself with the others as asked; batch_size and seq_len together are also
    tried against each other. `each` runs the searches in turn, so that progress can be shown. Raises UsageError for
    whatever cannot be planned at any size.
    """
    names = _over(over)
    if gpu is None:
        raise UsageError("fit asks what one GPU holds, and none is named; add one, such as --gpu rtx-4090")
    card = catalog.gpu(gpu) if isinstance(gpu, str) else gpu
    versions = parse_stack(stack)
    reference = resolve_model(model)
    architecture = parse(reference.config)
    asked = {name: value for name, value in options.items() if value is not None}
    several = {"parallel": "fsdp", **asked}
    if "num_gpus" in names:
        _refuse_with_gpus(names, asked)
        asked = for_gpus(asked, 1)
    positions = _positions(architecture.config)
    if "seq_len" in names and positions < parse_options({}).seq_len:  # a default must not be beyond what is searched
        asked.setdefault("seq_len", positions)
    bench = Bench(architecture, card, versions, calibration)
    run, warnings = settle(parse_options(asked), architecture, card, versions)
    if "rank" in names and not run.lora:
        raise UsageError("full fine-tuning has no rank to vary; leave it out of --over or change --method")

    methods = METHODS if "method" in names else (run.method,)
    lengths = _lengths(run.seq_len, positions) if {"batch_size", "seq_len"} <= set(names) else []
    searches: list[tuple[str, Callable[[], Any]]] = []
    searches += [("limit", partial(_limit, bench, asked, name)) for name in names if name in _SIZES]
    searches += [("method", partial(_method, bench, asked, method)) for method in methods if "method" in names]
    if "num_gpus" in names:
        searches.append(("gpus", partial(_gpus, bench, several | asked)))
    searches += [
        ("cell", partial(_cell, bench, for_method(asked, method) | {"seq_len": length}))
        for method in methods
        for length in lengths
    ]
    found: dict[str, list[Any]] = {"limit": [], "method": [], "gpus": [()], "cell": []}
    first = bench.trial(asked)
    for (kind, _), answer in zip(searches, each([search for _, search in searches]), strict=True):
        found[kind].append(answer)
    return Capacity(
        model=reference,
        gpu=card,
        over=names,
        options=run,
        asked=first,
        limits=tuple(found["limit"]),
        methods=tuple(found["method"]),
        gpus=tuple(found["gpus"][-1]),
        frontier=tuple(found["cell"]),
        stack=versions,
        command=command(
            model if isinstance(model, str) else reference.name,
            for_gpus(several | asked, _fewest(found["gpus"][-1])) if found["gpus"][-1] else asked,
            card.name,
            stack,
            calibration,
        ),
        warnings=(*warnings, *bench.notes),
        sharing=bench.sharing_notes(found["gpus"][-1][-1][1].options if found["gpus"][-1] else first.options),
    )


def _fewest(gpus: Sequence[tuple[int, Trial]]) -> int:
    return next((number for number, trial in gpus if trial.survives), gpus[-1][0])


def _over(over: str | Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for name in (over.split(",") if isinstance(over, str) else over)]
    for name in names:
        if name not in OVER:
            raise unknown("size", name, OVER, "--over")
    if len(set(names)) < len(names):
        raise UsageError(f"{shown(','.join(names))} names a size twice (--over)")
    return tuple(names)


def _refuse_with_gpus(names: Sequence[str], asked: Asked) -> None:
    """The number of GPUs is looked for by itself, and for some way to share the work."""
    if len(names) > 1:
        others = ", ".join(name for name in names if name != "num_gpus")
        raise UsageError(f"num_gpus is varied alone, since {others} depends on it; ask one after the other (--over)")
    if "num_gpus" in asked:
        raise UsageError(f"num_gpus {asked['num_gpus']} is given, and is to be found too; leave out one (--num-gpus)")
    if asked.get("parallel") == "none":
        raise UsageError("parallel none shares the work of one GPU with no other; choose --parallel fsdp")


def _positions(config: Mapping[str, Any]) -> int:
    """The model's own limit of a sequence, else the most that is tried."""
    positions, most = config.get("max_position_embeddings"), _SIZES["seq_len"][-1]
    return min(positions, most) if isinstance(positions, int) else most


def _lengths(asked: int, positions: int) -> list[int]:
    """Sequence lengths of the frontier: powers of two up to the model's positions, and the one asked for."""
    powers = [2**i for i in range(20) if min(_FEWEST_TOKENS, positions) <= 2**i <= positions]
    return sorted({*powers, asked})


def _sizes(over: str, config: Mapping[str, Any]) -> Sequence[int]:
    if over != "seq_len":
        return _SIZES[over]
    most, every = _positions(config), _SIZES["seq_len"]
    return [size for size in every if size <= most] or range(1, most + 1)


def _limit(bench: Bench, asked: Asked, over: str) -> Limit:
    sizes = _sizes(over, bench.architecture.config)

    def sized(place: int) -> Asked:
        return asked | {over: sizes[place - 1]}

    def possible(place: int) -> bool:
        return bench.possible(sized(place))

    def tried(place: int | None) -> Size | None:
        return None if place is None else Size(sizes[place - 1], bench.trial(sized(place)))

    with_cache = largest_with(lambda place: bench.spare_bytes(sized(place)), possible, len(sizes))
    best, beyond = tried(with_cache.survives), with_cache.fails or 0
    if not beyond or not bench.survives(sized(beyond)):
        return Limit(over, sizes, best, None, tried(with_cache.fails))
    # from there on in steps of a few percent: how far runs survive by giving cache back is no size to train at
    later = sizes[beyond - 1 :: max(1, beyond // _COARSE)]
    more = largest(lambda n: bench.survives(asked | {over: later[n - 1]}), 1, len(later))
    ends = [Size(later[n - 1], bench.trial(asked | {over: later[n - 1]})) if n else None for n in more]
    return Limit(over, sizes, best, *ends)


def _method(bench: Bench, asked: Asked, method: str) -> tuple[str, Trial]:
    return method, bench.trial(for_method(asked, method))


def _gpus(bench: Bench, asked: Asked) -> list[tuple[int, Trial]]:
    """The run on one GPU, and shared by twice as many each time, until it fits with its whole cache or never will.

    Below the first power of two that holds it, and below the first that holds it so, the fewest are looked for that do,
    with as many on each host. Raises UsageError where it cannot be shared so at all.
    """
    most = host_gpus(bench.gpu)
    found: dict[int, Trial] = {}
    peaks: list[int] = []
    needs: list[int] = []

    def tried(number: int) -> Trial:
        if number not in found:
            found[number] = bench.trial(for_gpus(asked, number))
        return found[number]

    def fewest(number: int, holds: Callable[[Asked], bool]) -> None:
        least = number // 2
        more = largest(lambda n: not holds(for_gpus(asked, least + n)), 1, number - least).fails
        assert more is not None  # the last of them is `number`
        few = least + more
        alike = few + -few % hosts(few, most)
        tried(alike if holds(for_gpus(asked, alike)) else few)

    holding = 0
    for number in GPUS:
        trial = tried(number)
        if number > 1 and trial.refused:
            raise UsageError(trial.refused)
        if trial.survives and not holding:
            holding = number
        if trial.roomy:
            break
        if number > 1:
            peaks.append(bench.least_bytes(for_gpus(asked, number)))
            needs.append(trial.fit.needed_bytes if trial.fit else 0)
            never = _hopeless(peaks, bench.room_bytes)
            # what is reserved falls by fits and starts: twice in a row it has to be too little
            enough = holding and all(_hopeless(to, bench.gpu.budget_bytes) for to in (needs, needs[:-1]))
            if never or enough or (loads_alone(trial) and loads_alone(found[number // 2])):
                break
    last = max(found)
    if holding > 1:
        fewest(holding, bench.survives)
    if last > holding and found[last].roomy:
        fewest(last, bench.roomy)
    return sorted(found.items())


def loads_alone(trial: Trial) -> bool:
    """Whether memory runs out while each GPU loads the model as if it had no other."""
    o = trial.options
    return o is not None and trial.runs_out in ALONE and (o.parallel != "zero3" or o.method == "qlora")


def _hopeless(peaks: Sequence[int], room_bytes: int) -> bool:
    """Whether no number of GPUs will do: what is shared halves each time, so it falls by no more than it just did."""
    return len(peaks) > 1 and peaks[-1] - max(0, peaks[-2] - peaks[-1]) > room_bytes


def _cell(bench: Bench, asked: Asked) -> Cell:
    sizes = _SIZES["batch_size"]

    def sized(size: int) -> Asked:
        return asked | {"batch_size": size}

    found = largest_with(
        lambda size: bench.spare_bytes(sized(size)), lambda size: bench.possible(sized(size)), len(sizes)
    )
    method, length = str(asked["method"]), int(str(asked["seq_len"]))
    if found.survives is None:
        return Cell(method, length, None, None, None)
    trial = bench.trial(sized(found.survives))
    return Cell(method, length, found.survives, trial, bench.time(trial.options) if trial.options else None)
