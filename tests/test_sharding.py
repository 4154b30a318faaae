"""Several GPUs: shares, buckets and units worked out by hand, and what the recorded runs on two GPUs showed."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import CASES, small

from vramplan import plan
from vramplan.planner import memory, sharding, throughput
from vramplan.planner.allocator import Allocator, Streams
from vramplan.planner.errors import UsageError
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.run import Run, alive
from vramplan.planner.sharding import BUCKET, FIRST_BUCKET, Fsdp, Share, Unit, buckets, rows_of
from vramplan.planner.traffic import Hooks

MIB = 2**20
# Two layers; a vocabulary and an MLP that no even number divides.
TINY = {
    "model_type": "llama", "vocab_size": 129, "hidden_size": 64, "intermediate_size": 97, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
TIED = TINY | {"tie_word_embeddings": True}


def run_of(config: dict[str, Any], **options: Any) -> Run:
    made = plan(config, **{"seq_len": 16, "num_gpus": 2, **options})
    return memory.run_of(made.architecture, made.options, made.device, made.counts)


def units_of(run: Run) -> sharding.Units:
    assert isinstance(run.sharing, Fsdp)
    return run.sharing.units(run)


# --------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("rows", "ranks", "each"),
    [
        (8, 2, [4, 4]),
        (129, 2, [65, 64]),  # torch.chunk: slices of ceil(129 / 2)
        (10, 4, [3, 3, 3, 1]),
        (9, 4, [3, 3, 3, 0]),  # the last rank has none
        (2, 8, [1, 1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_rows_of_each_rank(rows: int, ranks: int, each: list[int]) -> None:
    assert [rows_of(rows, ranks, rank) for rank in range(ranks)] == each


@given(rows=st.integers(1, 10_000), ranks=st.integers(1, 1024))
def test_the_ranks_hold_every_row_once_and_none_more_than_the_first(rows: int, ranks: int) -> None:
    each = [rows_of(rows, ranks, rank) for rank in range(ranks)]
    assert sum(each) == rows
    assert max(each) == each[0]


def test_a_unit_by_hand() -> None:
    # 3 ranks: 129 rows are 43 each, 97 are padded to 99; the frozen weight is gathered as it is held.
    unit = Unit(
        (
            Share("a", (129, 64), "bf16", "bf16", False),
            Share("b", (97, 8), "fp32", "bf16", True),
            Share("c", (1,), "fp32", "bf16", True),
        ),
        True,
    )
    assert unit.shards(3) == [43 * 64 * 2, 33 * 8 * 4, 1 * 4]
    assert unit.cast(3) == (33 * 8 + 1) * 2
    assert unit.whole(3) == [129 * 64 * 2, 99 * 8 * 2, 3 * 2]
    assert unit.reduced(3) == (33 * 8 + 1, 4)
    assert unit.places(3) == 8 * (1 + 1 + 6 * 2 + 2)  # 528 bytes and 2, a block each


def test_places_of_gradients_as_recorded() -> None:
    """Two sizes of a run of Qwen2.5-0.5B on a GPU: a layer's, and those of the shared matrix and the norm."""
    made = plan("qwen2.5-0.5b", method="full", num_gpus=2, parallel="fsdp")
    units = units_of(memory.run_of(made.architecture, made.options, made.device, made.counts))
    assert [units.layers[0].places(2), units.tail.places(2)] == [58_872, 531_896]


def test_a_gathered_buffer_is_there_until_the_next_unit_has_been_copied_out_of_its_own() -> None:
    run = run_of(TINY, method="full", parallel="fsdp")
    run.step(0)
    program = run.program
    forward = next(stretch for stretch in run.step(1) if stretch.name == "forward, layer 1")
    buffers = [e for e in forward.events if program.labels[e >> 1] == "weights, gathered"]
    copies = [e for e in forward.events if program.labels[e >> 1] == "weight, gathered" and not e & 1]
    assert [e & 1 for e in buffers] == [0, 1]  # its own comes, the one before goes
    at = forward.events.index
    assert at(buffers[0]) < at(copies[0]) < at(copies[-1]) < at(buffers[1])


