"""A training step of the real model, adapter and optimizer, run without a GPU and without weights.

transformers, PEFT, bitsandbytes and torch's optimizers run their own code on fake tensors: `storages.py` sees what they
allocate, `standins.py` says what stands in for CUDA. The events are replayed through the allocator as a plan's are. So
a trace is a second witness for a plan, and the only one for an architecture that the planner does not know.

Forward and backward run once, twice where gradients are accumulated; the optimizer runs twice, since its first step
makes its states. Later steps repeat these events.

Sources: transformers/trainer.py (_run_epoch, training_step, compute_loss, create_optimizer), accelerate/accelerator.py
(prepare_model, backward, clip_grad_norm_), accelerate/utils/operations.py (convert_outputs_to_fp32).
"""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import types
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.utils._python_dispatch import _disable_current_modes

from vramplan.planner.errors import Failure, UsageError
from vramplan.planner.loading import nf4_tensors
from vramplan.planner.run import Program, Stretch, alive
from vramplan.planner.step import NOWHERE
from vramplan.probes import standins, workload
from vramplan.probes.compare import Recording
from vramplan.probes.storages import HEAD, Storages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vramplan.planner.device import Device
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.training import TrainingOptions

_RUN = 2  # micro-steps that are run: from the second on they are alike


@dataclass(slots=True)
class Traced:
    """What was seen, in the shape of planner/run.py's Run: `loading` and each `step` are events over one `program`.

    `twins` are the tensors of a batch with those that stand for them in every second step: a batch goes when the next
    one is there.
    """

    program: Program
    loading: tuple[Stretch, Stretch, Stretch]
    pieces: dict[str, list[Stretch]]
    twins: dict[int, int]
    accumulation: int
    total: int
    trainable: int
    adapted_modules: int
    paged_bytes: int
    _alive: set[int] = field(default_factory=set)

    def step(self, number: int) -> list[Stretch]:
        """Optimizer step `number`, from 0; to be asked for in turn."""
        if number == 0:
            self._alive = alive(event for stretch in self.loading for event in stretch.events)
        old = self.twins.keys() & self._alive or set(self.twins.values()) & self._alive
        [batch] = self._play("batch", number % 2)
        batch.events.extend(2 * i + 1 for i in sorted(old))
        self._alive -= old
        out = [batch, *self._play("first micro-step")]
        for _ in range(self.accumulation - 1):
            out += self._play("later micro-steps")
        return out + self._play("first update" if number == 0 else "later updates") + self._play("gradients let go")

    def _play(self, piece: str, twin: int = 0) -> list[Stretch]:
        """A piece's events as they come now: what stays is made once, and nothing goes twice."""
        held, out = self._alive, []
        for name, events in ((stretch.name, stretch.events) for stretch in self.pieces[piece]):
            played = []
            for event in events:
                tensor = self.twins.get(event >> 1, event >> 1) if twin else event >> 1
                if event & 1 and tensor in held:
                    held.discard(tensor)
                    played.append(2 * tensor + 1)
                elif not event & 1 and tensor not in held:
                    held.add(tensor)
                    played.append(2 * tensor)
            out.append(Stretch(name, played))
        return out


