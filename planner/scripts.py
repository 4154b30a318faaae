"""A training script of a plan: transformers' Trainer or trl's SFTTrainer, with the plan's options written out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PLACEHOLDER = "PUT/YOUR-DATASET-HERE"

_DATA = '''

def rows(tokenizer):
    """Rows of at most SEQ_LEN tokens: one text each where PADDED, else texts joined and cut."""
    data = load_dataset(DATASET, split="train")

    def tokens(batch):
        return [[*text, tokenizer.eos_token_id] for text in tokenizer(batch[TEXT])["input_ids"]]

    def one_text_a_row(batch):
        return {"input_ids": [text[:SEQ_LEN] for text in tokens(batch)]}

    def joined_and_cut(batch):
        ids = [token for text in tokens(batch) for token in text]
        return {"input_ids": [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

    tokenize = one_text_a_row if PADDED else joined_and_cut
    return data.map(tokenize, batched=True, remove_columns=data.column_names)

'''
_QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_NON_REENTRANT = ("gradient_checkpointing_kwargs", {"use_reentrant": False})
_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "optim",
    "learning_rate",
    "bf16",
    "fp16",
    "gradient_checkpointing",
)


def script(keys: Mapping[str, Any], dataset: str | None) -> str:
    """The script that calls transformers, PEFT and trl with `keys`, named as `documents` reads them."""
    trl, lora, quantised = "max_length" in keys, "LoraConfig()" in keys, "load_in_4bit" in keys
    prepared = keys["prepare_model_for_kbit_training"]
    checkpointing = keys["gradient_checkpointing"]
    lines = [*_imports(keys, trl, lora, quantised, prepared), ""]
    lines += [
        f"MODEL = {_text(keys['MODEL'])}",
        f"DATASET = {_text(dataset or PLACEHOLDER)}  # of the Hub, or a folder of files that load_dataset reads",
        'TEXT = "text"  # its column',
        f"SEQ_LEN = {keys['SEQ_LEN']}",
        f"PADDED = {keys['PADDED']}",
        _DATA,
        "def main():",
        "    tokenizer = AutoTokenizer.from_pretrained(MODEL)",
        "    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
    ]
    arguments = [(key, keys[key]) for key in _ARGUMENTS]
    if checkpointing:
        arguments.append(_NON_REENTRANT)
    arguments += [("report_to", []), ("output_dir", "out")]
    length = ["max_length=SEQ_LEN"] if trl else []
    lines.append(
        "    # before the model: they choose this process's GPU, and let ZeRO 3 shard the model while it loads"
    )
    lines += _call(f"arguments = {'SFTConfig' if trl else 'TrainingArguments'}", arguments, *length)
    if quantised:
        # FSDP and ZeRO 3 shard 4-bit weights that are stored in the dtype they compute in; on one it is the same
        dtypes = [
            f"bnb_4bit_{which}=torch.{keys['bnb_4bit_quant_storage']}" for which in ("compute_dtype", "quant_storage")
        ]
        lines += _call("quantisation = BitsAndBytesConfig", [(key, keys[key]) for key in _QUANTISATION], *dtypes)
    lines += _call(
        "model = AutoModelForCausalLM.from_pretrained",
        [("attn_implementation", keys["attn_implementation"])],
        "MODEL",
        f"dtype=torch.{keys['dtype']}",
        *(["quantization_config=quantisation"] if quantised else []),
    )
    if prepared:
        lines += _call(
            "model = prepare_model_for_kbit_training",
            [("use_gradient_checkpointing", checkpointing), _NON_REENTRANT],
            "model",
        )
    if lora:
        adapter = [(key, keys[key]) for key in ("r", "lora_alpha", "lora_dropout", "target_modules")]
        lines += _call("adapter = LoraConfig", [*adapter, ("task_type", "CAUSAL_LM")])
        if not trl:
            lines.append("    model = get_peft_model(model, adapter)")
            if checkpointing and not quantised:
                lines.append("    model.enable_input_require_grads()  # else nothing below a checkpoint has a gradient")
    if trl:
        given = ["processing_class=tokenizer", *(["peft_config=adapter"] if lora else [])]
    else:
        given = ["data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)"]
    trainer = "SFTTrainer" if trl else "Trainer"
    lines += _call(f"trainer = {trainer}", [], "model=model", "args=arguments", "train_dataset=rows(tokenizer)", *given)
    lines += ["    trainer.train()", "    trainer.save_model()", "", "", 'if __name__ == "__main__":', "    main()", ""]
    return "\n".join(lines)


def _imports(keys: Mapping[str, Any], trl: bool, lora: bool, quantised: bool, prepared: bool) -> list[str]:
    allocator = keys.get("PYTORCH_ALLOC_CONF")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before
    before = ["import os", "", *(f'os.environ.setdefault("{name}", "{allocator}")' for name in names), ""]
    peft = ["LoraConfig" * lora, "get_peft_model" * (lora and not trl), "prepare_model_for_kbit_training" * prepared]
    transformers = [
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "BitsAndBytesConfig" * quantised,
        *([] if trl else ["DataCollatorForLanguageModeling", "Trainer", "TrainingArguments"]),
    ]
    return [
        *(before if allocator else []),
        "import torch",
        "from datasets import load_dataset",
        *_from("peft", peft),
        *_from("transformers", transformers),
        *(_from("trl", ["SFTConfig", "SFTTrainer"]) if trl else []),
    ]


def _from(package: str, names: Iterable[str]) -> list[str]:
    wanted = [name for name in names if name]
    line = f"from {package} import {', '.join(wanted)}"
    if len(line) > 100:
        return [f"from {package} import (", *(f"    {name}," for name in wanted), ")"]
    return [line] if wanted else []


def _call(name: str, arguments: Iterable[tuple[str, Any]], *first: str) -> list[str]:
    """A call over several lines, one argument each."""
    said = [*first, *(f"{key}={_text(value)}" for key, value in arguments)]
    return [f"    {name}(", *(f"        {each}," for each in said), "    )"]


def _text(value: Any) -> str:
    """A value as Python says it, its strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if value.isprintable() else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(each)}" for key, each in value.items()) + "}"
    return repr(value)
