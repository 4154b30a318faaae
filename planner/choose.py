"""Which way to train a model: the method, the GPU and who lets it, by price and by time.

`vramplan choose`. Every method is planned on every GPU that has an offer, on one and on as many as its instances have,
and each offer is priced where the plan fits. What one GPU holds, several train by ddp, and where they do not hold that
either, by fsdp.
The options stay as asked: a larger GPU is not given a larger batch, and each of several takes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan import __version__
from vramplan.planner import catalog, cost
from vramplan.planner import prices as offering
from vramplan.planner.architecture import parse
from vramplan.planner.errors import UsageError
from vramplan.planner.sources import resolve_model
from vramplan.planner.stack import parse_stack
from vramplan.planner.training import for_method, parse_options, settle
from vramplan.planner.trial import Bench, command, one_after_another
from vramplan.planner.units import parse_duration, parse_usd

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.cost import Cost
    from vramplan.planner.prices import Offer
    from vramplan.planner.sources import ModelReference
    from vramplan.planner.stack import Stack
    from vramplan.planner.throughput import Range
    from vramplan.planner.training import TrainingOptions
    from vramplan.planner.trial import Trial

METHODS = ("qlora", "lora", "full")
_SHOWN = 12  # ways of a shortlist
_ALIKE = 1.02  # hours that differ by less are told apart by no estimate


class Tried(NamedTuple):
    """A method on a GPU or several: its verdict, and a step's seconds where it fits and the GPU's rates are known."""

    method: str
    gpu: Gpu
    num_gpus: int
    trial: Trial
    step_s: Range | None
    command: str


class Way(NamedTuple):
    """A method on one offer of a GPU that holds it, be it only just."""

    tried: Tried
    cost: Cost

    @property
    def slow_usd(self) -> float:
        """Dollars at the slow end of the time."""
        return self.cost.hours_high * self.cost.offer.usd_per_hour * self.cost.instances

    def to_dict(self) -> dict[str, Any]:
        """The way as JSON."""
        return {
            "method": self.tried.method,
            **self.cost.to_dict(),
            "only_just": not self.tried.trial.roomy,
            "headroom_bytes": self.tried.trial.fit.headroom_bytes if self.tried.trial.fit else None,
            "command": self.tried.command,
        }


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Choice:
    """All ways to train a model, the cheapest first, and which of them are within `budget_usd` and `deadline_s`.

    `tried` are all methods on all GPUs with an offer, those that fit nowhere too.
    """

    model: ModelReference
    options: TrainingOptions
    stack: Stack
    budget_usd: float | None
    deadline_s: int | None
    tried: tuple[Tried, ...]
    ways: tuple[Way, ...]
    warnings: tuple[str, ...]

    @property
    def within(self) -> tuple[Way, ...]:
        """The ways within budget and deadline by the middle of their time, the cheapest first."""
        return tuple(way for way in self.ways if self._overrun(way.cost.usd, way.cost.hours) <= 1)

    @property
    def cheapest(self) -> Way | None:
        """Of those within, of such as fit with their whole cache where there are any."""
        return next(iter(self._comfortable), None)

    @property
    def fastest(self) -> Way | None:
        """The same; of equally fast ones the cheapest."""
        return min(self._comfortable, key=lambda way: (way.cost.hours, way.cost.usd), default=None)

    @property
    def _comfortable(self) -> tuple[Way, ...]:
        return tuple(way for way in self.within if way.tried.trial.roomy) or self.within

    @property
    def closest(self) -> Way | None:
        """The way that misses budget and deadline by the least factor, where none is within."""
        return min(self.ways, key=lambda way: self._overrun(way.cost.usd, way.cost.hours), default=None)

    @property
    def shortlist(self) -> tuple[Way, ...]:
        """A table's worth of ways: the cheapest that nothing beats, with each method's cheapest and fastest.

        Where none is within, the closest, the cheapest and the fastest of all.
        """
        if self.within:
            return _shortlist(self.within, self.fastest)
        ends = [self.closest, *self.ways[:1], min(self.ways, key=lambda way: way.cost.hours, default=None)]
        return tuple(way for way in self.ways if any(way is end for end in ends))

    def certain(self, way: Way) -> bool:
        """Whether a way is within at the slow end of its time, too."""
        return self._overrun(way.slow_usd, way.cost.hours_high) <= 1

    def _overrun(self, usd: float, hours: float) -> float:
        """By which factor the worse of the two is beyond what is asked; at most 1 within."""
        factors = [0.0]
        if self.budget_usd is not None and usd > 0:
            factors.append(usd / self.budget_usd if self.budget_usd else float("inf"))
        if self.deadline_s is not None:
            factors.append(3600 * hours / self.deadline_s)
        return max(factors)

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON: every way, and by their places among them the cheapest, the fastest and the closest."""
        place = {id(way): i for i, way in enumerate(self.ways)}
        within = {id(way) for way in self.within}
        closest = None if within else self.closest
        return {
            "model": {"name": self.model.name, "source": self.model.source, "detail": self.model.detail},
            "options": {name: value for name, value in self.options.as_dict().items() if name != "method"}
            | {"stack": dict(self.stack.versions)},
            "budget_usd": self.budget_usd,
            "deadline_s": self.deadline_s,
            "ways": [
                way.to_dict() | {"within": id(way) in within, "within_if_slow": self.certain(way)} for way in self.ways
            ],
            "cheapest": place.get(id(self.cheapest)),
            "fastest": place.get(id(self.fastest)),
            "closest": place.get(id(closest)),
            "tried": [
                {
                    "method": each.method,
                    "gpu": each.gpu.name,
                    "num_gpus": each.num_gpus,
                    **{k: v for k, v in each.trial.to_dict().items() if k != "gpu"},
                }
                for each in self.tried
            ],
            "warnings": list(self.warnings),
            "vramplan_version": __version__,
        }


