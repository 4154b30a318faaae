"""Paper tensors: what PyTorch allocates, saves for backward and frees, without any values.

A training step is played by running the same statements as the real code on tensors that have a shape, a dtype
and a storage, and nothing else. A storage writes an event when it is made and another when the last reference to
it goes: Python's own reference counting frees a paper tensor at the statement where it frees a real one. Autograd
is played too: nodes hold what they save, and `backward` runs them in the order of PyTorch's engine (highest
sequence number first, gradients of one input added up on the way).

Events are integers, `2 * id` for an allocation and `2 * id + 1` for a free; `sizes`, `labels` and `scopes` are
looked up by id. Sizes are the bytes asked for; rounding is the allocator's business (allocator.py).

Sources: torch/csrc/autograd/engine.cpp (order of nodes, release of saved variables),
torch/csrc/autograd/input_buffer.cpp (sums in place when nobody else holds the gradient),
torch/csrc/autograd/functions/accumulate_grad.h (a parameter's first gradient is kept, not copied),
aten/src/ATen/autocast_mode.cpp (which casts are cached), torch/utils/checkpoint.py (non-reentrant recomputation).
"""

from __future__ import annotations

import heapq
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Shape = tuple[int, ...]
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


class Multiprocessors(NamedTuple):
    """What of the GPU decides how many thread blocks share a sum; the defaults are the H200's."""

    number: int = 132
    threads: int = 2048  # of one multiprocessor (CUDA C++ Programming Guide, technical specifications)


H200 = Multiprocessors()


class Tape:
    """The events of one stretch of a step, and the modes it runs in (autocast, gradients, recomputation)."""

    __slots__ = (
        "added", "autocast", "cache", "events", "frame", "grad", "labels", "marks", "multiprocessors", "saved",
        "saves_inputs", "scope", "scopes", "seq", "sizes",
    )  # fmt: skip

    def __init__(
        self, autocast: str | None = None, multiprocessors: Multiprocessors = H200, *, grad: bool = True
    ) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.labels: list[str] = []
        self.scopes: list[str] = []
        self.saved: set[int] = set()  # ids of storages that a node saved for backward
        self.autocast = autocast
        self.cache: dict[int, Tensor] = {}  # autocast's casts of float32 parameters, kept until it ends
        self.grad = grad  # torch.is_grad_enabled; off from the start, the model is in evaluation mode
        self.frame: Frame | None = None  # the checkpointed call that is running, if one is
        self.scope = ""
        self.seq = 0
        self.multiprocessors = multiprocessors
        self.added: list[int] = []  # bytes of gradients that another was added to in place
        self.saves_inputs = False  # of linear layers whose weight is not trained too (blocks.py, Settings)
        self.marks: dict[str, int] = {}  # how many events there were where a module began or ended (`mark`)

    def new(self, shape: Shape, dtype: str, label: str, merged: bool = False) -> Tensor:
        """A fresh tensor of `shape`; `label` says which op made it, `merged` how it lies in memory (Tensor)."""
        out = Tensor(Storage(self, prod(shape) * ITEMSIZE[dtype], label), shape, dtype)
        out.merged = merged
        return out

    def boundary(self, x: Tensor, name: str) -> Tensor:
        """`x` as it enters or leaves a module; notes where in the events that is, and where its gradient comes by."""
        self.marks[name] = len(self.events)

        def backward(grads: list[Tensor | None], _: list[Tensor | None]) -> list[Tensor | None]:
            self.marks[f"{name}, backward"] = len(self.events)
            return list(grads)

        out = Tensor(x.storage, x.shape, x.dtype)
        out.merged = x.merged
        out.node = self.node((x,), backward)
        return out

    def moment(self, nbytes: int, label: str) -> None:
        """Memory that a kernel needs only while it runs: taken and given back at once."""
        if nbytes > 0:
            Storage(self, nbytes, label)

    def end_autocast(self) -> None:
        """Leaves autocast: the cached casts of parameters go (autocast_mode.cpp, clear_cache)."""
        for key in list(self.cache):
            del self.cache[key]

    def node(
        self,
        inputs: Sequence[Tensor | Parameter | None],
        backward: Callable[..., Sequence[Tensor | None]],
        saved: Sequence[Tensor | None] = (),
        outputs: int = 1,
        fits: Sequence[tuple[Shape, str]] = (),
    ) -> Node | None:
        """A backward node, or None where no input needs a gradient. `saved` stands in the order of release.

        `fits` gives the shape and dtype of each input where the gradients may come in others.
        """
        if not self.grad:
            return None
        edges = [None if i is None else i.edge() for i in inputs]
        if not any(edges):
            return None
        self.seq += 1
        kept = list(saved)
        if self.frame is not None and any(t is not None for t in kept):
            return self.frame.node(self, edges, backward, kept, outputs, fits)
        return Node(self.seq, edges, backward, self.mark(kept), outputs, fits=fits)

    def mark(self, kept: list[Tensor | None]) -> list[Tensor | None]:
        """Remembers that these storages are held for backward; returns them."""
        for i, tensor in enumerate(kept):
            if tensor is not None:
                kept[i] = tensor.detach()  # as SavedVariable: the memory, not the history
                if tensor.storage is not None:
                    self.saved.add(tensor.storage.id)
        return kept


