"""A script as people write them: nothing in it is run."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

BASE = "google/gemma-2-2b"

model = AutoModelForCausalLM.from_pretrained(BASE, torch_dtype=torch.bfloat16, attn_implementation="eager")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
args = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    bf16=True,
    optim="adafactor",
)
trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}])
trainer.train()
