"""The pages of docs/ show what the program says; `python tests/test_docs.py` writes their blocks anew.

docs/byte.md follows one small model. Its table of what is alive at the peak is written here by hand, from the config's
numbers and the libraries' lines alone, and has to equal the plan's tensors to the byte.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import sys
from collections import Counter
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from test_measured import ALONE, BOUNDARIES, FOUR, KNOWN, OTHERS, PHASES, PROBED, TWO, TWO_PROBED, scores
from test_readme import AS_OF, ROOT
from test_throughput import published_errors, published_scaling, published_shared

import vramplan
from vramplan import plan
from vramplan.planner import catalog, memory, prices, report, report_plots, report_table, stack, training, verify
from vramplan.planner.allocator import Allocator, block_bytes
from vramplan.planner.families import FAMILIES
from vramplan.planner.table import table as make_table
from vramplan.planner.units import GIB, format_count
from vramplan.probes import probe_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from vramplan.planner.plan import Plan
    from vramplan.planner.run import Program
    from vramplan.planner.table import Table
    from vramplan.planner.verify import Score

DOCS = ROOT / "docs"
MIB = 2**20


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown; `head` is "name | bytes>", > for what stands to the right."""
    names = head.split(" | ")
    rule = ["---:" if name.endswith(">") else "---" for name in names]
    lines = [[name.rstrip(">") for name in names], rule, *rows]
    return "\n".join("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line) + " |"
                     for line in lines)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- docs/byte.md

VOCAB, HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD, TOKENS = 4096, 256, 512, 2, 4, 2, 64, 128
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": TOKENS,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
OPTIONS: dict[str, Any] = {"seq_len": TOKENS, "gradient_checkpointing": False, "gpu": "h200"}
STACK = "torch=2.11,transformers=5.17,peft=0.21"  # of the measured runs
COMMAND = (
    f"vramplan config.json --method full --seq-len {TOKENS} --no-gradient-checkpointing --gpu h200 --stack {STACK}"
)
WIDTHS = {"uint8": 1, "bf16": 2, "fp32": 4, "int64": 8}


class Weights(NamedTuple):
    """Weights of one shape, `n` of them in the model."""

    name: str
    n: int
    shape: tuple[int, ...]
    linear: bool = True


class Alive(NamedTuple):
    """Tensors alive at the peak: `n` of one shape, the part of the breakdown, and what makes and what keeps them."""

    part: str
    n: int
    what: str
    shape: tuple[int, ...]
    dtype: str
    why: str

    @property
    def bytes(self) -> int:
        """One tensor's."""
        return prod(self.shape) * WIDTHS[self.dtype]


WEIGHTS = (
    Weights("model.embed_tokens", 1, (VOCAB, HIDDEN), linear=False),
    Weights("self_attn.q_proj", LAYERS, (HEADS * HEAD, HIDDEN)),
    Weights("self_attn.k_proj", LAYERS, (KV_HEADS * HEAD, HIDDEN)),
    Weights("self_attn.v_proj", LAYERS, (KV_HEADS * HEAD, HIDDEN)),
    Weights("self_attn.o_proj", LAYERS, (HIDDEN, HEADS * HEAD)),
    Weights("mlp.gate_proj", LAYERS, (WIDE, HIDDEN)),
    Weights("mlp.up_proj", LAYERS, (WIDE, HIDDEN)),
    Weights("mlp.down_proj", LAYERS, (HIDDEN, WIDE)),
    Weights("input_layernorm, post_attention_layernorm", 2 * LAYERS, (HIDDEN,), linear=False),
    Weights("model.norm", 1, (HIDDEN,), linear=False),
    Weights("lm_head", 1, (VOCAB, HIDDEN), linear=False),  # peft leaves the output layer out of all-linear
)


def norm(n: int, name: str, then: str) -> list[Alive]:
    """What LlamaRMSNorm.forward leaves for backward."""
    rows = (1, TOKENS, HIDDEN)
    saved = "saved activations"
    return [
        Alive(saved, n, f"{name}, float32 copy", rows, "fp32", "`hidden_states.to(torch.float32)`; `pow(2)` saves it"),
        Alive(saved, n, f"{name}, rsqrt", (1, TOKENS, 1), "fp32", "`torch.rsqrt` saves its result"),
        Alive(saved, n, f"{name}, normalised", rows, "bf16", "`self.weight * ...`, for the weight's gradient"),
        Alive(saved, n, f"{name}, output", rows, "bf16", f"input of {then}, for weight gradients"),
    ]


