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
    file = tmp_path / "a.yml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError) as error:
        read([str(file)], framework=name, model="gpt2", **asked)
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


@pytest.mark.parametrize(("values", "means"), MEANS)
def test_what_accelerates_keys_mean(values: dict[str, Any], means: dict[str, Any]) -> None:
    reading = accelerated(values)
    assert {name: reading.options.get(name) for name in means} == means
    assert not reading.refused
    assert not reading.unknown


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
WRONG: list[tuple[dict[str, Any], str]] = [
    (NO_FSDP1, "fsdp_config.fsdp_version cannot be planned: FSDP1 has other buffers than FSDP2"),
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
    (deepspeed(zero_stage=4), "zero_stage is 4; it must be 1, 2 or 3"),
    (deepspeed(zero_stage="2.0"), "zero_stage is '2.0'; it must be 1, 2 or 3"),
    (deepspeed(zero_stage=[3]), "zero_stage is [3]; it must be 1, 2 or 3"),
    (deepspeed(gradient_accumulation_steps=0), "gradient_accumulation_steps is 0; it must be a whole number from 1"),
    (deepspeed(gradient_accumulation_steps=True), "gradient_accumulation_steps is True; it must be a whole number"),
    (deepspeed(offload_optimizer_device="gpu"), "unknown offload_optimizer device 'gpu'; did you mean cpu"),
    (deepspeed(offload_optimizer_device=True), "unknown offload_optimizer device True"),
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
    (deepspeed(deepspeed_config_file="ds.json"), "name that file to vramplan check, with --num-gpus"),
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
    (deepspeed(zero_stage=3, zero3_save_16bit_model=True, zero3_init_flag=True, gradient_clipping=1.0), []),
    (deepspeed(zero_stage=2, offload_param_device="cpu"), ["deepspeed_config.offload_param_device"]),
    (deepspeed(zero_stage=1, offload_param_device="cpu"), ["deepspeed_config.offload_param_device"]),
    (deepspeed(deepspeed_moe_layer_cls_names="A"), []),
    (deepspeed(zero_stage=3, deepspeed_moe_layer_cls_names="A"), ["deepspeed_config.deepspeed_moe_layer_cls_names"]),
    (fsdp({"num_machines": 1}), []),
    (fsdp({"num_machines": 2}), ["num_machines"]),  # two machines of four GPUs
    (fsdp({"num_machines": 2, "num_processes": 16}), []),
    (fsdp({"num_processes": 16}), ["num_machines"]),
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
    reading = configured(values)
    assert {name: reading.options.get(name) for name in means} == means
    assert not reading.refused
    assert not reading.unknown


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (own({"zero_optimization": 3}), "zero_optimization is 3; it must be a mapping"),
        (own(stage=3, offload_param="cpu"), "zero_optimization.offload_param is 'cpu'; it must be a mapping"),
        (own({"bf16": True}, stage=2), "bf16 is True; it must be a mapping"),
        ({"zero_optimization": {}}, "stage is 0, with which every GPU holds everything"),
        (own(stage="x"), "stage is 'x'; it must be 1, 2 or 3"),
        (own(stage=3, offload_optimizer={"device": "cpu"}), f"{HALF}; set zero_optimization.offload_param.device to"),
        (own(stage=3, offload_optimizer={"device": "nvme"}), "NVMe disk"),
        (own(stage=2, offload_optimizer={"device": "disk"}), "unknown offload_optimizer device 'disk'; known"),
        (own(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.3}, offload_param={"device": "cpu"}), "a part of"),
        (own(stage=2, cpu_offload=True), "it is an old name"),
        (own(stage=3, zero_quantized_weights=True), "unquantised"),
        (own(stage=3, zero_hpz_partition_size=8), "each host holds once more"),
        (own({"optimizer": {"type": "OneBitAdam"}}, stage=2), "unknown optimizer.type 'onebitadam'"),
        (own({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, stage=2), "are both true; switch one off"),
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


def test_a_number_of_thousands_of_digits_is_no_crash() -> None:
    assert "cannot be shown" in str(unknown("framework", 16**20_000, ["axolotl"], "--from"))
