"""What the keys of other frameworks' configs mean: one table for each, a row for each option.

A row says which keys decide an option and what their values make it; `defaults` is what the framework takes where a key
is missing. `remarks` are keys that change memory in a way no plan shows, refused or said; keys that change none are in
tables/config_keys.json.

Read from axolotl 0.19 (utils/schemas, loaders/model.py, core/builders), LLaMA-Factory 0.9.5 (hparams, model/adapter.py,
model_utils), trl 1.16 (SFTConfig, ModelConfig, scripts/sft.py), transformers 5.24 (TrainingArguments) and peft 0.21
(LoraConfig, utils/constants.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner.errors import UsageError, shown, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TABLES = Path(__file__).parent.parent / "tables"
PEFT_DEFAULT = "PEFT's default"  # of target_modules: it depends on the model


class Rule(NamedTuple):
    """An option by the framework's keys: their values in order, defaults filled in, make `value`.

    None leaves the option to vramplan's default. What is `assumed` follows from the keys and is not said by them;
    `more` are keys whose values come after, but which alone say nothing.
    """

    keys: tuple[str, ...]
    value: Callable[..., Any]
    assumed: bool = False
    more: tuple[str, ...] = ()


class Remark(NamedTuple):
    """Keys that a plan cannot follow; `when` judges all values, and without it a key counts once it is switched on."""

    keys: tuple[str, ...]
    text: str
    refused: bool
    when: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Framework:
    """A framework's keys. `fixed` are options that no key changes, each with what fixes it."""

    name: str
    title: str
    model: tuple[str, ...]
    rules: dict[str, Rule]
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    harmless: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()  # keys for which null is a value, not the lack of one

    @property
    def known(self) -> frozenset[str]:
        """Every key that the framework has."""
        ruled = {key for rule in self.rules.values() for key in (*rule.keys, *rule.more)}
        said = {key for remark in self.remarks for key in remark.keys}
        return frozenset(ruled | said | {*self.model} | self.harmless)


@cache
def _keys() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((_TABLES / "config_keys.json").read_text("utf-8"))
    return table


def _harmless(name: str) -> frozenset[str]:
    """Keys that change no memory, of the table."""
    return frozenset(_keys()[name]["harmless"])


def is_on(value: Any) -> bool:
    """Whether a key's value switches something on."""
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in ("none", "no", "false", "null"))


# ---------------------------------------------------------------------------------------------------- values of options


def same(value: Any) -> Any:
    """The value as it stands."""
    return value


def _one(key: str, value: Callable[[Any], Any] = same) -> Rule:
    return Rule((key,), value)


def _modules(value: Any) -> Any:
    if isinstance(value, str) and any(letter in value for letter in "*^$|()[]\\+?"):
        raise UsageError(f"{shown(value)} is a regular expression; name the modules instead (--target-modules)")
    return value


def _by_name(what: str, names: Mapping[str, Any], option: str) -> Callable[[Any], Any]:
    def value(name: Any) -> Any:
        if name is None:
            return None
        if not isinstance(name, str) or name not in names:
            raise unknown(what, name, names, option)
        return names[name]

    return value


_ATTENTION = {name: name for name in ("sdpa", "eager", "flash_attention_2")}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_LONG = {short: long for long, short in _DTYPES.items()} | {"no": "float32"}
_attention = _by_name("attention", _ATTENTION | {"kernels-community/flash-attn2": "flash_attention_2"}, "--attention")
_dtype = _by_name("dtype", _DTYPES | {"auto": None}, "--weights-dtype")


def _examples(max_steps: Any, samples: Any, batch: Any, accumulation: Any) -> Any:
    """The sequences that `max_steps` see, as epochs of their own; else a limit on the data set."""
    numbers = [max_steps, batch, accumulation]
    if all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) and max_steps > 0:
        return max_steps * batch * accumulation
    return samples


def _epochs(epochs: Any, max_steps: Any) -> Any:
    return 1 if isinstance(max_steps, int) and max_steps > 0 else epochs


def _autocast(bf16: Any, fp16: Any) -> str:
    return "bf16" if is_on(bf16) else "fp16" if is_on(fp16) else "no"


def _expandable(*settings: Any) -> Any:
    said = [str(each) for each in settings if each is not None]
    return any("expandable_segments:true" in each.replace(" ", "").lower() for each in said) if said else None


def _rows_differ(batch: Any, *packed: Any) -> Any:
    """Whether rows of a batch are padded: they differ in length, unless they are packed full."""
    return not any(map(is_on, packed)) and batch not in (1, "1")


