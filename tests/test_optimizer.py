"""Optimizers, against recorded steps of the real ones and against the sources of torch, transformers, bitsandbytes."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner import optimizer
from vramplan.planner.errors import UsageError
from vramplan.planner.paper import Parameter, Tape

if TYPE_CHECKING:
    from vramplan.planner.optimizer import Held

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "optimizer_steps.json.gz").read_bytes()))
CASES: dict[str, Any] = RECORDED["cases"]


def local(tape: Tape, start: int) -> list[Any]:
    """The events since `start` as the recorded ones are written (RECORDED["about"])."""
    ids: dict[int, int] = {}
    out: list[Any] = []
    for event in tape.events[start:]:
        i = event >> 1
        if not event & 1:
            ids[i] = len(ids)
            out.append(tape.sizes[i])
        else:
            out.append(-1 - ids[i] if i in ids else [tape.sizes[i]])
    return out


def parameters(*shapes: tuple[int, ...], dtype: str = "fp32") -> list[Parameter]:
    return [Parameter(f"layers.{i}.weight", shape, dtype, True) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_recorded_event_by_event(name: str) -> None:
    case = CASES[name]
    ours = optimizer.get(case["optimizer"])
    trained = [Parameter(n, tuple(shape), dtype, True) for n, shape, dtype in case["parameters"]]
    embeddings, layer_norms = frozenset(case["embeddings"]), frozenset(case["layer_norms"])
    optimizer.check(ours, trained, embeddings)
    tape = Tape()
    state: dict[str, Held] = {}
    optimizer.play_creation(tape, ours, trained, state, layer_norms=layer_norms)
    assert local(tape, 0) == case["creation"]
    norms = []
    for i, step in enumerate(case["steps"]):
        start = len(tape.events)
        found_inf = optimizer.play_unscale(tape) if step["unscale"] else None
        assert local(tape, start) == step["unscale"]
        start = len(tape.events)
        norms.append(optimizer.play_clip(tape, trained))
        assert local(tape, start) == step["clip"]
        start = len(tape.events)
        scaled = found_inf is not None
        optimizer.play(
            tape, ours, trained, state, i == 0, embeddings=embeddings, layer_norms=layer_norms, scaled=scaled
        )
        assert local(tape, start) == step["step"]
        start = len(tape.events)
        del found_inf
        assert local(tape, start) == step["update"]


def test_every_optimizer_was_recorded() -> None:
    assert {optimizer.get(case["optimizer"]).name for case in CASES.values()} == {o.name for o in optimizer.OPTIMIZERS}


# --- names --------------------------------------------------------------------------------------------------------


def transformers_names() -> set[str]:
    """The names of transformers' `optim`, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        pytest.skip("transformers is not installed")
    tree = ast.parse((Path(found.origin).parent / "training_args.py").read_text())
    names = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "OptimizerNames")
    return {ast.literal_eval(n.value) for n in names.body if isinstance(n, ast.Assign)}


def test_names_are_those_of_transformers() -> None:
    assert set(optimizer.NAMES) | set(optimizer.ELSEWHERE) == transformers_names()
    assert not set(optimizer.NAMES) & set(optimizer.ELSEWHERE)
    assert optimizer.optimizer_names() == sorted(optimizer.NAMES)


def test_nearest_of_what_needs_a_package_can_be_planned() -> None:
    assert {near for _, near in optimizer.ELSEWHERE.values()} <= set(optimizer.NAMES)


def test_aliases() -> None:
    assert optimizer.get("adamw_8bit") is optimizer.get("adamw_bnb_8bit")
    assert optimizer.get("rmsprop_bnb_32bit") is optimizer.get("rmsprop_bnb")


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"unknown optimizer 'paged_adamw'; did you mean .*paged_adamw_.*\(--optimizer\)"
    ):
        optimizer.get("paged_adamw")


