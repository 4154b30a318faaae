"""Tokens, steps, hours and dollars, worked out by hand and against transformers' own count of steps."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner import prices
from vramplan.planner.cost import Work, cheapest_first, cost, costs, fastest_first, work
from vramplan.planner.prices import Offer
from vramplan.planner.throughput import Range
from vramplan.planner.training import TrainingOptions, parse_options

T4 = Offer("here", "any", "box", "t4", 1, 0.5, False, None, "2026-11-20", "a page")
FREE = replace(T4, provider="free", usd_per_hour=0.0, session_limit_s=12 * 3600)
EIGHT = replace(T4, provider="big", gpu="h100", gpu_count=8, usd_per_hour=40.0)


def about(step_s: float) -> Range:
    """A step's time that may be half as long, or twice."""
    return Range(step_s, step_s / 2, 2 * step_s)


def run(**options: Any) -> TrainingOptions:
    return parse_options(options)


# ------------------------------------------------------------------------------------------------------ the run's size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1,000 examples of 2,048 tokens, three times
        ({}, Work(tokens=6_144_000, sequences=1000, steps=3000)),
        ({"batch_size": 4, "gradient_accumulation_steps": 8}, Work(6_144_000, 1000, 96)),  # 250 / 8 = 31.25: 32 a time
        ({"epochs": 0.5}, Work(1_024_000, 1000, 500)),
        ({"epochs": 0.1, "examples": 7, "batch_size": 2}, Work(1434, 7, 1)),
        # packed: 1,000 x 512 tokens fill 250 sequences, and 1,000 x 5,000 fill 2,442
        ({"tokens_per_example": 512}, Work(1_536_000, 250, 750)),
        ({"tokens_per_example": 5000}, Work(15_000_000, 2442, 7326)),
        # padded: one example a sequence, cut at seq_len
        ({"tokens_per_example": 512, "padded": True}, Work(1_536_000, 1000, 3000)),
        ({"tokens_per_example": 5000, "padded": True}, Work(6_144_000, 1000, 3000)),
        ({"examples": 1, "epochs": 1, "batch_size": 64}, Work(2048, 1, 1)),
    ],
)
def test_sizes_by_hand(options: dict[str, Any], expected: Work) -> None:
    assert work(run(**options)) == expected


def test_gpus_share_the_examples() -> None:
    assert work(replace(run(batch_size=4, epochs=1), num_gpus=8)) == Work(2_048_000, 1000, 32)  # 31.25