def run(
    config: Mapping[str, Any], options: TrainingOptions, on: Device, counts: ParameterCounts | None = None
) -> Traced:
    """Runs the training that `options` describe on fake tensors.

    `counts` say what LoRA's "attention" and "mlp" mean for this architecture. Raises UsageError for what transformers
    or PEFT refuse, and Failure for a model whose code needs values or a GPU's own kernels.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is told once, below
    rows = workload.Rows(2, options)  # any tokens; the first row is never padded
    batches = [
        {name: torch.stack([rows[i + 1][name] for i in range(options.batch_size)]) for name in rows[0]}
        for _ in range(min(options.gradient_accumulation_steps, _RUN))
    ]
    if find_spec("bitsandbytes") is not None:
        importlib.import_module("bitsandbytes")  # before its stand-ins
    gc.disable()
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            instead = stack.enter_context(standins.in_place_of_cuda(on))
            model, dtypes = _on_meta(config, options, counts)
            try:
                with Storages(instead) as seen:
                    standins.calibrate(seen)
                    return _Training(model, dtypes, options, seen).traced(batches)
            except UsageError:
                raise
            except Exception as error:
                raise Failure(
                    f"the code of {config['model_type']} cannot run on tensors without values "
                    f"({type(error).__name__}: {_first_line(error)}); measure it with vramplan probe"
                ) from error
    finally:
        gc.enable()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def recording(traced: Traced, step: int = 1) -> Recording:
    """The events of optimizer step `step`, to be held against a plan's (compare.of_plan)."""
    played = [*traced.loading, *(stretch for number in range(step) for stretch in traced.step(number))]
    before = alive(event for stretch in played for event in stretch.events)
    events: list[int] = []
    phases: list[tuple[int, str]] = []
    for stretch in traced.step(step):
        phases.append((len(events), stretch.name))
        events += stretch.events
    program = traced.program
    start = sum(program.sizes[i] for i in before)
    return Recording(events, program.sizes, program.labels, program.scopes, start, phases)


def _on_meta(
    config: Mapping[str, Any], options: TrainingOptions, counts: ParameterCounts | None
) -> tuple[Any, dict[int, torch.dtype]]:
    """The model with its adapter, on the meta device; and the dtype in which each base weight is loaded, by its id."""
    try:
        model = _base(workload.hf_config(config, options), options)
        dtypes = {id(p): p.dtype for p in model.parameters()}
        with torch.device("meta"):
            model = workload.adapt(model, options, workload.lora_config(options, counts))
    except UsageError:
        raise
    except Exception as error:  # of transformers' and PEFT's own checks
        raise UsageError(
            f"transformers {transformers.__version__} and PEFT cannot build this {config['model_type']}: "
            f"{_first_line(error)}"
        ) from error
    return model, dtypes


def _base(cfg: transformers.PretrainedConfig, options: TrainingOptions) -> transformers.PreTrainedModel:
    if options.method == "qlora":
        model, quant = workload.with_4bit_linears(cfg, options)
        workload.mark_quantised(model, quant)
        return model
    with torch.device("meta"):
        return workload.from_config(cfg, options)


