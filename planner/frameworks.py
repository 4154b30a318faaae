"""What the keys of other frameworks' configs mean: one table for each, a row for each option.

A row says which keys decide an option and what their values make it; `defaults` is what the framework takes where a key
is missing. `remarks` are keys that change memory in a way no plan shows, refused or said; keys that change none are in
tables/config_keys.json.

Read from axolotl 0.19 (utils/schemas, loaders/model.py, core/builders), LLaMA-Factory 0.9.5 (hparams, model/adapter.py,
model_utils), trl 1.16 (SFTConfig, ModelConfig, scripts/sft.py), transformers 5.24 (TrainingArguments) and peft 0.21
(LoraConfig, utils/constants.py). What launches a run on several GPUs is in `launchers`.
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

    When = Callable[[Mapping[str, Any]], bool]  # judges a file's keys and values, defaults filled in

_TABLES = Path(__file__).parent.parent / "tables"
PEFT_DEFAULT = "PEFT's default"  # of target_modules: it depends on the model


class Rule(NamedTuple):
    """An option by the framework's keys: their values in order, defaults filled in, make `value`.

    None leaves the option to vramplan's default. What is `assumed` follows from the keys and is not said by them;
    `more` are keys whose values come after, but which alone say nothing. With `stands`, or where `value` is `same`, the
    first key is the option itself, and the command line's goes before it.
    """

    keys: tuple[str, ...]
    value: Callable[..., Any]
    assumed: bool = False
    more: tuple[str, ...] = ()
    stands: bool = False


class Remark(NamedTuple):
    """Keys that a plan cannot follow; `when` judges all values, and without it a key counts once it is switched on.

    Once it is `settled` by how many GPUs there are and how they share the run, a refusal is only said. `whole` may make
    all of a refusal from the file's own keys and values, where `text` does not say how to mend it.
    """

    keys: tuple[str, ...]
    text: str
    refused: bool
    when: When | None = None
    settled: bool = False
    whole: Callable[[Mapping[str, Any]], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Framework:
    """A framework's keys. `fixed` are options that no key changes, each with what fixes it.

    `nested` are keys that hold mappings, each with the prefix that the keys below may lack; such a key is known by its
    path: "fsdp_config.fsdp_version".
    """

    name: str
    title: str
    model: tuple[str, ...]
    rules: dict[str, Rule]
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    harmless: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()  # keys for which null is a value, not the lack of one
    nested: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """Every key that the framework has."""
        ruled = {key for rule in self.rules.values() for key in (*rule.keys, *rule.more)}
        said = {key for remark in self.remarks for key in remark.keys}
        return frozenset(ruled | said | {*self.model, *self.nested} | self.harmless)


@cache
def _keys() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((_TABLES / "config_keys.json").read_text("utf-8"))
    return table


def harmless_keys(name: str) -> frozenset[str]:
    """Keys that change no memory, of the table."""
    return frozenset(_keys()[name]["harmless"])


def is_on(value: Any) -> bool:
    """Whether a key's value switches something on; a mapping may say that it does not."""
    if isinstance(value, dict) and "enabled" in value:
        value = value["enabled"]
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in ("none", "no", "false", "null"))


# ---------------------------------------------------------------------------------------------------- values of options


def same(value: Any) -> Any:
    """The value as it stands."""
    return value


def one(key: str, value: Callable[[Any], Any] = same) -> Rule:
    """An option that one key decides."""
    return Rule((key,), value)


def _modules(value: Any) -> Any:
    if isinstance(value, str) and any(letter in value for letter in "*^$|()[]\\+?"):
        raise UsageError(f"{shown(value)} is a regular expression; name the modules instead (--target-modules)")
    return value


def by_name(what: str, names: Mapping[str, Any], option: str) -> Callable[[Any], Any]:
    """What `names` has for a name; null stays open, any other value is an error."""

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
_attention = by_name("attention", _ATTENTION | {"kernels-community/flash-attn2": "flash_attention_2"}, "--attention")
_dtype = by_name("dtype", _DTYPES | {"auto": None}, "--weights-dtype")


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
    "batch_size": one(_HF_BATCH),
    "gradient_accumulation_steps": one("gradient_accumulation_steps"),
    "optimizer": one("optim"),
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
_HF_HARMLESS = harmless_keys("transformers")


# -------------------------------------------------------------------------------------------------------------- remarks


def refused(keys: str, text: str, when: When | None = None) -> Remark:
    """Keys that no plan can follow."""
    return Remark(tuple(keys.split()), text, True, when)


def several(keys: str, when: When | None = None) -> Remark:
    """Keys that share a run among GPUs, refused until something else says how."""
    return Remark(tuple(keys.split()), SEVERAL, True, when, settled=True)


