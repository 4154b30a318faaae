"""On a CUDA device: the same events through PyTorch's own allocator, and a real training step against its plan."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from vramplan import plan
from vramplan.planner.allocator import Allocator

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def test_the_same_events_give_the_same_counters() -> None:
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0, "another test holds memory"
    rng, ours, held = random.Random(0), Allocator(), []
    for _ in range(2000):
        if held and rng.random() < 0.48:
            handle, pointer = held.pop(rng.randrange(len(held)))
            ours.free(handle)
            torch.cuda.caching_allocator_delete(pointer)
        else:
            nbytes = int(2 ** rng.uniform(0, 25))
            handle = ours.alloc(nbytes)
            assert handle is not None
            held.append((handle, torch.cuda.caching_allocator_alloc(nbytes)))
        assert torch.cuda.memory_allocated() == ours.allocated_bytes
        assert torch.cuda.memory_reserved() == ours.reserved_bytes
    for handle, pointer in held:
        ours.free(handle)
        torch.cuda.caching_allocator_delete(pointer)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_a_real_step_needs_what_its_plan_says(method: str, gradient_checkpointing: bool) -> None:
    pytest.importorskip("peft")
    from vramplan.probes.record import clean, run_case

    options = {"method": method, "seq_len": 512, "gradient_checkpointing": gradient_checkpointing, "steps": 3}
    left = clean()
    run = run_case({"name": "gpu test", "config": CONFIG, "options": options}, record=False)
    # a mark: name, number, allocated, its peak, reserved, its peak, time
    measured = max(mark[3] for mark in run["marks"] if mark[0] in ("before_optimizer", "after_optimizer")) - left
    asked = {name: value for name, value in options.items() if name != "steps"}
    planned = plan(CONFIG, optimizer="adamw_torch", **asked).memory.peak_allocated_bytes
    clean()
    assert planned == pytest.approx(measured, rel=0.01)


def test_a_probe_measures_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path))
    from vramplan.planner.report_probe import Progress
    from vramplan.probes.probe import probe

    options = {"method": "qlora", "seq_len": 512}
    report = probe(CONFIG, output=str(tmp_path / "runs.jsonl"), watcher=Progress(None), **options)
    (result,) = report.results
    assert result.outcome == "ok", result.reason
    assert report.good
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_a_boundary_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path))
    from vramplan.planner.report_probe import Progress
    from vramplan.probes.probe import probe

    report = probe(CONFIG, boundary="batch_size", memory_limit="4GiB", watcher=Progress(None), seq_len=1024)
    assert report.proof is not None
    assert report.proof.holds
