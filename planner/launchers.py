"""What launches a run on several GPUs, described as `frameworks` does: accelerate's config, and DeepSpeed's own.

Neither is a training config: both say how GPUs share a run, and little else. Read from accelerate 1.15
(commands/launch.py, utils/launch.py, utils/dataclasses.py) and deepspeed 0.19 (runtime/config.py,
runtime/zero/config.py, runtime/zero/offload_config.py).
"""

from __future__ import annotations

import re
import shlex
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError, printable, shown, unknown
from vramplan.planner.frameworks import (
    COMPILED,
    IN_HOST_MEMORY,
    NO_GPU,
    PARTS,
    Framework,
    Remark,
    Rule,
    by_name,
    harmless_keys,
    is_on,
    noted,
    one,
    other_than,
    refused,
)
from vramplan.planner.links import HOST_GPUS, hosts
from vramplan.planner.zero import LIVE, PERSISTENT, PREFETCHED, REDUCE_BUCKET, REUSED, SUB_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vramplan.planner.frameworks import When


# ------------------------------------------------------------------------------------------------------ values of both


def _word(value: Any) -> str:
    """A name, a number or a switch as both compare it, in any case of letters; "none" for null."""
    return (value.strip() if isinstance(value, str) else shown(value)).lower()


def _unless_auto(value: Any) -> Any:
    """A value, or None where TrainingArguments decide it."""
    return None if _word(value) == "auto" else value


def _switched(name: str, value: Any, option: str) -> bool | None:
    """A switch as accelerate reads it (accelerate/utils/environment.py, str_to_bool); None where it is ignored."""
    on, off = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
    if value is None:
        return None
    if _word(value) not in (*on, *off):
        raise UsageError(f"{name} is {shown(value)}; it must be true or false ({option})")
    return _word(value) in on


def _whole(name: str, value: Any) -> int:
    """A whole number above zero, which may be written as a string; GPUs are counted by it."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number from 1 (--num-gpus)")
    return value


def _zero(name: str, stage: Any) -> str:
    """How GPUs share a run by this stage of ZeRO."""
    if _word(stage) == "0":
        raise UsageError(
            f"{name} is 0, with which every GPU holds everything in DeepSpeed's own optimizer, and that is not "
            f"planned; set {name} to 1, 2 or 3, or plan torch's DDP in its place by --parallel ddp"
        )
    if _word(stage) not in ("1", "2", "3"):
        raise UsageError(f"{name} is {shown(stage)}; it must be 1, 2 or 3 (--parallel zero1, zero2 or zero3)")
    return f"zero{_word(stage)}"


def _zero_offloads(keys: tuple[str, str], optimizer: Any, parameters: Any, stage: Any) -> bool:
    """Whether ZeRO offloads the optimizer, or under stage 3 the parameters."""
    for key, device in zip(keys, (optimizer, parameters), strict=True):
        if _word(device) not in ("none", "cpu", "nvme"):
            raise unknown(key, device, ("none", "cpu"), "--cpu-offload")
    return _word(optimizer) != "none" or (_word(parameters) != "none" and _word(stage) == "3")


def _no_fp16(key: str, value: Any) -> UsageError:
    return UsageError(
        f"{key} is {shown(value)}, and fp16 is not planned under ZeRO: DeepSpeed scales the loss by itself, and what "
        "its checks of the gradients take has not been recorded; choose --mixed-precision bf16 if the GPU has it"
    )


# ----------------------------------------------------------------------------------------------------- remarks of both


def _is(key: str, *words: str) -> When:
    return lambda values: _word(values.get(key)) in words


def _is_not(key: str, *words: str) -> When:
    return lambda values: _word(values.get(key)) not in words


def _all(*conditions: When) -> When:
    return lambda values: all(each(values) for each in conditions)


def _only(where: When, *remarks: Remark) -> tuple[Remark, ...]:
    """Remarks that count only where the launcher reads their keys."""

    def judged(remark: Remark) -> Remark:
        when = remark.when or (lambda values: any(is_on(values.get(key)) for key in remark.keys))
        return remark._replace(when=_all(where, when))

    return tuple(map(judged, remarks))


def _of_offloading(stage: str, optimizer: str, parameters: str) -> tuple[Remark, ...]:
    """What of ZeRO's two offloads is not planned; the plan has one option for both."""
    return (
        *(
            refused(key, "what lies on an NVMe disk cannot be planned", _is(key, "nvme"))
            for key in (optimizer, parameters)
        ),
        *(
            refused(
                key,
                "under ZeRO 3 the optimizer and the parameters are planned in host memory both or neither; "
                f"set {other} to cpu too",
                _all(_is(stage, "3"), _is(key, "cpu"), _is(other, "none")),
            )
            for key, other in ((optimizer, parameters), (parameters, optimizer))
        ),
        noted(
            parameters,
            "DeepSpeed offloads parameters under ZeRO 3 alone, so they are planned on the GPU",
            _all(_is(stage, "1", "2"), _is(parameters, "cpu")),
        ),
    )


