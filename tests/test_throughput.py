"""The time of a step: FLOPs and bytes worked out by hand, what must grow with what, and measured runs."""

from __future__ import annotations

import itertools
import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FLAT, GROUPED, SMALL, small

from vramplan.planner import catalog, memory, report, throughput, traffic
from vramplan.planner.architecture import parse
from vramplan.planner.calibration import Calibration
from vramplan.planner.device import device
from vramplan.planner.errors import UsageError
from vramplan.planner.plan import _count, plan
from vramplan.planner.sources import resolve_model
from vramplan.planner.training import parse_options, settle

H200 = catalog.gpu("h200")
# A llama of 2 layers: H 256, inner 448, N 4, K 2, D 64, V 320.
LLAMA = {"model_type": "llama", **SMALL, **GROUPED, "tie_word_embeddings": False}
B, T, H, INNER, N, K, D, V, LAYERS = 2, 128, 256, 448, 4, 2, 64, 320, 2
ROWS = B * T
LINEARS = [(N * D, H), (K * D, H), (K * D, H), (H, N * D), (INNER, H), (INNER, H), (H, INNER)]  # (out, in) of a layer


def work(config: dict[str, Any] | str = LLAMA, gpu: str = "h200", **options: Any) -> throughput.Work:
    made = plan(config, gpu=gpu, calibration=False, **{"batch_size": B, "seq_len": T} | options)
    return throughput.work(memory.run_of(made.architecture, made.options, made.device, made.counts))


def total(step: throughput.Work, kind: str) -> tuple[int, int, int]:
    """FLOPs, bytes and launches of a kind."""
    found = [
        (n * times * kernel.flops, n * times * kernel.nbytes, n * times)
        for stretch, times in step.stretches
        for section in stretch
        for kernel, n in section.kernels.items()
        if kernel.kind == kind
    ]
    flops, nbytes, launches = map(sum, zip(*found, strict=True))
    return flops, nbytes, launches


def seconds(step: throughput.Work, gpu: str = "h200") -> throughput.StepTime:
    found = throughput.time_of(step, catalog.gpu(gpu))
    assert found is not None
    return found


# --- FLOPs and bytes, by hand ----------------------------------------------------------------------------------------


def test_full_fine_tuning_takes_three_products_for_each_weight() -> None:
    step = work(method="full", gradient_checkpointing=False)
    layer = sum(2 * ROWS * out * into for out, into in LINEARS)
    head = 2 * ROWS * V * H
    assert total(step, traffic.PRODUCTS)[0] == 3 * (LAYERS * layer + head)
    assert total(step, traffic.PRODUCTS)[2] == 3 * (7 * LAYERS + 1)


def test_checkpointing_runs_the_forward_again_but_for_the_last_product() -> None:
    """down_proj saves its input when it is called, and nothing after it saves: recomputation stops there."""
    plain = total(work(method="full", gradient_checkpointing=False), traffic.PRODUCTS)[0]
    again = total(work(method="full", gradient_checkpointing=True), traffic.PRODUCTS)[0]
    assert again - plain == LAYERS * sum(2 * ROWS * out * into for out, into in LINEARS[:-1])


def test_lora_needs_no_gradient_of_frozen_weights() -> None:
    step = work(method="lora", rank=16, gradient_checkpointing=True)
    base = sum(2 * ROWS * out * into for out, into in LINEARS)
    down = sum(2 * ROWS * 16 * into for _, into in LINEARS)
    up = sum(2 * ROWS * 16 * out for out, _ in LINEARS)
    forward = base + down + up
    # again: all but the last adapter's B, after which nothing is saved
    again = forward - 2 * ROWS * 16 * H
    backward = base + 2 * (down + up)
    assert total(step, traffic.PRODUCTS)[0] == LAYERS * (forward + again + backward) + 2 * (2 * ROWS * V * H)


def test_attention_is_half_a_square_and_backward_is_two_and_a_half_times_forward() -> None:
    pairs = T * (T + 1) // 2
    forward = 2 * 2 * B * N * pairs * D
    step = work(method="full", gradient_checkpointing=False)
    assert total(step, traffic.ATTENTION)[0] == LAYERS * (forward + int(2.5 * forward))
    masked = work(method="full", gradient_checkpointing=False, padded=True)
    assert total(masked, traffic.ATTENTION)[0] == LAYERS * int(3.5 * 2 * 2 * B * N * T * T * D)


