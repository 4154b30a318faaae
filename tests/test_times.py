"""The files that sharing_times.py and offload_times.py write, without a GPU: after every run, whole or not at all."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan.planner import files  # noqa: E402
from vramplan.probes import calibrate, offload_times, ranks, sharing_times  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which everything takes a second."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H200"))
    monkeypatch.setattr(ranks, "pretend", lambda _: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(sharing_times.dist, name, lambda *_, **__: None)
    monkeypatch.setattr(sharing_times.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(sharing_times, "collectives", lambda num_gpus: [{"num_gpus": num_gpus}])
    monkeypatch.setattr(offload_times, "copies", list)
    monkeypatch.setattr(offload_times, "updates", lambda threads: [{"threads": threads}])
    monkeypatch.setattr(offload_times, "held", dict)


@pytest.mark.parametrize(("module", "runs"), [(sharing_times, 18), (offload_times, 5)])
def test_the_file_is_never_half_written(
    module: ModuleType, runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    done = 0

    def trained(*_: Any) -> dict[str, Any]:
        nonlocal done
        if done:
            assert len(json.loads(file.read_text())["steps"]) == done
        done += 1
        return {"step_s": 1.0}

    monkeypatch.setattr(module, "trained", trained)
    module.main(str(file))
    found = json.loads(file.read_text())
    assert len(found["steps"]) == done == runs
    assert (found["gpu"], found["stack"]) == ("H200", calibrate.stack())
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("module", [sharing_times, offload_times])
def test_a_full_disk_leaves_the_file_that_was_there(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    file.write_text("earlier")

    def full(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(module, "trained", lambda *_: {})
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        module.main(str(file))
    assert file.read_text() == "earlier"
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_hooks_and_clipping_are_put_back() -> None:
    import accelerate
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    def now() -> tuple[Callable[..., Any], ...]:
        return FSDPParamGroup.post_backward, accelerate.Accelerator.clip_grad_norm_

    before = now()
    with sharing_times._timed_hooks() as hooks, sharing_times._timed_clipping():
        assert not set(before) & set(now())
    assert now() == before
    assert hooks == {}
