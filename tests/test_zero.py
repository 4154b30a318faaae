"""DeepSpeed's ZeRO: parts, buckets and fetches by hand, and what its own code allocates (record_deepspeed.py)."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from record_deepspeed import FILE, asked
from test_sharding import TINY, run_of

from vramplan import plan
from vramplan.planner import communication, fit, memory, throughput, zero
from vramplan.planner.run import Program, Run, alive
from vramplan.planner.sharding import Share
from vramplan.planner.zero import LIVE, PREFETCHED, Coordinator, Visit, with_hooks
from vramplan.probes import compare

# ------------------------------------------------------------------------------------------------------------ ZeRO 1, 2


def test_the_parts_of_zero() -> None:
    run = run_of(TINY, method="full", parallel="zero1", num_gpus=4)
    # with decay: both tables and the layers' matrices; without: 5 norms of 64
    matrices = 2 * 129 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 97 * 64)
    assert matrices % 8 == 0
    assert [p.shape for p in run.parameters] == [(matrices // 4,), (5 * 64 // 4,)]
    assert {p.dtype for p in run.parameters} == {"fp32"}


def test_what_zero_holds_between_steps() -> None:
    run = run_of(TINY, method="full", parallel="zero2", num_gpus=2)
    before = [e for stretch in run.loading for e in stretch.events]
    step = [e for stretch in run.step(0) for e in stretch.events]
    program, total = run.program, sum(p.numel for p in run.trained)
    held: dict[str, int] = {}
    for i in alive([*before, *step]):
        held[program.parts[i]] = held.get(program.parts[i], 0) + program.sizes[i]
    assert total % 4 == 0
    assert held["weights"] == 2 * total + 2 * 4 * 8  # bf16, and two tables of frequencies
    assert held["master weights"] == 4 * total // 2
    assert held["optimizer states"] == 8 * total // 2 + 2 * 4  # and a step for each group


@pytest.mark.parametrize(("parallel", "times"), [("zero1", 1), ("zero2", 3)])
def test_the_first_gradient_makes_the_bucket(parallel: str, times: int) -> None:
    """Stage 2 lets it go with each micro-step, stage 1 with the last of three."""
    run = run_of(TINY, method="lora", parallel=parallel, gradient_accumulation_steps=3)
    made = run.step(0)
    bucket = next(i for i, label in enumerate(run.program.labels) if label == "bucket of gradients")
    assert run.program.sizes[bucket] == 10**9
    at = [stretch.name for stretch in made for e in stretch.events if e >> 1 == bucket]
    assert at == ["backward, layer 1", "backward, embeddings"] * times  # the head's weight has no gradient


@pytest.mark.parametrize(("parallel", "whole"), [("zero1", True), ("zero2", False)])
def test_stage_1_keeps_whole_gradients_until_backward_is_done(parallel: str, whole: bool) -> None:
    run = run_of(TINY, method="full", parallel=parallel)
    events: list[int] = []
    for stretch in run.step(0):
        if stretch.name == "backward, embeddings":
            break
        events += stretch.events
    there = sum(run.program.sizes[g] for g in alive(events) & set(run.first_micro_step.grads))
    matrix = 2 * 129 * 64  # the embedding's gradient is still to come
    assert there == (2 * sum(p.numel for p in run.trained) - matrix if whole else 0)


def test_the_rank_that_keeps_the_most_is_played() -> None:
    """Two ranks of a small model: the second one has the last layer, the head, and most of what is cut in two."""
    run = run_of(TINY, method="full", parallel="zero2")
    sharing = run.sharing
    assert isinstance(sharing, zero.Zero)
    matrices, norms = sharing.groups(run)
    part = sharing.part(matrices)
    starts = list(accumulate((p.numel for p in matrices), initial=0))
    of_rank = [
        [p for p, start in zip(matrices, starts, strict=False) if start < end and start + p.numel > end - part]
        for end in (part, 2 * part)
    ]
    most = max(sum(p.numel for p in each) for each in of_rank)
    touched = sharing.touched(run)
    assert sum(p.numel for p, _ in touched if p in matrices) == most
    assert sum(numel for p, numel in touched if p in matrices) == min(part, sum(p.numel for p in matrices) - part)
    assert {p.numel for p in norms} == {64}


def test_a_hook_runs_once_the_node_is_done() -> None:
    program = Program()
    weight, into, other = (program.new(8, label, "") for label in ("gradient", "gradient of an input", "product"))
    events = [2 * weight, 2 * into, 2 * other, 2 * other + 1]
    found = with_hooks(events, program, {weight}, lambda g: [2 * g + 1], {3: [99]})
    assert found == [2 * weight, 2 * into, 2 * weight + 1, 2 * other, 99, 2 * other + 1]


# --------------------------------------------------------------------------------------------------------------- ZeRO 3


def weight(name: str, numel: int) -> Share:
    return Share(name, (numel,), "bf16", "bf16", False)


def fetched(*visits: tuple[str, ...], sizes: dict[str, int]) -> list[tuple[int, str, int]]:
    """What a coordinator of two ranks allocates (1) and frees (-1) before each visit: (visit, name, bytes)."""
    program = Program()
    made = [
        Visit((0, at), (0, at + 1), tuple(weight(name, sizes[name]) for name in names))
        for at, names in enumerate(visits)
    ]
    events = Coordinator(program, 2).play(made)[0]
    return [
        (at, program.scopes[e >> 1], (-1 if e & 1 else 1) * program.sizes[e >> 1])
        for at in sorted(events)
        for e in events[at]
    ]


def test_a_weight_that_comes_alone_stays_where_it_was_gathered() -> None:
    million = 1_000_000
    large = 60 * million  # more than is fetched ahead at once
    assert fetched(("a",), ("b",), sizes={"a": large, "b": large}) == [
        (0, "a", 2 * large),
        (0, "b", 2 * large),  # ahead
        (1, "a", -2 * large),
        (2, "b", -2 * large),
    ]


def test_weights_that_come_together_are_copied_out_of_one_buffer() -> None:
    million = 1_000_000
    found = fetched((), ("a",), ("b",), sizes={"a": million, "b": 3 * million + 1})
    assert found == [
        (0, "a", 2 * (million + 3 * million + 2)),  # padded to two ranks
        (1, "a", 2 * million),
        (1, "b", 2 * (3 * million + 1)),
        (2, "a", -2 * million),
        (2, "a", -2 * (4 * million + 2)),  # the buffer, once the last one has been waited for
        (3, "b", -2 * (3 * million + 1)),
    ]


def test_a_weight_that_is_used_again_soon_stays() -> None:
    million = 1_000_000
    again = fetched(("a",), ("b",), ("a",), sizes={"a": million, "b": million})
    assert [each for each in again if each[1] == "a" and abs(each[2]) == 2 * million] == [
        (0, "a", 2 * million), (3, "a", -2 * million),
    ]  # fmt: skip
    billion = fetched(("a",), ("b",), ("c",), ("a",), sizes={"a": million, "b": 600 * million, "c": 600 * million})
    assert [at for at, name, nbytes in billion if name == "a" and nbytes == -2 * million] == [1, 4]


def test_no_more_than_so_many_elements_are_whole_at_once() -> None:
    names = [str(number) for number in range(60)]
    sizes = dict.fromkeys(names, PREFETCHED)
    held, most = 0, 0
    before = [()] * 30  # modules without weights, at each of which some more is fetched ahead
    for _, _, nbytes in fetched(*before, *((name,) for name in names), sizes=sizes):
        held += nbytes
        most = max(most, held)
    assert most == 2 * LIVE


def test_small_weights_are_always_whole() -> None:
    run = run_of(TINY, method="full", parallel="zero3")  # none has more than 100,000 elements
    step = [e for stretch in run.step(0) for e in stretch.events]
    assert not [e for e in step if run.program.parts[e >> 1] == "gathered weights"]
    loaded = alive(e for stretch in run.loading for e in stretch.events)
    whole = [run.program.sizes[i] for i in loaded if run.program.labels[i] == "weight, always whole"]
    assert sum(whole) == 2 * sum(p.numel for p in run.trained)


# ----------------------------------------------------------------------------------------------------- DeepSpeed itself


def recorded() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(FILE.read_bytes()))
    return found


@pytest.mark.parametrize("seen", recorded(), ids=lambda seen: "-".join(map(str, seen["case"].values())))
def test_a_step_is_planned_as_deepspeed_allocates(seen: dict[str, Any]) -> None:
    """What is held before a step, and the most until its gradients are there: after that the CPU's AdamW differs."""
    config, options = asked(seen["case"])
    made = plan(config, **options)
    made = replace(made, device=replace(made.device, workspace_bytes=0))
    ours = compare.of_plan(made, 1)
    update = next(at for at, name in ours.phases if name == "gradient clipping")
    held = list(accumulate(seen["events"][: seen["update"]], initial=seen["start_bytes"]))
    assert ours.start_bytes == pytest.approx(seen["start_bytes"], abs=20_000)
    assert max(ours.held()[: update + 1]) == pytest.approx(max(held), abs=20_000)


