"""docs/claims.md: claims of articles, planned; `python tests/test_claims.py` writes it anew from docs/claims.toml."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from vramplan import Plan, UsageError, plan
from vramplan.planner import cli, loading, parameters, report_table, stack
from vramplan.planner.report import short
from vramplan.planner.table import table
from vramplan.planner.training import flags
from vramplan.planner.units import GB

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vramplan.planner.cost import Cost

DOCS = Path(__file__).parent.parent / "docs"
CLAIMS: dict[str, Any] = tomllib.loads((DOCS / "claims.toml").read_text("utf-8"))
PRICES = Path(parameters.__file__).parent.parent / "tables" / "prices.csv"
NEAR = 0.10  # how far a claim may be from a figure and still be called right
INTRO = """\
# Claims, planned

What articles on fine-tuning claim, and what vramplan plans for the same question. `python tests/test_claims.py` writes
this page from [claims.toml](claims.toml), for the newest known versions of the stack, with the bundled prices; a test
holds it to what the program says.

Articles seldom say what run they mean. So each claim of memory is held against several readings, each a run with one
sequence of 2,048 tokens a step, checkpointing, AdamW, and LoRA of rank 16 on all linear layers, but for what is said
beside its figure. The figure is what `nvidia-smi` would show: everything PyTorch reserves, and the CUDA context. A
claim is right where a reading is within 10 % of it; the command is that of the nearest. **A GB is 10^9 bytes here**, as
in the articles; vramplan itself prints GiB, which are 7 % larger. A run that no one GPU holds is planned as if one did.
"""


@cache
def planned(model: str, *options: tuple[str, Any]) -> Plan | str:
    """The plan, or why a run on several GPUs has none."""
    try:
        return plan(model, prices=PRICES, stack=newest(), calibration=False, **dict(options))
    except UsageError as error:
        if dict(options).get("num_gpus", 1) == 1:
            raise
        return f"refused: {error}"


@cache
def newest() -> str:
    return ",".join(f"{package}={last[0]}.{last[1]}" for package, (_, last) in stack.KNOWN.items())


def run(model: str, **options: Any) -> Plan | str:
    return planned(model, *options.items())


def sure(model: str, **options: Any) -> Plan:
    found = run(model, **options)
    assert isinstance(found, Plan)
    return found


def command(model: str, **options: Any) -> str:
    gpu = options.pop("gpu", None)
    words = ["vramplan", model, flags(options), *([f"--gpu {gpu}"] if gpu else [])]
    return f"`{' '.join(filter(None, words))}`"


def rows(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def gb(nbytes: float) -> str:
    return f"{nbytes / GB:.2f}" if nbytes < 10 * GB else f"{nbytes / GB:.1f}"


# ---------------------------------------------------------------------------------------------------------- parameters


def counted() -> Iterator[tuple[str, str, str, str]]:
    """Claims of counting: the claim, the exact answer, the verdict, and the command."""
    for rank, share in ((16, "0.78 %"), (8, "0.4 %")):
        one = sure("llama-2-7b", method="lora", rank=rank, target_modules="q_proj").counts
        each, whole = one.trainable // 32, 4096 * 4096
        yield (
            f"LoRA on a 4096 x 4096 matrix, r = {rank}: {each:,} parameters ({share})",
            f"{each:,} of {whole:,}: {100 * each / whole:.4f} %, in each of 32 layers",
            f"right{'' if rank == 16 else ', rounded'}",
            command("llama-2-7b", method="lora", rank=rank, target_modules="q_proj"),
        )
    asked: dict[str, Any] = {"method": "lora", "rank": 16, "target_modules": "q_proj,k_proj,v_proj,o_proj"}
    found = sure("llama-3.1-8b", **asked).counts
    yield (
        "Llama-3.1-8B, r = 16 on q, k, v, o: 13,631,488 trainable of 8,030,261,248, 0.17 %",
        f"{found.trainable:,} of {found.total:,}: {100 * found.trainable / found.total:.4f} %; "
        f"PEFT prints {100 * found.trainable / (found.total + found.trainable):.4f} %, of both together",
        "right, all three",
        command("llama-3.1-8b", **asked),
    )
    asked = {"method": "lora", "rank": 16}
    three, seven = sure("llama-3.2-3b", **asked).counts, sure("llama-2-7b", **asked).counts
    assert seven.trainable == 39_976_960
    yield (
        "Llama-3.2-3B, r = 16 on all linear: 39,976,960 of 3,252,768,768, 1.2290 %",
        f"{three.trainable:,} of {three.total + three.trainable:,}: "
        f"{100 * three.trainable / (three.total + three.trainable):.4f} %",
        "wrong: 39,976,960 is the count of Llama-2-7B with the same options, and the sum is that count on top of a 3B "
        f"({3_252_768_768 - 39_976_960:,}; it has {three.total:,})",
        command("llama-3.2-3b", **asked),
    )
    formula = 32 / loading.BLOCK - (8 / loading.BLOCK + 32 / (loading.BLOCK * loading.NESTED))
    one = 4096 * 4096
    plain, double = (sum(nbytes for _, nbytes in loading.nf4_tensors(one, each)) for each in (False, True))
    yield (
        "double quantisation saves 0.37 bits a parameter",
        f"32/64 - (8/64 + 32/(64 x 256)) = {formula:.6f} bits; of a 4096 x 4096 weight {plain - double:,} B, "
        f"{8 * (plain - double) / one:.6f} bits, since a table of 256 values comes with it",
        "right",
        command("llama-2-7b", double_quant=False),
    )
    base = sure("llama-2-7b").memory
    bf16 = 2 * seven.total
    yield (
        "NF4 takes a 7B from 14 to about 4 GB",
        f"{gb(bf16)} GB in bf16, {gb(base.loaded_bytes)} GB loaded, the head and the embeddings still in 16 bit; "
        f"{gb(base.ready_bytes)} GB with those in float32 by prepare_model_for_kbit_training, and the adapter",
        "right for what is loaded",
        command("llama-2-7b"),
    )
    sizes = {
        f"r = {rank} on {targets}": sure(
            "llama-2-7b", method="lora", rank=rank, target_modules=targets
        ).counts.adapter_bytes
        for rank, targets in ((8, "q_proj,v_proj"), (16, "attention"), (16, "all-linear"), (64, "all-linear"))
    }
    listed = ", ".join(f"{nbytes / 10**6:.1f} ({how})" for how, nbytes in sizes.items())
    half = sure("llama-2-7b", trainer="trl").counts.adapter_bytes
    for claim, verdict in (
        ("10-200 MB", "right up to r = 16; r = 64 on all linear layers is beyond it"),
        ("50-100 MB", f"right for r = 16 on attention, and on all linear layers in bf16 ({half / 10**6:.1f} MB)"),
    ):
        yield (
            f"adapters take {claim}",
            f"Llama-2-7B, float32, in MB: {listed}",
            verdict,
            command("llama-2-7b", method="lora"),
        )
    four, sixteen = sure("llama-3.2-3b").memory.loaded_bytes, sure("llama-3.2-3b").sizes()[0].bytes
    yield (
        "merge_and_unload takes a 3B from about 2 to about 6 GB",
        f"{gb(four)} GB loaded in NF4, {gb(sixteen)} GB as a file in bf16",
        "right for a base that is loaded again in 16 bit; merged into a 4-bit base it stays in 4 bit "
        "(PEFT, tuners/lora/bnb.py, Linear4bit.merge)",
        command("llama-3.2-3b"),
    )


# -------------------------------------------------------------------------------------------------------------- memory


class Reading(NamedTuple):
    """One way to mean a claim: what it says, the run, and its gigabytes, or why there are none."""

    says: str
    model: str
    options: dict[str, Any]
    gb: float | str


def readings(claim: dict[str, Any]) -> Iterator[Reading]:
    known = CLAIMS["readings"]
    asked = [*claim.get("readings", known[claim["method"]]), *known.get(claim.get("also"), ())]
    sizes = claim["size"] if isinstance(claim["size"], list) else [claim["size"]]
    for size in sizes:
        for each in asked:
            options = {"method": claim["method"], **{name: value for name, value in each.items() if name != "says"}}
            model = CLAIMS["models"][size]
            made = run(model, **options)
            total = made if isinstance(made, str) else made.memory.device_bytes * options.get("num_gpus", 1) / GB
            yield Reading(each["says"] if len(sizes) == 1 else f"{size}, {each['says']}", model, options, total)


def off(claimed: Sequence[float], value: float) -> float:
    """How far a claim is from a figure, as a share of that: 0 where the figure is in its range, below 0 too low."""
    low, high = claimed
    return 0.0 if low <= value <= high else (high if high < value else low) / value - 1


def verdict(claimed: Sequence[float], figures: dict[str, float], steps: bool) -> tuple[str, str]:
    """What is to be said of a claim, and the reading that is nearest to it.

    With `steps` the readings differ in size alone, and a claim between two of them is the claim of a run between.
    """
    shares = {says: off(claimed, value) for says, value in figures.items()}
    nearest = min(shares, key=lambda says: abs(shares[says]))
    if abs(shares[nearest]) <= NEAR:
        return f"right: {nearest}", nearest
    below = max((says for says in shares if shares[says] > 0), key=figures.__getitem__, default=None)
    above = min((says for says in shares if shares[says] < 0), key=figures.__getitem__, default=None)
    if steps and below and above:
        return f"between {below} and {above}", nearest
    return f"{abs(shares[nearest]):.0%} too {'low' if shares[nearest] < 0 else 'high'}: {nearest}", nearest


def judged(claim: dict[str, Any]) -> tuple[str, str, str, str]:
    """A row: the claim, what is planned, the verdict, and the command of the nearest reading."""
    found = {each.says: each for each in readings(claim)}
    words = {says: each.gb if isinstance(each.gb, str) else f"{each.gb:.1f}" for says, each in found.items()}
    shown = ", ".join(f"{figure} ({says})" for says, figure in words.items())
    figures = {says: each.gb for says, each in found.items() if not isinstance(each.gb, str)}
    said, nearest = verdict(claim["gb"], figures, claim["method"] != "full")
    _, model, options, _ = found[nearest]
    if "arithmetic" in claim:
        total, made = sure(model, **options).counts.total, sure(model, **options).memory
        said += (
            f"; {claim['arithmetic']} B x {total:,} = {gb(claim['arithmetic'] * total)} GB of weights, gradients and "
            f"states; all tensors of the played step take {gb(made.peak_allocated_bytes)} GB at the peak"
        )
    models = ", ".join(dict.fromkeys(each.model for each in found.values()))
    return f"{claim['says']} ({models})", shown, said, command(model, **options)


def fitting(claim: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows of a claim of what fits: each run with its verdict."""
    model = CLAIMS["models"][claim["size"]]
    for options in claim["runs"]:
        made = run(model, **options)
        if isinstance(made, str):
            words = made
        else:
            assert made.fit
            words = "fits" if made.fit.headroom_bytes >= 0 else "fits only just" if made.fit.fits else "does not fit"
            words += f": {gb(made.fit.needed_bytes)} of {gb(made.fit.gpu.budget_bytes)} GB"
            host = {part.name: part.bytes for part in made.sizes() if part.name.startswith("host memory, ")}
            if "host memory, offload" in host:
                kept = gb(host["host memory, offload"])
                words += f", with {gb(max(host.values()))} GB of host memory, {kept} of it while it trains"
        yield claim["says"], words, command(model, **options)


