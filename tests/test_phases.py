"""The phases beside training: sizes derived by hand, what is left behind, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from small_models import FLAT, small

from vramplan import plan
from vramplan.planner import memory, phases
from vramplan.planner.errors import UsageError
from vramplan.planner.run import alive
from vramplan.planner.training import PHASES, parse_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vramplan.planner.memory import Phase
    from vramplan.planner.plan import Plan
    from vramplan.planner.run import Run, Stretch

# V 1000, H 256, 2 layers, 4 heads over 2 key-value heads of 64
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LOGITS_KEPT = {"prediction_loss_only": False, "eval_examples": 6, "per_device_eval_batch_size": 2}


def planned(*names: str, config: dict[str, Any] = TINY, **options: Any) -> Plan:
    return plan(config, gpu="h200", **{"method": "lora", "seq_len": 128, "phases": list(names), **options})


def phase(name: str, **options: Any) -> Phase:
    [found] = [each for each in planned(name, **options).memory.phases if each.name == name]
    return found


def row(found: Phase, name: str) -> int:
    return next((part.bytes for part in found.components if part.name == name), 0)


def run_of(made: Plan) -> Run:
    return memory.run_of(made.architecture, made.options, made.device, made.counts)


def played(run: Run, stretches: Iterable[Stretch]) -> dict[int, int]:
    """Bytes of what the stretches leave, by id; each tensor is allocated once and freed at most once."""
    held: set[int] = set()
    for stretch in stretches:
        for event in stretch.events:
            if event & 1:
                held.remove(event >> 1)
            else:
                assert event >> 1 not in held
                held.add(event >> 1)
    return {i: run.program.sizes[i] for i in held}


# ------------------------------------------------------------------------------------------------------ the highest one


def test_the_figures_are_those_of_the_highest_phase() -> None:
    alone = planned("training").memory
    assert [each.name for each in alone.phases] == ["training"]
    found = planned(*PHASES, per_device_eval_batch_size=32).memory
    assert [each.name for each in found.phases] == list(PHASES)
    highest = max(found.phases, key=lambda each: (each.peak_reserved_bytes, each.peak_allocated_bytes))
    assert found.phase == highest.name == "evaluation"
    assert found.peak_phase == highest.peak_phase == "evaluation, head"
    assert (found.peak_allocated_bytes, found.components) == (highest.peak_allocated_bytes, highest.components)
    assert found.phases[PHASES.index("training")].peak_allocated_bytes == alone.peak_allocated_bytes


def test_training_alone_is_what_it_was_without_phases() -> None:
    assert (
        plan(TINY, method="lora", seq_len=128).to_dict()
        == plan(TINY, method="lora", seq_len=128, phases="training").to_dict()
    )


@pytest.mark.parametrize("name", PHASES)
def test_the_rows_add_up(name: str) -> None:
    for method in ("qlora", "lora"):
        found = phase(name, method=method)
        assert sum(part.bytes for part in found.components) == found.peak_allocated_bytes <= found.peak_reserved_bytes
        assert all(part.formula and part.source for part in found.components)


# ----------------------------------------------------------------------------------------------------- derived by hand


def test_logits_of_an_evaluation() -> None:
    """In ForCausalLMLoss: the head's bf16, its float32 copy, the log-probabilities; labels padded, and copied."""
    b, t = 4, 128
    found = phase("evaluation", per_device_eval_batch_size=b)
    labels = 8 * (b * t + 1) + 8 * b * t
    assert row(found, "logits and loss") - labels == pytest.approx((2 + 4 + 4) * b * t * 1000, abs=100)
    assert row(found, "gradients") == row(found, "saved activations") == 0
    assert row(found, "optimizer states") > 0


def test_logits_that_are_kept() -> None:
    """Three batches of float32 logits: of the third, of the first two together, and all in what they are put into."""
    found = phase("evaluation", **LOGITS_KEPT)
    one = 4 * 2 * 128 * 1000
    assert found.peak_phase == "evaluation, gathering"
    labels = 8 * 2 * 128 * 3  # of the first two, and of the third
    assert row(found, phases.KEPT) == (1 + 2 + 3) * one + labels - 8 * 2 * 128


