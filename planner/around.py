"""What surrounds the layers: embedding, rotary tables and masks, the head, the loss.

Sources: transformers/models/*/modeling_*.py, transformers/masking_utils.py, transformers/loss/loss_utils.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner import blocks, cache, ops, paper
from vramplan.planner.paper import Node, Tensor
from vramplan.planner.versions import GPTJ_BY_LAYER

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
    inside = architecture.embedding_scale and architecture.model_type in SCALED_EMBEDDING
    for module in architecture.embeddings:
        if module.kind == "embedding":
            weight, adapter = held.others[module.name]["weight"], held.factors.get(module.name)
            tokens = module.role == "token_embedding"
            each_row = tokens or s.mode == "generation"
            each_row |= s.mode == "evaluation" and architecture.model_type == "opt"  # whose positions are the mask's
            looked_up = embedding(tape, weight, (b, t), each_row)
            if tokens and inside:
                looked_up = ops.scale(tape, looked_up, "embeddings, scaled")
            # the hook of k-bit preparation comes before the adapter, the Trainer's after it
            if tokens and s.checkpointing and (adapter is None or (s.method == "qlora" and s.prepare_kbit)):
                looked_up = leaf(tape, looked_up)
            if adapter is not None:
                looked_up = with_adapter(tape, looked_up, *adapter, scaled=tokens and inside)
            if tokens:
                tape.marks["embedded"] = len(tape.events)
            kept.append(looked_up)
            if hidden is None:
                hidden = looked_up
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


def leaf(tape: Tape, x: Tensor) -> Tensor:
    """`x.requires_grad_(True)`, as enable_input_require_grads hooks onto the embedding: its gradient is kept.

    transformers' gradient_checkpointing_enable does so for every model that takes input_ids. The leaf and its gradient
    go with the graph, when the loss goes. A gradient that another node waits for too is copied (accumulate_grad.h).
    """
    if x.node is None:
        kept: list[Tensor | None] = [x.detach()]

        def accumulate(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
            grad = grads[0]
            if grad is not None and grad.storage is not None and grad.storage.holders:
                grad = tape.new(grad.shape, grad.dtype, "gradient of embeddings, copied")
            kept.append(grad)
            return []

        x.node = Node(paper.ACCUMULATE, [], accumulate, [])
    return x


def embedding(tape: Tape, weight: Parameter, rows: tuple[int, int], tokens: bool) -> Tensor:
    """`F.embedding`: rows of the weight; its gradient is a dense tensor of the weight's size."""
    size = weight.shape[1]
    shape, dtype = weight.shape, weight.dtype
    count = rows[0] * rows[1] if tokens else rows[1]

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grad = tape.new(shape, dtype, "gradient of an embedding")
        _add_rows(tape, count, *shape)
        return [grad]

    node = tape.node((weight,), backward)
    return ops.done(tape.new((rows[0] if tokens else 1, rows[1], size), dtype, "embeddings"), node)


