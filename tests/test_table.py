"""`vramplan table`: the product, the formats read back by their own parsers, and tables that stand in documents."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_plan import TINY

from vramplan import UsageError, plan
from vramplan.planner import catalog, pasted, report_table, trial
from vramplan.planner import table as module
from vramplan.planner.parallel import completed, in_order
from vramplan.planner.report import plain
from vramplan.planner.table import COLUMNS, Cell, Table, table
from vramplan.planner.training import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER = TINY | {"num_hidden_layers": 3, "hidden_size": 128}
DAY = datetime.date(2026, 11, 22)
PRICES = """provider,gpu,gpu_count,usd_per_hour,date
near,rtx-4090,1,0.40,2026-11-20
far,h100,1,3.00,2026-11-21
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "other.json").write_text(json.dumps(OTHER))
    (tmp_path / "prices.csv").write_text(PRICES)


@pytest.fixture
def run(run: Any) -> Any:
    return lambda line: run(f"table {line}")


@pytest.fixture
def wrong(run: Any) -> Any:
    def command(line: str) -> str:
        code, out, err = run(line)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return str(err)

    return command


def made(**asked: Any) -> Table:
    return table(asked.pop("models", ["tiny.json"]), **{"today": DAY, "columns": "trainable"} | asked)


def rows(found: Table) -> list[list[str]]:
    sheet = report_table.layout(found)
    return [sheet.header, *sheet.rows]


# --------------------------------------------------------------------------------------------- the product, its cells


def test_the_product_in_the_order_it_is_named() -> None:
    found = made(models=["tiny.json", "other.json"], rank=[16, 8], method=["lora", "qlora"])
    assert [row[:3] for row in rows(found)] == [
        ["model", "rank", "method"],
        ["tiny.json", "16", "lora"],
        ["tiny.json", "16", "qlora"],
        ["tiny.json", "8", "lora"],
        ["tiny.json", "8", "qlora"],
        ["other.json", "16", "lora"],
        ["other.json", "16", "qlora"],
        ["other.json", "8", "lora"],
        ["other.json", "8", "qlora"],
    ]


def test_one_gpu_shares_with_none() -> None:
    found = made(num_gpus=[1, 2], parallel=["fsdp", "zero2"], cpu_offload=[False], method="full", columns="allocated")
    assert [row[:2] for row in rows(found)] == [["num_gpus", "parallel"], ["1", "-"], ["2", "fsdp"], ["2", "zero2"]]
    alone = plan("tiny.json", method="full")
    assert found.cells[0].values == (alone.memory.peak_allocated_bytes,)
    assert found.cells[0].run is not None
    assert found.cells[0].run.as_dict() == alone.options.as_dict()
    (lost,) = made(num_gpus=1, parallel=["fsdp", "none"], columns="allocated").cells[:1]
    assert lost.refused  # where the number is not varied, it is a wrong question


def test_each_cell_is_its_plan() -> None:
    columns = [name for name, column in COLUMNS.items() if column.name not in ("hours", "cost", "kwh", "offer")]
    found = made(method=["full", "qlora"], seq_len=[64, 128], gpu="rtx-4090", columns=columns, stack="torch=2.12")
    for cell in found.cells:
        _, method, seq_len, *_ = cell.labels
        one = plan("tiny.json", method=method, seq_len=seq_len, gpu="rtx-4090", stack="torch=2.12")
        assert one.fit
        assert one.time
        assert cell.run == one.options
        values = dict(zip(columns, cell.values, strict=True))
        assert values["memory"] == one.memory.device_bytes
        assert values["allocated"] == one.memory.peak_allocated_bytes
        assert values["trainable"] == one.counts.trainable
        assert values["headroom"] == one.fit.headroom_bytes
        assert values["step_time"] == one.time.step_s
        parts = {part.name: part.bytes for part in one.memory.components}
        assert values["weights"] == parts["weights"] + parts.get("weights, 4 bit", 0)
        assert values["download"] == one.sizes()[0].bytes


