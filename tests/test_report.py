"""What is printed: words, sums, widths, and the same on a terminal as in a pipe."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import TINY

from vramplan import Plan, plan
from vramplan.planner import catalog, report
from vramplan.planner.memory import Component
from vramplan.planner.report import Block, Row, plain, rounded
from vramplan.planner.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WORDS = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return plan(TINY, stack="torch=2.13,transformers=5.23")


def with_memory(tiny: Plan, sizes: Sequence[int], reserved: int = 0, context: int = 0) -> Plan:
    """A plan whose memory has parts of these sizes, and nothing else that counts."""
    parts = tuple(Component(f"part {i}", size, f"{size} B", "a source") for i, size in enumerate(sizes))
    memory = dataclasses.replace(
        tiny.memory,
        components=parts,
        peak_allocated_bytes=sum(sizes),
        peak_reserved_bytes=sum(sizes) + reserved,
        context_bytes=context,
    )
    return dataclasses.replace(tiny, memory=memory)


def printed(made: Plan, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    report.print_plan(made, **options)
    return capsys.readouterr().out


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(made: Plan, monkeypatch: pytest.MonkeyPatch, columns: int, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    report.print_plan(made, explain=True)
    return terminal.getvalue()


def block(capsys: pytest.CaptureFixture[str], heading: str) -> list[str]:
    """The lines of what was printed under a heading."""
    return capsys.readouterr().out.partition(f"\n\n{heading}")[2].partition("\n\n")[0].splitlines()[1:]


def figures(text: str) -> list[tuple[str, int]]:
    """The memory table as it stands: names, and GiB without their point."""
    table = text.partition("Memory at the peak")[2].partition("\n\n")[0].splitlines()[2:]
    found = [re.fullmatch(r"(.*?) +([\d,]+\.\d+)", line) for line in table]
    return [(match[1], int(match[2].replace(",", "").replace(".", ""))) for match in found if match]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "QLoRA r=16 on all linear layers, batch 1 x 2048, adamw_torch_fused, checkpointing, one GPU"),
        (
            {"method": "full", "seq_len": 64},
            "full fine-tuning, batch 1 x 64, adamw_torch_fused, checkpointing, one GPU",
        ),
        (
            {"method": "lora", "rank": 8, "target_modules": "attention", "gradient_checkpointing": False},
            "LoRA r=8 on attention, batch 1 x 2048, adamw_torch_fused, no checkpointing, one GPU",
        ),
        ({"target_modules": "q_proj,v_proj"}, "QLoRA r=16 on q_proj, v_proj, batch"),
        ({"weights_dtype": "fp32", "mixed_precision": "no"}, "checkpointing, fp32 weights, no autocast, one GPU"),
        ({"weights_dtype": "fp16", "mixed_precision": "fp16"}, "checkpointing, fp16 weights, fp16 autocast, one GPU"),
        ({"double_quant": False, "prepare_kbit": False}, "no double quantisation, no prepare_kbit, one GPU"),
        (
            {"gradient_accumulation_steps": 4, "attention": "eager", "lora_dropout": 0.1, "padded": True},
            "checkpointing, padded, LoRA dropout 0.1, 4 micro-steps, eager attention, one GPU",
        ),
    ],
)
def test_the_title_says_the_recipe(options: dict[str, Any], words: str) -> None:
    assert words in report.title(plan(TINY, **options))
    assert report.title(plan(TINY, **options)).startswith("llama, ")


def test_parameters(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(tiny, capsys)
    counts = tiny.counts
    assert f"trainable     {counts.trainable:,}" in re.sub(r" {3,}", "     ", text)
    share = 100 * counts.trainable / (counts.trainable + counts.total)
    assert f"{share:.4f} % of both, as PEFT counts" in text
    assert f"{counts.adapter_bytes:,} B" in text
    assert "adapter" not in printed(plan(TINY, method="full"), capsys).partition("Memory")[0]


@given(st.lists(st.integers(0, 2**40), max_size=12), st.sampled_from([2, 4]))
def test_rounded_parts_add_up_to_the_rounded_sum(sizes: list[int], digits: int) -> None:
    shown = rounded(sizes, digits)
    assert abs(sum(shown) * GIB - sum(sizes) * 10**digits) * 2 <= GIB
    for size, whole in zip(sizes, shown, strict=True):
        assert abs(whole * GIB - size * 10**digits) < GIB


def test_rounding_by_hand() -> None:
    third = GIB // 3
    assert rounded([third, third, third + 1]) == [33, 33, 34]
    assert rounded([GIB, 0, GIB // 100 * 2]) == [100, 0, 2]
    assert rounded([]) == []


@given(st.lists(st.integers(0, 2**37), min_size=1, max_size=9), st.integers(0, 2**33), st.integers(0, 2**31))
def test_printed_rows_add_up_to_printed_sums(sizes: list[int], reserved: int, context: int) -> None:
    made = with_memory(plan_of_tests(), sizes, reserved, context)
    rows = figures("\n".join(plain([report._memory(made)])))
    total, sums = 0, []
    for name, shown in rows:
        if name.startswith("= "):
            assert shown == total
            sums.append(name)
        else:
            assert shown >= 0
            total += shown
    assert sums == ["= peak allocated", "= peak reserved", "= device total"]


_PLANS: list[Plan] = []


def plan_of_tests() -> Plan:
    """One plan for all examples of Hypothesis, which takes no fixture of a function's."""
    if not _PLANS:
        _PLANS.append(plan(TINY))
    return _PLANS[0]