def test_name_that_needs_a_package_is_answered_with_the_package() -> None:
    with pytest.raises(UsageError, match=r"'adamw_torch_4bit' needs the package torchao.* adamw_8bit \(--optimizer\)"):
        optimizer.get("adamw_torch_4bit")


@pytest.mark.parametrize("name", ["rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"])
def test_bitsandbytes_rmsprop_takes_no_bfloat16(name: str) -> None:
    ours = optimizer.get(name)
    for dtype in ("fp32", "fp16"):
        optimizer.check(ours, parameters((64, 2048), (2048,), dtype=dtype))
    with pytest.raises(UsageError, match=f"{name.removesuffix('_32bit')} has no kernel for the bf16 gradient"):
        optimizer.check(ours, parameters((64, 2048), (2048,), dtype="bf16"))


def test_bitsandbytes_rmsprop_takes_large_bfloat16_where_states_have_8_bits() -> None:
    ours = optimizer.get("rmsprop_bnb_8bit")
    large = parameters((16, 256), dtype="bf16")
    optimizer.check(ours, large)
    with pytest.raises(UsageError, match=r"gradient of layers\.0\.weight"):
        optimizer.check(ours, large, {"layers.0.weight"})


# --- bytes --------------------------------------------------------------------------------------------------------

LARGE = (128, 1000)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kept", "paged"),
    [
        ("adamw_torch", LARGE, "bf16", 128_000 * 4, 0),
        ("adamw_torch_fused", LARGE, "fp32", 128_000 * 8 + 4, 0),
        ("sgd", LARGE, "bf16", 0, 0),
        ("adagrad", LARGE, "bf16", 128_000 * 2 + 4, 0),
        ("adafactor", LARGE, "bf16", (128 + 1000) * 4 + 4, 0),
        ("adafactor", (3, 128, 1000), "bf16", 3 * (128 + 1000) * 4 + 4, 0),
        ("adafactor", (1000,), "bf16", 1000 * 4 + 4, 0),
        ("adamw_8bit", LARGE, "bf16", 2 * (128_000 + 500 * 4), 0),
        ("adamw_8bit", (4096,), "bf16", 2 * (4096 + 16 * 4), 0),
        ("adamw_8bit", (4097,), "bf16", 2 * (4097 + 17 * 4), 0),
        ("adamw_8bit", (4095,), "bf16", 2 * 4095 * 4, 0),
        ("ademamix_8bit", LARGE, "bf16", 3 * (128_000 + 500 * 4), 0),
        ("lion_32bit", LARGE, "bf16", 128_000 * 4, 0),
        ("paged_adamw_32bit", LARGE, "bf16", 0, 128_000 * 8),
        ("paged_adamw_32bit", (99_999,), "bf16", 99_999 * 8, 0),
        ("paged_adamw_8bit", (100_000,), "bf16", 2 * 391 * 4, 200_000),
        ("paged_lion_8bit", LARGE, "bf16", 500 * 4, 128_000),
    ],
)
def test_state_bytes(name: str, shape: tuple[int, ...], dtype: str, kept: int, paged: int) -> None:
    ours = optimizer.get(name)
    assert optimizer.state_bytes(ours, shape, dtype) == kept
    assert optimizer.paged_bytes(ours, shape, dtype) == paged


def test_embeddings_keep_32_bit_states() -> None:
    ours = optimizer.get("adamw_8bit")
    assert optimizer.state_bytes(ours, LARGE, "bf16", embedding=True) == 128_000 * 8


shapes = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