# -------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_are_closed_once_they_have_reached_their_limit() -> None:
    sizes = [(600_000, "bf16"), (600_000, "bf16"), (30 * MIB, "bf16"), (10, "bf16"), (20, "bf16")]
    assert [b.bytes for b in buckets(sizes, [FIRST_BUCKET, BUCKET])] == [1_200_000, 30 * MIB, 30]


def test_each_dtype_has_buckets_of_its_own_and_its_own_first_limit() -> None:
    sizes = [(2 * MIB, "bf16"), (2 * MIB, "fp32"), (2 * MIB, "bf16"), (2 * MIB, "fp32")]
    found = buckets(sizes, [FIRST_BUCKET, BUCKET])
    assert [tuple(b) for b in found] == [(0, 1, 2 * MIB), (1, 1, 2 * MIB), (2, 1, 2 * MIB), (3, 1, 2 * MIB)]
    assert [b.tensors for b in buckets(sizes, [2**62])] == [2, 2]


@given(st.lists(st.tuples(st.integers(1, 10**8), st.sampled_from(["fp32", "bf16"])), max_size=30))
def test_buckets_hold_every_byte_once(sizes: list[tuple[int, str]]) -> None:
    found = buckets(sizes, [FIRST_BUCKET, BUCKET])
    assert sum(b.bytes for b in found) == sum(n for n, _ in sizes)
    assert sum(b.tensors for b in found) == len(sizes)


def test_ddp_holds_gradients_twice() -> None:
    alone = plan(TINY, method="full", seq_len=16).memory
    shared = plan(TINY, method="full", seq_len=16, num_gpus=2).memory
    part = next(p for p in shared.components if p.name == sharding.BUCKETS)
    parameters = plan(TINY, method="full").counts.total
    assert part.bytes == 2 * parameters
    assert shared.ready_bytes == alone.ready_bytes


def test_ddp_makes_its_buckets_anew_before_the_second_step() -> None:
    run = run_of(TINY, method="full")  # with checkpointing the Trainer looks for no unused parameters
    assert run.loading[-1].name == "sharing"
    made = [stretch for number in range(3) for stretch in run.step(number) if stretch.name == "gradient buckets"]
    assert len(made) == 1
    assert [e & 1 for e in made[0].events] == [1, 0]  # one before, and all in one: they are less than 1 MiB


