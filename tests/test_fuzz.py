"""Whatever comes in, out comes a plan or one clear sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import JSON
from test_plan import TINY

from vramplan import Plan, UsageError, plan
from vramplan.planner import catalog, sources
from vramplan.planner.architecture import model_types
from vramplan.planner.configuration import defaults_table
from vramplan.planner.optimizer import NAMES
from vramplan.planner.training import OPTIONS

if TYPE_CHECKING:
    from pathlib import Path

# Small sizes of every family, so that a plan takes milliseconds; many layers are no other case than two.
SMALL = {
    **TINY,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FIELDS = sorted(
    {name for entry in defaults_table()["types"].values() for name in entry["defaults"]} - {"num_hidden_layers"}
)
VALID = {
    "method": st.sampled_from(["qlora", "lora", "full"]),
    "rank": st.integers(1, 64),
    "lora_dropout": st.sampled_from([0, 0.1]),
    "target_modules": st.sampled_from(["all-linear", "attention", "mlp", "q_proj", "lm_head", "embed_tokens"]),
    "batch_size": st.integers(1, 4) | st.integers(1, 10**6),
    "seq_len": st.integers(1, 64) | st.integers(1, 10**8),
    "padded": st.booleans(),
    "gradient_accumulation_steps": st.integers(1, 3) | st.integers(1, 10**6),
    "gradient_checkpointing": st.booleans(),
    "optimizer": st.sampled_from(NAMES),
    "weights_dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
    "mixed_precision": st.sampled_from(["bf16", "fp16", "no"]),
    "double_quant": st.booleans(),
    "prepare_kbit": st.booleans(),
    "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    "expandable_segments": st.booleans(),
    "gpu": st.sampled_from([gpu.name for gpu in catalog.gpus()] + ["24GiB"]),
    "stack": st.sampled_from(["torch=2.11", "torch=2.15,transformers=5.17", "torch=1.0"]),
}


def judged(model: Any, **options: Any) -> str:
    """The error in words, "" for a plan; anything else fails."""
    try:
        made = plan(model, **options)
    except UsageError as error:
        words = str(error)
        assert words
    else:
        assert isinstance(made, Plan)
        answer = made.to_dict()
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer
        parts = answer["memory"]["components"]
        assert sum(part["bytes"] for part in parts) == answer["memory"]["peak_allocated_bytes"]
        assert all(part["bytes"] >= 0 for part in parts)
        words = ""
    assert "\n" not in words
    assert len(words) < 600
    return words


@given(JSON)
@example({"model_type": "llama"} | {"vocab_size": 10**5000})
@example({"model_type": ["llama"]})
@example({1: 2})
def test_random_json_as_a_model(model: Any) -> None:
    if not isinstance(model, str):
        judged(model, seq_len=16)


@settings(max_examples=200)
@given(st.sampled_from(model_types()), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_random_fields_of_a_config(model_type: str, fields: dict[str, Any]) -> None:
    judged({**SMALL, "model_type": model_type, **fields}, seq_len=16)


@given(st.dictionaries(st.sampled_from([*OPTIONS, "gpu", "stack", "x"]), JSON, max_size=3))
def test_random_values_of_options(options: dict[str, Any]) -> None:
    judged(TINY, **options)


@settings(max_examples=200)
@given(st.sampled_from(model_types()), st.fixed_dictionaries({}, optional=VALID))
def test_random_valid_options_of_every_family(model_type: str, options: dict[str, Any]) -> None:
    judged({**SMALL, "model_type": model_type}, **{"seq_len": 16, **options})


@settings(max_examples=50)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_random_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file: Path = tmp_path_factory.mktemp("model") / "config.json"
    file.write_bytes(content)
    judged(str(file))


@given(st.text(max_size=50) | st.sampled_from(["..", "/", "~", "a/b/c", "~nobody/x", "a" * 300, "a/" * 3000, "a\0b"]))
def test_random_names_of_models(name: str) -> None:
    def offline(repo: str) -> None:
        raise UsageError("the Hub is not asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_from_hub", offline)
        judged(name, seq_len=16)
