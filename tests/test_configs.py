"""Configs of other frameworks: what each key makes of a plan, and what is refused, said or left alone."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON

from vramplan.planner import frameworks
from vramplan.planner.configs import FRAMEWORKS, interpret, read
from vramplan.planner.errors import UsageError
from vramplan.planner.frameworks import SFT, TRANSFORMERS, TRL, Framework

DATA = Path(__file__).parent / "data" / "configs"
ALL = {**FRAMEWORKS, "sft": SFT}

# What each file under tests/data/configs comes to, by hand.
EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qlora.yml": (
        "axolotl",
        "NousResearch/Meta-Llama-3.1-8B-Instruct",
        {
            "method": "qlora",
            "rank": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": ("all-linear",),
            "batch_size": 2,
            "seq_len": 4096,
            "padded": False,  # packed
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": True,
            "optimizer": "adamw_bnb_8bit",
            "double_quant": True,
            "prepare_kbit": False,
            "attention": "flash_attention_2",
            "trainer": "transformers",
            "expandable_segments": True,
            "epochs": 2,
        },
    ),
    "llamafactory_lora.yaml": (
        "llamafactory",
        "Qwen/Qwen3-4B",
        {
            "method": "lora",
            "rank": 8,
            "lora_dropout": 0.0,
            "target_modules": ("all-linear",),
            "batch_size": 2,
            "seq_len": 1024,
            "padded": True,
            "gradient_accumulation_steps": 8,
            "gradient_checkpointing": True,
            "optimizer": "adamw_torch_fused",
            "weights_dtype": "bf16",
            "mixed_precision": "bf16",
            "trainer": "transformers",
            "examples": 5000,
            "epochs": 3.0,
        },
    ),
    "llamafactory_full.yaml": (
        "llamafactory",
        "meta-llama/Llama-3.2-1B",
        {
            "method": "full",
            "batch_size": 1,
            "seq_len": 2048,
            "padded": False,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "optimizer": "adamw_torch_fused",
            "weights_dtype": "fp32",  # what is trained is cast to float32
            "mixed_precision": "bf16",
            "attention": "flash_attention_2",
            "trainer": "transformers",
            "examples": 200,
            "epochs": 1,
        },
    ),
    "trl_sft.yaml": (
        "trl",
        "mistralai/Mistral-7B-v0.3",
        {
            "method": "lora",
            "rank": 64,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": ("q_proj", "v_proj"),  # PEFT's own for mistral
            "batch_size": 4,
            "seq_len": 2048,
            "padded": True,
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": True,
            "optimizer": "adamw_torch_fused",
            "weights_dtype": "bf16",
            "mixed_precision": "bf16",
            "attention": "sdpa",
            "trainer": "trl",
            "epochs": 3.0,
        },
    ),
    "trl_bare.yaml": (
        "trl",
        "Qwen/Qwen3-0.6B",
        {
            "method": "full",
            "batch_size": 8,
            "seq_len": 1024,
            "padded": True,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "optimizer": "adamw_torch_fused",
            "weights_dtype": "fp32",
            "mixed_precision": "bf16",
            "trainer": "trl",
            "epochs": 3.0,
        },
    ),
    "trained": (
        "transformers",
        "meta-llama/Llama-3.2-3B",
        {
            "method": "lora",
            "rank": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ("v_proj", "q_proj"),
            "batch_size": 4,
            "padded": True,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "optimizer": "paged_adamw_8bit",
            "mixed_precision": "bf16",
            "trainer": "transformers",
            "epochs": 1,
        },
    ),
    "train.py": (
        "transformers",
        "google/gemma-2-2b",
        {
            "method": "lora",
            "rank": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": ("q_proj", "v_proj"),
            "batch_size": 1,
            "padded": False,
            "gradient_accumulation_steps": 16,
            "gradient_checkpointing": False,
            "optimizer": "adafactor",
            "weights_dtype": "bf16",
            "mixed_precision": "bf16",
            "attention": "eager",
            "trainer": "transformers",
            "epochs": 3.0,
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_as_people_have_it(name: str) -> None:
    framework, model, options = EXPECTED[name]
    reading = read([str(DATA / name)])
    assert (reading.framework.name, reading.model, reading.options) == (framework, model, options)
    assert set(reading.sources) == {"model", *options}
    assert not reading.unknown


def test_every_option_says_where_it_is_from() -> None:
    reading = read([str(DATA / "qlora.yml")], seq_len="512")
    said = {name: reading.sources[name] for name in ("model", "method", "rank", "seq_len", "padded", "double_quant")}
    assert said == {
        "model": "base_model",
        "method": "adapter, load_in_4bit",
        "rank": "lora_r",
        "seq_len": "the command line",
        "padded": "assumed from micro_batch_size, sample_packing, pad_to_sequence_len",
        "double_quant": "default of bnb_config_kwargs",
    }
    assert reading.options["seq_len"] == "512"
    assert [note.partition(":")[0] for note in reading.notes] == ["lora_qkv_kernel", "sample_packing", "val_set_size"]
    assert "learning_rate" in reading.harmless


# ------------------------------------------------------------------------------------------------ the frameworks' facts


def defaults(of: type) -> dict[str, Any]:
    missing = dataclasses.MISSING
    return {
        each.name: each.default_factory() if each.default_factory is not missing else each.default
        for each in dataclasses.fields(of)
    }


def test_defaults_are_those_of_the_installed_packages() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = defaults(transformers.TrainingArguments) | defaults(peft.LoraConfig)
    for key, value in TRANSFORMERS.defaults.items():
        if key in theirs:
            assert (theirs[key] or False) == (value or False), key
    assert {"r", "optim", "per_device_train_batch_size"} <= set(TRANSFORMERS.defaults) & set(theirs)


def test_defaults_of_trl_are_those_installed() -> None:
    trl = pytest.importorskip("trl")
    sft, model = defaults(trl.SFTConfig), defaults(trl.ModelConfig)
    for key, value in TRL.defaults.items():
        assert (sft | model)[key] == value, key
    for key, value in SFT.defaults.items():
        if key in sft:
            assert sft[key] == value, key


def test_peft_targets_are_the_installed_ones() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: list(names) for kind, names in frameworks.PEFT_TARGETS.items()} == {
        kind: names for kind, names in theirs.items() if kind in frameworks.PEFT_TARGETS
    }


def test_every_key_of_the_installed_packages_is_known() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    assert set(defaults(transformers.TrainingArguments)) <= TRANSFORMERS.known
    assert set(defaults(peft.LoraConfig)) <= TRANSFORMERS.known
    trl = pytest.importorskip("trl")
    for part in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig):
        assert set(defaults(part)) <= TRL.known, part
    assert set(defaults(trl.SFTConfig)) <= SFT.known


@pytest.mark.parametrize("name", ALL)
def test_a_key_is_either_harmless_or_not(name: str) -> None:
    framework = ALL[name]
    matters = {key for rule in framework.rules.values() for key in (*rule.keys, *rule.more)}
    matters |= {key for remark in framework.remarks for key in remark.keys}
    allowed = {"max_length"}  # of a data set's tokenizer, and of SFTConfig
    assert not matters & framework.harmless - allowed


def test_the_table_of_keys_is_sorted_and_dated() -> None:
    table = json.loads((Path(frameworks.__file__).parent.parent / "tables" / "config_keys.json").read_text())
    for part in table.values():
        assert part["source"]
        assert part["date"] >= "2026"
        assert part["harmless"] == sorted(set(part["harmless"]))


# ----------------------------------------------------------------------------------------------------- keys that matter

BASE: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "gpt2", "lora_r": 8, "lora_target_linear": True, "adapter": "lora"},
    "llamafactory": {"model_name_or_path": "gpt2"},
    "trl": {"model_name_or_path": "gpt2", "use_peft": True},
    "transformers": {"base_model_name_or_path": "gpt2", "peft_type": "LORA", "target_modules": "all-linear"},
}

MEANS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl", {}, {"seq_len": 512, "epochs": 1.0, "gradient_checkpointing": False, "batch_size": 1}),
    ("axolotl", {"adapter": None, "flash_attention": True}, {"method": "full"}),
    ("axolotl", {"adapter": "qlora", "load_in_4bit": True}, {"method": "qlora", "prepare_kbit": False}),
    ("axolotl", {"bf16": "full"}, {"weights_dtype": "bf16", "mixed_precision": "no"}),
    ("axolotl", {"bf16": False, "fp16": True}, {"weights_dtype": "fp16", "mixed_precision": "fp16"}),
    ("axolotl", {"fp16": True}, {"weights_dtype": "fp16", "mixed_precision": "fp16"}),
    ("axolotl", {"bf16": False}, {"weights_dtype": "fp32", "mixed_precision": "no"}),
    ("axolotl", {"bf16": False, "float16": True}, {"weights_dtype": "fp16", "mixed_precision": "no"}),
    ("axolotl", {"batch_size": 16, "micro_batch_size": 2}, {"gradient_accumulation_steps": 8, "padded": True}),
    ("axolotl", {"pad_to_sequence_len": True}, {"padded": True}),
    ("axolotl", {"sdp_attention": True}, {"attention": "sdpa"}),
    ("axolotl", {"lora_target_linear": False, "lora_target_modules": ["c_attn"]}, {"target_modules": ("c_attn",)}),
    ("axolotl", {"max_steps": 10, "gradient_accumulation_steps": 4}, {"examples": 40, "epochs": 1}),
    (
        "axolotl",
        {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        {"double_quant": False},
    ),
    ("llamafactory", {}, {"rank": 8, "batch_size": 8, "seq_len": 2048, "mixed_precision": "no"}),
    ("llamafactory", {"quantization_bit": 4}, {"method": "qlora", "double_quant": True, "prepare_kbit": False}),
    ("llamafactory", {"finetuning_type": "full"}, {"weights_dtype": "fp32", "mixed_precision": "no"}),
    ("llamafactory", {"finetuning_type": "full", "pure_bf16": True}, {"weights_dtype": "bf16"}),
    ("llamafactory", {"fp16": True}, {"weights_dtype": "fp16", "mixed_precision": "fp16"}),
    ("llamafactory", {"lora_target": "c_attn, c_proj"}, {"target_modules": ("c_attn", "c_proj")}),
    ("llamafactory", {"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    ("llamafactory", {"packing": True}, {"padded": False}),
    ("llamafactory", {"flash_attn": "disabled"}, {"attention": "eager"}),
    ("trl", {}, {"target_modules": ("c_attn",), "rank": 16, "lora_dropout": 0.05, "weights_dtype": "fp32"}),
    ("trl", {"fp16": True}, {"mixed_precision": "fp16"}),
    ("trl", {"load_in_4bit": True}, {"method": "qlora", "double_quant": False, "prepare_kbit": False}),
    ("trl", {"lora_target_modules": "all-linear"}, {"target_modules": ("all-linear",)}),
    ("trl", {"packing": True}, {"padded": False, "batch_size": 8}),
    ("trl", {"env": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}, {"expandable_segments": True}),
    ("transformers", {}, {"batch_size": 8, "mixed_precision": "no", "rank": 8, "gradient_checkpointing": False}),
    ("transformers", {"fp16": True}, {"weights_dtype": "fp16"}),
    ("transformers", {"peft_type": None, "fp16": True}, {"method": "full", "weights_dtype": "fp32"}),
]


@pytest.mark.parametrize(("name", "keys", "means"), MEANS)
def test_what_keys_mean(name: str, keys: dict[str, Any], means: dict[str, Any]) -> None:
    reading = interpret(BASE[name] | keys, FRAMEWORKS[name])
    assert {option: reading.options.get(option) for option in means} == means
    assert not reading.refused


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("axolotl", {"deepspeed": "zero2.json"}),
    ("axolotl", {"fsdp_config": {"offload_params": True}}),
    ("axolotl", {"tensor_parallel_size": 2}),
    ("axolotl", {"rl": "dpo"}),
    ("axolotl", {"liger_rms_norm": True}),
    ("axolotl", {"cut_cross_entropy": True}),
    ("axolotl", {"gradient_checkpointing": "offload"}),
    ("axolotl", {"context_parallel_size": 2}),
    ("axolotl", {"peft_use_dora": True}),
    ("axolotl", {"lora_modules_to_save": ["embed_tokens"]}),
    ("axolotl", {"unfrozen_parameters": ["lm_head"]}),
    ("llamafactory", {"stage": "dpo"}),
    ("llamafactory", {"deepspeed": "ds.json"}),
    ("llamafactory", {"enable_liger_kernel": True}),
    ("llamafactory", {"use_galore": True}),
    ("llamafactory", {"use_badam": True}),
    ("llamafactory", {"additional_target": "embed_tokens"}),
    ("trl", {"use_liger_kernel": True}),
    ("trl", {"fsdp": "full_shard"}),
    ("trl", {"use_dora": True}),
    ("trl", {"loss_type": "dft"}),
    ("trl", {"activation_offloading": True}),
    ("trl", {"gradient_checkpointing_kwargs": {"selective": True}}),
    ("trl", {"activation_checkpointing_kwargs": {"offload": True}}),
    ("transformers", {"activation_checkpointing_kwargs": {"every_n_layers": 2}}),
    ("transformers", {"auto_find_batch_size": True}),
    ("transformers", {"torch_compile": True}),
    ("transformers", {"modules_to_save": ["lm_head"]}),
    ("transformers", {"bias": "all"}),
    ("transformers", {"rank_pattern": {"q_proj": 4}}),
    ("transformers", {"layers_to_transform": [0]}),
]


@pytest.mark.parametrize(("name", "keys"), REFUSED)
def test_keys_that_change_memory_as_no_plan_follows_are_refused(name: str, keys: dict[str, Any]) -> None:
    reading = interpret(BASE[name] | keys, FRAMEWORKS[name])
    assert list(reading.refused) == list(keys)
    assert not interpret(BASE[name] | keys, FRAMEWORKS[name], ignore=list(keys)).refused


@pytest.mark.parametrize("name", ["axolotl", "llamafactory", "trl", "transformers"])
def test_who_said_how_gpus_share_a_run_is_not_asked_again(name: str) -> None:
    values = BASE[name] | {"deepspeed": "ds.json", "fsdp": "full_shard"}
    refusal = interpret(values, FRAMEWORKS[name]).refused["deepspeed"]
    assert "say that by both --num-gpus and --parallel" in refusal.text
    for asked in ({"num_gpus": 8}, {"parallel": "zero3"}):
        assert list(interpret(values, FRAMEWORKS[name], asked=asked).refused) == ["deepspeed", "fsdp"]
    settled = interpret(values, FRAMEWORKS[name], asked={"num_gpus": "8", "parallel": "zero3"})
    assert not settled.refused
    assert [note for note in settled.notes if note.startswith(("deepspeed: what it names is not read", "fsdp: "))]
    parts = {"axolotl": "context_parallel_size", "llamafactory": "use_mca"}.get(name, "parallelism_config")
    several = interpret(values | {parts: 2}, FRAMEWORKS[name], asked={"num_gpus": "8", "parallel": "zero3"})
    assert list(several.refused) == [parts]


SWITCHES = [case for case in REFUSED if not {"stage", "loss_type", "gradient_checkpointing"} & set(case[1])]


@pytest.mark.parametrize(("name", "keys"), SWITCHES)
def test_the_same_keys_switched_off_are_not(name: str, keys: dict[str, Any]) -> None:
    for off in (None, False, "", [], {}):
        values = BASE[name] | dict.fromkeys(keys, off)
        assert not interpret(values, FRAMEWORKS[name]).refused, off


def test_axolotl_full_fine_tuning_keeps_float32_embeddings_under_sdpa() -> None:
    base = {"base_model": "gpt2"}
    axolotl = FRAMEWORKS["axolotl"]
    assert "attn_implementation" in interpret(base, axolotl).refused
    assert "attn_implementation" in interpret(base | {"attn_implementation": "eager"}, axolotl).refused
    assert not interpret(base | {"flash_attention": True}, axolotl).refused
    assert not interpret(base | {"bf16": False}, axolotl).refused  # all is float32


def test_notes() -> None:
    def noted(name: str, keys: dict[str, Any]) -> list[str]:
        return [note.partition(":")[0] for note in interpret(BASE[name] | keys, FRAMEWORKS[name]).notes]

    assert noted("axolotl", {}) == ["lora_qkv_kernel"]  # on by default
    assert noted("axolotl", {"lora_mlp_kernel": False}) == []
    assert noted("axolotl", {"lora_mlp_kernel": True}) == ["lora_mlp_kernel"]
    assert noted("llamafactory", {}) == ["use_reentrant_gc"]
    assert noted("llamafactory", {"use_reentrant_gc": False}) == []
    assert noted("llamafactory", {"disable_gradient_checkpointing": True}) == []
    assert noted("trl", {"load_in_4bit": True}) == ["load_in_4bit"]  # bitsandbytes computes in float32
    assert noted("trl", {"load_in_4bit": True, "dtype": "bfloat16"}) == []
    assert noted("trl", {"eval_strategy": "no"}) == []
    assert noted("trl", {"eval_strategy": "steps"}) == ["eval_strategy"]


def test_what_follows_from_the_batch_follows_the_command_line_too() -> None:
    values = BASE["trl"] | {"max_steps": 10, "per_device_train_batch_size": 4}
    said = interpret(values, TRL).options
    assert (said["padded"], said["examples"]) == (True, 40)
    said = interpret(values, TRL, asked={"batch_size": "1"}).options
    assert (said["padded"], said["examples"]) == (False, 10)


def test_unknown_keys_are_named_with_the_one_that_may_be_meant() -> None:
    values = BASE["axolotl"] | {"micro_batchsize": 4, "frobnicate": 1}
    assert interpret(values, FRAMEWORKS["axolotl"]).unknown == (
        "'micro_batchsize' is no key of axolotl; micro_batch_size, which decides the plan, may be meant",
        "'frobnicate' is no key of axolotl",
    )


# --------------------------------------------------------------------------------------------------- whose config it is


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(values: dict[str, Any] | str, name: str = "a.yml") -> str:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return file


@pytest.mark.parametrize("name", ["axolotl", "llamafactory", "trl"])
def test_the_framework_is_known_by_its_keys(write: Any, name: str) -> None:
    own = {"llamafactory": {"finetuning_type": "lora"}}
    reading = read([write(BASE[name] | own.get(name, {}))])
    assert reading.framework.name == name
    assert reading.evidence


def wrong(*files: str, **asked: Any) -> str:
    with pytest.raises(UsageError) as error:
        read(list(files), **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_keys_of_two_frameworks_are_ambiguous(write: Any) -> None:
    file = write({"base_model": "gpt2", "finetuning_type": "lora"})
    assert "could be of more than one framework: axolotl by base_model; llamafactory by finetuning_type" in wrong(file)
    assert "could be" not in wrong(file, framework="axolotl", ignore=["lora_target_linear"])


def test_keys_of_none_are_asked_about(write: Any) -> None:
    file = write({"model_name_or_path": "gpt2", "per_device_train_batch_size": 2})
    assert wrong(file).endswith("say which by --from axolotl|llamafactory|trl|transformers|accelerate|deepspeed")
    assert read([file], framework="trl").options["seq_len"] == 1024
    assert read([file], framework="llamafactory").options["seq_len"] == 2048
    assert "did you mean llamafactory" in wrong(file, framework="llamafactry")


def test_trainings_arguments_saved_as_json(write: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir="out", per_device_train_batch_size=2, optim="sgd", fp16=True)
    file = write(arguments.to_json_string(), "training_args.json")
    reading = read([file], model="gpt2")
    said = {name: reading.options[name] for name in ("batch_size", "optimizer", "method", "mixed_precision")}
    assert said == {"batch_size": 2, "optimizer": "sgd", "method": "full", "mixed_precision": "fp16"}
    assert not reading.unknown
    assert not reading.refused
    assert "names no model; name one by --model" in wrong(file)
    (tmp_path / "training_args.bin").write_bytes(b"\x80")
    assert read([str(tmp_path)], model="gpt2").options == reading.options
    Path(file).unlink()
    assert "training_args.bin is a pickle, which is never read" in wrong(str(tmp_path))


def test_sft_config_saved_as_json(write: Any) -> None:
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(output_dir="out", max_length=300, bf16=False)
    reading = read([write(arguments.to_json_string(), "a.json")], model="gpt2")
    assert (reading.options["trainer"], reading.options["seq_len"]) == ("trl", 300)
    assert not reading.unknown


def test_scripts(write: Any) -> None:
    arguments = "args = TrainingArguments(output_dir='out', max_steps=pick())\n"
    unsloth = "model, _ = FastLanguageModel.from_pretrained('gpt2', load_in_4bit=True)\nLoraConfig()\n"
    assert "max_steps is worked out in line 1" in wrong(write(arguments, "a.py"), model="gpt2")
    assert read([write(arguments, "a.py")], model="gpt2", epochs=1, examples=5).options["examples"] == 5
    assert "FastLanguageModel() cannot be planned: Unsloth's kernels" in wrong(write(unsloth, "a.py"))
    assert "calls neither TrainingArguments nor SFTConfig" in wrong(write("print()", "a.py"))
    assert "leave out --from axolotl" in wrong(write(arguments, "a.py"), framework="axolotl")
    call = "AutoModelForCausalLM.from_pretrained('gpt2')\nTrainingArguments('out')\n"
    checkpointed = {
        "": False,
        "model.gradient_checkpointing_enable()": True,
        "model = prepare_model_for_kbit_training(model)": True,
        "model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)": False,
    }
    for line, on in checkpointed.items():
        assert read([write(call + line, "a.py")]).options["gradient_checkpointing"] is on, line
    trl = write("SFTConfig(output_dir='out')\nAutoModelForCausalLM.from_pretrained(name)", "a.py")
    assert "the model is worked out in line 2" in wrong(trl)
    reading = read([trl], model="gpt2")
    assert {name: reading.options[name] for name in ("trainer", "seq_len", "mixed_precision", "method")} == {
        "trainer": "trl",
        "seq_len": 1024,
        "mixed_precision": "bf16",
        "method": "full",
    }


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("axolotl", {"micro_batch_size": "two"}, "micro_batch_size: batch_size is 'two'; it must be a whole number"),
    ("axolotl", {"lora_r": None}, "lora_r: axolotl has no default for it; add lora_r (--rank)"),
    ("axolotl", {"adapter": "lorra"}, "unknown adapter 'lorra'; did you mean lora"),
    ("axolotl", {"adapter": ["lora"]}, "unknown adapter ['lora']"),
    ("axolotl", {"adapter": "qlora"}, "load_in_4bit: true"),
    ("axolotl", {"load_in_8bit": True}, "LLM.int8 cannot be planned"),
    ("axolotl", {"optimizer": "came_pytorch"}, "unknown optimizer 'came_pytorch'"),
    ("axolotl", {"attn_implementation": "flash"}, "unknown attention 'flash'"),
    ("axolotl", {"xformers_attention": True}, "unknown attention 'xformers'"),
    ("axolotl", {"lora_target_linear": None}, "no modules are named; add lora_target_linear: true"),
    ("axolotl", {"lora_target_linear": None, "lora_target_modules": r".*_proj"}, "is a regular expression"),
    ("axolotl", {"base_model": 7}, "base_model names no model"),
    ("llamafactory", {"finetuning_type": "freeze"}, "unknown finetuning_type 'freeze'"),
    ("llamafactory", {"quantization_bit": 4, "finetuning_type": "full"}, "quantised weights cannot be trained"),
    ("llamafactory", {"quantization_bit": 8}, "8 bits by bnb cannot be planned"),
    ("llamafactory", {"quantization_bit": 4, "quantization_method": "hqq"}, "4 bits by hqq cannot be planned"),
    ("llamafactory", {"flash_attn": "fa3"}, "unknown flash_attn 'fa3'"),
    ("llamafactory", {"cutoff_len": -1}, "cutoff_len: seq_len is -1"),
    ("trl", {"dtype": "float64"}, "unknown dtype 'float64'"),
    ("trl", {"max_length": None}, "null cuts no row short; name the longest with --seq-len"),
    ("trl", {"use_peft": False, "load_in_4bit": True}, "4-bit weights cannot be trained"),
    ("trl", {"model_name_or_path": "qwen3.5-4b", "lora_target_modules": None}, ""),
    ("transformers", {"peft_type": "IA3"}, "unknown peft_type 'IA3'"),
    ("transformers", {"optim": "galore_adamw"}, "optim: optimizer 'galore_adamw'"),
]


@pytest.mark.parametrize(("name", "keys", "says"), WRONG)
def test_values_that_cannot_be(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        interpret(BASE[name] | keys, FRAMEWORKS[name])
    assert says in str(error.value)


@st.composite
def configs(draw: st.DrawFn) -> tuple[Framework, dict[str, Any]]:
    framework = draw(st.sampled_from(list(ALL.values())))
    base = BASE.get(framework.name, {}) if draw(st.booleans()) else {}
    keys = st.sampled_from(sorted(framework.known)) | st.text(max_size=8)
    sane = st.sampled_from([True, False, None, "auto", "none", 0, 1, 2, 8, "8", "bfloat16", "lora", [], {}, ["a"]])
    values = base | draw(st.dictionaries(keys, sane | JSON, max_size=8))
    return framework, nested(values, framework) if draw(st.booleans()) else values


def nested(values: dict[str, Any], framework: Framework) -> dict[str, Any]:
    """The values with those whose key is a path below their mappings."""
    found: dict[str, Any] = {}
    for path, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        inner = found
        *parents, key = path.split(".") if path.partition(".")[0] in framework.nested else [path]
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                inner[parent] = {}
            inner = inner[parent] = dict(inner[parent])
        inner[key] = value
    return found


@given(configs())
def test_any_config_is_read_or_refused(config: tuple[Framework, dict[str, Any]]) -> None:
    framework, values = config
    if framework.name == "accelerate":
        values = {"distributed_type": "DEEPSPEED"} | values
    try:
        reading = interpret(values, framework, asked={"model": "gpt2"})
    except UsageError:
        return
    assert set(reading.options) == set(reading.sources) - {"model"}
    json.dumps(reading.to_dict())


# ---------------------------------------------------------------------------------------------------------- the command


def test_check_prints_what_was_read_and_then_the_plan(run: Any) -> None:
    file = shlex.quote(str(DATA / "llamafactory_lora.yaml"))
    code, out, _ = run(f"check {file} --gpu h200")
    _, planned, _ = run(
        "plan qwen3-4b --method lora --rank 8 --batch-size 2 --seq-len 1024 --padded --gradient-accumulation-steps 8 "
        "--examples 5000 --gpu h200"
    )
    assert code == 0
    before, _, after = out.partition("\nqwen3-4b, LoRA")
    assert f"qwen3-4b, LoRA{after}" == planned
    assert "rank                         8                  default of lora_rank" in before
    assert all(len(line) <= 80 or "/" in line for line in out.splitlines())


def test_check_as_json(run: Any) -> None:
    file = shlex.quote(str(DATA / "trl_bare.yaml"))
    code, out, _ = run(f"check {file} --json --batch-size 1")
    answer = json.loads(out)
    assert code == 0
    assert answer["read"]["framework"] == "trl"
    assert answer["read"]["options"]["weights_dtype"] == {"value": "fp32", "from": "default of dtype"}
    assert answer["read"]["options"]["batch_size"] == {"value": "1", "from": "the command line"}
    assert answer["options"]["weights_dtype"] == "fp32"
    assert answer["memory"]["components"]


def test_check_that_does_not_fit_and_check_that_is_refused(run: Any, tmp_path: Path) -> None:
    assert run(f"check {shlex.quote(str(DATA / 'trl_bare.yaml'))} --gpu 4GiB")[0] == 1
    file = tmp_path / "ds.yml"
    file.write_text("base_model: gpt2\ndeepspeed: z.json\nrl: dpo\nflash_attention: true\n")
    code, out, err = run(f"check {file}")
    assert (code, out) == (2, "")
    assert "deepspeed cannot be planned: how it shares a run among GPUs is not read" in err
    assert "leave it out by --ignore deepspeed (so it is with rl)" in err
    assert run(f"check {file} --ignore deepspeed --ignore rl")[0] == 0
    assert run("check")[0] == 2


def test_the_command_that_check_names_is_the_same_plan(run: Any) -> None:
    _, out, _ = run(f"check {shlex.quote(str(DATA / 'train.py'))} --json")
    _, text, _ = run(f"check {shlex.quote(str(DATA / 'train.py'))}")
    line = " ".join(text.partition("probe and trace\n")[2].partition("\n\n")[0].split())
    assert line.startswith("vramplan google/gemma-2-2b --method lora")
    _, again, _ = run(f"{line.removeprefix('vramplan ')} --json")
    assert json.loads(again)["memory"] == json.loads(out)["memory"]


def test_check_keeps_to_its_width_and_to_what_matters(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    below = {"zero_stage": 3, "gradient_accumulation_steps": 16} | {f"k{i}": i for i in range(25)}
    accelerate = {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": below}
    Path("a.yml").write_text(json.dumps(accelerate))
    Path("train.py").write_text((DATA / "train.py").read_text())
    code, out, _ = run("check train.py a.yml --optimizer adamw_torch_fused --seq-len 64")
    before = out.partition("Without an effect")[0]
    assert code == 0
    assert all(len(line) <= 80 for line in before.splitlines())
    assert "16                 deepspeed_config.\n" in before
    assert f"\n{' ' * 48}gradient_accumulation_steps\n" in before
    assert before.count("is no key of") == 20
    assert "and 5 more unknown keys, which are left out" in before
    assert "reshard_after_forward" not in out


# --------------------------------------------------------------------------------------------------------- the document

DOCUMENT = Path(__file__).parent.parent / "docs" / "configs.md"


def tables() -> str:
    """Every framework's rows: which keys make which option, what fixes the others, what is refused and what is said."""
    parts = []
    for framework in FRAMEWORKS.values():
        parts += [f"### {framework.title}", "", "| option | keys, and what they are where left out |", "|---|---|"]
        parts.append(f"| model | {code(framework.model) or 'no key: `--model`'} |")
        parts += [f"| {option} | {code(rule.keys, framework.defaults)} |" for option, rule in framework.rules.items()]
        parts += [f"| {option} | always {value}: {why} |" for option, (value, why) in framework.fixed.items()]
        said: dict[str, list[str]] = {}
        for each in framework.remarks:
            refused = "Refused with some values" if each.when else "Refused where they are switched on"
            said.setdefault(refused if each.refused else "Said where they are planned otherwise", []).extend(each.keys)
        for how in sorted(said):
            parts += ["", f"{how}: {code(dict.fromkeys(said[how]))}."]
        parts.append("")
    return "\n".join(parts).rstrip()


def code(keys: Any, defaults: Any = ()) -> str:
    return ", ".join(f"`{key}` ({defaults[key]})" if key in defaults else f"`{key}`" for key in keys)


def written(text: str) -> str:
    before, _, rest = text.partition("<!-- keys -->\n")
    return f"{before}<!-- keys -->\n{tables()}\n<!-- /keys -->{rest.partition('<!-- /keys -->')[2]}"


def test_the_document_has_the_tables_of_today() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert text == written(text), "python tests/test_configs.py writes them anew"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), "utf-8")
