"""What an hour of a GPU costs: the bundled table, what `vramplan prices refresh` fetched, or a file of the user's.

All three are CSV files with the columns of `Offer`, one price a row: an instance that is let on demand and as spot has
two. The bundled table (tables/prices.csv) holds prices with a day and a source only; statistics of a market, prices
whose date is an interval, and those at odds with what their provider announced were left out. Where a provider says
"from", its instance says so too.

`refresh` asks gpuhunt (the extra `prices`) and keeps the answer in the user's cache, VRAMPLAN_DATA_DIR's if that is
set. What it brings of a provider's GPU takes the place of earlier prices of it; the table itself is never changed.
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import re
import threading
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner import catalog
from vramplan.planner.errors import Failure, UsageError, shown, unknown
from vramplan.planner.files import read_text, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

STALE_DAYS = 60
_TABLE = Path(__file__).parent.parent / "tables" / "prices.csv"
_LARGEST = 4 * 2**20  # bytes of a file of prices; the bundled one has some 20,000
_OPTION = "--prices"
_FOLDER = "VRAMPLAN_DATA_DIR"  # the same as of calibrations


@dataclass(frozen=True, slots=True)
class Offer:
    """A price for an hour of a whole instance with `gpu_count` GPUs, all of them `gpu`, a name of tables/gpus.jsonl.

    `date` is the day it was read (year-month-day), or the month. `session_limit_s` is after how many seconds the
    provider ends a session, None where it does not.
    """

    provider: str
    region: str
    instance: str
    gpu: str
    gpu_count: int
    usd_per_hour: float
    spot: bool
    session_limit_s: int | None
    date: str
    source: str

    @property
    def kind(self) -> str:
        """Under which terms it is let: on demand, as spot, or for nothing."""
        return "spot" if self.spot else "on demand" if self.usd_per_hour else "free"

    def age_days(self, today: datetime.date) -> int:
        """Days since the price was read, from the first of a month that stands alone."""
        return (today - _day(self.date)).days


_COLUMNS = tuple(field.name for field in fields(Offer))
_DEFAULTS = {"region": "any", "instance": "", "spot": "no", "session_limit_s": "", "source": ""}


def offers(file: str | os.PathLike[str] | None = None) -> tuple[tuple[Offer, ...], tuple[str, ...]]:
    """All offers of `file`, else those fetched and the bundled ones of other providers and GPUs; and warnings.

    A refreshed file that cannot be read is passed over with a warning. Raises UsageError for a `file` that is wrong,
    naming line and column.
    """
    if file is not None:
        return read(file), ()
    fetched: tuple[Offer, ...] = ()
    warnings: tuple[str, ...] = ()
    if cached().exists():
        try:
            fetched = read(cached())
        except UsageError as error:
            why = str(error).removesuffix(f" ({_OPTION})")
            warnings = (f"the fetched prices are not used: {why}; `vramplan prices refresh` fetches them anew",)
    return (*fetched, *_besides(bundled(), fetched)), warnings


def _besides(earlier: Iterable[Offer], newer: Iterable[Offer]) -> list[Offer]:
    """The earlier offers of providers and GPUs that the newer ones leave out."""
    known = {(offer.provider, offer.gpu) for offer in newer}
    return [offer for offer in earlier if (offer.provider, offer.gpu) not in known]


@cache
def bundled() -> tuple[Offer, ...]:
    """The offers of tables/prices.csv."""
    return read(_TABLE)


def cached() -> Path:
    """Where `refresh` keeps what it fetched; it need not exist."""
    if named := os.environ.get(_FOLDER):
        return Path(named) / "prices.csv"
    import platformdirs

    return platformdirs.user_cache_path("vramplan", appauthor=False) / "prices.csv"


def stale(found: Iterable[Offer], today: datetime.date | None = None) -> str | None:
    """A warning where some of these prices are older than 60 days."""
    today = today or _today()
    dates = [(offer.age_days(today), offer.date) for offer in found]
    old = [each for each in dates if each[0] > STALE_DAYS]
    if not old:
        return None
    oldest = max(old)[1]
    many = f"{len(old)} of {len(dates)} prices are more than {STALE_DAYS} days old, the oldest of {oldest}"
    one = f"the price is more than {STALE_DAYS} days old, of {oldest}"
    return f"{many if len(dates) > 1 else one}; `vramplan prices refresh` fetches newer ones"


def _today() -> datetime.date:
    return datetime.date.today()


def matching(found: Iterable[Offer], words: Iterable[str]) -> list[Offer]:
    """The offers in which each word starts a part of a name, or is their kind: "h100" is no "gh100", "t4" no "east4".

    Raises UsageError where there are none.
    """
    asked, known = list(words), list(found)
    starts = [re.compile(rf"(?<![a-z0-9]){re.escape(word.lower())}") for word in asked]
    chosen = [offer for offer in known if all(start.search(_names(offer)) for start in starts)]
    if not chosen:
        raise unknown("offer", " ".join(asked), sorted({name for o in known for name in (o.gpu, o.provider)}), "FILTER")
    return chosen


def _names(offer: Offer) -> str:
    return "\n".join((offer.provider, offer.region, offer.instance, offer.gpu, offer.kind)).lower()


# ------------------------------------------------------------------------------------------------------- a file's rows


def read(file: str | os.PathLike[str]) -> tuple[Offer, ...]:
    """The offers of a CSV file whose first line names the columns, in any order.

    provider, gpu, gpu_count, usd_per_hour and date must be there; region, instance, spot (yes or no), session_limit_s
    and source may. Raises UsageError naming line and column for whatever else stands there.
    """
    text = read_text(file, "a CSV file of prices", _OPTION, _LARGEST, "utf-8-sig")
    where = shown(str(file))
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(rows, [])]
        _check_columns(columns, where)
        found = [_offer(columns, row, f"{where}, line {rows.line_num}") for row in rows if row]
    except csv.Error as error:
        raise UsageError(f"{where}, line {rows.line_num}: no CSV ({error}) ({_OPTION})") from None
    if not found:
        raise UsageError(f"{where} holds no price; add a line for each ({_OPTION})")
    return tuple(found)


def _check_columns(columns: list[str], where: str) -> None:
    for name in columns:
        if name not in _COLUMNS:
            raise unknown(f"column in {where}, line 1:", name, _COLUMNS, _OPTION)
        if columns.count(name) > 1:
            raise UsageError(f"{where}, line 1: the column {name} stands there twice ({_OPTION})")
    missing = [name for name in _COLUMNS if name not in columns and name not in _DEFAULTS]
    if missing:
        raise UsageError(f"{where}, line 1: no column {missing[0]}; a price needs {', '.join(missing)} ({_OPTION})")


def _offer(columns: list[str], row: list[str], where: str) -> Offer:
    if len(row) != len(columns):
        raise UsageError(f"{where}: {len(row)} values for {len(columns)} columns ({_OPTION})")
    values: dict[str, Any] = {}
    for name, text in (_DEFAULTS | dict(zip(columns, map(str.strip, row), strict=True))).items():
        what, value = _VALUES[name]
        try:
            values[name] = value(text)
        except UsageError as error:
            raise UsageError(f"{where}, column {name}: {error} ({_OPTION})") from None
        except ValueError:
            raise UsageError(f"{where}, column {name}: {shown(text)} is not {what} ({_OPTION})") from None
    return Offer(**values)


def _text(text: str) -> str:
    if len(text) > 200 or not text.isprintable():
        raise ValueError
    return text


def _name(text: str) -> str:
    if not text:
        raise ValueError
    return _text(text)


@cache
def _gpu(text: str) -> str:
    try:
        card = catalog.gpu(text)
    except UsageError as error:
        raise UsageError(str(error).removesuffix(" (--gpu)")) from None
    if card not in catalog.gpus():  # a size, which nobody lets
        raise unknown("GPU", text, (card.name for card in catalog.gpus()))
    return card.name


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) == 0:
        raise ValueError
    return int(text)


def _limit(text: str) -> int | None:
    return _whole(text) if text else None


def _usd(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,12})?", text, re.ASCII):
        raise ValueError
    return float(text)


def _yes(text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise ValueError
    return text.lower() == "yes"


def _day(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text if len(text) == 10 else f"{text}-01")


def _date(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", text, re.ASCII):
        raise ValueError
    _day(text)
    return text


_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "provider": ("a name of up to 200 characters", _name),
    **dict.fromkeys(("region", "instance", "source"), ("a text of up to 200 characters", _text)),
    "gpu": ("a GPU's name", _gpu),
    "gpu_count": ("a whole number from 1", _whole),
    "usd_per_hour": ("a number of dollars from 0, such as 1.99", _usd),
    "spot": ("yes or no", _yes),
    "session_limit_s": ("a whole number of seconds from 1, or empty", _limit),
    "date": ("a day such as 2026-11-20, or a month such as 2026-11", _date),
}


# ------------------------------------------------------------------------------------------------------------- refresh

# What gpuhunt publishes without an account; providers that it asks itself come from its catalogue.
_PUBLISHED = ("aws", "azure", "cloudrift", "gcp", "lambdalabs", "nebius", "oci", "runpod", "verda")
_OWN_NAMES = {"lambdalabs": "lambda", "vastai": "vast"}  # of the bundled table
_READ_TIMEOUT_S = 20.0
# gpuhunt does not tell SXM cards from PCIe ones. These instances have SXM: AWS's P and Google's A families, OCI's
# bare metal, Azure's ND, Verda's; where nothing tells, the PCIe card, the slower of the two, is taken.
_SXM = re.compile(r"sxm|hbm3|^p[345]|^a[23]-|^bm\.gpu|\bnd\d|_nd\d|^\d[ahv]\d00\.", re.IGNORECASE)


class Refreshed(NamedTuple):
    """What a refresh brought: the file, the offers it fetched, and what is missing of what might have come.

    `silent` are the providers that gave none, with the reason; `partial` the GPUs of which a provider has given none
    this time. Their earlier prices stay.
    """

    file: Path
    fetched: tuple[Offer, ...]
    silent: dict[str, str]
    partial: dict[str, tuple[str, ...]]


def refresh(within_s: float = 120.0) -> Refreshed:
    """Asks gpuhunt for today's prices and keeps the cheapest of each provider, GPU, count and kind in the cache.

    Whatever does not come within `within_s` seconds, or wrongly, keeps its earlier prices. Raises Failure, with the
    cache as it was, where gpuhunt is not installed or no provider answers.
    """
    try:
        import gpuhunt
    except ImportError:
        raise Failure("gpuhunt is not installed; pip install 'vramplan[prices]' brings it") from None
    import logging
    import socket  # with logging a tenth of a plan's time, and only this command asks anybody

    logger = logging.getLogger("gpuhunt")  # what went wrong is told by `silent`, not by its tracebacks
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    until = time.monotonic() + within_s
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_READ_TIMEOUT_S)  # gpuhunt sets none of its own for its published catalogues
    try:
        market = _ask({"gpuhunt": gpuhunt.default_catalog}, until)["gpuhunt"]
        if isinstance(market, Exception):
            raise Failure(f"gpuhunt's catalogues did not come: {_why(market)}")
        names = dict.fromkeys([*_PUBLISHED, *(provider.NAME for provider in market.providers)])
        answers = _ask({_OWN_NAMES.get(name, name): _question(market, name) for name in names}, until)
    finally:
        socket.setdefaulttimeout(before)
    silent = {name: _why(answer) for name, answer in answers.items() if isinstance(answer, Exception)}
    found = {name: answer for name, answer in answers.items() if name not in silent}
    if not found:
        raise Failure(f"no provider answered: {'; '.join(f'{name}: {why}' for name, why in silent.items())}")
    fetched = tuple(offer for own in found.values() for offer in own)
    earlier_fetch = _fetched_before()
    partial: dict[str, tuple[str, ...]] = {}
    for own in found:
        earlier = (offer for offer in (*bundled(), *earlier_fetch) if offer.provider == own)
        if gone := tuple(sorted({offer.gpu for offer in _besides(earlier, fetched)})):
            partial[own] = gone
    write_text(cached(), _csv([*fetched, *_besides(earlier_fetch, fetched)]))
    return Refreshed(cached(), fetched, silent, partial)


def _question(market: Any, name: str) -> Callable[[], list[Offer]]:
    def ask() -> list[Offer]:
        cheapest = _cheapest(_OWN_NAMES.get(name, name), market.query(provider=name, min_gpu_count=1))
        if not cheapest:  # also what gpuhunt makes of a catalogue that did not come
            raise LookupError("no price of a known GPU")
        return cheapest

    return ask


def _ask(calls: Mapping[str, Callable[[], Any]], until: float) -> dict[str, Any]:
    """What each call returns, all asked at once, or the exception it ended with; TimeoutError after `until`."""
    answers: dict[str, Any] = {name: TimeoutError("no answer in time") for name in calls}

    def ask(name: str) -> None:
        try:
            answers[name] = calls[name]()
        except Exception as error:
            answers[name] = error

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(answers)  # a late answer must not change it any more


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 80 and text.isprintable() else type(error).__name__


def _cheapest(provider: str, items: Iterable[Any]) -> list[Offer]:
    """The cheapest of gpuhunt's items for each GPU, count and kind; whatever is no plain offer is passed over."""
    today = datetime.date.today().isoformat()
    best: dict[tuple[str, int, bool], Offer] = {}
    for item in items:
        gpu = _gpu_of(item)
        words = (str(item.location), str(item.instance_name))
        plain = all(word.isprintable() and len(word) <= 200 for word in words)
        if gpu is None or not plain or not 0 < item.price < 10**6 or not 0 < item.gpu_count < 10**9:
            continue
        price = round(float(item.price), 6)
        offer = Offer(provider, *words, gpu, int(item.gpu_count), price, bool(item.spot), None, today, "gpuhunt")
        key = (gpu, offer.gpu_count, offer.spot)
        if key not in best or price < best[key].usd_per_hour:
            best[key] = offer
    return [best[key] for key in sorted(best)]


def _gpu_of(item: Any) -> str | None:
    """The card of tables/gpus.jsonl that an item of gpuhunt has; None for those that are not there."""
    name, memory, instance = item.gpu_name, item.gpu_memory, str(item.instance_name)
    return _known(name, float(memory), bool(_SXM.search(instance))) if name and memory else None


@cache
def _known(name: str, memory_gb: float, sxm: bool) -> str | None:
    sized = f"{name} {memory_gb:g}GB"
    for spelling in (sized if sxm else f"{name} PCIe {memory_gb:g}GB", sized, name):
        try:
            card = catalog.gpu(spelling)
        except UsageError:
            continue
        if card.memory_gb is not None and abs(card.memory_gb - memory_gb) <= 0.1 * card.memory_gb:
            return card.name
    return None


def _fetched_before() -> tuple[Offer, ...]:
    try:
        return read(cached())
    except UsageError:  # none, or broken: then nothing of it is kept
        return ()


def _csv(found: Iterable[Offer]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for offer in found:
        spelt = {"usd_per_hour": f"{offer.usd_per_hour:.6f}", "spot": "yes" if offer.spot else "no"}
        writer.writerow(asdict(offer) | spelt)
    return out.getvalue()
