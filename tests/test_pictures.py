"""The pictures of docs/images show what the program says; `python tests/test_pictures.py` draws them anew."""

from __future__ import annotations

import io
import os
import re
import shlex
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.terminal_theme import MONOKAI
from test_readme import AS_OF, EXAMPLE, ROOT

from vramplan import plan
from vramplan.planner import cli, prices, report, stack

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = ROOT / "docs" / "images"
PICTURES = ("terminal.svg", "timeline.svg")


def draw(folder: Path) -> None:
    """Both pictures of the README's example, for the newest known versions, whatever is installed here."""
    words = shlex.split(EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "installed", dict)
        patch.setattr(prices, "_today", lambda: AS_OF)
        patch.setattr("sys.stdout", io.StringIO())
        with pytest.raises(SystemExit) as end:
            cli.main([*words[1:], "--plot", str(folder / "timeline.svg")])
        assert end.value.code == 0
        console = Console(record=True, width=92, file=io.StringIO(), markup=False, highlight=False, emoji=False)
        console.print(f"$ {EXAMPLE}")
        report.lay_out(report.plan_page(plan("llama-3.1-8b", method="qlora", rank=16)), console)
    # rich's template asks the reader's browser for a font from the network; any of fixed width will do
    text = re.sub(
        r"@font-face \{.*?\}\s*",
        "",
        console.export_svg(title="vramplan", theme=MONOKAI, unique_id="vramplan"),
        flags=re.DOTALL,
    )
    (folder / "terminal.svg").write_text(text, "utf-8")


def words(file: Path) -> list[str]:
    """All that is written in a picture."""
    texts = ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(each.itertext()) for each in texts).replace("\xa0", " ").split()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw(folder)
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_show_what_the_program_says(name: str, drawn: Path) -> None:
    assert words(IMAGES / name) == words(drawn / name), "python tests/test_pictures.py draws it anew"


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_need_no_network(name: str) -> None:
    text = (IMAGES / name).read_text("utf-8")
    assert not re.search(r"""(href|src)=["'](?!#)|url\((?!["']?#)|@import|@font-face""", text)


if __name__ == "__main__":
    os.environ["VRAMPLAN_DATA_DIR"] = os.devnull
    IMAGES.mkdir(exist_ok=True)
    draw(IMAGES)