class Storage:
    """Bytes that are allocated now and freed when nothing refers to them any longer."""

    __slots__ = ("holders", "id", "tape")

    def __init__(self, tape: Tape, nbytes: int, label: str) -> None:
        self.tape = tape
        self.holders = 0  # gradients on this storage that wait for their node
        self.id = len(tape.sizes)
        tape.sizes.append(nbytes)
        tape.labels.append(label)
        tape.scopes.append(tape.scope)
        tape.events.append(2 * self.id)

    def __del__(self) -> None:
        self.tape.events.append(2 * self.id + 1)


class Tensor:
    """A shape and a dtype on a storage; `storage` is None for memory that this tape does not manage.

    `merged` tells the two layouts apart that attention's [B, N, T, D] comes in: True where it lies in memory as
    [B, T, N, D], so that the heads of a token are one row and a view makes them one again.
    """

    __slots__ = ("alias", "dtype", "merged", "node", "nr", "shape", "storage")

    def __init__(
        self, storage: Storage | None, shape: Shape, dtype: str, node: Node | None = None, nr: int = 0
    ) -> None:
        self.alias = False  # a gradient that is a view of another: never added to in place
        self.merged = False
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.node = node
        self.nr = nr

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def edge(self) -> tuple[Node, int] | None:
        """Where its gradient goes: the node that made it and which of its outputs it is."""
        return None if self.node is None else (self.node, self.nr)

    def view(self, *shape: int) -> Tensor:
        """The same memory under another shape; its gradient needs no memory of its own."""
        return Tensor(self.storage, shape, self.dtype, self.node, self.nr)

    def aliased(self) -> Tensor:
        """Itself, marked as a view of another gradient."""
        self.alias = True
        return self

    def detach(self) -> Tensor:
        """The same memory without its history."""
        out = Tensor(self.storage, self.shape, self.dtype)
        out.merged = self.merged
        return out

    @property
    def one_row(self) -> bool:
        """Whether the heads [B, N, T, D] of a token lie side by side, so that merging them needs no copy."""
        return self.merged or self.shape[1] == 1 or self.shape[2] == 1


class Parameter:
    """A weight: memory that outlives the step, with the gradient that backward leaves on it."""

    __slots__ = ("dtype", "grad", "name", "node", "requires_grad", "shape")

    def __init__(self, name: str, shape: Shape, dtype: str, requires_grad: bool, grad: Tensor | None = None) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.requires_grad = requires_grad
        self.grad = grad
        self.node: Node | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def edge(self) -> tuple[Node, int] | None:
        """The node that adds to its gradient; None for a frozen weight."""
        if not self.requires_grad:
            return None
        if self.node is None:
            self.node = Node(ACCUMULATE, [], self._accumulate, [])
        return (self.node, 0)

    def _accumulate(self, grads: list[Tensor | None], _: list[Tensor | None]) -> Sequence[Tensor | None]:
        grad = grads[0]
        if self.grad is None and grad is not None:
            self.grad = grad if grad.storage is not None else None
            if grad.storage is not None:
                _rename(grad.storage, "gradient", self.name)
        return ()

    def tensor(self) -> Tensor:
        """The weight itself, as an op's operand: never freed by the step."""
        edge = self.edge()
        return Tensor(None, self.shape, self.dtype, edge[0] if edge else None)


ACCUMULATE = 1 << 62  # AccumulateGrad has the highest sequence number: it runs as soon as its gradient is there


