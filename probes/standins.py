"""What stands in for CUDA while a model runs on fake tensors: the only place where a trace is not the real code.

Fake tensors are CPU tensors here. torch cannot run backward for fake "cuda" tensors in a build without CUDA (autograd
asks the accelerator for its stream), and a trace must be the same on every machine. So where torch, bitsandbytes or
transformers choose by device, the choice that they make on CUDA is put in its place:

- autocast: the CPU's list of ops that run in float32 is shorter, and it casts what is concatenated. CUDA's lists are
  read from the header that torch ships (ATen/autocast_mode.h) and put into force; casts of weights and their cache are
  torch's own.
- dropout: CUDA has one op with a mask of one byte an element (aten/src/ATen/native/Dropout.cpp).
- softmax and log_softmax of float16 into float32: one op on CUDA (aten/src/ATen/native/SoftMax.cpp).
- scaled_dot_product_attention: the kernel that the planned GPU takes (planner/attention.py, choose). The kernels' own
  ops then run with torch's meta functions and gradients. What a kernel needs inside is added from planner/attention.py.
- flash_attention_2: the package is not needed; its function runs PyTorch's flash kernel, which saves the same.
- optimizers and clipping: lists of tensors at once (foreach), as on CUDA.
- bitsandbytes, matrix product with a 4-bit weight: its CUDA kernel's way (backends/cuda/ops.py, gemm_4bit), which for
  more than a few tokens dequantises the weight into a temporary (planner/few_tokens.py).
- bitsandbytes, paged optimizer states: memory that torch does not count.
- cuBLAS: a workspace with a thread's first matrix product, which the thread keeps; copies of operands.
- a gradient added to another that nobody else holds, the gradient of an index, and the mask of composite attention: in
  place, which torch does not do with fake tensors (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace;
  FunctionsManual.cpp, index_backward; areAnyTensorSubclassLike).
- softmax's backward and sums over rows: what their kernels take inside (planner/paper.py, column_sum_bytes).
- tensors made from Python numbers (torch.tensor) are host memory, as they are where no device is named.
- a float that is read off the GPU (Tensor.item) is 1.0.
- "is this a fake tensor?": no, or transformers would build masks that it leaves out of a real run. For this token
  rows and positions have values, and so has what is computed from them alone.
"""

from __future__ import annotations

import re
import sys
import types
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.machinery import ModuleSpec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vramplan.planner import attention, few_tokens, paper
from vramplan.planner.optimizer import LEAST_PAGED, reduction_buffers
from vramplan.probes.storages import Storages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vramplan.planner.device import Device

aten = torch.ops.aten
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TORCH = (int(torch.__version__.split(".")[0]), int(torch.__version__.split(".")[1]))
_VALUES = 2**20  # of a tensor at most, where they are kept
_CUBLASLT_BYTES = 2**20
WORKSPACE = "cuBLAS workspace"
_in_math: list[bool] = []  # not empty while composite attention runs


