"""Sizes of files against the files that transformers and PEFT write, and host memory against a real load."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_models import FLAT, real_model, small

from vramplan import plan
from vramplan.planner import catalog, memory, sizes
from vramplan.planner.architecture import parse
from vramplan.planner.units import MIB

if TYPE_CHECKING:
    from vramplan.planner.plan import Plan

STEPS = 2048  # adam counts the steps of each tensor in 4 B
TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def built(config: dict[str, Any], dtype: str) -> Any:
    """transformers' model of a config, on the CPU, with whatever numbers stand there."""
    torch = pytest.importorskip("torch")
    model = real_model(config).to_empty(device="cpu").to(getattr(torch, TORCH[dtype]))
    model.tie_weights()
    return model


def file_bytes(folder: Path, suffix: str = ".safetensors") -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(suffix))


# --------------------------------------------------------------------------------------------------------- the download


# transformers writes each expert of these under its own name, and a few buffers: the header, and bytes of buffers
UNFUSED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe", "granitemoehybrid", "mixtral", "olmoe", "phimoe")
UNFUSED += ("qwen2_moe", "qwen3_moe", "apertus", "gpt_neox")


@pytest.mark.parametrize(("model_type", "index"), [case for case in FLAT if case[1] == 0])
def test_the_download_is_what_transformers_saves(model_type: str, index: int, tmp_path: Path) -> None:
    config = small(model_type, index)
    built(config, "bf16").save_pretrained(tmp_path)
    planned = sizes.download(parse(config), "bf16").bytes
    if model_type in UNFUSED:
        assert abs(planned - file_bytes(tmp_path)) < 4096
    else:
        assert planned == file_bytes(tmp_path)


def test_downloads_of_models_that_people_know() -> None:
    def planned(name: str, dtype: str) -> int:
        model = catalog.find_model(name)
        assert model is not None
        return sizes.download(parse(model.config), dtype, model.hub_total).bytes

    # the index of meta-llama/Llama-3.1-8B says total_size 16060522496: two bytes for each of 8,030,261,248 weights
    assert 0 < planned("llama-3.1-8b", "bf16") - 16_060_522_496 < 64 * 1024
    # gpt2 is published in float32, with its causal masks: 548,105,171 B on the Hub
    assert abs(planned("gpt2", "fp32") - 548_105_171) < 64 * 1024


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16"), ({"dtype": "float16"}, "fp16"), ({"dtype": "torch.float32"}, "fp32"),
        ({}, None), ({"dtype": None, "torch_dtype": "float16"}, "fp16"), ({"dtype": "float8_e4m3fn"}, None),
        ({"dtype": 16}, None),
    ],
)  # fmt: skip
def test_published_dtype(config: dict[str, Any], dtype: str | None) -> None:
    assert sizes.published_dtype(config) == dtype


# ---------------------------------------------------------------------------------------------------------- checkpoints

RUNS = [
    {"method": "full", "optimizer": "adamw_torch_fused"},
    {"method": "full", "optimizer": "adamw_torch"},
    {"method": "full", "optimizer": "adamw_8bit"},
    {"method": "full", "optimizer": "ademamix_8bit"},
    {"method": "full", "optimizer": "paged_lion_8bit"},
    {"method": "full", "optimizer": "adafactor"},
    {"method": "full", "optimizer": "sgd"},
    {"method": "full", "optimizer": "adagrad"},
    {"method": "full", "optimizer": "rmsprop", "weights_dtype": "bf16"},
    {"method": "lora", "optimizer": "adamw_torch_fused"},
    {"method": "lora", "optimizer": "adamw_8bit"},
    {"method": "lora", "optimizer": "paged_adamw_32bit", "target_modules": "q_proj,lm_head", "weights_dtype": "bf16"},
]