def test_ddp_clones_the_logits_where_it_looks_for_unused_parameters() -> None:
    def clones(**options: Any) -> list[int]:
        program = (run := run_of(TINY, **options)).program
        run.step(0)
        return [n for n, label in zip(program.sizes, program.labels, strict=True) if "cloned" in label]

    assert clones(method="full") == []
    logits = 4 * 16 * 129  # float32, as accelerate returns them
    assert clones(method="full", gradient_checkpointing=False) == [logits]
    assert clones(method="lora") == [logits]
    assert clones(method="lora", mixed_precision="no") == [logits // 2]


# ---------------------------------------------------------------------------------------------------------------- units


def names(unit: Unit | None) -> list[str]:
    return [share.name for share in unit.shares] if unit else []


def test_the_units_of_full_fine_tuning() -> None:
    units = units_of(run_of(TINY, method="full", parallel="fsdp"))
    assert names(units.embedding) == ["model.embed_tokens.weight"]
    assert names(units.tail) == ["model.norm.weight", "lm_head.weight"]
    assert names(units.root) == []
    assert len(units.layers) == 2
    assert names(units.layers[1])[0] == "model.layers.1.self_attn.q_proj.weight"
    assert not units.tail.reshard
    assert {(s.dtype, s.gathered) for unit in units.all for s in unit.shares} == {("fp32", "bf16")}


def test_a_shared_matrix_belongs_to_the_tail() -> None:
    units = units_of(run_of(TIED, method="full", parallel="fsdp"))
    assert units.embedding is None
    assert names(units.tail) == ["model.norm.weight", "model.embed_tokens.weight"]


def test_with_an_adapter_the_final_norm_is_the_roots() -> None:
    # accelerate looks for it among the children of the base model, which PeftModel does not show
    units = units_of(run_of(TINY, method="lora", parallel="fsdp"))
    assert names(units.root) == ["model.norm.weight"]
    assert names(units.tail) == ["lm_head.weight"]
    layer = {s.name.split("self_attn.")[-1]: s for s in units.layers[0].shares}
    assert layer["q_proj.weight"].dtype == "bf16"
    assert layer["q_proj.lora_A"].trained
    assert (layer["q_proj.lora_A"].dtype, layer["q_proj.lora_A"].gathered) == ("fp32", "bf16")


def test_without_mixed_precision_weights_are_gathered_as_they_are_held() -> None:
    units = units_of(run_of(TINY, method="full", parallel="fsdp", mixed_precision="no"))
    assert {(s.dtype, s.gathered) for unit in units.all for s in unit.shares} == {("bf16", "bf16")}


def test_a_4_bit_weight_is_sharded_as_numbers_of_16_bits() -> None:
    units = units_of(run_of(TINY, method="qlora", parallel="fsdp"))
    share = units.layers[0].shares[0]
    assert share.name == "model.layers.0.self_attn.q_proj.weight"
    assert (share.shape, share.dtype) == ((64 * 64 // 4, 1), "bf16")


def test_what_fsdp_leaves_after_a_step_is_shards_and_states() -> None:
    run = run_of(TINY, method="full", parallel="fsdp")
    before = [e for stretch in run.loading for e in stretch.events]
    step = [e for stretch in run.step(0) for e in stretch.events]
    program = run.program
    shards = sum(n for unit in units_of(run).all for n in unit.shards(2))
    elements = shards // 4
    # 129 rows are 65, 97 are 49; the norms' 64 are 32: by hand, one layer has q and o 64 x 64, k and v 32 x 64
    layer = 2 * 32 * 64 + 2 * 16 * 64 + 2 * 49 * 64 + 32 * 97 + 2 * 32
    assert elements == 2 * layer + 2 * 65 * 64 + 32
    there = {i for i in alive([*before, *step]) if program.parts[i] in ("weights", "optimizer states")}
    tensors = len(run.parameters)
    states = 2 * shards + 4 * tensors  # exp_avg and exp_avg_sq in float32, and a step for each
    buffers = 2 * 4 * 8  # inv_freq and original_inv_freq
    assert sum(program.sizes[i] for i in there) == shards + states + buffers


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "zero2", "zero3"])
def test_every_step_ends_as_it_began(method: str, config: dict[str, Any], checkpointing: bool, parallel: str) -> None:
    options = {"method": method, "gradient_checkpointing": checkpointing, "parallel": parallel}
    for more in ({}, {"gradient_accumulation_steps": 3}):
        run = run_of(config, **options, **more)
        allocator = Streams(run.program.streams, sharding.STREAMS)
        for stretch in run.loading:
            allocator.replay(stretch.events, run.program.sizes)
        ends = []
        for number in range(4):
            for stretch in run.step(number):
                end = allocator.replay(stretch.events, run.program.sizes)
            ends.append(end.requested_bytes)
        assert ends[1] == ends[2] == ends[3]


def test_no_reshard_keeps_the_layers_gathered_between_forward_and_backward() -> None:
    def gathered(reshard: bool) -> int:
        run = run_of(TINY, method="full", parallel="fsdp", reshard_after_forward=reshard)
        run.step(0)
        program = run.program
        events: list[int] = []
        for stretch in run.step(1):
            if stretch.name == "loss, backward":
                break
            events += stretch.events
        return sum(program.sizes[i] for i in alive(events) if program.labels[i] == "weight, gathered")

    layer = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 98 * 64 + 64 * 97 + 2 * 64)  # bf16; 97 rows padded to 98
    tail = 2 * (64 + 130 * 64)
    assert gathered(reshard=True) == tail
    assert gathered(reshard=False) == tail + 2 * layer + 2 * 130 * 64


def test_more_gpus_hold_less_each_and_never_less_than_their_share() -> None:
    weights = []
    for n in (2, 4, 8, 64, 1024):
        run = run_of(TINY, method="full", parallel="fsdp", num_gpus=n)
        weights.append(sum(n for unit in units_of(run).all for n in unit.shards(run.sharing.ranks)))  # type: ignore[union-attr]
        assert weights[-1] * n >= 4 * plan(TINY, method="full").counts.total
    assert weights == sorted(weights, reverse=True)


def test_offloaded_shards_and_states_take_nothing_of_the_gpu() -> None:
    made = plan(TINY, method="full", seq_len=16, num_gpus=2, parallel="fsdp", cpu_offload=True).memory
    parts = {part.name: part.bytes for part in made.components}
    assert "optimizer states" not in parts
    assert parts["weights"] == 2 * 4 * 8  # rotary frequencies