def holds(model: str, card: str, options: dict[str, Any]) -> bool:
    fit = sure(model, gpu=card, **options).fit
    return fit is not None and fit.fits


def largest() -> Iterator[tuple[str, ...]]:
    """For each card the largest model whose QLoRA fits, by training loop."""
    data = CLAIMS["largest"]
    for card in data["cards"]:
        found = []
        for options in ({}, {"seq_len": 512}, {"trainer": "trl"}):
            found.append(next((name for name in reversed(data["models"]) if holds(name, card, options)), "none"))
        yield (card, *found)


# --------------------------------------------------------------------------------------------------------------- costs


class Priced(NamedTuple):
    """1,000 samples for 3 epochs on the cheapest offer; None is what nobody lets."""

    says: str
    command: str
    cost: Cost | None


def priced() -> Iterator[Priced]:
    data = CLAIMS["costs"]
    for size, method, seq_len in product(data["sizes"], data["methods"], data["seq_len"]):
        model = CLAIMS["models"][size]
        for more in ({}, *CLAIMS["readings"]["sharded"]):
            options = {"method": method, "seq_len": seq_len} | {k: v for k, v in more.items() if k != "says"}
            made = run(model, **options)
            costs = made.costs()[0] if isinstance(made, Plan) else ()
            if costs:
                break
        says = ", ".join(filter(None, [f"{size} {method} of {seq_len:,} tokens", more.get("says", "")]))
        yield Priced(says, command(model, **options), costs[0] if costs else None)


