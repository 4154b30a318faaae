"""Pictures (`--plot`): what is drawn is what was planned or measured, in files that tell where they are from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_capacity import GPU, MODEL

from vramplan import UsageError, __version__, plan
from vramplan.planner import capacity, cli, report_plots, verify
from vramplan.planner.report import title
from vramplan.planner.report_plots import (
    CACHED,
    CONTEXT,
    NCCL,
    SMALLER,
    Bar,
    bars,
    colours_of,
    draw,
    stacked,
    together,
)
from vramplan.planner.table import table
from vramplan.planner.units import GIB, format_gib

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from vramplan.planner.plan import Plan

MIB = 2**20
COMMAND = "vramplan gpt2 --seq-len 512"


@pytest.fixture(scope="module")
def gpt2() -> Plan:
    return plan("gpt2", method="full", seq_len=512, gpu="rtx-3080")


@pytest.fixture(scope="module")
def found() -> capacity.Capacity:
    return capacity.fit(MODEL, gpu=GPU, seq_len=512)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert isinstance(end.value.code, int)
    return end.value.code


def texts(file: Path) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def scores() -> list[verify.Score]:
    """Two runs: 8 GiB allocated and planned 1 % more; 16 GiB and planned exactly; and one that has no figures."""

    def run(method: str, size: float) -> verify.Run:
        figures = {"allocated": size * GIB, "reserved": 2 * size * GIB} if size else {}
        return verify.Run("a", "f", 1, {}, {"method": method}, "h200", None, {}, "ok", None, None, figures)

    return [
        verify.Score(run("lora", 8), {"allocated": 0.01, "reserved": -0.02}),
        verify.Score(run("full", 16), {"allocated": 0.0, "reserved": 0.0}),
        verify.Score(run("qlora", 0), failed="no"),
    ]


# --------------------------------------------------------------------------------------------------------- the figures


def test_the_timeline_is_as_high_as_the_plan(gpt2: Plan) -> None:
    highest, ends = report_plots.timeline(gpt2).axes[0].patches
    moments = gpt2.memory.timeline
    assert [value * GIB for value in highest.get_data().values] == [moment.peak_bytes for moment in moments]
    assert [value * GIB for value in ends.get_data().values] == [moment.end_bytes for moment in moments]


@pytest.mark.parametrize("phases", ["loading", "saving", "evaluation", "generation", "merging"])
def test_the_timeline_of_another_phase_says_which(phases: str, tmp_path: Path) -> None:
    made = plan(MODEL, method="lora", seq_len=512, phases=phases)
    draw(str(tmp_path / "a.svg"), "timeline", made, COMMAND)
    assert " ".join(texts(tmp_path / "a.svg")).count(phases) > 1


def widths(figure: Figure) -> dict[str, list[float]]:
    """The bytes of each part of a breakdown's bars, from the top."""
    axes = figure.axes[0]
    return {each.get_label(): [round(bar.get_width() * GIB) for bar in each] for each in axes.containers}


def test_the_breakdown_adds_up_to_what_each_card_needs(gpt2: Plan) -> None:
    drawn = widths(report_plots.breakdown(gpt2))
    needed = {fit.gpu.name: fit for fit in gpt2.gpus}
    shown = [needed[bar.label.split(" and ")[0]] for bar in bars(gpt2)]
    assert [sum(sizes) for sizes in zip(*drawn.values(), strict=True)] == [fit.needed_bytes for fit in shown]
    assert drawn["optimizer states"][0] == next(
        each.bytes for each in gpt2.memory.components if each.name == "optimizer states"
    )


def test_the_line_is_what_cuda_sees_of_the_card(gpt2: Plan) -> None:
    named = next(bar for bar in bars(gpt2) if bar.label == "rtx-3080")
    assert gpt2.fit
    assert named.limit_bytes == gpt2.fit.gpu.budget_bytes
    assert sum(named.parts.values()) + gpt2.fit.headroom_bytes == named.limit_bytes
    lines = [line.get_xdata()[0] * GIB for line in report_plots.breakdown(gpt2).axes[0].lines]
    assert lines == [bar.limit_bytes for bar in bars(gpt2)]


def test_one_card_of_a_size_and_the_named_one_of_its_own(gpt2: Plan) -> None:
    budgets = [bar.limit_bytes or 0 for bar in bars(gpt2)]
    assert budgets == sorted(set(budgets))
    assert [bar.label for bar in bars(gpt2)].count("rtx-3080") == 1


