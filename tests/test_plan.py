"""A plan as a whole: how it is composed, its JSON, and what it needs to import."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import vramplan
from vramplan import Plan, UsageError, plan
from vramplan.planner import catalog, sources
from vramplan.planner import plan as module
from vramplan.planner.fit import fit_on

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def message(model: Any = TINY, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        plan(model, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def llama() -> Plan:
    return plan("llama-3.1-8b", method="qlora", rank=16, gpu="rtx-4090", stack="torch=2.11,peft=0.21")


def test_the_example() -> None:
    assert doctest.testmod(module) == (0, 1)


def test_json_has_the_keys_of_the_contract(llama: Plan) -> None:
    answer = llama.to_dict()
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    for key in ("model", "options", "parameters", "memory", "time", "gpus", "cost", "warnings", "calibration"):
        assert key in answer
    assert answer["vramplan_version"] == vramplan.__version__
    assert answer["model"]["name"] == "llama-3.1-8b"
    assert answer["model"]["verified"] == "exact"
    assert answer["options"]["gpu"] == "rtx-4090"
    assert answer["options"]["stack"]["torch"] == "2.11"
    assert answer["parameters"] == {
        "total": 8_030_261_248,
        "trainable": 41_943_040,
        "frozen": 8_030_261_248,
        "adapter_bytes": llama.counts.adapter_bytes,
        "adapted_modules": 224,
    }
    memory = answer["memory"]
    assert sum(part["bytes"] for part in memory["components"]) == memory["peak_allocated_bytes"]
    assert all(part["name"] and part["formula"] and part["source"] for part in memory["components"])
    assert memory["peak_allocated_bytes"] <= memory["peak_reserved_bytes"]
    assert memory["peak_reserved_bytes"] + memory["context_bytes"] == memory["device_bytes"]
    assert memory["peak_phase"]


def test_options_of_a_plan_give_the_plan_again(llama: Plan) -> None:
    answer = llama.to_dict()
    again = plan(answer["model"]["name"], **answer["options"]).to_dict()
    assert again == answer


def test_every_gpu_is_judged(llama: Plan) -> None:
    answer = llama.to_dict()
    assert len(answer["gpus"]) == len(catalog.gpus())
    budgets = [gpu["budget_bytes"] for gpu in answer["gpus"]]
    assert budgets == sorted(budgets)
    for gpu in [*answer["gpus"], answer["gpu"]]:
        assert gpu["headroom_bytes"] == gpu["budget_bytes"] - gpu["needed_bytes"]
        assert gpu["fits"] == (gpu["headroom_bytes"] >= 0)
    assert answer["gpu"] in answer["gpus"]
    assert answer["gpu"]["needed_bytes"] == answer["memory"]["needed_bytes"]
    lacking = {gpu["name"] for gpu in answer["gpus"] if gpu["lacks"]}
    assert "t4" in lacking
    assert "rtx-4090" not in lacking


def test_a_size_is_a_gpu_too() -> None:
    made = plan(TINY, gpu="24GiB")
    assert made.gpu is not None
    assert made.fit is not None
    assert made.fit.fits
    assert made.to_dict()["gpu"]["budget_bytes"] == 24 * 2**30
    assert plan(TINY).to_dict()["gpu"] is None


def test_exactly_full_fits() -> None:
    card = catalog.gpu("24GiB")
    assert fit_on(card, card.budget_bytes).fits
    assert not fit_on(card, card.budget_bytes + 1).fits
    assert fit_on(card, card.budget_bytes + 1).headroom_bytes == -1


def test_what_is_only_cached_can_be_given_back() -> None:
    options: dict[str, Any] = {"seq_len": 8192, "stack": "torch=2.11"}
    at_ease = plan("llama-3.1-8b", gpu="32GiB", **options)
    assert at_ease.fit is not None
    assert at_ease.fit.retries is None
    context = at_ease.memory.needed_bytes - at_ease.memory.peak_reserved_bytes
    least = at_ease.memory.peak_allocated_bytes + context  # the peak alone, with no room for a gap
    tight = plan("llama-3.1-8b", gpu="30GiB", **options)
    assert tight.fit is not None
    assert tight.fit.headroom_bytes < 0 < (tight.fit.retries or 0)
    assert tight.fit.fits
    assert tight.memory.components == at_ease.memory.components  # the figures are those of a run that has room
    assert tight.to_dict()["gpu"]["retries"] == tight.fit.retries
    too_small = plan("llama-3.1-8b", gpu=f"{least // 2**20}MiB", **options)
    assert too_small.fit is not None
    assert (too_small.fit.fits, too_small.fit.retries) == (False, None)


def test_full_fine_tuning_trains_everything() -> None:
    parameters = plan(TINY, method="full").to_dict()["parameters"]
    assert parameters["trainable"] == parameters["total"]
    assert parameters["frozen"] == parameters["adapted_modules"] == 0
    assert parameters["adapter_bytes"] is None


def test_costs_are_those_of_cards_that_hold_the_plan(tmp_path: Path) -> None:
    """3 epochs of 1,000 examples in micro-steps of one: 3,000 steps; prices by hand."""
    file = tmp_path / "prices.csv"
    file.write_text(
        "provider,gpu,gpu_count,usd_per_hour,date\n"
        "near,rtx-4090,1,0.5,2026-11-01\nnear,rtx-3060,1,0.1,2026-11-01\nfar,h100,8,16,2026-11-01\n"
        "far,t4,1,0,2026-11-01\n"
    )
    anywhere = plan("llama-3.1-8b", prices=file)
    made, _ = anywhere.costs()
    assert {each.offer.gpu for each in made} == {"rtx-4090", "h100"}  # the 12 GB are too few, the T4 has no bf16
    named = plan("llama-3.1-8b", gpu="rtx-4090", prices=file)
    (one,), _ = named.costs()
    assert named.time is not None
    assert one.hours == pytest.approx(3000 * named.time.step_s / 3600)
    assert (one.hours_low, one.hours_high) == pytest.approx(
        (3000 * named.time.low_s / 3600, 3000 * named.time.high_s / 3600)
    )
    assert one.usd == pytest.approx(0.5 * one.hours)
    assert named.to_dict()["cost"] == [one.to_dict()]
    assert plan("llama-3.1-8b", gpu="24GiB", prices=file).costs()[0] == ()
    (free,), _ = plan("llama-3.1-8b", gpu="t4", prices=file).costs()  # in fp16
    assert (free.usd, free.offer.gpu) == (0, "t4")


def test_sizes_beside_the_gpu(llama: Plan) -> None:
    sizes = {part.name: part for part in llama.sizes()}
    assert 0 < sizes["download"].bytes - 16_060_522_496 < 64 * 1024  # the Hub's index of Llama-3.1-8B
    assert "bf16 is assumed" in sizes["download"].formula
    assert sizes["adapter_model.safetensors"].bytes == llama.counts.adapter_bytes
    assert llama.to_dict()["sizes"][0]["bytes"] == sizes["download"].bytes


def test_warnings_are_gathered() -> None:
    made = plan(TINY, gpu="t4", seq_len=4096, stack="torch=1.13")
    assert [warning.split()[0] for warning in made.warnings] == ["seq_len", "t4", "torch"]


def test_what_was_assumed_is_named() -> None:
    config = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    assert "num_key_value_heads" in plan(config).to_dict()["model"]["assumed"]


def test_errors_name_what_is_wrong() -> None:
    assert "did you mean llama-3.1-8b" in message("llama-3.1-8")
    assert "(--gpu)" in message(gpu="rtx-4091")
    assert "(--stack)" in message(stack="torch=x")
    assert "unknown option 'btach_size'; did you mean batch_size" in message(btach_size=3)
    assert "did you mean q_proj" in message(target_modules="q_prj")
    assert message(rank=100_000) == (
        "rank 100000 is larger than the largest side of every adapted matrix, 128 (--rank)"
    )
    assert "model_type" in message({})
    assert "already quantised" in message({**TINY, "quantization_config": {"quant_method": "awq"}})


def test_options_are_read_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option must not wait for a download."""

    def refuse(model: object) -> None:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(module, "resolve_model", refuse)
    assert "rank" in message("someone/model", rank=0)
    assert "(--gpu)" in message("someone/model", gpu="?")