def noted(keys: str, text: str, when: When | None = None) -> Remark:
    """Keys that are planned otherwise than they say."""
    return Remark(tuple(keys.split()), text, False, when)


def other_than(key: str, *planned: Any) -> When:
    """Whether a key has another value than those that are planned."""
    return lambda values: values.get(key) not in (None, *planned)


def _above_one(key: str) -> When:
    return lambda values: isinstance(values.get(key), int) and values[key] > 1


def _setting(key: str, name: str) -> When:
    """Whether the mapping under `key` has `name` switched on."""
    return lambda values: isinstance(values.get(key), dict) and is_on(values[key].get(name))


def _every_nth(key: str) -> When:
    """Whether the mapping under `key` checkpoints only some layers."""
    return lambda values: isinstance(values.get(key), dict) and values[key].get("every_n_layers") not in (None, 1)


_REENTRANT = (
    "re-entrant checkpoints run a layer again to its end; planned are the others, which stop where backward has all"
)
IN_HOST_MEMORY = "activations in host memory cannot be planned"
_EVALUATION = "evaluation is not part of the plan, only training steps are"
_PACKED = "rows are packed: planned as full rows without padding, each attended to as one"
COMPILED = "what a compiled model keeps depends on how the compiler fuses it"
NO_GPU = "a run without a GPU takes none of its memory"
SEVERAL = (
    "how it shares a run among GPUs is not read; say that by both --num-gpus and --parallel, or name the launcher's "
    "file too"
)
SETTLED = "what it names is not read; planned is what --num-gpus and --parallel, or the launcher's file, say"
PARTS = "this way to share a run among GPUs cannot be planned"
_KERNELS = "its kernels keep other tensors than transformers' own layers do"
_WEIGHTS = "it trains or holds further weights, which a plan does not count"
_LOSS = "its loss computes on other tensors than the one that is planned"
_LAYERS = "it adapts only some layers or weights, and a plan adapts the same modules in every layer"

_HF_REMARKS = (
    several("deepspeed fsdp"),
    refused("parallelism_config", PARTS),
    refused("use_liger_kernel", f"Liger's {_KERNELS.removeprefix('its ')}"),
    refused("auto_find_batch_size", "the batch is found only when the run is out of memory; plan with --batch-size"),
    refused("torch_compile", COMPILED),
    refused("optim_target_modules", "an optimizer for some modules only cannot be planned"),
    refused("label_smoothing_factor", "with label smoothing the loss is computed outside the model"),
    refused("use_cpu", NO_GPU),
    *(
        remark
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        for remark in (
            refused(key, "in selective checkpointing a layer keeps some activations", _setting(key, "selective")),
            refused(key, "the layers that are not checkpointed keep their activations", _every_nth(key)),
            refused(key, IN_HOST_MEMORY, _setting(key, "offload")),
            noted(key, _REENTRANT, _setting(key, "use_reentrant")),
        )
    ),
    noted("neftune_noise_alpha", "its noise on the embeddings, as large as a hidden state, is not planned"),
    noted("torch_empty_cache_steps", "PyTorch's cache is planned as kept, and emptying it lowers what is reserved"),
    noted("eval_strategy", _EVALUATION),
)
_LORA_REMARKS = (
    refused("use_dora", "DoRA's magnitudes and norms of whole weights cannot be planned"),
    refused("modules_to_save lora_modules_to_save trainable_token_indices lora_bias", _WEIGHTS),
    refused("target_parameters lora_target_parameters layers_to_transform layers_pattern exclude_modules", _LAYERS),
    refused("layer_replication", "replicated layers cannot be planned"),
    refused("rank_pattern", "a rank of their own for some modules cannot be planned"),
    refused("bias", "it trains biases too, which a plan does not count"),
    refused(
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
        "rank": one("r"),
        "lora_alpha": one("lora_alpha"),
        "lora_dropout": one("lora_dropout"),
        "target_modules": one("target_modules", lambda value: PEFT_DEFAULT if value is None else _modules(value)),
        **_HF_RULES,
        "seq_len": Rule(("SEQ_LEN", "max_length"), lambda constant, length: length if constant is None else constant),
        "padded": Rule(("PADDED", _HF_BATCH), lambda said, batch: _rows_differ(batch) if said is None else said, True),
        "gradient_checkpointing": _CHECKPOINTING,
        "mixed_precision": Rule(("bf16", "fp16"), _autocast),
        "weights_dtype": Rule(_WEIGHTS_KEYS, _transformers_weights),
        "double_quant": one("bnb_4bit_use_double_quant"),
        "prepare_kbit": one("prepare_model_for_kbit_training"),
        "attention": one("attn_implementation", _attention),
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
        refused("FastLanguageModel() FastModel()", "Unsloth's kernels and checkpoints cannot be planned yet"),
    ),
    harmless=_HF_HARMLESS | harmless_keys("peft") | harmless_keys("script") | {"trainer"} | _CALLS,
)

