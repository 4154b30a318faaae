"""`vramplan fit`: what is said to fit is planned to fit, and what is said to fail fails."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from test_plan import TINY

from vramplan import UsageError, plan
from vramplan.planner import capacity
from vramplan.planner.capacity import Capacity, Cell, Limit, fit
from vramplan.planner.report import plain
from vramplan.planner.report_decide import _commands, fit_page
from vramplan.planner.stack import parse_stack
from vramplan.planner.trial import Bench, command

if TYPE_CHECKING:
    from pathlib import Path

MODEL = TINY | {"vocab_size": 8000, "max_position_embeddings": 4096}
GPU = "1.5GiB"  # the CUDA context takes half of it
ASKED = {"seq_len": 512, "batch_size": 2, "rank": 8}


@pytest.fixture(scope="module")
def found() -> Capacity:
    return fit(MODEL, gpu=GPU, over="batch_size,seq_len,rank,method", **ASKED)


@pytest.fixture
def run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return run


def planned(**options: Any) -> Any:
    return plan(MODEL, gpu=GPU, **ASKED | options).fit


def limit(found: Capacity, over: str) -> Limit:
    return next(each for each in found.limits if each.over == over)


# ------------------------------------------------------------------------------------------- what is said is the plan's


@pytest.mark.parametrize("over", ["batch_size", "seq_len"])
def test_the_largest_fits_and_the_next_does_not(found: Capacity, over: str) -> None:
    each = limit(found, over)
    assert each.largest
    assert each.fails
    assert planned(**{over: each.largest.value}) == each.largest.trial.fit
    assert each.largest.trial.roomy
    after = each.sizes[each.sizes.index(each.largest.value) + 1]
    assert planned(**{over: after}).headroom_bytes < 0
    last = each.only_just or each.largest
    assert each.fails.value == each.sizes[each.sizes.index(last.value) + 1]
    assert planned(**{over: each.fails.value}) == each.fails.trial.fit
    assert not each.fails.trial.survives
    assert each.fails.trial.runs_out == "loss, backward"


def test_what_fits_only_just_is_neither_largest_nor_failing(found: Capacity) -> None:
    each = limit(found, "batch_size").only_just
    assert each
    assert each.trial.survives
    assert not each.trial.roomy
    assert planned(batch_size=each.value).retries > 0


def test_a_rank_beyond_every_side_is_refused_in_words(found: Capacity) -> None:
    each = limit(found, "rank")
    assert each.largest
    assert each.largest.value == 128
    assert each.fails
    assert each.fails.trial.refused.startswith("rank 256 is larger than the largest side of every adapted matrix, 128")


def test_methods_are_the_plans_most_demanding_first(found: Capacity) -> None:
    assert [method for method, _ in found.methods] == ["full", "lora", "qlora"]
    for method, trial in found.methods:
        asked = {name: value for name, value in ASKED.items() if method != "full" or name != "rank"}
        assert plan(MODEL, gpu=GPU, method=method, **asked).fit == trial.fit


def test_the_frontier_is_the_largest_batch_and_never_grows(found: Capacity) -> None:
    lengths = [512, 1024, 2048, 4096]
    assert [(cell.method, cell.seq_len) for cell in found.frontier] == [
        (method, length) for method in capacity.METHODS for length in lengths
    ]
    bench = Bench(plan(MODEL).architecture, plan(MODEL, gpu=GPU).fit.gpu, parse_stack())  # type: ignore[union-attr]
    for cell in found.frontier:
        asked: dict[str, Any] = {"method": cell.method, "seq_len": cell.seq_len}
        asked |= {"rank": 8} if cell.method != "full" else {}
        assert cell.batch_size
        assert cell.trial
        assert bench.trial(asked | {"batch_size": cell.batch_size}).fit == cell.trial.fit
        assert bench.roomy(asked | {"batch_size": cell.batch_size})
        assert not bench.roomy(asked | {"batch_size": cell.batch_size + 1})
    for one, next_one in zip(found.frontier, found.frontier[1:], strict=False):
        if one.method == next_one.method:
            assert (next_one.batch_size or 0) <= (one.batch_size or 0)


def test_the_whole_cache_is_what_a_replay_within_the_room_meets_as_well() -> None:
    bench = Bench(plan(MODEL).architecture, planned().gpu, parse_stack())
    for batch in range(1, 16):
        options = bench.options(ASKED | {"batch_size": batch})
        free, within = bench._replay(options), bench._replay(options, bench.room_bytes)
        assert bench.roomy(ASKED | {"batch_size": batch}) == (not within.retries and not within.out_of_memory)
        assert not bench.roomy(ASKED | {"batch_size": batch}) or bench.possible(ASKED | {"batch_size": batch})
        if within.retries == 0 and not within.out_of_memory:
            assert within.peak_reserved_bytes == free.peak_reserved_bytes


# ------------------------------------------------------------------------------------------------------ other questions


def test_the_models_positions_end_the_search() -> None:
    found = fit("gpt2", gpu="h200", over="seq_len")
    each = limit(found, "seq_len")
    assert each.largest
    assert (each.largest.value, each.fails, found.options.seq_len) == (1024, None, 1024)
    assert "no more is tried than 1,024" in "\n".join(plain(fit_page(found)))


def test_nothing_fits() -> None:
    found = fit("llama-3.1-8b", gpu="4GiB", seq_len=512)
    assert not found.fits
    assert all(each.largest is each.only_just is None for each in found.limits)
    batch = limit(found, "batch_size").fails
    assert batch
    assert batch.value == 1
    assert batch.trial.fit
    assert batch.trial.fit.headroom_bytes < -(2**30)
    assert all(cell.batch_size is None for cell in found.frontier)
    page = "\n".join(plain(fit_page(found)))
    assert "none" in page
    assert "nor longer" in page


def test_an_asked_length_is_a_row_of_the_frontier() -> None:
    assert capacity._lengths(3000, 4096) == [512, 1024, 2048, 3000, 4096]
    assert capacity._lengths(100, 128) == [100, 128]


def test_as_many_gpus_are_tried_as_the_run_needs() -> None:
    """Two GPUs hold more than one: accelerate's FSDP2 keeps the trained weights in float32, and NCCL has buffers."""
    found = fit("qwen2.5-0.5b", gpu="5GiB", over="num_gpus", method="full", seq_len=256, parallel="fsdp")
    assert [number for number, _ in found.gpus] == [1, 2, 4, 5, 8]
    assert [trial.survives for _, trial in found.gpus] == [False, False, True, True, True]
    assert [trial.roomy for _, trial in found.gpus] == [False, False, False, True, True]
    assert found.gpus[0][1].options == found.asked.options
    assert found.gpus[2][1].options.parallel == "fsdp"
    assert found.fits
    page = "\n".join(plain(fit_page(found)))
    assert "4 GPUs" in page
    assert [row["num_gpus"] for row in found.to_dict()["gpus"]] == [1, 2, 4, 5, 8]
    assert found.command.endswith("--num-gpus 4 --parallel fsdp --gpu 5GiB")


