"""A plan: what a training run needs, from a model and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.planner import catalog, links, memory, parameters
from vramplan.planner.architecture import parse
from vramplan.planner.device import device
from vramplan.planner.errors import UsageError, shown
from vramplan.planner.fit import Fit, fit_on, judged
from vramplan.planner.parameters import ParameterCounts
from vramplan.planner.sources import ModelReference, resolve_model
from vramplan.planner.stack import Stack, parse_stack
from vramplan.planner.trainer import adapter_dtype
from vramplan.planner.training import TrainingOptions, parse_options, settle
from vramplan.planner.versions import as_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from vramplan.planner.advice import Advice
    from vramplan.planner.calibration import Calibration
    from vramplan.planner.catalog import Gpu, Model
    from vramplan.planner.cost import Cost
    from vramplan.planner.device import Device
    from vramplan.planner.layers import Architecture
    from vramplan.planner.memory import Component, MemoryEstimate
    from vramplan.planner.run import Run
    from vramplan.planner.throughput import StepTime

_SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan:
    """What one training run needs, and what was assumed to say so.

    `gpu` is the GPU that was named, `fit` the plan on it, `time` what a step takes there; `gpus` are all known cards,
    smallest first. `bundled` is the table's row of the model, where it came from there.
    """

    model: ModelReference
    bundled: Model | None
    architecture: Architecture
    options: TrainingOptions
    stack: Stack
    device: Device
    counts: ParameterCounts
    memory: MemoryEstimate
    fit: Fit | None
    time: StepTime | None
    gpus: tuple[Fit, ...]
    warnings: tuple[str, ...]
    prices: str | os.PathLike[str] | None = None  # a file of the user's, in place of the known ones

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that was named."""
        return self.fit.gpu if self.fit else None

    def advice(self) -> tuple[Advice, ...]:
        """What would lower the peak, the best first, and what twice the batch would cost: each change is planned."""
        from vramplan.planner.advice import advise

        return advise(self.architecture, self.options, self.device, self.stack, _count)

    def costs(self) -> tuple[tuple[Cost, ...], tuple[str, ...]]:
        """What the whole run costs on each offer of a GPU that holds the plan, the cheapest first; and warnings.

        Where a GPU was named, only its offers count. Raises UsageError for a file of prices that is wrong.
        """
        from vramplan.planner import cost, prices, throughput

        found, warnings = prices.offers(self.prices)
        cards = {fit.gpu.name: fit.gpu for fit in ([self.fit] if self.fit else self.gpus) if fit.fits and not fit.lacks}
        if self.fit:
            known = throughput.Range(self.time.step_s, self.time.low_s, self.time.high_s) if self.time else None
            made = cost.costs(self.options, found, cards.__contains__, lambda _: known)
        else:
            step = throughput.work(memory.run_of(self.architecture, self.options, self.device, self.counts))
            made = cost.costs(
                self.options, found, cards.__contains__, lambda name: throughput.span_of(step, cards[name])
            )
        stale = prices.stale([each.offer for each in made])
        return made, (*warnings, *([stale] if stale else []))

    def unpriced(self) -> str:
        """Why `costs` has found none, in words."""
        from vramplan.planner import cost, prices

        if self.fit and not self.fit.fits:
            return f"{self.fit.gpu.name} does not hold it"
        if self.fit and self.fit.lacks:
            return f"{self.fit.gpu.name} cannot run it without {' and '.join(self.fit.lacks)}"
        found, _ = prices.offers(self.prices)
        if self.fit:
            return cost.unpriced(self.options, self.fit.gpu.name, found, timed=self.time is not None)
        let = {offer.gpu for offer in found}
        holding = [fit.gpu.name for fit in self.gpus if fit.fits and not fit.lacks and fit.gpu.name in let]
        if not holding:
            return "no GPU that is let by the hour holds it"
        if self.options.steps_in_deepspeed:
            return f"{cost.untimed(self.options, holding[0])}, and so no cost"
        largest = max(offer.gpu_count for offer in found if offer.gpu in holding)
        return f"what holds it is let with {largest} GPUs in one host at most; a file may have more (--prices)"

    def sizes(self) -> tuple[Component, ...]:
        """What the run needs beside the GPU: the download, host memory, checkpoints, disk."""
        from vramplan.planner import cost, sizes

        hub_total = self.bundled.hub_total if self.bundled else None
        published = sizes.published_dtype(self.model.config)
        built = as_of(self.architecture, self.stack.transformers)
        steps = cost.work(self.options).steps
        run = None
        if self.options.cpu_offload:
            run = memory.run_of(self.architecture, self.options, self.device, self.counts)
        return sizes.sizes(
            built, self.counts, self.options, steps, published, hub_total, run, links.host_gpus(self.gpu)
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON, by the contract: integers are bytes, unknown later keys are to be ignored by readers."""
        costs, doubts = self.costs()
        return {
            "model": {
                "name": self.model.name,
                "source": self.model.source,
                "detail": self.model.detail,
                "model_type": self.architecture.model_type,
                "num_hidden_layers": self.architecture.num_hidden_layers,
                "hidden_size": self.architecture.hidden_size,
                "vocab_size": self.architecture.vocab_size,
                "verified": self.bundled.verified if self.bundled else None,
                "assumed": list(self.architecture.assumed),
            },
            "options": {
                **self.options.as_dict(),
                "gpu": self.gpu.name if self.gpu else None,
                "stack": dict(self.stack.versions),
            },
            "parameters": {
                "total": self.counts.total,
                "trainable": self.counts.trainable,
                "frozen": self.counts.total if self.options.lora else 0,
                "adapter_bytes": self.counts.adapter_bytes if self.options.lora else None,
                "adapted_modules": self.counts.adapted_modules,
            },
            "memory": memory_dict(self.memory),
            "time": self.time.to_dict() if self.time else {},
            "gpu": self.fit.to_dict() if self.fit else None,
            "gpus": [fit.to_dict() for fit in self.gpus],
            "sizes": [part_dict(part) for part in self.sizes()],
            "cost": [each.to_dict() for each in costs],
            "warnings": [*self.warnings, *doubts],
            "calibration": self.device.calibration.to_dict() if self.device.calibration else {},
            "vramplan_version": __version__,
        }


def part_dict(part: Component) -> dict[str, Any]:
    """An entry of the contract's "components"."""
    return {"name": part.name, "bytes": part.bytes, "formula": part.formula, "source": part.source}


def memory_dict(memory: MemoryEstimate) -> dict[str, Any]:
    """The contract's "memory"."""
    return {
        "components": [part_dict(part) for part in memory.components],
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "context_bytes": memory.context_bytes,
        "nccl_bytes": memory.nccl_bytes,
        "device_bytes": memory.device_bytes,
        "hidden_bytes": memory.hidden_bytes,
        "needed_bytes": memory.needed_bytes,
        "peak_phase": memory.peak_phase,
        "phase": memory.phase,
        "phases": [
            {
                "name": phase.name,
                "where": phase.where,
                "peak_allocated_bytes": phase.peak_allocated_bytes,
                "peak_reserved_bytes": phase.peak_reserved_bytes,
                "device_bytes": phase.peak_reserved_bytes + memory.context_bytes,
                "peak_phase": phase.peak_phase,
                "components": [part_dict(part) for part in phase.components],
            }
            for phase in memory.phases
        ],
        "before_allocated_bytes": memory.before_allocated_bytes,
        "before_reserved_bytes": memory.before_reserved_bytes,
        "loaded_bytes": memory.loaded_bytes,
        "ready_bytes": memory.ready_bytes,
        "paged_bytes": memory.paged_bytes,
        "timeline": [
            {"phase": moment.phase, "peak_bytes": moment.peak_bytes, "end_bytes": moment.end_bytes}
            for moment in memory.timeline
        ],
        "notes": list(memory.notes),
    }


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    gpu: str | Gpu | None = None,
    stack: str | Mapping[str, object] | None = None,
    calibration: bool = True,
    prices: str | os.PathLike[str] | None = None,
    **options: object,
) -> Plan:
    """What fine-tuning `model` needs.

    `model` is a bundled name, a config.json's path or content, a model folder, or a Hub id; `gpu` a name of the table,
    a size such as "24GiB", or a Gpu; `stack` the versions to plan for; `calibration` whether to use what
    `vramplan probe` learned about that GPU on this machine; `prices` a CSV file in place of the known prices; `options`
    those of `vramplan --help`, by the same names.
    Raises UsageError, one sentence that says what to change, for whatever cannot be planned.

    >>> plan("llama-3.1-8b", method="lora", rank=16).counts.trainable
    41943040
    """
    if not isinstance(calibration, bool):
        raise UsageError(f"calibration is {shown(calibration)}; it must be true or false (--no-calibration)")
    asked = parse_options(options)
    versions = parse_stack(stack)
    card = gpu if gpu is None or isinstance(gpu, catalog.Gpu) else catalog.gpu(gpu)
    reference = resolve_model(model)
    architecture = parse(reference.config)
    run, warnings = settle(asked, architecture, card, versions)
    counts = _count(architecture, run)
    known, not_used = _learned(card, versions) if card and calibration else (None, ())
    on = device(card, versions, known)
    played = memory.run_of(architecture, run, on, counts)
    estimate = memory.estimate(architecture, run, on, counts, run=played)

    def within(limit_bytes: int) -> MemoryEstimate:
        return memory.estimate(architecture, run, on, counts, limit_bytes)

    fit = judged(card, estimate, within, abilities(run)) if card else None
    return Plan(
        model=reference,
        bundled=catalog.find_model(reference.name) if reference.source == "bundled" else None,
        architecture=architecture,
        options=run,
        stack=versions,
        device=on,
        counts=counts,
        memory=estimate,
        fit=fit,
        time=_time(played, card, known) if card else None,
        gpus=fits(estimate, on, run, versions, fit),
        warnings=(*warnings, *versions.warnings(_packages(run)), *not_used),
        prices=prices,
    )