def test_the_run_costs_what_its_plan_does_however_long_it_is() -> None:
    found = made(epochs=[1, 3], examples=[1000, 2000], columns="cost,hours,offer", prices="prices.csv")
    for cell, (epochs, examples) in zip(found.cells, [(1, 1000), (1, 2000), (3, 1000), (3, 2000)], strict=True):
        (best, *_), _ = plan("tiny.json", epochs=epochs, examples=examples, prices="prices.csv").costs()
        assert cell.values == (best.usd, best.hours, "rtx-4090, near")
        assert cell.offer == best.offer


def test_parameters_alone_take_no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make", lambda *_, **__: pytest.fail("a plan was made"))
    found = made(rank=[8, 16], columns="total,trainable,trainable_percent,adapter")
    # each of 2 layers: q and o 64 + 64, k and v 64 + 32; gate, up and down 64 + 128
    one_rank = 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert [cell.values[1] for cell in found.cells] == [8 * one_rank, 16 * one_rank]


def test_what_a_method_does_not_have_is_left_out_of_its_runs() -> None:
    found = made(method=["full", "lora"], rank=[8, 16])
    assert [row[:2] for row in rows(found)[1:]] == [["full", "-"], ["lora", "8"], ["lora", "16"]]


def test_several_sets_of_target_modules() -> None:
    found = made(target_modules=["q_proj,v_proj", ["k_proj"], "all-linear"])
    assert [row[0] for row in rows(found)[1:]] == ["q_proj,v_proj", "k_proj", "all-linear"]


def test_a_cell_that_cannot_be_planned_says_why() -> None:
    bloom = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 320, "n_positions": 128}
    found = made(models=[bloom, TINY], seq_len=[64, 256], columns="memory,trainable")
    sheet = report_table.layout(found)
    assert sheet.rows[1] == ["gpt2", "256", "- (1)", "- (1)"]
    assert sheet.rows[3][2:] != ["- (1)", "- (1)"]
    assert "128 learned positions" in sheet.notes[0]
    assert len(sheet.notes) == 1


def test_a_value_that_there_is_not_says_why() -> None:
    found = made(method=["full", "lora"], columns="adapter,cost", gpu="rtx-3090", prices="prices.csv")
    sheet = report_table.layout(found)
    assert sheet.rows[0] == ["full", "- (1)", "- (2)"]
    assert sheet.rows[1][2] == "- (2)"
    assert sheet.notes == [
        "full fine-tuning saves no adapter",
        "no known offer of rtx-3090; a file of your own may have one (--prices)",
    ]


def test_one_question_that_is_wrong_is_an_error() -> None:
    with pytest.raises(UsageError, match="rank 8 belongs to lora and qlora"):
        made(method="full", rank=8)


