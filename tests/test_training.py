"""Every option: what it takes, what it refuses and in what words, and which options contradict each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON

from vramplan.planner import catalog
from vramplan.planner.architecture import parse
from vramplan.planner.errors import UsageError
from vramplan.planner.training import OPTIONS, TrainingOptions, parse_options, settle


def message(**options: Any) -> str:
    with pytest.raises(UsageError) as error:
        parse_options(options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def model(name: str) -> Any:
    found = catalog.find_model(name)
    assert found
    return parse(found.config)


def test_defaults_are_those_of_the_contract() -> None:
    run = parse_options({})
    assert run == TrainingOptions()
    assert run.as_dict() == {
        "method": "qlora",
        "rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "batch_size": 1,
        "seq_len": 2048,
        "padded": False,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "optimizer": "adamw_torch_fused",
        "weights_dtype": "bf16",
        "mixed_precision": "bf16",
        "double_quant": True,
        "prepare_kbit": True,
        "attention": "sdpa",
        "trainer": "transformers",
        "expandable_segments": False,
        "num_gpus": 1,
        "parallel": "none",
        "reshard_after_forward": None,
        "cpu_offload": None,
        "examples": 1000,
        "tokens_per_example": 2048,
        "epochs": 3,
        "phases": ["training"],
        "per_device_eval_batch_size": None,
        "prediction_loss_only": None,
        "eval_accumulation_steps": None,
        "eval_examples": None,
        "generation_batch_size": None,
        "prompt_len": None,
        "max_new_tokens": None,
    }


def test_defaults_that_follow_others() -> None:
    run = parse_options({"rank": 64, "seq_len": 512})
    assert (run.lora_alpha, run.tokens_per_example) == (128, 512)
    assert parse_options({"rank": 64, "lora_alpha": 16}).lora_alpha == 16


def test_what_a_method_does_not_use_is_off() -> None:
    full = parse_options({"method": "full"})
    assert (full.rank, full.lora_alpha, full.target_modules, full.lora) == (0, 0, (), False)
    assert not full.double_quant
    assert not full.prepare_kbit
    unused = ("rank", "lora_alpha", "lora_dropout", "target_modules", "double_quant", "prepare_kbit")
    assert {full.as_dict()[name] for name in unused} == {None}
    lora = parse_options({"method": "lora"})
    assert lora.rank == 16
    assert lora.as_dict()["double_quant"] is None


@pytest.mark.parametrize("options", [{}, {"method": "full"}, {"method": "lora", "target_modules": "q_proj, v_proj"}])
def test_options_as_used_give_the_same_run_again(options: dict[str, Any]) -> None:
    run = parse_options(options)
    assert parse_options(run.as_dict()).as_dict() == run.as_dict()


@pytest.mark.parametrize("rank", [16, 16.0, "16", " +16 ", "16.0"])
def test_whole_numbers(rank: Any) -> None:
    assert parse_options({"rank": rank}).rank == 16
    assert type(parse_options({"rank": rank}).rank) is int


class Integer:
    """What numpy's integers are to Python."""

    def __index__(self) -> int:
        return 16


def test_numbers_of_other_libraries() -> None:
    assert parse_options({"rank": Integer()}).rank == 16


NO_WHOLE_NUMBERS: list[Any] = [
    *(0, -1, 16.5, 10**30, 1e300, 10**5000, math.nan, math.inf, -math.inf, True, False),
    *("16.5", "1" * 10**5, "x", "", "1_000", "１６", "nan", "inf", "0x10", "1e999"),
    *([16], {}, b"16"),
]


@pytest.mark.parametrize("rank", NO_WHOLE_NUMBERS, ids=lambda rank: type(rank).__name__)
def test_what_is_no_whole_number(rank: Any) -> None:
    text = message(rank=rank)
    assert text.startswith("rank is ")
    assert text.endswith("; it must be a whole number from 1 up to 1,000,000 (--rank)")


def test_the_value_is_repeated() -> None:
    assert message(rank=-4) == "rank is -4; it must be a whole number from 1 up to 1,000,000 (--rank)"
    assert message(seq_len="2k").startswith("seq_len is '2k'; ")


@pytest.mark.parametrize("dropout", [0, 0.05, "0.05", ".5", "1e-2", 0.999])
def test_dropout(dropout: Any) -> None:
    assert parse_options({"lora_dropout": dropout}).lora_dropout == float(dropout)


@pytest.mark.parametrize("dropout", [1, 1.0, "1", -0.1, 2, math.nan, "nan", None.__class__, "5 %"])
def test_what_is_no_dropout(dropout: Any) -> None:
    assert "; it must be a number from 0 and below 1 (--lora-dropout)" in message(lora_dropout=dropout)


