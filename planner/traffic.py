"""What each op of the played step computes, reads and writes: floating-point operations, bytes, launches.

The play (step.py) says what each op allocates. Nearly each allocation is the output of one kernel, and its label says
of which op: so a matrix product's shape comes from the module that the label's scope names, and an elementwise op's
traffic is its output, written once, and what it reads, in multiples of that (`_READS`). A gradient's product is the
forward's, taken from the last one back. What runs in place, and so leaves no trace in the play, is added by name:
gradients summed over micro-steps, clipping, the optimizer, trl's tiles.

Sources: aten/src/ATen/native/cuda (one kernel an op, each operand read once, the output written once),
bitsandbytes/functional.py (dequantize_4bit), flash-attention's paper (arXiv 2307.08691: five products backward for two
forward, half of them masked out where attention is causal).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner import around, attention, blocks, optimizer, step, trl
from vramplan.planner.layers import Moe
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.trainer import TRL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.blocks import Held, Settings
    from vramplan.planner.layers import Layer
    from vramplan.planner.run import Run
    from vramplan.planner.step import Around, Piece

PRODUCTS, ATTENTION, NF4, ELEMENTWISE = "matrix products", "attention", "4-bit weights", "elementwise ops"
LOSS, CLIPPING, OPTIMIZER = "logits and loss", "gradient clipping", "optimizer step"
COPIES = "copies for other GPUs"


class Kernel(NamedTuple):
    """One launch: its kind, FLOPs, bytes read and written. A product is `batch` times [m, k] x [k, n].

    `wide`: in float32, which runs on the plain cores (torch.backends.cuda.matmul.allow_tf32 is off). `singly`: elements
    that are handled one by one instead of four or eight at once. `form` tells attention's kernels apart.
    """

    kind: str
    flops: int
    nbytes: int
    singly: int = 0
    batch: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    wide: bool = False
    form: str = ""


class Hooks(NamedTuple):
    """What the host does in a section to share the run: calls of fully_shard's and DDP's hooks (communication.py).

    Units that are gathered, and the weights in them; units whose gradients are added up, and the gradients in them;
    gradients that are copied to DDP's buckets.
    """

    gathers: int = 0
    weights: int = 0
    reductions: int = 0
    gradients: int = 0
    bucketed: int = 0


_NO_HOOKS = Hooks()


@dataclass(slots=True, eq=False)  # one object for each: a key
class Section:
    """The kernels of one stretch of a step, each with how often it runs, and what the host does to launch them.

    `forward_ops` are called from Python, `backward_ops` by autograd's thread; `dequantised` and `products_4bit` are
    calls of bitsandbytes', whose Python is longer than an op's.
    """

    name: str
    kernels: Counter[Kernel] = field(default_factory=Counter)
    forward_ops: int = 0
    backward_ops: int = 0
    products_4bit: int = 0
    dequantised: int = 0  # in backward
    checkpoints: int = 0
    tensors: int = 0  # that clipping or the optimizer goes through one by one
    by: str = ""  # the optimizer
    gathered: int = 0  # bytes over each GPU's link before it begins,
    reduced: int = 0  # and after it,
    sums: int | None = None  # by so many all-reduces, or by a reduce-scatter,
    waits: bool = False  # for which the GPU waits;
    fetched: int = 0  # bytes from host memory before those,
    stored: int = 0  # and into it after these
    in_host: int = 0  # weights that clipping or the optimizer goes through in host memory
    hooks: Hooks = _NO_HOOKS
    sharded: bool = False  # the tensors are DTensors

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return sum(self.kernels.values())


# --- what an op reads, in multiples of what it writes --------------------------------------------------------------

# Memory that belongs to another kernel, or that nothing writes at once.
_NO_KERNEL = frozenset(
    {
        "philox seed", "philox offset", "philox state", "attention workspace", "attention backward workspace",
        "log-sum-exp", "dropout mask", "descriptors of a grouped product", "buffer of a sum", "hidden states",
        "gradient of hidden states", "gradient of embeddings", "gradient of k", "gradient of v", "mean logit",
        "gradient of q, float32", "sums of gradient times output", "gradient of k for every head",
        "gradient of v for every head", "output, float32", "log-sum-exp by split", "output by split",
        "reciprocal deviation", "semaphores of a reduction", "partial results of a reduction", trl.TILE, *trl.GRADIENTS,
    }
)  # fmt: skip
# Two operands as large as the output. Weights, tables and row factors that are broadcast stay in the cache.
_READS = dict.fromkeys(
    (
        "residual", "residual and attention", "both branches", "gated", "glu", "rotated", "projection with adapter",
        "gradient of a product", "gradient of a square", "gradient of a softmax", "gradient times probabilities",
        "gradient sum", "output of all experts", "scores, masked", "scores with alibi", "gelu", "tanh argument",
        "embeddings with adapter", "embeddings with positions", "gradient of a norm weight, unsummed", "difference",
        "gradient of silu", "gradient of gelu", "gradient of gelu_pytorch_tanh", "gradient of relu",
        "gradient of tanh", "gradient of sigmoid", "gradient of a clamp", "concatenation", "activation",
        around.LOG_PROBABILITIES,  # log_softmax reads rows that no block can hold twice (ATen/native/cuda/SoftMax.cu)
    ),
    2.0,
) | {
    around.LOSS_GRADIENTS[1]: 3.0,  # and its backward the gradient twice, the result once
    around.LOSS_GRADIENTS[0]: 0.0,  # nll_loss's backward: zeros, then one number a row
    "gradient of an embedding": 0.0,  # zeros, then the rows that were looked up
    "gradient of a slice": 1.0,  # zeros of the whole, then half of it copied: half read, half written
    "weight, dequantised": 0.25 + 1 / 32,  # half a byte and a sixty-fourth of four for two bytes
    "absmax, dequantised": 0.25 + 1 / 256,  # a byte and its share of the second absmax for four
    "dropped input": 1.5,  # the input, and the mask's byte written
    "gradient of dropout": 1.5,
    "ones": 0.0,
    "zeros": 0.0,
}  # fmt: skip
# Outputs of one number a row: what was made before them is read.
_REDUCTIONS = frozenset({"mean", "sum of a gradient", "greatest scores", "gradient of repeated heads"})
# From 16 to 32 bits or back: the operand is half or twice the output, as is what was made shortly before.
_CASTS = frozenset(
    {
        "cast", "cast of a gradient", "gradient", "float32 copy", "normalised", "input cast by autocast",
        "weight cast by autocast", "input cast to the compute dtype", "projection, cast back", "probabilities, cast",
        "scores, float32", "weight, dequantised and cast", "adapter input, cast to the adapter's dtype",
        "projection with adapter, cast back", "projection: adapter output, cast", "logits, float32",
        "logits, float32 copy of the outputs", "norm output, cast back", "q, cast back", "k, cast back",
        "weight, float32",
        "q, float32", "k, float32", "v, float32", "attention output, cast back", "router input, float32",
    }
)  # fmt: skip
# Kernels that find each element's place by itself, because an operand is broadcast or its heads lie apart; those whose
# operands are contiguous and of one dtype load several at once (ATen/native/cuda/CUDALoops.cuh, gpu_kernel_impl).
_STRIDED = frozenset(
    {
        "norm output", "gradient of a norm", "rotary: x cos", "rotary: x sin", "half, negated", "halves swapped",
        "gradient of a slice", "gradient, heads merged", "attention output, heads merged", "heads merged",
        "gradients put together", "heads repeated", "rotated and the rest", "made contiguous", "scores, masked",
        "gradient, made contiguous", "gradient of repeated heads", "rotated q", "rotated k",
    }
)  # fmt: skip
_STRIDED_WIDE = frozenset({"normalised, float32", "norm output, float32", "gradient of a mean"})  # always in float32
_LOOK_BACK = 12  # allocations among which a cast's operand is looked for
_WIDENED = frozenset({"weight cast by autocast", "input cast by autocast", "input cast to the compute dtype"})
_FUSED = frozenset({"cudnn", "flash", "efficient", "flash_attention_2"})
_BACKWARD_PRODUCTS = 2.5  # of a fused attention kernel, which makes the scores again


class _Product:
    """A product that forward ran, until its gradients are found."""

    __slots__ = ("batch", "into_a", "into_b", "item", "k", "m", "n")

    def __init__(self, batch: int, m: int, n: int, k: int, item: int) -> None:
        self.batch, self.m, self.n, self.k, self.item = batch, m, n, k, item
        self.into_a = self.into_b = False

    def kernel(self, m: int, n: int, k: int) -> Kernel:
        """One of its three products: [m, k] x [k, n] in some order of its sizes."""
        flops = 2 * self.batch * m * n * k
        nbytes = self.batch * self.item * (m * k + k * n + m * n)
        return Kernel(PRODUCTS, flops, nbytes, 0, self.batch, m, n, k, self.item == 4)


class _Reader:
    """Reads a tape's allocations as kernels."""

    def __init__(self, run: Run, held: Held, layer: Layer | None) -> None:
        s: Settings = run.settings
        self.run, self.held, self.layer, self.s = run, held, layer, s
        self.rows = s.batch * s.seq
        self.item = ITEMSIZE[s.autocast or s.weights_dtype]
        self.products: list[_Product] = []
        self.grouped = 0  # products of experts so far: gate and up first, then down
        self.kernel, self.masked = "", False
        if layer is not None:
            self.masked = blocks.layer_type(layer.attention) in step.shared(run.architecture, run.outer, s).masks
            grouped = layer.family != "falcon"
            self.kernel = attention.planned(layer.attention, s, masked=self.masked, grouped=grouped)
        trained = s.weights_dtype if s.method == "full" else s.adapter_dtype
        self.direct = s.autocast in (None, trained)  # a weight's gradient needs no cast
        self.hidden_item = ITEMSIZE[s.frozen_dtype if s.method == "qlora" else s.weights_dtype]
        inner = 0 if layer is None else layer.mlp.intermediate_size
        self.inner = frozenset(self.rows * inner * item for item in (2, 4))

    def read(
        self, events: Sequence[int], sizes: Sequence[int], labels: Sequence[str], scopes: Sequence[str]
    ) -> list[Kernel | None]:
        """One entry for each allocation of `events`; None where no kernel belongs to it."""
        found: list[Kernel | None] = []
        before: list[int] = []
        for e in events:
            if e & 1:
                continue
            i = e >> 1
            found.append(self._kernel(labels[i], sizes[i], scopes[i], before))
            before.append(sizes[i])
        return found

    def _kernel(self, label: str, size: int, scope: str, before: list[int]) -> Kernel | None:
        if label in _NO_KERNEL:
            return None
        product = self._forward_product(label, size, scope)
        if product is not None:
            self.products.append(product)
            return product.kernel(product.m, product.n, product.k)
        if label.startswith("gradient"):
            if label in ("gradient of an input", "gradient of a weight") or (label == "gradient" and self.direct):
                kernel = self._backward_product(size)
                if kernel is not None:
                    return kernel
            if label == "gradient of q":
                return self._attention(backward=True)
        elif label == "attention output" and self.kernel in _FUSED:
            return self._attention(backward=False)
        kind = ELEMENTWISE
        if label.startswith(("absmax", "weight, dequantised")):
            kind = NF4
        elif around.of_logits(label) or label in trl.TILES:
            kind = LOSS
        read = _read(label, size, before)
        return Kernel(kind, 0, size + read, self._singly(label, size, read, before))

    def _singly(self, label: str, size: int, read: int, before: list[int]) -> int:
        """How many elements a kernel handles one by one."""
        if label in ("weight, dequantised", "weight, dequantised and cast"):
            return size // self.item
        if label in _STRIDED_WIDE or (label in _CASTS and 2 * read == size):
            return size // 4  # a cast that widens is not vectorised
        if label in _STRIDED:
            return size // self.hidden_item
        if label == "gradient of a product":  # of rotary tables and norms; a gated MLP's operands are alike
            return 0 if size in self.inner else size // self.hidden_item
        if _READS.get(label) == 2.0 and before and 2 * before[-1] == size:  # operands of 16 and of 32 bits
            return size // 4
        return 0

    def _forward_product(self, label: str, size: int, scope: str) -> _Product | None:
        if label == "expert projection":
            return self._expert(size)
        if label in ("scores", "attention output") and self.kernel not in _FUSED and self.layer is not None:
            return self._scores(label, size)
        adapter = label == "adapter, rank r" or label.endswith("adapter output")
        if label == "adapter product":  # B times A, of a router
            a, b = self.held.factors[f"{scope}.weight"]
            return _Product(1, b.shape[0], a.shape[1], a.shape[0], size // (b.shape[0] * a.shape[1]))
        if not adapter and label not in ("projection", "logits", "router logits"):
            return None
        p = self.held.projections.get(scope)
        if p is not None:
            n, k = p.out_features, p.in_features
        elif label == "router logits":
            n, k = self.held.others[scope]["weight"].shape
        else:  # of the embeddings, which the play names all together: a projection, or an adapter of the table
            linear = next((m for m in self.run.architecture.embeddings if m.kind == "linear"), None)
            if linear is None and not label.endswith("adapter output"):
                return None  # rows of A are looked up
            hidden = self.run.architecture.hidden_size
            n, k = (hidden, hidden) if linear is None else (linear.out_features, linear.in_features)
        if label == "adapter, rank r":
            n = self.s.rank
        elif adapter:
            k = self.s.rank
        item = size // (self.rows * n) or self.item
        return _Product(1, size // (item * n), n, k, item)

    def _expert(self, size: int) -> _Product:
        assert self.layer is not None
        m = self.layer.mlp
        assert isinstance(m, Moe)
        rows = self.rows * m.top_k
        up, hidden = self.grouped % 2 == 0, self.run.architecture.hidden_size
        self.grouped += 1
        n, k = (2 * m.intermediate_size, hidden) if up else (hidden, m.intermediate_size)
        experts = min(m.num_experts, rows)
        return _Product(experts, -(-rows // experts), n, k, max(1, size // (rows * n)))

    def _scores(self, label: str, size: int) -> _Product:
        assert self.layer is not None
        a, s = self.layer.attention, self.s
        n, k = (s.seq, a.head_dim) if label == "scores" else (a.value_head_dim, s.seq)
        batch = s.batch * a.num_heads
        return _Product(batch, s.seq, n, k, max(1, size // (batch * s.seq * n)))

    def _backward_product(self, size: int) -> Kernel | None:
        """The forward's last product one of whose operands has `size` bytes and no gradient yet."""
        for p in reversed(self.products):
            if not p.into_a and _near(p.batch * p.m * p.k * p.item, size, p.batch):
                p.into_a = True
                return p.kernel(p.m, p.k, p.n)
            if not p.into_b and _near(p.batch * p.n * p.k * p.item, size, 1):
                p.into_b = True
                return p.kernel(p.n, p.k, p.m)
        return None

    def _attention(self, backward: bool) -> Kernel:
        assert self.layer is not None
        a, s = self.layer.attention, self.s
        b, n, t = s.batch, a.num_heads, s.seq
        pairs = t * t
        if not self.masked and a.position != "alibi":
            seen = t if a.sliding_window is None else min(t, a.sliding_window)
            pairs = seen * t - seen * (seen - 1) // 2  # of queries and keys, the causal half or the window's band
        flops = 2 * b * n * pairs * (a.head_dim + a.value_head_dim)
        family = "cudnn" if self.kernel == "cudnn" else "flash"
        item = self.item
        queries = b * t * n * (a.head_dim + a.value_head_dim) * item
        keys = b * t * a.num_key_value_heads * (a.head_dim + a.value_head_dim) * item
        if backward:  # the gradient of the output, all operands again, three gradients; dq summed in float32
            flops, nbytes = int(_BACKWARD_PRODUCTS * flops), 2 * (queries + keys) + 2 * 4 * b * n * t * a.head_dim
            return Kernel(ATTENTION, flops, nbytes, m=t, form=f"{family} backward")
        return Kernel(ATTENTION, flops, queries + keys, m=t, form=f"{family} forward")


def _near(expected: int, size: int, batch: int) -> bool:
    """Whether the sizes are equal, up to experts' shares that were rounded up."""
    return expected == size if batch == 1 else size <= expected < size * (1 + 1 / 2)


def _read(label: str, size: int, before: list[int]) -> int:
    """Bytes that an elementwise op reads for an output of `size` bytes."""
    if label in _CASTS:
        for earlier in reversed(before[-_LOOK_BACK:]):
            if earlier in (2 * size, size // 2):
                return earlier
        return 2 * size if label in _WIDENED else size
    if label in _REDUCTIONS:
        return before[-1] if before else size
    return int(_READS.get(label, 1.0) * size)


# --- the stretches of a step ---------------------------------------------------------------------------------------


def micro_step(run: Run) -> list[Section]:
    """Forward and backward of one micro-step, section by section in their order; layers that are alike share theirs."""
    pieces, played = run.play(again=False)
    made: dict[int, tuple[Section, Section]] = {}
    for i, piece in enumerate(pieces):
        if id(piece) not in made:
            layer = run.architecture.kinds[run.architecture.order[i]]
            made[id(piece)] = _layer(run, piece, layer, run.layers[i])
    start, loss, back = _around(run, played)
    forward = [made[id(piece)][0] for piece in pieces]
    backward = [made[id(piece)][1] for piece in reversed(pieces)]
    return [start, *forward, *loss, *backward, back]


def _layer(run: Run, piece: Piece, layer: Layer, held: Held) -> tuple[Section, Section]:
    reader = _Reader(run, held, layer)
    ahead = reader.read(piece.forward, piece.sizes, piece.labels, piece.scopes)
    grads = reader.read(piece.backward, piece.sizes, piece.labels, piece.scopes)
    names = [piece.labels[e >> 1] for e in piece.forward if not e & 1]
    back_names = [piece.labels[e >> 1] for e in piece.backward if not e & 1]
    again = _recomputed(names, back_names) if run.settings.checkpointing else range(0)
    forward, backward = Section("forward, layers"), Section("backward, layers", checkpoints=min(1, len(again)))
    forward.checkpoints = backward.checkpoints
    _called(forward, ahead, names)
    _called(backward, [grads[i] for i in again], [back_names[i] for i in again])
    inside = set(again)
    for i, kernel in enumerate(grads):
        if i not in inside:
            _node(backward, kernel, back_names[i])
    _add(backward, piece.added)
    return forward, backward


def _add(section: Section, added: Sequence[int]) -> None:
    """Adds gradients that are summed in place: two read, one written."""
    section.kernels.update(Kernel(ELEMENTWISE, 0, 3 * nbytes) for nbytes in added)
    section.backward_ops += len(added)


def _recomputed(forward: Sequence[str], backward: Sequence[str]) -> range:
    """Where in `backward` the forward is played again: the longest run of the same labels."""
    best = range(0)
    for at in range(len(backward)):
        n = 0
        while n < len(forward) and at + n < len(backward) and backward[at + n] == forward[n]:
            n += 1
        if n > len(best):
            best = range(at, at + n)
    return best


def _called(section: Section, kernels: Sequence[Kernel | None], labels: Sequence[str]) -> None:
    """Adds what Python calls."""
    found = [kernel for kernel in kernels if kernel is not None]
    section.kernels.update(found)
    section.forward_ops += len(found)
    section.products_4bit += labels.count("weight, dequantised")


def _node(section: Section, kernel: Kernel | None, label: str) -> None:
    """Adds what a node of autograd runs."""
    if kernel is not None:
        section.kernels[kernel] += 1
        section.backward_ops += 1
        section.dequantised += label == "weight, dequantised"


def _around(run: Run, played: Around) -> tuple[Section, tuple[Section, Section], Section]:
    """What comes before the layers, between their forward and backward, and after it."""
    tape, (start, left, back) = played.tape, played.split
    reader = _Reader(run, run.outer, None)
    sections = []
    for name, begin, end, python in (
        ("forward, embeddings", 0, start, True),
        ("loss, forward", start, left, True),
        ("loss, backward", left, back, False),
        ("backward, embeddings", back, len(played.events), False),
    ):
        section = Section(name)
        events = played.events[begin:end]
        kernels = reader.read(events, tape.sizes, tape.labels, tape.scopes)
        labels = [tape.labels[e >> 1] for e in events if not e & 1]
        if python:
            _called(section, kernels, labels)
        else:
            for kernel, label in zip(kernels, labels, strict=True):
                _node(section, kernel, label)
        sections.append(section)
    first, loss, loss_back, last = sections
    _add(loss_back, tape.added)
    if run.trainer is TRL:
        _tiles(run, loss, loss_back)
    return first, (loss, loss_back), last


def _tiles(run: Run, forward: Section, backward: Section) -> None:
    """trl's head: each tile of logits is a product, read by a Triton kernel; backward makes it again, and two more.

    trl/kernels/chunked_logprob.py: the tile is read for the sums; in backward it is read and written as its gradient,
    and the gradients of hidden states and head are added up in float32, each read and written for every tile.
    """
    s, a = run.settings, run.architecture
    n, h, v = s.batch * (s.seq - 1), a.hidden_size, a.vocab_size
    head = run.outer.projections[a.output.name].weight
    item = ITEMSIZE[s.autocast or s.weights_dtype]
    for at in range(0, n, trl.TOKENS):
        rows = min(trl.TOKENS, n - at)
        for start in range(0, v, trl.VOCABULARY):
            columns = min(trl.VOCABULARY, v - start)
            tile = _Product(1, rows, columns, h, item)
            made, nbytes = tile.kernel(rows, columns, h), rows * columns * item
            for section in (forward, backward):
                section.kernels[made] += 1
            forward.kernels[Kernel(LOSS, 0, nbytes)] += 1
            backward.kernels[Kernel(LOSS, 0, 2 * nbytes)] += 1
            backward.kernels[tile.kernel(rows, h, columns)] += 1
            backward.kernels[Kernel(LOSS, 0, 10 * rows * h)] += 1
            forward.forward_ops += 2
            backward.backward_ops += 4
            if head.requires_grad:
                backward.kernels[tile.kernel(columns, h, rows)] += 1
                backward.kernels[Kernel(LOSS, 0, 10 * columns * h)] += 1
                backward.backward_ops += 2


def summed_gradients(run: Run) -> Section:
    """What a micro-step adds to those before it: each gradient in place, two read and one written."""
    section = Section("gradients, summed")
    _add(section, [run.program.sizes[g] for g in run.first_micro_step.grads])
    return section


# --- clipping and the optimizer ------------------------------------------------------------------------------------

# How often a step goes over all parameters, and how many tensors of their size and dtype it reads and writes in all.
# foreach runs one kernel a statement (torch/optim/adam.py: lerp_ 3, mul_ 2, addcmul_ 3, sqrt 2, div_ 2, add_ 2,
# addcdiv_ 4; rmsprop.py: mul_ 2, addcmul_ 3, sqrt 2, add_ 2, addcdiv_ 4; adagrad.py: addcmul_ 3, sqrt 2, add_ 2, mul 2,
# addcdiv_ 4), fused one: weight, gradient and two states read, all but the gradient written.
_PASSES = {
    "adamw_torch": (7, 18),
    "adamw_torch_fused": (1, 7),
    "rmsprop": (5, 13),
    "adagrad": (5, 13),
    "sgd": (1, 3),
}
# transformers/optimization.py, Adafactor.step, tensor by tensor: statements, and bytes an element in float32.
_ADAFACTOR = (30, 102)


def update(run: Run) -> list[Section]:
    """Clipping and the optimizer's step: what moves is gradients, weights and states."""
    gradients, tensors = run.gradient_bytes, len(run.parameters)
    clipping = Section(CLIPPING, tensors=tensors)  # clip_grad.py: read for the norm, read and written for the factor
    clipping.kernels[Kernel(CLIPPING, 0, gradients)] += 1
    clipping.kernels[Kernel(CLIPPING, 0, 2 * gradients)] += 1
    made, singly = run.optimizer, 0
    section = Section(OPTIMIZER, tensors=tensors, by=made.name)
    if made.implementation == "bnb":  # one kernel a tensor: states read and written
        launches, nbytes = tensors, 3 * gradients + 2 * (run.state_bytes + run.paged_bytes)
        singly = quantised(run)
    elif made.implementation == "single":
        launches = _ADAFACTOR[0] * tensors
        nbytes = _ADAFACTOR[1] * sum(p.numel for p in run.parameters)
    else:
        launches, passes = _PASSES[made.name]
        nbytes = passes * gradients
    section.kernels[Kernel(OPTIMIZER, 0, nbytes // launches, singly // launches)] += launches
    return [clipping, section]


def quantised(run: Run) -> int:
    """Elements of states in 8 bit: each is looked up in a table, and its nearest entry searched for, one by one.

    Small tensors and embeddings keep 32 bits (optimizer.py).
    """
    times = sum(state.times for state in run.optimizer.states if state.dtype == "uint8")
    modules = run.architecture.embeddings
    tables = {f"{m.name}.{w.name}" for m in modules if m.kind == "embedding" for w in m.weights}
    large = (p.numel for p in run.parameters if p.numel >= optimizer.LEAST_8BIT and p.name not in tables)
    return times * sum(large) if times else 0
