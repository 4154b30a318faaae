"""Plans are held against traces: the real transformers, PEFT, bitsandbytes and torch code on tensors without memory."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from small_models import CASES, small  # noqa: E402

import vramplan  # noqa: E402
from vramplan.planner import memory, traces  # noqa: E402
from vramplan.planner.cli import main  # noqa: E402
from vramplan.planner.errors import Failure, UsageError  # noqa: E402
from vramplan.probes import compare, dryrun, standins, trace  # noqa: E402
from vramplan.probes.storages import Storages  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from vramplan.planner.plan import Plan

aten = torch.ops.aten
FULL = bool(os.environ.get("VRAMPLAN_FULL_GRID"))  # every setting of every case of every family: half an hour
TOLERANCE = 0.01

_EAGER = {"attention": "eager"}
_KEPT = {"gradient_checkpointing": False}
_FP32 = {"weights_dtype": "fp32", "mixed_precision": "no"}
_FP16 = {"weights_dtype": "fp16", "mixed_precision": "fp16"}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "qlora"},
    {"method": "full", **_KEPT},
    {"method": "lora", **_KEPT, **_FP16},
    {"method": "full", "padded": True},
    {"method": "qlora", **_KEPT, **_EAGER},
    {"method": "full", **_FP32},
    {"method": "lora", **_EAGER, "weights_dtype": "fp32"},
    {"method": "full", "attention": "flash_attention_2"},
    {"method": "qlora", "double_quant": False, "prepare_kbit": False, **_FP16},
    {"method": "full", **_KEPT, **_EAGER, "mixed_precision": "no"},
    {"method": "lora", "gradient_accumulation_steps": 2},
    {"method": "lora", **_KEPT, **_EAGER, **_FP16},
)

# Softmax in the scores' dtype, a float mask that autocast casts, one head of k and v repeated for the math kernel;
# gptj with sdpa, checkpointed and masked, and with heads that are turned in float32.
BESIDE = [("gpt2", 0, 9), ("falcon", 3, 9), ("falcon", 3, 0), ("gpt_bigcode", 0, 5), ("gptj", 0, 3), ("gptj", 1, 6)]


def grid() -> list[tuple[str, int, int]]:
    """Family, case, setting: two settings of each family in turn, so that all meet all kinds; or everything."""
    if FULL:
        return [(name, i, s) for name, cases in CASES.items() for i in range(len(cases)) for s in range(len(SETTINGS))]
    found = []
    for turn, name in enumerate(CASES):
        found += [(name, 0, (5 * turn + shift) % len(SETTINGS)) for shift in (0, 6)]
    return found + BESIDE


def without_workspaces(plan: Plan) -> Plan:
    return replace(plan, device=replace(plan.device, workspace_bytes=0))


def plan_of(config: dict[str, Any], setting: dict[str, Any]) -> Plan:
    """The plan, or a skipped test where transformers, PEFT or vramplan refuse the question."""
    tokens = min(256, config.get("n_positions", 256))
    try:
        return without_workspaces(vramplan.plan(config, batch_size=2, seq_len=tokens, **setting))
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("family", "case", "setting"), grid())
def test_the_plan_is_within_one_percent_of_the_trace(family: str, case: int, setting: int) -> None:
    planned = plan_of(small(family, case), SETTINGS[setting])
    run = planned.options
    seen = dryrun.run(planned.model.config, run, planned.device, planned.counts if run.lora else None)
    assert (seen.total, seen.trainable) == (planned.counts.total, planned.counts.trainable)
    ours, theirs = compare.of_plan(planned), dryrun.recording(seen)
    error = ours.peak_bytes / theirs.peak_bytes - 1
    found = compare.divergences(ours, theirs, least_bytes=20_000)
    first = str(found[0]) if found else "no tensor of 20 KB and more differs"
    assert abs(error) <= TOLERANCE, f"{error:+.2%} off; first: {first}"


# ---------------------------------------------------------------------------------------------------------- storages


def watched(on: Any = None) -> Any:
    """A context with every stand-in, and storages to look at."""
    from contextlib import contextmanager

    @contextmanager
    def context() -> Any:
        here = on or without_workspaces(vramplan.plan("gpt2", seq_len=64)).device
        with standins.in_place_of_cuda(here) as instead, Storages(instead) as seen:
            standins.calibrate(seen)
            seen.events.clear()
            yield seen

    return context()


def sizes(seen: Storages) -> list[int]:
    """Bytes of births, and of deaths below 0, in their order."""
    return [(-1 if e & 1 else 1) * seen.sizes[e >> 1] for e in seen.events]


def test_births_and_deaths_of_storages() -> None:
    with watched() as seen:
        x = torch.empty(4, 8)  # 128 B
        y = x.view(8, 4)  # the same memory
        del x
        z = y.to(torch.bfloat16)  # 64 B
        del y
        del z
    assert sizes(seen) == [128, 64, -128, -64]


def test_what_is_saved_for_backward_lives_until_its_node_has_run() -> None:
    with watched() as seen:
        weight = torch.empty(8, 16, requires_grad=True)  # 512 B
        x = torch.empty(4, 8)  # 128 B
        out = x @ weight  # 256 B; saves x
        del x
        scalar = out.sum()  # 4 B; saves nothing
        del out
        seen.backward = True
        scalar.backward()
        seen.backward = False
    # out dies at once; the root gradient is a one, expanded by a view, which cuBLAS copies for the weight's gradient
    assert sizes(seen) == [512, 128, 256, 4, -256, 4, 512, 256, -256, -128, -4]
    assert seen.id_of(weight.grad) is not None


CHAINS = {
    "sum of two": lambda h: (h * 3).sum() + (h * 4).sum(),
    "residual": lambda h: ((h + h.exp()) ** 2).sum(),
    "a view first": lambda h: (h.view(8, 4) * 3).sum() + (h * 4).sum(),
    "a view last": lambda h: (h * 3).sum() + (h.view(8, 4) * 4).sum(),
    "three uses": lambda h: ((h + h * 2 + h * 3) ** 2).sum(),
    "a slice": lambda h: ((h + h[..., :1]) ** 2).sum() + h.sum(),
    "transposed": lambda h: (h.t() @ h).sum() + (h * 2).sum(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_are_added_in_place_where_autograd_does_so(name: str) -> None:
    """The real engine's choice, add or add_, against what the trace takes memory for."""
    from torch.profiler import profile

    x = torch.ones(4, 8, requires_grad=True)
    out = CHAINS[name](x * 2)
    with profile() as profiled:
        out.backward()
    by_hand = [event.name for event in profiled.events() if event.name in ("aten::add", "aten::add_")]
    with watched() as seen:
        x = torch.empty(4, 8, requires_grad=True)
        out = CHAINS[name](x * 2)
        seen.backward = True
        out.backward()
        seen.backward = False
    assert sum("add.Tensor (" in label for label in seen.labels) == by_hand.count("aten::add")


