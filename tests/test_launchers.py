"""What launches a run on several GPUs: accelerate's config, and DeepSpeed's own configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from vramplan import plan
from vramplan.planner.configs import Reading, interpret, read
from vramplan.planner.errors import UsageError, unknown
from vramplan.planner.launchers import ACCELERATE, DEEPSPEED

if TYPE_CHECKING:
    from pathlib import Path

FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_cpu_ram_efficient_loading": False}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are named as people name them, and no sentence cuts a long path."""
    monkeypatch.chdir(tmp_path)


def fsdp(top: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": FSDP | keys} | (top or {})


def deepspeed(top: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": keys} | (top or {})


def own(top: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys} | (top or {})


def accelerated(values: dict[str, Any], **asked: Any) -> Reading:
    return interpret(values, ACCELERATE, asked={"model": "gpt2"} | asked)


def configured(values: dict[str, Any], **asked: Any) -> Reading:
    return interpret(values, DEEPSPEED, asked={"model": "gpt2"} | asked)


def wrong(tmp_path: Path, values: dict[str, Any], name: str = "accelerate", **asked: Any) -> str:
    """The sentence that refuses a file of these values."""
    (tmp_path / "a.yml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError) as error:
        read(["a.yml"], framework=name, model="gpt2", **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


BOTH = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}

MEANS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (fsdp(), {"parallel": "fsdp", "num_gpus": 8, "reshard_after_forward": True, "cpu_offload": False}),
    (fsdp(), {"gradient_checkpointing": None, "gradient_accumulation_steps": None, "mixed_precision": None}),
    (fsdp(fsdp_version="2", fsdp_auto_wrap_policy="transformer_based_wrap"), {"parallel": "fsdp"}),
    (fsdp(fsdp_reshard_after_forward="false", fsdp_offload_params="True"), {"reshard_after_forward": False}),
    (fsdp(fsdp_offload_params="yes"), {"cpu_offload": True}),
    (fsdp(fsdp_offload_params="0"), {"cpu_offload": False}),
    (fsdp(offload_params=True, reshard_after_forward=False), {"cpu_offload": True, "reshard_after_forward": False}),
    (fsdp(fsdp_activation_checkpointing=True), {"gradient_checkpointing": True}),
    (fsdp(activation_checkpointing="true"), {"gradient_checkpointing": True}),
    (fsdp(fsdp_activation_checkpointing=False), {"gradient_checkpointing": None}),
    (deepspeed(), {"parallel": "zero2", "cpu_offload": False, "gradient_checkpointing": None}),
    (deepspeed(zero_stage=3), {"parallel": "zero3", "reshard_after_forward": None}),
    (deepspeed(zero_stage="3"), {"parallel": "zero3"}),
    (deepspeed(zero_stage=1, offload_optimizer_device="CPU"), {"parallel": "zero1", "cpu_offload": True}),
    (deepspeed(zero_stage=2, offload_optimizer_device="none"), {"cpu_offload": False}),
    (deepspeed(zero_stage=2, offload_optimizer_device=None), {"cpu_offload": False}),
    (deepspeed(zero_stage=3, **BOTH), {"cpu_offload": True}),
    (deepspeed(gradient_accumulation_steps=4), {"gradient_accumulation_steps": 4}),
    (deepspeed(gradient_accumulation_steps="4"), {"gradient_accumulation_steps": 4}),
    (deepspeed(gradient_accumulation_steps="auto"), {"gradient_accumulation_steps": None}),
    (fsdp({"deepspeed_config": {"gradient_accumulation_steps": 4}}), {"gradient_accumulation_steps": None}),
    ({"distributed_type": "MULTI_GPU", "num_processes": "8"}, {"num_gpus": 8, "parallel": "ddp", "cpu_offload": None}),
    ({"distributed_type": "MULTI_GPU", "num_processes": "1"}, {"num_gpus": 1, "parallel": None}),
    ({"distributed_type": "NO", "num_processes": 1}, {"num_gpus": 1, "parallel": None}),
    ({"distributed_type": False}, {"num_gpus": None, "parallel": None}),  # a bare NO
    ({"distributed_type": "NO", "mixed_precision": "fp16"}, {"mixed_precision": "fp16"}),
    ({"distributed_type": "NO", "fp16": True}, {"mixed_precision": "fp16"}),  # an old name
]


def says(reading: Reading, means: dict[str, Any]) -> None:
    assert {name: reading.options.get(name) for name in means} == means
    assert not reading.refused
    assert not reading.unknown


@pytest.mark.parametrize(("values", "means"), MEANS)
def test_what_accelerates_keys_mean(values: dict[str, Any], means: dict[str, Any]) -> None:
    says(accelerated(values), means)


def test_every_option_names_the_nested_key_that_it_is_from() -> None:
    sources = accelerated(deepspeed(zero_stage=3, gradient_accumulation_steps=2, **BOTH)).sources
    assert sources["parallel"] == "distributed_type, deepspeed_config.zero_stage"
    assert sources["gradient_accumulation_steps"] == "deepspeed_config.gradient_accumulation_steps"
    assert "deepspeed_config.offload_param_device" in sources["cpu_offload"]
    assert accelerated(fsdp(activation_checkpointing=True)).sources["gradient_checkpointing"] == (
        "fsdp_config.fsdp_activation_checkpointing"
    )


HALF = "the optimizer and the parameters are planned in host memory both or neither"
NO_FSDP1 = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}


def typed(key: str) -> dict[str, Any]:
    """FSDP's keys with another in the place of its version."""
    below = {key: 2} | {name: value for name, value in FSDP.items() if name != "fsdp_version"}
    return {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": below}


WRONG: list[tuple[dict[str, Any], str]] = [
    (NO_FSDP1, "a.yml': fsdp_version is not in the file, and accelerate then takes 1; add fsdp_version: 2; fsdp_auto"),
    (
        NO_FSDP1,
        "fsdp_auto_wrap_policy is not in the file, and accelerate then takes NO_WRAP; add fsdp_auto_wrap_policy: ",
    ),
    (typed("fsdp_versoin"), "accelerate then takes 1; write fsdp_version: 2 in place of fsdp_versoin"),
    (typed("versoin"), "accelerate then takes 1; write fsdp_version: 2 in place of fsdp_versoin"),
    (typed("fsdp_frobnicate"), "accelerate then takes 1; add fsdp_version: 2"),
    (fsdp(fsdp_version=1), "fsdp_config.fsdp_version cannot be planned: FSDP1 has other buffers than FSDP2"),
    (fsdp(fsdp_version=1, fsdp_reshard_after_forward="FULL_SHARD"), "FSDP1 has other buffers"),
    (fsdp(fsdp_auto_wrap_policy="SIZE_BASED_WRAP"), "planned are units of one decoder layer"),
    (fsdp(fsdp_ignored_modules="lm_head"), "modules that are not sharded"),
    (
        fsdp(fsdp_activation_checkpointing=True, fsdp_activation_checkpointing_offload=True),
        "activations in host memory cannot be planned",
    ),
    (fsdp(fsdp_offload_params="cpu"), "fsdp_offload_params is 'cpu'; it must be true or false (--cpu-offload)"),
    (fsdp(fsdp_reshard_after_forward="FULL_SHARD"), "fsdp_reshard_after_forward is 'FULL_SHARD'; it must be true"),
    (fsdp(offload_params=True, fsdp_offload_params=True), "fsdp_offload_params stands there twice, with its prefix"),
    (fsdp({"fsdp_config": []}), "fsdp_config is []; it must be a mapping"),
    (fsdp({"fsdp_config": "yes"}), "or leave it out by --ignore fsdp_config"),
    (fsdp({"fsdp_config.fsdp_version": 2}), "stands there as one key, with a dot; write the keys of fsdp_config below"),
    (deepspeed({"deepspeed_config": "foo"}), "deepspeed_config is 'foo'; it must be a mapping"),
    (deepspeed({"deepspeed_config": 3}), "deepspeed_config is 3; it must be a mapping"),
    (deepspeed(zero_stage=0), "zero_stage is 0, with which every GPU holds everything"),
    (deepspeed(zero_stage="0"), "or plan torch's DDP in its place by --parallel ddp"),
    (deepspeed(zero_stage=2.0), "zero_stage is 2.0; it must be 1, 2 or 3 (--parallel zero1, zero2 or zero3)"),
    (deepspeed(zero_stage=True), "zero_stage is True; it must be 1, 2 or 3"),
    (deepspeed(zero_stage=4), "a.yml': deepspeed_config.zero_stage is 4; it must be 1, 2 or 3"),
    (deepspeed(zero_stage="2.0"), "zero_stage is '2.0'; it must be 1, 2 or 3"),
    (deepspeed(zero_stage=[3]), "zero_stage is [3]; it must be 1, 2 or 3"),
    (deepspeed(gradient_accumulation_steps=0), "gradient_accumulation_steps is 0; it must be a whole number from 1"),
    (deepspeed(gradient_accumulation_steps=True), "gradient_accumulation_steps is True; it must be a whole number"),
    (
        deepspeed(offload_optimizer_device="gpu"),
        "unknown deepspeed_config.offload_optimizer_device 'gpu'; did you mean cpu",
    ),
    (deepspeed(offload_optimizer_device=True), "unknown deepspeed_config.offload_optimizer_device True"),
    (deepspeed(zero_stage=3, offload_param_device="nvme"), "what lies on an NVMe disk cannot be planned"),
    (deepspeed(zero_stage=3, **BOTH | {"offload_param_device": "NVMe"}), "what lies on an NVMe disk cannot be planned"),
    (
        deepspeed(zero_stage=3, offload_optimizer_device="cpu"),
        f"{HALF}; set deepspeed_config.offload_param_device to cpu too",
    ),
    (
        deepspeed(zero_stage=3, offload_param_device="cpu"),
        f"{HALF}; set deepspeed_config.offload_optimizer_device to cpu too",
    ),
    (
        deepspeed(deepspeed_config_file="ds.json"),
        "is read by itself; check ds.json itself: vramplan check ds.json --num-gpus 8 --model ...",
    ),
    (deepspeed({"mixed_precision": "fp16"}), "mixed_precision is 'fp16', and fp16 is not planned under ZeRO"),
    (deepspeed({"fp16": True}), "and fp16 is not planned under ZeRO"),
    ({"distributed_type": "FSPD", "num_processes": 8}, "a.yml': unknown distributed_type 'FSPD'; did you mean FSDP?"),
    ({"distributed_type": "MEGATRON_LM", "num_processes": 8}, "unknown distributed_type 'MEGATRON_LM'"),
    ({"distributed_type": "fsdp", "num_processes": 8}, "did you mean FSDP?"),
    ({"distributed_type": "NO", "num_processes": 8}, "with distributed_type NO accelerate starts one process alone"),
    ({"distributed_type": False, "num_processes": "8"}, "set distributed_type: MULTI_GPU"),
    ({"distributed_type": "MULTI_GPU", "num_processes": 0}, "num_processes is 0; it must be a whole number from 1"),
    ({"distributed_type": "MULTI_GPU", "num_processes": -1}, "num_processes is -1; it must be a whole number from 1"),
    ({"distributed_type": "MULTI_GPU", "num_processes": "all"}, "num_processes is 'all'; it must be a whole number"),
    ({"distributed_type": "MULTI_GPU", "num_processes": True}, "num_processes is True; it must be a whole number"),
    ({"distributed_type": "MULTI_GPU", "num_processes": 9999}, "num_gpus is 9999; it must be a whole number from 1"),
    ({"distributed_type": "MULTI_GPU", "num_processes": 9, "num_machines": 2}, "each of 2 machines, which makes 8"),
    ({"distributed_type": "MULTI_GPU", "num_processes": 9, "num_machines": "x"}, "num_machines is 'x'"),
    ({"distributed_type": "NO", "mixed_precision": False}, "mixed_precision is False, which YAML makes of a bare no"),
    ({"distributed_type": "NO", "mixed_precision": "fp8"}, "unknown mixed_precision 'fp8'"),
    (
        {"distributed_type": "NO", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
        "dynamo_config.dynamo_backend cannot",
    ),
    ({"distributed_type": "NO", "dynamo_config": "INDUCTOR"}, "dynamo_config is 'INDUCTOR'; it must be a mapping"),
]


@pytest.mark.parametrize(("values", "says"), WRONG)
def test_what_accelerate_does_and_no_plan_can(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in wrong(tmp_path, values)


def test_a_dynamo_config_that_compiles_nothing_is_fine() -> None:
    for off in ({}, None, {"dynamo_backend": "NO"}, {"backend": "no", "dynamo_mode": "default"}):
        reading = accelerated({"distributed_type": "NO", "dynamo_config": off})
        assert not reading.refused
        assert not reading.unknown


NOTES: list[tuple[dict[str, Any], list[str]]] = [
    (fsdp(), []),
    (fsdp(fsdp_state_dict_type="SHARDED_STATE_DICT"), []),  # of saving alone
    (fsdp(fsdp_backward_prefetch="BACKWARD_PRE", fsdp_use_orig_params=True, fsdp_sync_module_states=True), []),
    (fsdp(fsdp_cpu_ram_efficient_loading=True), ["fsdp_config.fsdp_cpu_ram_efficient_loading"]),
    (fsdp(fsdp_cpu_ram_efficient_loading=None), ["fsdp_config.fsdp_cpu_ram_efficient_loading"]),  # launch's default
    (fsdp(fsdp_sharding_strategy="FULL_SHARD"), []),
    (fsdp(fsdp_sharding_strategy="SHARD_GRAD_OP"), ["fsdp_config.fsdp_sharding_strategy"]),
    (fsdp(fsdp_transformer_layer_cls_to_wrap="GPT2Block"), []),
    (fsdp(fsdp_transformer_layer_cls_to_wrap="A,B"), ["fsdp_config.fsdp_transformer_layer_cls_to_wrap"]),
    (fsdp(fsdp_transformer_layer_cls_to_wrap="LlamaMLP"), ["fsdp_config.fsdp_transformer_layer_cls_to_wrap"]),
    (deepspeed(zero_stage=3, zero3_save_16bit_model=False, zero3_init_flag=True, gradient_clipping=1.0), []),
    (deepspeed(zero_stage=3, zero3_save_16bit_model="true"), ["deepspeed_config.zero3_save_16bit_model"]),
    (deepspeed(zero_stage=2, zero3_save_16bit_model=True), []),
    (deepspeed(zero_stage=2, offload_param_device="cpu"), ["deepspeed_config.offload_param_device"]),
    (deepspeed(zero_stage=1, offload_param_device="cpu"), ["deepspeed_config.offload_param_device"]),
    (deepspeed(deepspeed_moe_layer_cls_names="A"), []),
    (deepspeed(zero_stage=3, deepspeed_moe_layer_cls_names="A"), ["deepspeed_config.deepspeed_moe_layer_cls_names"]),
    (fsdp({"num_machines": 1}), []),
    (fsdp({"num_machines": 2}), ["num_machines"]),  # two machines of four GPUs
    (fsdp({"num_machines": 2, "num_processes": 16}), []),
    (fsdp({"num_processes": 16}), ["num_machines"]),
    (fsdp({"num_machines": 4, "num_processes": 16}), ["num_machines"]),
    (fsdp({"num_machines": 2, "num_processes": 12}), []),
]


@pytest.mark.parametrize(("values", "notes"), NOTES)
def test_what_is_planned_otherwise_is_said(values: dict[str, Any], notes: list[str]) -> None:
    reading = accelerated(values)
    assert [note.partition(":")[0] for note in reading.notes] == notes
    assert not reading.refused
    assert not reading.unknown


def test_unknown_nested_keys_are_named_as_top_level_ones_are() -> None:
    values = fsdp({"num_process": 4}, fsdp_ofload_params=True, cpu_offload=True, frobnicate=1)
    assert set(accelerated(values).unknown) == {
        "'fsdp_config.fsdp_ofload_params' is no key of accelerate launch; fsdp_config.fsdp_offload_params, which "
        "decides the plan, may be meant",
        "'fsdp_config.fsdp_cpu_offload' is no key of accelerate launch",  # TrainingArguments' name for it
        "'fsdp_config.fsdp_frobnicate' is no key of accelerate launch",
        "'num_process' is no key of accelerate launch; num_processes, which decides the plan, may be meant",
    }
    assert accelerated(deepspeed(overlap_comm=True)).unknown == (
        "'deepspeed_config.overlap_comm' is no key of accelerate launch",
    )


def test_the_command_line_goes_before_nested_keys(tmp_path: Path) -> None:
    half = deepspeed(zero_stage=3, offload_optimizer_device="cpu")
    assert "--ignore deepspeed_config.offload_optimizer_device" in wrong(tmp_path, half)
    ignored = interpret(half, ACCELERATE, asked={"model": "gpt2"}, ignore=["deepspeed_config.offload_optimizer_device"])
    assert (ignored.options["cpu_offload"], ignored.refused) == (False, {})
    whole = interpret(fsdp({"fsdp_config": []}), ACCELERATE, asked={"model": "gpt2"}, ignore=["fsdp_config"])
    assert (whole.options["parallel"], whole.refused) == ("fsdp", {})
    first = interpret(NO_FSDP1, ACCELERATE, asked={"model": "gpt2"}, ignore=[*accelerated(NO_FSDP1).refused])
    assert (first.options["reshard_after_forward"], first.refused) == (True, {})
    ddp = accelerated(deepspeed(zero_stage=0), parallel="ddp")
    assert not {"cpu_offload", "reshard_after_forward"} & set(ddp.options)
    assert plan(ddp.model, seq_len=16, method="full", **ddp.options).options.parallel == "ddp"
    one = accelerated({"distributed_type": "MULTI_GPU", "num_processes": 8}, num_gpus="1")
    assert "parallel" not in one.options
    several = accelerated({"distributed_type": "NO", "num_processes": 1}, num_gpus=4)
    assert several.options["num_gpus"] == 4
    with pytest.raises(UsageError, match=r"unknown key 'fsdp_offload_params'; did you mean fsdp_config.fsdp_offload"):
        interpret(fsdp(fsdp_offload_params=True), ACCELERATE, ignore=["fsdp_offload_params"])


def test_accelerates_own_keys_are_known() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    launch = pytest.importorskip("accelerate.commands.launch")
    assert set(config_args.ClusterConfig.__dataclass_fields__) <= ACCELERATE.known
    flags = {flag.lstrip("-") for flag in launch.launch_command_parser()._option_string_actions}
    assert {f"fsdp_config.{flag}" for flag in flags if flag.startswith("fsdp_")} <= ACCELERATE.known
    known = {key.rpartition(".")[2] for key in ACCELERATE.known if "." in key}
    assert known - {"fsdp_ignored_modules"} <= flags  # that one only a plugin in Python takes


# ------------------------------------------------------------------------------------------- DeepSpeed's configuration

DEVICES = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

CONFIGURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (own(stage=2), {"parallel": "zero2", "cpu_offload": False, "num_gpus": None, "mixed_precision": None}),
    (own(stage=1, offload_optimizer={"device": "CPU", "pin_memory": True}), {"parallel": "zero1", "cpu_offload": True}),
    (own(stage=3, **DEVICES), {"parallel": "zero3", "cpu_offload": True}),
    (own(stage=3, offload_optimizer=None, offload_param={"device": "none"}), {"cpu_offload": False}),
    (own({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, stage=2), {"mixed_precision": "bf16"}),
    (own({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, stage=2), {"mixed_precision": None}),
    (own({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, stage=2), {"mixed_precision": "no"}),
    (own({"gradient_accumulation_steps": 4}, stage=2), {"gradient_accumulation_steps": 4}),
    (own({"gradient_accumulation_steps": "auto"}, stage=2), {"gradient_accumulation_steps": None}),
    (own({"train_micro_batch_size_per_gpu": 2, "train_batch_size": "auto"}, stage=2), {"batch_size": 2}),
    (
        own({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "train_batch_size": 64}, stage=2),
        {"num_gpus": 8},
    ),
    (own({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, stage=2), {"optimizer": "adamw_torch_fused"}),
]


@pytest.mark.parametrize(("values", "means"), CONFIGURED)
def test_what_deepspeeds_keys_mean(values: dict[str, Any], means: dict[str, Any]) -> None:
    says(configured(values), means)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (own({"zero_optimization": 3}), "zero_optimization is 3; it must be a mapping"),
        (own(stage=3, offload_param="cpu"), "zero_optimization.offload_param is 'cpu'; it must be a mapping"),
        (own({"bf16": True}, stage=2), "bf16 is True; it must be a mapping"),
        ({"zero_optimization": {}}, "stage is 0, with which every GPU holds everything"),
        (own(stage="x"), "a.yml': zero_optimization.stage is 'x'; it must be 1, 2 or 3"),
        (own(stage=3, offload_optimizer={"device": "cpu"}), f"{HALF}; set zero_optimization.offload_param.device to"),
        (own(stage=3, offload_optimizer={"device": "nvme"}), "NVMe disk"),
        (own(stage=2, offload_optimizer={"device": "disk"}), "zero_optimization.offload_optimizer.device 'disk'"),
        (own(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.3}, offload_param={"device": "cpu"}), "a part of"),
        (own(stage=2, cpu_offload=True), "it is an old name"),
        (own(stage=3, zero_quantized_weights=True), "unquantised"),
        (own(stage=3, zero_hpz_partition_size=8), "each host holds once more"),
        (own({"optimizer": {"type": "OneBitAdam"}}, stage=2), "a.yml': unknown optimizer.type 'OneBitAdam'; did"),
        (own({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, stage=2), "are both true; switch one off"),
        (own({"fp16": {"enabled": True}}, stage=3), "a.yml': fp16.enabled is True, and fp16 is not planned under ZeRO"),
        (own({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "train_batch_size": 8}, stage=2),
         "train_batch_size is 8, which is no multiple"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_and_no_plan_can(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in wrong(tmp_path, values, "deepspeed")


def test_what_deepspeed_is_planned_with_is_said() -> None:
    def noted(**keys: Any) -> list[str]:
        return [note.partition(":")[0].partition(".")[2] for note in configured(own(**keys)).notes]

    assert noted(stage=2, overlap_comm=False, reduce_bucket_size=5e8, contiguous_gradients=True) == []
    assert noted(stage=2, overlap_comm=True) == ["overlap_comm"]
    assert noted(stage=3, overlap_comm=True, sub_group_size=1e9, stage3_max_live_parameters=1e9) == []
    assert noted(stage=3, overlap_comm=False) == ["overlap_comm"]
    saved = "stage3_gather_16bit_weights_on_model_save"
    assert (noted(stage=3, **{saved: True}), noted(stage=3, **{saved: False}), noted(stage=2, **{saved: True})) == (
        [saved],
        [],
        [],
    )
    assert noted(stage=2, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto") == ["reduce_bucket_size"]
    assert noted(stage=3, stage3_prefetch_bucket_size="auto") == ["stage3_prefetch_bucket_size"]
    assert noted(stage=2, offload_param={"device": "cpu"}) == ["offload_param.device"]
    assert noted(stage=3, contiguous_gradients=False, reduce_scatter=False) == [
        "contiguous_gradients",
        "reduce_scatter",
    ]
    [note] = configured(own({"communication_data_type": "fp32"}, stage=2)).notes
    assert note.startswith("communication_data_type: gradients are planned as added up in the dtype that the model")
    [note] = configured(own(stage=2, reduce_bucket_size=2e8)).notes
    assert note == "zero_optimization.reduce_bucket_size: planned is DeepSpeed's own, 500,000,000 elements"


def test_a_whole_batch_is_not_taken_apart() -> None:
    whole = own({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}, stage=2)
    [note] = configured(whole, num_gpus=8).notes
    assert note.startswith("train_batch_size: what it is made of on each GPU is not worked out; say --batch-size")
    said = configured(whole, gradient_accumulation_steps="4")
    assert (said.options["num_gpus"], said.notes) == (8, ())


def test_what_a_mapping_switches_off_is_not_refused() -> None:
    off = {"amp": {"enabled": False}, "torch_autocast": {"enabled": False}, "sequence_parallel_size": 1}
    assert not configured(own(off, stage=2)).refused
    assert list(configured(own({"amp": {"enabled": True}, "sequence_parallel_size": 2}, stage=2)).refused) == [
        "sequence_parallel_size",
        "amp",
    ]


def test_odd_keys_are_named_as_a_terminal_can_show_them() -> None:
    values = deepspeed({"num_machines": 1}) | {"deepspeed_config": {"\x1b[31m": 1, 2: 3, 16**4000: 5}}
    escaped, number, _ = (text.partition(" is no")[0] for text in accelerated(values).unknown)
    assert (escaped, number) == (r"'deepspeed_config.\x1b[31m'", "'deepspeed_config.2'")
    with pytest.raises(UsageError, match=r"known: num_machines, deepspeed_config, deepspeed_config.\?\[31m") as error:
        interpret({"num_machines": 1, "deepspeed_config": {"\x1b[31m": 1}}, ACCELERATE, ignore=["xyz"])
    assert str(error.value).count("num_machines") == 1


def test_deepspeeds_file_is_known_by_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(own({"bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}, stage=2, frob=1)))
    reading = read([str(file)], model="gpt2", num_gpus=2, method="full")
    assert (reading.framework.name, reading.evidence) == ("deepspeed", ("zero_optimization", "gradient_clipping"))
    assert reading.unknown == ("'zero_optimization.frob' is no key of DeepSpeed's configuration",)
    assert plan(reading.model, seq_len=16, **reading.options).options.parallel == "zero2"
    with pytest.raises(UsageError, match="it names no model; name one by --model"):
        read([str(file)])


def test_a_config_file_of_deepspeeds_is_no_key_to_leave_out(tmp_path: Path) -> None:
    assert "--ignore" not in wrong(tmp_path, deepspeed(deepspeed_config_file="ds.json"))
    named = deepspeed({"num_processes": "all"}, deepspeed_config_file="a\nb c.json")
    assert "vramplan check 'a?b c.json' --num-gpus N" in wrong(tmp_path, named, num_gpus=4)


def test_the_machines_of_a_plan_decide_its_time_and_its_host_memory() -> None:
    [note] = accelerated(fsdp({"num_machines": 4, "num_processes": 16})).notes
    assert "the step's time" in note
    assert "host memory that of another number of ranks" in note


@pytest.mark.parametrize(
    ("values", "name", "says"),
    [
        (own(stage=3), "deepspeed", "a.yml' does not say how many GPUs there are; add --num-gpus"),
        (
            {key: value for key, value in fsdp().items() if key != "num_processes"},
            "accelerate",
            "a.yml' does not say how many GPUs there are; add num_processes to it, or --num-gpus",
        ),
    ],
)
def test_a_launcher_without_a_number_of_gpus(values: dict[str, Any], name: str, says: str, tmp_path: Path) -> None:
    assert wrong(tmp_path, values, name).endswith(says)
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert read([str(tmp_path / "a.json")], framework=name, model="gpt2", num_gpus=4).options["num_gpus"] == 4


# ------------------------------------------------------------------------------------- a training file and its launcher

SCRIPT = """
args = TrainingArguments(per_device_train_batch_size=2, gradient_accumulation_steps=4{more})
model = AutoModelForCausalLM.from_pretrained("gpt2", dtype=torch.bfloat16)
Trainer(model=model, args=args)
"""


def beside(tmp_path: Path, values: dict[str, Any], more: str = ", bf16=True", **asked: Any) -> Reading:
    """What a script says with a launcher's file beside it, which is named first."""
    (tmp_path / "ft.py").write_text(SCRIPT.format(more=more))
    launcher = "ds.json" if "zero_optimization" in values else "accel.yaml"
    (tmp_path / launcher).write_text(json.dumps(values))
    return read([launcher, "ft.py"], **asked)


def test_a_script_and_what_launches_it_are_one_run(tmp_path: Path) -> None:
    reading = beside(tmp_path, deepspeed({"num_process": 1}, zero_stage=3, gradient_accumulation_steps="auto", **BOTH))
    assert reading.launcher
    assert (reading.framework.name, reading.launcher.framework.name) == ("transformers", "accelerate")
    assert reading.to_dict()["launcher"] == "accelerate"
    assert reading.files == ("ft.py", "accel.yaml")
    known = ("num_gpus", "parallel", "cpu_offload", "batch_size", "gradient_accumulation_steps", "mixed_precision")
    assert [reading.options[name] for name in known] == [8, "zero3", True, 2, 4, "bf16"]
    assert reading.sources["num_gpus"] == "num_processes"
    assert reading.sources["batch_size"] == "per_device_train_batch_size"
    assert [each.partition(" is no key")[0] for each in reading.unknown] == ["'num_process'"]
    made = plan(reading.model, seq_len=16, **reading.options)
    assert (made.options.parallel, made.options.num_gpus, made.options.method) == ("zero3", 8, "full")


def test_deepspeeds_json_beside_a_script_and_a_config(tmp_path: Path) -> None:
    reading = beside(tmp_path, own({"bf16": {"enabled": "auto"}}, stage=2), num_gpus="4")
    assert (reading.options["parallel"], reading.options["num_gpus"], reading.options["batch_size"]) == (
        "zero2",
        "4",
        2,
    )
    with pytest.raises(UsageError, match=r"^'ds.json' does not say how many GPUs there are; add --num-gpus"):
        beside(tmp_path, own({"bf16": {"enabled": "auto"}}, stage=2))
    config = {"base_model": "gpt2", "adapter": "lora", "lora_r": 4, "lora_target_linear": True, "deepspeed": "ds.json"}
    (tmp_path / "a.yml").write_text(yaml.safe_dump(config))
    reading = read(["a.yml", "ds.json"], num_gpus=4)
    assert (reading.options["parallel"], reading.options["rank"]) == ("zero2", 4)


CONTRADICT: list[tuple[dict[str, Any], str, str]] = [
    (
        deepspeed(gradient_accumulation_steps=2),
        ", bf16=True",
        "gradient_accumulation_steps is 4 in 'ft.py' (gradient_accumulation_steps) and 2 in 'accel.yaml' "
        "(deepspeed_config.gradient_accumulation_steps), and transformers refuses that; set both alike, or name "
        "--gradient-accumulation-steps",
    ),
    (deepspeed({"mixed_precision": "bf16"}), "", "mixed_precision is no in 'ft.py' (default of bf16) and bf16 in"),
    (fsdp(fsdp_activation_checkpointing=True), ", gradient_checkpointing=True", "both checkpoint the layers"),
    (own({"train_micro_batch_size_per_gpu": 1}, stage=2), ", bf16=True", "batch_size is 2 in"),
    (own({"bf16": {"enabled": True}}, stage=2), "", "mixed_precision is no in"),
]


@pytest.mark.parametrize(("values", "more", "says"), CONTRADICT)
def test_files_that_contradict_each_other(values: dict[str, Any], more: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        beside(tmp_path, values, more, num_gpus=8)
    assert says in str(error.value)


def test_what_goes_before_where_two_files_say_it(tmp_path: Path) -> None:
    first = beside(tmp_path, deepspeed(gradient_accumulation_steps=2), gradient_accumulation_steps="2")
    assert first.options["gradient_accumulation_steps"] == "2"
    trainer = beside(tmp_path, fsdp({"mixed_precision": "no"}))
    assert (trainer.options["mixed_precision"], trainer.notes[0].partition(":")[0]) == ("bf16", "mixed_precision")
    launcher = beside(tmp_path, fsdp({"mixed_precision": "bf16"}), "")
    assert (launcher.options["mixed_precision"], launcher.sources["mixed_precision"]) == ("bf16", "mixed_precision")
    assert not launcher.notes
    wrapped = beside(tmp_path, fsdp(fsdp_activation_checkpointing=True))
    assert wrapped.options["gradient_checkpointing"] is True
    config = own({"optimizer": {"type": "AdamW"}}, stage=2)
    theirs = beside(tmp_path, config, ', bf16=True, optim="paged_adamw_8bit"', num_gpus=2)
    assert theirs.options["optimizer"] == "adamw_torch_fused"
    assert theirs.notes == ("optim: DeepSpeed's own optimizer (optimizer.type) goes before it",)
    axolotl = {"base_model": "gpt2", "adapter": "lora", "lora_r": 4, "lora_target_linear": True}
    (tmp_path / "a.yml").write_text(yaml.safe_dump(axolotl))
    (tmp_path / "b.yml").write_text(yaml.safe_dump(fsdp({"mixed_precision": "no"})))
    reading = read(["a.yml", "b.yml"])
    assert "mixed_precision" not in reading.options  # axolotl's "auto"


def test_refusals_and_what_is_left_out_are_of_either_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"accel.yaml': fsdp_config.fsdp_ignored_modules cannot be planned"):
        beside(tmp_path, fsdp(fsdp_ignored_modules="lm_head"))
    launched = {"distributed_type": "MULTI_GPU", "num_processes": 8}
    with pytest.raises(UsageError, match=r"ft.py': deepspeed cannot be planned"):  # it would be ZeRO, not DDP
        beside(tmp_path, launched, ', deepspeed="ds.json"')
    assert beside(tmp_path, deepspeed(), ', bf16=True, deepspeed="ds.json"').options["parallel"] == "zero2"
    assert beside(tmp_path, launched, ', deepspeed="ds.json"', num_gpus=8, parallel="zero1").options["num_gpus"] == 8
    with pytest.raises(UsageError, match=r"ft.py': torch_compile cannot be planned"):
        beside(tmp_path, fsdp(), ", torch_compile=True")
    ignored = ["torch_compile", "fsdp_config.fsdp_ignored_modules"]
    assert (
        beside(tmp_path, fsdp(fsdp_ignored_modules="x"), ", torch_compile=True", ignore=ignored).options["num_gpus"]
        == 8
    )
    with pytest.raises(UsageError, match=r"ft.py': unknown key 'frob'"):
        beside(tmp_path, fsdp(), ignore=["frob"])


def test_the_comment_of_an_export_says_what_a_script_does_not(tmp_path: Path) -> None:
    (tmp_path / "ft.py").write_text(SCRIPT.format(more=", bf16=True"))
    text = yaml.safe_dump(deepspeed(zero_stage=3))
    mark = "gpt2 --method lora --rank 4 --batch-size 8 --seq-len 64 --tokens-per-example 64 --examples 7"
    (tmp_path / "a.yml").write_text(f"# vramplan options: {mark}\n{text}")
    reading = read(["ft.py", "a.yml"])
    names = ("method", "rank", "batch_size", "seq_len", "tokens_per_example", "examples")
    assert [reading.options.get(name) for name in names] == ["full", None, 2, "64", "64", "7"]
    assert reading.sources["seq_len"] == "the comment of the export"
    reading = read(["ft.py", "a.yml"], seq_len=32)
    assert [reading.options.get(name) for name in names[3:]] == [32, None, "7"]


def test_files_that_are_not_of_one_run(tmp_path: Path) -> None:
    for name, text in (("a.py", SCRIPT.format(more="")), ("b.py", SCRIPT.format(more="")), ("c.yml", "base_model: a")):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.json").write_text(json.dumps(own(stage=2)))
    (tmp_path / "e.yml").write_text(yaml.safe_dump(fsdp()))
    for files in (["a.py", "b.py"], ["a.py", "c.yml"], ["a.py", "b.py", "d.json"]):
        with pytest.raises(UsageError, match="are read together only as TrainingArguments and an adapter's config"):
            read(files, num_gpus=2)
    with pytest.raises(UsageError, match=r"each say how GPUs share a run; name one of them"):
        read(["a.py", "d.json", "e.yml"])


def test_a_number_of_thousands_of_digits_is_no_crash() -> None:
    assert "cannot be shown" in str(unknown("framework", 16**20_000, ["axolotl"], "--from"))