class Node:
    """One backward function with its edges and what it saved."""

    __slots__ = ("backward", "edges", "fits", "frame", "outputs", "saved", "seq")

    def __init__(
        self,
        seq: int,
        edges: list[tuple[Node, int] | None],
        backward: Callable[..., Sequence[Tensor | None]],
        saved: list[Tensor | None],
        outputs: int = 1,
        frame: Frame | None = None,
        fits: Sequence[tuple[Shape, str]] = (),
    ) -> None:
        self.seq = seq
        self.edges = edges
        self.backward = backward
        self.saved = saved
        self.outputs = outputs
        self.frame = frame
        self.fits = fits


class Frame:
    """One call under torch.utils.checkpoint, non-reentrant: the first node that needs what it saved runs it again.

    The forward builds its graph with empty places for saved tensors; recomputation fills them in the same order and
    stops as soon as the last one is there (checkpoint.py, set_checkpoint_early_stop).
    """

    __slots__ = ("again", "autocast", "filled", "function", "input", "nodes", "unread")

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, autocast: str | None) -> None:
        self.function: Callable[[Tensor], Tensor] | None = function  # its other arguments are held with it
        self.input: Tensor | None = x
        self.autocast = autocast
        self.nodes: list[Node] = []
        self.again = False
        self.filled = 0
        self.unread = 0

    def node(
        self,
        tape: Tape,
        edges: list[tuple[Node, int] | None],
        backward: Callable[..., Sequence[Tensor | None]],
        kept: list[Tensor | None],
        outputs: int,
        fits: Sequence[tuple[Shape, str]],
    ) -> Node:
        """A node of the call: without its tensors the first time, handing them over when recomputed."""
        if not self.again:
            node = Node(tape.seq, edges, backward, [], outputs, self, fits)
            self.nodes.append(node)
            return node
        self.nodes[self.filled].saved = tape.mark(kept)
        self.filled += 1
        if self.filled == len(self.nodes):
            raise _Enough
        return Node(tape.seq, edges, backward, [], outputs)

    def recompute(self, tape: Tape) -> None:
        """Runs the call again, in the modes of its first run."""
        assert self.function is not None
        assert self.input is not None
        self.again, self.unread = True, len(self.nodes)
        before = (tape.frame, tape.grad, tape.autocast, tape.cache, tape.scope)
        tape.frame, tape.grad, tape.autocast, tape.cache = self, True, self.autocast, {}
        try:
            self.function(self.input)
        except _Enough:
            pass
        finally:
            tape.end_autocast()
            tape.frame, tape.grad, tape.autocast, tape.cache, tape.scope = before

    def done(self) -> None:
        """One of its nodes has run; after the last, the call is let go: first its keyword arguments, then its input."""
        self.unread -= 1
        if not self.unread:
            self.function = None
            self.input = None
            self.nodes = []


class _Enough(Exception):
    """Recomputation has delivered every saved tensor."""