def test_autocast_is_cudas_inside_and_the_cpus_again_outside() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    norm = torch.nn.LayerNorm(4)
    with watched():
        fake, weight = torch.empty(2, 4, dtype=torch.bfloat16), torch.empty(4, 4)
        scale = torch.empty(4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.nn.functional.linear(fake, weight).dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(fake, (4,), scale, scale).dtype == torch.float32
            assert fake.sum(-1).dtype == torch.float32
            assert fake.pow(2).dtype == torch.float32
            assert torch.softmax(fake, -1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


def test_autocast_on_cuda_leaves_what_is_concatenated() -> None:
    with watched() as seen:
        wide, narrow = torch.empty(4, 8), torch.empty(4, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            both = torch.cat([wide, narrow])
            assert both.dtype == torch.float32
        del both, wide, narrow
    assert sizes(seen) == [128, 64, 256, -256, -128, -64]  # the CPU's own would make a float32 copy of the second


def test_what_is_imported_meanwhile_stays_and_the_stand_ins_go() -> None:
    sys.modules.pop("colorsys", None)
    with watched():
        import colorsys
    assert sys.modules["colorsys"] is colorsys
    assert "flash_attn" not in sys.modules
    assert torch.utils.checkpoint.DefaultDeviceType._default_device_type != "cuda" or torch.cuda.is_available()


def test_cuda_has_one_byte_of_a_dropout_mask_an_element() -> None:
    with watched() as seen:
        x = torch.empty(16, 16, dtype=torch.bfloat16)
        out = torch.nn.functional.dropout(x, 0.5)
        del x, out
    assert sizes(seen) == [512, 256, 512, -256, -512, -512]  # mask first (Dropout.cu); x goes, then the result


def test_attention_runs_the_kernel_that_the_gpu_takes() -> None:
    found = {}
    for gpu in ("h200", "rtx-4090", "t4"):
        planned = vramplan.plan("gpt2", gpu=gpu, seq_len=64, weights_dtype="fp16", mixed_precision="fp16")
        with watched(without_workspaces(planned).device) as seen:
            q = torch.empty(1, 2, 64, 64, dtype=torch.float16, requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        found[gpu] = next(label for label in seen.labels if "scaled_dot" in label)
    assert "cudnn" in found["h200"]
    assert "flash" in found["rtx-4090"]
    assert "efficient" in found["t4"]


def test_a_4_bit_weight_is_dequantised_forward_and_backward() -> None:
    planned = without_workspaces(vramplan.plan(small("llama"), method="qlora", batch_size=8, seq_len=256))
    seen = dryrun.run(planned.model.config, planned.options, planned.device, planned.counts)
    events = [event for stretch in seen.step(0) for event in stretch.events if not event & 1]
    label, size = seen.program.labels, seen.program.sizes
    weight = 2 * 448 * 256  # the MLP's, in bf16
    in_backward = [e for e in events if "dequantize_4bit" in label[e >> 1] and size[e >> 1] == weight]
    assert len(in_backward) == 2 * 3  # gate, up and down of two layers
    assert all("MatMul4BitBackward" in label[e >> 1] for e in in_backward)


# ------------------------------------------------------------------------------------------------------- the command


LFM = {
    "model_type": "lfm2", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(traces.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def ran(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    return int(exit_.value.code or 0)


def written(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return str(file)


def test_a_trace_has_the_shape_of_a_plan() -> None:
    made = trace.trace(small("llama"), method="lora", seq_len=128)
    found, planned = made.to_dict(), vramplan.plan(small("llama"), method="lora", seq_len=128).to_dict()
    assert found.keys() == planned.keys() | {"witness", "plan"}
    for name in ("model", "options", "parameters", "memory"):
        assert found[name].keys() == planned[name].keys()
    assert found["parameters"] == planned["parameters"]
    assert found["plan"]["memory"] == planned["memory"]
    assert sum(part["bytes"] for part in found["memory"]["components"]) == found["memory"]["peak_allocated_bytes"]
    assert json.loads(json.dumps(found)) == found


def test_the_breakdown_agrees_row_by_row() -> None:
    made = trace.trace(small("llama"), method="full", seq_len=256)
    rows = {row["name"]: row for row in made.to_dict()["plan"]["differences"]["components"]}
    for name in ("weights", "gradients", "optimizer states", "cuBLAS workspace"):
        assert rows[name]["planned_bytes"] == rows[name]["traced_bytes"]


def test_text_shows_trace_and_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert ran("trace", written(tmp_path, small("llama")), "--method", "lora", "--seq-len", "128") == 0
    out = capsys.readouterr().out
    assert "plan less trace" in out
    assert "trace and plan hold the same tensors" in out


def test_an_unknown_architecture_is_answered_by_its_trace_and_later_from_it(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path, LFM)
    options = ("--method", "lora", "--seq-len", "64", "--json")
    assert ran(model, *options) == 2
    assert f"vramplan trace {model}" in capsys.readouterr().err
    assert ran("trace", model, *options) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["plan"] is None
    assert "the planner does not know this architecture" in first["memory"]["notes"][0]
    assert [file.suffix for file in cache.iterdir()] == [".json"]
    assert ran(model, *options) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["memory"]["peak_allocated_bytes"] == first["memory"]["peak_allocated_bytes"]
    assert "answered from an earlier" in again["memory"]["notes"][0]
    assert ran(model, "--method", "lora", "--seq-len", "65") == 2


def test_broken_and_foreign_files_are_passed_over(cache: Path) -> None:
    cache.mkdir(parents=True)
    for content in (b"", b"{", b"[]", b'{"schema": 99, "answer": {}}', b'{"schema": 1, "answer": 7}', b"\xff"):
        (cache / "x.json").write_bytes(content)
        assert traces.find("x") is None
    (cache / "x.json").write_bytes(b" " * (2**20 + 1))
    assert traces.find("x") is None
    traces.keep("x", {"a": 1})
    assert traces.find("x") == {"a": 1}


def test_the_oldest_traces_go(cache: Path) -> None:
    for i in range(205):
        file = traces.keep(f"{i:03}", {})
        os.utime(file, (i, i))
    kept = sorted(file.stem for file in cache.iterdir())
    assert len(kept) == 200
    assert kept[0] == "005"


def test_a_trace_that_cannot_be_kept_is_an_answer_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(traces.FOLDER, str(tmp_path / "file"))
    found = trace.answer(LFM, method="full", seq_len=32)
    assert "could not be kept" in found["warnings"][0]


def test_without_sdpa_the_model_runs_eager() -> None:
    config = {"model_type": "mamba", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1}
    made = trace.trace(config, method="full", seq_len=8)
    assert made.options.attention == "eager"
    assert made.seen.trainable == made.seen.total


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"trainer": "trl"}, "add --trainer transformers"),
        ({"attention": "flash_attention_2", "padded": True}, "add --no-padded"),
        ({"stack": "torch=2.0"}, "leave --stack out"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_a_trace_cannot_do(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trace.trace(small("llama"), **asked)


def test_the_installed_versions_may_be_named() -> None:
    assert trace._installed_only(f"torch={version('torch')}").versions["torch"] == version("torch")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "find_spec", lambda name: None if name in ("peft", "bitsandbytes") else object())
    with pytest.raises(Failure, match=r"peft and bitsandbytes are not installed; pip install 'vramplan\[probe\]'"):
        trace.trace(small("llama"))


def test_a_model_that_transformers_cannot_build_is_refused_in_a_sentence(cache: Path) -> None:
    with pytest.raises(UsageError, match="has no model_type 'nonesuch'"):
        trace.trace({"model_type": "nonesuch", "hidden_size": 8})
    with pytest.raises(UsageError, match="at most 1,000"):
        trace.trace(LFM | {"num_hidden_layers": 10**6}, method="full")
    with pytest.raises(UsageError, match="cannot build this vit"):
        trace.trace({"model_type": "vit"}, method="full")
    assert not cache.exists()


def test_accumulated_gradients_stay_and_later_steps_repeat() -> None:
    planned = vramplan.plan(small("llama"), method="full", seq_len=64, gradient_accumulation_steps=5)
    seen = dryrun.run(planned.model.config, planned.options, planned.device)
    held: set[int] = {e >> 1 for stretch in seen.loading for e in stretch.events if not e & 1}
    held -= {e >> 1 for stretch in seen.loading for e in stretch.events if e & 1}
    after = []
    for number in range(3):
        names = []
        for stretch in seen.step(number):
            names.append(stretch.name)
            for event in stretch.events:
                assert (event >> 1 in held) == bool(event & 1)  # nothing is made twice, nothing goes twice
                (held.discard if event & 1 else held.add)(event >> 1)
        assert names.count("loss, backward") == 5
        after.append(sum(seen.program.sizes[i] for i in held))
    assert after[1] == after[2] == pytest.approx(after[0], abs=512)


def test_paged_states_are_counted_apart() -> None:
    planned = vramplan.plan(small("llama") | {"vocab_size": 2048}, method="full", optimizer="paged_adamw_32bit")
    seen = dryrun.run(planned.model.config, planned.options, planned.device)
    assert seen.paged_bytes == planned.memory.paged_bytes > 0
    found = memory.replay(seen, planned.options, planned.device, memory.SOURCES)
    assert found.peak_allocated_bytes == pytest.approx(planned.memory.peak_allocated_bytes, rel=0.01)


def test_a_traced_run_may_fit_only_just() -> None:
    def on(gpu: str) -> Any:
        made = trace.trace(small("llama") | {"vocab_size": 8000}, method="full", seq_len=512, batch_size=4, gpu=gpu)
        return made.memory, made.fit, made.to_dict()

    memory, _, _ = on("24GiB")
    assert on(f"{memory.needed_bytes}B")[1].headroom_bytes == 0
    _, tight, answer = on(f"{memory.needed_bytes - 1}B")  # 74 MiB of it are only cached
    assert tight.fits
    assert tight.retries > 0
    assert (answer["gpu"]["fits"], answer["gpu"]["retries"]) == (True, tight.retries)