@given(
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(1, 9),
    st.one_of(st.integers(1, 4), st.floats(0.05, 4)),
)
def test_steps_are_those_of_trainer(examples: int, batch_size: int, accumulation: int, epochs: float) -> None:
    transformers = pytest.importorskip("transformers")
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, num_train_epochs=epochs, max_steps=-1)
    trainer = SimpleNamespace(
        get_total_train_batch_size=lambda args: batch_size * accumulation,
        get_sp_size=lambda: 1,
        num_examples=lambda loader: examples,
    )
    loader = range(-(-examples // batch_size))  # its length is all that is asked
    expected = transformers.Trainer.set_initial_training_values(trainer, args, loader)[-1]
    options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    assert work(run(examples=examples, epochs=epochs, **options)).steps == expected


# ----------------------------------------------------------------------------------------------------------- one offer


def test_a_cost_by_hand() -> None:
    size = Work(tokens=0, sequences=0, steps=3600)
    made = cost(size, T4, about(2.0))
    assert (made.hours, made.usd, made.kwh, made.sessions) == (2.0, 1.0, 0.14, 1)  # a T4 draws 70 W at most
    both = cost(size, EIGHT, about(2.0), num_gpus=2)
    assert (both.hours, both.usd, both.kwh) == (2.0, 80.0, 2 * 2 * 0.7)  # six of eight idle, and are paid for
    assert json.loads(json.dumps(made.to_dict())) == {
        "provider": "here", "region": "any", "instance": "box", "gpu": "t4", "gpu_count": 1, "usd_per_hour": 0.5,
        "spot": False, "session_limit_s": None, "date": "2026-11-20", "source": "a page",
        "num_gpus": 1, "instances": 1, "step_s": 2.0, "hours": 2.0, "hours_low": 1.0, "hours_high": 4.0, "usd": 1.0,
        "kwh": 0.14, "sessions": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "sessions"), [(1, 1), (43_200, 1), (43_201, 2), (86_400, 2), (86_401, 3)])
def test_sessions_end_a_run(steps: int, sessions: int) -> None:
    assert cost(Work(0, 0, steps), FREE, about(1.0)).sessions == sessions
    assert cost(Work(0, 0, steps), T4, about(1.0)).sessions == 1


def test_every_card_of_the_table_has_its_energy() -> None:
    for offer in prices.bundled():
        assert cost(Work(0, 0, 3600), offer, about(1.0)).kwh is not None


# ----------------------------------------------------------------------------------------------------------- all offers


def test_only_where_it_fits_and_asked_once() -> None:
    asked: list[str] = []

    def fits(gpu: str) -> bool:
        asked.append(f"fits {gpu}")
        return gpu != "t4"

    def step_s(gpu: str) -> Range:
        asked.append(f"time {gpu}")
        return about(1.0)

    cheap = replace(EIGHT, usd_per_hour=30.0, spot=True)
    found = costs(run(), [EIGHT, T4, cheap, FREE], fits, step_s)
    assert [each.offer for each in found] == [cheap, EIGHT]
    assert asked == ["fits h100", "time h100", "fits t4"]
    assert costs(run(), [T4, FREE], fits, step_s) == ()


def test_only_where_there_are_gpus_enough() -> None:
    four = replace(run(), num_gpus=4)
    found = costs(four, [T4, replace(T4, gpu_count=2), EIGHT], lambda gpu: True, lambda gpu: about(1.0))
    assert [(each.offer, each.num_gpus) for each in found] == [(EIGHT, 4)]


def test_more_gpus_than_a_host_joins_are_several_instances() -> None:
    many = run(num_gpus=16, parallel="fsdp")  # 1,000 sequences, 16 at a time: 63 steps an epoch
    found = costs(many, [replace(EIGHT, gpu_count=4), EIGHT], lambda gpu: True, lambda gpu: about(3600.0))
    assert [(each.offer, each.instances) for each in found] == [(EIGHT, 2)]
    assert found[0].usd == 3 * 63 * 40.0 * 2


def test_cheapest_and_fastest() -> None:
    seconds = {"t4": about(10.0), "h100": about(1.0)}
    found = costs(run(), [EIGHT, T4, FREE], lambda gpu: True, seconds.__getitem__)
    # 3,000 steps: on the T4 8 h 20 min for $4.17 or nothing, on the H100s 50 minutes for $33.33
    assert [(each.offer.provider, round(each.usd, 2)) for each in found] == [
        ("free", 0),
        ("here", 4.17),
        ("big", 33.33),
    ]
    assert [each.offer.provider for each in fastest_first(found)] == ["big", "free", "here"]
    assert cheapest_first(reversed(found)) == found


@given(st.floats(0.01, 1000), st.sampled_from(prices.bundled()), st.sampled_from(prices.bundled()))
def test_a_longer_step_costs_no_less(step_s: float, one: Offer, other: Offer) -> None:
    size = work(run())
    for offer in (one, other):
        short, long = cost(size, offer, about(step_s)), cost(size, offer, about(2 * step_s))
        assert long.hours == 2 * short.hours
        assert long.usd == 2 * short.usd
        assert short.sessions <= long.sessions <= 2 * short.sessions
    first, second = cheapest_first([cost(size, one, about(step_s)), cost(size, other, about(step_s))])
    assert first.usd <= second.usd
