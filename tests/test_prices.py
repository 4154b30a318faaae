"""The bundled prices row by row, files of the user's, and a refresh through a catalogue made up here."""

from __future__ import annotations

import datetime
import json
import math
import re
import sys
import threading
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner import catalog, prices
from vramplan.planner.errors import Failure, UsageError
from vramplan.planner.prices import Offer

if TYPE_CHECKING:
    from pathlib import Path

BUNDLED = prices.bundled()
TODAY = datetime.date(2026, 11, 20)
OFFER = Offer("here", "any", "box", "h100", 8, 20.0, False, None, "2026-11-20", "")


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "prices.csv"


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_file_is_lines_of_ascii() -> None:
    raw = prices._TABLE.read_bytes()
    assert raw.isascii()
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    assert b"\n\n" not in raw
    assert raw.splitlines()[0].decode() == ",".join(prices._COLUMNS)


def test_no_price_stands_there_twice() -> None:
    keys = [(o.provider, o.region, o.instance, o.gpu, o.gpu_count, o.spot) for o in BUNDLED]
    assert len(keys) == len(set(keys)) > 130


@pytest.mark.parametrize("offer", BUNDLED, ids=lambda o: f"{o.provider}-{o.instance}-{o.kind}")
def test_bundled_row(offer: Offer) -> None:
    assert catalog.gpu(offer.gpu).name == offer.gpu
    assert offer.gpu_count in (1, 2, 4, 8)
    assert datetime.date(2026, 5, 1) <= prices._day(offer.date) <= TODAY
    assert offer.source
    assert offer.region
    assert offer.instance
    if offer.kind == "free":
        assert offer.session_limit_s == 12 * 3600
        assert offer.provider in ("colab", "kaggle")
    else:
        # of all offers, an hour of one GPU costs from 14 cents (a 3060) to 15 dollars
        assert 0.14 <= offer.usd_per_hour / offer.gpu_count < 15
        assert offer.session_limit_s is None
    # a number of GPUs in the instance's name is the instance's
    named = re.match(r"(\d)x ", offer.instance)
    assert not named or int(named[1]) == offer.gpu_count


def test_spot_is_cheaper_and_more_gpus_cost_more() -> None:
    by_kind = {(o.provider, o.region, o.instance, o.spot): o for o in BUNDLED}
    pairs = [(o, by_kind.get((o.provider, o.region, o.instance, False))) for o in BUNDLED if o.spot]
    assert sum(demand is not None for _, demand in pairs) > 15
    assert all(demand is None or 0.1 < spot.usd_per_hour / demand.usd_per_hour < 1 for spot, demand in pairs)


def test_every_provider_that_people_name_is_there() -> None:
    providers = {offer.provider for offer in BUNDLED}
    assert providers >= {"aws", "gcp", "azure", "oci", "lambda", "runpod", "coreweave", "colab", "kaggle"}
    assert len({offer.gpu for offer in BUNDLED}) > 25


# ------------------------------------------------------------------------------------------------------------ one price


def test_age_and_staleness() -> None:
    assert replace(OFFER, date="2026-11-19").age_days(TODAY) == 1
    assert replace(OFFER, date="2026-10").age_days(TODAY) == 50
    assert replace(OFFER, date="2026-11-21").age_days(TODAY) == -1
    fresh, old = replace(OFFER, date="2026-09-21"), replace(OFFER, date="2026-09-20")
    assert (fresh.age_days(TODAY), old.age_days(TODAY)) == (60, 61)
    assert prices.stale([], TODAY) is None
    assert prices.stale([fresh], TODAY) is None
    assert prices.stale([old], TODAY) == (
        "the price is more than 60 days old, of 2026-09-20; `vramplan prices refresh` fetches newer ones"
    )
    older = replace(OFFER, date="2026-08")
    assert str(prices.stale([fresh, old, older], TODAY)).startswith(
        "2 of 3 prices are more than 60 days old, the oldest of 2026-08; "
    )


def test_words_find_the_start_of_a_name() -> None:
    here = replace(OFFER, provider="Lambda", region="us-east4", instance="1x T4, from", gpu="gh200")
    free, spot = replace(here, usd_per_hour=0.0), replace(here, spot=True)
    for word in ("lambda", "LAMB", "us-east4", "east", "t4", "gh2", "from", "on demand"):
        assert prices.matching([here], [word]) == [here]
    assert prices.matching([here, free, spot], ["free"]) == [free]
    assert prices.matching([here, free, spot], ["spot", "gh200"]) == [spot]
    for word in ("h200", "ast4", "a.bda", "spot", "(", "4,x"):
        with pytest.raises(UsageError, match=r"unknown offer .*\(FILTER\)"):
            prices.matching([here], [word])