def unbeaten(ways: Iterable[Way]) -> tuple[Way, ...]:
    """Of ways, the cheapest first, those that no other of the same method beats in price and time at once.

    Hours within 2 % are alike. A way beats only what is no firmer: on demand is firmer than spot, one session than
    several, and fitting with the whole cache than only just.
    """
    best: list[Way] = []
    for way in ways:  # none is beaten by one that comes later and costs more
        if not any(_beats(other, way) for other in best):
            best.append(way)
    return tuple(best)


def _beats(one: Way, other: Way) -> bool:
    if one.tried.method != other.tried.method or one.cost.hours > _ALIKE * other.cost.hours:
        return False
    ours, theirs = (
        (way.cost.usd, way.cost.offer.spot, way.cost.sessions > 1, not way.tried.trial.roomy) for way in (one, other)
    )
    return all(mine <= yours for mine, yours in zip(ours, theirs, strict=True))


def _shortlist(ways: Sequence[Way], fastest: Way | None) -> tuple[Way, ...]:
    best = unbeaten(ways)
    ends = [fastest]
    for method in dict.fromkeys(way.tried.method for way in best):
        own = [way for way in best if way.tried.method == method]
        ends += [own[0], min(own, key=lambda way: way.cost.hours)]
    kept = {id(way) for way in ends}
    kept |= {id(way) for way in [way for way in best if id(way) not in kept][: max(0, _SHOWN - len(kept))]}
    return tuple(way for way in ways if id(way) in kept)


