"""Adapters against peft's own, and 4-bit modules against bitsandbytes' own, on the meta device."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FLAT, LLAMA_8B, real_model, small

from vramplan.planner import parameters
from vramplan.planner.architecture import parse
from vramplan.planner.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


RANKS = (1, 8, 16, 256)
ONLY_EXPERTS = ("gpt_oss", "granitemoe", "phimoe")  # an MLP of experts alone, which peft has no names for
LLAMA_2_7B = LLAMA_8B | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}
LLAMA_3B = LLAMA_8B | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}


def adapted(
    config: dict[str, Any], names: Any, ranks: tuple[int, ...] = RANKS
) -> dict[int, dict[str, tuple[int, ...]]]:
    """The adapter weights that peft makes: per rank, names as saved and shapes."""
    peft = pytest.importorskip("peft")
    model = real_model(config)
    chosen = names if isinstance(names, str) else list(names)
    made = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rank in ranks:
            lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen, task_type="CAUSAL_LM")
            if made is None:
                made = peft.get_peft_model(model, lora, adapter_name=f"rank{rank}x", low_cpu_mem_usage=True)
            else:
                made.add_adapter(f"rank{rank}x", lora, low_cpu_mem_usage=True)
    weights = dict(made.named_parameters())
    first = {name for name, weight in weights.items() if weight.requires_grad}
    assert first == {name for name in weights if f".rank{ranks[0]}x" in name}, "only the active adapter trains"
    return {
        rank: {
            name.replace(f".rank{rank}x", ""): tuple(weight.shape)
            for name, weight in weights.items()
            if name.endswith((f".rank{rank}x", f".rank{rank}x.weight"))
        }
        for rank in ranks
    }


def target_sets(config: dict[str, Any]) -> list[str]:
    """Named roles, a leaf name, the embedding with the head, and one module of one layer."""
    planned = parse(config)
    attention = planned.kinds[0].attention
    first = attention.qkv or attention.q or attention.mla.kv_a  # type: ignore[union-attr]
    token_embedding = planned.embeddings[0].name.rpartition(".")[2]
    return [
        "all-linear",
        "attention",
        "mlp",
        first.rpartition(".")[2],
        f"{token_embedding}, lm_head",
        f"{planned.layer_prefix}.1.{first},{attention.o}",
    ]


@pytest.mark.parametrize(("model_type", "index"), FLAT)
def test_adapters_are_those_of_peft(model_type: str, index: int) -> None:
    config = small(model_type, index)
    planned = parse(config)
    # The first case of a family meets every set, the others what differs by shape.
    for asked in target_sets(config) if index == 0 else ["all-linear"]:
        if asked == "mlp" and model_type in ONLY_EXPERTS:
            with pytest.raises(UsageError, match="no linear layer"):
                parameters.targets(planned, asked)
            continue
        names = parameters.target_names(planned, asked)
        ranks = RANKS if index == 0 and asked in ("all-linear", "attention", "mlp") else (8,)
        for rank, expected in adapted(config, names, ranks).items():
            counts = parameters.count(planned, asked, rank)
            assert {name: shape for name, _, shape in counts.saved_adapters()} == expected
            assert counts.trainable == sum(_product(shape) for shape in expected.values())


def _product(shape: tuple[int, ...]) -> int:
    rows, columns = shape
    return rows * columns


# ----------------------------------------------------------------------------------------------------- worked by hand


@pytest.mark.parametrize(
    ("config", "asked", "rank", "trainable"),
    [
        (LLAMA_8B, "attention", 16, 13_631_488),
        (LLAMA_8B, "q_proj,k_proj,v_proj,o_proj", 16, 13_631_488),
        (LLAMA_8B, "all-linear", 16, 41_943_040),
        (LLAMA_2_7B, "all-linear", 16, 39_976_960),
        (LLAMA_3B, "all-linear", 16, 24_313_856),
        # q and o: 16 x (4096 + 4096) each
        (LLAMA_8B, ["q_proj"], 16, 32 * 16 * 8192),
        # embedding: A is 16 x vocabulary, B is hidden x 16, and the head alike
        (LLAMA_8B, ["embed_tokens", "lm_head"], 16, 2 * 16 * (128256 + 4096)),
        (LLAMA_3B, ["lm_head"], 1, 128256 + 3072),
    ],
)
def test_counts_by_hand(config: dict[str, Any], asked: Any, rank: int, trainable: int) -> None:
    counts = parameters.count(parse(config), asked, rank)
    assert counts.trainable == trainable
    assert counts.frozen == counts.total == parse(config).total_parameters
    assert counts.trainable == sum(sum(target.numel(rank)) * target.count for target in counts.targets)


def test_module_numel() -> None:
    planned = parse(LLAMA_8B)
    assert parameters.lora_numel(planned.kinds[0].module("mlp.gate_proj"), 8) == (8 * 4096, 8 * 14336)
    assert parameters.lora_numel(planned.embeddings[0], 8) == (8 * 128256, 8 * 4096)
    assert parameters.count(planned, "all-linear", 8).adapted_modules == 7 * 32


def test_experts_that_peft_reaches_and_those_it_does_not() -> None:
    reached = parameters.targets(parse(small("qwen3_moe")), "all-linear")
    assert {target.module.kind for target in reached} == {"linear", "router", "experts"}
    fused = next(target for target in reached if target.parameter == "gate_up_proj")
    assert fused.rank_factor == 4 * 2
    assert fused.wraps_parameter
    not_reached = parameters.targets(parse(small("gpt_oss")), "all-linear")
    assert {target.module.role for target in not_reached} == {"attention"}


# ------------------------------------------------------------------------------------------------------ the saved file


@pytest.mark.parametrize(
    ("model_type", "asked", "rank", "dtype"),
    [
        ("llama", "all-linear", 8, "bfloat16"),
        ("llama", "q_proj,embed_tokens", 3, "bfloat16"),
        ("llama", "embed_tokens,lm_head", 3, "float32"),
        ("gpt2", "attention", 16, "float32"),
        ("gpt2", "wte", 2, "float16"),
        ("qwen3_moe", "all-linear", 4, "bfloat16"),
        ("qwen3_moe", "q_proj", 1, "bfloat16"),
        ("phi", "lm_head", 2, "bfloat16"),
        ("gemma2", "lm_head,o_proj", 2, "bfloat16"),
    ],
)
def test_adapter_bytes_are_those_of_a_real_file(
    model_type: str, asked: str, rank: int, dtype: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    planned = parse(small(model_type))
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    counts = parameters.count(planned, asked, rank, base_dtype=names[dtype])
    model = real_model(small(model_type)).to_empty(device="cpu").to(getattr(torch, dtype))
    chosen = counts.names if isinstance(counts.names, str) else list(counts.names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(r=rank, target_modules=chosen, init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    assert counts.adapter_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


@given(
    st.lists(
        st.tuples(
            st.text("abcdefgh.0123", min_size=1, max_size=12),
            st.sampled_from(["F32", "BF16", "F16"]),
            st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda tensor: tensor[0],
    )
)
@settings(deadline=None, max_examples=60)
def test_safetensors_bytes_are_those_of_the_library(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    real = {name: torch.zeros(shape, dtype=dtypes[dtype]) for name, dtype, shape in tensors}
    assert parameters.safetensors_bytes(tensors) == len(safetensors.save(real, metadata={"format": "pt"}))


# --------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize(
    ("model_type", "index"),
    [(case, index) for case, index in FLAT if index == 0 or case in ("falcon", "olmo", "opt", "phi")],
)
def test_quantised_modules_are_those_of_bitsandbytes(model_type: str, index: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = small(model_type, index)
    planned = parse(config)
    model = real_model(config)
    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    quantised = replace_with_bnb_linear(model, skipped, BitsAndBytesConfig(load_in_4bit=True))
    expected = {name for name, module in quantised.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    layers = {
        f"{planned.layer_prefix}.{layer}.{module.name}"
        for layer, kind in enumerate(planned.order)
        for module in planned.kinds[kind].modules
        if parameters.is_quantised(module, planned, layer)
    }
    outside = (*planned.before, *planned.after, planned.output)
    assert layers | {module.name for module in outside if parameters.is_quantised(module, planned)} == expected


# ------------------------------------------------------------------------------------------------------ wrong questions


@pytest.mark.parametrize(
    ("model_type", "asked", "words"),
    [
        ("llama", "q_prj", ["'q_prj'", "q_proj", "--target-modules"]),
        ("llama", "query_key_value", ["'query_key_value'", "--target-modules"]),
        ("llama", "q_proj,zzz", ["'zzz'"]),
        ("llama", "self_attn", ["'self_attn'", "attention, mlp"]),
        ("llama", "input_layernorm", ["'input_layernorm'", "norm"]),
        ("llama", "7.self_attn.q_proj", ["'7.self_attn.q_proj'"]),
        ("llama", "model.layers.00.self_attn.q_proj", ["q_proj"]),
        ("llama", "", ["all-linear, attention, mlp"]),
        ("llama", ",,", ["all-linear, attention, mlp"]),
        ("llama", "all-linear,q_proj", ["all-linear stands alone"]),
        ("llama", [3], ["names"]),
        ("gpt_oss", "mlp", ["gpt_oss", "experts", "attention"]),
        ("gpt_oss", "experts", ["'experts'", "LoRA cannot adapt"]),
        ("qwen3_moe", "gate_proj", ["up_proj", "fuses"]),
        ("mixtral", "w1,w2", ["w3", "fuses"]),
    ],
)
def test_wrong_targets_are_refused_by_name(model_type: str, asked: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parameters.targets(parse(small(model_type)), asked)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, None, 10**9])
def test_wrong_ranks_are_refused(rank: Any) -> None:
    with pytest.raises(UsageError, match="--rank"):
        parameters.count(parse(LLAMA_8B), "all-linear", rank)


def test_largest_rank() -> None:
    planned = parse(LLAMA_8B)
    assert parameters.count(planned, "attention", 4096).trainable == 256 * 13_631_488
    with pytest.raises(UsageError, match="rank 4097 is larger than the largest side of every adapted matrix, 4096"):
        parameters.count(planned, "attention", 4097)
    assert parameters.count(planned, "all-linear", 14336)


def test_dropout_on_experts_is_refused_as_peft_does() -> None:
    planned = parse(small("mixtral"))
    with pytest.raises(UsageError, match="lora_dropout to 0"):
        parameters.targets(planned, "all-linear", lora_dropout=0.1)
    assert parameters.targets(planned, "attention", lora_dropout=0.1)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FLAT),
    st.text(max_size=20)
    | st.lists(
        st.sampled_from(["q_proj", "mlp", "attention", "w1", "gate", "0", "model.layers.1", "self_attn.q_proj"])
    ).map(".".join)
    | st.lists(st.sampled_from(["q_proj", "mlp", "lm_head", "wte", "fc1", "all-linear"])),
    st.integers(-1, 600),
)
def test_any_names_give_a_usage_error_or_targets(case: tuple[str, int], asked: Any, rank: int) -> None:
    planned = parse(small(*case))
    with contextlib.suppress(UsageError):
        counts = parameters.count(planned, asked, rank)
        assert counts.trainable > 0
        assert counts.adapter_bytes > 4 * counts.trainable