def checkpoint(tape: Tape, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs `function` on `x` without keeping what its nodes save; backward runs it once more."""
    frame = Frame(function, x, tape.autocast)
    before, tape.frame = tape.frame, frame
    out = function(x)
    tape.frame = before
    return out


def _rename(storage: Storage, label: str, scope: str) -> None:
    storage.tape.labels[storage.id] = label
    storage.tape.scopes[storage.id] = scope


def _sum(tape: Tape, old: Tensor) -> Tensor:
    """Adds a second gradient to one that waits for its node: in place where nobody else holds that memory.

    A view made while gradients are off keeps its base, so that its storage has two holders (input_buffer.cpp,
    can_accumulate_inplace): such a gradient is added out of place.
    """
    if old.storage is not None and old.storage.holders == 1 and not old.alias:
        tape.added.append(old.nbytes)
        return old
    return tape.new(old.shape, old.dtype, "gradient sum", old.merged)


def _fitted(tape: Tape, grad: Tensor | None, shape: Shape, dtype: str) -> Tensor | None:
    """A gradient summed to its input's shape and cast to its dtype (engine.cpp, validate_outputs)."""
    if grad is None:
        return None
    if prod(shape) != grad.numel or len(shape) < len(grad.shape):  # of one row too: at::sum_to sums leading dimensions
        rows, columns = grad.numel // prod(shape), prod(shape)
        merged = grad.merged
        given, grad = grad, tape.new(shape, grad.dtype, "sum of a gradient", merged)
        if shape[-1] == given.shape[-1]:
            tape.moment(column_sum_bytes(rows, columns, tape.multiprocessors), "buffer of a sum")
        del given
    if grad.dtype != dtype:
        grad = tape.new(shape, dtype, "cast of a gradient", grad.merged)
    return grad


def column_sum_bytes(rows: int, columns: int, multiprocessors: Multiprocessors = H200) -> int:
    """The buffer in which thread blocks add up the columns of [rows, columns], 0 where one block does.

    aten/src/ATen/native/cuda/Reduce.cuh (setReduceConfig, global_memory_size) for outputs taken four at a time.
    """
    outputs = columns // 4
    if columns % 4 or not outputs:
        return 0
    width = min(_last_power_of_two(min(outputs, 128)), 32)
    height = min(_last_power_of_two(min(rows, 128)), 128 // width)
    if rows < 16 * height and rows < 256:
        return 0
    values = -(-rows // height)
    grid = -(-outputs // width)
    target = multiprocessors.number * (multiprocessors.threads // (width * height))
    if values < 256 or grid > target:
        return 0
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    return 4 * columns * blocks * width * 4 if blocks > 1 else 0


def _last_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _release(tensors: list[Tensor | None]) -> None:
    """Lets go of each in turn, the first first."""
    for i in range(len(tensors)):
        tensors[i] = None


def backward(tape: Tape, roots: list[tuple[Node, int, Tensor]], stops: Sequence[Node] = ()) -> list[Tensor | None]:
    """Runs the graph below `roots` (node, output number, its gradient); returns the gradients that reach `stops`.

    `roots` is emptied, so that this call holds the only reference to the gradients it starts from.
    """
    waiting: dict[int, int] = {}
    nodes: dict[int, Node] = {}
    stack = [root[0] for root in roots]
    while stack:
        node = stack.pop()
        if id(node) in nodes:
            continue
        nodes[id(node)] = node
        for edge in node.edges:
            if edge is not None:
                waiting[id(edge[0])] = waiting.get(id(edge[0]), 0) + 1
                stack.append(edge[0])
    stop_ids = {id(s) for s in stops}
    buffers: dict[int, list[Tensor | None]] = {}
    ready: list[tuple[int, int]] = []
    for node, nr, grad in roots:
        buffers.setdefault(id(node), [None] * node.outputs)[nr] = grad
        if grad.storage is not None:
            grad.storage.holders += 1
        if not waiting.get(id(node)):
            heapq.heappush(ready, (-node.seq, id(node)))
    roots.clear()
    del node, grad, stack
    was, tape.grad = tape.grad, False
    while ready:
        key = heapq.heappop(ready)[1]
        if key in stop_ids:
            continue
        node = nodes[key]
        grads = buffers.pop(key)
        for arrived in grads:
            if arrived is not None and arrived.storage is not None:
                arrived.storage.holders -= 1
        del arrived
        frame = node.frame
        if frame is not None and not frame.again:
            frame.recompute(tape)
        results = list(node.backward(grads, node.saved))
        # What nobody asked for goes with the function's locals; a gradient that the engine fits is an output still.
        for i, edge in enumerate(node.edges):
            if edge is None:
                results[i] = None
        # What went through checkpoint's hooks is handed out once, so it goes with the function's locals, the last
        # first; plain saved variables are released after the function and its gradients, and so is the recomputed
        # call, which those hooks hold (engine.cpp, evaluate_function).
        if frame is not None:
            node.saved.reverse()
            _release(node.saved)
        for i, (shape, dtype) in enumerate(node.fits):
            results[i] = _fitted(tape, results[i], shape, dtype)
        _release(grads)
        _release(node.saved)
        if frame is not None:
            frame.done()
        for i, edge in enumerate(node.edges):
            if edge is None:
                continue
            target, nr = edge
            slot = buffers.setdefault(id(target), [None] * target.outputs)
            result, results[i] = results[i], None
            if result is not None:
                old = slot[nr]
                if old is None:
                    slot[nr] = result
                    if result.storage is not None:
                        result.storage.holders += 1
                else:
                    slot[nr] = total = _sum(tape, old)
                    if total is not old:
                        old.storage.holders -= 1  # type: ignore[union-attr]
                        total.storage.holders += 1  # type: ignore[union-attr]
                    del total
                del old
            del result
            waiting[id(target)] -= 1
            if not waiting[id(target)]:
                heapq.heappush(ready, (-target.seq, id(target)))
        node.edges = []
    tape.grad = was
    answer: list[Tensor | None] = []
    for stop in stops:
        got = buffers.pop(id(stop), None)
        answer.append(got[0] if got else None)
    return answer