_HF_BATCH = "per_device_train_batch_size"
_HF_STEP = (_HF_BATCH, "gradient_accumulation_steps")
# transformers 5.23 renamed it; the new name is the stronger one.
_CHECKPOINTING = Rule(
    ("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_enable()"),
    lambda old, new, called: called or (old if new is None else new),
)
# The rows that every framework on transformers' TrainingArguments shares.
_HF_RULES = {
    "batch_size": _one(_HF_BATCH),
    "gradient_accumulation_steps": _one("gradient_accumulation_steps"),
    "optimizer": _one("optim"),
    "epochs": Rule(("num_train_epochs", "max_steps"), _epochs),
    "examples": Rule(("max_steps",), lambda steps, *step: _examples(steps, None, *step), more=_HF_STEP),
}
_HF_DEFAULTS: dict[str, Any] = {
    _HF_BATCH: 8,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "num_train_epochs": 3.0,
    "max_steps": -1,
}
_HF_HARMLESS = _harmless("transformers")


# -------------------------------------------------------------------------------------------------------------- remarks


def _refused(keys: str, text: str, when: Callable[[Mapping[str, Any]], bool] | None = None) -> Remark:
    return Remark(tuple(keys.split()), text, True, when)


def _noted(keys: str, text: str, when: Callable[[Mapping[str, Any]], bool] | None = None) -> Remark:
    return Remark(tuple(keys.split()), text, False, when)