# ---------------------------------------------------------------------------------------------- before the first step


def test_a_gpu_must_hold_what_sharing_takes() -> None:
    """Under ZeRO 2 the weights and their flat copy are there at once; where there is no room, one after the other."""
    asked: dict[str, Any] = {"method": "full", "num_gpus": 64, "parallel": "zero2", "batch_size": 1, "seq_len": 128}
    made = plan("llama-3.2-1b", **asked).memory
    weights = 2 * 1_235_814_400
    part = weights // 2 // 64
    assert weights < made.before_allocated_bytes < weights + 16 * part + 2**20
    assert made.before_reserved_bytes > 1.8 * weights
    enough, less = (replay(made.before_allocated_bytes + spare, **asked) for spare in (2**26, -(2**26)))
    assert enough.out_of_memory.startswith(("forward", "loss", "backward"))
    assert less.out_of_memory in ("loading", "sharing")


def replay(limit_bytes: int, **asked: Any) -> Any:
    made = plan("llama-3.2-1b", **asked)
    return memory.estimate(made.architecture, made.options, made.device, made.counts, limit_bytes)


def test_what_loading_has_cached_goes_for_nothing() -> None:
    """On a GPU that is too small for the weights beside their flat copy these are made flat in host memory."""
    asked: dict[str, Any] = {"method": "full", "num_gpus": 8, "parallel": "zero2", "seq_len": 16, "cpu_offload": True}
    made = plan("llama-3.1-8b", gpu="24GiB", **asked)
    assert made.fit
    assert made.memory.before_reserved_bytes > made.fit.gpu.budget_bytes > made.memory.needed_bytes
    assert (made.fit.fits, made.fit.retries) == (True, None)


