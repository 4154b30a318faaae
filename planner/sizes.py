"""What a run needs beside the GPU: what is downloaded, host memory, and what it writes to disk.

Data is counted exactly. What frames it is not, where it is small: a safetensors file written in shards repeats some
bytes of its header; torch.save adds under 320 B for each tensor of optimizer.pt and under 2 KiB for the file; the
other files of a checkpoint (scheduler, random states, arguments, configs, PEFT's README) take under 64 KiB together,
without a tokenizer's. tests/test_sizes.py holds all of it against files that transformers and PEFT write.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from vramplan.planner import optimizer
from vramplan.planner.links import HOST_GPUS
from vramplan.planner.memory import Component
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.parameters import safetensors_bytes
from vramplan.planner.trainer import adapter_dtype
from vramplan.planner.units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vramplan.planner.layers import Architecture
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.run import Run
    from vramplan.planner.training import TrainingOptions

    _Trained = tuple[tuple[int, ...], str, bool]

SAVE_STEPS = 500  # transformers/training_args.py, save_steps; save_total_limit is None, so every checkpoint stays
_SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_MOST = "bf16"  # what most models are published in
_PUBLISHED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def published_dtype(config: Mapping[str, object]) -> str | None:
    """The dtype in which a config.json says its weights are published; None where it names none of ours."""
    named = config.get("dtype") or config.get("torch_dtype")
    return _PUBLISHED.get(named.removeprefix("torch.")) if isinstance(named, str) else None


def download(architecture: Architecture, dtype: str, elements: int | None = None) -> Component:
    """The base's safetensors as published in `dtype`; `elements` counts the file's where it has more than what trains.

    from_pretrained takes no other format where there is this one, and the Hub's cache keeps one copy
    (huggingface_hub, blobs/).
    """
    size = _safetensors(architecture, dtype)
    count = architecture.total_parameters
    if elements is not None:
        size += (elements - count) * ITEMSIZE[dtype]
        count = elements
    return Component(
        "download",
        size,
        f"{format_count(count)} weights x {ITEMSIZE[dtype]} B ({dtype}) and the file's header",
        "safetensors, README.md (format); transformers/modeling_utils.py, _get_resolved_checkpoint_files",
    )


def host_memory(
    architecture: Architecture, options: TrainingOptions, published: str, host_gpus: int = HOST_GPUS
) -> Component:
    """Host memory that loading takes beside the processes themselves and beside the file's pages, which the kernel can
    drop; of several GPUs, for all ranks of one host.

    safetensors maps the file. In the dtype asked for, a weight is the mapped page itself until it goes to the GPU; in
    another it is a copy. A quantised base goes to the GPU weight by weight, in one thread. Under FSDP with mixed
    precision accelerate makes a copy of all that is trained, in float32, on every rank.
    """
    held = _held(options) if options.method == "full" and options.parallel == "fsdp" else options.weights_dtype
    itemsize = ITEMSIZE[held]
    ranks = min(options.num_gpus, host_gpus)
    each = f", on each of {ranks} ranks of a host" if ranks > 1 else ""
    where = "transformers/modeling_utils.py, safe_open(backend='mmap'); core_model_loading.py, _materialize_copy"
    if held == published:
        return Component("host memory, loading", 0, f"weights stay in the mapped file, {published} as published", where)
    if options.method == "qlora":
        largest = max(weight.numel for _, _, weight in architecture.weights())
        how = f"the largest weight, {format_count(largest)} x {itemsize} B, while it is cast to {held}{each}"
        return Component("host memory, loading", ranks * largest * itemsize, how, where)
    total = architecture.total_parameters
    how = f"{format_count(total)} weights x {itemsize} B, cast from {published} to {held}{each}"
    if held != options.weights_dtype:
        where += "; accelerate/utils/fsdp_utils.py, fsdp2_prepare_model"
        how += "; with fsdp_config's cpu_ram_efficient_loading on one alone"
    return Component("host memory, loading", ranks * total * itemsize, how, where)


def offloaded(run: Run, num_gpus: int, host_gpus: int = HOST_GPUS) -> Component | None:
    """Host memory that all ranks of one host take for what is offloaded, once they train; None where nothing is."""
    if run.sharing is None or not (parts := run.sharing.in_host_memory(run)):
        return None
    ranks = min(num_gpus, host_gpus)
    how = " + ".join(f"{format_bytes(size)} of {name}" for name, size in parts.items())
    return Component(
        "host memory, offload",
        ranks * sum(parts.values()),
        f"({how}) x {ranks} ranks of a host",
        "torch/distributed/fsdp, _fsdp_param.py (pin_memory); deepspeed/runtime/zero, stage_1_and_2.py, stage3.py",
    )


def gathered(saved: tuple[Component, ...], options: TrainingOptions) -> Component | None:
    """Host memory that saving takes on the first rank of all, where what was sharded is put together again; else None.

    Under FSDP the weights, then the optimizer's states, one after the other; under ZeRO 3 an adapter alone, since
    accelerate's zero3_save_16bit_model is off. `saved` is a checkpoint.
    """
    weights, states = saved[0], saved[-1]
    if options.parallel == "fsdp":
        largest = max((weights, states), key=lambda part: part.bytes)
        return Component(
            "host memory, saving",
            largest.bytes,
            f"what {largest.name} holds, put together on the first rank; with SHARDED_STATE_DICT the weights alone",
            "accelerate/utils/fsdp_utils.py, save_fsdp_optimizer; torch/distributed/checkpoint/state_dict.py",
        )
    if options.parallel == "zero3" and options.lora:
        return Component(
            "host memory, saving",
            weights.bytes,
            f"what {weights.name} holds, put together on the first rank",
            "transformers/trainer.py, save_model; deepspeed/runtime/engine.py, _zero3_consolidated_16bit_state_dict",
        )
    return None


def checkpoint(architecture: Architecture, counts: ParameterCounts, options: TrainingOptions) -> tuple[Component, ...]:
    """What Trainer writes at each save: the trained weights, and the optimizer's states, paged ones included.

    Under FSDP2 with FULL_STATE_DICT, the default, the weights are written a second time for resuming; DeepSpeed writes
    a folder of its own, in which the weights are once more, and of ZeRO 3 only in float32.
    """
    if options.lora:
        weights = Component(
            "adapter_model.safetensors",
            counts.adapter_bytes,
            f"{format_count(counts.trainable)} adapter weights and the file's header",
            "peft/peft_model.py, save_pretrained",
        )
    else:
        total, dtype = architecture.total_parameters, _held(options)
        weights = Component(
            "model.safetensors",
            _safetensors(architecture, dtype, held=True),
            f"{format_count(total)} weights x {ITEMSIZE[dtype]} B ({dtype}) and the file's header",
            "transformers/trainer.py, _save; modeling_utils.py, save_pretrained",
        )
    used = optimizer.get(options.optimizer)
    trained = list(_trained(architecture, counts, options))
    if options.parallel.startswith("zero"):
        return _deepspeed(weights, used, trained, options)
    sharded = options.parallel == "fsdp"
    states = Component(
        "optimizer.bin" if sharded else "optimizer.pt",
        sum(_state_bytes(used, *each) for each in trained) + (len(used.tables) * optimizer.TABLE_BYTES),
        f"{used.name}'s states of {format_count(counts.trainable)} weights",
        f"transformers/trainer.py, _save_optimizer_and_scheduler; {used.source}",
    )
    if not sharded:
        return weights, states
    again = Component(
        "pytorch_model_fsdp.bin",
        sum(prod(shape) * ITEMSIZE[dtype] for shape, dtype, _ in trained),
        f"{format_count(counts.trainable)} weights that are trained, once more",
        "accelerate/utils/fsdp_utils.py, save_fsdp_model",
    )
    return weights, again, states


def _deepspeed(
    weights: Component, used: optimizer.Optimizer, trained: list[_Trained], options: TrainingOptions
) -> tuple[Component, ...]:
    """DeepSpeed's folder beside the weights, which the Trainer does not write of a whole model under ZeRO 3."""
    numel = sum(prod(shape) for shape, _, _ in trained)
    states = sum(optimizer.state_bytes(used, shape, "fp32") for shape, _, _ in trained)
    third = options.parallel == "zero3"
    low = 0 if third else ITEMSIZE[_held(options)]
    folder = Component(
        "global_step*/",
        numel * (low + 4) + states,
        f"{used.name}'s states of {format_count(numel)} weights in float32, the weights with 4 B"
        + f" and with {low} B" * bool(low),
        "transformers/trainer.py, _save_optimizer_and_scheduler; deepspeed/runtime/engine.py, save_checkpoint",
    )
    return (folder,) if third and not options.lora else (weights, folder)