def test_parts_that_print_as_nothing_are_put_together(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict(figures(printed(with_memory(tiny, [2 * GIB, 4_000_000, 3_000_000]), capsys)))
    assert rows["part 0"] == 200
    assert rows["2 smaller parts"] == 1
    assert "part 1" in printed(with_memory(tiny, [2 * GIB, 400]), capsys)
    assert "smaller" not in printed(with_memory(tiny, [2 * GIB, GIB]), capsys)


def test_gpus_are_few_and_the_nearest(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(needed: int) -> list[str]:
        fits = tuple(fit._replace(needed_bytes=needed) for fit in tiny.gpus)
        text = printed(dataclasses.replace(tiny, gpus=fits), capsys)
        return text.partition("GPUs\n")[2].partition("\n\n")[0].splitlines()

    lines = listed(20 * GIB)
    assert [line.split()[:4] for line in lines if line[0] != " "] == [
        ["too", "small", "12", "-8.46"],
        ["too", "small", "16", "-5.44"],
        ["fits", "24", "2.02", "GiB"],
        ["fits", "32", "11.35", "GiB"],
        ["fits", "40", "19.37", "GiB"],
        ["fits", "48", "24.33", "GiB"],
    ]
    assert "rtx-4090" in "".join(lines)
    assert "* without bf16, planned in fp16 where named (--gpu)" in lines[-1]
    assert "none of the known cards" in listed(10**15)[-1]
    assert not any("too small" in line for line in listed(0))


def test_the_verdict_on_a_named_gpu(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fits 24GiB: " in printed(plan(TINY, gpu="24GiB"), capsys)
    tight = printed(plan(TINY, gpu="0.5GiB"), capsys)
    assert re.search(r"does not fit 0.5GiB: [\d.]+ GiB of the 0\.50 GiB that CUDA sees, [\d.]+ GiB too much", tight)
    assert "fits 24GiB" not in printed(tiny, capsys)


def test_the_verdict_on_a_gpu_that_holds_it_only_just(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    fit = next(fit for fit in tiny.gpus if fit.gpu.name == "rtx-4090")._replace(needed_bytes=30 * GIB, retries=2)
    made = dataclasses.replace(tiny, fit=fit, gpus=(fit,))
    text = " ".join(printed(made, capsys).split())
    assert "fits rtx-4090, but only just: it would take 30.00 GiB, and CUDA sees 23.52 GiB; " in text
    assert "PyTorch gives its cache back 2 times in the first steps to stay within, which costs time" in text
    assert "none of the known cards" in text  # the line above has said it
    once = dataclasses.replace(made, fit=fit._replace(retries=1))
    assert "gives its cache back once" in " ".join(printed(once, capsys).split())


def test_costs_are_few_and_say_which_is_the_fastest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    prices = {
        "t4": 0.1,
        "l4": 0.2,
        "a10g": 0.3,
        "rtx-3090": 0.1,
        "rtx-4090": 0.1,
        "h200": 9,
        "b200": 90,
        "a100-40gb": 1,
    }
    lines = [f"here,{gpu},1,{usd},2026-11-20" for gpu, usd in prices.items()]
    file.write_text("\n".join(["provider,gpu,gpu_count,usd_per_hour,date", *lines, "cheap,rtx-3090,1,0.05,2026-11-20"]))
    report.print_plan(plan("llama-3.2-3b", method="lora", batch_size=2, prices=file))
    shown = block(capsys, "The whole run: 1,000 examples of 2,048 tokens, 3 epochs, 1,500 steps")
    assert len(shown) == 1 + 4 + 1
    assert shown[-1].endswith("h200       here, on demand 2026-11-20, the fastest")  # b200: as slow a host, and dearer
    assert sum("rtx-3090" in line for line in shown) == 1
    report.print_plan(plan("llama-3.2-3b", prices=file, gpu="rtx-3090"))
    shown = block(capsys, "The whole run")
    assert len(shown) == 3  # both its offers
    assert "fastest" not in "".join(shown)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        ("rtx-3060", "rtx-3060 does not hold it"),
        ("24GiB", "no known offer of 24GiB; a file of your own may have one (--prices)"),
    ],
)
def test_why_there_is_no_price(gpu: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    report.print_plan(plan("llama-3.1-8b", gpu=gpu))
    assert block(capsys, "The whole run") == [why]


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("llama-3.1-8b", stack="torch=1.0", seq_len=10**6)
    text = " ".join(printed(made, capsys).split())
    for note in (*made.warnings, *made.memory.notes):
        assert f"- {note}" in text


def test_a_count_that_nobody_published_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("llama-3.1-8b")
    assert made.bundled is not None
    assert "published" not in printed(made, capsys)
    unread = dataclasses.replace(made, bundled=dataclasses.replace(made.bundled, verified="config-read"))
    assert "the parameter count of llama-3.1-8b agrees with no published one" in " ".join(
        printed(unread, capsys).split()
    )


def test_assumed_fields_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    assert "transformers' defaults: num_key_value_heads" in " ".join(printed(plan(config), capsys).split())


def test_explain_shows_every_part(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(tiny, capsys, explain=True).split())
    for part in tiny.memory.components:
        assert f"{part.bytes:,} B {part.name} {part.formula} {part.source}" in text


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "gemma-2-2b"])
def test_a_pipe_gets_80_columns_without_colour(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(plan(name, gpu="t4", seq_len=1024), capsys, explain=True)
    assert "\x1b" not in text
    assert text.isascii()
    for line in text.splitlines():
        assert len(line) <= 80
        assert line == line.rstrip()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_same_words(columns: int, tiny: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(tiny, monkeypatch, columns)
    assert "\x1b[1m" in text
    bare = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert all(len(line) <= columns for line in bare.splitlines())
    words = " ".join(plain([*_page(tiny)])).split()
    assert sorted(bare.split()) == sorted(words)


def _page(made: Plan) -> list[Block]:
    pages: list[Block] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "show", pages.extend)
        report.print_plan(made, explain=True)
    return pages


def test_no_color_is_respected(tiny: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(tiny, monkeypatch, 80, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", text)
    assert "\x1b" not in on_terminal(tiny, monkeypatch, 80, TERM="dumb")


@given(st.lists(st.tuples(WORDS, WORDS, st.lists(WORDS, max_size=30).map(" ".join)), min_size=1, max_size=5))
def test_plain_text_loses_nothing(rows: list[tuple[str, str, str]]) -> None:
    lines = list(plain([Block("A heading", "<><", [Row(row) for row in rows])]))
    assert lines[0] == "A heading"
    assert " ".join(lines[1:]).split() == " ".join(cell for row in rows for cell in row).split()
    assert all(len(line) <= 80 or " " not in line.strip() or len(line) < 130 for line in lines)


def test_plain_text_by_hand() -> None:
    block = Block("", "<>", [Row(("", "GiB")), Row(("weights", "1.5")), Row(("total", "12.25"), "bold")])
    assert list(plain([block, Block("Notes", "<<", [Row(("-", "so " * 20))])], width=30)) == [
        "           GiB",
        "weights    1.5",
        "total    12.25",
        "",
        "Notes",
        "-  so so so so so so so so so",
        "   so so so so so so so so so",
        "   so so",
    ]


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_error("two\nlines\t\x0b of  it")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vramplan: two lines of it\n"


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_models(catalog.models())
    out = capsys.readouterr().out
    assert re.search(r"^llama-3\.1-8b +8,030,261,248 +131,072  llama$", out, re.MULTILINE)
    assert len(out.splitlines()) == 1 + len(catalog.models())
    report.print_gpus(catalog.gpus())
    out = capsys.readouterr().out
    assert re.search(r"^rtx-4090 +24 +23\.52 GiB  yes   Ada Lovelace$", out, re.MULTILINE)
    assert all(len(line) <= 80 for line in out.splitlines())