def test_logits_that_move_to_the_host() -> None:
    """After each batch: then only one batch's are ever kept, and the cache is given back."""
    found = phase("evaluation", **LOGITS_KEPT, eval_accumulation_steps=1)
    assert row(found, phases.KEPT) == 0
    assert found.peak_phase == "evaluation, head"
    run = run_of(planned("evaluation", **LOGITS_KEPT, eval_accumulation_steps=1))
    names = [stretch.name for stretch in phases.evaluation(run, planned("evaluation", **LOGITS_KEPT).options)]
    assert phases.EMPTIED not in names


def test_the_cache_of_a_generation() -> None:
    """Keys and values of every token but the last, which is not fed back: [B, 2, T, 64] each, in two layers."""
    made = planned("generation", generation_batch_size=3, prompt_len=100, max_new_tokens=8)
    run = run_of(made)
    stretches = list(phases.generation(run, made.options))
    last = next(i for i, each in enumerate(stretches) if each.name == "generation, token 8, outputs")
    held = alive(event for stretch in stretches[: last + 1] for event in stretch.events)
    cached = sum(run.program.sizes[i] for i in held if run.program.parts[i] == "KV cache")
    assert cached == 2 * 2 * (3 * 2 * (100 + 7) * 64) * 2


def test_a_window_bounds_the_cache() -> None:
    """DynamicSlidingWindowLayer keeps one token less than its window, in tensors that hold the new one too."""
    config = {**TINY, "model_type": "mistral", "sliding_window": 64}
    made = planned("generation", config=config, prompt_len=100, max_new_tokens=4)
    run = run_of(made)
    stretches = list(phases.generation(run, made.options))
    for name, tokens in (("generation, prompt, outputs", 100), ("generation, token 4, outputs", 64)):
        last = next(i for i, each in enumerate(stretches) if each.name == name)
        held = alive(event for stretch in stretches[: last + 1] for event in stretch.events)
        cached = sum(run.program.sizes[i] for i in held if run.program.parts[i] == "KV cache")
        assert cached == 2 * 2 * (2 * tokens * 64) * 2


def test_an_adapter_generates_without_autocast() -> None:
    """PEFT's generate calls the model beneath the forward that accelerate has wrapped; after prepare_kbit float32."""
    wide = phase("generation", method="qlora", generation_batch_size=2, prompt_len=64)
    narrow = phase("generation", method="qlora", generation_batch_size=2, prompt_len=64, prepare_kbit=False)
    assert "float32" in str(wide.components)
    assert wide.peak_allocated_bytes > narrow.peak_allocated_bytes


def test_a_long_generation_is_played_in_part() -> None:
    made = planned("generation", prompt_len=10, max_new_tokens=2000)
    names = [each.name for each in phases.generation(run_of(made), made.options) if each.name.endswith("outputs")]
    assert len(names) < 2 * 2 * phases._TOKENS
    assert names[-1] == "generation, token 2000, outputs"


def test_saving_makes_nothing_but_bitsandbytes_copies() -> None:
    """A map of 256 float32 values for each weight in 4 bit, 7 in a layer; else what a step leaves."""
    nested, plain = (phase("saving", method="qlora", double_quant=double) for double in (True, False))
    assert row(nested, "temporary buffers") - row(plain, "temporary buffers") == 2 * 7 * 1024
    left = phase("saving")
    assert row(left, "temporary buffers") == 4  # the last loss
    assert row(left, "saved activations") == row(left, "gradients") == 0


def test_merging() -> None:
    """An MLP's weight is the largest: its product in float32, twice, beside base and adapter, less what was merged."""
    found, counts = phase("merging", method="qlora"), planned("merging").counts
    assert row(found, "temporary buffers") == 2 * (4 * 704 * 256)
    assert row(found, "weights") == 2 * counts.total + 2 * 4 * 32  # the rotary frequencies, twice
    assert row(found, "weights, 4 bit") == row(found, "optimizer states") == 0
    attention = 4 * 16 * (2 * (256 + 256) + 2 * (256 + 128))  # the adapters on q and o, k and v of the first layer
    assert row(found, "adapter") == 4 * counts.trainable - attention


def test_loading_a_checkpoint() -> None:
    """First one tensor as large as all weights, then weight by weight in its place; quantised ones pass in 16 bit."""
    made = planned("loading", "training", method="full")
    [loaded, _] = made.memory.phases
    assert loaded.peak_allocated_bytes <= made.memory.loaded_bytes + 2**21
    found = phase("loading", method="qlora", prepare_kbit=False, double_quant=False)
    assert found.peak_allocated_bytes < made.memory.loaded_bytes


# ------------------------------------------------------------------------------------------------------------ no leaks


