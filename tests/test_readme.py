"""The README shows what the program says; `python tests/test_readme.py` writes those blocks anew."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_measured import BOUNDARIES, KNOWN, OTHERS, PROBED, scores

from vramplan import plan
from vramplan.planner import cli, prices, report, stack
from vramplan.planner.units import format_gib
from vramplan.planner.verify import spreads

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXAMPLE = "vramplan llama-3.1-8b --method qlora --rank 16"
HELP = "vramplan --help"
AS_OF = datetime.date(2026, 11, 22)  # prices grow old, and this file does not


def said(command: str) -> str:
    """What a command prints for the newest known versions, whatever is installed here."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        patch.setattr(stack, "installed", dict)
        patch.setattr(prices, "_today", lambda: AS_OF)
        cli.main(shlex.split(command)[1:])
    return out.getvalue()


def shown(command: str) -> str:
    return f"```console\n$ {command}\n{said(command)}```"


def accuracy() -> str:
    """The plan's errors against the measured runs, in two sentences.

    Runs under a limit are judged by how they ended alone: what they reserve is what they were left.
    """
    found = spreads([*scores(KNOWN), *scores(OTHERS), *scores(PROBED)])
    limited = scores(BOUNDARIES)
    right = sum(each.fits_as_measured is True for each in limited)

    def spread(figure: str) -> str:
        every = found[figure]["all"]
        return f"{every.median:.2%} at the median and {abs(every.worst):.2%} at worst"

    return (
        f"On {found['allocated']['all'].n} fine-tuning runs measured on one H200, peak allocated memory is off by\n"
        f"{spread('allocated')}, and peak reserved memory by\n"
        f"{spread('reserved')}. Of {len(limited)} QLoRA runs at the edge of 8, 16, 24 and 80 GiB,\n"
        f"{right} ended as planned: they survived or ran out of memory."
    )


def methods() -> str:
    """What a 7B takes by each method: memory, and on the cheapest offer that holds it hours and dollars."""
    lines = ["| | GPU memory | cheapest | hours | dollars | command |", "|---|---|---|---|---|---|"]
    for method, name in report.METHODS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "installed", dict)
            made = plan("llama-2-7b", method=method)
            cost = made.costs()[0][0]
        hours = f"{cost.hours:.1f} ({cost.hours_low:.1f} to {cost.hours_high:.1f})"
        offer = f"{cost.offer.gpu}, {report.offered(cost)}"
        memory = format_gib(made.memory.device_bytes)
        command = f"`vramplan llama-2-7b --method {method}`"
        lines.append(f"| {name} | {memory} | {offer} | {hours} | {cost.usd:.2f} | {command} |")
    return "\n".join(lines)


BLOCKS: dict[str, Any] = {
    "example": lambda: shown(EXAMPLE),
    "methods": methods,
    "accuracy": accuracy,
    "help": lambda: shown(HELP),
}


def block(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", README.read_text("utf-8"), re.DOTALL)
    assert match
    return match[1]


@pytest.mark.parametrize(
    "name", [name for name in BLOCKS if name != "accuracy"]
)  # test_measured.py has the scores at hand
def test_what_the_readme_shows_is_what_the_program_says(name: str) -> None:
    # Versions of click break the lines of a help text at different places.
    assert block(name).split() == BLOCKS[name]().split(), "python tests/test_readme.py writes it anew"


def test_the_two_commands() -> None:
    text = README.read_text("utf-8")
    assert f"```sh\npip install . && {EXAMPLE}\n```" in text
    assert "```sh\npip install '.[test]' && pytest\n```" in text


def test_the_python_example_runs(newest_stack: None) -> None:
    match = re.search(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert match
    exec(compile("\n".join(line.strip() for line in match[1].splitlines()), "README.md", "exec"), {})


def test_the_profile_example_runs(tmp_path: Path, newest_stack: None, capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"```toml\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert match
    (tmp_path / "plan.toml").write_text("\n".join(line.strip() for line in match[1].splitlines()))
    with pytest.raises(SystemExit) as end:
        cli.main(["--config", str(tmp_path / "plan.toml")])
    assert end.value.code == 0
    assert "LoRA r=32 on q_proj, v_proj" in capsys.readouterr().out


def write() -> None:
    """Writes the blocks anew, from the bundled prices alone."""
    os.environ["VRAMPLAN_DATA_DIR"] = os.devnull
    text = README.read_text("utf-8")
    for name, content in BLOCKS.items():
        new = f"<!-- {name} -->\n{content()}\n<!-- /{name} -->"
        start, end = text.index(f"<!-- {name} -->"), text.index(f"<!-- /{name} -->")
        text = text[:start] + new + text[end + len(f"<!-- /{name} -->") :]
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    write()