# ------------------------------------------------------------------------------------------------- files of the user's

HEAD = "provider,gpu,gpu_count,usd_per_hour,date\n"
ROW = "here,h100,8,20,2026-11-20\n"


def written(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "mine.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_a_short_file(tmp_path: Path) -> None:
    file = written(tmp_path, HEAD + ROW)
    assert prices.offers(file) == ((replace(OFFER, instance=""),), ())


def test_a_file_as_spreadsheets_write_it(tmp_path: Path) -> None:
    text = (
        "\ufeffdate, gpu ,provider,usd_per_hour,gpu_count,spot,region,session_limit_s,instance,source\r\n"
        '2026-11,RTX 4090,"Smith, Sons",0.25,1,YES,eu,3600,"1x ""big""",a page\r\n\r\n'
    )
    expected = Offer("Smith, Sons", "eu", '1x "big"', "rtx-4090", 1, 0.25, True, 3600, "2026-11", "a page")
    assert prices.read(written(tmp_path, text)) == (expected,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["line 1", "no column provider", "gpu_count, usd_per_hour, date"]),
        (HEAD, ["holds no price"]),
        (HEAD.replace("gpu_count", "gpus"), ["line 1", "'gpus'", "did you mean gpu"]),
        (HEAD.replace(",date", ""), ["line 1", "no column date"]),
        (HEAD.replace("provider", "date"), ["line 1", "column date", "twice"]),
        (HEAD.replace(",", ";") + ROW, ["line 1", "unknown column"]),
        (HEAD + ROW + "here,h100,8,-20,2026-11-20", ["line 3", "column usd_per_hour", "'-20'", "dollars from 0"]),
        (HEAD + "here,h100,8,nan,2026-11-20", ["line 2", "column usd_per_hour", "'nan'"]),
        (HEAD + "here,h100,8,$3,2026-11-20", ["line 2", "column usd_per_hour", "'$3'"]),
        (HEAD + "here,h100,8,1e9,2026-11-20", ["line 2", "column usd_per_hour"]),
        (HEAD + "here,h100,8,,2026-11-20", ["line 2", "column usd_per_hour", "''"]),
        (HEAD + "here,h100,0,3,2026-11-20", ["line 2", "column gpu_count", "'0'"]),
        (HEAD + "here,h100,1.5,3,2026-11-20", ["line 2", "column gpu_count", "'1.5'"]),
        (HEAD + "here,h10,8,3,2026-11-20", ["line 2", "column gpu", "unknown GPU 'h10'; did you mean"]),
        (HEAD + "here,a100,8,3,2026-11-20", ["line 2", "column gpu", "40 GB or 80 GB", "a100-80gb"]),
        (HEAD + "here,24GiB,8,3,2026-11-20", ["line 2", "column gpu", "unknown GPU '24GiB'"]),
        (HEAD + ",h100,8,3,2026-11-20", ["line 2", "column provider"]),
        (HEAD + "a\x1b[1m,h100,8,3,2026-11-20", ["line 2", "column provider"]),
        (HEAD + "here,h100,8,3,20.11.2026", ["line 2", "column date", "'20.11.2026'", "2026-11-20"]),
        (HEAD + "here,h100,8,3,2026-02-30", ["line 2", "column date"]),
        (HEAD + "here,h100,8,3,2026-13", ["line 2", "column date"]),
        (HEAD + "here,h100,8,3", ["line 2", "4 values for 5 columns"]),
        (HEAD + "here,h100,8,3,2026-11-20,x", ["line 2", "6 values for 5 columns"]),
        (HEAD + '"here,h100,8,3,2026-11-20', ["line 2", "no CSV"]),
        (HEAD + '"he"re,h100,8,3,2026-11-20', ["line 2", "no CSV"]),
        ("x" * 200_000, ["no CSV"]),
        ("spot," + HEAD + "maybe," + ROW, ["line 2", "column spot", "'maybe'", "yes or no"]),
        ("session_limit_s," + HEAD + "-1," + ROW, ["line 2", "column session_limit_s"]),
        ("region," + HEAD + "x" * 201 + "," + ROW, ["line 2", "column region"]),
        (b"\xff\xfe" + HEAD.encode(), ["not UTF-8"]),
        (b"#" * (4 * 2**20 + 1), ["larger than 4 MiB"]),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str | bytes, words: list[str], tmp_path: Path, run: Any) -> None:
    code, out, err = run(f"prices --prices {written(tmp_path, text)}")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.endswith("(--prices)\n")
    assert all(word in err for word in words), err


