"""The time of an optimizer step: what the GPU computes and moves against its ceilings, and what the host launches.

Each kernel of the played step (traffic.py) takes the longer of its FLOPs at the rate of its kind and its bytes at the
memory's bandwidth, and a launch's latency besides. The host launches one op after another, and the GPU works through
what it was given: where the host is slower, the GPU waits for it. So both are followed section by section. They meet
where the Trainer reads a number off the GPU: once a micro-step (transformers/trainer.py, logging_nan_inf_filter).

Each ceiling has a range: `step_s` takes the middle of all, `low_s` and `high_s` their fast and their slow ends at once.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner import traffic
from vramplan.planner.links import Link, assumed, links, pcie_per_s
from vramplan.planner.paper import H200

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.calibration import Calibration
    from vramplan.planner.catalog import Gpu
    from vramplan.planner.run import Run
    from vramplan.planner.traffic import Kernel, Section

WAITING, LINKED = "the GPU waits for the host", "the GPU waits for other GPUs"
FETCHED, IN_HOST = "the GPU waits for host memory", "clipping and optimizer in host memory"


class Range(NamedTuple):
    """A figure in the middle, at the fast end and at the slow end of what it may be."""

    middle: float
    fast: float
    slow: float


# --- what kernels reach -----------------------------------------------------------------------------------------------
#
# Where nothing else is named, measured on an H200 (torch 2.11, CUDA 13.0), one kernel at a time. Rates that hold for a
# multiprocessor are scaled by their number.

# Large matrix products, of the dense tensor rate (stas00/ml-engineering, compute/accelerator, maximum achievable matmul
# FLOPS): A100 SXM 0.87, PCIe 0.81, H100 SXM 0.80, GH200 0.84; MI300X 0.51, MI325X 0.60. H200: 0.70 to 0.84.
_PRODUCTS = {"NVIDIA": Range(0.80, 0.87, 0.70), "AMD": Range(0.55, 0.60, 0.45)}
# Memory, of the datasheet's bandwidth: copies of 1 GiB 4.18 and 4.27 of 4.8 TB/s; adds, casts, products of large
# tensors 4.0 to 4.4, of 8 Mi elements 3.5 to 3.8.
_BYTES = Range(0.86, 0.91, 0.75)
# Kernels over lists of tensors, of a copy's bandwidth: fused AdamW 0.61 (bf16) and 0.76 (float32), foreach 0.61 to
# 0.73, clipping 0.54 to 0.73.
_LISTS = Range(0.68, 0.76, 0.54)
# Attention, of the rate of large products. cuDNN on an H200: forward 0.53 at 2,048 tokens and 0.79 at 8,192, backward
# 0.40 and 0.67. FlashAttention-2 reaches 50 to 73 % of an A100's datasheet (arXiv 2307.08691), where large products
# reach 87 %, and 35 % of an H100's (arXiv 2407.08608), whose own instructions it does not use.
_ATTENTION = {
    "cudnn forward": Range(0.65, 0.80, 0.50),
    "cudnn backward": Range(0.50, 0.68, 0.38),
    "flash forward": Range(0.70, 0.80, 0.50),
    "flash backward": Range(0.58, 0.68, 0.40),
}
_FLASH_ON_HOPPER = 0.6  # of what it reaches elsewhere
_FORMS = {form: i for i, form in enumerate(_ATTENTION)}
_ATTENTION_TILE = 128  # queries and keys that one block of threads takes at a time; a triangle's edge is whole tiles
# Seconds in which a multiprocessor handles one element: by itself (2.4 to 3.6e-12 on 132 of them), unpacked from 4 bits
# (1.1e-12), and of an optimizer state in 8 bits (12.8e-12).
_SINGLY_S = Range(0.36e-9, 0.31e-9, 0.47e-9)
_UNPACKED_S = Range(0.147e-9, 0.140e-9, 0.165e-9)
_QUANTISED_S = Range(1.7e-9, 1.6e-9, 2.0e-9)
# Between one kernel's end and the next one's: an addition of 4,096 numbers takes 0.94e-6 in a graph, of 1 MiB 2.7e-6.
_LATENCY_S = Range(2e-6, 1e-6, 3e-6)
# Rows and columns of the output that one block of threads makes (cuBLAS's kernels are named by them).
_TILES = ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64))
# Smaller tiles read more for each product, through caches that keep up with this much: two neighbours of 128 x 128 that
# share what they read (thread block clusters), or one of 128 x 256.
_REUSE = 128 * 256 / (128 + 256)
_LEAST_K = 512  # of the inner dimension for each block, where blocks share it


class Host(NamedTuple):
    """Seconds of the host: for an op that Python calls and one of autograd's; besides, for a product in 4 bits and for
    its backward, and for a checkpointed layer's forward and backward.

    `speed` scales what the optimizer's Python takes (`_TENSOR_S`), `loops` what it takes of weights in host memory.
    """

    forward_op_s: float
    backward_op_s: float
    product_4bit_s: float
    dequantise_s: float
    checkpoint_forward_s: float
    checkpoint_backward_s: float
    speed: float = 1.0
    loops: float = 1.0


# Measured on the host of an H200 (Xeon at 2.1 GHz, Python 3.12, torch 2.11) with models so small that the GPU always
# waits: llama, qwen3, gemma2 and gpt2; full, LoRA and QLoRA; with and without checkpoints; the quickest of 12 rounds,
# since whatever else the host does only adds. An op is one that launches a kernel, with its share of the views, modules
# and hooks around it. bitsandbytes' Linear4bit takes 135e-6 more than its four kernels do as plain ops.
_HOST = Host(32e-6, 30e-6, 135e-6, 100e-6, 0.55e-3, 1.25e-3)
# In the median of the same rounds it took 1.2 times as long. The fast end is not measured: a host of twice that clock.
_HOST_SPEED = Range(1.0, 0.5, 1.4)
# Seconds of the host for each trained tensor, by the optimizer, and by clip_grad_norm_ (the same host, 448 tensors).
_TENSOR_S = {
    "adamw_torch": 17e-6,
    "adamw_torch_fused": 5.7e-6,
    "sgd": 1.7e-6,
    "rmsprop": 6.9e-6,
    "adagrad": 6.9e-6,
    "adafactor": 296e-6,
}
_TENSOR_BNB_S = 60e-6
# Seconds of the host for each of traffic.Hooks, and for a DTensor in the optimizer's step (clipping is assumed to be
# alike), measured by themselves (probes/sharing_times.py, tables/sharing_times.json): the quickest of 22 rounds, what a
# layer more takes, with 9, 13 and 23 weights of which 9, 4 and 14 are trained; the last is a mean of 14e-6 to 30e-6.
# DDP's gradients are copied twice, from C++, for which a launch each is assumed: less than those rounds resolve.
_HOOKS_S = (0.92e-3, 14e-6, 0.54e-3, 23e-6, 10e-6)
_DTENSOR_S = 24e-6
# Ranks wait at every collective for the slowest of them, so the quickest rounds never come: of the shared ones the
# median was 1.05 to 1.32 times as long.
_SEVERAL_HOSTS = 1.16
_TENSOR_CLIPPING_S = 6.7e-6
# CPU offload, measured by itself (probes/offload_times.py, tables/offload_times.json): copies of 256 MiB between pinned
# memory and an H200 took 0.86 of PCIe's 64 GB/s, of 1 MiB 0.54; the slow end is assumed. Seconds of the host for each
# weight in float32, with the one thread that torchrun leaves a rank, in tensors too large for the CPU's caches.
_PCIE = Range(0.86, 0.86, 0.54)
_WEIGHT_S = {"adamw_torch_fused": 1.63e-9, "adamw_torch": 9.55e-9, "sgd": 0.74e-9, "rmsprop": 5.5e-9, "adagrad": 4.2e-9}
_WEIGHT_CLIPPING_S = 0.71e-9
_LOOPS = Range(1.0, 0.2, 1.4)  # with 16 threads Adam's took 0.14 to 0.16 of that; the slow end is assumed


@dataclass(frozen=True, slots=True, eq=False)  # one and the same for a GPU, so that kernels' seconds are looked up fast
class Ceilings:
    """What a GPU and its host reach: FLOP/s of products in 16 bits and in 32, and of attention; bytes/s; seconds.

    `link` is what joins this GPU and the others, where several share a run; `pcie_per_s` are bytes in one direction
    between it and the host's memory.
    """

    products_per_s: float
    wide_per_s: float
    attention_per_s: tuple[float, ...]  # in the order of _ATTENTION
    bytes_per_s: float
    lists_per_s: float
    singly_s: tuple[float, float, float]  # an element: of an elementwise op, unpacked, of an 8-bit state
    latency_s: float
    multiprocessors: int
    host: Host
    link: Link
    pcie_per_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of work in a step: seconds in which the GPU does it, and what it stands on."""

    name: str
    flops: int
    bytes: int
    launches: int
    seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of an optimizer step, with its range; `parts` add up to `step_s`.

    `host_s` is what the host takes to launch everything. `tokens_per_s` counts all positions of a batch, padding too.
    `assumed` says what was taken for the links between GPUs where nothing was measured.
    """

    step_s: float
    low_s: float
    high_s: float
    tokens_per_s: float
    host_s: float
    parts: tuple[Part, ...]
    assumed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The contract's "time"."""
        return {
            "step_s": self.step_s,
            "low_s": self.low_s,
            "high_s": self.high_s,
            "tokens_per_s": self.tokens_per_s,
            "host_s": self.host_s,
            "parts": [
                {name: getattr(part, name) for name in ("name", "flops", "bytes", "launches", "seconds", "source")}
                for part in self.parts
            ],
            "assumed": self.assumed,
        }


