"""What `vramplan trace` answers: a dry run of the real training, replayed, beside the plan of the same question.

Where the planner does not know an architecture, the trace is the answer, and kept for later plans (planner/traces.py).
Torch and transformers are imported when the run begins: a wrong question is answered before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest import mock

from vramplan import __version__
from vramplan.planner import catalog, memory, traces
from vramplan.planner.device import device
from vramplan.planner.errors import Failure, UnknownArchitecture, UsageError, reason
from vramplan.planner.fit import judged
from vramplan.planner.plan import abilities, fits, memory_dict
from vramplan.planner.plan import plan as make_plan
from vramplan.planner.sources import resolve_model
from vramplan.planner.stack import installed, parse_stack
from vramplan.planner.training import parse_options, refuse_phases

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from vramplan.planner.device import Device
    from vramplan.planner.fit import Fit
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.plan import Plan
    from vramplan.planner.sources import ModelReference
    from vramplan.planner.stack import Stack
    from vramplan.planner.training import TrainingOptions
    from vramplan.probes.compare import Divergence
    from vramplan.probes.dryrun import Traced

# What the rows of a trace's breakdown stand on, in their order.
_SOURCES = {name: f"the model's own code, run on fake tensors: {name}" for name in memory.SOURCES} | {
    "cuBLAS workspace": memory.SOURCES["cuBLAS workspace"],
    "block rounding": memory.SOURCES["block rounding"],
}
_MOST_LAYERS = 1000  # nothing near it exists; some config classes take a minute for more
_SHOWN = 5  # of the largest divergences


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Trace:
    """One traced run, and its plan where the planner knows the architecture.

    `asked` are the options as they were given, `options` as this model takes them; `seen` is the run itself.
    `divergences` are the tensors in which trace and plan differ, in the order of the step.
    """

    model: ModelReference
    asked: TrainingOptions
    options: TrainingOptions
    stack: Stack
    device: Device
    seen: Traced
    memory: MemoryEstimate
    fit: Fit | None
    gpus: tuple[Fit, ...]
    plan: Plan | None
    divergences: tuple[Divergence, ...]

    def to_dict(self) -> dict[str, Any]:
        """The trace as JSON in the shape of Plan.to_dict, with the plan's memory and the differences under "plan"."""
        config = self.model.config.get("text_config", self.model.config)
        known = self.plan.to_dict() if self.plan else {}
        return {
            "model": known.get("model")
            or {
                "name": self.model.name,
                "source": self.model.source,
                "detail": self.model.detail,
                **{name: config.get(name) for name in _FACTS},
                "verified": None,
                "assumed": [],
            },
            "options": {
                **self.options.as_dict(),
                "gpu": self.device.gpu.name if self.device.gpu else None,
                "stack": dict(self.stack.versions),
            },
            "parameters": {
                "total": self.seen.total,
                "trainable": self.seen.trainable,
                "frozen": self.seen.total if self.options.lora else 0,
                "adapter_bytes": known["parameters"]["adapter_bytes"] if known else None,
                "adapted_modules": self.seen.adapted_modules,
            },
            "memory": memory_dict(self.memory),
            "time": {},
            "gpu": self.fit.to_dict() if self.fit else None,
            "gpus": [fit.to_dict() for fit in self.gpus],
            "sizes": known.get("sizes", []),
            "cost": [],
            "warnings": known.get("warnings", []),
            "calibration": known.get("calibration", {}),
            "vramplan_version": __version__,
            "witness": "trace",
            "plan": self._beside(known["memory"]) if known else None,
        }

    def _beside(self, planned: dict[str, Any]) -> dict[str, Any]:
        from vramplan.probes.compare import largest

        ours = {part["name"]: part["bytes"] for part in planned["components"]}
        theirs = {part.name: part.bytes for part in self.memory.components}
        return {
            "memory": planned,
            "differences": {
                "components": [
                    {"name": name, "planned_bytes": ours.get(name, 0), "traced_bytes": theirs.get(name, 0)}
                    for name in memory.SOURCES
                    if name in ours or name in theirs
                ],
                "tensors": len(self.divergences),
                "first": self.divergences[0]._asdict() if self.divergences else None,
                "largest": [{**found._asdict(), "occurs": times} for found, times in largest(self.divergences, _SHOWN)],
            },
        }


_FACTS = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