def test_what_is_no_file(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none.csv", "/dev/zero", "x" * 5000):
        with pytest.raises(UsageError, match=r"\(--prices\)$"):
            prices.offers(str(file))


# ------------------------------------------------------------------------------------------------------------ the cache


def test_fetched_prices_go_before_the_tables(cache_file: Path) -> None:
    assert prices.offers() == (BUNDLED, ())
    cache_file.write_text(HEAD + "runpod,rtx-4090,1,0.3,2026-11-20\nvast,t4,1,0.1,2026-11-20\n")
    found, warnings = prices.offers()
    assert warnings == ()
    assert found[:2] == prices.read(cache_file)
    gone = {o for o in BUNDLED if (o.provider, o.gpu) == ("runpod", "rtx-4090")}
    assert len(gone) == 2
    assert set(found[2:]) == set(BUNDLED) - gone


def test_a_broken_cache_is_passed_over(cache_file: Path, run: Any) -> None:
    cache_file.write_text(HEAD + "runpod,rtx-4090,1,free,2026-11-20\n")
    found, (warning,) = prices.offers()
    assert found == BUNDLED
    assert "line 2, column usd_per_hour" in warning
    assert "--prices" not in warning
    code, out, _ = run("prices rtx-4090")
    assert code == 0
    assert "the fetched prices are not used" in " ".join(out.split())


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv("VRAMPLAN_DATA_DIR")
    assert prices.cached() == platformdirs.user_cache_path("vramplan", appauthor=False) / "prices.csv"


# -------------------------------------------------------------------------------------------------------------- refresh


@dataclass
class Item:
    """gpuhunt.CatalogItem, as far as it is read (gpuhunt 0.1.34)."""

    instance_name: str
    gpu_name: str | None = "H100"
    gpu_memory: float | None = 80.0
    gpu_count: int = 8
    price: float = 50.0
    spot: bool = False
    location: str = "us-east-1"


class Market:
    """gpuhunt.Catalog: what each provider answers; unknown ones answer nothing, as those that did not load."""

    def __init__(self, answers: dict[str, Any], asked_itself: tuple[str, ...] = ()) -> None:
        self.answers = answers
        self.providers = [types.SimpleNamespace(NAME=name) for name in asked_itself]

    def query(self, *, provider: str, min_gpu_count: int) -> list[Item]:
        assert min_gpu_count == 1
        answer = self.answers.get(provider, [])
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


@pytest.fixture
def market(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(answers: dict[str, Any], *asked_itself: str) -> None:
        fake: Any = types.ModuleType("gpuhunt")
        fake.default_catalog = lambda: Market(answers, asked_itself)
        monkeypatch.setitem(sys.modules, "gpuhunt", fake)

    return install


def test_a_refresh_keeps_the_cheapest(market: Any, cache_file: Path) -> None:
    market(
        {
            "aws": [
                Item("p5.48xlarge", price=55.04),
                Item("p5.48xlarge", price=50.0, location="eu-north-1"),
                Item("p5.48xlarge", price=17.5, spot=True),
                Item("p5.4xlarge", price=6.88, gpu_count=1),
                Item("t3.small", gpu_name=None, gpu_memory=None, gpu_count=0, price=0.02),
            ],
            "vastai": [Item("4711", "RTX4090", 24.0, 1, 0.3000004, location="US")],
        },
        "vastai",
    )
    done = prices.refresh()
    today = datetime.date.today().isoformat()

    def aws(count: int, usd: float, spot: bool = False, region: str = "us-east-1") -> Offer:
        instance = "p5.4xlarge" if count == 1 else "p5.48xlarge"
        return Offer("aws", region, instance, "h100", count, usd, spot, None, today, "gpuhunt")

    assert done.fetched == (
        aws(1, 6.88),
        aws(8, 50.0, region="eu-north-1"),
        aws(8, 17.5, spot=True),
        Offer("vast", "US", "4711", "rtx-4090", 1, 0.3, False, None, today, "gpuhunt"),
    )
    assert done.file == cache_file
    assert prices.read(cache_file) == done.fetched
    assert list(cache_file.parent.iterdir()) == [cache_file]
    assert set(done.silent) == {"azure", "cloudrift", "gcp", "lambda", "nebius", "oci", "runpod", "verda"}
    assert set(done.partial) == {"aws"}  # nothing bundled is vast's
    assert done.partial["aws"] == ("a100-40gb", "a100-80gb", "a10g", "l4", "l40s", "t4", "v100-16gb")
    found, _ = prices.offers()
    assert {o.instance for o in found if (o.provider, o.gpu) == ("aws", "t4")} == {"g4dn.xlarge"}


def test_a_partial_answer_loses_nothing(market: Any, run: Any) -> None:
    both = [Item("p5.48xlarge"), Item("g6.xlarge", "L4", 24.0, 1, 0.8)]
    market({"aws": both, "gcp": [Item("a3-highgpu-8g")]})
    prices.refresh()
    market({"aws": [Item("p5.48xlarge", price=40.0)], "gcp": OSError("connection reset by peer"), "azure": ["no item"]})
    done = prices.refresh()
    assert done.silent["gcp"] == "connection reset by peer"
    kept = {(o.provider, o.gpu, o.usd_per_hour) for o in prices.read(done.file)}
    assert kept == {("aws", "h100", 40.0), ("aws", "l4", 0.8), ("gcp", "h100", 50.0)}
    assert "l4" in done.partial["aws"]
    code, out, err = run("prices refresh")
    assert (code, err) == (0, "")
    assert "prices fetched: 1 of aws, kept in" in out
    assert "gcp: connection reset by peer" in out
    code, out, _ = run("prices refresh --json")
    assert json.loads(out)["silent"]["gcp"] == "connection reset by peer"
    assert [row["gpu"] for row in json.loads(out)["fetched"]] == ["h100"]


def test_nobody_answers(market: Any, cache_file: Path, run: Any) -> None:
    cache_file.write_text(HEAD + ROW)
    market({})
    code, out, err = run("prices refresh")
    assert (code, out) == (1, "")
    assert err.startswith("vramplan: no provider answered: aws: no price of a known GPU; ")
    assert cache_file.read_text() == HEAD + ROW


def test_a_provider_that_hangs_is_not_waited_for(market: Any) -> None:
    released = threading.Event()
    market({"aws": [Item("p5.48xlarge")], "gcp": lambda: released.wait(30) and []})
    done = prices.refresh(within_s=1.0)
    released.set()
    assert [offer.provider for offer in done.fetched] == ["aws"]
    assert done.silent["gcp"] == "no answer in time"


def test_no_catalogue_comes(monkeypatch: pytest.MonkeyPatch, cache_file: Path) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to load catalogs of all providers")

    fake: Any = types.ModuleType("gpuhunt")
    fake.default_catalog = fail
    monkeypatch.setitem(sys.modules, "gpuhunt", fake)
    with pytest.raises(Failure, match="did not come: Failed to load catalogs of all providers"):
        prices.refresh()
    released = threading.Event()
    fake.default_catalog = lambda: released.wait(30)
    with pytest.raises(Failure, match="no answer in time"):
        prices.refresh(within_s=0.1)
    released.set()
    assert not cache_file.exists()


def test_without_gpuhunt(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    code, _, err = run("prices refresh")
    assert (code, err) == (1, "vramplan: gpuhunt is not installed; pip install 'vramplan[prices]' brings it\n")


def test_a_full_disk_leaves_the_earlier_prices(market: Any, cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file.write_text(HEAD + ROW)
    market({"aws": [Item("p5.48xlarge")]})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prices.refresh()
    assert cache_file.read_text() == HEAD + ROW
    assert list(cache_file.parent.iterdir()) == [cache_file]


def test_strange_items_are_passed_over(market: Any) -> None:
    market(
        {
            "aws": [
                Item("fine"),
                Item("free", price=0.0),
                Item("broken", price=math.nan),
                Item("endless", price=math.inf),
                Item("none", gpu_count=0),
                Item("red\x1b[31m", price=1.0),
                Item("long" * 100, price=1.0),
                Item("unknown", gpu_name="H9000", price=1.0),
                Item("other size", gpu_memory=20.0, price=1.0),
            ]
        }
    )
    assert [offer.instance for offer in prices.refresh().fetched] == ["fine"]


@pytest.mark.parametrize(
    ("name", "memory", "instance", "gpu"),
    [
        ("A100", 40.0, "p4d.24xlarge", "a100-40gb"),
        ("A100", 80.0, "a2-ultragpu-1g", "a100-80gb"),
        ("A100", 80.0, "Standard_NC24ads_A100_v4", "a100-pcie-80gb"),
        ("A100", 40.0, "Standard_ND96asr_v4", "a100-40gb"),
        ("A100", 80.0, "NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100", 80.0, "NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("A100", 40.0, "gpu_1x_a100", "a100-pcie-40gb"),
        ("H100", 80.0, "NVIDIA H100 80GB HBM3", "h100"),
        ("H100", 80.0, "1H100.80S.32V", "h100"),
        ("H100", 80.0, "gpu_1x_h100_pcie", "h100-pcie"),
        ("H100NVL", 94.0, "Standard_NC40ads_H100_v5", "h100-nvl"),
        ("H200", 141.0, "p5en.48xlarge", "h200"),
        ("V100", 16.0, "p3.2xlarge", "v100-16gb"),
        ("V100", 16.0, "Standard_NC6s_v3", "v100-pcie-16gb"),
        ("V100", 32.0, "p3dn.24xlarge", "v100-32gb"),
        ("T4", 16.0, "g4dn.xlarge", "t4"),
        ("A10G", 24.0, "g5.xlarge", "a10g"),
        ("L40S", 48.0, "g6e.xlarge", "l40s"),
        ("B200", 180.0, "p6-b200.48xlarge", "b200"),
        ("B300", 270.0, "p6-b300.48xlarge", "b300"),
        ("A6000", 48.0, "gpu_1x_a6000", "rtx-a6000"),
        ("RTX6000Ada", 48.0, "1RTX6000ADA.10V", "rtx-6000-ada"),
        ("RTXPRO6000", 96.0, "1RTXPRO6000.30V", "rtx-pro-6000"),
        ("RTX4090", 24.0, "123", "rtx-4090"),
        ("RTX4060Ti", 16.0, "123", "rtx-4060-ti-16gb"),
        ("RTX4060Ti", 8.0, "123", "rtx-4060-ti-8gb"),
        ("RTX3060", 12.0, "123", "rtx-3060"),
        ("RTX3060", 8.0, "123", None),
        ("RTX6000", 24.0, "1x Quadro", None),
        ("MI300X", 192.0, "gpu-mi300x1-192gb", "mi300x"),
        ("Gaudi3", 128.0, "x", None),
    ],
)
def test_gpuhunts_names_lead_to_cards(name: str, memory: float, instance: str, gpu: str | None) -> None:
    assert prices._gpu_of(Item(instance, name, memory)) == gpu


def test_gpuhunt_has_what_is_asked_of_it() -> None:
    gpuhunt = pytest.importorskip("gpuhunt")
    item = gpuhunt.CatalogItem(
        provider="aws", instance_name="p5.48xlarge", location="us", price=1.0, cpu=1, memory=1.0, gpu_count=8,
        gpu_name="H100", gpu_memory=80.0, spot=False, disk_size=None, gpu_vendor=gpuhunt.AcceleratorVendor.NVIDIA,
    )  # fmt: skip
    assert prices._cheapest("aws", [item])[0].gpu == "h100"
    empty = gpuhunt.Catalog(auto_reload=False)
    for name in prices._PUBLISHED:  # raises ValueError for a provider that it does not know
        assert empty.query(provider=name, min_gpu_count=1) == []
    assert empty.providers == []
    assert callable(gpuhunt.default_catalog)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_list_is_dated_and_in_order(run: Any) -> None:
    code, out, err = run("prices h100")
    assert (code, err) == (0, "")
    rows = [line for line in out.split("\n\n")[0].splitlines()[1:] if line.startswith("h100")]
    assert all(re.search(r"2026-\d\d(-\d\d)?  ", row) for row in rows)
    per_gpu = [float(row.split()[2]) / int(row.split()[1]) for row in rows if row.startswith("h100 ")]
    assert len(per_gpu) > 10
    assert per_gpu == sorted(per_gpu)
    assert "days old" in out


def test_the_list_as_json(run: Any) -> None:
    code, out, _ = run("prices colab --json")
    assert code == 0
    (row,) = json.loads(out)
    assert row == {name: getattr(BUNDLED[-2], name) for name in prices._COLUMNS}
    assert (row["gpu"], row["usd_per_hour"], row["session_limit_s"]) == ("t4", 0.0, 43200)


def test_wrong_questions(run: Any, tmp_path: Path) -> None:
    code, _, err = run("prices h1000")
    assert code == 2
    assert "unknown offer 'h1000'; did you mean h100" in err
    code, _, err = run(f"prices refresh --prices {written(tmp_path, HEAD + ROW)}")
    assert code == 2
    assert "leave --prices out" in err