def ceilings(
    gpu: Gpu, calibration: Calibration | None = None, num_gpus: int = 1
) -> tuple[Ceilings, Ceilings, Ceilings] | None:
    """A GPU's ceilings in the middle, at the fast and at the slow end; None where its rates are not known."""
    if calibration is None:
        return _ceilings(gpu, None, None, num_gpus)
    return _ceilings(gpu, calibration.matmul_flops_per_s, calibration.copy_bytes_per_s, num_gpus)


@lru_cache
def _ceilings(
    gpu: Gpu, learned: float | None, copies: float | None, num_gpus: int
) -> tuple[Ceilings, Ceilings, Ceilings] | None:
    if gpu.tensor_tflops is None or gpu.bandwidth_gb_s is None:
        return None
    share = _PRODUCTS.get(gpu.vendor or "", _PRODUCTS["NVIDIA"])
    made = []
    hosts = _HOST_SPEED if num_gpus == 1 else _HOST_SPEED._replace(middle=_SEVERAL_HOSTS)
    joined = links(gpu, num_gpus)
    number = gpu.multiprocessors or H200.number
    late = (gpu.compute_capability or "").startswith(("9.", "10."))
    for i in range(3):
        products = learned or share[i] * gpu.tensor_tflops * 1e12
        moved = copies or _BYTES[i] * gpu.bandwidth_gb_s * 1e9
        made.append(
            Ceilings(
                products,
                (gpu.fp32_tflops or gpu.tensor_tflops / 16) * share[i] * 1e12,
                tuple(
                    each[i] * products * (_FLASH_ON_HOPPER if late and form.startswith("flash") else 1.0)
                    for form, each in _ATTENTION.items()
                ),
                moved,
                moved * _LISTS[i],
                (_SINGLY_S[i] / number, _UNPACKED_S[i] / number, _QUANTISED_S[i] / number),
                _LATENCY_S[i],
                number,
                Host(*[seconds * hosts[i] for seconds in _HOST])._replace(loops=_LOOPS[i]),
                joined[i],
                _PCIE[i] * pcie_per_s(gpu),
            )
        )
    middle, fast, slow = made
    return middle, fast, slow


