"""Forward and backward of one micro-step, in pieces: one tape for each kind of layer, one for what is around them.

The layers of one kind are alike, so each kind is played once, forward and backward, and run.py repeats its events for
every layer of that kind. What is around the layers (embedding, final norm, head, loss) is played on a tape of its own,
in whose graph all layers together are one node.

Sources: transformers/trainer.py (training_step, compute_loss), accelerate/utils/operations.py (convert_to_fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.planner import around, blocks, ops
from vramplan.planner.paper import Node, Storage, Tape, Tensor, backward, checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.cache import Cache
    from vramplan.planner.layers import Architecture, Layer
    from vramplan.planner.paper import Parameter, Shape
    from vramplan.planner.trainer import Trainer

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """A tape's events with the local ids that stand for tensors of other pieces."""

    forward: tuple[int, ...]
    leaving: tuple[int, ...]  # when the forward's autocast ends
    backward: tuple[int, ...]
    sizes: tuple[int, ...]
    labels: tuple[str, ...]
    scopes: tuple[str, ...]
    saved: frozenset[int]
    given: int  # id of the layer's input
    made: int  # id of its output
    grad_given: int  # id of the output's gradient
    grad_made: int  # id of the input's gradient; NOWHERE when the input needs none
    grads: tuple[int, ...]  # ids of its parameters' gradients, in registration order
    shared: dict[str, int]  # ids of the tables and masks that it reads: the last reader to let go frees them
    added: tuple[int, ...]  # bytes of gradients that backward adds another to in place
    cache: tuple[int, ...] = ()  # ids of the keys and values given, where there are any, and of those made
    returned: tuple[int, ...] = ()  # ids of what the layer returns beside its output


def _external(tape: Tape, nbytes: int, label: str) -> Storage:
    """A storage that another piece has allocated: no event here, but its last reference may go here."""
    storage = Storage(tape, nbytes, label)
    tape.events.pop()
    return storage


def _given(tape: Tape, shape: Shape, dtype: str, label: str) -> Tensor:
    """A tensor that another piece has allocated."""
    return Tensor(_external(tape, ops.bytes_of(shape, dtype), label), shape, dtype)


def play_layer(
    layer: Layer, held: Held, s: Settings, shared: blocks.Shared, dtype: str, hidden_size: int, needs_grad: bool,
    again: bool, cache: Cache | None = None,
) -> Piece:  # fmt: skip
    """One layer, forward and backward; `again`: its parameters have gradients from an earlier micro-step.

    `cache` is what it has of earlier tokens; it holds what the layer has of all of them then.
    """
    tape = s.tape
    shape = (s.batch, s.seq, hidden_size)
    source = Node(0, [], lambda _, __: [], [])
    x = _given(tape, shape, dtype, "hidden states")
    x.node = source if needs_grad else None
    local = shared.of(blocks.layer_type(layer.attention), lambda t, name: _given(tape, t.shape, t.dtype, name))
    shared_ids = local.ids()
    if cache is not None:
        for name in ("keys", "values"):
            if (old := getattr(cache, name)) is not None:
                setattr(cache, name, _given(tape, old.shape, old.dtype, f"cached {name}"))
        local.cache = cache
    cache_ids = _ids(cache)
    for parameter in held.parameters:
        parameter.grad = Tensor(None, parameter.shape, parameter.dtype) if again else None
        parameter.node = None
    if s.checkpointing:
        out = _checkpointed(tape, x, layer, held, s, local)
    else:
        out = blocks.decoder_layer(tape, x, layer, held, s, local)
    returned = local.returned
    del x, local
    ahead = tuple(tape.events)
    out_storage, out_shape, out_dtype, node, nr = out.storage, out.shape, out.dtype, out.node, out.nr
    assert out_storage is not None
    made = out_storage.id
    del out
    tape.events.clear()
    tape.end_autocast()
    leaving = tuple(tape.events)
    tape.events.clear()
    grad_made = NOWHERE
    grad_given = len(tape.sizes)
    if node is not None:
        roots = [(node, nr, _given(tape, out_shape, out_dtype, "gradient of hidden states"))]
        del node
        tape.autocast = None
        into = backward(tape, roots, [source])
        if into[0] is not None and into[0].storage is not None:
            grad_made = into[0].storage.id
        _small_gradients(tape, held.parameters)
        back = tuple(tape.events)
        del into
    else:
        back = ()
    grads = tuple(p.grad.storage.id for p in held.parameters if p.grad is not None and p.grad.storage is not None)
    piece = Piece(
        ahead, leaving, back, tuple(tape.sizes), tuple(tape.labels), tuple(tape.scopes), frozenset(tape.saved),
        0, made, grad_given, grad_made, grads, shared_ids, tuple(tape.added), (*cache_ids, *_ids(cache)),
        tuple(tensor.storage.id for tensor in returned if tensor.storage is not None),
    )  # fmt: skip
    for parameter in held.parameters:
        parameter.grad = None
        parameter.node = None
    return piece


def _small_gradients(tape: Tape, parameters: Sequence[Parameter]) -> None:
    """Gradients whose sums are not played, some kilobytes in all: attention sinks, xIELU's numbers, norms of one head.

    They are there when the layer's backward has ended.
    """
    for p in parameters:
        if (edge := p.edge()) and p.grad is None:
            edge[0].backward([tape.new(p.shape, p.dtype, "gradient")], [])


def _ids(cache: Cache | None) -> list[int]:
    held = (cache.keys, cache.values) if cache is not None else ()
    return [tensor.storage.id for tensor in held if tensor is not None and tensor.storage is not None]