def test_memory_of_each_gpu_is_a_bar(gpt2: Plan) -> None:
    """Over the number of GPUs: one bar for one GPU, however the others share the work."""
    asked = {"method": "full", "seq_len": 512, "parallel": ["ddp", "fsdp"], "num_gpus": [1, 2, 64]}
    made = table(["gpt2"], gpu="rtx-3080", drawn=True, **asked)
    figure = report_plots.rows(made)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["1 GPU", "ddp, 2 GPUs", "ddp, 64 GPUs", "fsdp, 2 GPUs", "fsdp, 64 GPUs"]
    drawn = widths(figure)
    names = list(drawn)
    assert names[-4:] == [SMALLER, CACHED, NCCL, CONTEXT]
    of_64 = plan("gpt2", gpu="rtx-3080", method="full", seq_len=512, parallel="fsdp", num_gpus=64)
    for place, each in ((0, gpt2), (4, of_64)):
        assert each.fit
        assert sum(drawn[name][place] for name in names) == pytest.approx(each.fit.needed_bytes, abs=len(names))
        assert drawn[NCCL][place] == pytest.approx(each.memory.nccl_bytes, abs=1)
    cells = [made.cells[0]._replace(labels=(f"model {n}", *made.cells[0].labels[1:])) for n in range(61)]
    models = made.axes[0]._replace(values=("model 0", "model 1"))
    with pytest.raises(UsageError, match=r"these are 61 bars, and a picture holds 60; leave values out \(--plot\)"):
        report_plots.rows(replace(made, axes=(models, *made.axes[1:]), cells=tuple(cells)))


def test_stacks_of_anything() -> None:
    given = [Bar(f"{n} GPUs", {"weights": 8 * GIB, "shard of something": 64 * GIB // n}, 80 * GIB) for n in (1, 8, 64)]
    figure = stacked("ranks", [*given, Bar("host", {"weights": GIB})])
    assert widths(figure) == {
        "weights": [8 * GIB, 8 * GIB, 8 * GIB, GIB],
        "shard of something": [64 * GIB, 8 * GIB, GIB, 0],
    }
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["8.00 GiB to spare", "64.00 GiB to spare", "71.00 GiB to spare", "1.00 GiB"]


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**12), min_size=1), min_size=1, max_size=4))
def test_small_parts_are_put_together_and_nothing_is_lost(given_parts: list[dict[str, int]]) -> None:
    given = [Bar("card", {**parts, CACHED: 10**9, CONTEXT: 10**9}) for parts in given_parts]
    merged = together(given)
    assert [bar.bytes for bar in merged] == [bar.bytes for bar in given]
    kept = {name for bar in merged for name in bar.parts} - {SMALLER}
    largest = max(bar.bytes for bar in given)
    assert all(max(bar.parts.get(name, 0) for bar in given) >= largest / 100 for name in kept)


def test_a_hundredth_is_small() -> None:
    bar = Bar("card", {"weights": 9_900, "batch": 99, "adapter": 101, "block rounding": 0})
    assert together([bar])[0].parts == {"weights": 9_900, "adapter": 101, SMALLER: 99}


def test_a_part_has_one_colour_and_no_two_share_one() -> None:
    names = [*report_plots.COLOURS, "a part of tomorrow", "another"]
    colours = colours_of(names)
    assert len(set(colours.values())) == len(names)
    assert colours_of(["adapter", "weights"]) == {name: colours[name] for name in ("adapter", "weights")}


def test_the_frontier_is_what_fits(found: capacity.Capacity) -> None:
    (line,) = report_plots.frontier(found).axes[0].lines
    fitting = [(cell.seq_len, cell.batch_size) for cell in found.frontier if cell.batch_size]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == fitting
    assert len(fitting) > 1


def test_without_a_frontier_a_sentence_says_why(tmp_path: Path) -> None:
    alone = capacity.fit(MODEL, gpu=GPU, over="rank", seq_len=512)
    with pytest.raises(UsageError, match=r"batch_size and seq_len.*--over"):
        draw(str(tmp_path / "a.svg"), "frontier", alone, COMMAND)


def test_planned_against_measured() -> None:
    first, second = report_plots.accuracy(scores()).axes
    points = sorted(tuple(point) for each in first.collections for point in each.get_offsets().tolist())
    assert points == [(8, pytest.approx(8.08)), (16, pytest.approx(15.68)), (16, 16), (32, 32)]
    errors = sorted(tuple(point) for each in second.collections for point in each.get_offsets().tolist())
    assert errors == [(8, 1.0), (16, -2.0), (16, 0.0), (32, 0.0)]
    assert second.get_title(loc="left").splitlines()[0] == "allocated: median 0.50 %, worst 1.00 %"


def test_without_measured_figures_a_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no measured run has figures"):
        draw(str(tmp_path / "a.svg"), "accuracy", scores()[2:], COMMAND)


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_ending_says_the_type(ending: str, start: bytes, gpt2: Plan, tmp_path: Path) -> None:
    file = tmp_path / f"step.{ending}"
    file.write_text("an earlier one")
    draw(str(file), "timeline", gpt2, COMMAND)
    assert file.read_bytes().startswith(start)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("what", ["timeline", "breakdown"])
