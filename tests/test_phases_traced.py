"""Evaluation and generation are held against the real model and adapter on tensors without memory.

The loops around the forward passes are written out here as transformers has them, without what needs values
(transformers/trainer.py, prediction_step; generation/utils.py, _sample). A base in 4 bit is left to the measured runs:
without gradients bitsandbytes takes a way of its own on a CPU.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from small_models import CASES, small  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

import vramplan  # noqa: E402
from vramplan.planner import memory, phases  # noqa: E402
from vramplan.planner.errors import UsageError  # noqa: E402
from vramplan.planner.run import alive  # noqa: E402
from vramplan.probes import compare, dryrun, standins, workload  # noqa: E402
from vramplan.probes.storages import HEAD, Storages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.plan import Plan
    from vramplan.planner.training import TrainingOptions

SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "lora"},
    {"method": "full", "padded": True},
    {"method": "lora", "attention": "eager", "padded": True},
    {"method": "full", "weights_dtype": "fp16", "mixed_precision": "no"},
    {"method": "full", "weights_dtype": "fp32"},
)
IN_TURN = 4  # of them
SIZES = {
    "evaluation": {"per_device_eval_batch_size": 3},
    "generation": {"generation_batch_size": 3, "prompt_len": 90, "max_new_tokens": 4},
}
# gptj's attention with sdpa, eager without autocast, and where heads are turned in float32 and cached beside bfloat16.
BESIDE = [("gptj", 0, "evaluation"), ("gptj", 2, "generation"), ("gptj", 4, "generation")]
FULL = bool(os.environ.get("VRAMPLAN_FULL_GRID"))
TOLERANCE = 0.01  # of what the phase adds to the loaded model


def grid() -> list[tuple[str, int, str]]:
    """Family, setting, phase: one phase of each family, phases and settings in turn; or both."""
    found = []
    for turn, family in enumerate(CASES):
        names = tuple(SIZES) if FULL else (tuple(SIZES)[turn % 2],)
        found += [(family, (turn // 2 + shift) % IN_TURN, name) for shift, name in enumerate(names)]
    return found if FULL else found + BESIDE


@pytest.mark.parametrize(("family", "setting", "name"), grid())
def test_a_phase_is_within_one_percent_of_the_trace(family: str, setting: int, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    importlib.import_module("bitsandbytes")  # before its stand-ins
    try:
        planned = vramplan.plan(
            small(family, 0), batch_size=1, seq_len=128, phases=[name], **SIZES[name], **SETTINGS[setting]
        )
    except UsageError as error:
        pytest.skip(str(error))
    planned = replace(planned, device=replace(planned.device, workspace_bytes=0))
    ours, theirs = of_plan(planned, name), traced(planned, {"evaluation": evaluate, "generation": generate}[name])
    added = [each.peak_bytes - each.start_bytes for each in (ours, theirs)]
    found = compare.divergences(ours, theirs, least_bytes=20_000)
    first = str(found[0]) if found else "no tensor of 20 KB and more differs"
    assert abs(added[0] / added[1] - 1) <= TOLERANCE, f"{added[0] / added[1] - 1:+.2%} off; first: {first}"


def of_plan(planned: Plan, name: str) -> compare.Recording:
    """The phase's first batch, or its whole generation, on the loaded model."""
    run = memory.run_of(planned.architecture, planned.options, planned.device, planned.counts)
    before = alive(event for stretch in run.loading for event in stretch.events)
    if name == "evaluation":
        stretches = list(phases.evaluation(run, planned.options))
        second = [at for at, stretch in enumerate(stretches) if stretch.name == "evaluation, batch"][1]
        stretches = stretches[:second]
    else:
        stretches = [each for each in phases.generation(run, planned.options) if each.name != "training ends"]
    program, events = run.program, [event for stretch in stretches for event in stretch.events]
    start = sum(program.sizes[i] for i in before)
    return compare.Recording(events, program.sizes, program.labels, program.scopes, start)