def _time(played: Run, card: Gpu, known: Calibration | None) -> StepTime | None:
    from vramplan.planner import throughput  # only plans of a named GPU need it

    return throughput.time_of(throughput.work(played), card, known)


def _learned(card: Gpu, versions: Stack) -> tuple[Calibration | None, tuple[str, ...]]:
    from vramplan.planner import calibration  # only plans of a named GPU need it

    return calibration.load(card.name, versions)


def _count(architecture: Architecture, run: TrainingOptions) -> ParameterCounts:
    if run.lora:
        return parameters.count(
            architecture,
            run.target_modules,
            run.rank,
            lora_dropout=run.lora_dropout,
            base_dtype=_SAFETENSORS["fp32" if run.prepare_kbit else run.weights_dtype],
            adapter_dtype=_SAFETENSORS[adapter_dtype(run)],
        )
    total = architecture.total_parameters
    return ParameterCounts(total, total, targets=(), rank=0, layer_prefix=architecture.layer_prefix, names=())


def fits(
    estimate: MemoryEstimate, on: Device, run: TrainingOptions, versions: Stack, named: Fit | None
) -> tuple[Fit, ...]:
    """The run on every known card, smallest first: the same reserved memory, and each card's own context.

    `named` is the verdict on the card that was named, which was looked at more closely.
    """
    uses = abilities(run)
    smallest_first = sorted(catalog.gpus(), key=lambda gpu: (gpu.budget_bytes, gpu.name))
    devices = [on if gpu == on.gpu else device(gpu, versions) for gpu in smallest_first]
    return tuple(
        named if named and gpu == named.gpu else fit_on(gpu, _needed(estimate, each), uses)
        for gpu, each in zip(smallest_first, devices, strict=True)
    )


def _needed(estimate: MemoryEstimate, on: Device) -> int:
    """Bytes of a GPU's budget that a plan takes there: the same reserved memory, and that GPU's own context."""
    return estimate.most_reserved_bytes + on.context_bytes + estimate.nccl_bytes - on.hidden_bytes


def _packages(run: TrainingOptions) -> list[str]:
    """The packages whose behaviour this run meets."""
    used = {"peft": run.lora, "bitsandbytes": run.bitsandbytes, "trl": run.trainer == "trl"}
    return ["torch", "transformers", "accelerate", *(package for package, needed in used.items() if needed)]


def abilities(run: TrainingOptions) -> list[str]:
    """What a card must be able to do for this run, as fields of `catalog.Gpu`."""
    bf16 = "bf16" in (run.weights_dtype, run.mixed_precision)
    flash = run.attention == "flash_attention_2"
    return [*(["bf16"] if bf16 else []), *(["flash_attention_2"] if flash else [])]