# -------------------------------------------------------------------------------------------------------------- streams


def test_what_is_free_on_one_stream_is_not_given_to_another() -> None:
    both = Streams({1: 1}, 2)
    sizes = [30 * MIB, 30 * MIB]
    assert both.replay([0, 1], sizes).reserved_bytes == 30 * MIB
    assert both.replay([2, 3], sizes).reserved_bytes == 60 * MIB
    alone = Allocator()
    assert alone.replay([0, 1, 2, 3], sizes).reserved_bytes == 30 * MIB


def test_the_peak_is_that_of_all_streams_together() -> None:
    both = Streams({1: 1, 2: 1}, 2)
    sizes = [30 * MIB, 40 * MIB, 50 * MIB]
    result = both.replay([0, 2, 3, 4, 1, 5], sizes)  # 30, 70, 30, 80, 50, 0
    assert (result.peak_allocated_bytes, result.peak_allocated_event) == (80 * MIB, 3)
    assert (result.peak_requested_bytes, result.peak_requested_event) == (80 * MIB, 3)
    assert result.peak_reserved_bytes == (30 + 40 + 50) * MIB


def test_streams_share_one_limit_and_give_back_one_another_s_cache() -> None:
    both = Streams({1: 1}, 2, limit_bytes=50 * MIB)
    sizes = [30 * MIB, 30 * MIB]
    assert both.replay([0, 1, 2], sizes).out_of_memory is None  # the first stream's segment goes
    assert both.retries == 1
    again = Streams({1: 1}, 2, limit_bytes=50 * MIB).replay([0, 1, 2, 3], sizes)
    assert (again.retries, again.peak_reserved_bytes) == (1, 30 * MIB)  # never more than the limit
    full = Streams({1: 1}, 2, limit_bytes=50 * MIB).replay([0, 2], sizes)
    assert full.out_of_memory is not None
    assert full.out_of_memory.event == 1


@given(st.lists(st.tuples(st.integers(1, 10**7), st.booleans()), min_size=1, max_size=40))
def test_one_stream_alone_is_the_allocator(sizes: list[tuple[int, bool]]) -> None:
    events = [e for i, (_, freed) in enumerate(sizes) for e in ([2 * i, 2 * i + 1] if freed else [2 * i])]
    nbytes = [n for n, _ in sizes]
    assert Streams({}, 3).replay(events, nbytes) == Allocator().replay(events, nbytes)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamw_8bit"}, "bitsandbytes' kernels have no rule"),
        ({"optimizer": "paged_adamw_32bit"}, "bitsandbytes' kernels have no rule"),
        ({"optimizer": "adafactor"}, "its factors are plain ones"),
        ({"trainer": "trl"}, "not planned under fsdp"),
    ],
)
def test_what_fsdp_cannot_run_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(TINY, num_gpus=2, parallel="fsdp", **options)


# ----------------------------------------------------------------------------------------------- what was said and seen


def test_rows_of_a_shared_run_say_whose_slice_they_are() -> None:
    rows = {part.name: part for part in plan("qwen2.5-0.5b", num_gpus=2, parallel="fsdp", gpu="h200").memory.components}
    assert "shard, 4 bit" in rows["weights, 4 bit"].formula
    assert "4 bit" not in rows["weights"].formula
    for name in ("weights", "weights, 4 bit", "adapter"):
        assert "rank 0's slice" in rows[name].source


def test_two_h200_of_llama_3_1_8b() -> None:
    # measured before any of this was written: allocated / reserved of each GPU in GiB
    seen = {
        ("lora", "fsdp"): (12.73, 16.01),
        ("qlora", "fsdp"): (8.93, 13.70),
        ("full", "fsdp"): (62.34, 71.18),
        ("lora", "ddp"): (19.11, 19.93),
        ("qlora", "ddp"): (12.91, 14.09),
    }
    for (method, parallel), measured in seen.items():
        made = plan("llama-3.1-8b", method=method, num_gpus=2, parallel=parallel, gpu="h200", stack="torch=2.11").memory
        planned = made.peak_allocated_bytes / 2**30, made.peak_reserved_bytes / 2**30
        assert planned == pytest.approx(measured, abs=0.006), (method, parallel)


