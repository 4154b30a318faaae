"""One model on one GPU, tried with one set of options after another: what a search asks of the planner.

Every verdict is that of `plan` with the same options. Peaks that are too high without any cache are seen in a
twentieth of a replay's time (quick.py).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vramplan.planner import memory
from vramplan.planner.device import device, nccl_bytes
from vramplan.planner.errors import UsageError
from vramplan.planner.fit import fit_on, judged, room_bytes
from vramplan.planner.plan import _count, _learned, abilities
from vramplan.planner.quick import peak_bytes, steady_peak
from vramplan.planner.training import flags, parse_options, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.fit import Fit
    from vramplan.planner.layers import Architecture
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.run import Run
    from vramplan.planner.stack import Stack
    from vramplan.planner.throughput import Range, StepTime
    from vramplan.planner.training import TrainingOptions

    Events = tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[tuple[int, int], ...]]


def command(
    model: object,
    asked: Mapping[str, object],
    gpu: str | None = None,
    stack: str | Mapping[str, object] | None = None,
    calibration: bool = True,
    prices: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
) -> str:
    """The command that plans a run, ready for a shell; `model` as it was named, `name` another command than plan."""
    versions = ",".join(f"{name}={version}" for name, version in stack.items()) if isinstance(stack, Mapping) else stack
    words = ["vramplan", name, shlex.quote(str(model)), flags(asked)]
    if gpu:
        words += ["--gpu", shlex.quote(gpu)]
    if versions:
        words += ["--stack", shlex.quote(versions)]
    if not calibration:
        words.append("--no-calibration")
    if prices is not None:
        words += ["--prices", shlex.quote(os.fspath(prices))]
    return " ".join(filter(None, words))


def one_after_another(searches: Sequence[Callable[[], Any]]) -> Iterable[Any]:
    """The answers of `searches` in their order; a presenter's own shows how far they are."""
    return (search() for search in searches)


