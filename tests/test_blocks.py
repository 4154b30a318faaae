"""The play of a step against recorded ones, and the smallest ops against sizes worked out by hand.

`data/steps.json.gz` holds, for small models of many families trained on an H200 (torch 2.11, transformers 5.17, peft
0.21, bitsandbytes 0.50), every allocation and free of at least 100 KB between embedding and clipping, as an index
into `sizes`, negative for a free. Cases that are not `equal` differ in a few events but not in their peak.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner import around, blocks, memory, ops
from vramplan.planner.architecture import parse
from vramplan.planner.blocks import Norm, Projection, Settings
from vramplan.planner.device import device
from vramplan.planner.paper import Node, Parameter, Tape, Tensor, backward
from vramplan.planner.plan import _count
from vramplan.planner.stack import parse_stack
from vramplan.planner.training import parse_options

if TYPE_CHECKING:
    from collections.abc import Iterable

CASES = json.loads(gzip.decompress((Path(__file__).parent / "data" / "steps.json.gz").read_bytes()))
SMALLEST = 100_000


def played(case: dict[str, Any]) -> list[int]:
    """The sizes of a micro-step's events, frees negative; autocast's cache is an unordered map, so sorted in a run."""
    architecture, options = parse(case["config"]), parse_options(case["options"])
    recorded = parse_stack("torch=2.11,transformers=5.17")
    run = memory.run_of(architecture, options, device(None, recorded), _count(architecture, options))
    stretches, _ = run.micro_step(again=False)
    sizes, labels = run.program.sizes, run.program.labels
    out: list[int] = []
    cached: list[int] = []
    for event in (e for stretch in stretches for e in stretch.events):
        size = sizes[event >> 1]
        if size < SMALLEST:
            continue
        if event & 1 and labels[event >> 1] == "weight cast by autocast":
            cached.append(size)
            continue
        out += [-s for s in sorted(cached)]
        cached.clear()
        out.append(-size if event & 1 else size)
    return out + [-s for s in sorted(cached)]


def peak(events: Iterable[int]) -> int:
    held = highest = 0
    for size in events:
        held += size
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_recorded_step(case: dict[str, Any]) -> None:
    events = played(case)
    if case["equal"]:
        recorded = [case["sizes"][e - 1] if e > 0 else -case["sizes"][-e - 1] for e in case["events"]]
        assert events == recorded
    assert abs(peak(events) / case["peak"] - 1) < 0.0005


# --- by hand: B = 2 rows of T = 8 tokens, H = 64 ------------------------------------------------------------------

ROWS = (2, 8, 64)
S = Settings(
    batch=2, seq=8, method="lora", weights_dtype="bf16", autocast="bf16", compute_dtype="bf16", adapter_dtype="fp32",
    rank=4, lora_dropout=0.0, double_quant=True, prepare_kbit=True, checkpointing=False, kernel="cudnn", masked=False,
)  # fmt: skip


def source(dtype: str = "bf16") -> Tensor:
    return Tensor(None, ROWS, dtype, Node(0, [], lambda g, _: [], []))


def parameter(shape: tuple[int, ...], dtype: str = "bf16", *, trained: bool = False) -> Parameter:
    return Parameter("weight", shape, dtype, trained)


def alive(tape: Tape) -> list[int]:
    """Sizes of what is allocated, in order."""
    held = dict.fromkeys(e >> 1 for e in tape.events if not e & 1)
    for event in tape.events:
        if event & 1:
            held.pop(event >> 1)
    return [tape.sizes[i] for i in held]


def test_a_norm_saves_its_float32_input_and_the_normalised_copy_of_a_trained_weight() -> None:
    for trained, saved in ((False, [4096, 64, 2048]), (True, [4096, 64, 2048, 2048])):
        tape = Tape()
        out = blocks.norm(tape, source(), Norm("llama_rms_norm", parameter((64,), trained=trained), None))
        assert out.nbytes == 2048
        # float32 input (for the square and the product), one rsqrt a row, bf16 copy before a trained weight, output
        assert alive(tape) == saved


def test_a_linear_layer_saves_its_input_only_for_a_trained_weight() -> None:
    for trained in (False, True):
        tape = Tape()
        x = ops.scale(tape, source())
        out = ops.linear(tape, x, parameter((128, 64), trained=trained), 128)
        del x
        assert out.nbytes == 4096
        assert alive(tape) == ([2048, 4096] if trained else [4096])


def test_an_adapter_keeps_a_float32_input_and_the_low_rank_product() -> None:
    tape = Tape("bf16")
    p = Projection(parameter((128, 64)), None, 64, 128)
    p.lora_a = parameter((4, 64), "fp32", trained=True)
    p.lora_b = parameter((128, 4), "fp32", trained=True)
    out = blocks.project(tape, source(), p, S)
    # A in bf16 (4 x 64), the input back in bf16, r numbers a token, B in bf16, the sum; the float32 copy is gone
    assert alive(tape) == [512, 2048, 128, 1024, 4096]
    assert out.nbytes == 4096


def test_a_4_bit_product_needs_its_dequantised_weight_for_a_moment() -> None:
    tape = Tape("bf16")
    p = Projection(parameter((128, 64)), None, 64, 128, quantised=True)
    blackwell = replace(S, capability=(10, 0))  # where 16 tokens are too many for a small weight
    out = blocks.base(tape, source(), p, blackwell)
    assert alive(tape) == [out.nbytes]
    assert sorted(tape.sizes) == [512, 512, 4096, 16384]  # absmax in float32 twice, the output, the weight in bf16
    tape = Tape("bf16")
    blocks.base(tape, source(), p, S)  # on an H200 they are few: the product reads the packed weight
    assert tape.sizes == [4096]


def test_dropout_keeps_one_byte_an_element() -> None:
    tape = Tape()
    out = ops.dropout(tape, source(), 0.1)
    assert alive(tape) == [1024, out.nbytes]
    assert ops.dropout(tape, out, 0.0) is out


def test_float16_scores_go_into_a_float32_softmax_as_they_are() -> None:
    for dtype, sizes in (("fp16", [256]), ("bf16", [256, 256])):  # bfloat16 by way of a float32 copy
        tape = Tape()
        ops.wide_softmax(tape, Tensor(None, (1, 4, 4, 4), dtype))
        assert tape.sizes == sizes


def test_many_rows_of_an_embedding_are_added_up_by_tens() -> None:
    tape = Tape()
    around._add_rows(tape, 3072, 1000, 64)
    assert tape.sizes == []
    around._add_rows(tape, 4096, 1000, 64)
    # two lists of sorted indices; 409 tens and at most 1,000 words, in float32
    assert tape.sizes == [8 * 4096, 8 * 4096, 4 * 64 * (409 + 1000)]


def test_a_gradient_that_two_nodes_wait_for_is_copied_for_the_leaf() -> None:
    """k-bit preparation makes the embeddings a leaf before PEFT adds an adapter's output to them."""
    tape = Tape()
    embeds = around.leaf(tape, tape.new((1, 8, 64), "bf16", "embeddings"))
    a, b = parameter((4, 100), "fp32", trained=True), parameter((64, 4), "fp32", trained=True)
    out = around.with_adapter(tape, embeds, a, b, scaled=False)
    assert out.dtype == "bf16"
    assert out.node is not None
    backward(tape, [(out.node, out.nr, tape.new(out.shape, "bf16", "gradient"))])
    made = dict(zip(tape.labels, tape.sizes, strict=True))
    assert made["gradient of an embedding"] == made["gradient"] == 100 * 4 * 4  # A's, laid out anew as A is
    assert a.grad is not None
    assert b.grad is not None
    assert b.grad.shape == (64, 4)