def test_numbers_above_nothing() -> None:
    assert "; it must be a number above 0 and up to 1,000,000 (--lora-alpha)" in message(lora_alpha=0)
    assert "; it must be a number above 0" in message(epochs=0)
    assert parse_options({"epochs": 0.5}).epochs == 0.5


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), ("true", True), ("False", False)])
def test_flags(value: Any, expected: bool) -> None:
    assert parse_options({"padded": value}).padded is expected


@pytest.mark.parametrize("value", [1, 0, "yes", "", [], 1.0])
def test_what_is_no_flag(value: Any) -> None:
    assert message(padded=value).endswith("; it must be true or false (--padded or --no-padded)")


def test_names_of_choices() -> None:
    assert message(method="qlra") == "unknown method 'qlra'; did you mean qlora or lora? (--method)"
    assert "adamw_torch" in message(optimizer="adamw")
    assert "needs the package galore_torch" in message(optimizer="galore_adamw")
    assert message(attention="sdp") == "unknown attention 'sdp'; did you mean sdpa? (--attention)"
    for name, option in OPTIONS.items():
        if option.kind == "choice":
            wrong: tuple[Any, ...] = (3, None.__class__, ["bf16"], {}, True, "\x00")
            for value in wrong:
                assert option.flag in message(**{name: value})


def test_unknown_options() -> None:
    assert message(rnak=3) == "unknown option 'rnak'; did you mean rank?"
    assert "unknown option" in message(**{"seq-len": 3})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        ("attention", "attention"),
        ("q_proj", ["q_proj"]),
        (" q_proj, v_proj ,q_proj", ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (("attention", "lm_head"), ["attention", "lm_head"]),
    ],
)
def test_target_modules(given: Any, kept: Any) -> None:
    assert parse_options({"target_modules": given}).as_dict()["target_modules"] == kept


@pytest.mark.parametrize("given", ["", " , ", [], 3, [3], {"q_proj": 1}, True])
def test_what_are_no_target_modules(given: Any) -> None:
    assert "(--target-modules)" in message(target_modules=given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "full", "rank": 16}, "rank 16 belongs to lora and qlora, and the method is full"),
        (
            {"method": "full", "target_modules": "q_proj,v_proj"},
            "target_modules q_proj,v_proj belongs to lora and qlora",
        ),
        ({"method": "full", "lora_dropout": 0}, "lora_dropout 0 belongs to lora and qlora"),
        ({"method": "lora", "double_quant": True}, "double_quant true belongs to qlora, and the method is lora"),
        ({"method": "full", "prepare_kbit": False}, "prepare_kbit false belongs to qlora"),
        ({"weights_dtype": "fp16"}, "weights_dtype fp16 and mixed_precision bf16 contradict each other"),
        ({"mixed_precision": "fp16"}, "weights_dtype bf16 and mixed_precision fp16 contradict each other"),
        ({"method": "full", "weights_dtype": "fp16", "mixed_precision": "fp16"}, "refuses to unscale fp16 gradients"),
        (
            {"method": "lora", "attention": "flash_attention_2", "weights_dtype": "fp32", "mixed_precision": "no"},
            "flash_attention_2 computes in fp16 or bf16 only",
        ),
        (
            {"optimizer": "paged_adamw_8bit", "num_gpus": 2, "parallel": "fsdp"},
            "paged_adamw_8bit cannot step fsdp's sharded tensors",
        ),
        ({"parallel": "fsdp"}, "parallel fsdp needs several GPUs and num_gpus is 1"),
        ({"parallel": "none", "num_gpus": 2}, "num_gpus 2 needs a way to share the work"),
        ({"cpu_offload": True}, "cpu_offload belongs to fsdp and zero, and parallel is none"),
        ({"num_gpus": 2, "reshard_after_forward": False}, "reshard_after_forward belongs to fsdp, and parallel is ddp"),
        ({"num_gpus": 8, "parallel": "zero3", "mixed_precision": "no"}, "zero3 without mixed precision takes fp32"),
        (
            {"num_gpus": 2, "parallel": "ddp", "method": "full", "weights_dtype": "fp16", "mixed_precision": "fp16"},
            "refuses to unscale fp16 gradients",
        ),
        (
            {"num_gpus": 2, "parallel": "zero2", "weights_dtype": "fp16", "mixed_precision": "fp16"},
            "mixed_precision fp16 is not planned under zero2: DeepSpeed scales the loss by itself",
        ),
        (
            {"num_gpus": 2, "parallel": "zero2", "cpu_offload": True, "optimizer": "adamw_8bit"},
            "accelerate puts DeepSpeed's own CPU optimizer in its place; choose --optimizer adamw_torch",
        ),
        (
            {"num_gpus": 2, "parallel": "zero3", "reshard_after_forward": False},
            "reshard_after_forward false is fsdp's, and the parallel is zero3",
        ),
        ({"trainer": "unsloth"}, "trainer unsloth is planned in a later version"),
    ],
)
def test_contradictions(options: dict[str, Any], words: str) -> None:
    assert words in message(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"weights_dtype": "fp16", "mixed_precision": "fp16"},
        {"weights_dtype": "fp16", "mixed_precision": "no", "method": "full"},
        {"weights_dtype": "fp16", "mixed_precision": "fp16", "method": "full", "num_gpus": 2, "parallel": "fsdp"},
        {"num_gpus": 2, "parallel": "zero3", "reshard_after_forward": True},
        {"weights_dtype": "fp32", "mixed_precision": "fp16", "method": "full"},
        {"weights_dtype": "fp32", "mixed_precision": "bf16", "attention": "flash_attention_2"},
        {"parallel": "none", "num_gpus": 1},
        {"method": "full", "rank": None, "target_modules": None},
    ],
)
def test_what_is_no_contradiction(options: dict[str, Any]) -> None:
    parse_options(options)


