"""One training run on the local GPU, measured: what `vramplan probe` runs in a process of its own.

The counters are read at the moments that the files of tables/measured name. Peaks are PyTorch's own counters, the
device's total is NVML's, and what a tensor's kind takes is summed over the tensors themselves.
"""

from __future__ import annotations

import re
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from vramplan.planner.plan import plan
from vramplan.probes import history, probe_gpu, workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Mark(NamedTuple):
    """PyTorch's counters at a named moment: bytes allocated and reserved, their peaks since the last reset, seconds."""

    name: str
    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int
    time_s: float


class Marks(transformers.TrainerCallback):  # type: ignore[misc]
    """Marks at the moments of a run: within a step "step_begin", "before_optimizer", "after_optimizer", "step_end"."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def mark(self, name: str) -> Mark:
        """Reads the counters once the GPU has done what it was given."""
        torch.cuda.synchronize()
        cuda = torch.cuda
        counters = cuda.memory_allocated(), cuda.max_memory_allocated(), cuda.memory_reserved()
        self.marks.append(Mark(name, *counters, cuda.max_memory_reserved(), time.perf_counter()))
        return self.marks[-1]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is there; peaks start from what is held now."""
        torch.cuda.reset_peak_memory_stats()
        self.mark("step_begin")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Forward, backward and gradient clipping are done."""
        self.mark("before_optimizer")
        torch.cuda.reset_peak_memory_stats()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The optimizer's step is done, its gradients still there."""
        self.mark("after_optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Gradients are let go."""
        self.mark("step_end")


class _Sums(transformers.TrainerCallback):  # type: ignore[misc]
    """Bytes of this rank's gradients and optimizer states; of step `recorded`, PyTorch's memory history.

    Steps count from 0, and the first cannot be recorded: a step goes from the end of the one before to its own, as it
    does in a plan. `history` holds the bytes that were asked for and held when it began, labels, and events.
    """

    def __init__(self, recorded: int | None, *, unset: bool = False) -> None:
        self.recorded, self.unset = recorded, unset
        self.gradient_bytes = self.optimizer_state_bytes = 0
        self.history: tuple[int, list[str], list[list[Any]]] | None = None
        self._start_bytes = 0

    def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        if self.unset:
            workload.fill(model, optimizer)

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        made = (p.grad for p in model.parameters() if p.grad is not None)
        self.gradient_bytes = _nbytes(getattr(grad, "_local_tensor", grad) for grad in made)

    def on_step_end(self, _: Any, state: Any, *__: Any, optimizer: Any, **___: Any) -> None:
        if state.global_step == self.recorded:
            self._start_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"]
            history.start()
        elif state.global_step - 1 == self.recorded:
            self.history = (self._start_bytes, *history.events())
            history.stop()
        held = (value for states in optimizer.state.values() for value in states.values())
        held = (getattr(value, "_local_tensor", value) for value in held if torch.is_tensor(value))
        self.optimizer_state_bytes = _nbytes(value for value in held if value.is_cuda)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors, what several share counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run: `steps` optimizer steps of `config` with `options`, weights random, tokens synthetic.

    `case` holds further: `limit_bytes`, what PyTorch may reserve, or None; `uuid`, the GPU's; `others_bytes`, what
    other processes hold of it; `record`, whether the last step's memory history is wanted. The answer has the fields
    of tables/measured and an "outcome": "ok", or "out_of_memory" with the "reason", and then what was measured so far.
    """
    if case["options"].get("expandable_segments"):
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    if case["limit_bytes"] is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        # CUDACachingAllocator takes size_t(fraction * total); half a byte keeps that from falling below the limit
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case["limit_bytes"] + 0.5) / total))
    note = Marks()
    outcome: dict[str, Any] = {"outcome": "ok", "reason": ""}
    try:
        outcome |= _train(case, note)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        outcome = {"outcome": "out_of_memory", "reason": _ran_out(error, note.marks)}
    return outcome | figures(note.marks) | _device(case)


def _train(case: dict[str, Any], note: Marks) -> dict[str, Any]:
    torch.manual_seed(0)
    made = plan(case["config"], **case["options"])  # knows what "attention" and "mlp" mean for this architecture
    options = made.options
    with tempfile.TemporaryDirectory(prefix="vramplan-") as folder:
        arguments: Any = workload.training_arguments(options, folder, case["steps"])
        zero, quantised = options.parallel.startswith("zero"), options.method == "qlora"
        if zero and not quantised:
            arguments = workload.deepspeed_arguments(options, arguments)
        model = workload.load(case["config"], options)
        if zero and quantised:  # transformers partitions no model that it quantises
            arguments = workload.deepspeed_arguments(options, arguments)
        note.mark("loaded")
        lora = workload.lora_config(options, made.counts)
        model = workload.adapt(model, options, lora)
        if options.trainer == "transformers":
            note.mark("ready")
        trainer = workload.trainer(model, options, lora, arguments)
        if options.trainer == "trl":  # SFTTrainer adds the adapter itself
            note.mark("ready")
        unset = options.parallel in workload.IN_HOST_MEMORY and options.method != "qlora"
        sums = _Sums(case["steps"] - 1 if case["record"] else None, unset=unset)
        trainer.add_callback(note)
        trainer.add_callback(sums)
        trainer.train()
    # of one that ZeRO 3 has partitioned nothing is left, and ds_numel says how large it was (partition_parameters.py)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    answer = {
        "trainable_parameters": trained,
        "gradient_bytes": sums.gradient_bytes,
        "optimizer_state_bytes": sums.optimizer_state_bytes,
    }
    return answer if sums.history is None else answer | {"history": sums.history}


def figures(marks: Sequence[Mark]) -> dict[str, Any]:
    """What the marks of a run say, by the names of tables/measured; of a run that ended early, as far as it came."""
    found = {f"{mark.name}_bytes": mark.allocated for mark in marks if mark.name in ("loaded", "ready")}
    steps: list[dict[str, Any]] = []
    step: dict[str, Any] = {}
    for mark in marks:
        if mark.name == "step_begin":
            began, step = mark, {"start_bytes": mark.allocated}
        elif mark.name == "before_optimizer":
            step |= {"fwd_bwd_peak_bytes": mark.peak_allocated, "with_grads_bytes": mark.allocated}
            step["reserved_peak_bytes"] = mark.peak_reserved
        elif mark.name == "after_optimizer":
            step["optim_peak_bytes"] = mark.peak_allocated
        elif mark.name == "step_end":
            step["end_bytes"] = mark.allocated
            step["reserved_peak_bytes"] = max(step["reserved_peak_bytes"], mark.peak_reserved)
            step["step_s"] = mark.time_s - began.time_s
            steps.append(step)
    if not steps:
        return {**found, "steps": []}
    return {
        **found,
        "steps": steps,
        "peak_allocated_bytes": max(max(s["fwd_bwd_peak_bytes"], s["optim_peak_bytes"]) for s in steps),
        "peak_reserved_bytes": max(s["reserved_peak_bytes"] for s in steps),
        "step_s": steps[-1]["step_s"],
    }


def _device(case: dict[str, Any]) -> dict[str, Any]:
    """What is taken of the GPU at the end: NVML's figure of the whole, and the process's own beside PyTorch's memory.

    None where NVML does not answer, and where a paged optimizer's managed memory lies on the GPU; of the whole also
    where PyTorch has given memory back to make room (`retries`), since the end is not the most then.
    """
    free, total = torch.cuda.mem_get_info()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    beside = torch.cuda.memory_reserved() + case["others_bytes"]
    seen = probe_gpu.memory(case["uuid"])
    paged = "paged" in case["options"]["optimizer"]
    used = None if seen is None or paged else seen.used_bytes
    return {
        "device_used_bytes": None if used is None or retries else used - case["others_bytes"],
        "context_bytes": None if used is None else used - beside,
        "process_bytes": None if paged else total - free - beside,
        "retries": retries,
    }


# ------------------------------------------------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory was the reason: PyTorch's own error, or what cuBLAS and bitsandbytes make of it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED", str(error), re.IGNORECASE)
    )


_AFTER = {
    "": "while the model was loaded",
    "loaded": "while the adapter was added",
    "ready": "before the first step",
    "step_begin": "in forward or backward of step",
    "before_optimizer": "in the optimizer's step",
    "after_optimizer": "after the optimizer's step",
    "step_end": "after step",
}


def _ran_out(error: BaseException, marks: Sequence[Mark]) -> str:
    number = sum(mark.name == "step_begin" for mark in marks)
    where = _AFTER[marks[-1].name if marks else ""] + (f" {number}" if number else "")
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return where + (f", for want of {asked[1]}" if asked else "")