def traced(planned: Plan, play: Callable[..., None]) -> compare.Recording:
    """The same of the real model in evaluation mode."""
    options = planned.options
    gc.disable()
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            instead = stack.enter_context(standins.in_place_of_cuda(planned.device))
            counts = planned.counts if options.lora else None
            model, dtypes = dryrun._on_meta(planned.model.config, options, counts)
            with Storages(instead) as seen:
                standins.calibrate(seen)
                dryrun._Training(model, dtypes, options, seen)
                start = sum(seen.sizes[i] for i in seen.living())
                model.eval()
                base = model.get_base_model() if options.lora else model
                with seen.watch(model, dryrun._layers(base)), torch.no_grad():
                    play(model, base, seen, options)
                return compare.Recording(list(seen.events), seen.sizes, seen.labels, seen.scopes, start)
    finally:
        gc.enable()


def valued(seen: Storages, name: str, make: Callable[[], Any]) -> Any:
    """A tensor whose values the model may read."""
    with _disable_current_modes():
        real = make()
    return seen.valued(real, name)


def forward(model: Any, options: TrainingOptions, *, wrapped: bool, **inputs: Any) -> Any:
    """A forward as accelerate wraps it: in autocast, its outputs made float32."""
    dtype = workload.DTYPES.get(options.mixed_precision) if wrapped else None
    if dtype is None:
        return model(**inputs)
    from accelerate.utils.operations import convert_outputs_to_fp32

    def call() -> Any:
        with torch.autocast("cuda", dtype), torch.autocast("cpu", dtype):
            return model(**inputs)

    return convert_outputs_to_fp32(call)()


def evaluate(model: Any, base: Any, seen: Storages, options: TrainingOptions) -> None:
    model.config.use_cache = False  # transformers/trainer.py, __init__
    with _disable_current_modes():
        rows = workload.Rows(2, options)
        chosen = [rows[i + 1] for i in range(options.per_device_eval_batch_size)]
        columns = {name: torch.stack([row[name] for row in chosen]) for name in rows[0]}
    batch = {name: seen.valued(column, name) for name, column in columns.items()}
    if dryrun._accepts_loss_kwargs(base):
        batch["num_items_in_batch"] = batch["labels"][..., 1:].ne(-100).sum()
    seen.outside = HEAD
    outputs = forward(model, options, wrapped=True, **batch)
    outputs["loss"].mean()


def generate(model: Any, base: Any, seen: Storages, options: TrainingOptions) -> None:
    rows, length = options.generation_batch_size, options.prompt_len
    accepted = inspect.signature(base.forward).parameters
    cached = "cache" if "cache" in accepted else "past_key_values"  # until transformers 5.23

    def mask(more: int) -> Any:
        made = torch.ones(rows, length + more, dtype=torch.long)
        made[1:, : length // 3 if options.padded else 0] = 0
        return made

    ids = valued(seen, "ids", lambda: torch.ones(rows, length, dtype=torch.long))
    positions = valued(seen, "positions", lambda: torch.arange(length).repeat(rows, 1))
    cache = transformers.DynamicCache(config=base.config.get_text_config(decoder=True))
    scores = None
    for token in range(options.max_new_tokens):
        if token == 1 and "grouped_mm" in base.get_experts_implementation().values():
            base.set_experts_implementation("batched_mm")  # _optimize_model_for_decode, on a GPU
        attended = valued(seen, "mask", lambda more=token: mask(more))
        inputs = {"input_ids": ids, "attention_mask": attended, cached: cache, "use_cache": True}
        inputs |= {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        inputs |= {"position_ids": positions} if "position_ids" in accepted else {}
        outputs = forward(base, options, wrapped=not options.lora, **inputs)
        scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        del outputs, inputs, attended
        ids = valued(seen, "ids", lambda: torch.ones(rows, 1, dtype=torch.long))
        positions = valued(seen, "positions", lambda at=length + token: torch.full((rows, 1), at))
    del scores