def test_learned_positions_are_a_limit_and_rotary_ones_a_warning() -> None:
    long = parse_options({"seq_len": 200_000})
    _, warnings = settle(long, model("llama-3.1-8b"))
    assert warnings == ("seq_len 200000 is beyond the 131072 positions of the model (max_position_embeddings)",)
    assert settle(parse_options({"seq_len": 131072}), model("llama-3.1-8b"))[1] == ()
    with pytest.raises(UsageError, match=r"seq_len 2048 is longer than the 1024 learned positions .*\(--seq-len\)"):
        settle(parse_options({}), model("gpt2"))
    assert settle(parse_options({"seq_len": 1024}), model("gpt2"))[1] == ()
    assert settle(long, model("bloom-560m"))[0].seq_len == 200_000  # alibi knows no limit


def test_a_model_without_sdpa_takes_eager_and_says_so() -> None:
    settled, warnings = settle(parse_options({}), model("gemma-2-2b"))
    assert settled.attention == "eager"
    assert warnings == ("transformers has no sdpa attention for gemma2, so it takes eager",)
    with pytest.raises(UsageError, match="choose --attention eager or --attention flash_attention_2"):
        settle(parse_options({"attention": "sdpa"}), model("gemma-2-2b"))


@pytest.mark.parametrize(
    ("asked", "weights", "mixed", "flags"),
    [
        ({}, "fp16", "fp16", "--weights-dtype fp16 --mixed-precision fp16"),
        # GradScaler refuses to unscale float16 gradients, so what is trained itself stays in float32
        ({"method": "full"}, "fp32", "fp16", "--weights-dtype fp32 --mixed-precision fp16"),
        ({"weights_dtype": "fp32"}, "fp32", "fp16", "--mixed-precision fp16"),
        ({"method": "lora", "mixed_precision": "no"}, "fp16", "no", "--weights-dtype fp16"),
    ],
)
def test_without_bf16_a_default_is_fp16(asked: dict[str, Any], weights: str, mixed: str, flags: str) -> None:
    settled, warnings = settle(parse_options(asked), model("llama-3.1-8b"), catalog.gpu("t4"))
    assert (settled.weights_dtype, settled.mixed_precision) == (weights, mixed)
    assert warnings == (f"t4 has no bf16, so this is the plan with {flags}",)
    again, quiet = settle(parse_options({**asked, "weights_dtype": weights, "mixed_precision": mixed}),
                          model("llama-3.1-8b"), catalog.gpu("t4"))  # fmt: skip
    assert (again.as_dict(), quiet) == (settled.as_dict(), ())


def test_what_was_asked_for_stays_and_what_a_gpu_lacks_is_a_warning() -> None:
    t4 = catalog.gpu("t4")
    asked = parse_options({"attention": "flash_attention_2", "weights_dtype": "bf16"})
    settled, warnings = settle(asked, model("llama-3.1-8b"), t4)
    assert settled == asked
    assert warnings == (
        "t4 has no bf16, which this plan asks for; there, train with --weights-dtype fp16 --mixed-precision fp16",
        "t4 cannot run flash_attention_2; choose --attention sdpa there",
    )
    for card in ("24GiB", "rtx-3090"):
        assert settle(parse_options({}), model("llama-3.1-8b"), catalog.gpu(card)) == (parse_options({}), ())


@given(st.dictionaries(st.sampled_from([*OPTIONS, "rnak"]), JSON, max_size=4))
def test_random_values_give_options_or_an_error(options: dict[str, Any]) -> None:
    try:
        run = parse_options(options)
    except UsageError as error:
        words = str(error)
    else:
        words = ""
        assert parse_options(run.as_dict()).as_dict() == run.as_dict()
    assert "\n" not in words
    assert len(words) < 400
