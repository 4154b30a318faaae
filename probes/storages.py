"""Sees the memory of a model that runs without memory: which op makes each storage, and when the storage dies.

`Storages` is a dispatch mode. Every op that would reach a kernel passes through it; torch's FakeTensorMode says what
comes out of the op, and no kernel runs. Each storage that comes out for the first time is an allocation. A weak
reference tells when it dies: when the last tensor on it goes, those that autograd saved included.

Ops of one kind on arguments of one kind give results of one kind, so FakeTensorMode is asked once for each: a model of
many layers is traced four times as fast.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_DEVICE = torch.ops.prim.device.default


class _Result(NamedTuple):
    """One result of an op: the argument `of` itself, a view of its storage, or (`of` is -1) a storage of its own."""

    of: int
    itself: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Storages(TorchDispatchMode):  # type: ignore[misc]
    """Events of storages as planner/paper.py has them: `2 * id` for a birth, `2 * id + 1` for a death.

    `labels` name the op, with the node that called it in backward; `scopes` the module whose forward called it, or made
    the node. `instead` has what runs in the place of an op: `instead[op](storages, op, args, kwargs)`.
    """

    def __init__(self, instead: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.labels: list[str] = []
        self.scopes: list[str] = []
        self.phases: list[tuple[int, str]] = []  # position in the events, name
        self.saved: set[int] = set()  # made in a forward or its recomputation, died in backward
        self._in_forward: list[bool] = []
        self._instead = instead
        self._uncounted = False
        self._template: dict[str, Any] | None = None
        self._known: dict[Any, tuple[type, list[_Result]] | None] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], int | None]] = {}  # by the storage's address
        self.head = ""
        self.paged_bytes = 0
        self.backward = False  # whether loss.backward() runs
        self.outside = ""  # the scope where no module runs
        self._layers: dict[str, int] = {}
        self._layer = ""  # the one that is recomputed, or was last
        self._inside: dict[str, int | None] = {}  # a module's layer
        # Which module made the nodes from which autograd sequence number on.
        self._running: list[str] = []
        self._from: list[int] = [0]
        self._makers: list[str] = [""]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each op would pass through a wrapper of torch.compile's

    # --- ops ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        instead = self._instead.get(func)
        if instead is not None:
            return instead(self, func, args, kwargs or {})
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op's results, without running it."""
        tensors: list[Any] = []
        try:
            key = (func, _signature(args, tensors), _signature(tuple(kwargs.items()), tensors) if kwargs else None)
            known = self._known.get(key)
        except _HasValues:
            known = key = None
        if known is not None:
            kind, results = known
            made = [self._make(result, tensors, func) for result in results]
            return made[0] if kind is torch.Tensor else None if kind is type(None) else kind(made)
        with self.fake:
            out = func(*args, **(kwargs or {}))
        self.see(out, str(func))
        if key is not None and torch.Tag.inplace_view not in func.tags:
            described = _described(out, tensors)
            if described is not None:
                self._known[key] = described
        return out

    def _make(self, result: _Result, tensors: list[Any], func: Any) -> Any:
        if result.itself:
            return tensors[result.of]
        if result.of >= 0:
            storage = tensors[result.of].untyped_storage()
            empty = torch.empty(0, dtype=result.dtype, device="meta")
            empty.set_(storage, result.offset, result.shape, result.stride)
            return self._faked(empty)
        empty = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
        self._born(empty.untyped_storage(), func)
        return self._faked(empty)

    def _faked(self, meta: Any) -> Any:
        """What FakeTensor(self.fake, meta, "cpu") gives, in a third of the time."""
        if self._template is None:
            self._template = FakeTensor(self.fake, torch.empty(1, device="meta"), _CPU).__dict__
        made = torch.Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU)
        made.__dict__.update(self._template)
        return made

    # --- storages -----------------------------------------------------------------------------------------------

    def see(self, out: Any, label: str) -> None:
        """Takes note of the storages that are new among `out`'s."""
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage._cdata not in self._alive:
                self._born(storage, label)
        elif isinstance(out, list | tuple):
            for each in out:
                self.see(each, label)

    def _born(self, storage: Any, label: object) -> None:
        nbytes, key = storage.nbytes(), storage._cdata
        if not nbytes:
            return
        name = None if self._uncounted else self._new(nbytes, str(label))

        def died(_: object) -> None:
            del self._alive[key]
            if name is not None:
                self.events.append(2 * name + 1)
                if self._in_forward[name] and self.in_backward:
                    self.saved.add(name)

        self._alive[key] = (weakref.ref(storage, died), name)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """New storages are not the GPU's, or known to be counted otherwise."""
        before, self._uncounted = self._uncounted, True
        try:
            yield
        finally:
            self._uncounted = before

    def _new(self, nbytes: int, label: str) -> int:
        name = len(self.sizes)
        scope = self.outside
        if self._running:
            scope = self._running[-1]
        elif self.backward and not self.in_backward:
            scope = self._layer
        elif (node := torch._C._current_autograd_node()) is not None:
            scope = self._makers[bisect_right(self._from, node._sequence_nr()) - 1]
            label = f"{label} ({node.name()})"
            layer = self._layer_of(scope)
            if layer is not None:
                self.phase(f"backward, layer {layer}")
        self._in_forward.append(bool(self._running) or (self.backward and not self.in_backward))
        self.sizes.append(nbytes)
        self.labels.append(label)
        self.scopes.append(scope)
        self.events.append(2 * name)
        return name

    def keep(self, nbytes: int, label: str) -> int:
        """Memory that no tensor holds and that stays, such as a workspace; its id."""
        return self._new(nbytes, label)

    def moment(self, nbytes: int, label: str) -> None:
        """Memory that a kernel takes and gives back while it runs."""
        if nbytes > 0:
            self.events.append(2 * self._new(nbytes, label) + 1)

    def valued(self, real: torch.Tensor, label: str) -> Any:
        """A fake tensor that knows its values, so that what is computed from it alone has values too."""
        tensor = self.fake.fake_tensor_converter.from_real_tensor(self.fake, real, make_constant=True)
        self.see(tensor, label)
        return tensor

    def twin(self, name: int) -> int:
        """One more id for memory of the same kind."""
        known: Any
        for known in (self.sizes, self.labels, self.scopes, self._in_forward):
            known.append(known[name])
        return len(self.sizes) - 1

    def inside(self, taken: Iterable[tuple[int, int, str]]) -> None:
        """Memory that a kernel takes and gives back: events with bytes and names."""
        held: dict[int, int] = {}
        for event, nbytes, label in taken:
            if event & 1:
                self.events.append(2 * held.pop(event >> 1) + 1)
            else:
                held[event >> 1] = self._new(nbytes, label)

    @property
    def in_backward(self) -> bool:
        """Whether autograd's engine runs a node; not while a checkpointed layer is recomputed."""
        return self.backward and not torch.is_grad_enabled()

    def living(self) -> set[int]:
        """The ids of what is alive."""
        return {name for _, name in self._alive.values() if name is not None}

    def id_of(self, tensor: Any) -> int | None:
        """The id of a tensor's storage; None where it is not counted."""
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    # --- modules ------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self, model: Any, layers: Sequence[Any]) -> Iterator[None]:
        """Scopes are the names of this model's modules, and phases go by its `layers`."""
        names = {module: name for name, module in model.named_modules()}
        self._layers = {names[layer]: i for i, layer in enumerate(layers)}
        head = model.get_output_embeddings()
        self.head = names.get(head, "")

        def enter(module: Any, _: Any) -> None:
            name = names.get(module, "")
            if not self._running and self.backward:  # a layer's forward is recomputed, not its __call__
                self._layer = name
                while self._layer and self._layer not in self._layers:
                    self._layer = self._layer.rpartition(".")[0]
            self._running.append(name)
            self._note(name)
            layer = self._layer_of(name)
            if layer is not None:
                self.phase(f"{'backward' if self.backward else 'forward'}, layer {layer}")

        def leave(module: Any, *_: Any) -> None:
            name = self._running.pop()
            if module is head and self._running:
                self._running[-1] = HEAD
            self._note(self._running[-1] if self._running else self._layer)
            if self._layers.get(name) == len(self._layers) - 1 and not self.backward:
                self.phase("loss, forward")

        hooks = torch.nn.modules.module
        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer_of(self, name: str) -> int | None:
        if name not in self._inside:
            above = name.rpartition(".")[0]
            self._inside[name] = self._layers.get(name, self._layer_of(above) if above else None)
        return self._inside[name]

    def _note(self, name: str) -> None:
        self._from.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(name)

    def phase(self, name: str) -> None:
        """What follows belongs to `name`."""
        if not self.phases or self.phases[-1][1] != name:
            self.phases.append((len(self.events), name))


