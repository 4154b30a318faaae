"""A training run as one list of events: loading, then steps of transformers.Trainer.

`Program` repeats each layer's piece (step.py) for every layer and puts around it what the Trainer does: the batch, the
autograd graph's other part, clipping, the optimizer, and letting go of gradients.

Sources: transformers/trainer.py (_run_epoch, training_step, get_batch_samples), accelerate/data_loader.py (batches are
moved to the GPU as they are fetched), torch/optim/optimizer.py (zero_grad sets gradients to None).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from vramplan.planner import attention, blocks, loading, optimizer, step
from vramplan.planner.allocator import block_bytes
from vramplan.planner.paper import ITEMSIZE, Parameter, Tape
from vramplan.planner.step import NOWHERE
from vramplan.planner.trainer import TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.layers import Architecture, Module
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.sharding import Sharing
    from vramplan.planner.trainer import Trainer


@dataclass(slots=True)
class Program:
    """Events with what is known of each tensor, by global id."""

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # what the tensor counts as in a breakdown; "" is decided by `saved`
    layers: list[int] = field(default_factory=list)  # the layer of a tensor, or NOWHERE
    saved: set[int] = field(default_factory=set)
    streams: dict[int, int] = field(default_factory=dict)  # the CUDA stream of a tensor, where it is not the main one

    def place(self, tape: Tape | step.Piece, part: str = "", layer: int = NOWHERE) -> int:
        """Gives a tape's ids their global place; returns the offset."""
        base, n = len(self.sizes), len(tape.sizes)
        self.sizes += tape.sizes
        self.labels += tape.labels
        self.scopes += tape.scopes
        self.parts += [part] * n
        self.layers += [layer] * n
        self.saved.update([base + i for i in tape.saved])
        return base

    def new(self, nbytes: int, label: str, part: str, scope: str = "", stream: int = 0) -> int:
        """One more tensor; its id."""
        if stream:
            self.streams[len(self.sizes)] = stream
        self.sizes.append(nbytes)
        self.labels.append(label)
        self.scopes.append(scope)
        self.parts.append(part)
        self.layers.append(NOWHERE)
        return len(self.sizes) - 1


def alive(events: Iterable[int]) -> set[int]:
    """The tensors whose last event is an allocation."""
    last = {e >> 1: e for e in events}
    return {i for i, e in last.items() if not e & 1}


def linked(events: Sequence[int], ids: Iterable[int]) -> tuple[int, ...]:
    """The positions of the events of `ids`."""
    wanted = set(ids)
    return tuple([i for i, e in enumerate(events) if e >> 1 in wanted])


def moved(events: Sequence[int], base: int, links: Mapping[int, int], positions: Iterable[int]) -> list[int]:
    """Local events as global ones: shifted by `base`; those at `positions` belong to tensors elsewhere, by `links`."""
    shift = 2 * base
    out = [e + shift for e in events]
    for i in positions:
        out[i] = 2 * links[events[i] >> 1] + (events[i] & 1)
    return out


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of events under one name: "loading", "forward", "backward, layer 3", "optimizer step".

    Where less than `wanted` bytes are free on the GPU when it begins, `otherwise` is played in its place.
    """

    name: str
    events: list[int]
    wanted: int = 0
    otherwise: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Forward and backward of one micro-step, and the gradients that it makes.

    `places` are positions among the stretches: of the first stretch of each name, and of what follows a noted place
    (Tape.boundary). `needs` says for each layer whether its input needs a gradient, `runs` whether it has a backward.
    """

    stretches: list[Stretch]
    grads: list[int]  # in the order of the parameters
    outer_grads: dict[str, int]  # those of parameters around the layers, by name
    layer_grads: list[list[int]]
    places: dict[str, int]
    needs: list[bool]
    runs: list[bool]


def last_frees_only(stretches: Sequence[Stretch], positions: Sequence[Sequence[int]], shared: set[int]) -> None:
    """Of tensors that several pieces hold, each piece says when it lets go: the last of them frees the tensor."""
    freed: set[int] = set()
    for stretch, places in zip(reversed(stretches), reversed(positions), strict=True):
        for place in reversed(places):
            event = stretch.events[place]
            if event & 1 and event >> 1 in shared:
                if event in freed:
                    del stretch.events[place]
                freed.add(event)


