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

HOST_GPUS = 8  # GPUs of one host, where NVLink joins no more
# Of NVLink's bytes in one direction, in the middle, at the fast and at the slow end. NCCL 2.28 between two H200s (NV18,
# NCCL_NVLS_ENABLE=0): all_gather and reduce_scatter of 512 MiB and 1 GiB 0.52 to 0.58, of 128 MiB 0.45 to 0.48;
# all_reduce of 1 GiB 0.72.
_NVLINK = (0.55, 0.70, 0.40)
_WIRE = (0.7, 0.9, 0.4)  # the same of PCIe and of a network: assumed
# Bytes a second of PCIe with 16 lanes, and of the network card that each GPU of an NVLink host has: HDR or NDR
# InfiniBand of the makers' own hosts (DGX-1 100, DGX A100 200, DGX H100 400, DGX B300 800 Gb/s).
PCIE_PER_S = {3: 16e9, 4: 32e9, 5: 64e9, 6: 128e9}
_CARD_PER_S = {3: 12.5e9, 4: 25e9, 5: 50e9, 6: 100e9}
_ONE_CARD_PER_S = 12.5e9  # of a whole host without NVLink between its GPUs: 100 Gb/s, as such instances are let
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
    """Bytes a second of a GPU's PCIe in one direction; of one that is not known generation 4."""
    return PCIE_PER_S.get(gpu.pcie_gen or 4, PCIE_PER_S[4])


def host_gpus(gpu: Gpu) -> int:
    """GPUs that are joined without a network."""
    joined = gpu.nvlink_gpus or 0
    return joined if joined == 1 else max(HOST_GPUS, joined)


def links(gpu: Gpu, num_gpus: int) -> tuple[Link, Link, Link]:
    """What joins so many of a GPU: in the middle, at the fast and at the slow end."""
    if num_gpus == 1:
        return Link(), Link(), Link()
    here = min(num_gpus, host_gpus(gpu))
    hosts = -(-num_gpus // here)
    by_nvlink = _by_nvlink(gpu, here)
    made = []
    for i, protocol in enumerate((0, 0, 1)):
        per_s = _NVLINK[i] * (gpu.nvlink_gb_s or 0) / 2 * 1e9 if by_nvlink else _WIRE[i] * pcie_per_s(gpu)
        if here == 1:
            per_s = math.inf
        if hosts > 1:
            per_s = min(per_s, _WIRE[i] * _network_per_s(gpu))
        by = 0 if by_nvlink else 1
        inside, between = _RING[protocol][by], _RING[protocol][2]
        ring = (num_gpus - hosts) * inside + (hosts - 1) * between
        inside, between = _TREE[protocol][by], _TREE[protocol][2]
        tree = 2 * ((here - 1) * inside + math.ceil(math.log2(hosts)) * between)
        made.append(Link(per_s, (_START[i] + ring) * 1e-6, (_START[i] + min(2 * ring, tree)) * 1e-6))
    middle, fast, slow = made
    return middle, fast, slow


def assumed(gpu: Gpu, num_gpus: int) -> str:
    """What `links` takes for granted there, in a sentence; "" where it is NVLink within a host."""
    here = host_gpus(gpu)
    reach = f"of which collectives reach {_WIRE[0]:.0%}; none of it is measured"
    if num_gpus > here:
        per_s = _network_per_s(gpu) * 8 / 1e9
        hosts = "each GPU a host of its own" if here == 1 else f"hosts of {here} GPUs"
        return f"the step's time assumes {hosts} and a network of {per_s:,.0f} Gb/s for each host, {reach}"
    if num_gpus == 1 or _by_nvlink(gpu, num_gpus):
        return ""
    joined = f"NVLink joins {gpu.nvlink_gpus} of them at most, so " if gpu.nvlink_gpus else ""
    return f"{joined}the step's time assumes PCIe {gpu.pcie_gen or 4} with 16 lanes for each GPU, {reach}"


def _by_nvlink(gpu: Gpu, here: int) -> bool:
    return here <= (gpu.nvlink_gpus or 0) and bool(gpu.nvlink_gb_s)


def _network_per_s(gpu: Gpu) -> float:
    """Bytes a second that leave a host in one direction: over all of its cards together."""
    if gpu.nvlink_gpus in (None, 2):
        return _ONE_CARD_PER_S
    return host_gpus(gpu) * _CARD_PER_S.get(gpu.pcie_gen or 4, _CARD_PER_S[4])
