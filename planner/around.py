"""What surrounds the layers: embedding, rotary tables and masks, the head, the loss.

Sources: transformers/models/*/modeling_*.py, transformers/masking_utils.py, transformers/loss/loss_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner import blocks, ops, paper
from vramplan.planner.paper import Node, Tensor

if TYPE_CHECKING:
    from vramplan.planner.blocks import Held, Settings, Shared
    from vramplan.planner.layers import Architecture, Attention
    from vramplan.planner.paper import Parameter, Tape


def embed(tape: Tape, architecture: Architecture, held: Held, s: Settings) -> tuple[Tensor, list[Tensor]]:
    """Token embedding, positions, projection and norm of embeddings, as the model's class runs them.

    Returns layer 0's input and what the model's forward keeps in locals until it returns: the embeddings themselves.
    """
    kept: list[Tensor] = []
    b, t = s.batch, s.seq
    hidden: Tensor | None = None
    for module in architecture.embeddings:
        if module.kind == "embedding":
            weight = held.others[module.name]["weight"]
            looked_up = embedding(tape, weight, (b, t), module.role == "token_embedding")
            kept.append(looked_up)
            if hidden is None:
                hidden = looked_up
                inside = architecture.model_type in SCALED_EMBEDDING
                if architecture.embedding_scale and inside:
                    hidden = ops.scale(tape, hidden, "embeddings, scaled")
                if s.checkpointing:
                    hidden = leaf(hidden)
                if architecture.embedding_scale and not inside:
                    hidden = ops.scale(tape, hidden, "embeddings, scaled")
            else:
                hidden = ops.add(tape, hidden, looked_up, "embeddings with positions")
            del looked_up
        elif module.kind == "norm":
            assert hidden is not None
            hidden = blocks.norm(tape, hidden, held.norms[module.name])
        else:
            assert hidden is not None
            hidden = blocks.project(tape, hidden, held.projections[module.name], s)
    assert hidden is not None
    hidden = ops.dropout(tape, hidden, architecture.embedding_dropout)
    if architecture.embedding_scale or architecture.model_type in REBOUND_EMBEDDING:
        kept = [hidden]
    return hidden, kept


# Families that give the dropped embeddings the name of the embeddings.
REBOUND_EMBEDDING = frozenset({"phi"})
# Families whose embedding module scales (a subclass of nn.Embedding); elsewhere the model does so afterwards.
SCALED_EMBEDDING = frozenset({"gemma", "gemma2", "gemma3_text"})


def leaf(x: Tensor) -> Tensor:
    """`x.requires_grad_(True)`, as enable_input_require_grads hooks onto the embedding: its gradient is kept.

    transformers' gradient_checkpointing_enable does so for every model that takes input_ids. The leaf and its gradient
    go with the graph, when the loss goes.
    """
    if x.node is None:
        kept: list[Tensor | None] = [x.detach()]

        def accumulate(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
            kept.append(grads[0])
            return []

        x.node = Node(paper.ACCUMULATE, [], accumulate, [])
    return x


def embedding(tape: Tape, weight: Parameter, rows: tuple[int, int], tokens: bool) -> Tensor:
    """`F.embedding`: rows of the weight; its gradient is a dense tensor of the weight's size."""
    size = weight.shape[1]
    shape, dtype = weight.shape, weight.dtype
    count = rows[0] * rows[1] if tokens else rows[1]

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        # embedding_dense_backward (aten/src/ATen/native/cuda/Embedding.cu): up to 3,072 indices go without sorting
        grad = tape.new(shape, dtype, "gradient of an embedding")
        if count > 3072:
            tape.moment(8 * count, "sorted indices")
        return [grad]

    node = tape.node((weight,), backward)
    return ops.done(tape.new((rows[0] if tokens else 1, rows[1], size), dtype, "embeddings"), node)


def prepare(tape: Tape, architecture: Architecture, s: Settings, dtype: str) -> Shared:
    """Masks and rotary tables, in the order in which most models' forward makes them."""
    shared = blocks.Shared()
    kinds = {blocks.layer_type(layer.attention): layer.attention for layer in architecture.kinds}
    for kind in sorted(kinds):
        tape.scope = "masks"
        mask = causal_mask(tape, s, kinds[kind].sliding_window, dtype, architecture.model_type in ALWAYS_MASKED)
        if mask is not None:
            shared.masks[kind] = mask
    if architecture.model_type == "qwen2_moe" and "sliding_attention" not in kinds:
        # its sliding mask is made even where no layer slides: config.sliding_window is 0, which no length is below
        mask = causal_mask(tape, s, 0, dtype, False)
        if mask is not None:
            shared.masks["sliding_attention"] = mask
    rotated = {blocks.layer_type(x.attention): x.attention for x in architecture.kinds if x.attention.rotary_dim}
    tape.scope = "rotary_emb"
    tables = None
    for kind in sorted(rotated):
        if tables is None or architecture.model_type in TABLES_BY_TYPE:
            tables = rotary_tables(tape, rotated[kind], s, dtype)
        shared.tables[kind] = tables
    return shared