class Run:
    """Plays a run once; `loading` and each `step` are stretches of events over one `program`."""

    def __init__(
        self, architecture: Architecture, s: Settings, counts: ParameterCounts, optimizer_name: str, accumulation: int,
        quantised: Sequence[frozenset[str]], workspace_bytes: int, trainer: Trainer = TRANSFORMERS,
        quantised_outside: frozenset[str] = frozenset(), sharing: Sharing | None = None,
    ) -> None:  # fmt: skip
        self.architecture = architecture
        self.sharing = sharing  # how several GPUs share the run
        self.loaded = s  # what the model is loaded by
        self.settings = s = sharing.played(s) if sharing else s
        self.accumulation = accumulation
        self.optimizer = optimizer.get(optimizer_name)
        self.workspace_bytes = workspace_bytes
        self.trainer = sharing.trainer(trainer) if sharing else trainer
        self.program = Program()
        self._adapted = _adapted(architecture, counts)
        self.quantised = quantised  # for each layer, its modules that are held in 4 bit
        self.quantised_outside = quantised_outside
        self._pieces: dict[tuple[object, ...], step.Piece] = {}
        self._plain: dict[tuple[object, ...], Held] = {}
        self.outer = blocks.hold(
            architecture.outside, s, frozenset(t.module.name for t in counts.targets if t.layer_kind is None),
            quantised_outside, self.token_embedding.name if architecture.tied else "",
        )  # fmt: skip
        self.layers = [self._hold(i) for i in range(architecture.num_hidden_layers)]
        self.trained = self._all_parameters()
        self.parameters = sharing.parameters(self) if sharing else self.trained  # what the optimizer holds here
        self.plain_parameters = 0  # elements of base weights that are not quantised
        self.biases: dict[int, list[tuple[int, int]]] = {}  # by layer: those that bitsandbytes casts, (id, elements)
        self._batch: list[int] = []
        self._loss = NOWHERE
        self._states: dict[str, optimizer.Held] = {}
        self._group_states: dict[str, dict[str, optimizer.Held]] = {}
        self._norm: optimizer.Held | None = None
        self._found_inf: optimizer.Held | None = None
        self._outside = Tape()  # clipping and the optimizer
        self._outside_ids: list[int] = []
        self._micro_steps: dict[bool, MicroStep] = {}
        self._shared: dict[tuple[bool, bool], tuple[list[Stretch], list[int]]] = {}

    @cached_property
    def loading(self) -> tuple[Stretch, ...]:
        """The model on the GPU, k-bit preparation, the adapter; with several GPUs, what sharing makes of it."""
        if self.sharing is None:
            return loading.play(self)
        return self.sharing.loading(self)

    @cached_property
    def signatures(self) -> list[tuple[int, frozenset[str], frozenset[str]]]:
        """What tells one layer from another: its kind, which of its modules are adapted, which are in 4 bit."""
        return list(zip(self.architecture.order, self._adapted, self.quantised, strict=True))

    @property
    def token_embedding(self) -> Module:
        """The module that looks tokens up."""
        return next(m for m in self.architecture.embeddings if m.role == "token_embedding")

    @cached_property
    def kernels(self) -> frozenset[attention.Kernel]:
        """The attention kernels that the layers are played with."""
        s, masks = self.settings, step.shared(self.architecture, self.outer, self.settings).masks
        return frozenset(
            attention.planned(
                layer.attention, s, masked=blocks.layer_type(layer.attention) in masks, grouped=layer.family != "falcon"
            )
            for layer in self.architecture.kinds
        )

    @property
    def scaled(self) -> bool:
        """Whether accelerate trains with torch's GradScaler: under float16 autocast (accelerate/accelerator.py)."""
        return self.loaded.autocast == "fp16"

    @property
    def uses_cublaslt(self) -> bool:
        """Whether a layer has a product with a bias."""
        return any(p.bias is not None and not p.adds_bias for p in self.layers[0].projections.values())

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient for each trained weight (torch, AccumulateGrad: in its dtype)."""
        return sum(p.numel * ITEMSIZE[p.dtype] for p in self.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's states, but for those in managed memory."""
        tables = self._embeddings
        return sum(optimizer.state_bytes(self.optimizer, p.shape, p.dtype, p.name in tables) for p in self.parameters)

    @property
    def paged_bytes(self) -> int:
        """Optimizer states in managed memory."""
        if not self.optimizer.paged:
            return 0
        tables = self._embeddings
        return sum(optimizer.paged_bytes(self.optimizer, p.shape, p.dtype, p.name in tables) for p in self.parameters)

    @property
    def _embeddings(self) -> list[str]:
        modules = self.architecture.embeddings
        return [f"{m.name}.{w.name}" for m in modules if m.kind == "embedding" for w in m.weights]

    @cached_property
    def layer_norms(self) -> frozenset[str]:
        """The trained weights of nn.LayerNorm, which the Trainer leaves without decay whatever they are called."""
        if self.settings.method != "full":
            return frozenset()
        a = self.architecture
        placed = [("", (*a.before, *a.after))]
        placed += [(f"{a.layer_prefix}.{i}.", a.kinds[kind].modules) for i, kind in enumerate(a.order)]
        norms = ((at, m) for at, modules in placed for m in modules if m.variant == "layer_norm")
        return frozenset(f"{at}{m.name}.{w.name}" for at, m in norms for w in m.weights)

    def check(self) -> None:
        """Raises UsageError where the optimizer has no kernel for what is trained."""
        optimizer.check(self.optimizer, self.parameters, self._embeddings)

    # --- what the layers hold -------------------------------------------------------------------------------------

    def _hold(self, layer: int) -> Held:
        kind, adapted, quantised = signature = self.signatures[layer]
        held = self._plain.get(signature)
        if held is None:
            held = blocks.hold(self.architecture.kinds[kind].modules, self.settings, adapted, quantised)
            self._plain[signature] = held
        return held

    def _all_parameters(self) -> list[Parameter]:
        """The trained parameters in the order of named_parameters(): a fresh object for each layer's."""
        a = self.architecture
        before = [p for p in self.outer.parameters if p.name in self.early]
        after = [p for p in self.outer.parameters if p.name not in self.early]
        inner = [
            Parameter(f"{a.layer_prefix}.{i}.{p.name}", p.shape, p.dtype, True)
            for i, held in enumerate(self.layers)
            for p in held.parameters
        ]
        return [*before, *inner, *after]

    @cached_property
    def early(self) -> frozenset[str]:
        """Names of the trained parameters that are registered before the layers."""
        prefixes = tuple(f"{m.name}." for m in self.architecture.before)
        return frozenset(p.name for p in self.outer.parameters if p.name.startswith(prefixes))

    # --- forward and backward -------------------------------------------------------------------------------------

    def _piece(self, layer: int, dtype: str, needs_grad: bool, again: bool, shared: blocks.Shared) -> step.Piece:
        key = (*self.signatures[layer], dtype, needs_grad, again)
        piece = self._pieces.get(key)
        if piece is None:
            kind = self.architecture.kinds[self.architecture.order[layer]]
            piece = step.play_layer(
                kind, self.layers[layer], self.settings, shared, dtype, self.architecture.hidden_size, needs_grad, again
            )
            self._pieces[key] = piece
        return piece

    def micro_step(self, again: bool, last: bool = True) -> tuple[list[Stretch], list[int]]:
        """Forward and backward of one micro-step, `again` on top of gradients; the ids of those it leaves, in order.

        Every micro-step of a kind is the same, so it is put together once. `last`: the optimizer's step follows.
        """
        if again not in self._micro_steps:
            self._micro_steps[again] = self._put_together(again)
        made = self._micro_steps[again]
        first = self._micro_steps[False] if again else made
        if self.sharing is None:
            return made.stretches, first.grads
        if (again, last) not in self._shared:
            self._shared[again, last] = self.sharing.micro_step(self, made, first, last)
        return self._shared[again, last]

    @property
    def first_micro_step(self) -> MicroStep:
        """The first micro-step of a step, as it would be on one GPU."""
        self.micro_step(False)
        return self._micro_steps[False]

    def play(self, again: bool) -> tuple[list[step.Piece], step.Around]:
        """The pieces of a micro-step: one for each layer, and what is around them."""
        a, s = self.architecture, self.settings
        inner = step.embedded_dtype(a, self.outer, s)
        shared = step.shared(a, self.outer, s)
        adapted = any(m.name in self.outer.factors or _has_adapter(self.outer, m.name) for m in a.embeddings)
        dtype, needs = inner, s.method == "full" or s.checkpointing or adapted
        pieces: list[step.Piece] = []
        for layer in range(a.num_hidden_layers):
            piece = self._piece(layer, dtype, needs, again, shared)
            pieces.append(piece)
            dtype = dtype_of(piece.sizes[piece.made], s, a.hidden_size)
            needs = needs or bool(piece.backward)
        return pieces, step.play_around(a, self.outer, s, inner, dtype, again, needs, self.trainer)

    def _put_together(self, again: bool) -> MicroStep:
        s, program = self.settings, self.program
        pieces, around = self.play(again)
        base = program.place(around.tape)

        # the chain of hidden states forward, and of their gradients backward
        bases = [program.place(piece, layer=i) for i, piece in enumerate(pieces)]
        links: list[dict[int, int]] = []
        current = base + around.embeds
        several = {current, *(base + i for i in around.shared.values())}  # held by several pieces
        for piece, at in zip(pieces, bases, strict=True):
            links.append({i: base + around.shared[name] for name, i in piece.shared.items()} | {piece.given: current})
            current = at + piece.made
            if s.checkpointing:  # the input of the next layer's recomputation
                program.saved.add(current)
                program.labels[current] = "layer input, kept to recompute the layer"
        outside = {around.hidden: current}
        gradient = base + around.grad
        for piece, at, link in reversed(list(zip(pieces, bases, links, strict=True))):
            link[piece.grad_given] = gradient
            if piece.grad_made != NOWHERE:
                gradient = link.get(piece.grad_made, at + piece.grad_made)
        if around.grad_embeds != NOWHERE:
            outside[around.grad_embeds] = gradient

        found: dict[tuple[int, str], tuple[int, ...]] = {}
        stretches: list[Stretch] = []
        positions: list[tuple[int, ...]] = []

        def layer(i: int, what: str) -> list[int]:
            piece = pieces[i]
            events: tuple[int, ...] = getattr(piece, what)
            key = (id(piece), what)
            if key not in found:
                found[key] = linked(events, links[i])
            positions.append(found[key])
            return moved(events, bases[i], links[i], found[key])

        def beside(events: Sequence[int]) -> list[int]:
            places = linked(events, (*outside, *(i - base for i in several)))
            positions.append(places)
            return moved(events, base, outside | {i - base: i for i in several}, places)

        places: dict[str, int] = {}

        def add_beside(name: str, begin: int, end: int) -> None:
            cuts = {at: mark for mark, at in around.marks.items() if begin < at < end} if s.hooked else {}
            places[name] = len(stretches)
            for low, high in pairwise((begin, *sorted(cuts), end)):
                if low in cuts:
                    places[cuts[low]] = len(stretches)
                stretches.append(Stretch(name, beside(around.events[low:high])))

        start, left, back = around.split
        add_beside("forward, embeddings", 0, start)
        stretches += [Stretch(f"forward, layer {i}", layer(i, "forward")) for i in range(len(pieces))]
        add_beside("loss, forward", start, left)
        places["autocast ends"] = len(stretches)
        stretches += [Stretch("autocast ends", layer(i, "leaving")) for i, p in enumerate(pieces) if p.leaving]
        add_beside("loss, backward", left, back)
        stretches += [Stretch(f"backward, layer {i}", layer(i, "backward")) for i in reversed(range(len(pieces)))]
        add_beside("backward, embeddings", back, len(around.events))
        last_frees_only(stretches, positions, several)

        early = self.early
        outer = dict(zip((p.name for p in self.outer.parameters), (base + g for g in around.grads), strict=False))
        layer_grads = [[at + g for g in piece.grads] for piece, at in zip(pieces, bases, strict=True)]
        grads = [g for name, g in outer.items() if name in early]
        grads += [g for each in layer_grads for g in each]
        grads += [g for name, g in outer.items() if name not in early]
        for g in grads:
            program.parts[g] = "gradients"
        needs = [piece.grad_made != NOWHERE for piece in pieces]
        return MicroStep(stretches, grads, outer, layer_grads, places, needs, [bool(p.backward) for p in pieces])

    def _with_firsts(self, stretches: list[Stretch]) -> list[Stretch]:
        """The first micro-step: what is made once, the loss scale and workspaces.

        A thread's first matrix product takes a workspace and keeps it.

        cuBLAS has one for each thread, the forward's and autograd's. cuBLASLt, which runs products with a bias, has
        its own; autograd's thread needs that only where it recomputes the forward.
        """
        labels, new = self.program.labels, self.program.new
        out = list(stretches)
        for layer, biases in self.biases.items():  # bitsandbytes/nn/modules.py, Linear4bit.forward: cast for good
            at = next(i for i, stretch in enumerate(out) if stretch.name == f"forward, layer {layer}")
            events: list[int] = []
            for old, numel in biases:
                nbytes = numel * ITEMSIZE[self.settings.compute_dtype]
                events += (2 * new(nbytes, "bias, cast to the compute dtype", "weights"), 2 * old + 1)
            out[at] = Stretch(out[at].name, [*events, *out[at].events])
        if self.scaled:  # torch/amp/grad_scaler.py: the first `scale` makes the scale and a count of steps without inf
            at = next(i for i, stretch in enumerate(out) if stretch.name == "loss, backward")
            made = [2 * new(4, label, "") for label in ("loss scale", "growth tracker")]
            out[at] = Stretch("loss, backward", [*made, *out[at].events])
        if not self.workspace_bytes:
            return out

        def insert(name: str, position: int, made: int, at: int | None = None) -> None:
            at = next(i for i, stretch in enumerate(out) if stretch.name == name) if at is None else at
            events = list(out[at].events)
            events.insert(position, 2 * made)
            out[at] = Stretch(name, events)

        # the forward's first product has run before the layers, in the rotary embedding; autograd's is the head's
        part = "cuBLAS workspace"
        insert("forward, layer 0", 0, new(self.workspace_bytes, "cuBLAS workspace, forward thread", part))
        back = [i for i, stretch in enumerate(out) if stretch.name == "loss, backward"]
        products = self.trainer.first_products
        found = ((i, j) for i in back for j, e in enumerate(out[i].events) if labels[e >> 1] in products and not e & 1)
        at, position = next(found, (back[0], 0))
        made_at = position + self.trainer.product_made
        insert("loss, backward", made_at, new(self.workspace_bytes, "cuBLAS workspace, backward thread", part), at)
        if self.uses_cublaslt:
            insert("forward, layer 0", 1, new(CUBLASLT_BYTES, "cuBLASLt workspace, forward thread", part))
            if self.settings.checkpointing:
                last = f"backward, layer {len(self.layers) - 1}"
                insert(last, 0, new(CUBLASLT_BYTES, "cuBLASLt workspace, backward thread", part))
        return out

    # --- a whole step ---------------------------------------------------------------------------------------------

    def step(self, number: int) -> list[Stretch]:
        """Optimizer step `number` (from 0): its micro-steps, clipping, the optimizer, gradients let go."""
        first = number == 0
        out = [Stretch("batch", self._fetch())]
        if self.sharing is not None:
            out += self.sharing.beginning(self, number)
        grads: list[int] = []
        micro_steps = min(self.accumulation, PLAYED)
        for micro in range(micro_steps):  # the last one leaves the gradients that are let go
            stretches, made = self.micro_step(again=micro > 0, last=micro == micro_steps - 1)
            out += self._with_loss(self._with_firsts(stretches) if first and micro == 0 else stretches)
            grads = made
        out += self.update(first)
        out.append(Stretch("gradients let go", [2 * g + 1 for g in grads]))
        return out

    def _with_loss(self, stretches: list[Stretch]) -> list[Stretch]:
        """The loss, which the Trainer's loop holds until the next micro-step's has come back in its place."""
        before, self._loss = self._loss, self.program.new(4, "loss", "")
        events = [*(2 * i + 1 for i in (before,) if i != NOWHERE), 2 * self._loss]
        return [*stretches, Stretch("backward, embeddings", events)]

    def end(self) -> Stretch:
        """What goes when train() returns: the last batch, its loss, the norm of its gradients."""
        gone, self._batch, self._norm = [*self._batch, self._loss], [], None
        return Stretch("training ends", [*(2 * i + 1 for i in gone), *self._collect("")])

    def update(self, first: bool) -> list[Stretch]:
        """What follows backward: clipping and the optimizer."""
        if self.sharing is not None:
            return self.sharing.update(self, first)
        return self.update_alone(first)

    def update_alone(self, first: bool) -> list[Stretch]:
        """The same where every parameter has a gradient of its own."""
        return [Stretch("gradient clipping", self._clip()), Stretch("optimizer step", self.optimize(first))]

    def update_changes(self) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """What a step leaves of states, and what clipping and a later step add: `optimizer.changes`."""
        return optimizer.changes(
            self.optimizer, self.parameters,
            embeddings=self._embeddings, layer_norms=self.layer_norms, scaled=self.scaled,
            gpu=self.settings.multiprocessors,
        )  # fmt: skip

    def _fetch(self) -> list[int]:
        """The micro-batches of a step move to the GPU; then those of the last step go."""
        s, program = self.settings, self.program
        rows = s.batch * s.seq
        singly = min(self.accumulation, PLAYED)
        made = [program.new(8 * rows, name, "batch") for _ in range(singly) for name in self.trainer.batch]
        if self.accumulation > singly:
            rest = (self.accumulation - singly) * len(self.trainer.batch)
            made.append(program.new(rest * block_bytes(8 * rows), "the other micro-batches", "batch"))
        made.append(program.new(8, "number of tokens", "batch"))  # transformers/trainer.py, _get_num_items_in_batch
        events = [2 * i for i in made] + [2 * i + 1 for i in self._batch]
        if not self._batch:
            events.insert(0, 2 * program.new(4, "loss so far", ""))  # transformers/trainer.py, tr_loss
        self._batch = made
        return events

    def _clip(self) -> list[int]:
        before = self._norm
        self._norm = None
        del before
        if self.scaled:
            self._found_inf = optimizer.play_unscale(self._outside)
        norm = optimizer.play_clip(self._outside, self.parameters)
        self._norm = norm
        return self._collect("")

    def optimize(self, first: bool, only: Sequence[Parameter] | None = None) -> list[int]:
        """The optimizer's step, of all that it holds, or of one group of it after another (`only`)."""
        states = self._states
        if only is not None:
            states = self._group_states.setdefault(only[0].name, dict(self._states))
        optimizer.play(
            self._outside, self.optimizer, self.parameters if only is None else only, states, first,
            embeddings=self._embeddings, layer_norms=self.layer_norms, scaled=self.scaled,
            gpu=self.settings.multiprocessors,
        )  # fmt: skip
        self._found_inf = None
        return self._collect("optimizer states" if first else "")

    def _collect(self, part: str) -> list[int]:
        """What the outside tape has recorded since the last time, as global events."""
        tape, program, ids = self._outside, self.program, self._outside_ids
        fresh = len(tape.sizes) - len(ids)
        at, known = len(program.sizes), len(ids)
        ids.extend(range(at, at + fresh))
        program.sizes += tape.sizes[known:]
        program.labels += tape.labels[known:]
        program.scopes += tape.scopes[known:]
        program.parts += [""] * fresh
        program.layers += [NOWHERE] * fresh
        events = [2 * ids[e >> 1] + (e & 1) for e in tape.events]
        tape.events.clear()
        if part:
            for i in alive(events):
                program.parts[i] = part
        return events


PLAYED = 3  # micro-steps of a step: from the second on they are alike
CUBLASLT_BYTES = 2**20  # aten/src/ATen/cuda/CUDABlas.cpp, CUBLASLT_WORKSPACE_SIZE; seen on an H200 with torch 2.11


def _has_adapter(held: Held, name: str) -> bool:
    return name in held.projections and held.projections[name].lora_a is not None


def dtype_of(nbytes: int, s: Settings, hidden_size: int) -> str:
    """The dtype of hidden states [B, T, H] that take `nbytes`."""
    if nbytes == 4 * s.batch * s.seq * hidden_size:
        return "fp32"
    return s.autocast or s.weights_dtype


def _adapted(architecture: Architecture, counts: ParameterCounts) -> list[frozenset[str]]:
    """For each layer, the names of its modules that carry an adapter."""
    names: list[set[str]] = [set() for _ in architecture.order]
    for target in counts.targets:
        for layer in target.layers:
            names[layer].add(target.module.name)
    return [frozenset(n) for n in names]