def _checkpointed(tape: Tape, x: Tensor, layer: Layer, held: Held, s: Settings, shared: blocks.Shared) -> Tensor:
    return checkpoint(tape, lambda hidden: blocks.decoder_layer(tape, hidden, layer, held, s, shared), x)


@dataclass(slots=True)
class Around:
    """The tape of everything but the layers, with the positions where the layers run."""

    tape: Tape
    events: tuple[int, ...]
    embeds: int  # id of layer 0's input
    hidden: int  # id of the last layer's output, allocated by the layers
    grad: int  # id of its gradient, allocated here
    grad_embeds: int  # id of layer 0's input gradient, allocated by the layers; NOWHERE when it needs none
    split: tuple[int, int, int]  # events before: layers forward, autocast ends, layers backward
    marks: dict[str, int]  # events before the places that the tape noted
    grads: list[int]
    shared: dict[str, int]  # ids of the tables and masks that the layers read


def token_dtype(architecture: Architecture, held: Held) -> str:
    """The dtype of the token embeddings, which is that of masks and rotary tables."""
    name = next(m.name for m in architecture.embeddings if m.role == "token_embedding")
    return held.others[name]["weight"].dtype


def shared(architecture: Architecture, held: Held, s: Settings) -> blocks.Shared:
    """The tables and masks that the model hands to its layers, as shapes."""
    made = around.prepare(s.tape, architecture, s, token_dtype(architecture, held))
    if architecture.model_type in around.KEEPS_POSITIONS:
        made.positions = None
    return made


def embedded_dtype(architecture: Architecture, held: Held, s: Settings) -> str:
    """The dtype of layer 0's input: a norm or a projection of the embeddings may change theirs."""
    return around.embed(s.tape, architecture, held, s)[0].dtype


def play_around(
    architecture: Architecture, held: Held, s: Settings, inner_dtype: str, outer_dtype: str, again: bool,
    layers_need_grad: bool, trainer: Trainer,
) -> Around:  # fmt: skip
    """Embedding, final norm, head and loss, forward and backward, with a hole where the layers run."""
    tape = s.tape
    b, t, h = s.batch, s.seq, architecture.hidden_size
    for parameter in held.parameters:
        parameter.grad = Tensor(None, parameter.shape, parameter.dtype) if again else None
        parameter.node = None
    tape.scope = "embeddings"
    embeds, kept_embeds = around.embed(tape, architecture, held, s)
    embeds_id = embeds.storage.id if embeds.storage is not None else NOWHERE
    shared = around.prepare(tape, architecture, s, token_dtype(architecture, held))
    shared_ids = shared.ids()
    embeds_node, embeds_edge = embeds.node, embeds.edge()
    del embeds
    m1 = len(tape.events)
    hidden_storage = _external(tape, ops.bytes_of((b, t, h), outer_dtype), "hidden states")
    hidden_id = hidden_storage.id
    after: list[int] = []
    kept: list[object] = []
    grad_embeds_id = NOWHERE

    def through_layers(grads: ops.Grads, _: ops.Grads) -> ops.Grads:
        nonlocal grad_embeds_id
        after.append(len(tape.events))
        grad = grads[0]
        assert grad is not None
        kept.append(grad.storage)  # the layers take it over
        if embeds_node is None:
            return [None]
        storage = _external(tape, ops.bytes_of((b, t, h), inner_dtype), "gradient of embeddings")
        grad_embeds_id = storage.id
        return [Tensor(storage, (b, t, h), inner_dtype)]

    tape.seq += 1
    layers_node = None
    if layers_need_grad:
        layers_node = Node(tape.seq, [embeds_edge], through_layers, [])
    hidden = Tensor(hidden_storage, (b, t, h), outer_dtype, layers_node)
    del hidden_storage
    last = hidden if architecture.model_type in around.KEEPS_LAST_HIDDEN else None
    for module in architecture.final:
        tape.scope = module.name
        if module.kind == "norm":
            hidden = blocks.norm(tape, hidden, held.norms[module.name])
        elif module.kind == "linear":
            hidden = blocks.project(tape, hidden, held.projections[module.name], s)
    if architecture.model_type in around.KEEPS_MASK_ARGUMENTS:
        del shared, kept_embeds
    else:
        del kept_embeds, shared
    del last  # locals of the base model's forward
    tape.scope = architecture.output.name
    outputs = [trainer.forward(tape, architecture, hidden, held, s)]
    del hidden
    tape.end_autocast()
    left = len(tape.events)
    loss = trainer.loss(tape, outputs)
    grad_id = NOWHERE
    if loss.node is not None:
        tape.autocast = None
        tape.scope = "loss"
        divided = tape.new((), "fp32", "loss by micro-steps")  # accelerate/accelerator.py, backward
        seed = tape.new((), "fp32", "loss, gradient of 1")  # torch/autograd/__init__.py, _make_grads
        roots = [(loss.node, loss.nr, seed)]
        loss.node = None
        backward(tape, roots)
        del divided, seed
    del loss
    if kept and isinstance(kept[0], Storage):
        grad_id = kept[0].id
    grads = [p.grad.storage.id for p in held.parameters if p.grad is not None and p.grad.storage is not None]
    split = (m1, left, after[0] if after else len(tape.events))
    embeds_node = embeds_edge = None  # the graph goes when training_step returns
    events = tuple(tape.events)  # before what is still held here goes: gradients, and what the layers took over
    for parameter in held.parameters:
        parameter.grad, parameter.node = None, None
    return Around(tape, events, embeds_id, hidden_id, grad_id, grad_embeds_id, split, tape.marks, grads, shared_ids)