# ------------------------------------------------------------------------------------------------------------------ trl

_SFT_REMARKS = (
    refused("activation_offloading", IN_HOST_MEMORY),
    refused("loss_type", _LOSS, other_than("loss_type", "nll")),
    noted("packing padding_free", _PACKED),
    noted("router_aux_loss_coef", "the loss of the router is not planned"),
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
        "seq_len": one("max_length", _max_length),
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
    remarks=(*TRANSFORMERS.remarks, *_SFT_REMARKS, refused("model_init_kwargs", "what it sets is not read")),
    harmless=TRANSFORMERS.harmless | harmless_keys("sft") | {"SEQ_LEN"},
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
        "rank": one("lora_r"),
        "lora_alpha": one("lora_alpha"),
        "lora_dropout": one("lora_dropout"),
        "target_modules": one("lora_target_modules", TRANSFORMERS.rules["target_modules"].value),
        **_HF_RULES,
        "seq_len": one("max_length", _max_length),
        "padded": Rule((_HF_BATCH, "packing", "padding_free"), _rows_differ, True),
        "gradient_checkpointing": _CHECKPOINTING,
        "mixed_precision": Rule(("bf16", "fp16"), _sft_autocast),
        "weights_dtype": one("dtype", _dtype),
        "double_quant": one("use_bnb_nested_quant"),
        "attention": one("attn_implementation", _attention),
        "expandable_segments": one(
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
        refused("model_init_kwargs", "what it sets is not read; say dtype and attn_implementation as keys"),
        noted(
            "dtype load_in_4bit",
            "bitsandbytes computes in dtype there, and is planned as computing in autocast's; set both alike",
            lambda values: (
                is_on(values.get("load_in_4bit"))
                and values.get("dtype") not in ("auto", _LONG[_sft_autocast(values.get("bf16"), values.get("fp16"))])
            ),
        ),
    ),
    harmless=_HF_HARMLESS | harmless_keys("sft") | harmless_keys("trl"),
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
        "rank": one("lora_r", _axolotl_rank),
        "lora_alpha": one("lora_alpha"),
        "lora_dropout": one("lora_dropout"),
        "target_modules": Rule(("lora_target_linear", "lora_target_modules"), _axolotl_modules),
        "batch_size": one("micro_batch_size"),
        "seq_len": one("sequence_len"),
        "padded": Rule(
            ("micro_batch_size", "sample_packing", "pad_to_sequence_len"),
            lambda batch, packed, whole: _rows_differ(batch, packed) or (is_on(whole) and not is_on(packed)),
            True,
        ),
        "gradient_accumulation_steps": Rule(
            ("gradient_accumulation_steps", "batch_size"), _axolotl_accumulation, more=("micro_batch_size",)
        ),
        "gradient_checkpointing": one("gradient_checkpointing", lambda on: _offloaded(on) or on),
        "optimizer": one("optimizer"),
        "weights_dtype": Rule(_AXOLOTL_PRECISION, lambda *keys: _axolotl_precision(*keys)[0]),
        "mixed_precision": Rule(_AXOLOTL_PRECISION, lambda *keys: _axolotl_precision(*keys)[1]),
        "double_quant": one(
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
        several("fsdp_config fp32_norms"),
        *(several(key, _above_one(key)) for key in ("dp_shard_size", "world_size")),
        *(
            refused(key, PARTS, _above_one(key))
            for key in (
                "tensor_parallel_size",
                "context_parallel_size",
                "dp_replicate_size",
                "sequence_parallel_degree",
                "expert_parallel_size",
            )
        ),
        refused(
            "rl reward_model process_reward_model kd_trainer trainer_cls diffusion ebft hatchery nemo_gym_enabled",
            "only supervised fine-tuning with axolotl's own trainer can be planned",
        ),
        refused("chunked_cross_entropy cut_cross_entropy flash_attn_cross_entropy use_eaft", _LOSS),
        refused(
            """liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation
            liger_cross_entropy liger_fused_linear_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm tiled_mlp
            fused_attn_kernel flash_attn_d512 flash_optimum gemma4_hybrid_attn_impl large_head_attention s2_attention
            scaling_softmax sdpa_varlen experts_implementation expert_backend moe_grouped_backend moe_bnb_fast
            use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels use_kernels use_onebitllms
            llama4_linearized_experts""",
            _KERNELS,
        ),
        refused(
            "activation_offloading layer_offloading ple_cpu_offload lora_on_cpu",
            "what lies in host memory cannot be planned",
        ),
        refused("selective_checkpointing dynamic_checkpoint", "only whole layers can be planned as checkpoints"),
        refused(
            "gradient_checkpointing",
            "checkpoints in host memory or on disk cannot be planned; choose --gradient-checkpointing",
            lambda values: _offloaded(values.get("gradient_checkpointing")),
        ),
        refused(
            "fp8 qat gptq quantize_moe_experts model_quantization_config nonexpert_quantization",
            "only 4-bit bitsandbytes can be planned",
        ),
        refused(
            "relora lisa_n_layers unfrozen_parameters spectrum_top_fraction",
            "training some of the weights only cannot be planned",
        ),
        refused("lora_modules_to_save peft_trainable_token_indices", _WEIGHTS),
        refused("lora_target_parameters peft_layers_to_transform peft_layers_pattern", _LAYERS),
        refused("lora_rank_pattern", "a rank of their own for some modules cannot be planned"),
        refused("peft_layer_replication", "replicated layers cannot be planned"),
        refused("peft use_mora", "this kind of LoRA cannot be planned"),
        refused(
            "peft_autocast_adapter_dtype",
            "adapters are planned in float32",
            lambda values: values.get("peft_autocast_adapter_dtype") is False,
        ),
        refused("grokfast_alpha", "it keeps a running mean of the gradients, which a plan does not count"),
        refused("peft_use_dora", _LORA_REMARKS[0].text),
        refused(
            "attn_implementation",
            "axolotl holds norms, embeddings and head in float32 where every weight is trained with sdpa or eager "
            "attention; set attn_implementation: flash_attention_2",
            _axolotl_float32_embeddings,
        ),
        noted(
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
        noted("sample_packing", _PACKED),
        noted("val_set_size test_datasets", _EVALUATION),
        noted("plugins", "a plugin may change what is kept; only the keys beside it are judged"),
        noted("lora_model_dir", "an adapter that is loaded keeps its own rank and modules; planned are those named"),
        noted("tokens resize_token_embeddings_to_32x", "rows that are added to the embeddings are not planned"),
        noted("max_memory gpu_memory_limit", "the model is planned on the GPU as a whole"),
    ),
    harmless=harmless_keys("axolotl"),
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
        "rank": one("lora_rank"),
        "lora_alpha": one("lora_alpha"),
        "lora_dropout": one("lora_dropout"),
        "target_modules": one("lora_target", _factory_modules),
        **_HF_RULES,
        "examples": Rule(("max_steps", "max_samples"), _examples, more=_HF_STEP),
        "seq_len": one("cutoff_len"),
        "padded": Rule((_HF_BATCH, "packing", "neat_packing"), _rows_differ, True),
        "gradient_checkpointing": one("disable_gradient_checkpointing", lambda off: not is_on(off)),
        "weights_dtype": Rule(_FACTORY_PRECISION, lambda *keys: _factory_precision(*keys)[0]),
        "mixed_precision": Rule(_FACTORY_PRECISION, lambda *keys: _factory_precision(*keys)[1]),
        "double_quant": one("double_quantization"),
        "attention": one("flash_attn", by_name("flash_attn", _FACTORY_ATTENTION, "--attention")),
        "trainer": one("use_unsloth", lambda on: "unsloth" if is_on(on) else "transformers"),
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
        refused("stage", "only sft and pt can be planned", other_than("stage", "sft", "pt")),
        refused("enable_liger_kernel use_liger_kernel", f"Liger's {_KERNELS.removeprefix('its ')}"),
        refused("use_v1_kernels use_kt mixture_of_depths shift_attn", _KERNELS),
        refused("use_unsloth_gc", "checkpoints in host memory cannot be planned"),
        refused("use_galore use_apollo use_badam use_adam_mini use_muon", "this optimizer cannot be planned"),
        refused("use_llama_pro", _LAYERS),
        refused("use_dora", _LORA_REMARKS[0].text),
        refused("additional_target resize_vocab", _WEIGHTS),
        refused("upcast_layernorm upcast_lmhead_output", "what it casts to float32 is not planned"),
        refused("use_dft_loss use_asft_loss use_eaft_loss", _LOSS),
        refused("fp8", "only 4-bit bitsandbytes can be planned"),
        refused("use_mca use_hyper_parallel", PARTS),
        several("ray_num_workers", _above_one("ray_num_workers")),
        noted(
            "use_reentrant_gc",
            _REENTRANT,
            lambda v: is_on(v.get("use_reentrant_gc")) and not is_on(v.get("disable_gradient_checkpointing")),
        ),
        noted("packing neat_packing", _PACKED),
        noted(
            "adapter_name_or_path", "an adapter that is loaded keeps its own rank and modules; planned are those named"
        ),
        noted("moe_aux_loss_coef", "the loss of the router is not planned"),
        noted("add_tokens add_special_tokens", "rows that are added to the embeddings are not planned"),
    ),
    harmless=_HF_HARMLESS | harmless_keys("llamafactory"),
)

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