# Families whose model keeps the last layer's output in a tuple while it goes on with a normalised one.
KEEPS_LAST_HIDDEN = frozenset({"falcon"})
# Families whose forward makes masks by layer type from a dict of arguments, which holds the embeddings too.
KEEPS_MASK_ARGUMENTS = frozenset(
    {"cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "granitemoehybrid", "ministral", "olmo3", "qwen2"}
    | {"qwen2_moe", "qwen3", "smollm3"}
)
# Families that ask for the mask whatever it says (allow_is_causal_skip=False).
ALWAYS_MASKED = frozenset({"bloom", "falcon"})
# Families whose sliding layers have rotary tables of their own (rope_parameters by layer type).
TABLES_BY_TYPE = frozenset({"gemma3_text", "olmo3"})


def causal_mask(tape: Tape, s: Settings, window: int | None, dtype: str, always: bool) -> Tensor | None:
    """masking_utils.py: sdpa's boolean mask [B, 1, T, T], left out where is_causal says it all; eager's, in `dtype`."""
    b, t = s.batch, s.seq
    if s.kernel == "flash_attention_2":
        return None
    eager = s.kernel == "eager"
    if not (eager or s.masked or always or (window is not None and t >= window)):  # _ignore_causal_mask_sdpa
        return None
    square = (1, 1, t, t)
    if window is None:
        mask = _and(tape, None, square)
    else:  # sliding_window_causal_mask_function, within the outer and_masks
        mask = _and(tape, None, square)
        mask = _and(tape, mask, square)
        mask = tape.new(square, "bool", "mask")
    padded = tape.new((b, 1, t, t), "bool", "mask")
    mask = padded
    del padded
    if eager:
        mask = tape.new((b, 1, t, t), dtype, "mask, added to scores")
    return mask


def _and(tape: Tape, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """`result & mask_function(...)` of and_masks."""
    term = tape.new(shape, "bool", "term of a mask")
    out = tape.new(shape, "bool", "mask")
    del term, mask
    return out


def rotary_tables(tape: Tape, a: Attention, s: Settings, dtype: str) -> tuple[Tensor, Tensor]:
    """cos and sin for every position: angles, doubled, in float32, then cast to the embeddings' dtype."""
    dim = a.rotary_dim // 2 if a.rope == "gpt_oss" else a.rotary_dim
    if a.rope in ("olmo", "ernie4_5"):
        dtype = "fp32"
    if a.rope == "deepseek_v2":  # torch.polar: complex numbers of 8 bytes, scaled
        angles = tape.new((1, s.seq, dim // 2), "fp32", "rotary angles")
        ones = tape.new((1, s.seq, dim // 2), "fp32", "ones")
        turns = tape.new((1, s.seq, dim), "fp32", "rotary table, complex")
        del ones
        turns = ops.scale(tape, turns, "rotary table, complex")
        del angles
        return turns, turns
    angles = tape.new((1, s.seq, dim // 2), "fp32", "rotary angles")
    doubled = tape.new((1, s.seq, dim), "fp32", "rotary angles, doubled")
    cos = ops.scale(tape, tape.new((1, s.seq, dim), "fp32", "cosines"), "cosines, scaled")
    sin = ops.scale(tape, tape.new((1, s.seq, dim), "fp32", "sines"), "sines, scaled")
    tables = ops.to(tape, cos, dtype, "rotary table"), ops.to(tape, sin, dtype, "rotary table")
    del angles, doubled, cos, sin
    return tables


def head(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held) -> Tensor:
    """The output projection: logits in the hidden states' (or autocast's) dtype."""
    weight = head_weight(architecture, held)
    name = architecture.output.name
    bias = held.projections[name].bias if name in held.projections else None
    logits = ops.linear(tape, hidden, weight, architecture.vocab_size, bias, "logits")
    if architecture.logit_scale:
        logits = ops.scale(tape, logits, "logits, scaled")
    if architecture.final_logit_softcapping is not None:
        logits = ops.scale(tape, logits, "logits, divided by the cap")
        logits = ops.unary(tape, logits, "tanh", saves="result")
        logits = ops.scale(tape, logits, "logits, capped")
    return logits


def head_weight(architecture: Architecture, held: Held) -> Parameter:
    """The head's matrix: its own, or the token embedding's."""
    if architecture.output.name in held.projections:
        return held.projections[architecture.output.name].weight
    name = next(m.name for m in architecture.embeddings if m.role == "token_embedding")
    return held.others[name]["weight"]


def causal_lm_loss(tape: Tape, logits: Tensor, rows: int, vocab: int) -> tuple[Tensor, Node | None]:
    """transformers' ForCausalLMLoss: a float32 copy of the logits, log-softmax, negative log-likelihood."""
    tape.scope = "loss"
    wide = ops.to(tape, logits, "fp32", "logits, float32")
    labels = tape.new((rows + 1,), "int64", "labels, padded")
    shape = (rows, vocab)

    def softmax_backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        return [tape.new(shape, "fp32", "gradient of the logits, float32")]

    def loss_backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        return [tape.new(shape, "fp32", "gradient of log-probabilities")]

    log_probs = tape.new(shape, "fp32", "log-probabilities")
    ops.done(log_probs, tape.node((wide,), softmax_backward, (log_probs,)))
    node = tape.node((log_probs,), loss_backward, (log_probs, labels))
    loss = Tensor(None, (), "fp32", node)
    del labels
    return loss, node


class Outputs(NamedTuple):
    """What the model returns to transformers.Trainer: its logits, and the node of its loss."""

    logits: Tensor
    loss: Node | None


def head_and_loss(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held) -> Outputs:
    """What a model for causal language modelling does with its last hidden states."""
    logits = head(tape, architecture, hidden, held)
    vocab = architecture.vocab_size
    _, node = causal_lm_loss(tape, logits, logits.numel // vocab, vocab)
    return Outputs(logits, node)


def loss(tape: Tape, outputs: list[Outputs]) -> Node | None:
    """What becomes of the outputs once autocast has ended: accelerate makes them float32, and they go.

    accelerate/utils/operations.py, convert_to_fp32; transformers/trainer.py, compute_loss.
    """
    logits, node = outputs.pop()
    if tape.autocast is not None:
        tape.scope = "outputs"
        wide = ops.to(tape, logits.detach(), "fp32", "logits, float32 copy of the outputs")
        del logits
        del wide
    return node