@pytest.mark.parametrize(("family", "case"), FLAT)
def test_every_family_plays_and_leaves_nothing(family: str, case: int) -> None:
    options = {"per_device_eval_batch_size": 2, "prompt_len": 48, "max_new_tokens": 3, "generation_batch_size": 2}
    try:
        made = planned("evaluation", "generation", config=small(family, case), target_modules="attention", **options)
    except UsageError as error:
        pytest.skip(str(error))
    run = run_of(made)
    for stretches in (phases.evaluation, phases.generation):
        assert played(run, [each for each in stretches(run, made.options) if each.name != "training ends"]) == {}


@pytest.mark.parametrize("extra", [{}, LOGITS_KEPT, {**LOGITS_KEPT, "eval_accumulation_steps": 2, "trainer": "trl"}])
def test_an_evaluation_leaves_nothing(extra: dict[str, Any]) -> None:
    made = planned("evaluation", **extra)
    run = run_of(made)
    assert played(run, phases.evaluation(run, made.options)) == {}


@pytest.mark.parametrize(
    ("name", "size", "beside"),
    [
        ("evaluation", "per_device_eval_batch_size", {}),
        ("generation", "generation_batch_size", {"max_new_tokens": 4, "prompt_len": 64}),
        ("generation", "prompt_len", {"max_new_tokens": 4}),
        ("generation", "max_new_tokens", {"prompt_len": 1, "generation_batch_size": 256}),
    ],
)
def test_more_takes_more(name: str, size: str, beside: dict[str, int]) -> None:
    peaks = [phase(name, **beside, **{size: n}).peak_allocated_bytes for n in (16, 64, 256)]
    assert peaks[0] < peaks[1] < peaks[2]


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phases": "evaluate"}, "did you mean evaluation? (--phases)"),
        ({"phases": ""}, "names nothing"),
        ({"per_device_eval_batch_size": 4}, "belongs to evaluation, and the phases are training; leave it out or add "
         "--phases training,evaluation"),
        ({"phases": "evaluation", "prompt_len": 4}, "--phases evaluation,generation"),
        ({"phases": "evaluation", "prediction_loss_only": False}, "(--eval-examples)"),
        ({"phases": "evaluation", "eval_examples": 4}, "add --no-prediction-loss-only"),
        ({"phases": "merging", "method": "full"}, "choose --method lora"),
        ({"phases": "generation", "max_new_tokens": 0}, "(--max-new-tokens)"),
    ],
)  # fmt: skip
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_options(options)
    assert words in str(error.value)


def test_what_the_model_refuses() -> None:
    with pytest.raises(UsageError, match=r"longer than the 1024 learned positions .*\(--prompt-len\)"):
        plan("gpt2", method="full", seq_len=512, phases="generation", prompt_len=1000, max_new_tokens=100)
    with pytest.raises(UsageError, match="lower --per-device-eval-batch-size or --eval-examples"):
        planned("evaluation", per_device_eval_batch_size=10**6, seq_len=10**5)


def test_defaults_and_the_way_back() -> None:
    run = parse_options({"phases": "generation,evaluation,loading", "seq_len": 1024})
    assert run.phases == ("loading", "evaluation", "generation")
    assert (run.per_device_eval_batch_size, run.prediction_loss_only) == (8, True)
    assert (run.generation_batch_size, run.prompt_len, run.max_new_tokens) == (1, 768, 256)
    again = parse_options(
        {name: value for name, value in run.as_dict().items() if name not in ("num_gpus", "parallel")}
    )
    assert again.as_dict() == run.as_dict()
    assert parse_options({"phases": "generation", "seq_len": 100}).prompt_len == 1


def test_a_step_after_an_evaluation_may_run_out_too() -> None:
    options = {
        "method": "full", "seq_len": 7, "optimizer": "rmsprop_bnb_32bit", "expandable_segments": True,
        "weights_dtype": "fp32", "trainer": "trl", "prediction_loss_only": False, "eval_examples": 9,
    }  # fmt: skip
    config = small("gemma", 1)
    free = plan(config, phases="training,evaluation", **options).memory
    gpu = f"{119_537_152 + free.context_bytes - free.hidden_bytes}B"
    for more in ({}, {"phases": "training,evaluation,generation", "prompt_len": 8, "max_new_tokens": 3}):
        made = plan(config, gpu=gpu, **{"phases": "training,evaluation", **options, **more})
        assert made.fit
        assert not made.fit.fits
