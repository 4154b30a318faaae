"""Nothing here reaches the network: the Hub is a folder laid out as its cache, or a function that raises."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from vramplan.planner import catalog
from vramplan.planner.errors import UsageError
from vramplan.planner.sources import ModelReference, resolve_model

CONFIG = {"model_type": "llama", "hidden_size": 64}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)


def write(path: Path, content: object = CONFIG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def cache(repo: str, name: str = "config.json", content: object = CONFIG) -> Path:
    """A file in the Hub's cache: a link from its commit's folder to a blob, as huggingface_hub leaves it."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    write(folder / "refs" / "main", COMMIT.encode())
    blob = write(folder / "blobs" / f"blob-of-{name}", content)
    link = folder / "snapshots" / COMMIT / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def message(model: Any) -> str:
    with pytest.raises(UsageError) as error:
        resolve_model(model)
    text = str(error.value)
    assert text.endswith("(MODEL)")
    assert "\n" not in text
    return text


def hub_raises(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, name, fail)


def of_size(size: int) -> Any:
    """What the Hub says of a file before its download."""
    return lambda url, timeout: SimpleNamespace(size=size)


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub without the HTTP response that its constructor needs."""
    return kind.__new__(kind)


def test_bundled() -> None:
    model = catalog.find_model("llama-3.1-8b")
    assert model is not None
    expected = ModelReference("llama-3.1-8b", model.config, "bundled", model.config_source)
    assert resolve_model("llama-3.1-8b") == resolve_model("meta-llama/Llama-3.1-8B-Instruct") == expected


def test_a_config_given_as_a_dict() -> None:
    assert resolve_model(CONFIG) == ModelReference("llama", CONFIG, "dict", "")
    assert resolve_model(CONFIG).config is not CONFIG
    assert resolve_model({"model_type": "a\x1b[2J\ud800" + "x" * 99}).name == "a?[2J?" + "x" * 74
    assert resolve_model({}).name == "config"


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "mine" / "config.json")
    for given, detail in [
        (str(file), str(file)),
        (file, str(file)),
        (str(file.parent), str(file)),
        ("mine", "mine/config.json"),
        ("./mine/", "mine/config.json"),
        ("mine/config.json", "mine/config.json"),
    ]:
        assert resolve_model(given) == ModelReference("mine", CONFIG, "file", detail)
    assert resolve_model(write(tmp_path / "tiny.json")).name == "tiny"
    os.chdir(file.parent)
    assert resolve_model("config.json").name == resolve_model(".").name == "mine"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine" / "config.json")
    assert resolve_model("~/mine").config == CONFIG


def test_bundled_names_come_before_folders_and_folders_before_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "gpt2" / "config.json")
    write(tmp_path / "someone" / "thing" / "config.json")
    cache("someone/thing", content={"model_type": "gpt2"})
    assert resolve_model("gpt2").source == "bundled"
    assert resolve_model("./gpt2").source == "file"
    assert resolve_model("someone/thing").config == CONFIG


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a":' * 200_000, "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"NaN", "holds no JSON object"),
        (b" " * (4 * 2**20 + 1), "is larger than 4 MiB"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in message(write(tmp_path / "config.json", content))


def test_what_transformers_writes_beyond_json_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", b'{"time_step_limit": [0.0, Infinity], "a": 1, "a": 2}')
    assert resolve_model(file).config == {"time_step_limit": [0.0, float("inf")], "a": 2}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for name in ("pipe.json", "zero.json", "folder"):
        assert "is not a regular file" in message(tmp_path / name)
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "config.json").symlink_to("nowhere")
    for name in ("loop.json", "dangling", "missing.json"):
        assert message(tmp_path / name).startswith("cannot read")


@pytest.mark.parametrize(
    "model", ["./missing", "/nowhere/at/all", "missing.json", "./\0", "/" + "x" * 5000, "~nobody-here/x"]
)
def test_paths_that_lead_nowhere(model: str) -> None:
    assert "path" in message(model) or "cannot read" in message(model)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert message(tmp_path) == f"no config.json in the folder {str(tmp_path)!r} (MODEL)"


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    write(tmp_path / "adapter" / "adapter_config.json", ADAPTER)
    cache("someone/adapter", "adapter_config.json", ADAPTER)
    for given, what in [
        ("adapter", "adapter"),
        ("adapter/adapter_config.json", "adapter/adapter_config.json"),
        ("someone/adapter", "someone/adapter"),
        (ADAPTER, "the given config"),
    ]:
        text = f"{what!r} is an adapter; plan its base model, 'meta-llama/Llama-3.1-8B' (MODEL)"
        assert message(given) == text


@pytest.mark.parametrize("model", ["llama-3.1-8", "", "a b c", "x" * 10_000, "a/b/c", "a--b/c..d", "\0", "\ud800"])
def test_unknown_names(model: str) -> None:
    assert message(model).startswith("unknown model")


def test_unknown_names_show_the_nearest() -> None:
    assert (
        message("llama-3.1-8")
        == "unknown model 'llama-3.1-8'; did you mean llama-3.1-8b or llama-3-8b or llama3.1? (MODEL)"
    )


@pytest.mark.parametrize("model", [None, 8, b"gpt2", ["gpt2"]])
def test_what_is_no_model_at_all(model: object) -> None:
    assert message(model).startswith("a model is a name, a path or a config.json as a dict, not ")


def test_the_hub_cache_is_enough() -> None:
    cache("someone/thing")
    assert resolve_model("someone/thing") == ModelReference("someone/thing", CONFIG, "hub", f"someone/thing@{COMMIT}")


def test_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **kwargs: asked.append(args) or str(cache(*args))
    )
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", of_size(700))
    assert resolve_model("someone/thing").detail == f"someone/thing@{COMMIT}"
    assert asked == [("someone/thing", "config.json")]
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", of_size(2**40))
    assert "larger than 4 MiB" in message("someone/bomb")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (hub_error(errors.GatedRepoError), "gated: accept its terms on the Hub, then log in with `hf auth login`"),
        (hub_error(errors.RepositoryNotFoundError), "not on the Hub, or private: then log in"),
        (hub_error(errors.HfHubHTTPError), "the Hub cannot be reached (HfHubHTTPError)"),
        (TimeoutError("timed out"), "the Hub cannot be reached (TimeoutError)"),
        (ConnectionError(), "the Hub cannot be reached (ConnectionError)"),
        (RuntimeError(), "the Hub cannot be reached (RuntimeError)"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    hub_raises(monkeypatch, "get_hf_file_metadata", error)
    text = message("someone/Llama-3.1-8B")
    assert text.startswith("cannot read someone/Llama-3.1-8B: ")
    assert reason in text
    assert text.endswith("; bundled is llama-3.1-8b (MODEL)")


def test_a_hub_model_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, "get_hf_file_metadata", hub_error(errors.EntryNotFoundError))
    assert message("qqqq/zzzz") == "qqqq/zzzz on the Hub has no config.json, so it is not a transformers model (MODEL)"


def test_a_connection_lost_during_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", of_size(9))
    hub_raises(monkeypatch, "hf_hub_download", hub_error(errors.LocalEntryNotFoundError))
    assert (
        message("qqqq/zzzz") == "cannot read qqqq/zzzz: not in the Hub's cache, and the Hub cannot be reached (MODEL)"
    )


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real functions: offline mode must hold them back
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message("qqqq/zzzz") == "cannot read qqqq/zzzz: not in the Hub's cache, and HF_HUB_OFFLINE is set (MODEL)"