# ----------------------------------------------------------------------------------------------------------- accelerate

# accelerate's names and what they start; a bare NO is false in YAML, and accelerate runs it as NO.
_LAUNCHED = {"NO": None, "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}
_OF_FSDP1 = {"full_shard": True, "shard_grad_op": False}  # accelerate/commands/to_fsdp2.py


def _launched(kind: Any) -> Any:
    return by_name("distributed_type", _LAUNCHED, "--parallel")("NO" if kind is False else kind)


def _fsdp(key: str) -> str:
    return f"fsdp_config.fsdp_{key}"


def _deepspeed(key: str) -> str:
    return f"deepspeed_config.{key}"


def _processes(number: Any, kind: Any, machines: Any) -> int | None:
    if number is None:
        return None
    processes = _whole("num_processes", number)
    hosts = 1 if machines is None else _whole("num_machines", machines)
    if processes > 1 and kind is not None and _launched(kind) is None:
        raise UsageError(
            f"num_processes is {processes}, and with distributed_type NO accelerate starts one process alone; "
            "set distributed_type: MULTI_GPU, or say how many GPUs are meant (--num-gpus)"
        )
    if processes % hosts:
        raise UsageError(
            f"num_processes is {processes}, and accelerate starts as many on each of {hosts} machines, which makes "
            f"{processes // hosts * hosts}; set num_processes to a multiple of num_machines (--num-gpus)"
        )
    return processes


def _other_hosts(values: Mapping[str, Any]) -> bool:
    """Whether the GPUs are of more machines or of fewer than they are planned on."""
    try:
        processes = _whole("num_processes", values.get("num_processes"))
        return _whole("num_machines", values.get("num_machines", 1)) != hosts(processes)
    except UsageError:  # said by the rule of num_gpus
        return False


def _parallel(kind: Any, stage: Any, number: Any) -> str | None:
    how = _launched(kind)
    if how == "zero":
        return _zero("zero_stage", stage)
    # accelerate launch on one GPU wraps nothing
    return None if how == "ddp" and _word(number) == "1" else how


def _resharding(kind: Any, reshard: Any, version: Any) -> bool | None:
    if _launched(kind) != "fsdp" or version not in (None, 2, "2"):  # FSDP1 is refused by its version
        return None
    if version is None:
        reshard = _OF_FSDP1.get(_word(reshard), reshard)
    return _switched("fsdp_reshard_after_forward", reshard, "--reshard-after-forward")


def _offloading(kind: Any, fsdp: Any, *zero: Any) -> bool | None:
    how = _launched(kind)
    if how == "fsdp":
        return _switched("fsdp_offload_params", fsdp, "--cpu-offload")
    return _zero_offloads(_OFFLOADS, *zero) if how == "zero" else None


def _checkpointed(wrapped: Any, kind: Any) -> bool | None:
    """Layers that accelerate wraps; where it does not, TrainingArguments say whether they are checkpointed."""
    if _launched(kind) != "fsdp":
        return None
    return _switched("fsdp_activation_checkpointing", wrapped, "--gradient-checkpointing") or None


def _precision(name: Any, fp16: Any, kind: Any) -> Any:
    if name is False:
        raise UsageError("mixed_precision is False, which YAML makes of a bare no; write 'no' (--mixed-precision)")
    if name is None and is_on(fp16):
        name = "fp16"
    if name == "fp16" and _launched(kind) == "zero":
        raise _no_fp16("mixed_precision", name)
    return name


def _not_layers(values: Mapping[str, Any]) -> bool:
    """Whether what is named as a unit may be another thing than a decoder layer."""
    names = _word(values.get(_fsdp("transformer_layer_cls_to_wrap")))
    return names != "none" and ("," in names or not names.endswith(("layer", "block")))


def _left_out(name: str, taken: Any, wanted: Any) -> Callable[[Mapping[str, Any]], str | None]:
    """The refusal of what accelerate takes where fsdp_config lacks the key `name`, with the key that is nearly it."""

    def whole(given: Mapping[str, Any]) -> str | None:
        if _fsdp(name) in given:
            return None
        prefix = _fsdp("")
        typed = [key.removeprefix(prefix) for key in given if key.startswith(prefix) and key not in ACCELERATE.known]
        close = [f"fsdp_{each}" for each in get_close_matches(name, typed, 1, cutoff=0.8)]
        add = f"write fsdp_{name}: {wanted} in place of {close[0]}" if close else f"add fsdp_{name}: {wanted}"
        return f"fsdp_{name} is not in the file, and accelerate then takes {taken}; {add}"

    return whole


def _own_file(given: Mapping[str, Any]) -> str:
    """The refusal of accelerate's keys beside those of DeepSpeed's own configuration."""
    key, number = _deepspeed("deepspeed_config_file"), given.get("num_processes")
    file = shlex.quote(printable(str(given.get(key)))[:80])
    gpus = number if isinstance(number, int) and not isinstance(number, bool) else "N"
    return (
        f"{key} cannot be planned: DeepSpeed's own configuration is read by itself; check {file} itself: "
        f"vramplan check {file} --num-gpus {gpus} --model ..."
    )


_SAVED = (
    "after full fine-tuning model.safetensors is written too, which the first rank puts together in host memory; "
    "neither is counted"
)
_STAGE = _deepspeed("zero_stage")
_OFFLOADS = (_deepspeed("offload_optimizer_device"), _deepspeed("offload_param_device"))

# An exported one says the rest of its options in a comment. The defaults are what `accelerate launch` takes.
ACCELERATE = Framework(
    name="accelerate",
    title="accelerate launch",
    model=(),
    nested={"fsdp_config": "fsdp_", "deepspeed_config": "", "dynamo_config": "dynamo_"},
    rules={
        "gradient_accumulation_steps": Rule(
            (_deepspeed("gradient_accumulation_steps"),),
            lambda steps, kind: _unless_auto(steps) if _launched(kind) == "zero" else None,
            more=("distributed_type",),
        ),
        "gradient_checkpointing": Rule((_fsdp("activation_checkpointing"),), _checkpointed, more=("distributed_type",)),
        "mixed_precision": Rule(("mixed_precision", "fp16"), _precision, more=("distributed_type",)),
        "num_gpus": Rule(("num_processes",), _processes, more=("distributed_type", "num_machines"), stands=True),
        "parallel": Rule(("distributed_type", _STAGE), _parallel, more=("num_processes",)),
        "reshard_after_forward": Rule(
            ("distributed_type", _fsdp("reshard_after_forward")), _resharding, more=(_fsdp("version"),)
        ),
        "cpu_offload": Rule(("distributed_type", _fsdp("offload_params"), *_OFFLOADS), _offloading, more=(_STAGE,)),
    },
    defaults={
        _fsdp("version"): 1,
        _fsdp("auto_wrap_policy"): "NO_WRAP",
        _fsdp("reshard_after_forward"): True,
        _fsdp("offload_params"): False,
        _fsdp("activation_checkpointing"): False,
        _fsdp("cpu_ram_efficient_loading"): True,
        _STAGE: 2,
    },
    remarks=(
        refused("megatron_lm_config parallelism_config", PARTS),
        refused("fp8_config", "matrices in 8 bits cannot be planned"),
        refused("dynamo_backend dynamo_config.dynamo_backend", COMPILED),
        refused("use_cpu", NO_GPU),
        noted(
            "num_machines",
            f"planned are as few machines as hold the GPUs, up to {HOST_GPUS} on each; so the step's time is that of "
            "other links, and host memory that of another number of ranks on a machine",
            _other_hosts,
        ),
        *_only(
            _is("distributed_type", "fsdp"),
            refused(
                _fsdp("version"),
                "FSDP1 has other buffers than FSDP2, which is planned (fsdp_version: 2)",
                other_than(_fsdp("version"), 2, "2"),
            )._replace(whole=_left_out("version", 1, 2)),
            refused(
                _fsdp("auto_wrap_policy"),
                "planned are units of one decoder layer (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)",
                _is_not(_fsdp("auto_wrap_policy"), "none", "transformer_based_wrap"),
            )._replace(whole=_left_out("auto_wrap_policy", "NO_WRAP", "TRANSFORMER_BASED_WRAP")),
            refused(_fsdp("activation_checkpointing_offload"), IN_HOST_MEMORY),
            refused(_fsdp("ignored_modules"), "modules that are not sharded cannot be planned"),
            noted(
                _fsdp("transformer_layer_cls_to_wrap"),
                "planned are units of one decoder layer, whatever classes are named",
                _not_layers,
            ),
            noted(
                _fsdp("sharding_strategy"),
                "FSDP2 goes by fsdp_reshard_after_forward alone, and so does the plan",
                _is_not(_fsdp("sharding_strategy"), "none", "1", "full_shard"),
            ),
            noted(
                _fsdp("cpu_ram_efficient_loading"),
                "with it one rank alone loads the model in host memory; planned is that all do",
            ),
        ),
        *_only(
            _is("distributed_type", "deepspeed"),
            refused(_deepspeed("deepspeed_config_file"), "DeepSpeed's own configuration is read by itself")._replace(
                whole=_own_file
            ),
            *_of_offloading(_STAGE, *_OFFLOADS),
            *_only(
                _is(_STAGE, "3"),
                noted(_deepspeed("zero3_save_16bit_model"), _SAVED),
                noted(
                    _deepspeed("deepspeed_moe_layer_cls_names"),
                    "modules that DeepSpeed gathers as one are planned each by itself",
                ),
            ),
        ),
    ),
    harmless=harmless_keys("accelerate"),
)

# ------------------------------------------------------------------------------------------------------------ DeepSpeed


def _of_zero(keys: str) -> str:
    return " ".join(f"zero_optimization.{key}" for key in keys.split())


_DS_STEP = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_DS_STAGE = _of_zero("stage")
_DS_OFFLOADS = (_of_zero("offload_optimizer.device"), _of_zero("offload_param.device"))


def _ds_gpus(whole: Any, *step: Any) -> int | None:
    """As many as make the whole batch of the micro-batches, where all are written out."""
    if any(_unless_auto(each) is None for each in (whole, *step)):
        return None
    batch = _whole("train_batch_size", whole)
    micro, accumulation = (_whole(name, value) for name, value in zip(_DS_STEP, step, strict=True))
    if batch % (micro * accumulation):
        raise UsageError(
            f"train_batch_size is {batch}, which is no multiple of {' x '.join(_DS_STEP)}, {micro * accumulation}; "
            "mend one of them, or leave train_batch_size out and say --num-gpus"
        )
    return batch // (micro * accumulation)


def _ds_open(values: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed works out what the whole batch is made of, by the number of GPUs."""
    whole, *step = (_unless_auto(values.get(key)) for key in ("train_batch_size", *_DS_STEP))
    return whole is not None and None in step


def _ds_precision(bf16: Any, fp16: Any, stage: Any) -> str | None:
    on = {
        name: _switched(f"{name}.enabled", _unless_auto(value), "--mixed-precision")
        for name, value in (("bf16", bf16), ("fp16", fp16))
    }
    if all(on.values()):
        raise UsageError("bf16.enabled and fp16.enabled are both true; switch one off (--mixed-precision)")
    if on["fp16"] and _word(stage) in ("1", "2", "3"):
        raise _no_fp16("fp16.enabled", fp16)
    return next((name for name in on if on[name]), None if None in on.values() else "no")


def _ds_optimizer(name: Any) -> Any:
    if _word(name) in ("none", "auto"):
        return None
    if _word(name) not in ("adam", "adamw"):
        raise unknown("optimizer.type", name, ("Adam", "AdamW"), "--optimizer")
    return "adamw_torch_fused"


def _ds_sizes(**planned: int) -> tuple[Remark, ...]:
    """What accelerate's configuration, which is planned, leaves to DeepSpeed."""
    sizes = ((_of_zero(key), size) for key, size in planned.items())
    return tuple(
        noted(key, f"planned is DeepSpeed's own, {size:,} elements", other_than(key, size)) for key, size in sizes
    )


def _ds_overlaps(values: Mapping[str, Any]) -> bool:
    said = values.get(_of_zero("overlap_comm"))
    return said is not None and is_on(said) != _is(_DS_STAGE, "3")(values)


# Its own configuration, as TrainingArguments(deepspeed=...) and accelerate's deepspeed_config_file take it.
DEEPSPEED = Framework(
    name="deepspeed",
    title="DeepSpeed's configuration",
    model=(),
    nested=dict.fromkeys(
        ("zero_optimization", *_of_zero("offload_optimizer offload_param").split(), "bf16", "fp16", "optimizer"), ""
    ),
    rules={
        "batch_size": Rule(_DS_STEP[:1], _unless_auto, stands=True),
        "gradient_accumulation_steps": Rule(_DS_STEP[1:], _unless_auto, stands=True),
        "optimizer": one("optimizer.type", _ds_optimizer),
        "mixed_precision": Rule(("bf16.enabled", "fp16.enabled"), _ds_precision, more=(_DS_STAGE,)),
        "num_gpus": Rule(("train_batch_size",), _ds_gpus, more=_DS_STEP),
        "parallel": one(_DS_STAGE, lambda stage: _zero("stage", stage)),
        "cpu_offload": Rule(_DS_OFFLOADS, partial(_zero_offloads, _DS_OFFLOADS), more=(_DS_STAGE,)),
    },
    defaults={_DS_STAGE: 0},
    remarks=(
        *_of_offloading(_DS_STAGE, *_DS_OFFLOADS),
        *_ds_sizes(reduce_bucket_size=REDUCE_BUCKET),
        *_only(
            _is(_DS_STAGE, "3"),
            *_ds_sizes(
                stage3_param_persistence_threshold=PERSISTENT,
                stage3_max_reuse_distance=REUSED,
                stage3_max_live_parameters=LIVE,
                stage3_prefetch_bucket_size=PREFETCHED,
                sub_group_size=SUB_GROUP,
            ),
            noted(
                _of_zero("stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"), _SAVED
            ),
        ),
        noted(
            "train_batch_size",
            "what it is made of on each GPU is not worked out; say --batch-size and --gradient-accumulation-steps",
            _ds_open,
        ),
        noted(
            _of_zero("overlap_comm"),
            "planned is DeepSpeed's own: with it under ZeRO 3, and without it under ZeRO 1 and 2, where it takes a "
            "second bucket of gradients",
            _ds_overlaps,
        ),
        noted(
            _of_zero("contiguous_gradients"),
            "gradients are planned as copied to a bucket",
            lambda values: values.get(_of_zero("contiguous_gradients")) is False,
        ),
        noted(
            _of_zero("reduce_scatter"),
            "each GPU is planned to get the sum of its own share of the gradients alone",
            lambda values: values.get(_of_zero("reduce_scatter")) is False,
        ),
        noted(
            "communication_data_type",
            "gradients are planned as added up in the dtype that the model computes in",
            other_than("communication_data_type", "auto"),
        ),
        refused(
            _of_zero("cpu_offload cpu_offload_param"),
            "it is an old name; write offload_optimizer and offload_param, each with its device",
        ),
        refused(
            _of_zero("offload_optimizer.ratio"),
            "offloading a part of the optimizer cannot be planned",
            other_than(_of_zero("offload_optimizer.ratio"), 1),
        ),
        refused(_of_zero("offload_optimizer.super_offload"), "this way of offloading cannot be planned"),
        refused(
            _of_zero("zero_hpz_partition_size"),
            "weights that each host holds once more cannot be planned",
            other_than(_of_zero("zero_hpz_partition_size"), 0, 1),
        ),
        refused(
            _of_zero("mics_shard_size"),
            "sharding among some of the GPUs cannot be planned",
            other_than(_of_zero("mics_shard_size"), -1),
        ),
        refused(
            _of_zero(
                "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients zeropp_loco_param"
            ),
            "weights and gradients are planned as gathered and added up unquantised",
        ),
        refused(
            f"{_of_zero('zenflow')} tensor_parallel pipeline sparse_attention compression_training",
            "this part of DeepSpeed cannot be planned",
        ),
        refused("sequence_parallel_size", PARTS, other_than("sequence_parallel_size", 0, 1)),
        refused(
            """data_types bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states
            fp16.fp16_master_weights_and_grads""",
            "master weights, gradients and optimizer states are planned in DeepSpeed's own dtypes",
        ),
        refused("amp torch_autocast", "DeepSpeed is planned as computing in 16 bits, without autocast"),
    ),
    harmless=harmless_keys("deepspeed"),
)
