"""A run's events: well-formed, conserved, and the same from step to step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan import UsageError, plan
from vramplan.planner import memory
from vramplan.planner.allocator import block_bytes
from vramplan.planner.architecture import parse
from vramplan.planner.device import device
from vramplan.planner.plan import _count
from vramplan.planner.quick import change, peak_bytes
from vramplan.planner.run import Run, Stretch, alive, last_frees_only, linked, moved
from vramplan.planner.training import parse_options

TINY = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run_of(config: dict[str, Any], **options: Any) -> Run:
    architecture, asked = parse(config), parse_options(options)
    return memory.run_of(architecture, asked, device(None), _count(architecture, asked))


def check(stretches: list[Stretch], held: set[int]) -> None:
    """Every tensor is allocated once while it lives and freed once."""
    for stretch in stretches:
        for event in stretch.events:
            tensor = event >> 1
            if event & 1:
                assert tensor in held, stretch.name
                held.discard(tensor)
            else:
                assert tensor not in held, stretch.name
                held.add(tensor)


CASES = [
    {"method": method, "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation, **more}
    for method in ("full", "lora", "qlora")
    for checkpointing in (True, False)
    for accumulation in (1, 3)
    for more in ({}, {"attention": "eager", "padded": True, "batch_size": 2})
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_events_are_well_formed_and_steps_repeat(options: dict[str, Any]) -> None:
    run = run_of(TINY, seq_len=64, optimizer="adamw_torch", **options)
    held: set[int] = set()
    check(list(run.loading), held)
    before = sum(run.program.sizes[i] for i in held)
    left = []
    for number in range(3):
        check(run.step(number), held)
        left.append(sum(run.program.sizes[i] for i in held))
    assert left[1] == left[2], "a later step leaves what it found"
    trained = sum(p.numel * (4 if p.dtype == "fp32" else 2) for p in run.parameters)
    rest = left[0] - before - 2 * trained
    # beside Adam's two states: the batch, both threads' workspaces, and the norm of the gradients
    assert 0 < rest - 2 * run.workspace_bytes < 100_000


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_quick_peak_is_that_of_the_whole_list(options: dict[str, Any]) -> None:
    run = run_of(TINY, seq_len=64, optimizer="adamw_torch", **options)
    now = sum(change(s.events, run.program.sizes)[0] for s in run.loading)
    highest = 0
    for number in range(2):
        for stretch in run.step(number):
            net, most = change(stretch.events, run.program.sizes)
            highest = max(highest, now + most) if number else 0
            now += net
    quick = peak_bytes(run_of(TINY, seq_len=64, optimizer="adamw_torch", **options))
    # tables and masks stay to the end of the backward pass in the quick sum
    around = run.play(False)[1]
    assert 0 <= quick - highest <= sum(block_bytes(around.tape.sizes[i]) for i in around.shared.values())


def test_identical_layers_are_played_once() -> None:
    few, many = (run_of(TINY | {"num_hidden_layers": n}, seq_len=64, method="lora") for n in (3, 30))
    for run in (few, many):
        run.step(0)
    assert len(few._pieces) == len(many._pieces)


def test_an_optimizer_without_a_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="rmsprop_bnb has no kernel for the bf16 gradient"):
        run_of(TINY, method="full", optimizer="rmsprop_bnb")
    run_of(TINY, method="lora", optimizer="rmsprop_bnb")  # adapters are float32


def test_layer_norms_go_without_decay_whatever_they_are_called() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    assert "transformer.h.1.ln_2.weight" in run_of(gpt2, method="full", seq_len=8)._layer_norms


def test_moved_links_and_shifts() -> None:
    events = (0, 2, 4, 3, 1)
    assert linked(events, [0]) == (0, 4)
    assert moved(events, 10, {0: 7}, (0, 4)) == [14, 22, 24, 23, 15]


def test_the_last_of_several_frees() -> None:
    stretches = [Stretch("a", [0, 1]), Stretch("b", [2, 1, 3])]
    last_frees_only(stretches, [(1,), (1,)], {0})
    assert [s.events for s in stretches] == [[0], [2, 1, 3]]
    assert alive([e for s in stretches for e in s.events]) == set()


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(["full", "lora", "qlora"]),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(1, 300),
    gradient_checkpointing=st.booleans(),
    rank=st.integers(1, 64),
)
def test_rows_sum_to_the_peak_and_more_never_needs_less(
    method: str, batch_size: int, seq_len: int, gradient_checkpointing: bool, rank: int
) -> None:
    options: dict[str, Any] = {"method": method, "seq_len": seq_len, "gradient_checkpointing": gradient_checkpointing}
    if method != "full":
        options["rank"] = rank
    one = plan(TINY, batch_size=batch_size, **options).memory
    two = plan(TINY, batch_size=batch_size + 1, **options).memory
    assert sum(part.bytes for part in one.components) == one.peak_allocated_bytes
    assert one.peak_allocated_bytes <= one.peak_reserved_bytes <= one.device_bytes
    assert one.loaded_bytes <= one.ready_bytes <= one.peak_allocated_bytes
    # blocks are handed out by best fit, so a little more may by chance round to a little less
    assert one.peak_allocated_bytes <= two.peak_allocated_bytes + 2 * 2**20