@dataclass(frozen=True, slots=True)
class Work:
    """What a step gives to host and GPU, whatever these are: stretches at whose end they wait for each other.

    Each is there with the number of times that it comes, since micro-steps are alike and may be a million.
    """

    stretches: tuple[tuple[tuple[Section, ...], int], ...]
    tokens: int  # positions of a step's batch on all GPUs
    num_gpus: int = 1
    unknown: bool = False  # what it does has not been timed


def work(run: Run) -> Work:
    """The work of an optimizer step; playing the step takes most of the time."""
    tokens = run.settings.batch * run.settings.seq * run.accumulation
    if run.sharing is not None:
        return _shared_work(run, tokens * run.sharing.ranks, run.sharing.ranks)
    micro, update = tuple(traffic.micro_step(run)), tuple(traffic.update(run))
    summed = (traffic.summed_gradients(run),) if run.accumulation > 1 else ()
    return Work(((micro, 1), ((*micro, *summed), run.accumulation - 1), (update, 1)), tokens)


def _shared_work(run: Run, tokens: int, ranks: int) -> Work:
    from vramplan.planner import communication  # only runs on several GPUs need it

    if communication.unknown(run):
        return Work((), tokens, ranks, unknown=True)
    micro, update = tuple(traffic.micro_step(run)), traffic.update(run)
    summed = (communication.summed_gradients(run),) if run.accumulation > 1 else ()
    first = tuple(communication.micro_step(run, micro, last=False)) if run.accumulation > 1 else ()
    last = tuple(communication.micro_step(run, micro, last=True))
    several = ((first, 1), ((*first, *summed), run.accumulation - 2)) if run.accumulation > 1 else ()
    return Work((*several, ((*last, *summed), 1), (tuple(communication.update(run, update)), 1)), tokens, ranks)


