"""trl's SFTTrainer: sizes worked out by hand, and whole steps against memory histories of an H200.

data/trl.json.gz holds one step of each recorded case (probes/record.py, torch 2.11, trl 1.16): what was allocated
(positive) and freed (negative) of 100,000 bytes and more, and every event of making the adapter.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vramplan import plan
from vramplan.planner import blocks, memory, trl
from vramplan.planner.architecture import parse
from vramplan.planner.device import device
from vramplan.planner.errors import UsageError
from vramplan.planner.paper import Node, Parameter, Tape, Tensor, backward
from vramplan.planner.plan import _count
from vramplan.planner.stack import parse_stack
from vramplan.planner.trainer import TRAINERS
from vramplan.planner.training import SUPPORTED_TRAINERS, parse_options

if TYPE_CHECKING:
    from vramplan.planner.run import Run

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "trl.json.gz").read_bytes()))
SMALLEST = 100_000

TINY = {
    "model_type": "llama",
    "vocab_size": 70_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run_of(config: dict[str, Any], options: dict[str, Any], scored: int | None = None) -> Run:
    architecture, asked = parse(config), parse_options({"trainer": "trl", **options})
    recorded = parse_stack("torch=2.11,transformers=5.17")
    run = memory.run_of(architecture, asked, device(None, recorded), _count(architecture, asked))
    run.trainer = replace(run.trainer, forward=partial(run.trainer.forward, scored=scored))
    return run


def signed(run: Run, events: list[int], least: int = 0) -> list[int]:
    sizes = run.program.sizes
    return [-sizes[e >> 1] if e & 1 else sizes[e >> 1] for e in events if sizes[e >> 1] >= least]


def settled(events: list[int]) -> list[list[int]]:
    """Frees with nothing allocated between them as sorted runs: autocast lets go of its casts in a hash's order."""
    return [sorted(run) for _, run in groupby(events, lambda size: size > 0)]


# The recorded steps


@pytest.mark.parametrize("case", RECORDED)
def test_a_step_is_the_recorded_one_event_by_event(case: str) -> None:
    recorded = RECORDED[case]
    run = run_of(recorded["config"], recorded["options"], recorded["scored"])
    run.step(0)
    outside = ("batch", "gradient clipping", "optimizer step", "gradients let go")
    played = signed(run, [e for part in run.step(1) if part.name not in outside for e in part.events], SMALLEST)
    assert max(accumulate(played)) == max(accumulate(recorded["step"]))
    assert settled(played) == settled(recorded["step"])
    if "full-fp32" not in case:
        assert played == recorded["step"]


@pytest.mark.parametrize("case", [case for case in RECORDED if "full" not in case])
def test_the_adapter_is_made_and_cast_as_recorded(case: str) -> None:
    recorded = RECORDED[case]
    run = run_of(recorded["config"], recorded["options"])
    assert signed(run, run.loading[-1].events) == recorded["adapter"]


def test_a_whole_run_of_8_billion_parameters() -> None:
    # measured on an H200: batch 1 x 2048, rank 16 on all linear layers, dropout 0.05
    made = plan("llama-3.1-8b", trainer="trl", lora_dropout=0.05, gpu="h200")
    assert made.to_dict()["memory"]["peak_allocated_bytes"] / 2**30 == pytest.approx(6.77, abs=0.005)


# The head, by hand


def played(
    rows: tuple[int, int], vocab: int = 70_000, dtype: str = "bf16", head: str = "bf16", autocast: str | None = "bf16",
    trained: bool = False, bias: bool = False, **more: Any,
) -> tuple[dict[str, list[int]], int]:  # fmt: skip
    """The head alone on [B, T, 8]: sizes by label, and the most that was alive at once."""
    architecture = parse({**TINY, "vocab_size": vocab})
    tape = Tape(autocast)
    held, settings = blocks.Held(), memory.settings(parse_options({}), device(None))
    weight = Parameter("lm_head.weight", (vocab, 8), head, trained)
    shift = Parameter("lm_head.bias", (vocab,), head, trained) if bias else None
    held.projections["lm_head"] = blocks.Projection(weight, shift, 8, vocab)
    hidden = tape.new((*rows, 8), dtype, "hidden states")
    hidden.node = source = Node(0, [], lambda _, __: [], [])
    outputs = [trl.forward(tape, architecture, hidden, held, settings, **more)]
    del hidden
    node = trl.loss(tape, outputs).node
    assert node is not None
    assert outputs == []
    backward(tape, [(node, 0, Tensor(None, (), "fp32"))], [source])
    sizes: dict[str, list[int]] = {}
    for size, label in zip(tape.sizes, tape.labels, strict=True):
        sizes.setdefault(label, []).append(size)
    weight.grad = None
    alive = accumulate(-tape.sizes[e >> 1] if e & 1 else tape.sizes[e >> 1] for e in tape.events)
    return sizes, max(alive)