def dollars() -> str:
    runs = list(priced())
    lines = []
    for says, typed, cost in runs:
        where = ("no known offer holds it", "", "") if cost is None else (
            f"{cost.usd:.2f}", f"{short(cost.hours)} ({short(cost.hours_low)}-{short(cost.hours_high)})",
            f"{cost.offer.gpu}, {cost.offer.provider} {cost.offer.kind} {cost.offer.date}",
        )  # fmt: skip
        lines.append((says, *where, typed))
    dearest = max(each.cost.usd for each in runs if each.cost)
    verdicts = []
    for low, high in CLAIMS["costs"]["usd"]:
        met = [each.says for each in runs if each.cost and low <= each.cost.usd <= high]
        verdicts.append((f"${low:g}-{high:g}", "; ".join(met) or f"none: the dearest of them takes ${dearest:.2f}"))
    return (
        rows(("run", "USD", "hours", "the cheapest offer", "command"), lines)
        + "\nThe sums that are claimed, and which of these runs take so much:\n\n"
        + rows(("claim", "met by"), verdicts)
    )


def exercises() -> Iterator[str]:
    for data in CLAIMS["exercise"]:
        options = {name: value for name, value in data.items() if name not in ("title", "models")}
        made = table(data["models"], stack=newest(), calibration=False, today=CLAIMS["as_of"], **options)
        yield f"### {data['title']}\n\n{report_table.markdown(made)}"