def test_several_gpus() -> None:
    found = made(num_gpus=[1, 2], columns="memory,allocated", method="lora", seq_len=64)
    one, two = (plan("tiny.json", num_gpus=n, method="lora", seq_len=64).memory for n in (1, 2))
    assert found.cells[0].values == (one.device_bytes, one.peak_allocated_bytes)
    assert found.cells[1].values == (two.device_bytes, two.peak_allocated_bytes)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"columns": "memry"}, "did you mean memory"),
        ({"columns": "fits"}, "add one or several, such as --gpu"),
        ({"rank": [8, "many"]}, "rank is 'many'; it must be a whole number"),
        ({"gpu": ["rtx-4090", "rtx-5000000"]}, "unknown GPU"),
        ({"stack": ["torch=2.11", "tensorflow=2"]}, "unknown package 'tensorflow'"),
        ({"pivot": "rank"}, "unknown axis 'rank'"),
        ({"models": []}, "no model is named"),
        ({"models": [TINY, OTHER]}, "two models are called llama"),
        ({"models": ["llama-3.1-9b"]}, "unknown model 'llama-3.1-9b'"),
        ({"rank": []}, "rank names no value"),
        ({"ranks": [8]}, "unknown option 'ranks'; did you mean rank"),
        ({"rank": list(range(1, 1001)), "batch_size": list(range(1, 1001))}, "1,000,000 cells, more than 100,000"),
    ],
)
def test_a_wrong_question_names_what_mends_it(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        made(**asked)


# ----------------------------------------------------------------------------------------------------------- the pivot


def test_the_pivot_puts_values_side_by_side() -> None:
    found = made(models=["tiny.json", "other.json"], rank=[8, 16], method=["lora", "full"], pivot="rank")
    header, *lines = rows(found)
    assert header == ["model", "method", "rank 8", "rank 16"]
    assert len(lines) == 4
    trainable = [str(f"{cell.values[0]:,}") for cell in found.cells]
    assert lines[0] == ["tiny.json", "lora", trainable[0], trainable[2]]
    assert lines[1] == ["tiny.json", "full", trainable[1], trainable[3]]


def test_several_columns_of_each_value() -> None:
    found = made(method=["lora", "qlora"], rank=[8, 16], pivot="method", columns="total,trainable")
    assert rows(found)[0] == ["rank", "lora: parameters", "lora: trainable", "qlora: parameters", "qlora: trainable"]
    assert [row[0] for row in rows(found)[1:]] == ["8", "16"]


def test_the_only_axis_can_be_the_pivot() -> None:
    assert rows(made(rank=[8, 16], pivot="rank"))[0] == ["model", "rank 8", "rank 16"]
    models = made(models=["tiny.json", "other.json"], pivot="model")
    assert rows(models)[0] == ["tiny.json", "other.json"]
    assert len(rows(models)) == 2


# --------------------------------------------------------------------------------------------------------- the formats

ODD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        *(
            "|",
            "a|b",
            "\\|",
            "`x`",
            "<b>",
            "&amp;",
            "*x*",
            "__x__",
            "_x_",
            "a_b",
            "[x](y)",
            "~~x~~",
            "=1+1",
            "+1",
            "-1",
        ),
        *(
            "\\",
            "a\\",
            "$x$",
            "100 %",
            "#",
            "{}",
            "--",
            "---",
            "'",
            '"',
            "a\nb",
            "a\r\nb",
            "\ufeff",
            "<!--",
            "^",
            "\t=1",
        ),
        "@x",
    ]
)


def odd(label: str, value: str, remark: str) -> Table:
    """A table that holds any text: as a label, as a value, and beside it."""
    axis = module.Axis("model", (label, "second"))
    cells = (Cell((label,), (value,)), Cell(("second",), refused=remark or "why"))
    columns = (COLUMNS["peak_phase"],)
    return Table((axis,), columns, cells, None, "vramplan table " + shlex.quote("a`b|c"), DAY, (remark or "x",), ())


def squeezed(text: str) -> str:
    """What Markdown and HTML may make of white space, and formats of what cannot be printed."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


@given(ODD, ODD, ODD)
def test_markdown_reads_back(label: str, value: str, remark: str) -> None:
    text = report_table.markdown(odd(label, value, remark))
    (found,) = pasted.tables(text.encode(), "x.md")
    assert found.rows == [["model", "peak in"], [squeezed(label), squeezed(value)], ["second", "- (1)"]]
    assert found.words == ["a`b|c", "--format", "markdown"]
    kinds = [token.type for token in MarkdownIt("commonmark").enable("table").parse(text) if token.level == 0]
    assert kinds == [*(f"{name}_{end}" for name in ("paragraph", "table", "bullet_list") for end in ("open", "close"))]


@given(ODD, ODD, ODD)
def test_csv_reads_back_and_holds_no_formula(label: str, value: str, remark: str) -> None:
    text = report_table.comma_separated(odd(label, value, remark))
    header, first, second, *rest = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert header == ["model", "peak_phase", "notes"]
    for field, text in zip(first, (label, value), strict=False):
        assert squeezed(field.removeprefix("'")) == squeezed(text.removeprefix("'"))
    assert second[1] == ""
    fields = [field for row in (first, second, *rest) for field in row if field != "-"]
    assert not any(field.lstrip().startswith(("=", "+", "-", "@")) for field in fields)
    assert not any(letter in field for field in fields for letter in "\t\r\n")
    assert all(row[0].startswith("# ") for row in rest)
    assert all(len(row) == 1 for row in rest)


class Cells(HTMLParser):
    """The texts of a table's cells, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag in ("td", "th", "code"):
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.tags[-1] in ("td", "th", "code"):
            self.found[-1] += data.removesuffix("\n")


