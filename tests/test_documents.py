"""Files that others wrote: what they hold, and what is refused before anything is made of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.documents import Computed, load
from vramplan.planner.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(text: str | bytes, name: str = "a.yml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return file


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.yaml", "rank: 8\nnames: [a, b]", "yaml"),
        ("a.yml", "base: &base {rank: 8}\n<<: *base\nnames: [a, b]", "yaml"),
        ("a", '{"rank": 8, "names": ["a", "b"]}', "json"),
        ("a.json", '\ufeff{"rank": 8, "names": ["a", "b"]}', "json"),
        ("a.toml", 'rank = 8\nnames = ["a", "b"]', "toml"),
        ("a.conf", "rank: 8\nnames: [a, b]", "yaml"),
    ],
)
def test_kinds_by_extension_and_content(write: Any, name: str, text: str, kind: str) -> None:
    document = load(write(text, name))
    assert document.kind == kind
    assert {key: document.values[key] for key in ("rank", "names")} == {"rank": 8, "names": ["a", "b"]}


def test_the_marked_options_are_read_from_a_comment_only(write: Any) -> None:
    assert load(write("# vramplan options: --padded\na: 1")).marked == "--padded"
    assert load(write("a: '# vramplan options: --padded'")).marked == ""
    assert load(write('{"a": "# vramplan options: --padded"}', "a.json")).marked == ""


def bomb(depth: int) -> str:
    """A document of a few lines that is 9 ** depth values once its aliases are written out."""
    lines = ["a0: &a0 x"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yml", bomb(9), "more than 20,000 values once its aliases are written out"),
        ("a.yml", "a: &a {<<: *a}", "an alias stands inside what it names"),
        ("a.yml", "a: &a [*a]", "an alias stands inside what it names"),
        ("a.yml", "rank: 1\nrank: 2", "the key 'rank' stands there twice"),
        ("a.yml", "a: {rank: 1, rank: 2}", "the key 'rank' stands there twice"),
        ("a.json", '{"rank": 1, "rank": 2}', "the key 'rank' stands there twice"),
        ("a.yml", "[" * 5000, "nested too deeply"),
        ("a.json", "[" * 50_000, "nested too deeply"),
        ("a.py", "x = " + "(" * 5000, "Python"),
        ("a.yml", "!!python/object/apply:os.system ['true']", "is no YAML"),
        ("a.yml", "a: !!timestamp 2026-13-45", "is no YAML"),
        ("a.yml", "a: 1\n---\nb: 2", "is no YAML"),
        ("a.yml", "a: [", "is no YAML"),
        ("a.yml", "? [a, b]\n: 1", "is no YAML"),
        ("a.yml", "1: 2", "holds no options by name"),
        ("a.yml", "- a", "holds no options by name"),
        ("a.yml", "just words", "holds no options by name"),
        ("a.json", "{", "is no JSON"),
        ("a.toml", "a = ", "is no TOML"),
        ("a.toml", "a = 1\na = 2", "is no TOML"),
        ("a.py", "def", "is no Python"),
        ("a.py", "\x00", "is no Python"),
        ("a.py", "TrainingArguments(**given)", "passes ** arguments"),
        ("a.py", "TrainingArguments(bf16=True)\nTrainingArguments(bf16=False)", "says bf16 a second time"),
        ("a.yml", "a: " + "x" * 2**18, "larger than 128 KiB"),
        ("a.yml", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.yml", "a: \x07", "is no YAML"),
    ],
)
def test_what_is_refused(write: Any, name: str, text: str | bytes, says: str) -> None:
    with pytest.raises(UsageError) as error:
        load(write(text, name))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        load(tmp_path / "none.yml")
    with pytest.raises(UsageError, match="is no file"):
        load("a\x00b")


def test_a_script_is_read_and_not_run(write: Any, tmp_path: Path) -> None:
    text = f"""
import torch
open({str(tmp_path / "made")!r}, "w")
BASE = "org/model"
STEPS = 2 + 2
model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float16)
tokenizer = AutoTokenizer.from_pretrained("other/tokenizer", use_fast=True)
args = TrainingArguments(output_dir=folder, max_steps=STEPS, bf16=True, optim=pick())
SFTTrainer(model=model, peft_config=peft.LoraConfig(r=4))
"""
    values = load(write(text, "a.py")).values
    assert not (tmp_path / "made").exists()
    assert values["model"] == values["BASE"] == "org/model"
    assert (values["dtype"], values["r"], values["bf16"], values["trainer"]) == ("float16", 4, True, "SFTTrainer")
    assert values["optim"] == Computed(8)
    assert values["max_steps"] == Computed(5)
    assert "use_fast" not in values


@given(st.text(max_size=200) | st.binary(max_size=200), st.sampled_from(["yml", "json", "toml", "py"]))
def test_any_content_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        values = load(path).values
    except UsageError:
        return
    assert all(isinstance(key, str) for key in values)


ALPHABET = st.text("abc:-[]{}&*!|>'\"#%@?,<~ \n\t01.eE\\", max_size=60)


@given(ALPHABET)
def test_anything_like_yaml_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "a.yml"
    path.write_text(text)
    try:
        load(path)
    except UsageError:
        return


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.none() | st.text(max_size=5), max_size=4)
)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "a.json"
    path.write_text(json.dumps(values))
    assert load(path).values == values
