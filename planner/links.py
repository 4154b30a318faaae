"""What joins the GPUs of a run, and how fast NCCL's collectives go over it: NVLink, PCIe, or a network between hosts.

A ring over all GPUs is as fast as its slowest link. Beyond one host NCCL runs a ring through each of a host's network
cards, so all of them carry the traffic of each GPU together: what leaves a host is shared by as many cards as it has.
Each collective besides takes its time to begin, and a step from GPU to GPU for each of them, by NCCL's own figures
(nccl, src/graph/tuning.cc, ncclTopoTuneModel): what is gathered or scattered goes round a ring, and sums over several
hosts go up and down a tree.

Measured are two H200s; `assumed` says what was taken where nothing was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vramplan.planner.catalog import Gpu

HOST_GPUS = 8  # GPUs of one host, where a card's are not known to be fewer
# Of NVLink's bytes in one direction, in the middle, at the fast and at the slow end. NCCL 2.28 between two H200s (NV18,
# NCCL_NVLS_ENABLE=0): all_gather and reduce_scatter of 512 MiB and 1 GiB 0.52 to 0.58, of 128 MiB 0.45 to 0.48;
# all_reduce of 1 GiB 0.72.
_NVLINK = (0.55, 0.70, 0.40)
_WIRE = (0.7, 0.9, 0.4)  # the same of PCIe: assumed
# The same of a network, and at its slow end of a quarter of it: 400 Gb/s are let for eight A100s whose maker gives them
# 1,600.
_NETWORK = (0.7, 0.9, 0.175)
# Bytes a second of PCIe with 16 lanes, and of the network for each GPU of an NVLink host, as the makers' own have it
# (Gb/s: DGX-1 400 for eight, DGX A100 200 each, DGX H100 400 each).
PCIE_PER_S = {3: 16e9, 4: 32e9, 5: 64e9}
_CARD_PER_S = {3: 6.25e9, 4: 25e9, 5: 50e9}
_ONE_CARD_PER_S = (12.5e9, 50e9, 12.5e9)  # of a whole host without NVLink: instances of 100 to 400 Gb/s are let
# Microseconds to begin: all_gather and reduce_scatter of 1 to 64 MiB took 32 to 62 more than their bytes do at that
# share (tables/sharing_times.json); the fast end is NCCL's own figure.
_START = (40.0, 14.0, 62.0)
# Microseconds of a step over NVLink, PCIe and a network, by protocol: LL128, and at the slow end Simple.
_RING = ((1.9, 2.5, 4.0), (3.4, 5.7, 14.0))
_TREE = ((1.25, 1.9, 8.5), (4.0, 4.0, 14.0))


class Link(NamedTuple):
    """Bytes a second in one direction between a GPU and the others, and seconds of a collective besides its bytes.

    `gather_s` of what is gathered or scattered, `sum_s` of an all-reduce.
    """

    per_s: float = math.inf
    gather_s: float = 0.0
    sum_s: float = 0.0


def pcie_per_s(gpu: Gpu) -> float:
    """Bytes a second to host memory in one direction: PCIe's, of generation 4 where none is known; GH200's NVLink."""
    if gpu.nvlink_gpus == 1 and gpu.nvlink_gb_s:
        return gpu.nvlink_gb_s / 2 * 1e9
    return PCIE_PER_S.get(gpu.pcie_gen or 4, PCIE_PER_S[4])


def host_gpus(gpu: Gpu | None) -> int:
    """The most GPUs of one host."""
    return gpu.host_gpus or HOST_GPUS if gpu else HOST_GPUS


def hosts(num_gpus: int, each: int = HOST_GPUS) -> int:
    """The fewest hosts that hold so many GPUs, with at most `each` in one."""
    return -(-num_gpus // each)


def joined(gpu: Gpu) -> int:
    """GPUs that are joined without a network: those of a host, or of a rack that NVLink joins."""
    return max(host_gpus(gpu), gpu.nvlink_gpus or 0)


def links(gpu: Gpu, num_gpus: int) -> tuple[Link, Link, Link]:
    """What joins so many of a GPU: in the middle, at the fast and at the slow end."""
    if num_gpus == 1:
        return Link(), Link(), Link()
    here = min(num_gpus, joined(gpu))
    apart = hosts(num_gpus, here)
    by_nvlink = _by_nvlink(gpu, here)
    made = []
    for i, protocol in enumerate((0, 0, 1)):
        per_s = math.inf if here == 1 else _NVLINK[i] * _nvlink_per_s(gpu, here) if by_nvlink else _WIRE[i] * _pcie(gpu)
        if apart > 1:
            per_s = min(per_s, _NETWORK[i] * _network_per_s(gpu, i))
        by = 0 if by_nvlink else 1
        inside, between = _RING[protocol][by], _RING[protocol][2]
        ring = (num_gpus - apart) * inside + (apart - 1) * between
        inside, between = _TREE[protocol][by], _TREE[protocol][2]
        tree = 2 * ((here - 1) * inside + math.ceil(math.log2(apart)) * between)
        made.append(Link(per_s, (_START[i] + ring) * 1e-6, (_START[i] + min(2 * ring, tree)) * 1e-6))
    middle, fast, slow = made
    return middle, fast, slow


def assumed(gpu: Gpu, num_gpus: int) -> str:
    """What `links` takes for granted there, in a sentence; "" where it is what was measured: NVLink between H200s."""
    here = joined(gpu)
    if num_gpus > here:
        per_s = _network_per_s(gpu, 0) * 8 / 1e9
        of = "each GPU a host of its own" if here == 1 else f"hosts of {here} GPUs"
        return (
            f"the step's time assumes {of} and a network of {per_s:,.0f} Gb/s for each, of which collectives reach "
            f"{_NETWORK[0]:.0%}; what is let may have less, and none of it is measured"
        )
    if num_gpus == 1:
        return ""
    if not _by_nvlink(gpu, num_gpus):
        most = f"NVLink joins {gpu.nvlink_gpus} of them at most, so " if gpu.nvlink_gpus else ""
        return (
            f"{most}the step's time assumes PCIe {gpu.pcie_gen or 4} with 16 lanes for each GPU, of which collectives "
            f"reach {_WIRE[0]:.0%}; none of it is measured"
        )
    if gpu.name == "h200":
        return ""
    bridge = "the NVLink bridge that joins two of them, and " if gpu.nvlink_gpus == 2 else ""
    return f"the step's time assumes {bridge}that collectives reach {_NVLINK[0]:.0%} of NVLink, as measured on H200s"


def _by_nvlink(gpu: Gpu, here: int) -> bool:
    return 1 < here <= (gpu.nvlink_gpus or 0) and bool(gpu.nvlink_gb_s)


def _nvlink_per_s(gpu: Gpu, here: int) -> float:
    """Bytes a second in one direction; in a mesh, of the links to so many of the others alone."""
    used = min(1.0, (here - 1) / gpu.nvlink_mesh) if gpu.nvlink_mesh else 1.0
    return used * (gpu.nvlink_gb_s or 0) / 2 * 1e9


def _pcie(gpu: Gpu) -> float:
    return PCIE_PER_S.get(gpu.pcie_gen or 4, PCIE_PER_S[4])


def _network_per_s(gpu: Gpu, end: int) -> float:
    """Bytes a second that leave a host in one direction: over all of its cards together."""
    if gpu.nvlink_gpus in (None, 2):
        return _ONE_CARD_PER_S[end]
    return joined(gpu) * _CARD_PER_S.get(gpu.pcie_gen or 4, _CARD_PER_S[4])
