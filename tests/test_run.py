"""A run's events: well-formed, conserved, and the same from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan import UsageError, plan
from vramplan.planner import memory
from vramplan.planner.allocator import block_bytes, change
from vramplan.planner.architecture import parse
from vramplan.planner.device import device
from vramplan.planner.plan import _count
from vramplan.planner.quick import peak_bytes
from vramplan.planner.run import Run, Stretch, alive, last_frees_only, linked, moved
from vramplan.planner.training import parse_options

if TYPE_CHECKING:
    from vramplan.planner.memory import MemoryEstimate

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


OUTSIDE = {"target_modules": "q_proj,lm_head,embed_tokens", "lora_dropout": 0.1}
HALF = {"weights_dtype": "fp16", "mixed_precision": "fp16", "gradient_accumulation_steps": 2}
CASES = [
    {"method": method, "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation, **more}
    for method in ("full", "lora", "qlora")
    for checkpointing in (True, False)
    for accumulation in (1, 3)
    for more in ({}, {"attention": "eager", "padded": True, "batch_size": 2})
]
CASES += [{"method": method, **more} for method in ("lora", "qlora") for more in (OUTSIDE, HALF, OUTSIDE | HALF)]


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


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_on_embeddings_and_head_stand_at_both_ends(tied: bool) -> None:
    run = run_of(TINY | {"tie_word_embeddings": tied}, method="lora", seq_len=8, **OUTSIDE)
    names = [p.name for p in run.parameters]
    assert names[:2] == ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"]
    assert names[-2:] == ["lm_head.lora_A", "lm_head.lora_B"]
    shapes = {p.name: p.shape for p in run.parameters}
    assert shapes[names[0]] == (16, 1000)
    assert shapes[names[1]] == (256, 16)
    assert shapes[names[-1]] == (1000, 16)
    architecture, asked = parse(TINY | {"tie_word_embeddings": tied}), parse_options({"method": "lora", **OUTSIDE})
    assert sum(p.numel for p in run.parameters) == _count(architecture, asked).trainable
    loaded = {run.program.scopes[e >> 1] for e in run.loading[0].events if not e & 1}
    assert ("lm_head" in loaded) == (not tied)  # a tied head has no matrix of its own, adapted or not


def test_a_projection_of_the_embeddings_is_quantised_too() -> None:
    opt = {"model_type": "opt", "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt |= {"word_embed_proj_dim": 64, "vocab_size": 100, "max_position_embeddings": 64, "do_layer_norm_before": False}
    run = run_of(opt, method="qlora", seq_len=8)
    assert run.outer.projections["model.decoder.project_in"].quantised
    assert run.outer.projections["model.decoder.project_in"].lora_a is not None
    assert "model.decoder.project_out.lora_A" in [p.name for p in run.parameters]
    run.step(0)


def test_float16_keeps_a_loss_scale_and_looks_for_infinities() -> None:
    run = run_of(TINY, method="lora", seq_len=8, **HALF)
    assert run.loading
    run.step(0)
    run.step(1)
    labels = run.program.labels
    assert (labels.count("loss scale"), labels.count("growth tracker")) == (1, 1)
    clipping, update = run.update(first=False)
    found = [i for i in alive(clipping.events) if labels[i] == "found_inf of the device"]
    assert len(found) == 1
    assert 2 * found[0] + 1 in update.events


def test_bitsandbytes_casts_a_bias_in_the_first_forward_for_good() -> None:
    qwen = TINY | {"model_type": "qwen2"}
    run = run_of(qwen, method="qlora", seq_len=8)
    assert run.loading
    first = next(s for s in run.step(0) if s.name == "forward, layer 1")
    made = [i for i in alive(first.events) if run.program.labels[i] == "bias, cast to the compute dtype"]
    assert sorted(run.program.sizes[i] for i in made) == [2 * 128, 2 * 128, 2 * 256]  # k, v and q
    assert not [i for s in run.step(1) for i in alive(s.events) if "bias, cast" in run.program.labels[i]]


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
    assert "transformer.h.1.ln_2.weight" in run_of(gpt2, method="full", seq_len=8).layer_norms


def test_moved_links_and_shifts() -> None:
    events = (0, 2, 4, 3, 1)
    assert linked(events, [0]) == (0, 4)
    assert moved(events, 10, {0: 7}, (0, 4)) == [14, 22, 24, 23, 15]


def test_the_last_of_several_frees() -> None:
    stretches = [Stretch("a", [0, 1]), Stretch("b", [2, 1, 3])]
    last_frees_only(stretches, [(1,), (1,)], {0})
    assert [s.events for s in stretches] == [[0], [2, 1, 3]]
    assert alive([e for s in stretches for e in s.events]) == set()


def test_under_a_limit() -> None:
    """With room the limit changes nothing; under the peak the run ends where its memory does."""

    def within(limit_bytes: int | None) -> MemoryEstimate:
        architecture, options = parse(TINY), parse_options({"method": "full", "seq_len": 300})
        return memory.estimate(architecture, options, device(None), _count(architecture, options), limit_bytes)

    free = within(None)
    assert (free.retries, free.out_of_memory) == (0, "")
    assert within(free.peak_reserved_bytes) == free
    ends = [within(free.peak_reserved_bytes - n * 2**21) for n in range(1, free.peak_reserved_bytes >> 21)]
    assert ends[-1].out_of_memory == "loading"
    for end in ends:
        assert end.peak_reserved_bytes <= free.peak_reserved_bytes
        assert sum(part.bytes for part in end.components) == end.peak_allocated_bytes
        assert end.retries > 0 or end.out_of_memory == "loading"
    survived = [not end.out_of_memory for end in ends]
    assert survived == sorted(survived, reverse=True)


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


@pytest.mark.parametrize("model_type", ["starcoder2", "phi", "gpt2"])
def test_of_one_row_a_bias_still_has_a_gradient_of_its_own(model_type: str) -> None:
    """What a step allocates it frees once, and nothing else, also where a batch is one token."""
    config = {**TINY, "model_type": model_type, "max_position_embeddings": 64}
    run = run_of(config, method="full", seq_len=1)
    held: set[int] = set()
    for stretch in (*run.loading, *run.step(0), *run.step(1)):
        for event in stretch.events:
            if event & 1:
                held.remove(event >> 1)
            else:
                assert event >> 1 not in held
                held.add(event >> 1)
