"""trl's SFTTrainer: the head and the loss in tiles, so that the logits of a whole batch never exist.

`SFTTrainer` gives the model a fused head: of the positions that have a label to predict, 4,096 at a time meet 32,768
rows of the head's matrix, and a Triton kernel folds each tile of logits into running sums. Backward makes each tile
again, turns it into its gradient in place, and adds up the gradients of hidden states and head in float32.

Everything is played as if all positions but each row's last were scored: padding and prompts that the loss leaves out
make it less, by what the batch holds of them.

Sources (trl 1.16): trl/trainer/utils.py (add_fused_lm_head, FusedCausalLMOutput), trl/kernels/chunked_logprob.py
(ChunkedLogProbFunction), trl/trainer/sft_trainer.py (compute_loss); aten/src/ATen/native/cuda/Indexing.cu (index_put_).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner import ops
from vramplan.planner.paper import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.layers import Architecture
    from vramplan.planner.paper import Parameter, Tape

TOKENS = 4096  # of one tile (chunked_logprob.py, TOKEN_CHUNK_SIZE)
VOCABULARY = 32768  # of one tile (utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)
STATISTICS = 7  # running sums that the kernel is given, whatever is asked of it

TILE = "tile of logits"
ROWS = "hidden states, cast for a tile"
FIRST_HEAD, NEXT_HEAD = "rows of the head, cast for a tile", "next rows of the head, cast for a tile"
BIAS = "bias, cast for a tile"
GRADIENTS = (
    "gradient of scored hidden states, float32",
    "gradient of the head, float32",
    "gradient of its bias, float32",
)
TILES = frozenset((TILE, ROWS, FIRST_HEAD, NEXT_HEAD, BIAS, *GRADIENTS))
# What is made after autograd's first product, when cuBLAS has its workspace.
AFTER_A_PRODUCT = (NEXT_HEAD, "gradient of scored hidden states", "gradient of a weight", "gradient of a selection")

# The order in which DataCollatorForLanguageModeling builds its dictionary.
BATCH = ("input_ids", "labels", "attention_mask")


class Scored(NamedTuple):
    """What the model returns (FusedCausalLMOutput): [B, T - 1] each."""

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    mask: Tensor


def forward(
    tape: Tape, architecture: Architecture, hidden: Tensor, held: Held, _: Settings, scored: int | None = None
) -> Scored:
    """The fused head on hidden states [B, T, H]; `scored` positions have a label, or all but the last of each row."""
    b, t, h = hidden.shape
    shape = (b, t - 1)
    n = b * (t - 1) if scored is None else scored
    shifted = ops.part(tape, hidden, (*shape, h))
    mask = tape.new(shape, "bool", "mask of scored positions")
    rows = _select(tape, shifted, mask, n, "hidden states, scored")
    targets = _select(tape, Tensor(None, shape, "int64"), mask, n, "labels, scored")
    head = held.projections[architecture.output.name]
    found = _log_probabilities(tape, rows, head.weight, head.bias, targets)
    del rows, targets
    log_probs, entropy, is_top1 = (_scatter(tape, x, mask) for x in found)
    del found
    tape.moment(8 * mask.numel, "mask, counted")
    return Scored(log_probs, entropy, is_top1, mask)


def loss(tape: Tape, outputs: list[Scored]) -> Tensor:
    """compute_loss, outside autocast: the loss, and the sums that its metrics are made of. Empties `outputs`."""
    out = outputs.pop()
    numel, shape = out.mask.numel, out.mask.shape
    negated = tape.new(shape, "fp32", "loss of each position")
    node = tape.node((out.log_probs,), lambda _, __: [tape.new(shape, "fp32", "gradient of log-probabilities")])
    loss = ops.done(tape.new((), "fp32", "loss"), node)
    for _ in range(2):
        tape.moment(8 * numel, "mask, counted")
    del out
    del negated
    return loss


# --- positions ----------------------------------------------------------------------------------------------------


def _select(tape: Tape, x: Tensor, mask: Tensor, n: int, label: str) -> Tensor:
    """`x[mask]`, the `n` rows that the mask names; their gradient goes back by an index_put_ that sorts."""
    whole, dtype = x.shape, x.dtype

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grad = tape.new(whole, dtype, "gradient of a selection")
        indices = tape.new((n, 2), "int64", "indices of scored positions")
        linear = [tape.new((n,), "int64", "linear indices") for _ in range(2)]
        linear.reverse()
        linear.pop()
        tape.moment(16 * n, "linear indices")
        del indices
        order = [tape.new((n,), "int64", "sorted indices") for _ in range(3)]
        while order:
            order.pop()
        return [grad]

    node = tape.node((x,), backward, (mask,))
    indices = tape.new((n, 2), "int64", "indices of scored positions")
    out = tape.new((n, *whole[2:]), dtype, label)
    del indices
    return ops.done(out, node)


def _scatter(tape: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x.new_zeros(mask.shape).masked_scatter(mask, x)`: the scored positions among zeros."""
    shape, dtype, n = mask.shape, x.dtype, x.numel

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        indices = tape.new((n, 2), "int64", "indices of scored positions")
        grad = tape.new((n,), dtype, "gradient of log-probabilities, scored")
        del indices
        return [grad]

    zeros = tape.new(shape, dtype, "zeros")
    node = tape.node((x,), backward, (mask,))
    out = ops.done(tape.new(shape, dtype, "outputs of each position"), node)
    tape.moment(8 * mask.numel, "running count of the mask")
    del zeros
    return out