@dataclass(frozen=True, slots=True)
class Trial:
    """A set of options on a GPU; `runs_out` is the phase in which memory does, where it was looked for.

    `refused` says why there can be no such run: then there are neither options nor a fit.
    """

    options: TrainingOptions | None
    fit: Fit | None
    runs_out: str = ""
    refused: str = ""

    @property
    def roomy(self) -> bool:
        """Whether the run fits with its whole cache."""
        return self.fit is not None and self.fit.headroom_bytes >= 0

    @property
    def survives(self) -> bool:
        """Whether it fits, be it only just."""
        return self.fit is not None and self.fit.fits

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON."""
        return {
            "fits": self.survives,
            "only_just": self.survives and not self.roomy,
            "gpu": self.fit.to_dict() if self.fit else None,
            "runs_out_in": self.runs_out or None,
            "refused": self.refused or None,
        }


class Bench:
    """Tries options of a run of `architecture` on `gpu`; each is a mapping as `parse_options` takes it.

    `shared` is for benches of several GPUs and equal options: where the same events were replayed on another, that is
    the answer here.
    """

    def __init__(
        self,
        architecture: Architecture,
        gpu: Gpu,
        stack: Stack,
        calibration: bool = True,
        shared: dict[tuple[Events, bool, int | None], MemoryEstimate] | None = None,
    ) -> None:
        self.architecture, self.gpu, self.stack = architecture, gpu, stack
        self.known, self.notes = _learned(gpu, stack) if calibration else (None, ())
        self.on = device(gpu, stack, self.known)
        self.room_bytes = room_bytes(gpu, self.on)
        self._shared = shared
        self._peaks: dict[TrainingOptions, int] = {}
        self._last: tuple[TrainingOptions, Events, int] | None = None
        self._replayed: dict[tuple[TrainingOptions, int | None], MemoryEstimate] = {}

    def options(self, asked: Mapping[str, object]) -> TrainingOptions:
        """The options as this model and this GPU take them; raises UsageError where they do not."""
        return settle(parse_options(asked), self.architecture, self.gpu, self.stack)[0]

    def possible(self, asked: Mapping[str, object]) -> bool:
        """Whether the run's tensors alone would find room; False also where there can be no such run."""
        try:
            options = self.options(asked)
            return self._peak(options) <= self._room_bytes(options)
        except UsageError:
            return False

    def least_bytes(self, asked: Mapping[str, object]) -> int:
        """The run's tensors alone, and what NCCL takes: less is not to be had of a GPU's `room_bytes`."""
        options = self.options(asked)
        return self._peak(options) + self.room_bytes - self._room_bytes(options)

    def spare_bytes(self, asked: Mapping[str, object]) -> int:
        """What a run leaves of the room with its whole cache; below 0 what is too much, or no such run."""
        try:
            options = self.options(asked)
            room, played = self._room_bytes(options), self._replay(options)
            spare = room - played.most_reserved_bytes
            if spare >= 0 and played.before_reserved_bytes > room and self._replay(options, room).out_of_memory:
                return room - played.before_reserved_bytes
            return spare
        except UsageError:
            return -self.room_bytes

    def roomy(self, asked: Mapping[str, object]) -> bool:
        """Whether the run fits with its whole cache."""
        return self.possible(asked) and self.spare_bytes(asked) >= 0

    def survives(self, asked: Mapping[str, object]) -> bool:
        """Whether it fits, be it only just."""
        if not self.possible(asked):
            return False
        options = self.options(asked)
        return not self._replay(options, self._room_bytes(options)).out_of_memory

    def trial(self, asked: Mapping[str, object], closely: bool = True) -> Trial:
        """The whole verdict on a run, and where it fails how.

        Not `closely`, a run whose tensors alone are too much is not replayed: its fit says the least that it needs.
        """
        try:
            options = self.options(asked)
            room_bytes = self._room_bytes(options)
            if not closely and self._peak(options) > room_bytes:
                needed = self._peak(options) + self.gpu.budget_bytes - room_bytes
                return Trial(options, fit_on(self.gpu, needed, abilities(options)))
            played = self._replay(options)
        except UsageError as error:
            return Trial(None, None, refused=str(error))
        fit = judged(self.gpu, played, lambda room: self._replay(options, room), abilities(options))
        failing = closely and not fit.fits
        return Trial(options, fit, self._replay(options, room_bytes).out_of_memory if failing else "")

    def sharing_notes(self, options: TrainingOptions | None) -> tuple[str, ...]:
        """How several GPUs share such a run, in sentences."""
        return self._replay(options).sharing_notes if options and options.num_gpus > 1 else ()

    def time(self, options: TrainingOptions) -> StepTime | None:
        """What a step takes there; None where the GPU's rates are not known."""
        from vramplan.planner import throughput

        return throughput.time_of(throughput.work(self._run(options)), self.gpu, self.known)

    def span(self, options: TrainingOptions) -> Range | None:
        """The seconds alone."""
        from vramplan.planner import throughput

        return throughput.span_of(throughput.work(self._run(options)), self.gpu, self.known)

    def _room_bytes(self, options: TrainingOptions) -> int:
        """What PyTorch may reserve: with several GPUs NCCL has its own part."""
        return self.room_bytes - nccl_bytes(options.num_gpus, options.parallel)[0]

    def _peak(self, options: TrainingOptions) -> int:
        """Of training; 0 where that is not asked for."""
        if "training" not in options.phases:
            return 0
        if options not in self._peaks:
            shared = options.num_gpus > 1  # whose events are the quickest way to it, and are asked for next
            found = steady_peak(*self._seen(options)) if shared else peak_bytes(self._run(options))
            self._peaks[options] = found
        return self._peaks[options]

    def _seen(self, options: TrainingOptions) -> tuple[Events, int]:
        """The events of a run, and how many stretches of them are before its second step."""
        if self._last is None or self._last[0] != options:
            self._last = (options, *_events(self._run(options)))
        return self._last[1:]

    def _run(self, options: TrainingOptions) -> Run:
        return memory.run_of(self.architecture, options, self.on, _count(self.architecture, options))

    def _replay(self, options: TrainingOptions, room: int | None = None) -> MemoryEstimate:
        if (options, room) not in self._replayed:
            self._replayed[options, room] = self._replay_now(options, room)
        return self._replayed[options, room]

    def _replay_now(self, options: TrainingOptions, room: int | None) -> MemoryEstimate:
        counts = _count(self.architecture, options)
        if self._shared is None or options.phases != ("training",):  # of those the events say nothing
            return memory.estimate(self.architecture, options, self.on, counts, room)
        key = (self._seen(options)[0], options.expandable_segments, room)
        if key not in self._shared:
            self._shared[key] = memory.estimate(self.architecture, options, self.on, counts, room)
        nccl = nccl_bytes(options.num_gpus, options.parallel)[0]
        context, hidden = self.on.context_bytes + nccl, self.on.hidden_bytes
        return replace(self._shared[key], context_bytes=context, hidden_bytes=hidden, nccl_bytes=nccl)


def _events(run: Run) -> tuple[Events, int]:
    """All that the allocator is given: the events up to the second step, which later ones repeat; sizes, streams."""
    before = (*run.loading, *run.step(0))
    events = tuple([tuple(stretch.events) for stretch in (*before, *run.step(1))])
    return (events, tuple(run.program.sizes), tuple(run.program.streams.items())), len(before)