@contextmanager
def in_place_of_cuda(on: Device) -> Iterator[Mapping[Any, Callable[..., Any]]]:
    """The stand-ins in force; gives those of ops, for `Storages`."""
    with ExitStack() as stack:
        for target, name, new in (
            (transformers.utils.import_utils, "is_fake_tensor", lambda *_: False),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (sys.modules["torch.optim.optimizer"], "_get_foreach_kernels_supported_devices", lambda: ["cpu"]),
            (torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"]),
            (sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [fake_tensor.FakeTensor]),
            (torch.utils._foreach_utils, "_foreach_supported_types", [fake_tensor.FakeTensor]),
            (transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True),
            (transformers.modeling_flash_attention_utils, "is_flash_attn_2_available", lambda *_, **__: True),
            (torch.utils.checkpoint.DefaultDeviceType, "_default_device_type", "cuda"),  # whose autocast it restores
            (fake_tensor, "CONSTANT_NUMEL_LIMIT", _VALUES),
        ):
            if hasattr(target, name):
                stack.enter_context(mock.patch.object(target, name, new))
        for name, module in _flash_attn().items():  # patch.dict would forget what is imported meanwhile
            before = sys.modules.get(name)
            sys.modules[name] = module
            stack.callback(_put_back, name, before)
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        _autocast_as_cuda(library)
        library.impl("scaled_dot_product_attention", partial(_attention, on), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("softmax.int", partial(_softmax, aten._softmax), "AutogradCPU")
        library.impl("log_softmax.int", partial(_softmax, aten._log_softmax), "AutogradCPU")
        if "bitsandbytes" in sys.modules:
            optimizers = sys.modules["bitsandbytes"].optim.optimizer.Optimizer8bit
            stack.enter_context(mock.patch.object(optimizers, "get_state_buffer", _paged))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield _instead(on)


# ----------------------------------------------------------------------------------------------------------- autocast


@cache
def _lists() -> dict[str, list[Any]]:
    """CUDA's lists of ops: in float32; in float32 unless a dtype is asked for; in the widest dtype among arguments."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text(encoding="utf-8")
    found = {}
    for name in ("FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        macro = re.search(rf"#define AT_FORALL_{name}\(_\)((?:.*\\\n)*.*)", header)
        assert macro
        entries = re.findall(r"_\((\w+)(?:, (\w+))?\)", macro[1])
        found[name] = [getattr(getattr(aten, op), overload or "default") for op, overload in entries]
    return found


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _autocast_as_cuda(library: Any) -> None:
    lists = _lists()
    for op in lists["FP32"]:
        library.impl(op, partial(_in_float32, op), "AutocastCPU", allow_override=True)
    for op in lists["FP32_SET_OPT_DTYPE"]:
        at = [argument.name for argument in op._schema.arguments].index("dtype")
        library.impl(op, partial(_into_float32, op, at), "AutocastCPU", allow_override=True)
    for op in lists["PROMOTE"]:
        library.impl(op, partial(_in_widest, op), "AutocastCPU", allow_override=True)
    for op in (aten.cat.default, aten.stack.default, aten.index_copy.default):  # the CPU's list alone has these
        library.impl(op, partial(_as_given, op), "AutocastCPU", allow_override=True)


def _eligible(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype) for each in value)
    return value.to(dtype) if _eligible(value) else value


def _as_given(op: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(*args, **kwargs)


def _in_float32(op: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(*_cast(args, torch.float32), **{name: _cast(value, torch.float32) for name, value in kwargs.items()})


def _into_float32(op: Any, at: int, *args: Any, **kwargs: Any) -> Any:
    given = args[at] if len(args) > at else kwargs.get("dtype")
    if given is None and _eligible(args[0]):
        if len(args) > at:
            args = (*args[:at], torch.float32, *args[at + 1 :])
        else:
            kwargs = {**kwargs, "dtype": torch.float32}
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(*args, **kwargs)


def _in_widest(op: Any, *args: Any, **kwargs: Any) -> Any:
    given = [*args, *kwargs.values()]
    flat = [t for each in given for t in (each if isinstance(each, list | tuple) else (each,)) if _eligible(t)]
    wide = torch.float32 if any(t.dtype == torch.float32 for t in flat) else None
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if wide is not None:
            args, kwargs = _cast(args, wide), {name: _cast(value, wide) for name, value in kwargs.items()}
        return op(*args, **kwargs)


# ---------------------------------------------------------------------------------------------- ops of the model


def _dropout(x: Any, p: float, train: bool) -> Any:
    if not train or p == 0 or not x.numel():
        return x
    return aten.native_dropout(x, p, train)[0] if p < 1 else x * torch.zeros((), dtype=x.dtype)


def _softmax(op: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    if x.dtype == torch.float16 and dtype == torch.float32:
        return op(x, dim, True)
    return op(x if dtype is None else x.to(dtype), dim, False)


def _attention(
    on: Device, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """aten/src/ATen/native/transformers/attention.cpp, scaled_dot_product_attention."""
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:  # convert_boolean_attn_mask
        bias = torch.where(bias, 0.0, torch.full((), float("-inf"), dtype=q.dtype))
    kernel = attention.choose(
        on.capability, *map(_on_paper, (q, k, v)), masked=bias is not None, grouped=enable_gqa, first=on.kernel,
        dropout=dropout_p, torch=_TORCH,
    )  # fmt: skip
    if kernel == "math":
        _in_math.append(True)
        try:
            return aten._scaled_dot_product_attention_math(
                q, k, v, bias, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        finally:
            _in_math.pop()
    needs_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, needs_sums, dropout_p, is_causal, False, scale=scale
        )[0]
    width = q.shape[-1]
    if kernel == "flash":
        scale = width**-0.5 if scale is None else scale
        if width % 8:  # pad_last_dim
            q, k, v = (torch.nn.functional.pad(x, (0, 8 - width % 8)) for x in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if width % 8 else out
    if bias is not None:  # preprocess_mask
        if bias.shape[-1] % 8:
            length = bias.shape[-1]
            bias = torch.nn.functional.pad(bias, (0, 8 - length % 8))[..., :length]
        bias = bias.expand(*q.shape[:2], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs_sums, dropout_p, is_causal, scale=scale)[0]


def _on_paper(x: Any) -> paper.Tensor:
    """A tensor as planner/attention.py knows it; `merged` where the heads of a token lie side by side."""
    tensor = paper.Tensor(None, tuple(x.shape), _SHORT[x.dtype])
    tensor.merged = x.stride(1) < x.stride(2)
    return tensor


def _put_back(name: str, module: types.ModuleType | None) -> None:
    if module is None:
        del sys.modules[name]
    else:
        sys.modules[name] = module


def _flash_attn() -> dict[str, types.ModuleType]:
    """The package flash_attn, as far as a batch without padding goes."""

    # transformers looks for these names of arguments (_process_flash_attention_kwargs)
    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
    ) -> Any:  # fmt: skip
        del window_size, softcap, deterministic  # no memory depends on them
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, False, scale=softmax_scale)[0]
        return out.transpose(1, 2)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__dict__.update(
        __spec__=ModuleSpec("flash_attn", None), __version__="2.8.0", flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_func, flash_attn_with_kvcache=None,
    )  # fmt: skip
    padding.__dict__.update(pad_input=None, unpad_input=None)
    return {module.__name__: module for module in (package, padding)}


# --------------------------------------------------------------------------------------------- ops that have kernels


def _instead(on: Device) -> dict[Any, Any]:
    """What runs in the place of an op: `instead[op](storages, op, args, kwargs)`."""
    found: dict[Any, Any] = {
        getattr(aten, f"_scaled_dot_product_{kernel}_attention{'_backward' * backward}").default: partial(
            _attention_op, kernel, on, backward
        )
        for kernel in ("cudnn", "flash", "efficient")
        for backward in (False, True)
    }
    found[aten.lift_fresh.default] = _from_numbers
    products = _Products(on)
    for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        found[packet.default] = products
    for packet in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        found[packet] = _positions
    for packet in (aten.mean.dim, aten.linalg_vector_norm.default):
        found[packet] = partial(_reduction, on)
    found[aten._local_scalar_dense.default] = _number
    found[aten.add.Tensor] = _Sums()
    found[aten.index_put.default] = _gradient_of_an_index
    found[aten._softmax_backward_data.default] = _softmax_backward
    found[aten._safe_softmax.default] = _safe_softmax
    found[aten.native_dropout.default] = _mask_first
    found[aten.sum.dim_IntList] = partial(_sum, on)
    found[aten._grouped_mm.default] = _grouped_mm
    if "bitsandbytes" in sys.modules:
        found[torch.ops.bitsandbytes.gemm_4bit.default] = partial(_gemm_4bit, on)
    return found


def _from_numbers(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    with storages.uncounted():
        return storages.run(op, args, kwargs)


def _number(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """A float read off the GPU is 1.0: no size depends on one. Other values are known, or the trace ends there."""
    unknown = isinstance(args[0], fake_tensor.FakeTensor) and args[0].constant is None
    return 1.0 if unknown and args[0].is_floating_point() else storages.run(op, args, kwargs)


def _positions(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """Positions have values: transformers looks for packed rows in them."""
    real = op(*args, **{name: value for name, value in kwargs.items() if name != "device"})
    return storages.valued(real, str(op)) if real.numel() <= _VALUES else storages.run(op, args, kwargs)


def _reduction(on: Device, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """A mean or a norm, and the buffers of its blocks of threads."""
    out = storages.run(op, args, kwargs)
    x = args[0]
    if out.numel() and x.dtype == torch.float32:
        across = x.dim() > 1 and out.dim() > 0 and out.shape[-1] == x.shape[-1] != 1
        for nbytes in reduction_buffers(
            x.numel() // out.numel(), out.numel(), across, on.multiprocessors, x.shape[-1] if across else 1
        ):
            storages.moment(nbytes, "partial results of a reduction")
    return out


class _Sums:
    """Sums of two gradients, in place where the first has one holder: `alone` is what its counts are then."""

    def __init__(self) -> None:
        self.alone: tuple[int, int] | None = None

    def __call__(self, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
        first, second = args[:2]
        if _in_math and first.dim() == 4:  # _scaled_dot_product_attention_math adds its mask in place
            return first
        gradients = storages.in_backward and not kwargs and isinstance(second, torch.Tensor)
        if gradients and first.shape == second.shape and first.dtype == second.dtype:
            counts = first._use_count(), torch._C._storage_Use_Count(first.untyped_storage()._cdata)
            self.alone = self.alone or counts
            if counts == self.alone:
                return first
        return storages.run(op, args, kwargs)


def calibrate(storages: Storages) -> None:
    """The first sum of gradients that `_Sums` meets: of one that nobody else holds."""
    with storages.uncounted():
        x = torch.empty(1, requires_grad=True) * 1
        storages.backward = True
        (x * 2 + x * 3).backward()
        storages.backward = False


def _sum(on: Device, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], sorted(dim % max(args[0].dim(), 1) for dim in args[1] or range(args[0].dim()))
    if dims == list(range(len(dims))) and len(dims) < x.dim():
        columns = prod(x.shape[len(dims) :])
        out = storages.run(op, args, kwargs)
        nbytes = paper.column_sum_bytes(x.numel() // columns if columns else 0, columns, on.multiprocessors)
        storages.moment(nbytes, "buffer of a sum")
        return out
    return storages.run(op, args, kwargs)


def _gradient_of_an_index(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if storages.in_backward else storages.run(op, args, kwargs)


def _softmax_backward(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """aten/src/ATen/native/cuda/SoftMax.cu: gradient times output goes into a tensor of its own."""
    out = storages.run(op, args, kwargs)
    storages.moment(args[0].numel() * args[0].element_size(), "gradient times probabilities")
    return out


def _grouped_mm(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """aten/src/ATen/native/GroupedMMUtils.h: torch's meta function takes bfloat16 alone, CUDA the others too."""
    given = {**dict(zip([argument.name for argument in op._schema.arguments], args, strict=False)), **kwargs}
    x, y, groups = given["self"], given["mat2"], given["offs"].shape[0]
    shape = {(2, 3): (x.shape[0], y.shape[-1]), (2, 2): (groups, x.shape[0], y.shape[-1])}[x.dim(), y.dim()]
    with storages:
        return torch.empty(shape, dtype=given.get("out_dtype") or x.dtype)


def _safe_softmax(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """aten/src/ATen/native/transformers/attention.cpp: a softmax, and where whole rows are -inf."""
    out = storages.run(op, args, kwargs)
    rows = out.numel() // out.shape[-1]
    storages.inside(((0, out.numel(), "scores that are -inf"), (2, rows, "rows without a key"), (3, 0, ""), (1, 0, "")))
    return out


def _mask_first(storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """aten/src/ATen/native/cuda/Dropout.cu makes the mask before the result."""
    out = storages.run(op, args, kwargs)
    storages.events[-2:] = reversed(storages.events[-2:])
    return out


class _Products:
    """Matrix products: cuBLAS's workspace with a thread's first, cuBLASLt's with its first that adds a bias.

    An operand that is neither row- nor column-major is copied (aten/src/ATen/native/cuda/Blas.cpp,
    prepare_matrix_for_cublas and prepare_batch_matrix_for_cublas).
    """

    def __init__(self, on: Device) -> None:
        self.workspace_bytes = on.workspace_bytes
        self.had: set[tuple[bool, bool]] = set()

    def __call__(self, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
        with_bias, thread = op is aten.addmm.default, storages.backward
        if self.workspace_bytes and (with_bias, thread) not in self.had:
            self.had.add((with_bias, thread))
            storages.keep(_CUBLASLT_BYTES if with_bias else self.workspace_bytes, WORKSPACE)
        out = storages.run(op, args, kwargs)
        copies = [x.numel() * x.element_size() for x in args[-2:] if _needs_copy(x)]
        made = [(2 * i, nbytes, "operand, copied for cuBLAS") for i, nbytes in enumerate(copies)]
        storages.inside([*made, *((2 * i + 1, 0, "") for i in reversed(range(len(copies))))])
        return out


def _needs_copy(x: Any) -> bool:
    rows, columns = x.shape[-2:]
    down, across = x.stride()[-2:]
    return not ((across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows)))


def _attention_op(kernel: str, on: Device, backward: bool, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """The op, and what its kernel takes inside."""
    tensors = args[1:4] if backward else args[:3]
    q, k, v = ((tuple(x.shape), _SHORT[x.dtype], x.stride(1) < x.stride(2)) for x in tensors)
    masked = kernel != "flash" and not backward and args[3] is not None
    out = storages.run(op, args, kwargs)
    storages.inside(_inside(kernel, on.capability or (8, 0), on.multiprocessors, q, k, v, masked)[backward])
    return out


_Inside = tuple[tuple[int, int, str], ...]  # events, as a tape has them, with bytes and names


@cache
def _inside(
    kernel: str, capability: tuple[int, int], multiprocessors: Any, q: Any, k: Any, v: Any, masked: bool
) -> tuple[_Inside, _Inside]:
    """What a kernel takes beside its results, forward and backward, as planner/attention.py plays it."""
    tape = paper.Tape(multiprocessors=multiprocessors)
    source = paper.Node(0, [], lambda *_: [], [])
    tensors = []
    for shape, dtype, merged in (q, k, v):
        tensor = paper.Tensor(None, shape, dtype, source)
        tensor.merged = merged
        tensors.append(tensor)
    q, k, v = tensors
    bias = paper.Tensor(None, (1,), q.dtype) if masked else None
    if kernel == "flash":
        out = attention.flash(tape, q, k, v)
    elif kernel == "cudnn":
        out = attention.cudnn(tape, q, k, v, bias)
    else:
        out = attention.efficient(tape, q, k, v, bias, capability)
    assert out.node is not None
    forward = _freed(tape)
    gradient = tape.new(out.shape, out.dtype, "gradient", out.merged)
    tape.events.clear()
    results = out.node.backward([gradient], [])
    backward = _freed(tape)
    del results
    return forward, backward


def _freed(tape: paper.Tape) -> _Inside:
    """The tape's events of what is freed again; the tape is emptied."""
    freed = {event >> 1 for event in tape.events if event & 1}
    found = tuple(
        (event, tape.sizes[event >> 1], tape.labels[event >> 1])
        for event in tape.events if event >> 1 in freed
    )  # fmt: skip
    tape.events.clear()
    return found


def _gemm_4bit(on: Device, storages: Storages, op: Any, args: Any, kwargs: Any) -> Any:
    """bitsandbytes/backends/cuda/ops.py: its own kernel, or the weight dequantised and a matrix product."""
    schema = [argument.name for argument in op._schema.arguments]
    given = {**dict(zip(schema, args, strict=False)), **kwargs}
    x, (n, k) = given["A"], given["shapeB"]
    if few_tokens.is_fused(x.numel() // k, n, k, _SHORT[x.dtype], on.capability, on.multiprocessors.number):
        return storages.run(op, args, kwargs)
    with storages:
        # both live until the product is there, being locals of _dequant_linear_fallback
        plain = (
            None if given.get("absmax_8bit") is None else torch.empty_like(given["absmax_8bit"], dtype=torch.float32)
        )
        absmax = None if plain is None else plain + given["absmax_offset"]
        weight = torch.empty((n, k), dtype=x.dtype)
        rows, bias = x.reshape(-1, k), given.get("bias")
        out = aten.mm(rows, weight.t()) if bias is None else aten.addmm(bias, rows, weight.t())
        del plain, absmax
        return out.view(*x.shape[:-1], n)


# ------------------------------------------------------------------------------------------------------- optimizers


def _paged(optimizer: Any, parameter: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Optimizer8bit.get_state_buffer as it is on CUDA; managed memory is counted by nobody but here."""
    if not optimizer.is_paged or parameter.numel() < LEAST_PAGED:
        return torch.zeros_like(parameter, dtype=dtype)
    seen = next(mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Storages))
    with seen.uncounted():
        states = torch.zeros_like(parameter, dtype=dtype)
    seen.paged_bytes += states.numel() * states.element_size()
    return states
