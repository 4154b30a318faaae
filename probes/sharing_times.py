"""What sharing a run takes of the host and of the links, measured by itself: the ground of throughput.py's figures.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m vramplan.probes.sharing_times OUT.json
    python -m vramplan.probes.sharing_times OUT.json

Small models keep the GPU waiting, so their steps take what the host takes. Each is trained by the real Trainer, alone
on its GPU, under DDP and under FSDP2, with few layers and with many: what a layer more takes, and how much of it is
sharing's, follows. Every call of fully_shard's hooks is timed on the host as well. Collectives are timed by their size,
on the GPU and on the host. Without torchrun one GPU stands for two (ranks.py, `alone`), and collectives are one rank's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers
from torch import distributed as dist

from vramplan.planner.files import write_text
from vramplan.planner.plan import plan
from vramplan.probes import calibrate, ranks, workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
_LAYERS = (4, 16)
_STEPS, _WARM = 30, 8
ALONE = 2  # GPUs that one stands for
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    {"method": "lora"},
    {"method": "lora", "target_modules": "q_proj,v_proj"},
)
_WAYS = ("none", "ddp", "fsdp")
_MIB = 2**20
_SIZES = (1, 4, 16, 64, 256, 512)  # MiB of what one rank gives or gets


class _Times(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds of each step and of its optimizer, once the GPU has done what it was given."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.updates: list[float] = []
        self._began = self._update = 0.0

    def on_step_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        if not self.steps:  # a model in host memory is not set, and zeros are quick
            workload.fill(model, optimizer)
        torch.cuda.synchronize()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self._update = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps.append(now - self._began)
        self.updates.append(now - self._update)


@contextmanager
def _timed_hooks() -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of fully_shard's hooks, by their names; those within another are part of that."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    hooks = {
        FSDPState: ("_pre_forward", "_post_forward", "_pre_backward", "_root_post_backward_final_callback"),
        FSDPParamGroup: ("post_backward",),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    inside: set[int] = set()  # threads

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            if thread in inside:
                return function(*args, **kwargs)
            inside.add(thread)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name].append(time.perf_counter() - began)
                inside.discard(thread)

        return run

    with ExitStack() as stack:
        for owner, names in hooks.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, timed(name, getattr(owner, name))))
        yield seconds


@contextmanager
def _timed_clipping() -> Iterator[list[float]]:
    """Seconds of each clipping."""
    import accelerate

    seconds: list[float] = []
    function = accelerate.Accelerator.clip_grad_norm_

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        found = function(*args, **kwargs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return found

    with mock.patch.object(accelerate.Accelerator, "clip_grad_norm_", run):
        yield seconds


def trained(
    config: dict[str, Any],
    way: str,
    setting: dict[str, Any],
    num_gpus: int,
    steps: int = _STEPS,
    warm: int = _WARM,
    held: Callable[[], dict[str, int]] | None = None,
) -> dict[str, Any]:
    """One training of a model: seconds of its steps from the `warm`th on, and of what is in them.

    `held` is asked once the last step is done, while everything is still there.
    """
    import accelerate

    accelerate.state.AcceleratorState._reset_state(False)  # the process group stays
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # by which TrainingArguments told accelerate to shard the model before
    several: dict[str, Any] = {"num_gpus": num_gpus, "parallel": way} if way != "none" else {}
    made = plan(config, **{"seq_len": 16, "batch_size": 1} | setting, **several)
    options = made.options
    torch.manual_seed(0)
    times = _Times()
    with tempfile.TemporaryDirectory() as folder, _timed_hooks() as hooks, _timed_clipping() as clipping:
        model = workload.load(config, options)
        lora = workload.lora_config(options, made.counts)
        model = workload.adapt(model, options, lora)
        trainer = workload.trainer(model, options, lora, workload.training_arguments(options, folder, steps))
        if way == "none":  # each rank for itself
            trainer.accelerator.state.distributed_type = accelerate.DistributedType.NO
        trainer.add_callback(times)
        trainer.train()
        found = {} if held is None else {"held": held()}
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    calls = {name: values for name, values in hooks.items() if values}
    per_step = {name: len(values) / steps for name, values in calls.items()}

    def settled(values: list[float]) -> dict[str, float]:
        """The quickest and the median: whatever else the host does only adds."""
        kept = values[warm:]
        return {"least": min(kept), "median": median(kept)} if kept else {}

    return {
        "layers": config["num_hidden_layers"], "parallel": way, **setting, "trained": len(weights),
        "step_s": settled(times.steps), "update_s": settled(times.updates), "clipping_s": settled(clipping),
        "hooks": {
            name: {"calls": per_step[name], "s": settled(_by_step(values, per_step[name]))}
            for name, values in calls.items()
        },
        **found,
    }  # fmt: skip


def _by_step(values: list[float], per_step: float) -> list[float]:
    """Seconds of all calls in each step."""
    n = round(per_step)
    return [sum(values[at : at + n]) for at in range(0, len(values) - n + 1, n)] if n else []


def collectives(num_gpus: int) -> list[dict[str, Any]]:
    """Seconds of the collectives by which runs are shared, in bf16, and the bytes that go over each GPU's link."""
    found = []
    for mib in _SIZES:
        part = torch.ones(mib * _MIB // 2, dtype=torch.bfloat16, device="cuda")
        whole = torch.ones(mib * _MIB // 2 * num_gpus, dtype=torch.bfloat16, device="cuda")
        for name, call, arguments, times in (
            ("all_gather", dist.all_gather_into_tensor, (whole, part), 1),
            ("reduce_scatter", dist.reduce_scatter_tensor, (part, whole), 1),
            ("all_reduce", dist.all_reduce, (whole,), 2),
        ):
            host_s, gpu_s = calibrate.timed(partial(call, *arguments))
            nbytes = times * part.nbytes * (num_gpus - 1)
            found.append(
                {"collective": name, "bytes": whole.nbytes, "link_bytes": nbytes, "s": gpu_s, "host_s": host_s}
            )
        del part, whole
    return found


def main(out: str) -> None:
    """Measures everything; rank 0 writes it."""
    rank, local, several = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), "RANK" in os.environ
    torch.cuda.set_device(local)
    if several:
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_properties(local).name, "num_gpus": dist.get_world_size(),
        "stack": calibrate.stack(), "collectives": collectives(dist.get_world_size()), "steps": [],
    }  # fmt: skip
    if not several:
        dist.destroy_process_group()
        ranks.pretend(ALONE)
    for setting in _SETTINGS:
        for way in _WAYS:
            for layers in _LAYERS:
                config = {**_SMALL, "num_hidden_layers": layers}
                found["steps"].append(trained(config, way, setting, dist.get_world_size()))
                if rank == 0:
                    print(json.dumps(found["steps"][-1]), flush=True)
                    write_text(Path(out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