HEAD = "head and loss"  # the scope of what the model does after its head
_CPU = torch.device("cpu")


class _HasValues(Exception):
    """A tensor among an op's arguments has values, so that its results may have some too."""


def _signature(values: Any, tensors: list[Any]) -> Any:
    """What an op's results depend on; appends the tensors among `values`. Raises _HasValues."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if not isinstance(value, FakeTensor) or value.constant is not None:
                raise _HasValues
            tensors.append(value)
            found.append((value.shape, value.stride(), value.storage_offset(), value.dtype))
        elif isinstance(value, list | tuple):
            found.append(_signature(value, tensors))
        else:
            found.append((type(value), value))  # 2 and 2.0 are equal, and give other dtypes
    return tuple(found)


def _described(out: Any, tensors: list[Any]) -> tuple[type, list[_Result]] | None:
    """What `_make` needs to give the same results again; None where it cannot."""
    if isinstance(out, torch.Tensor):
        kind, flat = torch.Tensor, [out]
    elif isinstance(out, list | tuple) or out is None:
        kind, flat = type(out), list(out or ())
    else:
        return None
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    results, fresh = [], set()
    for each in flat:
        if not isinstance(each, FakeTensor) or each.constant is not None or each.is_sparse:
            return None
        itself = next((i for i, tensor in enumerate(tensors) if tensor is each), -1)
        address = each.untyped_storage()._cdata
        of = itself if itself >= 0 else storages.index(address) if address in storages else -1
        if (of < 0 and address in fresh) or each.device.type != "cpu":
            return None
        fresh.add(address)
        results.append(
            _Result(of, itself >= 0, tuple(each.shape), each.stride(), int(each.storage_offset()), each.dtype)
        )
    return kind, results