def test_the_sizes_of_a_frozen_head_in_bf16() -> None:
    sizes, peak = played((2, 101))
    n = 2 * 100  # the last position of each row predicts nothing
    assert sizes["hidden states, scored"] == [n * 8 * 2]
    assert sizes["labels, scored"] == [n * 8]
    assert sizes["tile of logits"] == [n * 32768 * 2] * 2  # forward and backward
    assert sizes["gradient of scored hidden states, float32"] == [n * 8 * 4]
    assert sizes["mask of scored positions"] == [n]
    assert "gradient of the head, float32" not in sizes
    assert "rows of the head, cast for a tile" not in sizes
    assert n * 32768 * 2 < peak < n * 32768 * 2 + 200 * n


def test_a_tile_has_at_most_4096_positions() -> None:
    sizes, _ = played((1, 9001))
    assert sizes["tile of logits"] == [4096 * 32768 * 2] * 2
    assert sizes["hidden states, scored"] == [9000 * 8 * 2]


def test_only_scored_positions_count() -> None:
    sizes, _ = played((2, 101), scored=7)
    assert sizes["tile of logits"] == [7 * 32768 * 2] * 2
    assert sizes["gradient of a slice"] == [2 * 101 * 8 * 2]


def test_a_float32_head_is_cast_in_tiles_of_32768_words() -> None:
    sizes, _ = played((1, 9), head="fp32", dtype="fp32")
    tiles = [32768, 32768, 70_000 - 2 * 32768]
    assert sizes["rows of the head, cast for a tile"] == [8 * 2 * t for t in tiles] + [8 * 2 * 32768]
    assert sizes["next rows of the head, cast for a tile"] == [8 * 2 * t for t in tiles[1:]]
    assert sizes["hidden states, cast for a tile"] == [8 * 8 * 2] * 2


def test_a_trained_head_has_its_gradient_in_float32_first() -> None:
    sizes, _ = played((1, 9), trained=True, bias=True)
    assert sizes["gradient of the head, float32"] == [70_000 * 8 * 4]
    assert sizes["gradient of its bias, float32"] == [70_000 * 4]
    assert sizes["gradient"] == [70_000 * 8 * 2, 70_000 * 2]  # of the parameters, in their dtype


def test_without_autocast_a_tile_has_the_dtype_of_the_hidden_states() -> None:
    sizes, _ = played((1, 9), dtype="fp32", head="fp32", autocast=None)
    assert sizes["tile of logits"] == [8 * 32768 * 4] * 2
    assert "rows of the head, cast for a tile" not in sizes


@pytest.mark.parametrize("more", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.1}])
def test_scaling_and_capping_need_no_memory(more: dict[str, Any]) -> None:
    architecture = parse({**TINY, "model_type": "cohere" if "logit_scale" in more else "gemma2", **more})
    assert architecture.logit_scale or architecture.final_logit_softcapping
    options = {"method": "lora", "seq_len": 64}
    kept = run_of({**TINY, "model_type": architecture.model_type, **more}, options)
    assert not {"logits, scaled", "logits, capped"} & set(kept.program.labels)
    kept.step(0)
    assert not {"logits, scaled", "logits, capped", "logits"} & set(kept.program.labels)


# Options


def test_every_supported_trainer_is_played() -> None:
    assert tuple(TRAINERS) == SUPPORTED_TRAINERS


@pytest.mark.parametrize(
    ("options", "prepared"),
    [
        ({}, True),
        ({"trainer": "trl"}, False),
        ({"trainer": "trl", "prepare_kbit": True}, True),
        ({"trainer": "trl", "method": "lora"}, False),
    ],
)
def test_sfttrainer_does_not_prepare_a_quantised_base(options: dict[str, Any], prepared: bool) -> None:
    assert parse_options(options).prepare_kbit is prepared


@pytest.mark.parametrize(("method", "dtype"), [("qlora", "bf16"), ("lora", "fp32")])
def test_the_adapter_on_a_quantised_base_is_in_bf16(method: str, dtype: str) -> None:
    run = run_of(TINY, {"method": method})
    assert {p.dtype for p in run.parameters} == {dtype}


def test_fp16_autocast_casts_a_bf16_adapter_each_time() -> None:
    run = run_of(TINY, {"method": "qlora", "weights_dtype": "fp16", "mixed_precision": "fp16", "seq_len": 64})
    run.step(0)
    assert "weight cast by autocast" in run.program.labels


def test_sfttrainer_refuses_an_adapter_on_the_head() -> None:
    with pytest.raises(UsageError, match="SFTTrainer refuses an adapter on the head"):
        plan(TINY, trainer="trl", target_modules="q_proj,lm_head")


@pytest.mark.parametrize("seq_len", [1, 2, 5000])
def test_the_parts_sum_to_the_peak(seq_len: int) -> None:
    answer = plan(TINY, trainer="trl", seq_len=seq_len, batch_size=2, method="full").to_dict()["memory"]
    assert sum(part["bytes"] for part in answer["components"]) == answer["peak_allocated_bytes"]
    if seq_len == 5000:
        assert "logits and loss" in {part["name"] for part in answer["components"]}
