"""Which runs a probe chooses on which GPU, and where the planner says that memory runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.planner import catalog
from vramplan.planner.errors import Failure, UsageError
from vramplan.planner.units import GIB, MIB
from vramplan.probes import probe_cases
from vramplan.probes.probe_cases import Case, Machine, boundary, card_of, case_of, needs_more_than_free, seconds

H200 = Machine(
    card_of("NVIDIA H200", (9, 0), 143_156 * MIB, 143_771 * MIB), "NVIDIA H200", "uuid", "580.1", {"torch": "2.11.0"}
)
SMALL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}


def bundled(machine: Machine, limit_bytes: int | None = None) -> list[Case]:
    asked, notes = probe_cases.possible(probe_cases.bundled(grid=False, sharing={}), machine)
    assert not notes
    return list(probe_cases.fitting(asked, machine, limit_bytes))


def of_size(gib: int, **changes: object) -> Machine:
    card = replace(H200.card, budget_bytes=gib * GIB, driver_bytes=gib * GIB)
    return replace(H200, card=card, **changes)  # type: ignore[arg-type]


def test_the_catalogs_card_with_this_ones_own_memory() -> None:
    assert H200.card.name == "h200"
    assert H200.card.budget_bytes == 143_156 * MIB
    t4 = card_of("Tesla T4", (7, 5), 15 * GIB - 100 * MIB, 15 * GIB)
    assert (t4.name, t4.bf16) == ("t4", False)


@pytest.mark.parametrize(
    ("name", "mib", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 81_050, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 40_338, "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3", 81_000, "h100"),
        ("NVIDIA L4", 22_500, "l4"),
        ("Tesla V100-SXM2-16GB", 16_150, "v100-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 7_740, "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 15_880, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 3080", 11_900, "rtx-3080-12gb"),
    ],
)
def test_cards_by_the_name_that_cuda_gives(name: str, mib: int, known: str) -> None:
    assert card_of(name, (8, 9), mib * MIB, None).name == known


def test_a_card_nobody_knows() -> None:
    card = card_of("NVIDIA Q9000", (7, 0), 11 * GIB, None)
    assert (card.name, card.title, card.bf16, card.compute_capability) == ("11264MiB", "NVIDIA Q9000", False, "7.0")
    assert catalog.gpu(card.name).name == card.name  # so that plans of it find its calibration
    assert catalog.gpu(card.name).budget_bytes == 11 * GIB
    # a slice of a GPU is not the GPU
    assert card_of("NVIDIA H200", (9, 0), 18 * GIB, None).name == "18432MiB"
    whole = card_of("NVIDIA H200", (9, 0), H200.card.budget_bytes, None, multiprocessors=120, sliced=True)
    assert (whole.name, whole.multiprocessors) == ("143156MiB", 120)


def test_all_bundled_runs_fit_the_largest_gpu_and_fewer_a_small_one() -> None:
    cases = bundled(H200)
    assert len(cases) == len(probe_cases._table()["default"])
    assert {case.plan.options.method for case in cases} == {"qlora", "lora", "full"}
    few = bundled(of_size(8))
    assert 3 <= len(few) < len(cases)
    assert all(case.predicted.needed_bytes <= 8 * GIB for case in few)
    limited = bundled(H200, 8 * GIB)
    assert [case.id.partition("-room=")[0] for case in limited] == [case.id for case in few]
    assert limited[0].id.endswith("-room=7.24GiB")
    assert all(case.limited and not other.limited for case, other in zip(limited, few, strict=True))


def test_the_grid_is_larger_and_has_no_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "default": [{"model": "gpt2", "options": {"method": "full", "seq_len": 256}}],
        "full": {"models": ["gpt2", "opt-125m"], "settings": [{"method": "full", "seq_len": 256}, {"method": "lora"}]},
    }
    table["full"]["settings"][1]["seq_len"] = 256
    monkeypatch.setattr(probe_cases, "_table", lambda: table)
    asked, _ = probe_cases.possible(probe_cases.bundled(grid=True, sharing={}), H200)
    ids = [case.id for case in probe_cases.fitting(asked, H200, None)]
    assert ids == [
        "gpt2-method=full-seq_len=256",
        "gpt2-method=lora-seq_len=256",
        "opt-125m-method=full-seq_len=256",
        "opt-125m-method=lora-seq_len=256",
    ]


def test_the_grid_for_several_gpus_has_its_own_ways_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cases, "find_spec", lambda _: True)

    def ways(**sharing: object) -> set[tuple[str, int]]:
        asked, notes = probe_cases.possible(probe_cases.bundled(grid=True, sharing=sharing), H200)
        assert not notes
        return {(each["options"]["parallel"], each["options"]["num_gpus"]) for each in asked}

    assert ways(num_gpus=4) == {("fsdp", 4), ("ddp", 4), ("zero3", 4)}
    assert ways(num_gpus=8, parallel="ddp") == {("ddp", 8)}
    assert ways(num_gpus=8, cpu_offload=True) == {("fsdp", 8), ("zero3", 8)}
    assert ways(num_gpus=8, reshard_after_forward=False) == {("fsdp", 8)}
    asked, _ = probe_cases.possible(probe_cases.bundled(grid=True, sharing={"num_gpus": 8}), H200)
    cases = list(probe_cases.fitting(asked, H200, None))
    assert len(cases) == len(asked) == 21
    # of what four hold two runs of 70B are too much
    fewer, _ = probe_cases.possible(probe_cases.bundled(grid=True, sharing={"num_gpus": 4}), H200)
    assert len(list(probe_cases.fitting(fewer, H200, None))) == 19


def test_without_deepspeed_its_runs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cases, "find_spec", lambda _: None)
    asked, notes = probe_cases.possible(probe_cases.bundled(grid=True, sharing={"num_gpus": 8}), H200)
    assert notes == ["deepspeed is not installed; runs that need it are left out"]
    assert len(asked) == 20


def test_every_bundled_run_can_be_planned() -> None:
    table = probe_cases._table()
    for each in table["default"]:
        assert catalog.find_model(each["model"]) is not None
    for model in table["full"]["models"]:
        assert catalog.find_model(model) is not None
    for settings in table["full"]["settings"]:
        case_of(SMALL, {**settings, "seq_len": 256}, H200)


def test_without_bf16_everything_is_fp16() -> None:
    machine = of_size(15)
    machine = replace(machine, name="Tesla T4", card=replace(machine.card, bf16=False))
    asked, notes = probe_cases.possible(probe_cases.bundled(grid=True, sharing={}), machine)
    assert notes == ["Tesla T4 has no bf16, so everything is run in fp16"]
    by_method = {each["options"]["method"]: each["options"] for each in asked}
    assert {each["options"]["mixed_precision"] for each in asked} == {"fp16"}
    assert {method: o["weights_dtype"] for method, o in by_method.items()} == {
        "qlora": "fp16",
        "lora": "fp16",
        "full": "fp32",
    }
    for options in by_method.values():
        case = case_of(SMALL, {**options, "seq_len": 256}, machine)
        assert "bf16" not in case.options.values()


def test_without_bf16_zero_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's fp16 is not planned."""
    monkeypatch.setattr(probe_cases, "find_spec", lambda _: True)
    machine = replace(H200, name="Tesla V100", card=replace(H200.card, bf16=False))
    asked, notes = probe_cases.possible(probe_cases.bundled(grid=True, sharing={"num_gpus": 4}), machine)
    assert {each["options"]["parallel"] for each in asked} == {"fsdp", "ddp"}
    assert notes[-1] == "runs that cannot be in fp16 are left out"
    with pytest.raises(UsageError, match=r"^mixed_precision fp16 is not planned under zero2: .*; choose"):
        probe_cases.possible(probe_cases.bundled(grid=False, sharing={"num_gpus": 4, "parallel": "zero2"}), machine)