def test_eager_attention_is_products_of_whole_squares() -> None:
    step = work(method="full", gradient_checkpointing=False, attention="eager")
    plain = work(method="full", gradient_checkpointing=False)
    squares = 3 * 2 * (2 * B * N * T * T * D)
    assert total(step, traffic.PRODUCTS)[0] - total(plain, traffic.PRODUCTS)[0] == LAYERS * squares


def test_each_product_in_4_bit_unpacks_its_weight() -> None:
    """NF4 to 16 bits reads 0.5 B and a 64th of an absmax's 4 B, writes 2 B: in forward, again, and in backward."""
    step = work(method="qlora", double_quant=False, seq_len=2048)
    weights = sum(out * into for out, into in LINEARS)
    unpacked = weights * (2 + 0.5 + 4 / 64)
    assert total(step, traffic.NF4)[1] == pytest.approx(3 * LAYERS * unpacked, rel=0.001)
    assert total(step, traffic.NF4)[2] == 3 * LAYERS * 7


def test_the_optimizers_traffic() -> None:
    full = {"method": "full", "weights_dtype": "bf16", "gradient_checkpointing": False}
    parameters = LAYERS * (sum(out * into for out, into in LINEARS) + 2 * H) + 2 * V * H + H
    assert total(work(**full, optimizer="adamw_torch_fused"), traffic.OPTIMIZER)[1] == 7 * 2 * parameters
    assert total(work(**full, optimizer="sgd"), traffic.OPTIMIZER)[1] == 3 * 2 * parameters
    assert total(work(**full), traffic.CLIPPING)[1] == 3 * 2 * parameters


def test_accumulation_repeats_the_micro_step_and_adds_gradients_up() -> None:
    one, four = (work(method="full", gradient_accumulation_steps=n) for n in (1, 4))
    assert total(four, traffic.PRODUCTS)[0] == 4 * total(one, traffic.PRODUCTS)[0]
    assert total(four, traffic.OPTIMIZER) == total(one, traffic.OPTIMIZER)
    assert four.tokens == 4 * one.tokens


def test_experts_compute_for_the_tokens_that_are_routed_to_them() -> None:
    config = small("mixtral")
    step = work(config, method="full", gradient_checkpointing=False, batch_size=1, seq_len=1024)
    inner, top = 448, 2
    assert config["intermediate_size"] == inner
    layer = 2 * 1024 * (2 * H * H + 2 * H * 128 + 4 * H)  # q and o, k and v, the router
    routed = 2 * 1024 * top * 3 * H * inner
    assert total(step, traffic.PRODUCTS)[0] == 3 * (2 * (layer + routed) + 2 * 1024 * V * H)


def test_an_adapter_of_the_embeddings_looks_rows_up_and_multiplies_once() -> None:
    table, none = (
        total(work(method="lora", rank=16, gradient_checkpointing=False, target_modules=names), traffic.PRODUCTS)
        for names in ("embed_tokens,q_proj", "q_proj")
    )
    # B's product and the gradient of each operand; layer 0's input has a gradient only now
    inputs = 2 * ROWS * H * (N * D + 2 * K * D) + 2 * ROWS * 16 * H
    assert table[0] - none[0] == 3 * 2 * ROWS * 16 * H + inputs