def span_of(step: Work, gpu: Gpu, calibration: Calibration | None = None) -> Range | None:
    """Seconds of an optimizer step on `gpu`; None where the GPU's rates are not known, or what the step does is not."""
    found = None if step.unknown else ceilings(gpu, calibration, step.num_gpus)
    return found and Range(*[_follow_all(step, c) for c in found])


def time_of(step: Work, gpu: Gpu, calibration: Calibration | None = None) -> StepTime | None:
    """The time of an optimizer step on `gpu`; None where `span_of` knows none."""
    found, span = ceilings(gpu, calibration, step.num_gpus), span_of(step, gpu, calibration)
    if found is None or span is None:
        return None
    middle, fast, slow = span
    sections: Counter[Section] = Counter()
    for stretch, times in step.stretches:
        for section in stretch:
            sections[section] += times
    parts = _parts(sections, found[0])
    waiting = max(0.0, middle - sum(part.seconds for part in parts))
    without = found[0]
    for name, nbytes in (
        (FETCHED, sum((each.fetched + each.stored) * n for each, n in sections.items())),
        (LINKED, sum((each.gathered + each.reduced) * n for each, n in sections.items())),
    ):
        if nbytes:
            before = _follow_all(step, without)
            without = replace(without, pcie_per_s=math.inf, link=without.link if name == FETCHED else Link())
            seconds = min(waiting, max(0.0, before - _follow_all(step, without)))
            parts.append(Part(name, 0, nbytes, 0, seconds, SOURCES[name]))
            waiting -= seconds
    stepping = sum(_host_s(section, found[0].host) * n for section, n in sections.items() if section.in_host)
    if stepping:
        parts.append(Part(IN_HOST, 0, 0, 0, min(waiting, stepping), SOURCES[IN_HOST]))
        waiting -= min(waiting, stepping)
    parts.append(Part(WAITING, 0, 0, 0, waiting, SOURCES[WAITING]))
    host_s = sum(_host_s(section, found[0].host) * n for section, n in sections.items())
    return StepTime(middle, fast, slow, step.tokens / middle, host_s, tuple(parts), assumed(gpu, step.num_gpus))


SOURCES = {
    traffic.PRODUCTS: "2 m n k of each product; tiles in waves over the multiprocessors, or its operands' bytes",
    traffic.ATTENTION: "the causal half of T x T, five products backward for two forward (arXiv 2307.08691)",
    traffic.NF4: "bitsandbytes, dequantize_4bit: each weight read packed and written whole, at each product",
    traffic.ELEMENTWISE: "each op's operands read and its output written, once",
    traffic.LOSS: "float32 logits, log-softmax and their gradients, or trl's tiles",
    traffic.CLIPPING: "torch, clip_grad.py: gradients read for the norm, read and written for the factor",
    traffic.OPTIMIZER: "weights, gradients and states, as often as the step's statements read and write them",
    traffic.COPIES: "weights into and out of gathered buffers, gradients side by side (torch, fully_shard, DDP)",
    FETCHED: "shards from host memory and gradients into it that the GPU's kernels do not hide (communication.py)",
    IN_HOST: "torch's clipping and optimizer, weight by weight on one thread of the host (torchrun: OMP_NUM_THREADS=1)",
    LINKED: "bytes over each GPU's link that its kernels do not hide (communication.py)",
    WAITING: "ops launched one by one from Python and autograd's thread, slower than the GPU runs them",
}


def _follow_all(step: Work, c: Ceilings) -> float:
    return sum(_follow(stretch, c) * times for stretch, times in step.stretches if times)


def _follow(stretch: Sequence[Section], c: Ceilings) -> float:
    """Seconds from when host and GPU set out together until both are done.

    What a section needs of other GPUs is under way since the host came to the section before it; what it gives them
    goes when it is done. Host memory is read before the one, and written after the other.
    """
    host = gpu = link = fetch = store = before = 0.0
    known: dict[Section, tuple[float, float]] = {}
    for section in stretch:
        if section not in known:
            known[section] = (_host_s(section, c.host), _gpu_s(section, c))
        launching, running = known[section]
        if section.gathered:
            fetch = max(fetch, before) + section.fetched / c.pcie_per_s
            link = max(link, fetch) + c.link.gather_s + section.gathered / c.link.per_s
            gpu = max(gpu, link)
        before = host
        host += launching
        gpu = max(gpu + running, host)
        if section.reduced:
            latency = c.link.gather_s if section.sums is None else section.sums * c.link.sum_s
            link = max(link, gpu) + latency + section.reduced / c.link.per_s
            store = max(store, link) + section.stored / c.pcie_per_s
            gpu = max(gpu, link) if section.waits else gpu
    return max(gpu, link, store)


