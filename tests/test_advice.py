"""What would lower the peak, and the drawing of a step."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from test_run import TINY, run_of

from vramplan import plan
from vramplan.planner.cli import cli
from vramplan.planner.quick import peak_bytes
from vramplan.planner.report import _timeline as drawn
from vramplan.planner.report import plain

BIG = TINY | {"vocab_size": 50_000, "num_hidden_layers": 8}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full", "gradient_checkpointing": False, "batch_size": 4, "optimizer": "adamw_torch"},
        {"method": "lora", "lora_dropout": 0.1, "attention": "eager"},
        {"method": "qlora", "double_quant": False},
    ],
)
def test_each_change_saves_what_planning_it_says(options: dict[str, Any]) -> None:
    advice = plan(BIG, seq_len=256, **options).advice()
    now = peak_bytes(run_of(BIG, seq_len=256, **options))
    assert len(advice) > 3
    saved = [each.saves_bytes for each in advice[:-1]]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0.005 * now
    for each in advice:
        if each.change.keys().isdisjoint({"method", "trainer"}):
            assert now - peak_bytes(run_of(BIG, **{"seq_len": 256, **options, **each.change})) == each.saves_bytes
    assert advice[-1].change == {"batch_size": 2 * options.get("batch_size", 1)}


def test_advice_is_typed_as_flags() -> None:
    flags = [each.flags for each in plan(BIG, method="qlora", seq_len=256, gradient_checkpointing=False).advice()]
    assert "--gradient-checkpointing" in flags
    assert "--seq-len 128" in flags
    assert "--batch-size 2" in flags


def test_advice_knows_how_gpus_share_the_work() -> None:
    def changes(**options: Any) -> list[dict[str, Any]]:
        return [each.change for each in plan(BIG, method="full", seq_len=256, num_gpus=4, **options).advice()]

    ddp, fsdp = changes(parallel="ddp"), changes(parallel="fsdp", reshard_after_forward=False)
    assert {"parallel": "fsdp"} in ddp
    assert {"num_gpus": 8} not in ddp
    for change in ({"num_gpus": 8}, {"cpu_offload": True}, {"mixed_precision": "no"}, {"reshard_after_forward": True}):
        assert change in fsdp
        assert change not in ddp
    assert {"parallel": "fsdp"} not in fsdp
    assert {"cpu_offload": True} not in changes(parallel="zero3", cpu_offload=True)


def test_what_cannot_be_had_is_no_advice() -> None:
    gpt_oss = {"model_type": "gpt_oss", **{k: v for k, v in TINY.items() if k != "model_type"}, "head_dim": 64}
    made = plan(gpt_oss | {"num_local_experts": 4, "num_experts_per_tok": 2}, method="lora", attention="eager")
    assert not [each for each in made.advice() if each.change.get("attention") == "sdpa"]


def test_the_timeline_holds_the_peak_and_follows_the_step() -> None:
    made = plan(BIG, method="full", seq_len=256)
    moments = made.memory.timeline
    assert max(moment.peak_bytes for moment in moments) == made.memory.peak_allocated_bytes
    assert next(m for m in moments if m.peak_bytes == made.memory.peak_allocated_bytes).phase == made.memory.peak_phase
    phases = [moment.phase for moment in moments]
    assert len(set(phases)) == len(phases)
    layers = [name for name in phases if name.startswith("forward, layer")]
    assert layers == [f"forward, layer {i}" for i in range(8)]
    assert phases.index("loss, forward") < phases.index("loss, backward") < phases.index("backward, layer 7")


def test_the_drawing_fits_eighty_columns_and_marks_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", type("Stdout", (), {"encoding": "utf-8"})())
    for layers in (1, 3, 80):
        lines = list(plain([drawn(plan(TINY | {"num_hidden_layers": layers}, method="lora", seq_len=64))]))
        assert max(map(len, lines)) <= 80
        assert any("peak" in line for line in lines[1:])
        assert "|forward" in lines[-1]
        assert "|backward" in lines[-1]


def test_both_at_the_command_line() -> None:
    runner = CliRunner()
    shown = runner.invoke(
        cli, ["gpt2", "--method", "full", "--seq-len", "64", "--advice", "--timeline"], standalone_mode=False
    )
    assert shown.exception is None
    assert "What would change the peak" in shown.output
    assert "Allocated memory over the step" in shown.output
    answer = runner.invoke(cli, ["gpt2", "--seq-len", "64", "--advice", "--json"], standalone_mode=False)
    assert {"change", "saves_bytes"} == json.loads(answer.output)["advice"][0].keys()


def test_no_batch_is_advised_that_cannot_be_asked_for() -> None:
    assert not any(
        each.change == {"batch_size": 1_200_000}
        for each in plan("gpt2", method="lora", batch_size=600_000, seq_len=1).advice()
    )