def test_a_gpu_that_would_train_but_cannot_load_does_not_fit() -> None:
    asked: dict[str, Any] = {"num_gpus": 8, "parallel": "fsdp", "seq_len": 16, "cpu_offload": True}
    free = plan("llama-3.1-8b", **asked)
    verdicts = []
    for spare in range(0, 2**31, 2**28):
        budget = free.memory.needed_bytes + spare
        made = plan("llama-3.1-8b", gpu=f"{budget}B", **asked)
        assert made.fit
        limited = memory.estimate(
            made.architecture, made.options, made.device, made.counts, fit.room_bytes(made.fit.gpu, made.memory)
        )
        assert made.fit.fits is not bool(limited.out_of_memory)
        verdicts.append(made.fit.fits)
    assert verdicts == sorted(verdicts)
    assert verdicts[-1]


# ------------------------------------------------------------------------------------------------------ time of a step


@pytest.mark.parametrize(("parallel", "sums"), [("zero1", 1), ("zero2", 3)])
def test_stage_1_adds_up_once_a_step_and_stage_2_each_micro_step(parallel: str, sums: int) -> None:
    run = run_of(TINY, method="full", parallel=parallel, gradient_accumulation_steps=3)
    micro = [(stretch, times) for stretch, times in throughput.work(run).stretches if times][:-1]
    reduced = sum(times * sum(section.reduced for section in stretch) for stretch, times in micro)
    assert reduced == sums * 2 * sum(p.numel for p in run.trained) * 2 // 2
    assert all(section.waits for stretch, _ in micro for section in stretch if section.reduced)


