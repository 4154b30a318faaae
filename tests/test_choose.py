"""`vramplan choose`: what is ranked, what is within, and what is left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from test_plan import TINY

from vramplan import UsageError, plan
from vramplan.planner import cost
from vramplan.planner.choose import Choice, Way, choose, unbeaten
from vramplan.planner.report import plain
from vramplan.planner.report_decide import choice_page

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "provider,gpu,gpu_count,usd_per_hour,spot,session_limit_s,date\n"
OFFERS = """\
free,t4,1,0,no,3600,2026-11-20
near,rtx-4090,1,0.40,no,,2026-11-20
near,rtx-4090,1,0.20,yes,,2026-11-20
dear,rtx-4090,1,0.80,no,,2026-11-20
far,h100,1,3.00,no,,2026-11-20
far,h100,8,24.00,no,,2026-11-20
"""
ASKED: dict[str, Any] = {"batch_size": 8, "examples": 200_000}  # so much that the GPU counts, and not the host
MODEL = TINY | {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prices") / "mine.csv"
    file.write_text(HEAD + OFFERS)
    return file


@pytest.fixture(scope="module")
def every(prices: Path) -> Choice:
    return choose(MODEL, prices=prices, **ASKED)


@pytest.fixture
def run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "my-prices.csv").write_text(HEAD + OFFERS)
    return run


def named(way: Way | None) -> tuple[str, str, str, str]:
    assert way
    return way.tried.method, way.cost.offer.gpu, way.cost.offer.provider, way.cost.offer.kind


def words(found: Choice) -> str:
    """The page, however it is wrapped."""
    return " ".join("\n".join(plain(choice_page(found))).split())


def alone(prices: Path, **asked: Any) -> Choice:
    return choose(MODEL, prices=prices, method="lora", **ASKED, **asked)


# ------------------------------------------------------------------------------------ all of them, ranked


def test_every_method_on_every_gpu_with_an_offer(every: Choice) -> None:
    tried = {(each.method, each.gpu.name, each.num_gpus) for each in every.tried}
    lots = (("t4", 1), ("rtx-4090", 1), ("h100", 1), ("h100", 8))
    assert tried == {(method, *lot) for method in ("qlora", "lora", "full") for lot in lots}
    assert len(every.ways) == 3 * (6 + 1)  # six offers for one GPU, one of them for eight as well
    assert every.within == every.ways


def test_the_cheapest_first(every: Choice) -> None:
    dollars = [way.cost.usd for way in every.ways]
    assert dollars == sorted(dollars)
    assert every.cheapest is every.ways[0]
    assert named(every.cheapest)[1:] == ("t4", "free", "free")
    assert every.fastest
    assert every.fastest.cost.hours == min(way.cost.hours for way in every.ways)
    assert every.fastest.cost.num_gpus == 8


def test_several_gpus_share_what_one_holds_and_shard_what_it_does_not(every: Choice, prices: Path) -> None:
    options = [each.trial.options for each in every.tried if each.num_gpus == 8]
    assert {each.parallel for each in options if each} == {"ddp"}
    large = choose("llama-3.1-70b", method="lora", gpu="h100", prices=prices)
    one, eight = large.tried
    assert not one.trial.survives
    assert eight.trial.options
    assert (eight.trial.options.parallel, eight.trial.roomy) == ("fsdp", True)
    assert "8 x h100" in words(large)
    asked = choose(MODEL, method="lora", gpu="h100", num_gpus=2, prices=prices)
    assert [each.num_gpus for each in asked.tried] == [2]
    hosts = choose(MODEL, method="lora", gpu="h100", num_gpus=16, prices=prices)
    assert [(way.cost.offer.gpu_count, way.cost.instances) for way in hosts.ways] == [(8, 2)]


def test_each_way_is_the_plans_own(every: Choice, prices: Path) -> None:
    for way in (every.cheapest, every.fastest):
        assert way
        method, gpu, _, _ = named(way)
        several = {"num_gpus": 8, "parallel": "ddp"} if way.cost.num_gpus == 8 else {}
        made = plan(MODEL, method=method, gpu=gpu, **ASKED, **several)
        assert made.fit == way.tried.trial.fit
        assert made.time
        assert way.cost.hours == pytest.approx(cost.work(made.options).steps * made.time.step_s / 3600)
        assert way.cost.hours_low <= way.cost.hours <= way.cost.hours_high
        assert way.cost.usd == pytest.approx(way.cost.hours * way.cost.offer.usd_per_hour)
        more = " --num-gpus 8 --parallel ddp" if several else ""
        line = f"vramplan llama --method {method} --batch-size 8{more} --examples 200000 --gpu {gpu} --prices {prices}"
        assert way.tried.command == line


def test_cards_without_bf16_are_planned_in_fp16(every: Choice) -> None:
    options = {each.gpu.name: each.trial.options for each in every.tried if each.method == "lora"}
    assert options["t4"]
    assert options["h100"]
    assert (options["t4"].mixed_precision, options["h100"].mixed_precision) == ("fp16", "bf16")
    page = words(every)
    assert "without bf16, and so planned in fp16: t4" in page


def test_the_same_events_are_replayed_once(prices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.planner import memory

    estimate, played = memory.estimate, []

    def counted(*args: Any, **more: Any) -> Any:
        played.append(args)
        return estimate(*args, **more)

    monkeypatch.setattr(memory, "estimate", counted)
    rows = "".join(f"here,{gpu},1,1,no,,2026-11-20\n" for gpu in ("h100", "h200", "gh200", "rtx-4090"))
    file = prices.with_name("alike.csv")
    file.write_text(HEAD + rows)
    found = choose(MODEL, prices=file, method="lora")
    assert len(found.tried) == 4
    answered = len(played)
    assert answered == 2  # with cuDNN's attention and large workspaces, and without
    for each in found.tried:
        assert each.trial.fit == plan(MODEL, method="lora", gpu=each.gpu).fit


# ------------------------------------------------------------------------------------ what is in a list


def test_what_another_beats_is_left_out(every: Choice) -> None:
    best = unbeaten(every.ways)
    lora = [named(way)[1:] for way in best if way.tried.method == "lora" and way.cost.num_gpus == 1]
    # dear's 4090 and the instance of eight with seven idle are beaten; spot does not beat what is firmer
    assert lora == [
        ("t4", "free", "free"),
        ("rtx-4090", "near", "spot"),
        ("rtx-4090", "near", "on demand"),
        ("h100", "far", "on demand"),
    ]
    for way in every.ways:
        rivals = [other for other in best if other.tried.method == way.tried.method]
        assert any(other.cost.usd <= way.cost.usd and other.cost.hours <= way.cost.hours for other in rivals)


def test_a_shortlist_has_each_methods_cheapest_and_fastest(every: Choice) -> None:
    short = every.shortlist
    assert len(short) <= 12
    assert list(short) == [way for way in every.ways if any(way is one for one in short)]
    for method in ("qlora", "lora", "full"):
        own = [way for way in every.ways if way.tried.method == method]
        assert own[0] in short
        assert min(way.cost.hours for way in own) == min(way.cost.hours for way in short if way.tried.method == method)


# ------------------------------------------------------------------------------------ budget and deadline


def test_budget_and_deadline_are_kept(every: Choice, prices: Path) -> None:
    by_usd, by_hours = sorted(way.cost.usd for way in every.ways), sorted(way.cost.hours for way in every.ways)
    budget, deadline = by_usd[9], by_hours[9]
    found = choose(MODEL, prices=prices, **ASKED, budget=f"{budget:.6f}", deadline=f"{deadline * 3600:.0f}s")
    assert 0 < len(found.within) < len(every.ways)
    for way in found.ways:
        inside = way.cost.usd <= found.budget_usd and 3600 * way.cost.hours <= found.deadline_s  # type: ignore[operator]
        assert (way in found.within) == inside
        assert not found.certain(way) or way in found.within


def test_the_slow_end_may_be_beyond(prices: Path) -> None:
    way = alone(prices, gpu="rtx-4090").cheapest
    assert way
    between = 3600 * (way.cost.hours + way.cost.hours_high) / 2
    found = alone(prices, gpu="rtx-4090", deadline=f"{between:.0f}s")
    assert found.cheapest
    assert not found.certain(found.cheapest)
    assert "beyond if slow" in words(found)


def test_nothing_within_says_what_is_closest(prices: Path, run: Any) -> None:
    every = alone(prices)
    fastest = min(way.cost.hours for way in every.ways)
    found = alone(prices, budget="0.01", deadline=f"{3600 * fastest / 2:.0f}s")
    assert (found.within, found.cheapest, found.fastest) == ((), None, None)
    worst = {
        id(way): max(way.cost.usd / 0.01, 3600 * way.cost.hours / found.deadline_s)  # type: ignore[operator]
        for way in found.ways
    }
    assert found.closest
    assert worst[id(found.closest)] == min(worst.values())
    assert found.ways[0] in found.shortlist
    page = words(found)
    assert "none of 7 ways is within $0.01 and" in page
    assert "closest lora on" in page
    assert " h beyond the deadline" in page
    code, out, err = run("choose ./config.json --prices my-prices.csv --deadline 1s --json")
    assert (code, err) == (1, "")
    answer = json.loads(out)
    assert answer["cheapest"] is answer["fastest"] is None
    assert answer["ways"][answer["closest"]]["within"] is False


def test_a_budget_of_nothing_is_for_what_is_free(prices: Path) -> None:
    found = alone(prices, budget="0")
    assert {way.cost.offer.provider for way in found.within} == {"free"}
    none = alone(prices, budget="0", gpu="h100")
    assert none.closest is none.ways[0]
    assert " above the budget" in words(none)


def test_no_gpu_holds_it(prices: Path, run: Any) -> None:
    found = choose("llama-3.1-405b", prices=prices, method="full")
    assert (found.ways, found.closest, found.shortlist) == ((), None, ())
    page = words(found)
    assert "no GPU with an offer holds it" in page
    assert "h100 comes closest, " in page
    assert run("choose llama-3.1-405b --method full --prices my-prices.csv")[0] == 1


def test_what_a_card_lacks_is_left_out(prices: Path) -> None:
    found = alone(prices, attention="flash_attention_2")
    assert {way.cost.offer.gpu for way in found.ways} == {"rtx-4090", "h100"}
    assert "lack flash_attention_2: t4" in words(found)


def test_a_method_that_cannot_be_is_said(prices: Path) -> None:
    both = {"weights_dtype": "fp16", "mixed_precision": "fp16"}
    found, one = choose(MODEL, prices=prices, gpu="h100", **both), both | {"gpu": "rtx-4090"}
    assert {way.tried.method for way in found.ways if way.tried.num_gpus == 1} == {"qlora", "lora"}
    assert {way.tried.num_gpus for way in found.ways if way.tried.method == "full"} == {8}  # fsdp's are float32
    assert "full: mixed_precision fp16 cannot train fp16 weights" in words(choose(MODEL, prices=prices, **one))


def test_what_ddp_does_not_hold_is_tried_by_fsdp() -> None:
    found = choose("qwen2.5-3b", method="full", batch_size=4, gpu="l40s")
    ways = {
        (each.num_gpus, each.trial.options.parallel): each.trial.survives for each in found.tried if each.trial.options
    }
    assert (ways[1, "none"], ways[4, "ddp"], ways[4, "fsdp"]) == (True, False, True)


def test_numbers_as_the_command_line_has_them(prices: Path) -> None:
    assert choose(MODEL, prices=prices, gpu="h100", num_gpus="8.0").ways[0].tried.num_gpus == 8


def test_nccls_buffers_are_those_of_the_number_of_gpus() -> None:
    for each in choose("qwen2.5-0.5b", method="lora", gpu="h100").tried:
        sharing = {"num_gpus": each.num_gpus, "parallel": "ddp"} if each.num_gpus > 1 else {}
        alone = plan("qwen2.5-0.5b", method="lora", gpu="h100", **sharing).fit
        assert each.trial.fit
        assert alone
        assert each.trial.fit.needed_bytes == alone.needed_bytes


def test_several_instances_cost_several_at_the_slow_end_too(prices: Path) -> None:
    found = choose(MODEL, prices=prices, method="lora", gpu="h100", num_gpus=16, parallel="ddp")
    (way,) = found.ways
    assert way.cost.instances == 2
    assert way.cost.usd == pytest.approx(way.cost.hours * 48)
    assert way.slow_usd == pytest.approx(way.cost.hours_high * 48)
    assert "16 x h100: the step's time assumes hosts of 8 GPUs and a network of 3,200 Gb/s" in words(found)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"parallel": "zero2", "cpu_offload": True, "num_gpus": 8, "gpu": "h100"}, "no time of a step is known"),
        ({"num_gpus": 8, "gpu": "rtx-4090"}, "no known offer has 8 GPUs in one host"),
    ],
)
def test_why_what_holds_it_has_no_price(asked: dict[str, Any], why: str, prices: Path) -> None:
    found = choose(MODEL, prices=prices, method="full", **asked)
    assert found.ways == ()
    assert why in words(found)
    alone = plan(MODEL, method="full", prices=prices, **asked)
    assert alone.costs()[0] == ()
    assert why.split(" GPUs")[0].split(" of a step")[0] in alone.unpriced()


# ------------------------------------------------------------------------------------ wrong questions


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budget": "50eur"}, "'50eur' is no sum of dollars; write one such as 50usd (--budget)"),
        ({"budget": "-1"}, "(--budget)"),
        ({"deadline": "8"}, "'8' is no length of time; write one such as 8h, 90min or 2d (--deadline)"),
        ({"gpu": "a100-80gb"}, "no offer has a100-80gb; offers are known of h100, rtx-4090, t4 (--gpu, --prices)"),
        ({"gpu": "24GiB"}, "no offer has 24GiB"),
        ({"gpu": "h100,h20"}, "unknown GPU 'h20'"),
        ({"offers": ["moon"]}, "unknown offer 'moon'"),
        ({"method": "full", "rank": 8}, "rank 8 belongs to lora and qlora"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_wrong_questions(asked: dict[str, Any], words: str, prices: Path) -> None:
    with pytest.raises(UsageError) as error:
        choose(MODEL, prices=prices, **asked)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("near,rtx-4090,1,-3,no,,2026-11-20", "line 2, column usd_per_hour: '-3' is not a number of dollars from 0"),
        ("near,rtx-9090,1,3,no,,2026-11-20", "line 2, column gpu: unknown GPU 'rtx-9090'"),
        ("near,rtx-4090,1,3,no,,tomorrow", "line 2, column date"),
        ("near,rtx-4090,1,3", "line 2: 4 values for 7 columns"),
    ],
)
def test_wrong_prices_are_named_by_line_and_column(row: str, words: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text(f"{HEAD}{row}\n")
    code, out, err = run("choose ./config.json --prices wrong.csv")
    assert (code, out) == (2, "")
    assert words in err
    (tmp_path / "wrong.csv").write_text(f"vendor,price\n{row}\n")
    assert "line 1: 'vendor'" in run("choose ./config.json --prices wrong.csv")[2]


# ------------------------------------------------------------------------------------ as it is shown


def test_the_page(every: Choice) -> None:
    lines = list(plain(choice_page(every)))
    assert all(len(line) <= 80 for line in lines)
    page = "\n".join(lines)
    assert "cheapest  " in page
    assert "fastest   " in page
    for way in every.shortlist:
        assert " ".join(way.tried.command.split()) in " ".join(page.replace("\\\n", "").split())
    sessions = every.ways[0].cost.sessions
    assert sessions > 1
    assert f"{sessions} sessions of 1 h" in " ".join(page.split())
    assert "more are left out" in page
    whole = "\n".join(plain(choice_page(every, everything=True)))
    assert "more are left out" not in whole
    assert whole.count("near") == 6


def test_the_command_line(run: Any) -> None:
    line = "choose ./config.json --prices my-prices.csv --budget '$50' --deadline 2d --method lora --gpu rtx-4090,h100"
    code, out, err = run(f"{line} --json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert (answer["budget_usd"], answer["deadline_s"]) == (50, 172_800)
    assert {way["gpu"] for way in answer["ways"]} == {"rtx-4090", "h100"}
    best = answer["ways"][answer["cheapest"]]
    assert best["within"]
    assert best["kwh"] > 0
    again = json.loads(run(f"{best['command'].removeprefix('vramplan ')} --json")[1])
    assert again["gpu"]["headroom_bytes"] == best["headroom_bytes"]
    code, out, _ = run(line)
    assert code == 0
    assert "within $50 and 48 h" in out
    only = json.loads(run("choose ./config.json --prices my-prices.csv --offers 'spot rtx' --json")[1])
    assert {(way["provider"], way["spot"]) for way in only["ways"]} == {("near", True)}