@given(st.sampled_from(optimizer.OPTIMIZERS), shapes, st.sampled_from(["fp32", "bf16", "fp16"]), st.booleans())
def test_what_a_step_leaves_is_the_states_and_nothing_else(
    ours: optimizer.Optimizer, sizes: list[tuple[int, ...]], dtype: str, scaled: bool
) -> None:
    trained = parameters(*sizes, dtype=dtype)
    tape = Tape()
    state: dict[str, Held] = {}
    tables = any(prod(shape) >= optimizer.LEAST_8BIT for shape in sizes) * len(ours.tables) * optimizer.TABLE_BYTES
    expected = sum(optimizer.state_bytes(ours, shape, dtype) for shape in sizes) + tables
    for first in (True, False, False):
        optimizer.play(tape, ours, trained, state, first, scaled=scaled)
        assert alive(tape) == expected
    state.clear()
    assert alive(tape) == 0


def alive(tape: Tape) -> int:
    """Bytes allocated and not freed; every free is of something alive."""
    live: dict[int, int] = {}
    for event in tape.events:
        if event & 1:
            del live[event >> 1]
        else:
            assert event >> 1 not in live
            live[event >> 1] = tape.sizes[event >> 1]
    assert len(tape.sizes) == len(tape.labels) == len(tape.scopes)
    return sum(live.values())


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_later_step_may_be_played_alone() -> None:
    tape = Tape()
    state: dict[str, Held] = {}
    ours = optimizer.get("adafactor")
    optimizer.play(tape, ours, parameters((8, 16), (16,), dtype="bf16"), state, False)
    assert alive(tape) == 2 * 4  # each parameter's RMS
    assert "states" not in state


def test_a_step_is_moved_behind_what_the_tape_holds() -> None:
    tape = Tape()
    tape.scope = "optimizer step"
    held = tape.new((2,), "fp32", "something else")
    state: dict[str, Held] = {}
    optimizer.play(tape, optimizer.get("adamw_torch"), parameters((8, 16)), state, True)
    assert tape.labels == ["something else", "exp_avg", "exp_avg_sq", "sqrt of exp_avg_sq"]
    assert tape.events == [0, 2, 4, 6, 7]
    assert set(tape.scopes) == {"optimizer step"}
    assert held.storage is not None


def test_groups_are_transformers() -> None:
    names = {
        "model.embed_tokens.weight": True,
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.q_proj.bias": False,
        "model.layers.0.self_attn.q_norm.weight": False,
        "model.layers.0.input_layernorm.weight": False,
        "model.norm.weight": False,
        "transformer.h.0.ln_1.weight": True,
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": True,
    }
    decay, others = optimizer.groups([Parameter(name, (1,), "fp32", True) for name in names])
    assert [p.name for p in decay] == [name for name, decays in names.items() if decays]
    assert [p.name for p in others] == [name for name, decays in names.items() if not decays]
    _, others = optimizer.groups(
        [Parameter("transformer.h.0.ln_1.weight", (1,), "fp32", True)], {"transformer.h.0.ln_1.weight"}
    )
    assert others


def test_dtypes_are_taken_in_the_order_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtypes in (("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16", "fp32", "bf16")):
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        theirs = torch.optim.Optimizer._group_tensors_by_device_and_dtype(
            [[torch.zeros(1, dtype=kinds[dtype]) for dtype in dtypes]]
        )
        ours = optimizer._by_dtype([((1,), dtype, False) for dtype in dtypes])
        assert [kinds[same[0][1]] for same in ours] == [dtype for _, dtype in theirs]


def test_a_reduction_of_few_elements_needs_no_buffer() -> None:
    assert optimizer.reduction_buffers(1000, 1, False, optimizer.H200) == (0, 0)


def test_the_buffers_of_a_reduction_follow_the_gpu() -> None:
    # four blocks of 512 threads on each multiprocessor of an H200; on a smaller card more than run at once, since no
    # thread sums more than 256 elements
    assert optimizer.reduction_buffers(65_536_000, 1, False, optimizer.H200) == (132 * 4 * 4, 4)
    smaller = optimizer.Multiprocessors(82, 1536)
    assert optimizer.reduction_buffers(65_536_000, 1, False, smaller) == (65_536_000 // (512 * 256) * 4, 4)