def test_the_same_plan_is_the_same_file(what: str, gpt2: Plan, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(str(tmp_path / name), what, gpt2, COMMAND)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_says_what_and_where_from(gpt2: Plan, tmp_path: Path) -> None:
    draw(str(tmp_path / "a.svg"), "timeline", gpt2, COMMAND)
    written = texts(tmp_path / "a.svg")
    assert title(gpt2) in " ".join(written)
    assert f"peak {format_gib(gpt2.memory.peak_allocated_bytes)}" in written
    caption = next(each for each in written if COMMAND in each)
    assert f"vramplan {__version__}" in caption
    assert report_plots.prices._today().isoformat() in caption


def test_the_users_matplotlib_stays_as_it_is(gpt2: Plan, tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 31.0, "text.usetex": True, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        draw(str(tmp_path / "a.svg"), "timeline", gpt2, COMMAND)
        assert dict(mpl.rcParams) == before
    draw(str(tmp_path / "b.svg"), "timeline", gpt2, COMMAND)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("name", ["a $b$ \\frac{", "<b>&amp;", "模型"])
def test_names_are_not_markup(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    draw(str(tmp_path / "a.svg"), "timeline", plan(folder, seq_len=512), f"vramplan {name}")
    assert any(name in each for each in texts(tmp_path / "a.svg"))
    draw(str(tmp_path / "a.png"), "timeline", plan(folder, seq_len=512), f"vramplan {name}")
    assert not recwarn.list


# ---------------------------------------------------------------------------------------------------- the command line


def test_a_plan_is_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "cards.svg"
    assert run("gpt2", "--seq-len", "512", "--plot", str(file), "--plot-of", "breakdown") == 0
    assert "Memory at the peak" in capsys.readouterr().out
    assert "memory that CUDA sees" in texts(file)
    assert any(each.startswith("vramplan gpt2 --seq-len 512  |") for each in texts(file))


def test_fit_and_verify_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    file = tmp_path / "frontier.svg"
    assert run("fit", str(tmp_path), "--gpu", GPU, "--seq-len", "512", "--plot", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out)["frontier"]
    assert "largest batch_size" in texts(file)
    assert any(each.startswith("vramplan fit ") for each in texts(file))
    runs = tmp_path / "runs.jsonl"
    runs.write_text(json.dumps(measured()) + "\n")
    assert run("verify", str(runs), "--plot", str(tmp_path / "accuracy.svg")) == 0
    assert "planned, GiB" in texts(tmp_path / "accuracy.svg")


def test_a_table_is_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpus.svg"
    words = ("gpt2", "--seq-len", "512", "--num-gpus", "1,4", "--parallel", "fsdp")
    assert run("table", *words, "--plot", str(file)) == 0
    assert "num_gpus" in capsys.readouterr().out
    drawn = texts(file)
    assert {"1 GPU", "4 GPUs", "Memory of each GPU at the peak: gpt2"} <= set(drawn)
    assert "memory that CUDA sees" not in drawn  # no card is named
    assert any(each.startswith("vramplan table gpt2 --seq-len 512 --num-gpus 1,4") for each in drawn)
    assert run("table", *words, "--plot", str(file), "--into", "a.md", "--between", "b") == 2
    assert "--plot draws what is shown, and --into writes a document" in capsys.readouterr().err
    assert run("table", "--check", "a.md", "--plot", str(file)) == 2
    assert "leave plot out (--check)" in capsys.readouterr().err


def measured() -> dict[str, Any]:
    """A run as a probe writes it; its figures are made up, for a file to be read."""
    options = {"method": "lora", "seq_len": 512}
    figures = {"peak_allocated_bytes": 100 * MIB, "peak_reserved_bytes": 128 * MIB}
    return {"id": "made up", "config": MODEL, "options": options, "gpu": "h200", "stack": {}} | figures


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--plot", "step.jpg"), "'step.jpg' ends in no type of picture that can be drawn; known: .svg, .png, .pdf"),
        (("--plot", "svg"), "'svg' ends in no type"),
        (("--plot", "a.svg", "--plot-of", "timelime"), "unknown picture 'timelime'; did you mean timeline"),
        (("--plot-of", "timeline"), "add --plot FILE"),
    ],
)
def test_a_wrong_picture_is_said_before_the_plan(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gpt2", "--seq-len", "512", *words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert sentence in err
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    for name, why in (("file/a.svg", "cannot write"), ("folder.svg", "is no file; name one")):
        assert run("gpt2", "--seq-len", "512", "--plot", str(tmp_path / name)) == 2
        err = capsys.readouterr().err
        assert why in err
        assert err.endswith("(--plot)\n")


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        report_plots, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name)
    )
    assert run("gpt2", "--seq-len", "512", "--plot", "a.svg") == 2
    assert "pip install 'vramplan[plot]'" in capsys.readouterr().err


def test_a_plan_without_a_picture_loads_nothing_for_one(tmp_path: Path) -> None:
    heavy = ["matplotlib", "jinja2", "vl_convert", "numpy", "vramplan.planner.report_plots"]
    code = (
        "import sys; from vramplan.planner.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"except SystemExit: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )

    def loaded(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, "gpt2", "--seq-len", "512", *words], capture_output=True, text=True, check=True
        )
        return done.stderr.strip()

    assert loaded() == "[]"
    drawn = loaded("--plot", str(tmp_path / "a.svg"))
    assert "matplotlib" in drawn
    assert "jinja2" not in drawn