def _above_one(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: isinstance(values.get(key), int) and values[key] > 1


def _setting(key: str, name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the mapping under `key` has `name` switched on."""
    return lambda values: isinstance(values.get(key), dict) and is_on(values[key].get(name))


def _every_nth(key: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the mapping under `key` checkpoints only some layers."""
    return lambda values: isinstance(values.get(key), dict) and values[key].get("every_n_layers") not in (None, 1)


_REENTRANT = (
    "re-entrant checkpoints run a layer again to its end; planned are the others, which stop where backward has all"
)
_IN_HOST_MEMORY = "activations in host memory cannot be planned"
_EVALUATION = "evaluation is not part of the plan, only training steps are"
_PACKED = "rows are packed: planned as full rows without padding, each attended to as one"
_SEVERAL = "how it shares a run among GPUs is not read; say that by --num-gpus and --parallel"
_KERNELS = "its kernels keep other tensors than transformers' own layers do"
_WEIGHTS = "it trains or holds further weights, which a plan does not count"
_LOSS = "its loss computes on other tensors than the one that is planned"
_LAYERS = "it adapts only some layers or weights, and a plan adapts the same modules in every layer"

_HF_REMARKS = (
    _refused("deepspeed fsdp parallelism_config", _SEVERAL),
    _refused("use_liger_kernel", f"Liger's {_KERNELS.removeprefix('its ')}"),
    _refused("auto_find_batch_size", "the batch is found only when the run is out of memory; plan with --batch-size"),
    _refused("torch_compile", "what a compiled model keeps depends on how the compiler fuses it"),
    _refused("optim_target_modules", "an optimizer for some modules only cannot be planned"),
    _refused("label_smoothing_factor", "with label smoothing the loss is computed outside the model"),
    _refused("use_cpu", "a run without a GPU takes none of its memory"),
    *(
        remark
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        for remark in (
            _refused(key, "in selective checkpointing a layer keeps some activations", _setting(key, "selective")),
            _refused(key, "the layers that are not checkpointed keep their activations", _every_nth(key)),
            _refused(key, _IN_HOST_MEMORY, _setting(key, "offload")),
            _noted(key, _REENTRANT, _setting(key, "use_reentrant")),
        )
    ),
    _noted("neftune_noise_alpha", "its noise on the embeddings, as large as a hidden state, is not planned"),
    _noted("torch_empty_cache_steps", "PyTorch's cache is planned as kept, and emptying it lowers what is reserved"),
    _noted("eval_strategy", _EVALUATION),
)
_LORA_REMARKS = (
    _refused("use_dora", "DoRA's magnitudes and norms of whole weights cannot be planned"),
    _refused("modules_to_save lora_modules_to_save trainable_token_indices lora_bias", _WEIGHTS),
    _refused("target_parameters lora_target_parameters layers_to_transform layers_pattern exclude_modules", _LAYERS),
    _refused("layer_replication", "replicated layers cannot be planned"),
    _refused("rank_pattern", "a rank of their own for some modules cannot be planned"),
    _refused("bias", "it trains biases too, which a plan does not count"),
    _refused(
        """alora_invocation_tokens arrow_config kasa_config megatron_config monteclora_config use_bdlora use_qalora
        velora_config""",
        "this kind of LoRA cannot be planned",
    ),
)


# --------------------------------------------------------------------------------------------------------- transformers


def _peft_method(peft_type: Any, lora: Any, four: Any, eight: Any) -> str:
    if eight:
        raise UsageError("LLM.int8 cannot be planned; quantise to 4 bits, or choose --method lora")
    if peft_type is None and not lora:
        if four:
            raise UsageError("4-bit weights cannot be trained; add a LoraConfig or choose --method full")
        return "full"
    if peft_type not in (None, "LORA"):
        raise unknown("peft_type", peft_type, ("LORA",), "--method")
    return "qlora" if four else "lora"


def _base_dtype(dtype: Any, method: str, autocast: str) -> Any:
    """What the base is held in; where no key says it, the dtype that autocast goes with."""
    said = _dtype(dtype)
    if said is not None or autocast != "fp16":
        return said
    return "fp32" if method == "full" else "fp16"


# What a script calls, as `documents` says it.
_CALLS = frozenset(("TrainingArguments()", "Seq2SeqTrainingArguments()", "SFTConfig()", "BitsAndBytesConfig()"))
_METHOD_KEYS = ("peft_type", "LoraConfig()", "load_in_4bit", "load_in_8bit")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_WEIGHTS_KEYS = ("dtype", "torch_dtype", "bf16", "fp16", *_METHOD_KEYS)


def _transformers_weights(dtype: Any, old: Any, bf16: Any, fp16: Any, *method: Any) -> Any:
    return _base_dtype(old if dtype is None else dtype, _peft_method(*method), _autocast(bf16, fp16))


TRANSFORMERS = Framework(
    name="transformers",
    title="transformers and PEFT",
    model=("model", "base_model_name_or_path", "MODEL"),
    rules={
        "method": Rule(_METHOD_KEYS, _peft_method),
        "rank": _one("r"),
        "lora_alpha": _one("lora_alpha"),
        "lora_dropout": _one("lora_dropout"),
        "target_modules": _one("target_modules", lambda value: PEFT_DEFAULT if value is None else _modules(value)),
        **_HF_RULES,
        "seq_len": Rule(("SEQ_LEN", "max_length"), lambda constant, length: length if constant is None else constant),
        "padded": Rule(("PADDED", _HF_BATCH), lambda said, batch: _rows_differ(batch) if said is None else said, True),
        "gradient_checkpointing": _CHECKPOINTING,
        "mixed_precision": Rule(("bf16", "fp16"), _autocast),
        "weights_dtype": Rule(_WEIGHTS_KEYS, _transformers_weights),
        "double_quant": _one("bnb_4bit_use_double_quant"),
        "prepare_kbit": _one("prepare_model_for_kbit_training"),
        "attention": _one("attn_implementation", _attention),
        "expandable_segments": Rule(_ALLOCATOR, _expandable),
    },
    defaults=_HF_DEFAULTS
    | {
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bnb_4bit_use_double_quant": False,
    },
    fixed={"trainer": ("transformers", "transformers' Trainer")},
    remarks=(
        *_HF_REMARKS,
        *_LORA_REMARKS,
        _refused("FastLanguageModel() FastModel()", "Unsloth's kernels and checkpoints cannot be planned yet"),
    ),
    harmless=_HF_HARMLESS | _harmless("peft") | _harmless("script") | {"trainer"} | _CALLS,
)

# ------------------------------------------------------------------------------------------------------------------ trl

_SFT_REMARKS = (
    _refused("activation_offloading", _IN_HOST_MEMORY),
    _refused("loss_type", _LOSS, lambda values: values.get("loss_type") not in (None, "nll")),
    _noted("packing padding_free", _PACKED),
    _noted("router_aux_loss_coef", "the loss of the router is not planned"),
)
_SFT_DEFAULTS: dict[str, Any] = {"max_length": 1024, "gradient_checkpointing": True, "bf16": None}


def _sft_autocast(bf16: Any, fp16: Any) -> str:
    return _autocast(not is_on(fp16) if bf16 is None else bf16, fp16)


def _sft_weights(dtype: Any, old: Any, bf16: Any, fp16: Any, *method: Any) -> Any:
    return _transformers_weights(dtype, old, _sft_autocast(bf16, fp16) == "bf16", fp16, *method)


def _max_length(length: Any) -> Any:
    if length is None:
        raise UsageError("null cuts no row short; name the longest with --seq-len")
    return length


# TrainingArguments' place taken by trl's SFTConfig, in a script or saved as JSON.
SFT = replace(
    TRANSFORMERS,
    title="trl's SFTConfig and PEFT",
    rules=TRANSFORMERS.rules
    | {
        "seq_len": _one("max_length", _max_length),
        "padded": Rule(
            ("PADDED", _HF_BATCH, "packing", "padding_free"),
            lambda said, *of: _rows_differ(*of) if said is None else said,
            True,
        ),
        "mixed_precision": Rule(("bf16", "fp16"), _sft_autocast),
        "weights_dtype": Rule(_WEIGHTS_KEYS, _sft_weights),
    },
    defaults=TRANSFORMERS.defaults | _SFT_DEFAULTS,
    fixed={"trainer": ("trl", "trl's SFTTrainer")},
    remarks=(*TRANSFORMERS.remarks, *_SFT_REMARKS, _refused("model_init_kwargs", "what it sets is not read")),
    harmless=TRANSFORMERS.harmless | _harmless("sft") | {"SEQ_LEN"},
    nullable=frozenset(("max_length",)),
)


def _trl_method(peft: Any, four: Any, eight: Any) -> str:
    return _peft_method("LORA" if is_on(peft) else None, None, is_on(four), is_on(eight))


TRL = Framework(
    name="trl",
    title="trl sft",
    model=("model_name_or_path",),
    rules={
        "method": Rule(("use_peft", "load_in_4bit", "load_in_8bit"), _trl_method),
        "rank": _one("lora_r"),
        "lora_alpha": _one("lora_alpha"),
        "lora_dropout": _one("lora_dropout"),
        "target_modules": _one("lora_target_modules", TRANSFORMERS.rules["target_modules"].value),
        **_HF_RULES,
        "seq_len": _one("max_length", _max_length),
        "padded": Rule((_HF_BATCH, "packing", "padding_free"), _rows_differ, True),
        "gradient_checkpointing": _CHECKPOINTING,
        "mixed_precision": Rule(("bf16", "fp16"), _sft_autocast),
        "weights_dtype": _one("dtype", _dtype),
        "double_quant": _one("use_bnb_nested_quant"),
        "attention": _one("attn_implementation", _attention),
        "expandable_segments": _one(
            "env",
            lambda env: _expandable(*(env.get(key) for key in _ALLOCATOR)) if isinstance(env, dict) else None,
        ),
    },
    defaults=_HF_DEFAULTS
    | _SFT_DEFAULTS
    | {
        "fp16": False,
        "use_peft": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "dtype": "float32",
        "use_bnb_nested_quant": False,
    },
    fixed={
        "trainer": ("trl", "trl's SFTTrainer"),
        "prepare_kbit": (False, "trl sft never calls prepare_model_for_kbit_training"),
    },
    remarks=(
        *_HF_REMARKS,
        *_LORA_REMARKS,
        *_SFT_REMARKS,
        _refused("model_init_kwargs", "what it sets is not read; say dtype and attn_implementation as keys"),
        _noted(
            "dtype load_in_4bit",
            "bitsandbytes computes in dtype there, and is planned as computing in autocast's; set both alike",
            lambda values: (
                is_on(values.get("load_in_4bit"))
                and values.get("dtype") not in ("auto", _LONG[_sft_autocast(values.get("bf16"), values.get("fp16"))])
            ),
        ),
    ),
    harmless=_HF_HARMLESS | _harmless("sft") | _harmless("trl"),
    nullable=frozenset(("max_length",)),
)

# -------------------------------------------------------------------------------------------------------------- axolotl


def _axolotl_method(adapter: Any, four: Any, eight: Any) -> str:
    if is_on(eight):
        raise UsageError("LLM.int8 cannot be planned; quantise with adapter: qlora and load_in_4bit")
    method = "full" if adapter in (None, "") else adapter
    if method not in ("full", "lora", "qlora"):
        raise unknown("adapter", adapter, ("lora", "qlora"), "--method")
    if (method == "qlora") != is_on(four):
        raise UsageError("axolotl takes load_in_4bit: true with adapter: qlora and only there; choose --method")
    return str(method)


def _axolotl_precision(bf16: Any, fp16: Any, bfloat16: Any, float16: Any) -> tuple[str | None, str | None]:
    """What weights are held in, and autocast's dtype; "auto" is bf16 where the card has it, as it is with vramplan."""
    if bf16 == "full":
        return "bf16", "no"
    if bf16 == "auto":
        return ("fp16", "fp16") if is_on(fp16) else (None, None)
    if is_on(bf16) or is_on(bfloat16):
        return "bf16", "bf16"
    if is_on(fp16):
        return "fp16", "fp16"
    return ("fp16", "no") if is_on(float16) else ("fp32", "no")


_AXOLOTL_PRECISION = ("bf16", "fp16", "bfloat16", "float16")
# Older switches of the attention kernel, the first that is on goes.
_AXOLOTL_SWITCHES = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}


def _axolotl_attention(name: Any, *switches: Any) -> Any:
    pairs = zip(_AXOLOTL_SWITCHES.values(), switches, strict=True)
    return _attention(name or next((each for each, on in pairs if is_on(on)), None))


def _axolotl_accumulation(accumulation: Any, whole: Any, micro: Any) -> Any:
    if accumulation is None and isinstance(whole, int) and isinstance(micro, int) and micro:
        return whole // micro
    return 1 if accumulation is None else accumulation


def _axolotl_examples(max_steps: Any, accumulation: Any, whole: Any, micro: Any) -> Any:
    return _examples(max_steps, None, micro, _axolotl_accumulation(accumulation, whole, micro))


def _axolotl_modules(linear: Any, modules: Any) -> Any:
    if is_on(linear):
        return "all-linear"
    if not modules:
        raise UsageError("no modules are named; add lora_target_linear: true (--target-modules)")
    return _modules(modules)


def _offloaded(checkpointing: Any) -> bool:
    return isinstance(checkpointing, str) and checkpointing.startswith("offload")


def _axolotl_rank(rank: Any) -> Any:
    if rank is None:
        raise UsageError("axolotl has no default for it; add lora_r (--rank)")
    return rank


def _axolotl_float32_embeddings(values: Mapping[str, Any]) -> bool:
    """Whether norms, embeddings and head stay in float32 above smaller weights: _configure_embedding_dtypes."""
    attention = values.get("attn_implementation") or next(
        (name for key, name in _AXOLOTL_SWITCHES.items() if is_on(values.get(key))), None
    )
    weights, _ = _axolotl_precision(*(values.get(key) for key in _AXOLOTL_PRECISION))
    return not values.get("adapter") and attention in (None, "sdpa", "eager") and weights != "fp32"


AXOLOTL = Framework(
    name="axolotl",
    title="axolotl",
    model=("base_model",),
    rules={
        "method": Rule(("adapter", "load_in_4bit", "load_in_8bit"), _axolotl_method),
        "rank": _one("lora_r", _axolotl_rank),
        "lora_alpha": _one("lora_alpha"),
        "lora_dropout": _one("lora_dropout"),
        "target_modules": Rule(("lora_target_linear", "lora_target_modules"), _axolotl_modules),
        "batch_size": _one("micro_batch_size"),
        "seq_len": _one("sequence_len"),
        "padded": Rule(
            ("micro_batch_size", "sample_packing", "pad_to_sequence_len"),
            lambda batch, packed, whole: _rows_differ(batch, packed) or (is_on(whole) and not is_on(packed)),
            True,
        ),
        "gradient_accumulation_steps": Rule(
            ("gradient_accumulation_steps", "batch_size"), _axolotl_accumulation, more=("micro_batch_size",)
        ),
        "gradient_checkpointing": _one("gradient_checkpointing", lambda on: _offloaded(on) or on),
        "optimizer": _one("optimizer"),
        "weights_dtype": Rule(_AXOLOTL_PRECISION, lambda *keys: _axolotl_precision(*keys)[0]),
        "mixed_precision": Rule(_AXOLOTL_PRECISION, lambda *keys: _axolotl_precision(*keys)[1]),
        "double_quant": _one(
            "bnb_config_kwargs",
            lambda more: more.get("bnb_4bit_use_double_quant", True) if isinstance(more, dict) else True,
        ),
        "attention": Rule(("attn_implementation", *_AXOLOTL_SWITCHES), _axolotl_attention),
        "epochs": Rule(("num_epochs", "max_steps"), _epochs),
        "examples": Rule(
            ("max_steps",), _axolotl_examples, more=("gradient_accumulation_steps", "batch_size", "micro_batch_size")
        ),
    },
    defaults={
        "bf16": "auto",
        "lora_dropout": 0.0,
        "micro_batch_size": 1,
        "sequence_len": 512,
        "gradient_checkpointing": False,
        "optimizer": "adamw_torch_fused",
        "num_epochs": 1.0,
        "lora_qkv_kernel": "on by default",
    },
    fixed={
        "trainer": ("transformers", "axolotl's trainer is transformers'"),
        "prepare_kbit": (False, "axolotl casts norms, embeddings and head back after prepare_model_for_kbit_training"),
        "expandable_segments": (True, "axolotl sets PYTORCH_ALLOC_CONF"),
    },
    remarks=(
        *(
            each
            for each in _HF_REMARKS
            if each.keys[0] not in ("use_liger_kernel", "label_smoothing_factor", "use_cpu")
        ),
        _refused("fsdp_config fp32_norms", _SEVERAL),
        *(
            _refused(key, _SEVERAL, _above_one(key))
            for key in (
                "tensor_parallel_size",
                "context_parallel_size",
                "dp_shard_size",
                "dp_replicate_size",
                "sequence_parallel_degree",
                "expert_parallel_size",
                "world_size",
            )
        ),
        _refused(
            "rl reward_model process_reward_model kd_trainer trainer_cls diffusion ebft hatchery nemo_gym_enabled",
            "only supervised fine-tuning with axolotl's own trainer can be planned",
        ),
        _refused("chunked_cross_entropy cut_cross_entropy flash_attn_cross_entropy use_eaft", _LOSS),
        _refused(
            """liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation
            liger_cross_entropy liger_fused_linear_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm tiled_mlp
            fused_attn_kernel flash_attn_d512 flash_optimum gemma4_hybrid_attn_impl large_head_attention s2_attention
            scaling_softmax sdpa_varlen experts_implementation expert_backend moe_grouped_backend moe_bnb_fast
            use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels use_kernels use_onebitllms
            llama4_linearized_experts""",
            _KERNELS,
        ),
        _refused(
            "activation_offloading layer_offloading ple_cpu_offload lora_on_cpu",
            "what lies in host memory cannot be planned",
        ),
        _refused("selective_checkpointing dynamic_checkpoint", "only whole layers can be planned as checkpoints"),
        _refused(
            "gradient_checkpointing",
            "checkpoints in host memory or on disk cannot be planned; choose --gradient-checkpointing",
            lambda values: _offloaded(values.get("gradient_checkpointing")),
        ),
        _refused(
            "fp8 qat gptq quantize_moe_experts model_quantization_config nonexpert_quantization",
            "only 4-bit bitsandbytes can be planned",
        ),
        _refused(
            "relora lisa_n_layers unfrozen_parameters spectrum_top_fraction",
            "training some of the weights only cannot be planned",
        ),
        _refused("lora_modules_to_save peft_trainable_token_indices", _WEIGHTS),
        _refused("lora_target_parameters peft_layers_to_transform peft_layers_pattern", _LAYERS),
        _refused("lora_rank_pattern", "a rank of their own for some modules cannot be planned"),
        _refused("peft_layer_replication", "replicated layers cannot be planned"),
        _refused("peft use_mora", "this kind of LoRA cannot be planned"),
        _refused(
            "peft_autocast_adapter_dtype",
            "adapters are planned in float32",
            lambda values: values.get("peft_autocast_adapter_dtype") is False,
        ),
        _refused("grokfast_alpha", "it keeps a running mean of the gradients, which a plan does not count"),
        _refused("peft_use_dora", _LORA_REMARKS[0].text),
        _refused(
            "attn_implementation",
            "axolotl holds norms, embeddings and head in float32 where every weight is trained with sdpa or eager "
            "attention; set attn_implementation: flash_attention_2",
            _axolotl_float32_embeddings,
        ),
        _noted(
            "lora_qkv_kernel lora_mlp_kernel lora_o_kernel lora_embedding_kernel",
            "axolotl's LoRA kernels keep less than PEFT's layers, which are planned",
            lambda values: (
                values.get("adapter") in ("lora", "qlora")
                and not is_on(values.get("trust_remote_code"))
                and (
                    any(is_on(values.get(f"lora_{part}_kernel")) for part in ("mlp", "o", "embedding"))
                    or values.get("lora_qkv_kernel") is True
                    or (
                        values.get("lora_qkv_kernel") == "on by default"
                        and all(values.get(f"lora_{part}_kernel") is None for part in ("mlp", "o", "embedding"))
                    )
                )
            ),
        ),
        _noted("sample_packing", _PACKED),
        _noted("val_set_size test_datasets", _EVALUATION),
        _noted("plugins", "a plugin may change what is kept; only the keys beside it are judged"),
        _noted("lora_model_dir", "an adapter that is loaded keeps its own rank and modules; planned are those named"),
        _noted("tokens resize_token_embeddings_to_32x", "rows that are added to the embeddings are not planned"),
        _noted("max_memory gpu_memory_limit", "the model is planned on the GPU as a whole"),
    ),
    harmless=_harmless("axolotl"),
)

# -------------------------------------------------------------------------------------------------------- LLaMA-Factory


def _factory_method(kind: Any, bits: Any, way: Any) -> str:
    if kind not in ("lora", "full"):
        raise unknown("finetuning_type", kind, ("lora", "full"), "--method")
    if bits is None:
        return str(kind)
    if kind == "full":
        raise UsageError("quantised weights cannot be trained; choose finetuning_type: lora, or --method full")
    if bits not in (4, "4") or way not in ("bnb", "bitsandbytes", None):
        raise UsageError(f"{shown(bits)} bits by {way} cannot be planned; only 4 bits by bitsandbytes can (--method)")
    return "qlora"


def _factory_precision(kind: Any, pure: Any, bf16: Any, fp16: Any) -> tuple[str | None, str]:
    """What weights are held in, and autocast's dtype: without pure_bf16, weights that are trained become float32."""
    if is_on(pure):
        return "bf16", "no"
    autocast = _autocast(bf16, fp16)
    return ("fp32" if kind == "full" else None if autocast == "no" else autocast), autocast


_FACTORY_PRECISION = ("finetuning_type", "pure_bf16", "bf16", "fp16")
_FACTORY_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def _factory_modules(names: Any) -> Any:
    return "all-linear" if names in ("all", ["all"]) else _modules(names)


LLAMAFACTORY = Framework(
    name="llamafactory",
    title="LLaMA-Factory",
    model=("model_name_or_path",),
    rules={
        "method": Rule(("finetuning_type", "quantization_bit", "quantization_method"), _factory_method),
        "rank": _one("lora_rank"),
        "lora_alpha": _one("lora_alpha"),
        "lora_dropout": _one("lora_dropout"),
        "target_modules": _one("lora_target", _factory_modules),
        **_HF_RULES,
        "examples": Rule(("max_steps", "max_samples"), _examples, more=_HF_STEP),
        "seq_len": _one("cutoff_len"),
        "padded": Rule((_HF_BATCH, "packing", "neat_packing"), _rows_differ, True),
        "gradient_checkpointing": _one("disable_gradient_checkpointing", lambda off: not is_on(off)),
        "weights_dtype": Rule(_FACTORY_PRECISION, lambda *keys: _factory_precision(*keys)[0]),
        "mixed_precision": Rule(_FACTORY_PRECISION, lambda *keys: _factory_precision(*keys)[1]),
        "double_quant": _one("double_quantization"),
        "attention": _one("flash_attn", _by_name("flash_attn", _FACTORY_ATTENTION, "--attention")),
        "trainer": _one("use_unsloth", lambda on: "unsloth" if is_on(on) else "transformers"),
    },
    defaults=_HF_DEFAULTS
    | {
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "disable_gradient_checkpointing": False,
        "double_quantization": True,
        "quantization_method": "bnb",
        "flash_attn": "auto",
        "use_reentrant_gc": True,
    },
    fixed={"prepare_kbit": (False, "LLaMA-Factory never calls prepare_model_for_kbit_training")},
    remarks=(
        *(each for each in _HF_REMARKS if each.keys[0] != "use_liger_kernel"),
        _refused("stage", "only sft and pt can be planned", lambda v: v.get("stage") not in (None, "sft", "pt")),
        _refused("enable_liger_kernel use_liger_kernel", f"Liger's {_KERNELS.removeprefix('its ')}"),
        _refused("use_v1_kernels use_kt mixture_of_depths shift_attn", _KERNELS),
        _refused("use_unsloth_gc", "checkpoints in host memory cannot be planned"),
        _refused("use_galore use_apollo use_badam use_adam_mini use_muon", "this optimizer cannot be planned"),
        _refused("use_llama_pro", _LAYERS),
        _refused("use_dora", _LORA_REMARKS[0].text),
        _refused("additional_target resize_vocab", _WEIGHTS),
        _refused("upcast_layernorm upcast_lmhead_output", "what it casts to float32 is not planned"),
        _refused("use_dft_loss use_asft_loss use_eaft_loss", _LOSS),
        _refused("fp8", "only 4-bit bitsandbytes can be planned"),
        _refused("use_mca use_hyper_parallel", _SEVERAL),
        _refused("ray_num_workers", _SEVERAL, _above_one("ray_num_workers")),
        _noted(
            "use_reentrant_gc",
            _REENTRANT,
            lambda v: is_on(v.get("use_reentrant_gc")) and not is_on(v.get("disable_gradient_checkpointing")),
        ),
        _noted("packing neat_packing", _PACKED),
        _noted(
            "adapter_name_or_path", "an adapter that is loaded keeps its own rank and modules; planned are those named"
        ),
        _noted("moe_aux_loss_coef", "the loss of the router is not planned"),
        _noted("add_tokens add_special_tokens", "rows that are added to the embeddings are not planned"),
    ),
    harmless=_HF_HARMLESS | _harmless("llamafactory"),
)

# ----------------------------------------------------------------------------------------------------------- accelerate

_ACCELERATED = {"NO": None, "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}
_accelerated = _by_name("distributed_type", _ACCELERATED, "--parallel")
_SHARED_BY = ("distributed_type", "fsdp_config", "deepspeed_config")


def _within(config: Any, key: str, default: Any = None) -> Any:
    found = config.get(key) if isinstance(config, dict) else None
    return default if found is None else found


def _parallel(kind: Any, _: Any, deepspeed: Any, number: Any) -> str | None:
    how = _accelerated(kind)
    if how == "zero":
        stage = _within(deepspeed, "zero_stage", 2)
        if stage not in (1, 2, 3):
            raise UsageError(f"zero_stage is {shown(stage)}; planned are 1, 2 and 3 (--parallel)")
        return f"zero{stage}"
    return None if number == 1 and how == "ddp" else how  # accelerate launch on one GPU wraps nothing


def _resharding(kind: Any, fsdp: Any, _: Any) -> Any:
    return _within(fsdp, "fsdp_reshard_after_forward", True) if _accelerated(kind) == "fsdp" else None


def _offloading(kind: Any, fsdp: Any, deepspeed: Any) -> Any:
    how = _accelerated(kind)
    if how == "fsdp":
        return is_on(_within(fsdp, "fsdp_offload_params"))
    return is_on(_within(deepspeed, "offload_optimizer_device")) if how == "zero" else None


def _fsdp_has(key: str, *planned: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Whether FSDP's `key` has another value than those that are planned; the first is accelerate's own."""
    return lambda v: (
        v.get("distributed_type") == "FSDP" and _within(v.get("fsdp_config"), key, planned[0]) not in planned[1:]
    )


def _deepspeed_has(*keys: str, on: Callable[[Any], bool] = is_on) -> Callable[[Mapping[str, Any]], bool]:
    return lambda v: any(on(_within(v.get("deepspeed_config"), key)) for key in keys)


# Not a training config of its own: an exported one says the rest of its options in a comment.
ACCELERATE = Framework(
    name="accelerate",
    title="accelerate launch",
    model=(),
    rules={
        "mixed_precision": _one("mixed_precision"),
        "num_gpus": _one("num_processes"),
        "parallel": Rule(_SHARED_BY, _parallel, more=("num_processes",)),
        "reshard_after_forward": Rule(_SHARED_BY, _resharding),
        "cpu_offload": Rule(_SHARED_BY, _offloading),
    },
    remarks=(
        _refused("megatron_lm_config parallelism_config fp8_config", _SEVERAL),
        _refused(
            "fsdp_config", "planned are units of one decoder layer (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)",
            _fsdp_has("fsdp_auto_wrap_policy", "NO_WRAP", "TRANSFORMER_BASED_WRAP"),
        ),
        _refused(
            "fsdp_config", "FSDP1 has other buffers than FSDP2, which is planned (fsdp_version: 2)",
            _fsdp_has("fsdp_version", 1, 2, "2"),
        ),
        _noted(
            "fsdp_config", "with fsdp_cpu_ram_efficient_loading one rank alone loads the model; planned is that all do",
            lambda v: is_on(_within(v.get("fsdp_config"), "fsdp_cpu_ram_efficient_loading")),
        ),
        _refused(
            "deepspeed_config", "a configuration file of DeepSpeed's own is not read",
            _deepspeed_has("deepspeed_config_file"),
        ),
        _refused(
            "deepspeed_config", "what lies on an NVMe disk cannot be planned",
            _deepspeed_has("offload_optimizer_device", "offload_param_device", on=lambda value: value == "nvme"),
        ),
        _refused("dynamo_config", "what a compiled model keeps depends on how the compiler fuses it"),
        _refused("use_cpu", "a run without a GPU takes none of its memory"),
    ),
    harmless=_harmless("accelerate"),
)  # fmt: skip

FRAMEWORKS = {each.name: each for each in (AXOLOTL, LLAMAFACTORY, TRL, TRANSFORMERS, ACCELERATE)}

# PEFT's own choice where target_modules is left out, by model_type (peft/utils/constants.py).
PEFT_TARGETS = {
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "gptj", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3", "stablelm"),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "mpt": ("Wqkv",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}