def test_notes_and_json_say_how_the_run_is_shared() -> None:
    made = plan("qwen2.5-0.5b", method="full", num_gpus=8, parallel="fsdp", gpu="h200")
    assert any("float32 under fsdp" in note for note in made.memory.notes)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["options"]["num_gpus"] == 8
    assert data["memory"]["nccl_bytes"] > 0
    assert data["memory"]["context_bytes"] == made.device.context_bytes + data["memory"]["nccl_bytes"]


# ----------------------------------------------------------------------------------------------------- time of a step


def test_what_fully_shards_hooks_are_counted() -> None:
    """Full fine-tuning of two layers of 9 weights; root: head, final norm; the embedding by itself."""
    run = run_of(TINY, method="full", parallel="fsdp")
    sections = [section for stretch, _ in throughput.work(run).stretches for section in stretch]
    hooks = Hooks(*(sum(column) for column in zip(*(section.hooks for section in sections), strict=True)))
    shared = units_of(run)
    tail, embedding = len(shared.tail.shares), len(shared.embedding.shares) if shared.embedding else 0
    # forward gathers four, backward all but the tail, which stays; gradients of all four are added up
    assert (hooks.gathers, hooks.reductions) == (4 + 3, 4)
    assert hooks.weights == 2 * (9 + 9 + embedding) + tail
    assert hooks.gradients == 9 + 9 + embedding + tail
    assert hooks.bucketed == 0


def test_bytes_over_the_links_by_hand() -> None:
    """Two layers, each gathered twice: half of what it gathers is another GPU's."""
    run = run_of(TINY, method="full", parallel="fsdp")
    sections = [section for stretch, _ in throughput.work(run).stretches for section in stretch]
    whole = sum(units_of(run).layers[0].whole(2))
    assert sum(section.gathered == whole // 2 for section in sections) == 4
    alone = throughput.work(run_of(TINY, method="full", num_gpus=1))
    assert not any(section.gathered or section.reduced for stretch, _ in alone.stretches for section in stretch)


# ------------------------------------------------------------------------------------------------------ every family

ADAPTED = {"phimoe": "attention"}  # where PEFT's default cannot run


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("model_type", CASES)
def test_every_family_is_shared_whole(model_type: str, method: str) -> None:
    """Whatever the model, all that is trained lies in one unit, once, and each of it has its gradient."""
    for index in range(len(CASES[model_type])):
        named = {"target_modules": ADAPTED[model_type]} if model_type in ADAPTED and method != "full" else {}
        run = run_of(small(model_type, index), method=method, parallel="fsdp", seq_len=8, **named)
        shares = [s for unit in units_of(run).all for s in unit.shares if s.trained]
        assert len({s.name for s in shares}) == len(shares)
        assert sum(prod(s.shape) for s in shares) == sum(p.numel for p in run.trained)
        made = run.first_micro_step
        assert len(made.grads) == len(run.trained)
        assert [run.program.sizes[g] for g in made.grads] == [p.numel * ITEMSIZE[p.dtype] for p in run.trained]


@pytest.mark.parametrize(
    "how",
    [
        {"parallel": "ddp"},
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "cpu_offload": True},
        {"parallel": "fsdp", "reshard_after_forward": False},
        {"parallel": "zero1"},
        {"parallel": "zero2"},
        {"parallel": "zero2", "cpu_offload": True},
        {"parallel": "zero3"},
        {"parallel": "zero3", "cpu_offload": True},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
@pytest.mark.parametrize("model_type", CASES)
def test_every_family_is_planned_however_it_is_shared(model_type: str, how: dict[str, Any]) -> None:
    """With accumulation, and on a GPU, so that a step's time is played too."""
    named = {"target_modules": ADAPTED[model_type]} if model_type in ADAPTED else {}
    options = {"seq_len": 8, "num_gpus": 3, "gradient_accumulation_steps": 3, **how}
    for method, more in (("full", {}), ("lora", named)):
        made = plan(small(model_type), gpu="h200", method=method, **options, **more)
        assert 0 < made.memory.peak_allocated_bytes <= made.memory.peak_reserved_bytes
        assert made.fit
        assert made.fit.fits