def trace(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    gpu: str | None = None,
    stack: str | Mapping[str, object] | None = None,
    calibration: bool = True,
    **options: Any,
) -> Trace:
    """Runs the training that a plan would plan, on fake tensors; arguments as `plan`'s.

    The versions are those that are installed. Raises UsageError for a wrong question or for what only a GPU can show,
    and Failure where a package is missing.
    """
    refuse_phases(options, "a trace")
    asked = parse_options(options)
    if asked.num_gpus > 1:
        raise UsageError(f"num_gpus is {asked.num_gpus}, and a trace runs on one; leave --num-gpus out")
    versions = _installed_only(stack)
    card = None if gpu is None else catalog.gpu(gpu)
    reference = resolve_model(model)
    try:
        planned = make_plan(model, gpu=gpu, calibration=calibration, **options)
    except UnknownArchitecture:
        planned = None
    run = planned.options if planned else asked
    on = planned.device if planned else device(card, versions)
    _refuse(run, reference.config)
    _need(run)
    _import()
    from vramplan.probes import compare, dryrun

    try:
        seen = dryrun.run(reference.config, run, on, planned.counts if planned and run.lora else None)
    except UsageError:
        if planned or "attention" in run.given:
            raise
        run = replace(run, attention="eager")  # what transformers takes where a model has no sdpa
        seen = dryrun.run(reference.config, run, on)

    def replayed(limit_bytes: int | None = None) -> MemoryEstimate:
        return memory.replay(seen, run, on, _SOURCES, limit_bytes)

    found = replayed()
    found = replace(found, notes=_notes(on, seen, planned))
    fit = judged(card, found, replayed, abilities(run)) if card else None
    return Trace(
        model=reference,
        asked=asked,
        options=run,
        stack=versions,
        device=on,
        seen=seen,
        memory=found,
        fit=fit,
        gpus=fits(found, on, run, versions, fit),
        plan=planned,
        divergences=compare.divergences(compare.of_plan(planned), dryrun.recording(seen)) if planned else (),
    )


def answer(model: Any, **asked: Any) -> dict[str, Any]:
    """`trace` as a dict; where the planner does not know the architecture it is kept for later plans."""
    made = trace(model, **asked)
    found = made.to_dict()
    if made.plan is None:
        try:
            traces.keep(_key(made), found)
        except OSError as error:
            found["warnings"].append(f"the trace could not be kept in {str(traces.folder())!r}: {reason(error)}")
    return found


def _key(made: Trace) -> str:
    gpu = made.device.gpu.name if made.device.gpu else None
    return traces.key(made.model.config, made.asked, gpu, made.stack.versions)


def _installed_only(stack: str | Mapping[str, object] | None) -> Stack:
    versions, here = parse_stack(stack), installed()
    for package in sorted(versions.named):
        asked = versions.versions[package]
        if here.get(package, asked).split("+")[0].split(".")[:2] != asked.split("+")[0].split(".")[:2]:
            raise UsageError(
                f"a trace runs what is installed, {package} {here[package]} and not {asked}; leave --stack out"
            )
    return versions


def _refuse(run: TrainingOptions, config: Mapping[str, Any]) -> None:
    for fields in (config, config.get("text_config")):
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if "layer" in name and isinstance(value, int) and value > _MOST_LAYERS:
                raise UsageError(f"{name} is {value:,}, and a trace runs at most {_MOST_LAYERS:,} layers")
    if run.trainer != "transformers":
        raise UsageError(
            f"a trace runs transformers.Trainer's step, and the trainer is {run.trainer}; add --trainer transformers"
        )
    if run.attention == "flash_attention_2" and run.padded:
        raise UsageError(
            "flash_attention_2 packs padded rows by their lengths, and a trace has no values; add --no-padded"
        )


def _need(run: TrainingOptions) -> None:
    needed = ["torch", "transformers", "accelerate", "peft"]
    if run.bitsandbytes:
        needed.append("bitsandbytes")
    if lacking := [name for name in needed if find_spec(name) is None]:
        raise Failure(
            f"a trace runs the real code, and {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not "
            "installed; pip install 'vramplan[probe]'"
        )


def _import() -> None:
    """torch, transformers and the rest, without torch's compiler: what would be compiled is never run here."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return (lambda inner: inner) if function is None else function

    with mock.patch.object(torch, "compile", as_it_is), mock.patch.object(torch.compiler, "disable", as_it_is):
        if find_spec("bitsandbytes") is not None:
            import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import transformers
    transformers.logging.set_verbosity_error()  # stderr is for what the user can mend


def _notes(on: Device, seen: Traced, planned: Plan | None) -> tuple[str, ...]:
    notes = [] if planned is None else list(planned.memory.notes)
    if planned is None:
        notes.append("the planner does not know this architecture: this is the trace's answer, with no plan beside it")
        if on.gpu is None:
            notes.append("no GPU is named: attention kernel, workspaces and CUDA context are those of an H200 (--gpu)")
        if seen.paged_bytes:
            notes.append("paged optimizer states are in none of these figures")
    return tuple(notes)