def _host_s(section: Section, host: Host) -> float:
    checkpoint_s = host.checkpoint_backward_s if section.backward_ops else host.checkpoint_forward_s
    clips = section.name == traffic.CLIPPING
    each = _TENSOR_CLIPPING_S if clips else _TENSOR_S.get(section.by, _TENSOR_BNB_S)
    weight_s = 0.0
    if section.in_host:
        weight_s = _WEIGHT_CLIPPING_S if clips else _WEIGHT_S[section.by]
    return (
        section.forward_ops * host.forward_op_s
        + section.backward_ops * host.backward_op_s
        + section.products_4bit * host.product_4bit_s
        + section.dequantised * host.dequantise_s
        + section.checkpoints * checkpoint_s
        + section.tensors * (each + _DTENSOR_S * section.sharded) * host.speed
        + section.in_host * weight_s * host.loops
        + sum(n * s for n, s in zip(section.hooks, _HOOKS_S, strict=True)) * host.speed
    )


def _gpu_s(section: Section, c: Ceilings) -> float:
    return sum(_kernel_s(kernel, c) * n for kernel, n in section.kernels.items())


def _parts(sections: Counter[Section], c: Ceilings) -> list[Part]:
    """The GPU's work by kind, in the order of the sources."""
    found: dict[str, tuple[int, int, int, float]] = {}
    for section, times in sections.items():
        for kernel, n in section.kernels.items():
            flops, nbytes, launches, seconds = found.get(kernel.kind, (0, 0, 0, 0.0))
            n *= times
            found[kernel.kind] = (
                flops + n * kernel.flops,
                nbytes + n * kernel.nbytes,
                launches + n,
                seconds + n * _kernel_s(kernel, c),
            )
    return [Part(name, *found[name], source) for name, source in SOURCES.items() if name in found]


@lru_cache(maxsize=16_384)
def _kernel_s(kernel: Kernel, c: Ceilings) -> float:
    """Seconds of one kernel on the GPU."""
    kind, moving = kernel.kind, kernel.nbytes / c.bytes_per_s
    if kind == traffic.PRODUCTS:
        return max(_product_s(kernel, c), moving) + c.latency_s
    if kind == traffic.ATTENTION:
        tile = _ATTENTION_TILE / (kernel.m + 1)
        rate = c.attention_per_s[_FORMS[kernel.form]]
        return max(kernel.flops * (1 + tile) / rate, moving) + c.latency_s
    if kind in (traffic.CLIPPING, traffic.OPTIMIZER):
        return max(kernel.nbytes / c.lists_per_s, kernel.singly * c.singly_s[2]) + c.latency_s
    return max(moving, kernel.singly * c.singly_s[kind == traffic.NF4]) + c.latency_s


def _product_s(kernel: Kernel, c: Ceilings) -> float:
    """Seconds of a product by its best tiling."""
    rate = (c.wide_per_s if kernel.wide else c.products_per_s) / c.multiprocessors
    return min(flops / rate + nbytes / c.bytes_per_s for flops, nbytes in _tilings(kernel, c.multiprocessors))


@lru_cache(maxsize=1024)
def _tilings(kernel: Kernel, multiprocessors: int) -> tuple[tuple[float, float], ...]:
    """For each way to tile a product the FLOPs that last as long on one multiprocessor, and bytes written at the end.

    A tile keeps one multiprocessor busy, and as many tiles run at once as there are multiprocessors: a wave that is
    not full lasts as long as a full one. Where tiles are few, several share one along the inner dimension and add their
    parts up in memory. The last wave's tiles are written when all else is done.
    """
    item = 4 if kernel.wide else 2
    found: list[tuple[float, float]] = []
    for rows, columns in _TILES:
        tiles = kernel.batch * -(-kernel.m // rows) * -(-kernel.n // columns)
        shares = max(1, min(multiprocessors // tiles, kernel.k // _LEAST_K))
        waves = -(-tiles * shares // multiprocessors)
        shorter, longer = sorted((rows, columns))
        reuse = min(1.0, 2 * shorter * longer / (2 * shorter + longer) / _REUSE)
        flops = waves * 2 * rows * columns * kernel.k / shares / reuse
        found.append((flops, rows * columns * (item if shares == 1 else 8) * multiprocessors))
    return tuple(found)
