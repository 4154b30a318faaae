"""What joins GPUs, by hand: NVLink, bridges, PCIe, and a network whose cards a host's GPUs have together."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from vramplan import plan
from vramplan.planner import catalog
from vramplan.planner import links as links_module
from vramplan.planner.links import assumed, host_gpus, joined, links, pcie_per_s

GB = 1e9


def middle(gpu: str, num_gpus: int) -> float:
    return links(catalog.gpu(gpu), num_gpus)[0].per_s / GB


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "gb_s"),
    [
        ("h200", 2, 0.55 * 450),
        ("h200", 8, 0.55 * 450),
        ("h200", 16, 0.55 * 450),  # eight cards of 50 GB/s carry 0.7 of 400, more than NVLink's collectives
        ("a100-80gb", 64, 0.7 * 8 * 25),
        ("gb200", 72, 0.55 * 900),
        ("mi300x", 8, 0.55 * 448),
        ("mi300x", 2, 0.55 * 64),  # a mesh: one of seven links leads to the other
        ("v100-32gb", 8, 0.55 * 150),
        ("rtx-3090", 2, 0.55 * 112.5 / 2),  # a bridge
        ("rtx-3090", 4, 0.7 * 32),
        ("h100-pcie", 4, 0.7 * 64),
        ("rtx-4090", 8, 0.7 * 32),
        ("l4", 16, 0.7 * 12.5),  # one card for the whole host
        ("gh200", 2, 0.7 * 50),  # each a host of its own
    ],
)
def test_bytes_a_second(gpu: str, num_gpus: int, gb_s: float) -> None:
    assert middle(gpu, num_gpus) == pytest.approx(gb_s)


@pytest.mark.parametrize("card", catalog.gpus(), ids=lambda card: card.name)
def test_more_gpus_are_never_joined_better(card: catalog.Gpu) -> None:
    here = joined(card)
    for one, other in ((1, 2), (2, here), (here, here + 1), (2 * here, 64 * here)):
        for fewer, more in zip(links(card, one), links(card, other), strict=True):
            meshed = card.nvlink_mesh and 1 < one < other <= here  # more of its links are used
            assert one >= other or fewer.gather_s < more.gather_s
            assert one >= other or meshed or fewer.per_s >= more.per_s
    for number in (2, here, 1024):
        middle, fast, slow = links(card, number)
        assert slow.per_s <= middle.per_s <= fast.per_s


def test_latencies_by_hand() -> None:
    """40 to begin, 1.9 a step over NVLink, 4.0 over a network; 16 GPUs in 2 hosts have 14 and 1 of these."""
    (one, *_), (two, *_) = links(catalog.gpu("h200"), 8), links(catalog.gpu("h200"), 16)
    assert one.gather_s == pytest.approx((40 + 7 * 1.9) * 1e-6)
    assert one.sum_s == pytest.approx((40 + min(14 * 1.9, 2 * 7 * 1.25)) * 1e-6)
    assert two.gather_s == pytest.approx((40 + 14 * 1.9 + 4.0) * 1e-6)
    assert two.sum_s == pytest.approx((40 + 2 * (7 * 1.25 + 8.5)) * 1e-6)
    assert links(catalog.gpu("h200"), 1)[0] == (float("inf"), 0, 0)


def test_what_collectives_reach_is_what_was_timed() -> None:
    file = Path(links_module.__file__).parents[1] / "tables" / "sharing_times.json"
    timed = [
        each
        for each in json.loads(file.read_text(encoding="utf-8"))["collectives"]
        if each["collective"] != "all_reduce"
    ]
    middle, fast, slow = links(catalog.gpu("h200"), 2)
    large = [each["link_bytes"] / each["s"] for each in timed if each["link_bytes"] >= 2**28]
    assert statistics.mean(large) == pytest.approx(middle.per_s, rel=0.02)
    start = [each["s"] - each["link_bytes"] / middle.per_s for each in timed if each["link_bytes"] < 2**28]
    assert statistics.median(start) == pytest.approx(middle.gather_s, rel=0.06)
    assert fast.gather_s < min(start)
    assert max(start) < slow.gather_s


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "said"),
    [
        ("h200", 8, ""),
        ("gb200", 64, "assumes that collectives reach 55% of NVLink, as measured on H200s"),
        ("rtx-3090", 2, "assumes the NVLink bridge that joins two of them, and that collectives reach 55% of NVLink"),
        ("rtx-3090", 4, "NVLink joins 2 of them at most, so the step's time assumes PCIe 4"),
        ("rtx-4090", 2, "the step's time assumes PCIe 4 with 16 lanes"),
        ("h200", 16, "hosts of 8 GPUs and a network of 3,200 Gb/s for each"),
        ("l4", 64, "a network of 100 Gb/s for each"),
        ("gh200", 2, "each GPU a host of its own and a network of 400 Gb/s"),
    ],
)
def test_what_is_assumed_is_said(gpu: str, num_gpus: int, said: str) -> None:
    words = assumed(catalog.gpu(gpu), num_gpus)
    assert bool(words) == bool(said)
    assert said in words


def test_hosts_of_few_gpus() -> None:
    """Trays of four in a rack that NVLink joins, and one with a CPU, whose memory its NVLink reaches."""
    assert [(host_gpus(catalog.gpu(name)), joined(catalog.gpu(name))) for name in ("gb200", "gh200", "h200", "l4")] == [
        (4, 72), (1, 1), (8, 8), (8, 8),
    ]  # fmt: skip
    assert pcie_per_s(catalog.gpu("gh200")) == 450 * GB
    sizes = {part.name: part.bytes for part in plan("gpt2", gpu="gh200", num_gpus=3, parallel="fsdp", method="full",
                                                    seq_len=128).sizes()}  # fmt: skip
    alone = plan("gpt2", gpu="h200", num_gpus=3, parallel="fsdp", method="full", seq_len=128).sizes()
    assert 3 * sizes["host memory, loading"] == next(
        each.bytes for each in alone if each.name == "host memory, loading"
    )


def test_a_step_takes_no_leap_between_one_host_and_two() -> None:
    steps = []
    for number in (8, 16, 64, 1024):
        time = plan("llama-3.1-8b", method="full", gpu="h200", num_gpus=number, parallel="fsdp").time
        assert time
        steps.append(time.step_s)
    assert steps == sorted(steps)
    assert steps[1] < 1.05 * steps[0]
    assert steps[3] < 2 * steps[0]