@given(ODD, ODD, ODD)
def test_html_reads_back(label: str, value: str, remark: str) -> None:
    cells = Cells()
    cells.feed(report_table.hypertext(odd(label, value, remark)))
    wanted = ["vramplan table 'a`b|c' --format html", "model", "peak in", label, value, "second", "- (1)"]
    assert [squeezed(text) for text in cells.found[:7]] == [squeezed(text) for text in wanted]
    assert set(cells.tags) <= {"style", "table", "caption", "br", "code", "thead", "tbody", "tfoot", "tr", "th", "td"}


@given(ODD, ODD, ODD)
def test_latex_holds_no_special_of_the_text(label: str, value: str, remark: str) -> None:
    text = report_table.latex(odd(label, value, remark))
    lines = text.splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 2
    backwards = {code: letter for letter, code in report_table._LATEX.items()}
    cells = body[0].removesuffix(r" \\").split(" & ")
    codes = "|".join(map(re.escape, sorted(backwards, key=len, reverse=True)))
    texts = [re.sub(codes, lambda match: backwards[match[0]], cell.replace("-{}", "-")) for cell in cells]
    assert [squeezed(cell) for cell in texts] == [squeezed(label), squeezed(value)]
    rest = re.sub(codes, "", body[0].removesuffix(r" \\").replace("-{}", "")).split(" & ")
    assert not any(letter in cell for cell in rest for letter in "\\{}$&#%^_~[]*\"'`<>|")
    assert "--" not in body[0]


def test_the_latex_of_a_command() -> None:
    text = report_table.latex(odd("a_b", "50 %", "--x ^2"))
    assert text.startswith("% vramplan table 'a`b|c' --format latex\n")
    assert r"a\_b & 50 \% \\" in text
    assert r"(1) -{}-x \textasciicircum{}2" in text


def test_json_holds_every_combination() -> None:
    found = report_table.to_dict(made(method=["full", "lora"], rank=[8, 16], columns="trainable,adapter", pivot="rank"))
    assert json.loads(json.dumps(found)) == found
    assert found["axes"]["rank"] == [8, 16]
    assert [(cell["method"], cell["rank"]) for cell in found["cells"]] == [
        ("full", None),
        ("full", None),
        ("lora", 8),
        ("lora", 16),
    ]
    assert found["cells"][0]["values"]["adapter"] is None
    assert found["cells"][0]["why"] == {"adapter": "full fine-tuning saves no adapter"}
    assert found["cells"][3]["values"]["adapter"] == plan("tiny.json", method="lora").counts.adapter_bytes


def test_figures_in_their_units() -> None:
    shown = {"B": "12.69", "MiB": "1.50", "count": "13,631,488", "%": "0.1695", "h": "2.3", "USD": "1,234.50"}
    values = {"B": 13_625_782_272, "MiB": 1_572_864, "count": 13_631_488, "%": 0.16946, "h": 2.3, "USD": 1234.5}
    assert {unit: report_table._text(unit, value) for unit, value in values.items()} == shown


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int | None) -> None:
    found = made(rank=[8, 16], method=["lora", "qlora"], columns="total,trainable,adapter", pivot="method")
    page = report_table.page(found, width)
    tables = [block for block in page if not block.heading]
    assert all(len(line) <= (width or 200) for line in plain(tables, width or 200))
    text = "\n".join(plain(page))
    assert all(cell in text for row in rows(found) for cell in row)
    assert len(tables) > 1 or width != 60


def test_the_caption_of_each_format(run: Any) -> None:
    for form in report_table.FORMATS:
        code, out, _ = run(f"tiny.json --rank 8,16 --columns trainable --format {form}")
        assert code == 0
        words = re.sub(r"\s+", " ", out).replace("{}", "").replace(r"\_", "_")
        for part in (
            "vramplan table tiny.json --rank 8,16 --stack torch=",
            datetime.date.today().isoformat(),
            "as PEFT",
        ):
            assert part in words, form


def test_prices_that_are_old_are_said_to_be() -> None:
    old = made(columns="cost", prices="prices.csv", today=datetime.date(2027, 6, 1))
    assert "more than 60 days old" in old.warnings[-1]
    assert "Prices of 2026-11-20" in report_table.markdown(old)
    assert not made(columns="cost", prices="prices.csv").warnings