class _Training:
    """One run on fake tensors: loading, a step, and what later steps do otherwise."""

    def __init__(self, model: Any, dtypes: dict[int, torch.dtype], options: TrainingOptions, seen: Storages) -> None:
        self.model, self.options, self.seen = model, options, seen
        self.parts: dict[int, str] = {}
        self.total = sum(p.numel() for p in model.parameters() if id(p) in dtypes)
        self.loading = self._load(dtypes)

    # --- loading ------------------------------------------------------------------------------------------------

    def _load(self, dtypes: dict[int, torch.dtype]) -> tuple[Stretch, Stretch, Stretch]:
        """Puts fake weights in the place of those on the meta device, in the order of planner/loading.py."""
        made: dict[int, Any] = {}
        places = [
            (module, name, p) for module in self.model.modules() for name, p in module._parameters.items()
            if p is not None
        ]  # fmt: skip
        for _, _, p in places:
            if id(p) in dtypes and id(p) not in made:
                made[id(p)] = self._loaded(p, dtypes[id(p)])
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._part(torch.empty(buffer.shape, dtype=buffer.dtype), "weights")
        loaded = self._taken()
        for _, _, p in places:
            if id(p) in dtypes and made[id(p)].dtype not in (p.dtype, torch.uint8):
                made[id(p)] = self._weight(p, p.dtype, "weights")
        prepared = self._taken()
        for _, _, p in places:
            if id(p) not in dtypes and id(p) not in made:
                made[id(p)] = self._weight(p, p.dtype, "adapter")
        for module, name, p in places:
            module._parameters[name] = made[id(p)]
        del made
        return Stretch("loading", loaded), Stretch("k-bit preparation", prepared), Stretch("adapter", self._taken())

    def _part(self, tensor: Any, part: str) -> Any:
        name = self.seen.id_of(tensor)
        if name is not None:
            self.parts[name] = part
        return tensor

    def _weight(self, like: Any, dtype: torch.dtype, part: str) -> Any:
        return torch.nn.Parameter(
            self._part(torch.empty(like.shape, dtype=dtype), part), requires_grad=like.requires_grad
        )

    def _loaded(self, p: Any, dtype: torch.dtype) -> Any:
        if type(p).__name__ != "Params4bit":
            return self._weight(p, dtype, "weights")
        from bitsandbytes.functional import QuantState

        dtype = workload.DTYPES[self.options.weights_dtype]  # bitsandbytes' own modules are built in float32
        plain = torch.empty(p.shape, dtype=dtype)  # goes when the weight is quantised
        part = "weights, 4 bit"
        sizes = dict(nf4_tensors(p.numel(), self.options.double_quant))

        def make(label: str, itemsize: int = 4) -> Any:
            dtypes = {1: torch.uint8, 4: torch.float32}
            shape = () if label == "absmax offset" else (sizes[label] // itemsize,)
            return self._part(torch.empty(shape, dtype=dtypes[itemsize]), part)

        packed = make("weight, 4 bit", 1).view(-1, 1)
        state = {"shape": p.shape, "code": make("NF4 code"), "blocksize": 64, "quant_type": "nf4", "dtype": dtype}
        if self.options.double_quant:
            nested = QuantState(
                absmax=make("absmax of absmax, float32"), code=make("absmax code"), blocksize=256, dtype=torch.float32
            )
            absmax, offset = make("absmax, 8 bit", 1), make("absmax offset")
            quantised = QuantState(absmax=absmax, offset=offset, state2=nested, **state)
        else:
            quantised = QuantState(absmax=make("absmax, float32"), **state)
        del plain
        weight = torch.nn.Parameter(packed, requires_grad=False)
        weight.quant_state = quantised
        return weight

    def _taken(self) -> list[int]:
        """The events since the last time."""
        events = self.seen.events.copy()
        self.seen.events.clear()
        self.seen.phases.clear()
        return events

    # --- training -----------------------------------------------------------------------------------------------

    def traced(self, rows: list[dict[str, torch.Tensor]]) -> Traced:
        """Runs the training on these micro-batches."""
        seen, options, model = self.seen, self.options, self.model
        model.train()
        model.config.use_cache = False
        if options.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise UsageError(
                    f"transformers cannot checkpoint {model.config.model_type}; add --no-gradient-checkpointing"
                )
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        base = model.get_base_model() if options.lora else model
        adapted = sum(hasattr(module, "lora_A") for module in model.modules())
        batches = self._batches(base, rows)
        pieces = {"batch": self._stretches("batch")}
        twins = self._twins(batches)
        with seen.watch(model, _layers(base)):
            for name, (batch, items) in zip(("first micro-step", "later micro-steps"), batches, strict=False):
                self._micro_step(batch, items)
                pieces[name] = self._stretches("forward, embeddings")
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is not None:
                self._part(p.grad, "gradients")
        optimizer = self._optimizer()
        before = seen.living()
        for name in ("first update", "later updates"):
            norm = self._update(optimizer, trained)
            pieces[name] = self._stretches("gradient clipping")
            del norm
            if name == "first update":
                self.parts |= dict.fromkeys(seen.living() - before, "optimizer states")
        optimizer.zero_grad()
        pieces["gradients let go"] = self._stretches("gradients let go")
        return Traced(
            program=self._program(),
            loading=self.loading,
            pieces=pieces,
            twins=twins,
            accumulation=options.gradient_accumulation_steps,
            total=self.total,
            trainable=sum(p.numel() for p in trained),
            adapted_modules=adapted,
            paged_bytes=seen.paged_bytes,
        )

    def _stretches(self, first: str) -> list[Stretch]:
        """The events since the last time, by phases; they begin with `first`."""
        phases = [(0, first), *self.seen.phases]
        events = self._taken()
        ends = [at for at, _ in phases[1:]] + [len(events)]
        return [Stretch(name, events[at:end]) for (at, name), end in zip(phases, ends, strict=True)]

    def _batches(self, base: Any, rows: list[dict[str, torch.Tensor]]) -> list[tuple[dict[str, Any], Any]]:
        """Micro-batches on the GPU, each with the number of labels that transformers.Trainer counts in all of them."""
        found = [
            {name: self._part(self.seen.valued(tensor, name), "batch") for name, tensor in batch.items()}
            for batch in rows
        ]
        items = None
        if _accepts_loss_kwargs(base):
            items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in found)
            self._part(items, "batch")
        return [(batch, items) for batch in found]

    def _twins(self, batches: Sequence[tuple[dict[str, Any], Any]]) -> dict[int, int]:
        tensors = [t for batch, items in batches for t in (*batch.values(), *([] if items is None else [items]))]
        ids = dict.fromkeys(name for t in tensors if (name := self.seen.id_of(t)) is not None)
        twins = {name: self.seen.twin(name) for name in ids}
        self.parts |= dict.fromkeys(twins.values(), "batch")
        return twins

    def _micro_step(self, batch: dict[str, Any], items: Any) -> None:
        """training_step: forward, loss, backward."""
        seen, dtype = self.seen, workload.DTYPES.get(self.options.mixed_precision)
        kwargs = {} if items is None else {"num_items_in_batch": items}

        def forward() -> Any:
            with ExitStack() as modes:
                if dtype is not None:  # PEFT asks whether CUDA's is on, the CPU's acts on fake tensors
                    modes.enter_context(torch.autocast("cuda", dtype))
                    modes.enter_context(torch.autocast("cpu", dtype))
                return self.model(**batch, **kwargs)

        if dtype is not None:
            from accelerate.utils.operations import convert_outputs_to_fp32

            forward = convert_outputs_to_fp32(forward)
        seen.outside = HEAD
        outputs = forward()
        loss = outputs["loss"]
        del outputs
        if items is None:
            loss = loss / self.options.gradient_accumulation_steps
        loss = loss / 1  # accelerate divides by its own number of steps, which the Trainer leaves at 1
        if dtype == torch.float16:
            loss = loss * torch.full((), 65536.0)  # GradScaler.scale
        seen.phase("loss, backward")
        seen.backward = True
        loss.backward()
        seen.backward = False
        del loss
        seen.outside = ""

    def _optimizer(self) -> Any:
        """transformers.Trainer's own: its groups, its class."""
        trainer = object.__new__(transformers.Trainer)
        trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = self.model, None, None
        trainer.args = types.SimpleNamespace(
            optim=self.options.optimizer, optim_args=None, optim_target_modules=None, learning_rate=1e-5,
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        )  # fmt: skip
        with _disable_current_modes():  # bitsandbytes works its tables of values out
            return trainer.create_optimizer()

    def _update(self, optimizer: Any, trained: list[Any]) -> Any:
        """Clipping and the optimizer's step; the norm, which the Trainer keeps."""
        self.seen.phase("gradient clipping")
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.seen.phase("optimizer step")
        optimizer.step()
        return norm

    def _program(self) -> Program:
        """Every storage with what it counts as: by its part, or by the scope that made it."""
        seen = self.seen
        parts = [self.parts.get(i, "") for i in range(len(seen.sizes))]
        for i, scope in enumerate(seen.scopes):
            if seen.labels[i].startswith(standins.WORKSPACE):
                parts[i] = standins.WORKSPACE
            elif not parts[i] and (scope == HEAD or (scope == seen.head and "mm" in seen.labels[i])):
                parts[i] = "logits and loss"
        return Program(seen.sizes, seen.labels, seen.scopes, parts, [NOWHERE] * len(parts), seen.saved)


def _accepts_loss_kwargs(base: Any) -> bool:
    """transformers/trainer.py, __init__: whether the loss is scaled by the number of labels."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    kinds = [p.kind for p in inspect.signature(base.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _layers(base: Any) -> list[Any]:
    """The decoder layers: the longest list of modules, the first of equals."""
    lists = [list(module) for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])
