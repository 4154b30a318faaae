"""Benchmarks (pytest-benchmark): what a plan costs, part by part. They measure; nothing here fails for being slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan import plan
from vramplan.planner import catalog, memory, throughput
from vramplan.planner.architecture import parse
from vramplan.planner.device import device
from vramplan.planner.plan import _count
from vramplan.planner.quick import peak_bytes
from vramplan.planner.sources import resolve_model
from vramplan.planner.training import parse_options

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

OPTIONS: dict[str, Any] = {"method": "qlora", "rank": 16}
CONFIG = resolve_model("llama-3.1-8b").config


def allocated(seq_len: int = 2048) -> int:
    architecture = parse(CONFIG)
    options = parse_options(OPTIONS | {"seq_len": seq_len})
    return peak_bytes(memory.run_of(architecture, options, device(None), _count(architecture, options)))


def test_plan_with_replay(benchmark: BenchmarkFixture) -> None:
    assert benchmark(plan, "llama-3.1-8b", **OPTIONS).memory.peak_reserved_bytes > 0


def test_allocated_alone(benchmark: BenchmarkFixture) -> None:
    assert benchmark(allocated) > 0


def test_everything_before_the_replay(benchmark: BenchmarkFixture) -> None:
    architecture = parse(CONFIG)
    options = parse_options(OPTIONS)

    def steps() -> int:
        run = memory.run_of(architecture, options, device(None), _count(architecture, options))
        return sum(len(run.step(number)) for number in range(2))

    assert benchmark(steps) > 0


def test_the_time_of_a_step_of_a_run_that_is_played(benchmark: BenchmarkFixture) -> None:
    architecture = parse(CONFIG)
    options = parse_options(OPTIONS)
    run = memory.run_of(architecture, options, device(None), _count(architecture, options))
    run.play(again=False)
    h200 = catalog.gpu("h200")
    assert benchmark(lambda: throughput.time_of(throughput.work(run), h200)) is not None


def test_a_sweep_of_sequence_lengths(benchmark: BenchmarkFixture) -> None:
    assert benchmark.pedantic(lambda: [allocated(n) for n in range(128, 4096, 128)], rounds=2, iterations=1)