def test_without_bitsandbytes_nothing_is_quantised() -> None:
    machine = replace(H200, bitsandbytes="bitsandbytes does not work with this CUDA")
    asked, notes = probe_cases.possible(probe_cases.bundled(grid=True, sharing={}), machine)
    assert {each["options"]["method"] for each in asked} == {"lora", "full"}
    assert not [each for each in asked if "8bit" in each["options"].get("optimizer", "")]
    assert notes[0].startswith("bitsandbytes does not work with this CUDA; runs that need it")


def test_where_nothing_fits() -> None:
    with pytest.raises(Failure, match=r"none of the bundled runs fits the 1\.50 GiB that are free"):
        bundled(of_size(24, others_bytes=24 * GIB - 3 * GIB // 2))
    with pytest.raises(UsageError, match=r"nothing is left beside the CUDA context.*--memory-limit"):
        case_of(SMALL, {}, H200, GIB // 2)


def test_others_memory_is_no_room() -> None:
    asked = {"seq_len": 1024, "batch_size": 8}
    alone = case_of(SMALL, asked, of_size(24))
    needed = alone.plan.memory.needed_bytes
    shared = of_size(24, others_bytes=24 * GIB - needed + 1)
    case = case_of(SMALL, asked, shared)
    assert alone.room_bytes - case.room_bytes == shared.others_bytes
    said = needs_more_than_free(case, shared)
    assert said.startswith("the run needs ")
    assert "other processes hold" in said
    assert not needs_more_than_free(alone, of_size(24))
    # too large for the card itself: nobody else's fault, and its end is a result
    tiny = of_size(2)
    assert not needs_more_than_free(case_of(SMALL, asked, tiny), tiny)


@pytest.mark.parametrize(("over", "step"), [("batch_size", 1), ("seq_len", 64)])
def test_a_boundary_is_where_the_estimate_turns(over: str, step: int) -> None:
    limit = 2 * GIB
    options = {"method": "full", "seq_len": 512} if over == "batch_size" else {"method": "full", "batch_size": 4}
    found, size = boundary(SMALL, options, H200, limit, over)
    assert size == step
    assert found.survives is not None
    assert found.fails == found.survives + step
    assert case_of(SMALL, {**options, over: found.survives}, H200, limit).survives
    assert not case_of(SMALL, {**options, over: found.fails}, H200, limit).survives


def test_boundaries_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"^seq_len 2048 still fits"):
        boundary(SMALL, {}, H200, None, "seq_len")
    with pytest.raises(UsageError, match=r"^not even batch_size 1 fits into"):
        boundary("qwen2.5-14b", {}, H200, 8 * GIB, "batch_size")


def test_a_slower_gpu_and_a_larger_model_take_longer() -> None:
    small, large = case_of("gpt2", {"seq_len": 512}, H200), case_of("llama-3.1-8b", {}, H200)
    assert seconds(small, 1e14) < seconds(large, 1e14)
    assert seconds(large, 1e15) < seconds(large, 1e14)


def test_the_options_of_a_line_are_those_that_matter_and_give_the_same_run() -> None:
    from vramplan import plan

    case = case_of("gpt2", {"method": "lora", "target_modules": "attention", "seq_len": 256}, H200)
    assert case.id == "gpt2-method=lora-target_modules=attention-seq_len=256"
    assert "num_gpus" not in case.options
    assert None not in case.options.values()
    again = plan("gpt2", gpu="h200", **case.options)
    assert again.memory.peak_allocated_bytes == case.plan.memory.peak_allocated_bytes