def test_the_fewest_that_hold_it_need_not_be_a_power_of_two() -> None:
    asked = {"method": "full", "mixed_precision": "no", "seq_len": 256}
    found = fit("qwen2.5-0.5b", gpu="3GiB", over="num_gpus", **asked)
    numbers = [number for number, _ in found.gpus]
    fewest = numbers[-2]
    assert numbers == [1, 2, 4, 8, 16, fewest, 32]
    assert 16 < fewest < 32
    assert found.command.endswith(f"--num-gpus {fewest} --parallel fsdp --gpu 3GiB")
    hosts = -(-fewest // 8)
    assert fewest % hosts == 0  # accelerate starts as many on each
    for number, holds in ((fewest - hosts, False), (fewest, True)):
        made = plan("qwen2.5-0.5b", gpu="3GiB", num_gpus=number, parallel="fsdp", **asked)
        assert made.fit
        assert made.fit.fits is holds


def test_more_gpus_that_hold_as_much_are_not_tried() -> None:
    found = fit("qwen2.5-0.5b", gpu="5GiB", over="num_gpus", method="full", seq_len=256, parallel="ddp")
    assert [number for number, _ in found.gpus] == [1, 2, 4]
    assert not found.fits
    assert "do not help: what each holds by itself" in "\n".join(plain(fit_page(found)))
    alone = fit("qwen2.5-0.5b", gpu="24GiB", over="num_gpus", method="full", seq_len=256, parallel="ddp")
    assert [number for number, _ in alone.gpus] == [1]
    assert alone.command == "vramplan qwen2.5-0.5b --method full --seq-len 256 --gpu 24GiB"


def test_what_each_gpu_loads_by_itself_no_number_helps() -> None:
    """A 4-bit model is quantised on each GPU as a whole, before it is sharded: 35 GB of a 70B."""
    found = fit("llama-3.1-70b", gpu="rtx-4090", over="num_gpus")
    assert {number: trial.runs_out for number, trial in found.gpus} == {1: "loading", 2: "loading"}
    assert "each loads the whole model" in "\n".join(plain(fit_page(found)))


def test_the_fewest_and_the_fewest_with_the_whole_cache() -> None:
    found = fit("llama-3.1-8b", gpu="a100-40gb", over="num_gpus", method="full")
    holding = [number for number, trial in found.gpus if trial.survives]
    roomy = [number for number, trial in found.gpus if trial.roomy]
    assert holding[0] < roomy[0]
    assert roomy[-1] == found.gpus[-1][0]
    for number, with_cache in ((holding[0] - 1, False), (holding[0], False), (roomy[0] - 1, False), (roomy[0], True)):
        made = plan("llama-3.1-8b", gpu="a100-40gb", method="full", num_gpus=number, parallel="fsdp").fit
        assert made
        assert (made.headroom_bytes >= 0) is with_cache
        assert made.fits is (number >= holding[0])


def test_parts_that_are_loaded_shrink_with_the_number_of_gpus() -> None:
    """ZeRO 3 partitions weights as they are loaded, so running out there is no reason to stop."""
    found = fit("llama-3.1-70b", gpu="rtx-4090", over="num_gpus", parallel="zero3", method="lora")
    assert [number for number, trial in found.gpus if trial.roomy][-1] == 32
    assert found.gpus[1][1].runs_out == "loading"


def test_what_is_reserved_falls_by_fits_and_starts() -> None:
    found = fit("qwen2.5-1.5b", gpu="11075736599B", over="num_gpus", parallel="zero2", method="full")
    assert found.gpus[-1][1].roomy


def test_phases_of_their_own_process_are_judged_by_themselves() -> None:
    """A merge does not depend on the batch."""
    found = fit(
        "llama-3.1-8b", gpu="rtx-4090", over="rank", method="qlora", batch_size=16, seq_len=8192, phases="merging"
    )
    (ranks,) = found.limits
    assert ranks.largest
    assert ranks.largest.trial.survives


def test_zero_is_looked_for_too() -> None:
    found = fit("qwen2.5-0.5b", gpu="6GiB", over="num_gpus", method="full", parallel="zero2", seq_len=256)
    assert [trial.refused for _, trial in found.gpus] == [""] * len(found.gpus)
    assert found.fits


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"over": "batch"}, "unknown size 'batch'; did you mean batch_size? (--over)"),
        ({"over": "rank,rank"}, "'rank,rank' names a size twice (--over)"),
        ({"over": ""}, "unknown size ''"),
        ({"over": "rank", "method": "full"}, "full fine-tuning has no rank to vary"),
        ({"over": "num_gpus", "num_gpus": 4}, "num_gpus 4 is given, and is to be found too"),
        ({"over": "num_gpus,batch_size"}, "num_gpus is varied alone, since batch_size depends on it"),
        ({"over": "num_gpus", "parallel": "none"}, "choose --parallel fsdp"),
        (
            {"over": "num_gpus", "optimizer": "adamw_8bit", "method": "full", "gpu": "0.2GiB"},
            "cannot step fsdp's sharded tensors",
        ),
        ({"gpu": None}, "add one, such as --gpu rtx-4090"),
        ({"gpu": "h20"}, "(--gpu)"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"method": "full", "rank": 8}, "rank 8 belongs to lora and qlora"),
    ],
)
def test_wrong_questions(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        fit(MODEL, **{"gpu": GPU} | asked)
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------------- as it is shown


def test_the_page(found: Capacity) -> None:
    lines = list(plain(fit_page(found)))
    page = "\n".join(lines)
    assert all(len(line) <= 80 for line in lines)
    largest = limit(found, "batch_size").largest
    assert largest
    assert f"batch_size        {largest.value}" in page
    assert "fits only just; " in page
    assert "runs out of memory in 'loss, backward': 0." in " ".join(page.split())
    assert "seq_len  full  tokens/s  lora  tokens/s  qlora  tokens/s" in page
    one = Cell("lora", 512, 3, found.frontier[0].trial, None)
    none, longer = (Cell("lora", length, None, None, None) for length in (1024, 2048))
    alone = "\n".join(plain(fit_page(_with(found, frontier=(one, none, longer)))))
    assert "    512           3   1,536" in alone
    assert alone.count("nor longer") == 1


def _with(found: Capacity, **changes: Any) -> Capacity:
    from dataclasses import replace

    return replace(found, **changes)


def test_json_holds_the_answer(found: Capacity) -> None:
    answer = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert answer == found.to_dict()
    assert [each["over"] for each in answer["limits"]] == ["batch_size", "seq_len", "rank"]
    for each in answer["limits"]:
        assert each["largest"]["fits"]
        assert each["largest"]["gpu"]["headroom_bytes"] >= 0
        assert not each["fails"]["fits"]
    assert answer["limits"][0]["only_just"]["only_just"] is True
    assert {row["method"] for row in answer["frontier"]} == {"full", "lora", "qlora"}


def test_the_command_line(run: Any) -> None:
    code, out, err = run("fit ./config.json --gpu 1.5GiB --over batch_size --seq-len 512 --method lora --json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["command"] == "vramplan ./config.json --method lora --seq-len 512 --gpu 1.5GiB"
    best = answer["limits"][0]["largest"]["value"]
    line = answer["command"].removeprefix("vramplan ")
    again = json.loads(run(f"{line} --batch-size {best} --json")[1])
    assert again["gpu"] == answer["limits"][0]["largest"]["gpu"]
    code, out, err = run("fit ./config.json --gpu 0.5GiB")
    assert (code, err) == (1, "")
    assert "none" in out
    code, out, err = run("fit --gpu 24GiB")
    assert (code, out) == (2, "")
    assert err.startswith("vramplan: no model is named")


def test_a_profile_names_the_model_and_the_gpu(run: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('model = "./config.json"\ngpu = "1.5GiB"\nseq_len = 512\nrank = 8\n')
    code, out, _ = run("fit --config plan.toml --over rank")
    assert code == 0
    assert "rank      128" in out


def test_commands_are_ready_for_a_shell() -> None:
    asked = {"target_modules": ["q_proj", "v_proj"], "padded": True, "double_quant": "false", "epochs": 1.5}
    line = command("./my model", asked, "A100 80GB", {"torch": "2.11"}, calibration=False, prices="my prices.csv")
    assert line == (
        "vramplan './my model' --target-modules q_proj,v_proj --padded --no-double-quant --epochs 1.5 "
        "--gpu 'A100 80GB' --stack torch=2.11 --no-calibration --prices 'my prices.csv'"
    )
    assert command("gpt2", {}, "t4") == "vramplan gpt2 --gpu t4"


def test_long_commands_can_be_pasted() -> None:
    line = f"vramplan './my model' --seq-len 4096 --target-modules {','.join(['q_proj'] * 8)} --trainer trl --gpu 'A 1'"
    rows = _commands([line, line, "vramplan gpt2"]).rows
    text = "\n".join(row.cells[0] for row in rows)
    assert max(map(len, text.splitlines())) <= 80
    assert " \\\n  " in text
    assert [shlex.split(each) for each in text.replace("\\\n", "").splitlines()] == [
        shlex.split(line),
        ["vramplan", "gpt2"],
    ]