def page() -> str:
    """The whole of claims.md."""
    memory = ("claim", "planned, GB", "verdict", "command")
    parts = [
        INTRO,
        "## Parameters and sizes\n",
        rows(("claim", "exact answer", "verdict", "command"), counted()),
        "## Memory\n",
    ]
    for group in CLAIMS["memory"]:
        parts += [f"### {group['title']}\n", rows(memory, map(judged, group["claims"]))]
    fits = [line for claim in CLAIMS["fits"]["claims"] for line in fitting(claim)]
    head = ("card", "1 x 2048", "1 x 512", "1 x 2048 with SFTTrainer")
    names = ", ".join(CLAIMS["largest"]["models"])
    parts += [
        f"### {CLAIMS['fits']['title']}\n",
        rows(("claim", "planned", "command"), fits),
        f"### The largest QLoRA for 8, 16 and 24 GB\n\nOf {names}:\n",
        rows(head, largest()),
        "## Hours and dollars\n\n1,000 samples, 3 epochs, on the cheapest known offer of one GPU that holds the run, "
        "spot included; LoRA and QLoRA of rank 16 on all linear layers, batch 1.\n",
        dollars(),
        "## The exercises\n",
        *exercises(),
    ]
    return "\n".join(parts)


@contextlib.contextmanager
def bundled_prices() -> Iterator[None]:
    """Whatever was fetched on this machine stays out of it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRAMPLAN_DATA_DIR", folder)
        yield


@pytest.fixture(scope="module")
def written() -> str:
    with bundled_prices():
        return page()


def test_the_page_says_what_the_program_plans(written: str) -> None:
    assert (DOCS / "claims.md").read_text("utf-8") == written, "python tests/test_claims.py writes it anew"


def test_its_tables_are_remade_by_their_captions(capsys: pytest.CaptureFixture[str]) -> None:
    with bundled_prices(), pytest.raises(SystemExit) as end:
        cli.main(["table", "--check", str(DOCS / "claims.md")])
    assert end.value.code == 0
    assert capsys.readouterr().out.count("as vramplan") >= 3


def test_every_claim_of_the_articles_is_there(written: str) -> None:
    for words in (
        *(
            "131,072",
            "65,536",
            "112 GB",
            "80-120 GB",
            "56 GB",
            "16 GB",
            "20 GB",
            "28 GB",
            "6 GB",
            "8-10 GB",
            "15 GB T4",
        ),
        *("0.37 bits", "14 to about 4 GB", "13,631,488", "8,030,261,248", "39,976,960", "3,252,768,768", "1.2290 %"),
        *("10-200 MB", "50-100 MB", "about 2 to about 6 GB", "two 24 GB", "8 H100", "$200-500", "$15-40", "$2-8"),
        *("$0.5-2", "$5-15", "1120 GB", "560 GB"),
    ):
        assert words in written, words


def test_claims_are_held_against_the_nearest_reading() -> None:
    figures = {"small": 10.0, "large": 20.0}
    assert verdict([10, 10], figures, True) == ("right: small", "small")
    assert verdict([21, 30], figures, True) == ("right: large", "large")
    assert verdict([14, 16], figures, True) == ("between small and large", "large")
    assert verdict([14, 16], figures, False) == ("20% too low: large", "large")
    assert verdict([8, 8], figures, True) == ("20% too low: small", "small")
    assert verdict([30, 40], figures, True) == ("50% too high: large", "large")
    assert off([5, 6], 5.5) == 0
    assert off([5, 6], 12) == pytest.approx(-0.5)
    assert off([20, 20], 16) == pytest.approx(0.25)


def test_no_row_of_a_table_is_broken(written: str) -> None:
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in lines)
    assert not re.search(r"\bNone\b|\bnan\b", written)


if __name__ == "__main__":
    with bundled_prices():
        (DOCS / "claims.md").write_text(page(), "utf-8")