def alive() -> list[Alive]:
    """What is alive at the peak, when the loss's backward makes the gradient of the logits, in the second step."""
    saved, loss, rest, batch = "saved activations", "logits and loss", "temporary buffers", "batch"
    held = "transformers, `from_pretrained`"
    states = "AdamW's, of the first step on; as its weight (`torch.zeros_like`)"
    scores = (TOKENS, VOCAB)
    mlp = (1, TOKENS, WIDE)
    fused = "scaled_dot_product_attention (cuDNN) saves it"
    return [
        *(Alive("weights", w.n, w.name, w.shape, "bf16", held) for w in WEIGHTS),
        Alive("weights", 2, "inverse frequencies", (HEAD // 2,), "fp32", "two buffers of LlamaRotaryEmbedding"),
        *(Alive("optimizer states", 2 * w.n, f"exp_avg, exp_avg_sq of {w.name}", w.shape, "bf16", states)
          for w in WEIGHTS),
        Alive("optimizer states", sum(w.n for w in WEIGHTS), "step, one a weight", (), "fp32",
              "the fused kernel wants it on the GPU"),
        Alive(rest, 2, "cos and sin", (1, TOKENS, HEAD), "bf16", "LlamaRotaryEmbedding; `q * cos` saves them"),
        *norm(LAYERS, "input_layernorm", "q_proj, k_proj, v_proj"),
        Alive(saved, LAYERS, "query", (1, HEADS, TOKENS, HEAD), "bf16", f"`apply_rotary_pos_emb`; {fused}"),
        Alive(saved, LAYERS, "key", (1, KV_HEADS, TOKENS, HEAD), "bf16", f"`apply_rotary_pos_emb`; {fused}"),
        Alive(saved, LAYERS, "value", (1, KV_HEADS, TOKENS, HEAD), "bf16", f"v_proj; {fused}"),
        Alive(saved, LAYERS, "attention output", (1, HEADS, TOKENS, HEAD), "bf16", f"{fused}, so does o_proj"),
        Alive(saved, LAYERS, "log-sum-exp", (1, HEADS, TOKENS, 1), "fp32", "of the same kernel"),
        Alive(saved, 2 * LAYERS, "philox seed and offset", (), "int64", "of the same kernel, also without dropout"),
        *norm(LAYERS, "post_attention_layernorm", "gate_proj, up_proj"),
        Alive(saved, LAYERS, "gate", mlp, "bf16", "gate_proj; `silu` saves it"),
        Alive(saved, LAYERS, "silu of it", mlp, "bf16", "the product with up saves it"),
        Alive(saved, LAYERS, "up", mlp, "bf16", "up_proj; the product saves it"),
        Alive(saved, LAYERS, "the product", mlp, "bf16", "input of down_proj, for its weight's gradient"),
        *norm(1, "model.norm", "lm_head"),
        Alive(loss, 1, "log-probabilities", scores, "fp32", "`F.cross_entropy` in float32; log_softmax saves it"),
        Alive(loss, 1, "gradient of them", scores, "fp32", "nll_loss's backward"),
        Alive(loss, 1, "gradient of the logits", scores, "fp32", "log_softmax's backward: the op at the peak"),
        Alive(loss, 5, "scalars of the loss", (), "fp32",
              "this step's and the last one's, divided, summed, and the gradient of 1"),
        Alive(rest, 1, "norm of all gradients", (), "bf16", "`clip_grad_norm_` of the step before"),
        Alive(batch, 3, "input_ids, attention_mask, labels", (1, TOKENS), "int64", "the Trainer's inputs"),
        Alive(batch, 1, "number of tokens", (), "int64", "`num_items_in_batch`"),
        Alive("cuBLAS workspace", 2, "workspace", (32 * MIB,), "uint8",
              "one for the forward thread, one for backward's (CublasHandlePool.cpp, compute capability 9.0)"),
    ]  # fmt: skip


class Followed(NamedTuple):
    """The small model's plan, the sizes of the tensors alive at its peak, and the bytes of each segment at the end."""

    made: Plan
    sizes: Counter[int]
    segments: Counter[int]


@cache
def followed() -> Followed:
    made = plan(CONFIG, method="full", stack=stack.parse_stack(STACK).versions, calibration=False, **OPTIONS)
    run = memory.run_of(made.architecture, made.options, made.device, made.counts)
    allocator = Allocator()
    found: list[Counter[int]] = []

    def counted(program: Program, held: Iterable[int], *_: object) -> tuple[()]:
        found.append(Counter(program.sizes[i] for i in held))
        return ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "components", counted)
        memory.replay(run, made.options, made.device, memory.SOURCES, None, allocator)
    segments = Counter(length * 512 for length in allocator._segments.values())
    return Followed(made, found[0], segments)


def config_json() -> str:
    return f"```json\n{json.dumps(CONFIG, indent=2)}\n```"


def weights_table() -> str:
    rank = 16
    rows = [
        (w.name, w.n, times(w.shape), w.n * prod(w.shape), w.n * rank * sum(w.shape) if w.linear else 0)
        for w in WEIGHTS
    ]
    total = ("**total**", sum(w.n for w in WEIGHTS), "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    return table("weight | of them> | shape | parameters, all trained by `full`> | trained by `lora`, r=16>",
                 [*rows, total])  # fmt: skip


def times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def alive_table() -> str:
    rows: list[tuple[object, ...]] = []
    for part in dict.fromkeys(each.part for each in alive()):
        mine = [each for each in alive() if each.part == part]
        rows.append((f"**{part}**", "", "", f"**{sum(each.n * each.bytes for each in mine):,}**", ""))
        if part == "optimizer states":  # a row a weight would repeat the table above
            moments = [each for each in mine if each.dtype == "bf16"]
            nbytes = sum(each.n * each.bytes for each in moments)
            of = f"2 x {sum(prod(w.shape) * w.n for w in WEIGHTS):,}"
            rows.append(("exp_avg, exp_avg_sq", sum(each.n for each in moments), f"{of} bf16", nbytes, moments[0].why))
            mine = mine[len(moments) :]
        rows += [(e.what, e.n, f"{times(e.shape)} {e.dtype}", e.n * e.bytes, e.why) for e in mine]
    return table("tensor | of them> | shape and dtype | bytes of all> | made by, kept by", rows)


def sums() -> str:
    found = followed().made.memory
    asked = sum(each.n * each.bytes for each in alive())
    blocks = sum(each.n * block_bytes(each.bytes) for each in alive())
    segments = sorted(followed().segments.items())
    held = sum(size * n for size, n in segments)
    rows = [
        ("the tensors above", asked),
        ("each rounded up to a multiple of 512", blocks - asked),
        ("**= peak allocated**", f"**{blocks:,}**"),
        ("in segments and not in a block then", held - blocks),
        ("**= peak reserved**: " + " + ".join(f"{n} x {size // MIB} MiB" for size, n in segments), f"**{held:,}**"),
        ("CUDA context: the process's own", found.context_bytes - found.hidden_bytes),
        ("CUDA context: what the driver keeps for itself", found.hidden_bytes),
        ("**= device total**", f"**{held + found.context_bytes:,}**"),
    ]
    return table("what | bytes>", rows)


def course() -> str:
    return table(
        "part of the step | highest> | at its end>",
        [(each.phase, each.peak_bytes, each.end_bytes) for each in followed().made.memory.timeline],
    )


def test_what_is_alive_at_the_peak_is_what_was_derived_by_hand() -> None:
    by_hand: Counter[int] = Counter()
    parts: Counter[str] = Counter()
    for each in alive():
        by_hand[each.bytes] += each.n
        parts[each.part] += each.n * each.bytes
    found = followed().made.memory
    assert by_hand == followed().sizes
    assert parts == {row.name: row.bytes for row in found.components if row.name != "block rounding"}
    assert sum(each.n * block_bytes(each.bytes) for each in alive()) == found.peak_allocated_bytes
    assert found.peak_phase == "loss, backward"


def test_the_segments_are_what_is_reserved() -> None:
    found = followed()
    assert sum(size * n for size, n in found.segments.items()) == found.made.memory.peak_reserved_bytes
    assert set(found.segments) == {2 * MIB, 20 * MIB, 32 * MIB}


def test_the_weights_and_what_is_trained() -> None:
    counts = followed().made.counts
    assert sum(w.n * prod(w.shape) for w in WEIGHTS) == counts.total == counts.trainable
    adapted = plan(CONFIG, method="lora", rank=16, **OPTIONS).counts.trainable
    assert adapted == sum(w.n * 16 * sum(w.shape) for w in WEIGHTS if w.linear)


# ------------------------------------------------------------------------------------------------- docs/accuracy.md

ONE_GPU, MANY = (KNOWN, OTHERS, PROBED), (TWO, FOUR, TWO_PROBED)
FILES = {
    KNOWN: "one GPU, there while the ops were written",
    OTHERS: "one GPU, other models and settings, measured afterwards",
    PROBED: "one GPU, by `vramplan probe`",
    TWO: "two GPUs, DDP and FSDP2",
    FOUR: "four GPUs, DDP and FSDP2",
    TWO_PROBED: "two GPUs, by `vramplan probe`: DDP, FSDP2, ZeRO 2",
    ALONE: "one GPU for two, four or eight, by `vramplan probe --alone`: DDP, FSDP2, ZeRO",
}
MEMORY = {"allocated": "peak allocated", "reserved": "peak reserved", "device": "device, with the CUDA context"}
SPREAD = "runs> | to the byte> | median error> | 95th percentile> | worst>"
PICTURE = DOCS / "images" / "accuracy.svg"


def of(*names: str) -> list[Score]:
    return [each for name in names for each in scores(name)]


def spread(found: Iterable[Score], figure: str) -> tuple[object, ...]:
    """The cells of `SPREAD`."""
    errors = [each.errors[figure] for each in found if figure in each.errors]
    if not errors:
        return 0, "", "", "", ""
    s = verify.spread(errors)
    return s.n, sum(error == 0 for error in errors), f"{s.median:.3%}", f"{s.p95:.2%}", f"{s.worst:+.2%}"


def errors_table() -> str:
    rows = [
        (f"[{title}](../tables/measured/{name})" if figure == "allocated" else "", what, *spread(of(name), figure))
        for name, title in FILES.items()
        for figure, what in MEMORY.items()
        if any(figure in each.errors for each in of(name))
    ]
    return table(f"measured | figure | {SPREAD}", rows)


def methods_table() -> str:
    rows = [
        (method, MEMORY[figure], *spread([each for each in of(*ONE_GPU) if each.method == method], figure))
        for method in ("full", "lora", "qlora")
        for figure in MEMORY
    ]
    return table(f"method | figure | {SPREAD}", rows)


def edge() -> str:
    found = of(BOUNDARIES)
    cells = [
        (planned, *(sum(each.run.outcome == outcome and each.fits_as_measured is (planned == said) for each in found)
                    for outcome, said in (("ok", "survives"), ("out_of_memory", "runs out of memory"))))
        for planned in ("survives", "runs out of memory")
    ]  # fmt: skip
    return table("planned | survived> | ran out of memory>", cells)


def phases_table() -> str:
    rows = []
    for phase in ("loading", "evaluation", "saving", "generation", "merging"):
        mine = [each for each in of(PHASES) if each.run.options["phases"] == [phase]]
        for figure in ("allocated", "reserved"):
            if any(figure in each.errors for each in mine):
                rows.append((phase if figure == "allocated" else "", MEMORY[figure], *spread(mine, figure)))
    return table(f"phase | figure | {SPREAD}", rows)


def time_table() -> str:
    def row(what: str, errors: list[float]) -> tuple[object, ...]:
        sizes = sorted(map(abs, errors))
        return (
            what,
            len(sizes),
            f"{sizes[len(sizes) // 2]:.1%}",
            f"{sizes[int(0.9 * len(sizes))]:.0%}",
            f"{max(errors, key=abs):+.0%}",
        )

    def step(*names: str) -> list[float]:
        return [each.errors["step"] for each in of(*names) if "step" in each.errors]

    shared = [each.planned / each.published - 1 for each in published_shared()]
    rows = [
        row("one GPU, the settled steps of these runs", step(*ONE_GPU, BOUNDARIES)),
        row("two and four GPUs", step(*MANY)),
        row("tokens a second that others published for A100s and H100s, planned on one", published_errors()),
        row("of these, planned on as many as they had, 8 to 512, under FSDP2", shared),
    ]
    return table("seconds of a step | runs> | median error> | 90th percentile> | worst>", rows)


CHOICES = ("method", "trainer", "attention", "weights_dtype", "mixed_precision", "optimizer", "parallel", "num_gpus")


def used(name: str) -> Counter[str]:
    """How often each value of an option was measured."""
    option = training.OPTIONS[name]
    runs = [each.run.options for each in of(*verify_files())]
    default = "none" if name == "parallel" else option.default
    return Counter(str(options.get(name, default)) for options in runs)


def verify_files() -> list[str]:
    return [file.name for file in verify.bundled()]


def covered_table() -> str:
    runs = of(*verify_files())
    rows: list[tuple[str, str, str]] = [
        ("GPU", counted_words(Counter(each.run.gpu for each in runs)), "every other"),
        ("torch", counted_words(Counter(each.run.stack["torch"].split("+")[0] for each in runs)), "every other"),
        ("transformers", counted_words(Counter(each.run.stack["transformers"] for each in runs)), "every other"),
    ]
    for name in CHOICES:
        found = used(name)
        never = [choice for choice in training.OPTIONS[name].choices if choice not in found]
        if name == "num_gpus":
            never = ["more than eight"]
        if name == "parallel":
            never = [each for each in never if each != "none"]
        rows.append((f"`{name}`", counted_words(found), ", ".join(never)))
    families = Counter(each.run.config["model_type"] for each in runs)
    assert set(families) <= set(FAMILIES)
    rows.append(("family", counted_words(families), ", ".join(sorted(set(FAMILIES) - set(families)))))
    return table("of a run | measured (runs) | never measured", rows)


def counted_words(found: Counter[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in found.most_common())


def draw(file: Path) -> None:
    """The picture of `vramplan verify --plot`, with the day that the README's figures have."""
    command = "vramplan verify --plot docs/images/accuracy.svg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prices, "_today", lambda: AS_OF)
        report_plots.draw(str(file), "accuracy", of(*verify_files()), command)


# --------------------------------------------------------------------------------------------- docs/several-gpus.md

PREDICTED = ROOT / "tables" / "predicted" / "h200-several-gpus.jsonl"
OVER_GPUS = {"method": "full", "parallel": "fsdp", "num_gpus": [1, 2, 4, 8, 16, 64]}
GPUS_PICTURE, SCALING_PICTURE = DOCS / "images" / "gpus.svg", DOCS / "images" / "scaling.svg"
SERIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Llama-3.1-8B, full, FSDP2", "llama-3.1-8b", {"method": "full", "parallel": "fsdp"}),
    ("Llama-3.1-8B, QLoRA, DDP", "llama-3.1-8b", {"method": "qlora", "parallel": "ddp"}),
    ("Llama-3.1-70B, QLoRA, FSDP2", "llama-3.1-70b", {"method": "qlora", "parallel": "fsdp"}),
    ("Qwen2.5-14B, full, FSDP2", "qwen2.5-14b", {"method": "full", "parallel": "fsdp"}),
)
SHARED_BY = (1, 2, 4, 8)


@cache
def over_gpus() -> Table:
    """Llama-3.1-8B over the number of GPUs, as `vramplan table` makes it."""
    return make_table(
        ["llama-3.1-8b"], gpu="h200", stack=STACK, calibration=False, drawn=True, today=AS_OF, **OVER_GPUS
    )


def gpus_table() -> str:
    columns = ["memory", "allocated", "fits", "step_time", "tokens_per_s"]
    made = make_table(["llama-3.1-8b"], gpu="h200", stack=STACK, calibration=False, columns=columns, **OVER_GPUS)
    sheet = report_table.layout(made)
    head = " | ".join(name + ">" * (align == ">") for name, align in zip(sheet.header, sheet.columns, strict=True))
    return table(head, sheet.rows)


def same_run(each: Score, model: str, options: dict[str, Any], num_gpus: int) -> bool:
    """Whether it is the run of these options; on one GPU nothing is shared."""
    whole = each.run.config.get("num_hidden_layers") == of_catalog(model)["num_hidden_layers"]
    if not each.run.id.startswith(f"{model}-") or not whole:
        return False
    if each.run.outcome != "ok" or each.run.limit_bytes is not None:
        return False
    asked = {**options, "num_gpus": num_gpus} if num_gpus > 1 else {"method": options["method"]}
    measured, wanted = (training.parse_options(found).as_dict() for found in (each.run.options, asked))
    said = training.OPTIONS.keys() - {"examples", "tokens_per_example", "epochs", "lora_alpha", "phases"}
    return all(measured[name] == wanted[name] for name in said)


@cache
def of_catalog(model: str) -> dict[str, Any]:
    found = catalog.find_model(model)
    assert found
    return found.config


class Point(NamedTuple):
    """A run on `num_gpus`: planned and measured bytes reserved on each, and seconds of a step; where, "" not at all."""

    num_gpus: int
    planned_bytes: int
    measured_bytes: int | None
    planned_s: float
    measured_s: float | None
    where: str


@cache
def points(model: str, method: str, parallel: str) -> list[Point]:
    options = {"method": method, "parallel": parallel}
    found = []
    for n in SHARED_BY:
        asked = {**options, "num_gpus": n} if n > 1 else {"method": method}
        made = plan(model, gpu="h200", stack=STACK, calibration=False, **asked)
        assert made.time
        if n == 1 and made.fit and not made.fit.fits:
            continue
        there = [each for each in of(KNOWN, OTHERS, PROBED, TWO, FOUR, TWO_PROBED, ALONE)
                 if same_run(each, model, options, n)]  # fmt: skip
        reserved = next((int(each.run.figures["reserved"]) for each in there), None)
        timed = [each.run.figures["step"] for each in there if "step" in each.run.figures]
        where = "" if not there else "all GPUs" if timed else "one for all"
        planned = made.memory.peak_reserved_bytes
        found.append(Point(n, planned, reserved, made.time.step_s, min(timed, default=None), where))
    return found


def scaling_table() -> str:
    rows = []
    for title, model, options in SERIES:
        for at, p in enumerate(points(model, options["method"], options["parallel"])):
            tokens = [format_count(round(2048 * p.num_gpus / s)) if s else "" for s in (p.planned_s, p.measured_s)]
            sizes = [f"{size / GIB:.2f}" if size else "" for size in (p.planned_bytes, p.measured_bytes)]
            rows.append(("" if at else title, p.num_gpus, *sizes, *tokens, p.where))
    head = "run | GPUs> | reserved, planned> | measured> | tokens/s, planned> | measured> | measured on"
    return table(head, rows)


def hosts_table() -> str:
    """What others published of 128 H100s, and of more as a share of that."""
    rows = []
    for (model, batch), by_number in published_scaling().items():
        first = by_number[128]
        shares = [
            f"{getattr(by_number[n], what) / getattr(first, what):.1%}"
            for n in (256, 512)
            for what in ("published", "planned")
        ]
        rows.append((model, batch, format_count(round(first.published)), format_count(round(first.planned)), *shares))
    head = "model | batch on each | 128 GPUs, published> | planned> | 256, published> | planned>"
    return table(f"{head} | 512, published> | planned>", rows)


class Pair(NamedTuple):
    """A run that was measured on all its GPUs, and with one GPU that stood for all."""

    on_all: Score
    alone: Score

    def differs(self, figure: str) -> float:
        """By which share of the first figure the second is larger."""
        first, second = (each.run.figures[figure] for each in self)
        return second / first - 1


@cache
def pairs() -> list[Pair]:
    """Each run of one GPU for all that was also measured on all, beside the one that was."""

    def run(each: Score) -> tuple[Any, ...]:
        said = training.OPTIONS.keys() - {"examples", "tokens_per_example", "epochs", "lora_alpha", "phases"}
        options = training.parse_options(each.run.options).as_dict()
        shape = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")
        return *(each.run.config.get(name) for name in shape), *(str(options[name]) for name in sorted(said))

    on_all = {run(each): each for each in of(TWO, FOUR, TWO_PROBED) if each.run.outcome == "ok"}
    return [Pair(on_all[run(each)], each) for each in of(ALONE) if run(each) in on_all]


def pairs_table() -> str:
    rows = []
    for pair in pairs():
        options = training.parse_options(pair.alone.run.options)
        model = next(m.name for m in sorted(catalog.models(), key=lambda m: -len(m.name))
                     if pair.alone.run.id.startswith(f"{m.name}-"))  # fmt: skip
        both = [
            cell
            for figure in ("allocated", "reserved")
            for cell in (f"{pair.on_all.run.figures[figure] / GIB:.3f}", f"{pair.differs(figure):+.3%}")
        ]
        rows.append((report.brief(model, options), *[c.replace("+0.000%", "same") for c in both]))
    return table("run | allocated, GiB> | one for all> | reserved, GiB> | one for all>", rows)


def predicted_rows() -> list[dict[str, Any]]:
    """What `vramplan probe --num-gpus 4 --full`, and the same with 8, would measure on H200s."""
    found = []
    for num_gpus in (4, 8):
        for each in probe_cases._of_several({"num_gpus": num_gpus}, grid=True):
            made = plan(each["model"], gpu="h200", stack=STACK, calibration=False, **each["options"])
            assert made.fit
            assert made.time
            found.append({
                "model": each["model"], "options": each["options"], "gpu": "h200", "stack": STACK,
                "fits": made.fit.fits, "only_just": made.fit.retries is not None,
                "peak_allocated_bytes": made.memory.peak_allocated_bytes,
                "peak_reserved_bytes": made.memory.peak_reserved_bytes, "device_bytes": made.memory.device_bytes,
                "step_s": round(made.time.step_s, 4),
            })  # fmt: skip
    return found


def predict(today: datetime.date) -> None:
    """Writes the predictions anew. They are to be held against runs, so that is done by nothing else."""
    made = {"predicted": today.isoformat(), "vramplan_version": vramplan.__version__}
    PREDICTED.write_text("".join(json.dumps(row | made) + "\n" for row in predicted_rows()), "utf-8")


def predicted_table() -> str:
    """The file's rows, the two numbers of GPUs side by side."""
    rows = [json.loads(line) for line in PREDICTED.read_text("utf-8").splitlines()]
    by_run: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        o = row["options"]
        notes = ", no checkpointing" * (not o.get("gradient_checkpointing", True)) + ", bf16 alone" * (
            o.get("mixed_precision") == "no"
        )
        key = (row["model"], f"{o['method']}, {o['parallel']}{notes}", f"{o['batch_size']} x {o['seq_len']:,}")
        by_run.setdefault(key, {})[o["num_gpus"]] = row

    def cells(row: dict[str, Any]) -> list[str]:
        sizes = [f"{row[name] / GIB:.2f}" for name in ("peak_allocated_bytes", "peak_reserved_bytes")]
        step = f"{row['step_s']:.2f}{', only just' * row['only_just']}"
        return [*sizes, step if row["fits"] else "does not fit"]

    head = ["model", "run", "batch on each"] + [
        f"{what} {n} GPUs>" for n in (4, 8) for what in ("allocated,", "reserved,", "s,")
    ]
    return table(" | ".join(head), [(*key, *cells(found[4]), *cells(found[8])) for key, found in by_run.items()])


def draw_gpus(file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prices, "_today", lambda: AS_OF)
        report_plots.draw(str(file), "rows", over_gpus(), over_gpus().command)


def draw_scaling(file: Path) -> None:
    """Memory and speed from 1 to 8 GPUs: lines as planned, filled marks as measured, hollow ones on one GPU for all."""
    out = io.BytesIO()
    colours = ("#0072b2", "#d55e00", "#009e73", "#882255")
    with report_plots._style():
        heading = "H200s, batch 1 x 2,048 on each: lines planned, filled marks measured, hollow ones on one GPU for all"
        figure = report_plots._figure(heading, 10, 4.6)
        memory_axes, speed_axes = figure.subplots(1, 2)
        for colour, (title, model, options) in zip(colours, SERIES, strict=True):
            found = points(model, options["method"], options["parallel"])
            style: dict[str, Any] = {"color": colour, "linewidth": 1.4}
            numbers = [p.num_gpus for p in found]
            memory_axes.plot(numbers, [p.planned_bytes / GIB for p in found], label=title, **style)
            speed_axes.plot(numbers, [2048 * p.num_gpus / p.planned_s / 1000 for p in found], **style)
            for p in found:
                face = colour if p.where == "all GPUs" else "white"
                if p.measured_bytes:
                    memory_axes.plot(p.num_gpus, p.measured_bytes / GIB, "o", color=colour, markerfacecolor=face)
                if p.measured_s:
                    speed_axes.plot(p.num_gpus, 2048 * p.num_gpus / p.measured_s / 1000, "o", color=colour)
        for axes, label in ((memory_axes, "reserved on each GPU, GiB"), (speed_axes, "thousand tokens a second")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(SHARED_BY, [str(n) for n in SHARED_BY])
            axes.minorticks_off()
            axes.set_xlabel("GPUs")
            axes.set_ylabel(label)
            axes.set_ylim(0)
            axes.grid()
        figure.legend(loc="outside lower left", ncols=2, fontsize=9)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    file.write_bytes(out.getvalue())


# --------------------------------------------------------------------------------------------- docs/contributing.md


def test_the_page_names_every_field_of_a_probes_file() -> None:
    text = (DOCS / "contributing.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (`.*?`) \|", text[text.index("## What the file holds") : text.index("## Check")], re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    found: set[str] = set()
    for name in (PROBED, BOUNDARIES, TWO_PROBED, ALONE):
        for line in (verify.MEASURED / name).read_text("utf-8").splitlines():
            found |= set(json.loads(line))
    assert named == found


# ------------------------------------------------------------------------------------------------------- every page

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "byte.md": {
        "config": config_json,
        "command": lambda: f"```sh\n{COMMAND}\n```",
        "weights": weights_table,
        "course": course,
        "alive": alive_table,
        "sums": sums,
    },
    "accuracy.md": {
        "errors": errors_table,
        "methods": methods_table,
        "edge": edge,
        "phases": phases_table,
        "time": time_table,
        "covered": covered_table,
    },
    "several-gpus.md": {
        "gpus": gpus_table,
        "scaling": scaling_table,
        "pairs": pairs_table,
        "hosts": hosts_table,
        "predicted": predicted_table,
    },
}
# test_measured.py looks at the others: it has planned every run already
MEASURED = ("accuracy.md", "several-gpus.md")
EVERY = [(page, name) for page, blocks in BLOCKS.items() for name in blocks if page not in MEASURED]


def marked(text: str, name: str) -> re.Match[str]:
    match = re.search(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)", text, re.DOTALL)
    assert match, f"<!-- {name} --> is missing"
    return match


def shown(page: str, name: str) -> str:
    return marked((DOCS / page).read_text("utf-8"), name)[0]


@pytest.mark.parametrize(("page", "name"), EVERY)
def test_a_page_shows_what_the_program_says(page: str, name: str) -> None:
    assert shown(page, name) == BLOCKS[page][name](), "python tests/test_docs.py writes it anew"


def test_every_block_of_a_page_is_written_here() -> None:
    for page, blocks in BLOCKS.items():
        assert set(re.findall(r"<!-- /(\w+) -->", (DOCS / page).read_text("utf-8"))) == set(blocks)


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def write(page: Path) -> None:
    text = page.read_text("utf-8")
    for name, content in BLOCKS[page.name].items():
        at = marked(text, name)
        text = text[: at.start()] + content() + text[at.end() :]
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    os.environ["VRAMPLAN_DATA_DIR"] = os.devnull
    if "--predict" in sys.argv:
        predict(datetime.date.today())
    for each in BLOCKS:
        write(DOCS / each)
    draw(PICTURE)
    draw_gpus(GPUS_PICTURE)
    draw_scaling(SCALING_PICTURE)