def trained(planned: Plan, folder: Path) -> Path:
    """The checkpoint of transformers.Trainer after two steps on the CPU."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    run = planned.options
    if "bit" in run.optimizer:  # one manager serves the whole process, and remembers the last model's embeddings
        pytest.importorskip("bitsandbytes").optim.GlobalOptimManager.get_instance().initialize()
    torch.manual_seed(0)
    model = built(planned.model.config, run.weights_dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    if run.lora:
        peft = pytest.importorskip("peft")
        names = planned.counts.names if isinstance(planned.counts.names, str) else list(planned.counts.names)
        model = peft.get_peft_model(model, peft.LoraConfig(r=run.rank, target_modules=names, task_type="CAUSAL_LM"))
    ids = torch.arange(8)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=1, optim=run.optimizer, use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 4).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("options", RUNS, ids=lambda o: f"{o['method']}-{o['optimizer']}-{o.get('weights_dtype', '')}")
def test_checkpoints_are_what_trainer_writes(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"weights_dtype": "fp32", **options}
    precision = "bf16" if options["weights_dtype"] == "bf16" else "no"
    planned = plan(small("llama"), seq_len=8, mixed_precision=precision, **options)
    weights, states = sizes.checkpoint(planned.architecture, planned.counts, planned.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = trained(planned, tmp_path)
    assert weights.bytes == (folder / weights.name).stat().st_size
    tensors = len(zipfile.ZipFile(folder / states.name).infolist())
    assert 0 <= (folder / states.name).stat().st_size - states.bytes < 320 * tensors + 2048
    others = [file for file in folder.iterdir() if file.name not in (weights.name, states.name)]
    assert {file.name for file in others} >= {
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    }
    assert sum(file.stat().st_size for file in others) < 64 * 1024


def bytes_of(model: str, **options: Any) -> dict[str, int]:
    return {part.name: part.bytes for part in plan(model, **options).sizes()}


def test_what_fsdp_holds_in_float32_is_saved_in_float32() -> None:
    one = bytes_of("qwen2.5-0.5b", method="full")
    two = bytes_of("qwen2.5-0.5b", method="full", num_gpus=2, parallel="fsdp")
    numel = plan("qwen2.5-0.5b", method="full").counts.total
    assert 2 * numel <= two["model.safetensors"] - one["model.safetensors"] < 2 * numel + 1024  # longer offsets
    assert two["pytorch_model_fsdp.bin"] == 4 * numel
    assert two["optimizer.bin"] - one["optimizer.pt"] == 2 * 2 * numel
    adapter = bytes_of("qwen2.5-0.5b", method="lora", num_gpus=2, parallel="fsdp")
    assert 0 < adapter["adapter_model.safetensors"] - adapter["pytorch_model_fsdp.bin"] < 80_000  # the header


def test_what_deepspeed_writes() -> None:
    """float32 weights and states in its folder; the 16-bit weights too where they are whole."""
    numel = plan("qwen2.5-0.5b", method="full").counts.total
    for parallel, names, low in (
        ("zero1", {"model.safetensors", "global_step*/"}, 2),
        ("zero3", {"global_step*/"}, 0),
    ):
        found = bytes_of("qwen2.5-0.5b", method="full", num_gpus=2, parallel=parallel)
        assert {name for name in found if not name.startswith(("download", "host", "disk"))} == names
        assert found["global_step*/"] == pytest.approx((12 + low) * numel, abs=STEPS)
    found = bytes_of("qwen2.5-0.5b", method="lora", num_gpus=2, parallel="zero3")
    trained = plan("qwen2.5-0.5b", method="lora").counts.trainable
    assert found["global_step*/"] == pytest.approx(12 * trained, abs=STEPS)
    assert "adapter_model.safetensors" in found


# ------------------------------------------------------------------------------------------------ host memory of ranks


@pytest.mark.parametrize(
    ("options", "ranks", "itemsize"),
    [
        ({"method": "full", "num_gpus": 4, "parallel": "fsdp"}, 4, 4),  # made float32 on each
        ({"method": "full", "num_gpus": 64, "parallel": "fsdp"}, 8, 4),  # of one host
        ({"method": "full", "num_gpus": 4, "parallel": "fsdp", "mixed_precision": "no"}, 4, 0),
        ({"method": "full", "num_gpus": 4, "parallel": "fsdp", "weights_dtype": "fp32"}, 4, 4),
        ({"method": "full", "num_gpus": 4, "parallel": "ddp"}, 4, 0),
        ({"method": "full", "num_gpus": 4, "parallel": "ddp", "weights_dtype": "fp32"}, 4, 4),
        ({"method": "lora", "num_gpus": 4, "parallel": "fsdp"}, 4, 0),
    ],
)
def test_every_rank_loads_the_model(options: dict[str, Any], ranks: int, itemsize: int) -> None:
    made = plan("qwen2.5-0.5b", **options)
    found = sizes.host_memory(made.architecture, made.options, "bf16")
    assert found.bytes == ranks * itemsize * made.counts.total


def test_what_is_offloaded_is_in_blocks_of_a_power_of_two() -> None:
    """Embedding, head, 2 x (q, k, v, o, 3 of the MLP, 2 norms) and a norm, cut in two along the first dimension."""
    config = {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 448, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    sharing = {"method": "full", "num_gpus": 2, "parallel": "fsdp", "cpu_offload": True}
    rows = {part.name: part.bytes for part in plan(config, **sharing).sizes()}
    kib = 1024
    layer = 2 * 128 * kib + 2 * 64 * kib + 3 * 256 * kib + 2 * 512  # 224 x 256 x 4 B are 224 KiB; a norm's half 512 B
    held = 2 * 256 * kib + 2 * layer + 512  # 160 x 256 x 4 B are 160 KiB
    exact = 2 * 160 * kib + 2 * (2 * 128 * kib + 2 * 64 * kib + 3 * 224 * kib + 2 * 512) + 512
    assert rows["host memory, offload"] == 2 * (2 * held + 2 * exact + 21 * 4)  # a step for each tensor


def test_pinned_memory_as_measured() -> None:
    """PyTorch's own count of it: what two ranks' shards and gradients take, and the 256 MiB of an earlier copy."""
    file = Path(sizes.__file__).parents[1] / "tables" / "offload_times.json"
    first = json.loads(file.read_text(encoding="utf-8"))["steps"][0]
    assert (first["model"], first["method"]) == ("qwen2.5-0.5b", "full")
    asked = {"method": "full", "seq_len": 1024, "num_gpus": 2, "parallel": "fsdp", "cpu_offload": True}
    made = plan(first["model"], **asked)
    run = memory.run_of(made.architecture, made.options, made.device, made.counts)
    assert run.sharing is not None
    planned = run.sharing.in_host_memory(run)
    measured = first["held"]["allocated_bytes.current"]
    assert planned["shards"] + planned["gradients"] + 256 * MIB == pytest.approx(measured, rel=5e-4)


def test_what_zero_offloads() -> None:
    numel = plan("qwen2.5-0.5b", method="full").counts.total
    largest = 151_936 * 896
    sharing = {"method": "full", "num_gpus": 2, "cpu_offload": True}
    rows = {parallel: bytes_of("qwen2.5-0.5b", parallel=parallel, **sharing) for parallel in ("zero2", "zero3")}
    planned = 2 * ((4 + 4 + 8 + 2) * numel // 2 + 2 * largest)
    assert rows["zero2"]["host memory, offload"] == pytest.approx(planned, abs=STEPS)
    assert rows["zero3"]["host memory, offload"] == pytest.approx((2 + 4 + 4 + 8 + 2) * numel, abs=STEPS)


def test_an_adapter_is_saved_as_it_is_trained() -> None:
    def adapter(**options: Any) -> int:
        made = plan("llama-3.1-8b", **options)
        weights, states = sizes.checkpoint(made.architecture, made.counts, made.options)
        assert weights.bytes == made.counts.adapter_bytes
        header = weights.bytes - states.bytes // 2  # adam's two states are as large as the weights
        assert -2048 < header < 80_000
        return weights.bytes

    # SFTTrainer holds an adapter on a quantised base in bf16, else in float32
    assert adapter(trainer="trl") < 0.51 * adapter()
    assert adapter(trainer="trl", method="lora") == adapter(method="lora") == adapter()


def test_paged_states_are_saved_too() -> None:
    def states(optimizer: str) -> int:
        made = plan("llama-3.1-8b", optimizer=optimizer)
        return sizes.checkpoint(made.architecture, made.counts, made.options)[-1].bytes

    assert states("paged_adamw_8bit") == states("adamw_8bit")
    assert states("paged_adamw_32bit") == 8 * 41_943_040


@pytest.mark.parametrize(("steps", "kept"), [(1, 1), (499, 1), (500, 1), (501, 2), (1000, 2), (3000, 6)])
def test_disk_by_hand(steps: int, kept: int) -> None:
    made = plan(small("llama"), seq_len=8)
    rows = sizes.sizes(made.architecture, made.counts, made.options, steps, "bf16")
    by_name = {row.name: row.bytes for row in rows}
    both = by_name["adapter_model.safetensors"] + by_name["optimizer.pt"]
    assert by_name["disk"] == by_name["download"] + kept * both
    assert all(row.formula and row.source for row in rows)


@pytest.mark.parametrize(("save_steps", "steps"), [(2, 3), (2, 4), (5, 4)])
def test_checkpoints_come_as_often_as_trainer_saves(save_steps: int, steps: int, monkeypatch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments("unused", save_steps=save_steps, use_cpu=True, report_to=[])
    assert transformers.TrainingArguments("unused", use_cpu=True).save_steps == sizes.SAVE_STEPS
    assert arguments.save_total_limit is None
    flow, saves = transformers.trainer_callback.DefaultFlowCallback(), 0
    for step in range(1, steps + 1):
        state = transformers.TrainerState(global_step=step, max_steps=steps, save_steps=save_steps)
        saves += flow.on_step_end(arguments, state, transformers.TrainerControl()).should_save
    monkeypatch.setattr(sizes, "SAVE_STEPS", save_steps)
    made = plan(small("llama"), seq_len=8)
    base = sizes.download(made.architecture, "bf16")
    one = sizes.checkpoint(made.architecture, made.counts, made.options)
    assert sizes.disk(base, one, steps).bytes == base.bytes + saves * sum(part.bytes for part in one)


# ---------------------------------------------------------------------------------------------------------- host memory

LOAD = """
import re, sys, torch, transformers

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)  # whatever the first load makes
before = anonymous()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print("grown by", anonymous() - before)
"""
LARGER = small("llama") | {"vocab_size": 40_000, "hidden_size": 512}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_stay_in_the_file_unless_they_are_cast(dtype: str, tmp_path: Path) -> None:
    for name, config in (("tiny", small("llama")), ("larger", LARGER)):
        built(config, "bf16").save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "larger"), TORCH[dtype]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(done.stdout.partition("grown by ")[2])
    made = plan(LARGER, seq_len=8, method="lora", weights_dtype=dtype)
    planned = sizes.host_memory(made.architecture, made.options, "bf16").bytes
    assert planned == (0 if dtype == "bf16" else 4 * made.counts.total)
    assert made.counts.total * 4 > 160 * MIB
    assert abs(grown - planned) < 12 * MIB


def test_a_quantised_base_goes_weight_by_weight() -> None:
    made = plan("llama-3.1-8b", weights_dtype="bf16")
    assert sizes.host_memory(made.architecture, made.options, "bf16").bytes == 0
    assert sizes.host_memory(made.architecture, made.options, "fp32").bytes == 128_256 * 4096 * 2


# -------------------------------------------------------------------------------------------------------- several GPUs


def test_what_saving_puts_together_on_the_first_rank() -> None:
    def saving(**options: Any) -> int | None:
        return bytes_of("qwen2.5-0.5b", num_gpus=2, **options).get("host memory, saving")

    numel = plan("qwen2.5-0.5b", method="full").counts.total
    assert saving(method="full", parallel="fsdp") == pytest.approx(8 * numel, abs=64_000)
    assert saving(method="full", parallel="fsdp", optimizer="sgd") == pytest.approx(4 * numel, abs=64_000)
    assert saving(method="full", parallel="zero3") is None  # zero3_save_16bit_model is off
    adapter = plan("qwen2.5-0.5b", method="lora", num_gpus=2, parallel="zero3").counts.adapter_bytes
    assert saving(method="lora", parallel="zero3") == adapter
    assert saving(method="full", parallel="zero2") is None
    assert saving(method="full", parallel="ddp") is None
    assert bytes_of("qwen2.5-0.5b", method="full").get("host memory, saving") is None


@pytest.mark.parametrize(
    ("options", "itemsize"),
    [
        ({"parallel": "zero2", "weights_dtype": "fp32"}, 2),
        ({"parallel": "zero2", "weights_dtype": "fp32", "mixed_precision": "no"}, 4),
        ({"parallel": "fsdp"}, 4),
        ({"parallel": "fsdp", "mixed_precision": "no"}, 2),
        ({"parallel": "ddp"}, 2),
        ({"parallel": "ddp", "weights_dtype": "fp32"}, 4),
    ],
)
def test_weights_are_saved_as_they_are_held(options: dict[str, Any], itemsize: int) -> None:
    saved = bytes_of("qwen2.5-0.5b", method="full", num_gpus=2, **options)["model.safetensors"]
    assert saved == pytest.approx(itemsize * plan("qwen2.5-0.5b", method="full").counts.total, abs=64_000)


@pytest.mark.parametrize(
    ("method", "parallel", "itemsize"),
    [("lora", "ddp", 4), ("lora", "fsdp", 4), ("lora", "zero2", 2), ("lora", "zero3", 4), ("qlora", "zero3", 2)],
)
def test_an_adapter_is_saved_as_it_is_held(method: str, parallel: str, itemsize: int) -> None:
    made = plan("llama-3.1-8b", method=method, num_gpus=2, parallel=parallel)
    assert made.counts.adapter_bytes == pytest.approx(itemsize * 41_943_040, abs=80_000)