# --- the head in tiles --------------------------------------------------------------------------------------------


def _log_probabilities(
    tape: Tape, hidden: Tensor, weight: Parameter, bias: Parameter | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ChunkedLogProbFunction on rows [N, H] and a head [V, H]: log-probabilities, entropy, whether a label is top."""
    n = hidden.numel // hidden.shape[-1]
    compute = tape.autocast or hidden.dtype
    statistics = [tape.new((n,), "fp32", "running sums of the loss") for _ in range(STATISTICS)]
    logits = tape.new((min(n, TOKENS), VOCABULARY), compute, TILE)
    rows: Tensor | None = None
    for tokens in _tiles(n, TOKENS):
        rows = _as(tape, (tokens, hidden.shape[-1]), hidden.dtype, compute, ROWS)
        for columns in _tiles(weight.shape[0], VOCABULARY):
            _as(tape, (columns, weight.shape[1]), weight.dtype, compute, FIRST_HEAD)
            if bias is not None:
                _as(tape, (columns,), bias.dtype, compute, BIAS)
    tape.moment(4 * n, "logarithm")
    log_z = tape.new((n,), "fp32", "log of the sum")
    log_probs = tape.new((n,), "fp32", "log-probabilities, scored")
    mean = tape.new((n,), "fp32", "mean logit")
    entropy = tape.new((n,), "fp32", "entropy")
    del mean
    at_least, above = (tape.new((n,), "bool", "comparison") for _ in range(2))
    is_top1 = tape.new((n,), "bool", "whether the label is top")
    del at_least, above
    while statistics:
        statistics.pop(0)
    del rows
    del logits
    bias_tensor = None if bias is None else bias.tensor()
    node = tape.node(
        (hidden, weight.tensor(), bias_tensor),
        _backward(tape, hidden, weight, bias, compute),
        (hidden, targets, log_z, entropy),
    )
    return ops.done(log_probs, node), entropy, is_top1


def _backward(
    tape: Tape, hidden: Tensor, weight: Parameter, bias: Parameter | None, compute: str
) -> Callable[[ops.Grads, ops.Grads], ops.Grads]:
    """Each tile of logits is made again and becomes its gradient, which two products add to float32 sums."""
    shape, dtype, needs_hidden = hidden.shape, hidden.dtype, hidden.node is not None
    n, h = shape

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        into_hidden = tape.new(shape, "fp32", GRADIENTS[0]) if needs_hidden else None
        into_weight = tape.new(weight.shape, "fp32", GRADIENTS[1]) if weight.requires_grad else None
        into_bias = None
        if bias is not None and bias.requires_grad:
            into_bias = tape.new(bias.shape, "fp32", GRADIENTS[2])
        logits = tape.new((min(n, TOKENS), VOCABULARY), compute, TILE)
        rows = part = None
        label = FIRST_HEAD
        for tokens in _tiles(n, TOKENS):
            rows = _as(tape, (tokens, h), dtype, compute, ROWS)
            for columns in _tiles(weight.shape[0], VOCABULARY):
                part = _as(tape, (columns, h), weight.dtype, compute, label)
                label = NEXT_HEAD
                if bias is not None:
                    _as(tape, (columns,), bias.dtype, compute, BIAS)
                    tape.moment(4 * columns if into_bias is not None else 0, "sum over a tile")
        grads = [
            None if g is None else ops.to(tape, g, to, f"gradient of {what}")
            for g, to, what in (
                (into_hidden, dtype, "scored hidden states"),
                (into_weight, weight.dtype, "a weight"),
                (into_bias, "fp32" if bias is None else bias.dtype, "a bias"),
            )
        ]
        del into_hidden
        del into_weight
        del into_bias
        del rows
        del part
        del logits
        return grads

    return backward


def _tiles(n: int, size: int) -> Iterator[int]:
    """The lengths of the pieces that `n` falls into."""
    for start in range(0, n, size):
        yield min(size, n - start)


def _as(tape: Tape, shape: tuple[int, ...], dtype: str, to: str, label: str) -> Tensor | None:
    """`x[start:end].to(dtype)`: nothing new where it has that dtype."""
    return None if dtype == to else tape.new(shape, to, label)