# ------------------------------------------------------------------------------------------------- traced and remade


@pytest.mark.parametrize(
    "line",
    [
        "tiny.json other.json --method lora,qlora --columns memory",
        'tiny.json --target-modules "q_proj,v_proj" attention --rank 8,16 --columns trainable --pivot target_modules',
        "tiny.json --padded --no-padded --gradient-checkpointing --stack torch=2.11 torch=2.12,trl=1.16 --seq-len 64",
        "tiny.json --gpu rtx-4090,24GiB --no-calibration --columns fits,headroom --prices prices.csv --seq-len 64",
        "'./odd name.json' --rank 8 --columns total",
        "tiny.json --gpu rtx-4090,h100",
    ],
)
def test_the_command_of_a_caption_makes_the_same_table(line: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "odd name.json").write_text(json.dumps(TINY))
    code, out, _ = run(f"{line} --format markdown")
    assert code == 0
    (found,) = pasted.tables(out.encode(), "x.md")
    again = run(shlex.join(found.words))
    assert again == (0, out, "")


def test_what_was_not_calibrated_is_not_where_it_is_remade() -> None:
    assert made(gpu="rtx-4090", columns="memory", seq_len=64).command.endswith("--columns memory --no-calibration")
    assert "--no-calibration" not in made(columns="memory", seq_len=64).command