def test_a_bundled_name_is_looked_up_in_the_table_only() -> None:
    assert plan({**TINY, "_name_or_path": "llama-3.1-8b"}).bundled is None
    assert sources.resolve_model("gpt2").source == "bundled"


HEAVY = [
    "torch",
    "transformers",
    "peft",
    "numpy",
    "rich",
    "huggingface_hub",
    "importlib.metadata",
    "difflib",
    "tomllib",
]


def test_what_a_plan_imports(tmp_path: Path) -> None:
    """Neither what trains models nor what only some commands need."""
    code = (
        "import sys; from vramplan.planner.cli import main\n"
        "try: main(['llama-3.1-8b'])\n"
        f"except SystemExit as end: print(end.code, [m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == "0 []\n"


def test_importing_the_package_imports_nothing(tmp_path: Path) -> None:
    code = "import sys, vramplan; print([name for name in sys.modules if name.startswith('vramplan.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "[]\n"


def test_what_the_package_exports() -> None:
    assert set(vramplan.__all__) == {"Plan", "UsageError", "__version__", "plan"}
    assert all(getattr(vramplan, name) for name in vramplan.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'plna'"):
        _ = vramplan.plna


def test_warm_plan_before_the_replay(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What plan() costs around the memory engine."""
    estimate = plan("llama-3.1-8b").memory
    monkeypatch.setattr("vramplan.planner.memory.estimate", lambda *_, **__: estimate)
    benchmark(plan, "llama-3.1-8b", method="qlora", rank=16)