def disk(base: Component, saved: tuple[Component, ...], steps: int) -> Component:
    """The download and every checkpoint of a run of `steps` optimizer steps: one each 500, and one at the end."""
    kept = -(-steps // SAVE_STEPS)
    each = sum(part.bytes for part in saved)
    return Component(
        "disk",
        base.bytes + kept * each,
        f"the download and {format_count(kept)} checkpoint{'s' * (kept > 1)} of {format_count(each)} B, one each "
        f"{SAVE_STEPS} steps",
        "transformers/trainer_callback.py, DefaultFlowCallback; training_args.py, save_total_limit",
    )


def sizes(
    architecture: Architecture,
    counts: ParameterCounts,
    options: TrainingOptions,
    steps: int,
    published: str | None,
    elements: int | None = None,
    run: Run | None = None,
    host_gpus: int = HOST_GPUS,
) -> tuple[Component, ...]:
    """Every size above: the download, host memory, a checkpoint's two large files, and disk.

    `run` is played for what is offloaded; `host_gpus` are the most GPUs of one host; `published` is the dtype of the
    weights' files: bf16 is assumed, and said to be, where that is None.
    """
    dtype = published or _MOST
    base, host = download(architecture, dtype, elements), host_memory(architecture, options, dtype, host_gpus)
    if published is None:
        assumed = f"; {dtype} is assumed, the config names no dtype"
        base, host = (replace(part, formula=part.formula + assumed) for part in (base, host))
    saved = checkpoint(architecture, counts, options)
    kept = None if run is None else offloaded(run, options.num_gpus, host_gpus)
    put_together = gathered(saved, options)
    beside = [part for part in (host, kept, put_together) if part]
    return base, *beside, *saved, disk(base, saved, steps)


def _held(options: TrainingOptions) -> str:
    """The dtype in which a full fine-tuning holds its weights.

    accelerate/utils/fsdp_utils.py, fsdp2_prepare_model; deepspeed/runtime/engine.py, _configure_distributed_model.
    """
    if options.mixed_precision == "no" or options.parallel in ("none", "ddp"):
        return options.weights_dtype
    return "fp32" if options.parallel == "fsdp" else options.mixed_precision


def _safetensors(architecture: Architecture, dtype: str, *, held: bool = False) -> int:
    """A file of all weights in `dtype`; `held`: but for those that a model holds in float32."""
    named = [(name, weight.dtype(dtype) if held else dtype, weight.shape) for name, _, weight in architecture.weights()]
    return safetensors_bytes([(name, _SAFETENSORS[dtype], shape) for name, dtype, shape in named])


def _trained(architecture: Architecture, counts: ParameterCounts, options: TrainingOptions) -> Iterator[_Trained]:
    """Shape and dtype of every trained weight, and whether it is an nn.Embedding's."""
    if options.lora:
        dtype = adapter_dtype(options)
        for _, _, shape in counts.saved_adapters():
            yield shape, dtype, False
    else:
        for _, module, weight in architecture.weights():
            yield weight.shape, weight.dtype(_held(options)), module.kind == "embedding"


def _state_bytes(used: optimizer.Optimizer, shape: tuple[int, ...], dtype: str, embedding: bool) -> int:
    here = optimizer.state_bytes(used, shape, dtype, embedding)
    return here + optimizer.paged_bytes(used, shape, dtype, embedding)