def test_options_of_a_profile(run: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('model = "tiny.json"\nrank = [8, 16]\ntarget_modules = ["q_proj", "v_proj"]\n')
    code, out, _ = run("--config plan.toml --columns trainable --json")
    found = json.loads(out)
    assert code == 0
    assert found["axes"]["model"] == ["tiny.json"]
    assert found["axes"]["rank"] == [8, 16]
    assert found["axes"]["target_modules"] == [["q_proj", "v_proj"]]
    assert json.loads(run("other.json --config plan.toml --rank 4 --json")[1])["axes"]["rank"] == [4]


def test_words_after_the_model(wrong: Any) -> None:
    assert "no model is named" in wrong("--rank 8")
    assert "unknown format 'excel'" in wrong("tiny.json --format excel")
    assert "--into needs the marker" in wrong("tiny.json --into x.md")
    assert "name the document (--into)" in wrong("tiny.json --between x")
    assert "by its own caption; leave rank out" in wrong("--check x.md --rank 8")


def test_help_names_every_column_and_option(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    words = set(re.findall(r"[\w-]+", out))
    assert words >= COLUMNS.keys()
    assert words >= {option.flag for option in OPTIONS.values()}


# ------------------------------------------------------------------------------------------------------- in a document


def document(head: bytes, tail: bytes, line_end: bytes, bom: bool) -> bytes:
    middle = line_end.join([b"<!-- sizes -->", b"an earlier table", b"<!-- /sizes -->"])
    return (b"\xef\xbb\xbf" if bom else b"") + head + line_end + middle + line_end + tail


PROSE = st.binary(max_size=60).filter(lambda raw: b"sizes" not in raw)


@given(PROSE, PROSE, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.text("ab|\n", max_size=20))
def test_the_rest_of_a_document_stays_byte_for_byte(
    head: bytes, tail: bytes, line_end: bytes, bom: bool, text: str
) -> None:
    before = document(head, tail, line_end, bom)
    after = pasted.put(before, "sizes", "markdown", text)
    start, end = before.index(b"<!-- sizes -->") + 14, before.index(b"<!-- /sizes -->")
    assert after.startswith(before[:start] + line_end)
    assert after.endswith(line_end + before[end:])
    middle = after[start : len(after) - len(before) + end]
    assert middle.decode().split() == text.split()
    assert b"\r" not in middle.replace(b"\r\n", b"")
    assert (b"\r" in middle) == (line_end == b"\r\n")
    assert pasted.put(after, "sizes", "markdown", text) == after


def test_into_writes_once_and_check_agrees(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "design.md"
    file.write_bytes(document(b"# Design", b"no newline at the end \xff", b"\r\n", True))
    file.chmod(0o640)
    line = "tiny.json --rank 8,16 --columns trainable --into design.md --between sizes"
    assert run(line) == (0, "design.md: the table is written\n", "")
    written = file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o640
    assert written.endswith(b"<!-- /sizes -->\r\nno newline at the end \xff")
    assert run(line) == (0, "design.md: the table is as it should be\n", "")
    yesterday = written.replace(datetime.date.today().isoformat().encode(), b"2026-01-31")
    file.write_bytes(yesterday)
    assert run(line)[1] == "design.md: the table is as it should be\n"
    assert file.read_bytes() == yesterday
    file.write_bytes(yesterday.replace(b"\xff", b""))
    code, out, _ = run("--check design.md")
    assert code == 0
    assert re.search(r"design.md, line 7: as vramplan \S+ makes it\n", out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_stale_table_names_its_cells(run: Any, tmp_path: Path) -> None:
    _, text, _ = run("tiny.json other.json --rank 8,16 --columns trainable,total --format markdown")
    count = f"{plan('tiny.json', rank=16).counts.trainable:,}"
    stale = text.replace(f"| {count} |", "| 1 |").replace("| other.json | 8 |", "| other.json | 9 |")
    (tmp_path / "design.md").write_text(f"> quoted\n\n{stale}\n\n{text}")
    code, out, err = run("--check design.md")
    assert (code, err) == (1, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].endswith("stale")
    assert lines[1:4] == [
        f"tiny.json, 16: trainable was 1, is {count}",
        "other.json, 8 is missing",
        "other.json, 9 is there no more",
    ]
    assert len(lines) == 5
    assert "as vramplan" in lines[4]


def test_a_table_that_an_editor_has_laid_out_anew_is_the_same(run: Any, tmp_path: Path) -> None:
    _, text, _ = run("tiny.json --rank 8,16 --columns trainable,total --format markdown")
    padded = re.sub(r" \| ", "   |  ", text).replace("---:", ":-----:").replace(" --columns ", "\n--columns ")
    (tmp_path / "design.md").write_text(padded)
    assert run("--check design.md")[0] == 0


def test_check_runs_no_more_than_a_table(run: Any, tmp_path: Path) -> None:
    """A document is untrusted: its commands neither write files nor check others."""
    text = run("tiny.json --rank 8 --columns trainable --format markdown")[1]
    (tmp_path / "victim.md").write_text("<!-- a -->\n<!-- /a -->\n")
    attack = text.replace("--format markdown", "--into victim.md --between a --check design.md")
    (tmp_path / "design.md").write_text(attack)
    assert run("--check design.md")[0] == 0
    assert (tmp_path / "victim.md").read_text() == "<!-- a -->\n<!-- /a -->\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no table", "no table in 'x.md' says"),
        ("`vramplan table 'tiny.json`\n\n| a |\n|---|\n| b |\n", "is no command line"),
        ("`vramplan table --wat`\n\n| a |\n|---|\n| b |\n", "x.md, line 3: No such option"),
        ("`vramplan table tiny.json --help`\n\n| a |\n|---|\n| b |\n", "No such option"),
        ("`vramplan table nobody/`\n\n| a |\n|---|\n| b |\n", "x.md, line 3: unknown model"),
    ],
)
def test_a_document_that_cannot_be_checked(text: str, words: str, wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(text)
    assert words in wrong("--check x.md")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not there"),
        ("<!-- a -->\n", "'<!-- /a -->' is not there"),
        ("<!-- a -->\n<!-- a -->\n<!-- /a -->\n", "is there 2 times"),
        ("<!-- /a -->\n<!-- a -->\n", "stands before its beginning"),
    ],
)
def test_a_document_without_its_marks_is_left_alone(text: str, words: str, wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(text)
    assert words in wrong("tiny.json --into x.md --between a")
    assert (tmp_path / "x.md").read_text() == text


def test_a_marker_and_a_document_of_a_kind(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("")
    (tmp_path / "x.pdf").write_text("")
    assert "is no marker" in wrong("tiny.json --into x.md --between 'a--b'")
    assert "say what it is (--format)" in wrong("tiny.json --into x.pdf --between a")
    assert "csv has no comments" in wrong("tiny.json --into x.pdf --between a --format csv")
    assert "'nowhere.md' is no file" in wrong("tiny.json --into nowhere.md --between a")


@pytest.mark.parametrize(("name", "marks"), [("x.html", "<!-- a -->\n<!-- /a -->"), ("x.tex", "% a\n% /a")])
def test_other_documents(name: str, marks: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"before\n{marks}\nafter")
    assert run(f"tiny.json --rank 8 --columns total --into {name} --between a")[0] == 0
    text = (tmp_path / name).read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "tabular" in text


# ------------------------------------------------------------------------------------------- in parallel, interrupted


def test_answers_come_in_the_order_of_their_tasks() -> None:
    assert list(in_order([partial(pow, i, 2) for i in range(9)])) == [i * i for i in range(9)]
    assert list(in_order([partial(pow, 3, 2)])) == [9]
    assert list(in_order([])) == []


def test_cells_are_the_same_in_parallel() -> None:
    asked: dict[str, Any] = {
        "models": ["tiny.json", "other.json"],
        "seq_len": list(range(16, 272, 16)),
        "columns": "allocated",
    }
    assert made(**asked, each=completed) == made(**asked, each=trial.one_after_another)


def test_what_is_done_is_shown_when_it_is_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tasks: Any) -> Iterator[Any]:
        yield tasks[0]()
        raise KeyboardInterrupt

    monkeypatch.setattr(report_table, "completed", interrupted)
    seq_len = ",".join(map(str, range(16, 176, 16)))
    code, out, _ = run(f"tiny.json --seq-len {seq_len} --columns allocated --format markdown")
    assert code == 130
    assert "interrupted: 8 of 10 cells are planned" in out
    assert "| 160 | - (1) |\n" in out


def test_an_interrupted_table_is_not_written(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(tasks: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(report_table, "completed", interrupted)
    (tmp_path / "x.md").write_text("<!-- a -->\n<!-- /a -->")
    assert run("tiny.json --into x.md --between a")[:2] == (130, "")
    assert (tmp_path / "x.md").read_text() == "<!-- a -->\n<!-- /a -->"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="children are read from Linux's /proc")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core plans by itself")
def test_ctrl_c_ends_all_processes() -> None:
    lengths = ",".join(map(str, range(128, 128 * 200, 128)))
    words = [sys.executable, "-m", "vramplan", "table", "llama-3.1-8b", "--seq-len", lengths, "--json"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    children: list[str] = []
    while len(children) < 3 and process.poll() is None:  # one keeps account of resources
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert not out or json.loads(out)["missing"]
    ends = time.monotonic() + 20
    while any(map(running, children)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(map(running, children))


def running(process: str) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty where it has ended and nobody has asked
    except OSError:
        return False


def test_the_known_gpus_are_the_smallest_first() -> None:
    """What "smallest GPU" means: by what CUDA shows a process."""
    (cell,) = made(models=["llama-3.2-1b"], columns="gpu", seq_len=128).cells
    name = str(cell.values[0]).split()[0]
    one = plan("llama-3.2-1b", seq_len=128)
    smaller = [fit for fit in one.gpus if fit.gpu.budget_bytes < catalog.gpu(name).budget_bytes]
    assert not any(fit.fits and not fit.lacks for fit in smaller)


def test_several_gpus_beside_one() -> None:
    """One GPU shares with none, and a host that is let whole is paid for whole."""
    Path("8.csv").write_text("provider,gpu,gpu_count,usd_per_hour,date\nfar,h100,8,24,2026-11-20\n")
    found = made(
        method="full", parallel="fsdp", num_gpus=[1, 2], columns="memory,cost,offer", gpu="h100", prices="8.csv"
    )
    assert "parallel fsdp where there are several GPUs" in found.assumptions[0]
    assert [row[-1] for row in report_table.layout(found).rows] == ["h100, far, 8 GPUs"] * 2
    across = made(parallel="fsdp", num_gpus=[1, 2], columns="memory,allocated", gpu="h100", pivot="num_gpus")
    assert report_table.layout(across).header[1:3] == ["num_gpus 1: memory, GiB", "num_gpus 1: allocated, GiB"]