def choose(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    budget: str | None = None,
    deadline: str | None = None,
    gpu: str | None = None,
    offers: Sequence[str] = (),
    prices: str | os.PathLike[str] | None = None,
    stack: str | Mapping[str, object] | None = None,
    calibration: bool = True,
    each: Callable[[Sequence[Callable[[], Any]]], Iterable[Any]] = one_after_another,
    **options: object,
) -> Choice:
    """All ways to train `model` on what is let by the hour; arguments as `plan`'s.

    `budget` is such as "50usd", `deadline` such as "8h". `gpu` names one GPU or several, separated by commas; `offers`
    are words that an offer must hold (prices.matching); without a `method` all are tried. `each` runs the trials in
    turn, so that progress can be shown. Raises UsageError where no offer has that GPU.
    """
    budget_usd = None if budget is None else parse_usd(budget, "--budget")
    deadline_s = None if deadline is None else parse_duration(deadline, "--deadline")
    asked = {name: value for name, value in options.items() if value is not None}
    run = parse_options(asked)
    known, doubts = offering.offers(prices)
    found = _of_gpus(offering.matching(known, offers) if offers else known, gpu)
    versions = parse_stack(stack)
    reference = resolve_model(model)
    architecture = parse(reference.config)
    _, warnings = settle(run, architecture, None, versions)
    cards = [catalog.gpu(name) for name in dict.fromkeys(offer.gpu for offer in found)]
    shared: dict[Any, Any] = {}
    named = model if isinstance(model, str) else reference.name
    trials = []
    for method in [run.method] if "method" in asked else METHODS:
        question = for_method(asked, method)
        for card in cards:
            bench = Bench(architecture, card, versions, calibration, shared)
            typed = partial(command, named, gpu=card.name, stack=stack, calibration=calibration, prices=prices)
            let = sorted({offer.gpu_count for offer in found if offer.gpu == card.name} - {1})
            counts = () if {"num_gpus", "parallel"} & asked.keys() else let
            trials.append(partial(_try_all, bench, question, typed, counts))
    tried = tuple(one for several in each(trials) for one in several)
    ways = [way for one in tried for way in _ways(one, found)]
    ways.sort(key=lambda way: (way.cost.usd, way.cost.hours, way.cost.offer.provider))
    stale = offering.stale([way.cost.offer for way in ways])
    return Choice(
        model=reference,
        options=run,
        stack=versions,
        budget_usd=budget_usd,
        deadline_s=deadline_s,
        tried=tried,
        ways=tuple(ways),
        warnings=(*warnings, *doubts, *([stale] if stale else [])),
    )


def _of_gpus(found: Iterable[Offer], gpu: str | None) -> list[Offer]:
    """The offers of the GPUs that are named."""
    offers = list(found)
    if gpu is None:
        return offers
    names = [catalog.gpu(name).name for name in gpu.split(",")]
    let = {offer.gpu for offer in offers}
    for name in names:
        if name not in let:
            raise UsageError(f"no offer has {name}; offers are known of {', '.join(sorted(let))} (--gpu, --prices)")
    return [offer for offer in offers if offer.gpu in names]


def _try_all(
    bench: Bench, asked: Mapping[str, object], typed: Callable[[Mapping[str, object]], str], counts: Sequence[int]
) -> list[Tried]:
    """The question as it is, and on each number of GPUs."""
    found = [_try(bench, asked, typed)]
    parallel = "ddp" if found[0].trial.roomy else "fsdp"
    for n in counts:
        several = {**asked, "num_gpus": n}
        found.append(_try(bench, several | {"parallel": parallel}, typed))
        if parallel == "ddp" and not found[-1].trial.survives:  # which holds gradients twice
            found.append(_try(bench, several | {"parallel": "fsdp"}, typed))
    return found


def _try(bench: Bench, asked: Mapping[str, object], typed: Callable[[Mapping[str, object]], str]) -> Tried:
    trial = bench.trial(asked, closely=False)
    usable = trial.options is not None and trial.survives and trial.fit is not None and not trial.fit.lacks
    step_s = bench.span(trial.options) if usable and trial.options else None
    num_gpus = parse_options({"num_gpus": asked.get("num_gpus")}).num_gpus
    return Tried(str(asked["method"]), bench.gpu, num_gpus, trial, step_s, typed(asked))


def _ways(tried: Tried, found: Iterable[Offer]) -> list[Way]:
    options, step_s = tried.trial.options, tried.step_s
    if options is None or step_s is None:
        return []
    own = [offer for offer in found if offer.gpu == tried.gpu.name]
    return [Way(tried, made) for made in cost.costs(options, own, lambda _: True, lambda _: step_s)]
