"""Whose training loop runs a step: what differs between transformers.Trainer and trl's SFTTrainer, by name.

A trainer says which tensors make a batch, what the model does between the last layer and the loss, what becomes of the
outputs once autocast has ended, and in which dtype an adapter on a quantised base is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vramplan.planner import around, trl

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.planner.paper import Tape, Tensor
    from vramplan.planner.training import TrainingOptions


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a training loop brings of its own.

    `forward(tape, architecture, hidden, held, s)` plays the head and whatever of the loss the model computes;
    `loss(tape, outputs)` the rest, on a list that holds the outputs alone and that it empties, and returns
    the loss that backward starts from; `evaluated` is the same where an evaluation keeps nothing but the loss.
    `first_products` are labels of what autograd's first matrix product makes, or of what is made right after it (not
    `product_made`): its thread takes a workspace there. `sources` says what rows of the breakdown stand on, where that
    differs.
    """

    batch: tuple[str, ...]
    forward: Callable[..., Any]
    loss: Callable[[Tape, list[Any]], Tensor]
    evaluated: Callable[[Tape, list[Any]], Tensor]
    quantised_adapter: str = "fp32"
    first_products: tuple[str, ...] = ("gradient of an input", "gradient of a weight")
    product_made: bool = True
    sources: dict[str, str] = field(default_factory=dict)

    def adapter_dtype(self, method: str) -> str:
        """The dtype in which an adapter is trained."""
        return self.quantised_adapter if method == "qlora" else "fp32"


TRANSFORMERS = Trainer(
    batch=("input_ids", "attention_mask", "labels"),
    forward=around.head_and_loss,
    loss=around.loss,
    evaluated=around.evaluated,
)
TRL = Trainer(
    batch=trl.BATCH,
    forward=trl.forward,
    loss=trl.loss,
    evaluated=trl.loss,
    quantised_adapter="bf16",
    first_products=trl.AFTER_A_PRODUCT,
    product_made=False,
    sources={
        "adapter": "trl, sft_trainer.py: PEFT's A and B, bf16 on a quantised base, else float32",
        "logits and loss": "trl, kernels/chunked_logprob.py: 4,096 positions x 32,768 words at a time",
        "batch": "SFTTrainer's inputs: token ids, labels and mask, int64",
    },
)
TRAINERS = {"transformers": TRANSFORMERS, "trl": TRL}


def adapter_dtype(options: TrainingOptions) -> str:
    """The dtype in which an adapter is held once the run is set up, and so saved.

    DeepSpeed casts it with the model, but for ZeRO 3's, which is partitioned as it is made, unless the base is in 4 bit
    (deepspeed/runtime/engine.py, _configure_distributed_model).
    """
    third = options.parallel == "zero3" and options.method == "lora"
    if options.parallel.startswith("zero") and options.mixed_precision != "no" and not third:
        return options.mixed_precision
    return TRAINERS[options.trainer].adapter_dtype(options.method)
