"""`vramplan report`: one page that has the plan's figures, opens without a network and runs nothing of others'."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from test_capacity import GPU, MODEL

from vramplan import __version__, plan
from vramplan.planner import capacity, cli, prices, report_page
from vramplan.planner.report import title
from vramplan.planner.units import GIB, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vramplan.planner.plan import Plan

COMMAND = "vramplan report config.json --gpu 1.5GiB -o report.html"
EVIL = "<img src=x onerror=alert(1)> 'quoted' \"twice\" {{ 7 * 7 }}"
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(MODEL, gpu=GPU, seq_len=512)


@pytest.fixture(scope="module")
def found() -> capacity.Capacity:
    return capacity.fit(MODEL, gpu=GPU, seq_len=512)


@pytest.fixture(scope="module")
def page(made: Plan, found: capacity.Capacity) -> str:
    return report_page.page(made, found, COMMAND)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without Vega, which takes seconds to put together."""
    monkeypatch.setattr(report_page, "_script", lambda: "")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert isinstance(end.value.code, int)
    return end.value.code


def without_script(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "<script></script>", page, flags=re.DOTALL)


def shown(page: str) -> str:
    """The page's text, without its charts."""
    body = re.sub(r"<(style|script).*?</\1>", "", page[page.index("<body>") :], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def charts(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert match
    found: dict[str, Any] = json.loads(match[1])
    return found


# -------------------------------------------------------------------------------------------------- what is on the page


def test_every_figure_of_the_plan_is_there(made: Plan, page: str) -> None:
    text = shown(page)
    assert title(made) in text
    for part in (*made.memory.components, *made.sizes()):
        assert f"{part.name}: {format_count(part.bytes)} B" in text
        assert " ".join(part.formula.split()) in text
        assert part.source in text
    for size in (made.memory.peak_allocated_bytes, made.counts.total, made.counts.trainable):
        assert format_gib(size) in text or format_count(size) in text
    assert all(fit.gpu.name in text for fit in made.gpus)
    assert all(f"{name} {value}" in text for name, value in made.options.as_dict().items() if isinstance(value, int))


def test_it_says_how_to_make_it_again(made: Plan, page: str) -> None:
    text = shown(page)
    assert COMMAND in text
    assert f"vramplan {__version__}, {prices._today().isoformat()}" in text
    assert all(f"{name} {version}" in text for name, version in dict(made.stack.versions).items())
    assert all(" ".join(note.split()) in text for note in made.memory.notes)


def test_the_timeline_is_the_plans(made: Plan, page: str) -> None:
    drawn = charts(page)["timeline"]
    rows = drawn["data"]["values"]
    moments = made.memory.timeline
    assert [row["highest"] * GIB for row in rows[:-1]] == [moment.peak_bytes for moment in moments]
    assert [row["end"] * GIB for row in rows[:-1]] == [moment.end_bytes for moment in moments]
    assert rows[-1]["at"] == len(moments)
    (peak,) = drawn["layer"][-2]["data"]["values"]
    assert peak["in"] == made.memory.peak_phase


def test_the_breakdown_adds_up(made: Plan, page: str) -> None:
    bars, limits = (layer["data"]["values"] for layer in charts(page)["breakdown"]["layer"])
    needed = {fit.gpu.name: fit for fit in made.gpus} | {made.fit.gpu.name: made.fit} if made.fit else {}
    for limit in limits:
        parts = [row for row in bars if row["card"] == limit["card"]]
        fit = needed[limit["shown"]]
        assert round(sum(row["to"] - row["from"] for row in parts) * GIB) == fit.needed_bytes
        assert round(limit["limit"] * GIB) == fit.gpu.budget_bytes
        assert limit["headroom"] == format_gib(fit.headroom_bytes)


def test_the_frontier_is_what_fits(found: capacity.Capacity, page: str) -> None:
    rows = charts(page)["frontier"]["data"]["values"]
    fitting = [(cell.seq_len, cell.batch_size) for cell in found.frontier if cell.batch_size]
    assert [(row["seq_len"], row["batch_size"]) for row in rows] == fitting


def test_where_nothing_fits_there_is_no_frontier(bare: None) -> None:
    large = plan("llama-3.1-405b", method="full")
    assert not any(fit.fits for fit in large.gpus)
    page = report_page.page(large, None, COMMAND)
    assert "None of the known cards holds it." in shown(page)
    assert set(charts(page)) == {"timeline", "breakdown"}


# ----------------------------------------------------------------------------------------------- nothing comes, or runs


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    text = without_script(page)
    assert not re.search(r"https?:", text)
    assert not re.search(r"<(link|iframe|object|embed|base|img)\b", text)
    assert not re.search(r"\b(src|href|action|srcset)=", text)
    assert not re.search(r"@import|url\(", text)


def test_the_policy_lets_only_our_script_run(page: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode("utf-8")).digest()).decode("ascii")
    assert html.unescape(policy[1]) == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")


def test_names_are_not_markup(bare: None, tmp_path: Path) -> None:
    folder = tmp_path / EVIL
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    page = report_page.page(plan(folder, seq_len=512), None, f"vramplan report {EVIL}")
    assert "<img" not in page
    assert EVIL in shown(page)


def test_data_does_not_end_its_script(bare: None, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = "</script><script>alert(1)</script>"
    monkeypatch.setattr(report_page, "timeline", lambda _: {"data": ends})
    page = report_page.page(made, None, COMMAND)
    assert ends not in page
    assert charts(page)["timeline"]["data"] == ends


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_command(bare: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    file = tmp_path / "report.html"
    file.write_text("an earlier one")
    assert run("report", str(tmp_path), "--gpu", GPU, "--seq-len", "512", "-o", str(file)) == 0
    out, err = capsys.readouterr()
    assert f"written to {file}" in " ".join(out.split())
    assert not err
    assert set(charts(file.read_text("utf-8"))) == {"timeline", "breakdown", "frontier"}
    assert f"vramplan report {tmp_path} --seq-len 512 --gpu 1.5GiB -o {file}" in shown(file.read_text("utf-8"))


def test_without_a_gpu_the_smallest_that_holds_it(bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(capacity, "fit", lambda **given: asked.update(given))
    made = report_page.write(str(tmp_path / "a.html"), {"model": str(tmp_path), "seq_len": 512}, COMMAND)
    smallest = min((fit.gpu for fit in made.gpus if fit.fits and not fit.lacks), key=lambda gpu: gpu.budget_bytes)
    assert asked["gpu"].budget_bytes == smallest.budget_bytes


def test_a_run_that_does_not_fit_is_a_page_and_exit_code_1(bare: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    file = tmp_path / "a.html"
    assert run("report", str(tmp_path), "--gpu", "1GiB", "--seq-len", "4096", "-o", str(file)) == 1
    assert "does not fit" in shown(file.read_text("utf-8"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "add one, such as -o report.html (--output)"),
        (("-o", "report.pdf"), "'report.pdf' is no name of a page; end it in .html (--output)"),
        (("-o", "/dev/full/report.html"), "cannot write '/dev/full/report.html'"),
    ],
)
def test_a_wrong_file_is_a_sentence(
    words: tuple[str, ...], sentence: str, bare: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert run("report", str(tmp_path), "--seq-len", "512", *words) == 2
    assert sentence in capsys.readouterr().err


def test_without_its_packages_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(report_page, "find_spec", lambda name: None if name == "vl_convert" else there(name))
    assert run("report", "gpt2", "--seq-len", "512", "-o", "a.html") == 2
    assert "a page needs vl_convert; pip install 'vramplan[report]'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def contrast(page: Any, selector: str, attribute: str) -> float:
    """The contrast of a colour with the section behind it, as WCAG reckons it: 1 to 21."""
    script = """([selector, attribute]) => {
        const style = (element, name) => getComputedStyle(element)[name].match(/[0-9.]+/g).slice(0, 3).map(Number);
        const shown = document.querySelector(selector);
        return [style(shown, attribute), style(document.querySelector("section"), "backgroundColor")];
    }"""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted(map(luminance, page.evaluate(script, [selector, attribute])))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme: str, width: int, browser: Any, page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, "utf-8")
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    asked_for: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: asked_for.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(file.as_uri())
    for chart in ("timeline", "breakdown", "frontier"):
        tab.wait_for_selector(f"#{chart} svg")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert all(
        tab.locator(f"#{chart} svg").bounding_box()["width"] <= width for chart in ("timeline", "breakdown", "frontier")
    )
    for selector, attribute in (
        ("h2", "color"),
        (".faint", "color"),
        ("thead th", "color"),
        (".verdict", "color"),
        ("#timeline .mark-text text", "fill"),
    ):
        assert contrast(tab, selector, attribute) >= 4.5, selector
    box = tab.locator("#timeline").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "GiB" in tab.locator("#vg-tooltip-element").inner_text()
    assert asked_for == [file.as_uri()]
    assert not complaints
    context.close()
