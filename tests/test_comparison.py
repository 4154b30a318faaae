"""`vramplan compare`: what differs is marked, what was saved is not trusted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from test_plan import TINY

from vramplan import UsageError, plan
from vramplan.planner import comparison
from vramplan.planner.comparison import Side, components, differing, saved, side
from vramplan.planner.report import plain
from vramplan.planner.report_decide import comparison_page

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return plan(TINY, method="lora", gpu="rtx-4090", stack="torch=2.11").to_dict()


@pytest.fixture(scope="module")
def sides(answer: dict[str, Any]) -> list[Side]:
    full = plan(TINY, method="full", gpu="rtx-4090", batch_size=8, stack="torch=2.11").to_dict()
    return [side(answer, "one"), side(full, "other")]


@pytest.fixture
def run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return run


def test_a_side_is_the_plans_own_figures(answer: dict[str, Any], sides: list[Side]) -> None:
    one = sides[0]
    assert one.peaks == {name: answer["memory"][name] for name in one.peaks}
    assert sum(one.components.values()) == one.peaks["peak_allocated_bytes"]
    assert one.counts["trainable"] == answer["parameters"]["trainable"]
    assert one.time["step_s"] == answer["time"]["step_s"]
    assert one.gpu
    assert one.gpu["headroom_bytes"] == answer["gpu"]["headroom_bytes"]
    assert one.options["stack torch"] == "2.11"
    assert side(json.loads(json.dumps(answer)), "one") == one


def test_only_what_differs_is_listed(sides: list[Side]) -> None:
    assert differing(sides) == {"method": ["lora", "full"], "batch_size": [1, 8]}
    assert differing([sides[0], sides[0]]) == {}
    table = components(sides)
    assert next(iter(table)) == "weights"
    assert table["adapter"][1] == 0
    assert [sum(sizes[i] for sizes in table.values()) for i in (0, 1)] == [
        each.peaks["peak_allocated_bytes"] for each in sides
    ]


def test_the_page_marks_differences(sides: list[Side]) -> None:
    one, other = sides
    page = list(plain(comparison_page([one, other])))
    assert all(len(line) <= 80 for line in page)
    assert "method      lora  full" in page
    first, second, apart = next(line for line in page if line.startswith("= device total")).split()[-3:]
    assert round(float(second) - float(first), 2) == float(apart)
    assert any(line.startswith("A  fits rtx-4090: ") for line in page)
    alike = "\n".join(plain(comparison_page([one, one])))
    assert "no option differs" in alike
    assert alike.count("same") >= 8
    many = list(plain(comparison_page([one, other, one, one])))
    (line,) = [line.split() for line in many if line.startswith("= device total")]
    assert line[-2:] == ["=", "="]
    assert line[-3] != "="
    assert "B - A" not in "\n".join(many)


def test_a_part_that_one_side_lacks_is_a_difference(sides: list[Side]) -> None:
    from dataclasses import replace

    gib = 2**30
    first = replace(sides[0], components={"weights": 3 * gib}, peaks=dict.fromkeys(sides[0].peaks, 4 * gib))
    second = replace(first, components={"weights": 3 * gib, "gradients": gib // 2}, peaks=first.peaks)
    page = list(plain(comparison_page([first, second])))
    assert "gradients         0.00  0.50  +0.50" in page
    assert "weights           3.00  3.00   same" in page


# ------------------------------------------------------------------------------------------------------- saved answers


def test_a_saved_answer_is_told_from_a_config(tmp_path: Path, answer: dict[str, Any]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(answer))
    assert saved(file) == answer
    file.write_text(json.dumps(TINY))
    assert saved(file) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": 3}, "memory is not an object"),
        ({"memory": {}}, "memory.components is not a list"),
        ({"memory.components": [3]}, "memory.components[0] is not an object"),
        ({"memory.components": [{"name": "weights", "bytes": -1}]}, "memory.components[0].bytes is not a whole number"),
        ({"memory.device_bytes": 2.5}, "memory.device_bytes is not a whole number"),
        ({"memory.device_bytes": True}, "memory.device_bytes is not a whole number"),
        ({"memory.device_bytes": 10**30}, "memory.device_bytes is not a whole number"),
        ({"memory.peak_phase": None}, "memory.peak_phase is not a text"),
        ({"options": []}, "options is not an object"),
        ({"options.stack": "torch"}, "options.stack is not an object"),
        ({"model.name": 3}, "model.name is not a text"),
        ({"parameters.total": "8"}, "parameters.total is not a whole number"),
        ({"gpu.fits": 1}, "gpu.fits is not true or false"),
        ({"gpu": {"name": "x"}}, "gpu.needed_bytes is not a whole number"),
        ({"time": {"step_s": float("nan")}}, "time.step_s is not a number from 0"),
        ({"cost": {}}, "cost is not a list"),
        ({"cost": [{"usd": "1"}]}, "cost[0].usd is not a number from 0"),
    ],
)
def test_what_is_saved_is_checked(answer: dict[str, Any], change: dict[str, Any], words: str) -> None:
    broken = json.loads(json.dumps(answer))
    for path, value in change.items():
        *inner, last = path.split(".")
        at = broken
        for name in inner:
            at = at[name]
        at[last] = value
    with pytest.raises(UsageError) as error:
        side(broken, "a.json")
    assert str(error.value) == f"'a.json' is no answer of vramplan: {words} (PLAN)"


def test_what_is_saved_cannot_write_to_a_terminal(answer: dict[str, Any]) -> None:
    evil = json.loads(json.dumps(answer))
    evil["model"]["name"] = "\x1b[2Jllama" + "x" * 1000
    evil["options"]["method"] = "\x1b[31mlora"
    evil["options"]["\x1b[1mmore"] = ["\x07"] * 1000
    evil["memory"]["components"][0]["name"] = "wei\nghts"
    evil["gpu"]["name"] = "\rrtx"
    page = comparison_page([side(answer, "a"), side(evil, "b")])
    assert all(line.isprintable() for line in plain(page))


# ---------------------------------------------------------------------------------------------------- the command line


def test_every_kind_of_plan(run: Any, tmp_path: Path) -> None:
    assert run("./config.json --method full --json")[0] == 0
    (tmp_path / "saved.json").write_text(json.dumps(plan("./config.json", method="full").to_dict()))
    (tmp_path / "mine.toml").write_text('model = "./config.json"\nmethod = "lora"\nrank = 4\n')
    line = "compare ./config.json mine.toml saved.json 'vramplan ./config.json --rank 2' --seq-len 64 --rank 8 --json"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["options"]["method"] == ["qlora", "lora", "full", "qlora"]
    assert found["options"]["rank"] == [8, 4, None, 2]  # a plan's own goes first, and a saved one is as it was
    assert found["options"]["seq_len"] == [64, 64, 2048, 64]
    code, out, _ = run("compare ./config.json './config.json --gpu 0.5GiB'")
    assert code == 0
    assert "does not fit 0.5GiB" in out


def test_a_model_whose_path_has_a_space(run: Any, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text(json.dumps(TINY))
    assert run("compare './my model' './my model/config.json'")[0] == 0
    assert run("compare 'my model' 'config.json --rank 2'")[0] == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compare gpt2", "compare takes 2 to 8 plans, and here are 1 (PLAN)"),
        ("compare " + "gpt2 " * 9, "compare takes 2 to 8 plans, and here are 9 (PLAN)"),
        ("compare config.json missing.json", "'missing.json' is no file; name an answer of vramplan"),
        ("compare config.json broken.json", "'broken.json' is no JSON"),
        ("compare config.json 'config.json --rnak 3'", "No such option"),
        ("compare config.json 'vramplan --rank 3'", "no model is named"),
        ("compare config.json 'config.json more words'", "unexpected extra arguments (more words)"),
        ('compare config.json "config.json \'open"', "is no command line"),
        ("compare config.json 'config.json --rank 0'", "rank is '0'"),
        ("compare config.json nonesuch", "unknown model 'nonesuch'"),
        ("compare config.json config.json --config mine.toml", "names a model; leave it out"),
    ],
)
def test_wrong_questions(line: str, words: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "mine.toml").write_text('model = "gpt2"\n')
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_json_is_the_comparison(sides: list[Side]) -> None:
    found = comparison.to_dict(sides)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [each["label"] for each in found["sides"]] == ["one", "other"]


def test_offloading_and_host_memory_stand_beside_each_other() -> None:
    asked: dict[str, Any] = {"method": "full", "num_gpus": 2, "seq_len": 64}
    ways: list[dict[str, Any]] = [{"parallel": "ddp"}, {"parallel": "fsdp", "cpu_offload": True}]
    sides = [comparison.side(plan(TINY, **asked, **way).to_dict(), "one") for way in ways]
    assert comparison.differing(sides)["cpu_offload"] == [False, True]
    host = comparison.host_memory(sides)
    assert host["offload"][0] == 0 < host["offload"][1]
    assert "reshard_after_forward" not in comparison.differing(sides)