def _add_rows(tape: Tape, count: int, words: int, size: int) -> None:
    """What adding `count` rows up in a gradient [words, size] takes for a moment.

    aten/src/ATen/native/cuda/Embedding.cu: up to 3,072 indices go without sorting. EmbeddingBackwardKernel.cu: beyond,
    ten rows at a time are summed in float32, in as many pieces as there might be.
    """
    if count > 3072:
        ids = [tape.new((count,), "int64", "indices, sorted") for _ in range(2)]
        tape.moment(4 * size * (count // 10 + min(count, words)), "rows added up by tens")
        del ids


def with_adapter(tape: Tape, embeds: Tensor, a: Parameter, b: Parameter, *, scaled: bool) -> Tensor:
    """peft.tuners.lora.layer.Embedding.forward: rows of A transposed, times B; `scaled` by the module's embed_scale.

    The gradient of A comes transposed, and a parameter's first gradient is laid out as the parameter: it is copied
    (torch/csrc/autograd/functions/accumulate_grad.h, clone_obey_contract).
    """
    rank, words = a.shape
    *rows, size = embeds.shape
    count = embeds.numel // size

    def backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        grad = tape.new((words, rank), a.dtype, "gradient of an embedding")
        _add_rows(tape, count, words, rank)
        if a.grad is None:
            grad = tape.new(a.shape, a.dtype, "gradient of an embedding, transposed")
        return [grad]

    looked_up = ops.done(tape.new((*rows, rank), a.dtype, "adapter, rank r"), tape.node((a,), backward))
    output = ops.scale(tape, ops.linear(tape, looked_up, b.tensor(), size, label="adapter output"))
    if scaled:
        output = ops.scale(tape, output, "adapter output, scaled")
    result = ops.to(tape, ops.add(tape, embeds, output, "embeddings with adapter"), embeds.dtype)
    del output, looked_up
    return result


def prepare(tape: Tape, architecture: Architecture, s: Settings, dtype: str) -> Shared:
    """Masks and rotary tables, in the order in which most models' forward makes them."""
    shared = blocks.Shared()
    shared.positions = _positions(tape, architecture, s)
    kinds = {blocks.layer_type(layer.attention): layer.attention for layer in architecture.kinds}
    family = architecture.model_type
    if family in KEEPS_MASK_ARGUMENTS and "full_attention" not in kinds:
        # made whatever layer_types says, and held unread (models/ministral/modeling_ministral.py, causal_mask_mapping)
        kinds["full_attention"] = replace(architecture.kinds[0].attention, sliding_window=None)
    for kind in sorted(kinds):
        tape.scope = "masks"
        a = kinds[kind]
        if a.position == "alibi":
            shared.masks["alibi"] = _alibi(tape, a, s, family, dtype)
        mask = causal_mask(tape, s, a.sliding_window, dtype, family in ALWAYS_MASKED)
        if mask is not None and a.position == "alibi" and family == "falcon":
            # FalconModel.forward: alibi, scaled, with the least number where the mask hides; for every head
            if mask.dtype == "bool":
                mask = tape.new(mask.shape, dtype, "mask, added to scores")
            below = tape.new(mask.shape, "bool", "mask below -1")
            shared.masks[kind] = tape.new((s.batch, a.num_heads, s.seq, s.past + s.seq), dtype, "mask with alibi")
            del below, mask
        elif mask is not None and family == "mpt":
            shared.masks[kind] = tape.new(mask.shape, "bool", "mask")
            del mask
        elif mask is not None:
            shared.masks[kind] = mask
    if family == "qwen2_moe" and "sliding_attention" not in kinds:
        # its sliding mask is made even where no layer slides: config.sliding_window is 0, which no length is below
        mask = causal_mask(tape, s, 0, dtype, False)
        if mask is not None:
            shared.masks["sliding_attention"] = mask
    rotated = {blocks.layer_type(x.attention): x.attention for x in architecture.kinds if x.attention.rotary_dim}
    if architecture.kinds[0].family == GPTJ_BY_LAYER:
        rotated = {}
    elif family == "falcon" and not rotated:
        rotated = {"no layer": replace(a, rotary_dim=a.head_dim)}  # made beside alibi too
    tape.scope = "rotary_emb"
    tables = None
    for kind in sorted(rotated):
        if tables is None or family in TABLES_BY_TYPE:
            tables = rotary_tables(tape, rotated[kind], s, dtype)
        shared.tables[kind] = tables
    return shared


def _positions(tape: Tape, architecture: Architecture, s: Settings) -> Tensor | None:
    """position_ids [1, T], counted up and then shifted by what is cached; opt's come from the mask, for each row."""
    family = architecture.model_type
    if family in WITHOUT_POSITIONS or s.mode == "generation":  # generate() hands its own over
        return None
    tape.scope = ""
    shape = (s.batch if family == "opt" else 1, s.seq)
    counted = tape.new(shape, "int64", "positions")
    positions = tape.new(shape, "int64", "position_ids")
    del counted
    return positions


# Families whose layers tell positions by alibi alone.
WITHOUT_POSITIONS = frozenset({"bloom", "mpt"})
# Families whose model's forward keeps the position ids to itself.
KEEPS_POSITIONS = frozenset({"gpt_bigcode", "granitemoehybrid"})
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


def _alibi(tape: Tape, a: Attention, s: Settings, family: str, dtype: str) -> Tensor:
    """The positions' linear biases, [N, 1, T] for each row; mpt makes them for as many positions as it ever takes.

    bloom's have the dtype of the embeddings after their norm, which autocast makes float32.
    """
    if family == "mpt":
        return tape.new((1, a.num_heads, 1, a.positions), "fp32", "alibi")
    dtype = "fp32" if family == "bloom" and s.autocast else dtype
    return tape.new((s.batch, a.num_heads, 1, s.past + s.seq), dtype, "alibi")


def causal_mask(tape: Tape, s: Settings, window: int | None, dtype: str, always: bool) -> Tensor | None:
    """masking_utils.py: sdpa's boolean mask [B, 1, T, T], left out where is_causal says it all; eager's, in `dtype`."""
    b, t = s.batch, s.seq
    if s.kernel == "flash_attention_2":
        return None
    eager = s.kernel == "eager"
    keys = cache.mask_length(s.past, t, window)
    if not (eager or s.masked or always or (window is not None and keys >= window)):  # _ignore_causal_mask_sdpa
        return None
    square = (1, 1, t, keys)
    if window is None:
        mask = _and(tape, None, square)
    else:  # sliding_window_causal_mask_function, within the outer and_masks
        mask = _and(tape, None, square)
        mask = _and(tape, mask, square)
        mask = tape.new(square, "bool", "mask")
    padded = tape.new((b, 1, t, keys), "bool", "mask")
    mask = padded
    del padded
    if eager:
        mask = tape.new((b, 1, t, keys), dtype, "mask, added to scores")
    return mask


def _and(tape: Tape, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """`result & mask_function(...)` of and_masks."""
    term = tape.new(shape, "bool", "term of a mask")
    out = tape.new(shape, "bool", "mask")
    del term, mask
    return out


def rotary_tables(tape: Tape, a: Attention, s: Settings, dtype: str) -> tuple[Tensor, Tensor]:
    """cos and sin for every position: angles, doubled, in float32, then cast to the embeddings' dtype.

    gptj looks them up, side by side.
    """
    rows = s.batch if s.mode == "generation" else 1  # position_ids come for each row
    dim = a.rotary_dim // 2 if a.rope == "gpt_oss" else a.rotary_dim
    if a.rope == "gptj":
        both = tape.new((rows, s.seq, dim), "fp32", "sines and cosines")
        both = ops.to(tape, both, dtype, "sines and cosines, cast")
        return both, both
    if a.rope in ("olmo", "ernie4_5"):
        dtype = "fp32"
    if a.rope == "deepseek_v2":  # torch.polar: complex numbers of 8 bytes, scaled
        angles = tape.new((rows, s.seq, dim // 2), "fp32", "rotary angles")
        ones = tape.new((rows, s.seq, dim // 2), "fp32", "ones")
        turns = tape.new((rows, s.seq, dim), "fp32", "rotary table, complex")
        del ones
        turns = ops.scale(tape, turns, "rotary table, complex")
        del angles
        return turns, turns
    angles = tape.new((rows, s.seq, dim // 2), "fp32", "rotary angles")
    doubled = tape.new((rows, s.seq, dim), "fp32", "rotary angles, doubled")
    cos = ops.scale(tape, tape.new((rows, s.seq, dim), "fp32", "cosines"), "cosines, scaled")
    sin = ops.scale(tape, tape.new((rows, s.seq, dim), "fp32", "sines"), "sines, scaled")
    tables = ops.to(tape, cos, dtype, "rotary table"), ops.to(tape, sin, dtype, "rotary table")
    del angles, doubled, cos, sin
    return tables


def head(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held, s: Settings) -> Tensor:
    """The output projection: logits in the hidden states' (or autocast's) dtype."""
    if s.hooked:
        hidden = tape.boundary(hidden, "head")
    logits = blocks.project(tape, hidden, held.projections[architecture.output.name], s, "logits")
    if s.hooked:
        logits = tape.boundary(logits, "logits")
    if architecture.logit_scale:
        logits = ops.scale(tape, logits, "logits, scaled")
    if architecture.final_logit_softcapping is not None:
        logits = ops.scale(tape, logits, "logits, divided by the cap")
        logits = ops.unary(tape, logits, "tanh", saves="result")
        logits = ops.scale(tape, logits, "logits, capped")
    return logits


# What the loss makes beside the logits; everything made of those is labelled by their name.
LABELS, LOG_PROBABILITIES = "labels, padded", "log-probabilities"
LOSS_GRADIENTS = ("gradient of log-probabilities", "gradient of the logits, float32")


def of_logits(label: str) -> bool:
    """Whether a label is of the logits or of the loss."""
    return label.startswith(("logits", "loss")) or label in (LABELS, LOG_PROBABILITIES, *LOSS_GRADIENTS)


def causal_lm_loss(tape: Tape, logits: Tensor, batch: int, rows: int, vocab: int) -> Tensor:
    """transformers' ForCausalLMLoss: a float32 copy of the logits, log-softmax, negative log-likelihood."""
    tape.scope = "loss"
    wide = ops.to(tape, logits, "fp32", "logits, float32")
    labels = tape.new((rows + 1,), "int64", LABELS)
    copied = None
    if batch > 1 and not tape.grad:  # `labels[..., 1:].contiguous()`; a training step is highest where it has gone
        copied = tape.new((rows,), "int64", LABELS)
    shape = (rows, vocab)

    def softmax_backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        return [tape.new(shape, "fp32", LOSS_GRADIENTS[1])]

    def loss_backward(_: ops.Grads, __: ops.Grads) -> ops.Grads:
        return [tape.new(shape, "fp32", LOSS_GRADIENTS[0])]

    log_probs = tape.new(shape, "fp32", LOG_PROBABILITIES)
    ops.done(log_probs, tape.node((wide,), softmax_backward, (log_probs,)))
    summed = tape.new((), "fp32", "loss, summed")
    weight = tape.new((), "fp32", "loss, weight of the tokens")
    node = tape.node((log_probs,), loss_backward, (log_probs, labels, weight))
    loss = ops.done(tape.new((), "fp32", "loss"), node)  # by the number of tokens: fixed_cross_entropy
    del labels, copied, summed, weight
    return loss


class Outputs(NamedTuple):
    """What the model returns to transformers.Trainer."""

    logits: Tensor
    loss: Tensor


def head_and_loss(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held, s: Settings) -> Outputs:
    """What a model for causal language modelling does with its last hidden states."""
    logits = head(tape, architecture, hidden, held, s)
    vocab = architecture.vocab_size
    return Outputs(logits, causal_lm_loss(tape, logits, s.batch, logits.numel // vocab, vocab))


def evaluated(tape: Tape, outputs: list[Outputs]) -> Tensor:
    """What becomes of the outputs in an evaluation: they stay until prediction_step returns, with the mean of the loss.

    transformers/trainer.py, prediction_step.
    """
    mean = predicted(tape, outputs)
    outputs.clear()
    return mean


def predicted(tape: Tape, outputs: list[Outputs]) -> Tensor:
    """The same where compute_metrics wants the logits: `outputs` still holds them."""
    logits, loss = outputs.pop()
    if tape.autocast is not None:
        tape.scope = "outputs"
        logits = ops.to(tape, logits, "fp32", KEPT_LOGITS)
    outputs.append(Outputs(logits, loss))
    return tape.new((), "fp32", "loss, mean")


def without_loss(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held, s: Settings) -> Outputs:
    """The logits of every position, where the loss has been made without them."""
    return Outputs(head(tape, architecture, hidden, held, s), tape.new((), "fp32", "loss"))


def last_logits(tape: Tape, architecture: Architecture, hidden: Tensor, held: Held, s: Settings) -> Outputs:
    """The head on each row's last position alone: generate() asks for `logits_to_keep=1`."""
    logits = head(tape, architecture, ops.part(tape, hidden, (s.batch, 1, hidden.shape[-1])), held, s)
    return Outputs(logits, logits)


def next_tokens(tape: Tape, outputs: list[Outputs]) -> Tensor:
    """GenerationMixin._sample after the forward: float32 logits, which stay until the next step's, and the tokens.

    A model that accelerate has wrapped makes the outputs float32 first.
    """
    logits = outputs.pop().logits
    tape.scope = "outputs"
    if tape.autocast is not None:
        logits = ops.to(tape, logits, "fp32", KEPT_LOGITS)
    scores = tape.new((logits.shape[0], logits.shape[-1]), "fp32", NEXT_LOGITS)
    tokens = tape.new((logits.shape[0],), "int64", "next tokens")
    del logits
    outputs.append(Outputs(scores, scores))
    return tokens


KEPT_LOGITS, NEXT_LOGITS = "logits, float32 copy of the outputs", "logits of the next token, float32"


def loss(tape: Tape, outputs: list[Outputs], *, cloned: bool = False) -> Tensor:
    """What becomes of the outputs once autocast has ended: accelerate makes them float32, and they go.

    accelerate/utils/operations.py, convert_to_fp32; transformers/trainer.py, compute_loss. `cloned`: between the two
    torch's DistributedDataParallel clones them (_DDPSink, where it looks for unused parameters).
    """
    logits, loss = outputs.pop()
    tape.scope = "outputs"
    if tape.autocast is not None:
        logits = ops.to(tape, logits.detach(), "fp32", KEPT_LOGITS)
    if cloned:
        clone = tape.new(logits.shape, logits.dtype, "logits, cloned by DistributedDataParallel")
        del logits
        del clone
    return loss