@pytest.mark.parametrize(("model_type", "index"), FLAT)
def test_every_product_of_every_family_is_found(model_type: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient of an operand belongs to a product of the forward; what is left is a few of the smallest."""
    missed, found = [], []
    read = traffic._Reader._kernel

    def watched(self: Any, label: str, size: int, scope: str, before: list[int]) -> Any:
        kernel = read(self, label, size, scope, before)
        if label in ("gradient of an input", "gradient of a weight", "projection", "logits"):
            (found if kernel.kind == traffic.PRODUCTS else missed).append(size)
        return kernel

    monkeypatch.setattr(traffic._Reader, "_kernel", watched)
    for options in ({"method": "full", "gradient_checkpointing": False}, {"method": "qlora"}):
        try:
            work(small(model_type, index), **options)
        except UsageError:
            continue
    assert sum(missed) <= 0.05 * sum(found)


# --- what must grow with what ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.sampled_from([64, 256, 1024]), st.sampled_from(["qlora", "lora", "full"]))
def test_more_tokens_take_longer(batch: int, tokens: int, method: str) -> None:
    few, many = (seconds(work(method=method, batch_size=b, seq_len=tokens)).step_s for b in (batch, 2 * batch))
    assert few <= many <= 2 * few


def test_checkpointing_and_4_bit_cost_time() -> None:
    plain, again = (
        seconds(work("llama-3.1-8b", method="lora", seq_len=4096, gradient_checkpointing=c)).step_s
        for c in (False, True)
    )
    packed = seconds(work("llama-3.1-8b", method="qlora", seq_len=4096)).step_s
    assert plain < again < packed


def test_a_faster_gpu_is_no_slower() -> None:
    step = work("llama-3.1-8b", batch_size=8, seq_len=2048)
    times = [seconds(step, gpu).step_s for gpu in ("h200", "h100", "a100-80gb", "l40s", "a10")]
    assert times == sorted(times)


@pytest.mark.parametrize("gpu", [card.name for card in catalog.gpus()])
def test_every_known_gpu_has_a_time_and_its_parts_add_up(gpu: str) -> None:
    step = work(batch_size=1)
    found = throughput.time_of(step, catalog.gpu(gpu))
    assert found is not None
    assert 0 < found.low_s <= found.step_s <= found.high_s
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.step_s)
    assert found.tokens_per_s == pytest.approx(step.tokens / found.step_s)


def test_a_gpu_known_by_its_size_alone_has_no_time() -> None:
    assert throughput.time_of(work(), catalog.gpu("24GiB")) is None


def test_what_a_probe_measured_goes_before_the_datasheet() -> None:
    step = work("llama-3.1-8b", batch_size=8, seq_len=2048)
    learned = Calibration("h200", "580", {"torch": "2.11"}, "2026-11-22", matmul_flops_per_s=300e12)
    slow = throughput.time_of(step, H200, learned)
    assert slow is not None
    products = [part.seconds for part in slow.parts if part.name == traffic.PRODUCTS]
    assert products[0] > total(step, traffic.PRODUCTS)[0] / 300e12
    assert slow.step_s > seconds(step).step_s


def test_a_product_takes_whole_waves() -> None:
    """132 tiles of 128 x 256 fill an H200 once; one more tile takes a second wave."""
    c = throughput.ceilings(H200)
    assert c is not None
    one = traffic.Kernel(traffic.PRODUCTS, 0, 0, batch=1, m=12 * 128, n=11 * 256, k=4096)
    more = one._replace(n=11 * 256 + 1)
    assert throughput._product_s(more, c[0]) > throughput._product_s(one, c[0])
    flops, written = 2 * one.m * one.n * one.k, 2 * one.m * one.n
    whole = flops / c[0].products_per_s + written / 2 / c[0].bytes_per_s  # two waves of 128 x 128, the second written
    assert throughput._product_s(one, c[0]) == pytest.approx(whole)


# --- in a plan -------------------------------------------------------------------------------------------------------


def test_a_plan_has_a_time_where_its_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan("llama-3.2-1b", gpu="h200", calibration=False, seq_len=1024)
    time = made.to_dict()["time"]
    assert time["low_s"] < time["step_s"] < time["high_s"]
    assert {part["name"] for part in time["parts"]} >= {traffic.PRODUCTS, traffic.ELEMENTWISE, throughput.WAITING}
    assert plan("llama-3.2-1b", seq_len=1024).to_dict()["time"] == {}
    report.print_plan(made)
    assert "Time of a step" in capsys.readouterr().out


def test_a_small_model_on_a_fast_gpu_waits_for_the_host() -> None:
    few, many = (seconds(work("llama-3.2-1b", batch_size=b, seq_len=1024)) for b in (1, 32))
    waiting = {part.name: part.seconds for part in few.parts}[throughput.WAITING]
    assert waiting > 0.5 * few.step_s
    assert few.step_s == pytest.approx(few.host_s, rel=0.05)
    assert many.step_s > 2 * many.host_s


# --- what others published -------------------------------------------------------------------------------------------
#
# Other frameworks, and most rows are of many GPUs, whose communication is mostly hidden: so the trend is what counts.

PUBLISHED = [
    json.loads(line) for line in (Path(throughput.__file__).parent.parent / "tables" / "throughput.jsonl").open()
]


def tokens_per_s(row: dict[str, Any], num_gpus: int = 1) -> float:
    """What is planned for one GPU of a published run, shared by so many; memory is not asked about."""
    card = catalog.gpu(row["gpu"])
    architecture = parse(resolve_model(row["model"]).config)
    sharing = {"num_gpus": num_gpus, "parallel": "fsdp"} if num_gpus > 1 else {}
    options, _ = settle(parse_options(row["options"] | sharing), architecture, card)
    run = memory.run_of(architecture, options, device(card), _count(architecture, options))
    found = throughput.time_of(throughput.work(run), card)
    assert found is not None
    return found.tokens_per_s / num_gpus


@cache
def published() -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Tokens a second of one GPU, planned and published, by framework and GPU."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in PUBLISHED:
        pair = (tokens_per_s(row), row["tokens_per_s_per_gpu"])
        groups.setdefault((row["framework"], row["gpu"]), []).append(pair)
    return groups


def published_errors() -> list[float]:
    """planned / published - 1 of each run."""
    return [planned / seen - 1 for pairs in published().values() for planned, seen in pairs]


class Shared(NamedTuple):
    """A published run on several GPUs: tokens a second of each, published and planned under FSDP2."""

    name: str
    gpu: str
    batch: str
    num_gpus: int
    published: float
    planned: float


@cache
def published_shared() -> list[Shared]:
    return [
        Shared(
            row["name"], row["gpu"], f"{row['options']['batch_size']} x {row['options']['seq_len']:,}",
            row["num_gpus"], row["tokens_per_s_per_gpu"], tokens_per_s(row, row["num_gpus"]),
        )
        for row in PUBLISHED if row.get("num_gpus", 1) > 1
    ]  # fmt: skip


def published_scaling() -> dict[tuple[str, str], dict[int, Shared]]:
    """The runs on 128, 256 and 512 H100s, by model and batch."""
    found: dict[tuple[str, str], dict[int, Shared]] = {}
    for each in published_shared():
        if each.num_gpus >= 128:
            found.setdefault((each.name, each.batch), {})[each.num_gpus] = each
    return found


def test_published_runs_on_up_to_512_gpus() -> None:
    """Another framework's FSDP. What more hosts cost is planned to within 4 % of a GPU's speed."""
    errors = sorted(abs(each.planned / each.published - 1) for each in published_shared())
    assert len(errors) == 129
    assert statistics.median(errors) < 0.12
    assert len(published_scaling()) == 6
    for by_number in published_scaling().values():
        for number in (256, 512):
            more, first = by_number[number], by_number[128]
            assert more.planned / first.planned == pytest.approx(more.published / first.published, abs=0.04)


def test_published_runs_of_other_frameworks() -> None:
    """The errors that docs/accuracy.md states, and who is faster than whom among the runs of one framework and GPU."""
    errors = sorted(map(abs, published_errors()))
    assert len(errors) == 135
    assert statistics.median(errors) < 0.095
    assert errors[int(0.9 * len(errors))] < 0.36
    for pairs in published().values():
        if len(pairs) > 10:
            two = [(one, other) for one, other in itertools.combinations(pairs, 2) if one[1] != other[1]]
            right = sum((one[0] < other[0]) == (one[1] < other[1]) for one, other in two)
            assert right / len(two) > 0.95


# --- several GPUs ----------------------------------------------------------------------------------------------------


def test_what_hooks_take_is_what_was_timed() -> None:
    """What a layer more takes, of three settings: seconds of a unit and of each weight in it, by least squares."""
    file = Path(throughput.__file__).parents[1] / "tables" / "sharing_times.json"
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"]

    def of(parallel: str, method: str, targets: str | None, *names: str) -> tuple[float, int]:
        """Seconds of 12 layers more, and the tensors that they train."""
        few, many = (
            each
            for layers in (4, 16)
            for each in steps
            if (each["layers"], each["parallel"], each["method"], each.get("target_modules"))
            == (layers, parallel, method, targets)
        )

        def of_one(each: dict[str, Any]) -> float:
            timed = {name: hook["s"] for name, hook in each["hooks"].items()} | each
            return sum(float(timed[name]["least"]) for name in names)

        return of_one(many) - of_one(few), many["trained"] - few["trained"]

    weights = {("full", None): 9, ("lora", None): 9 + 14, ("lora", "q_proj,v_proj"): 9 + 4}
    gathers, reductions, updates = [], [], []
    for setting, n in weights.items():
        there, _ = of("fsdp", *setting, "_pre_forward", "_post_forward", "_pre_backward")
        gathers.append((n, there / 12 / 2))  # in forward and in backward
        back, trained = of("fsdp", *setting, "post_backward")
        reductions.append((trained / 12, back / 12))
        updates.append((of("fsdp", *setting, "update_s")[0] - of("none", *setting, "update_s")[0]) / trained)
    for found, (first, each) in ((gathers, throughput._HOOKS_S[:2]), (reductions, throughput._HOOKS_S[2:4])):
        slope, start = statistics.linear_regression(*zip(*found, strict=True))
        assert first == pytest.approx(start, rel=0.01)
        assert each == pytest.approx(slope, rel=0.03)
    assert pytest.approx(statistics.mean(updates), rel=0.02) == throughput._DTENSOR_S
    assert (round(min(updates), 6), round(max(updates), 6)) == (14e-6, 30e-6)
    shared = [each["step_s"]["median"] / each["step_s"]["least"] for each in steps if each["parallel"] != "none"]
    assert statistics.median(shared) == pytest.approx(throughput._SEVERAL_HOSTS, abs=0.005)
    assert (round(min(shared), 2), round(max(shared), 2)) == (1.05, 1.32)


# --- CPU offload -----------------------------------------------------------------------------------------------------


def offload_times() -> dict[str, Any]:
    file = Path(throughput.__file__).parents[1] / "tables" / "offload_times.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_what_offload_takes_is_what_was_timed() -> None:
    times = offload_times()
    rates = {(row["copy"], row["bytes"]): row["bytes"] / row["s"] / 64e9 for row in times["copies"]}
    for way in ("to the GPU", "to the host"):
        assert rates[way, 2**28] == pytest.approx(throughput._PCIE.middle, abs=0.01)
        assert rates[way, 2**20] == pytest.approx(throughput._PCIE.slow, abs=0.04)
    large = {
        (row["what"], row["threads"]): row["s"] / row["elements"] for row in times["updates"] if row["tensors"] == 4
    }
    for name, seconds in {**throughput._WEIGHT_S, "clipping": throughput._WEIGHT_CLIPPING_S}.items():
        assert seconds == pytest.approx(large[name, 1], rel=0.02)
    for name in ("adamw_torch", "adamw_torch_fused"):
        assert 0.1 < large[name, 16] / large[name, 1] < throughput._LOOPS.fast


def test_steps_with_offload_as_they_were_measured() -> None:
    """No figure was chosen by these; one GPU stood for two, whose collectives are hidden by what the host does."""
    steps = offload_times()["steps"]
    assert len(steps) == 5
    for each in steps:
        asked = {name: each[name] for name in ("method", "seq_len", "optimizer", "mixed_precision") if name in each}
        made = plan(
            each["model"], gpu="h200", calibration=False, parallel="fsdp", num_gpus=2, cpu_offload=True, **asked
        )
        assert made.time
        assert made.time.step_s == pytest.approx(each["step_s"]["median"], rel=0.2)
        assert made.time.low_s < each["step_s"]["least"] < made.time.high_s or each.get("optimizer") == "adamw_torch"
        parts = {part.name: part.seconds for part in made.time.parts}
        there = each["clipping_s"]["median"] + each["update_s"]["median"]
        assert parts[throughput.IN_HOST] == pytest.approx(there, rel=0.3)
        assert sum(parts.values()) == pytest.approx(made.time.step_s)


def test_offload_moves_shards_and_gradients() -> None:
    """Shards in float32 to the GPU for forward and, but for the head's unit, for backward; their gradients back."""
    asked = {"method": "full", "num_gpus": 2, "parallel": "fsdp"}
    sections = [each for stretch, _ in work(cpu_offload=True, **asked).stretches for each in stretch]
    layer = 4 * (sum(out * inner for out, inner in LINEARS) + 2 * H) // 2
    table, norm = 4 * V * H // 2, 4 * H // 2
    assert sum(each.fetched for each in sections) == 2 * 2 * layer + 2 * table + (table + norm)
    assert sum(each.stored for each in sections) == 2 * layer + 2 * table + norm
    assert {each.in_host for each in sections} == {0, (2 * layer + 2 * table + norm) // 4}
    assert not any(each.fetched or each.in_host for stretch, _ in work(**asked).stretches for each in stretch)


def test_the_time_of_deepspeeds_offload_is_not_known() -> None:
    made = plan(LLAMA, gpu="h200", method="full", num_gpus=2, parallel="zero2", cpu_offload=True)
    assert made.time is None
    assert "so there is no time of a step" in "\n".join(made.memory.notes)
    assert made.costs()[0] == ()