def test_stage_3_overlaps_and_the_others_do_not() -> None:
    for stage, words in ((1, "without overlap_comm"), (2, "without overlap_comm"), (3, "with overlap_comm")):
        notes = plan(TINY, method="full", num_gpus=2, parallel=f"zero{stage}").memory.notes
        assert any(note.endswith(words) for note in notes)


def test_bytes_over_the_links_are_as_many_for_more_gpus() -> None:
    """ZeRO 3 cuts a weight as one row of numbers; fully_shard pads three rows to a row for each of 16 GPUs."""
    config = TINY | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1}

    def gathered(parallel: str, num_gpus: int) -> int:
        run = run_of(config, method="full", parallel=parallel, num_gpus=num_gpus)
        return sum(section.gathered * times for stretch, times in throughput.work(run).stretches for section in stretch)

    assert gathered("zero3", 16) * 3 / 4 == pytest.approx(gathered("zero3", 4) * 15 / 16, rel=0.01)
    assert gathered("fsdp", 16) > 3 * gathered("fsdp", 4)
    note = plan(config, method="full", seq_len=16, num_gpus=16, parallel="fsdp").memory.sharing_notes[-1]
    assert "experts.gate_up_proj has 3 rows; --parallel zero3" in note


@pytest.mark.parametrize("checkpointing", [True, False])
def test_where_zero_3_failed_is_said(checkpointing: bool) -> None:
    made = plan("gpt2", seq_len=64, num_gpus=2, parallel="zero3", gradient_checkpointing=checkpointing)
    assert any("failed on a GPU with torch 2.11" in note for note in made.memory.notes) is checkpointing


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "reshard_after_forward": False},
        {"parallel": "zero3"},
        {"parallel": "zero3", "gradient_checkpointing": False},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "llama-3.2-1b", "gpt2", "opt-125m"])
def test_time_gathers_what_memory_does(model: str, method: str, options: dict[str, Any]) -> None:
    def run() -> Run:
        made = plan(model, method=method, seq_len=64, num_gpus=4, **options)
        return memory.run_of(made.architecture, made.options, made.device, made.counts)

    timed = sum(s.gathered * times for stretch, times in throughput.work(run()).stretches for s in stretch)
    played = run()
    played.step(0)
    program = played.program
    events = [e for stretch in played.step(1) for e in stretch.events if not e & 1]
    held = [program.sizes[e >> 1] for e in events if program.labels[e >> 1] == "weights, gathered"]
    assert timed == pytest.approx(sum(held) * 3 / 4, rel=1e-4)


def test_zero_steps_one_group_after_another() -> None:
    """A foreach optimizer's temporaries are those of one sub-group: of 8B there are nine."""
    peaks = {
        name: plan("llama-3.1-8b", method="full", parallel="zero3", num_gpus=2, optimizer=name, seq_len=512).memory
        for name in ("adamw_torch", "adamw_torch_fused")
    }
    more = peaks["adamw_torch"].peak_allocated_bytes - peaks["adamw_torch_fused"].peak_allocated_bytes
    assert 0 < more < 4 * 10**9 // 2  # one list of a rank's half of 1,000,000,000 elements


@pytest.mark.parametrize(
    ("parallel", "item"), [("fsdp", 2), ("ddp", 2), ("zero1", 2)],
)  # fmt: skip
def test_whole_gradients_are_summed_over_micro_steps(parallel: str, item: int) -> None:
    run = run_of(TINY, method="full", parallel=parallel, gradient_accumulation_steps=3)
    section = communication.summed_gradients(run)
    assert section.backward_ops == len(run.trained)
    assert sum(k.nbytes * n for k, n in section.kernels.items()) == 3 * item * sum(p.numel for p in run.trained)
