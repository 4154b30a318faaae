"""The only presenter: plans, models and GPUs for a terminal or as JSON, and errors.

Answers go to stdout, errors to stderr. An answer is a page of blocks. On a terminal rich lays it out, in colour and at
the terminal's width. Into a pipe or a file it goes as plain text of 80 columns, which takes a tenth of rich's time and
is the same wherever it was asked for. Colour says nothing that words do not say.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vramplan.planner.errors import UsageError
from vramplan.planner.training import PHASES
from vramplan.planner.units import GIB, format_bytes, format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console

    from vramplan.planner.calibration import Calibration
    from vramplan.planner.catalog import Gpu, Model
    from vramplan.planner.cost import Cost
    from vramplan.planner.fit import Fit
    from vramplan.planner.memory import Component
    from vramplan.planner.plan import Plan
    from vramplan.planner.prices import Offer, Refreshed
    from vramplan.planner.throughput import StepTime
    from vramplan.planner.training import TrainingOptions
    from vramplan.planner.verify import Score

_WIDTH = 80  # where the output is no terminal
_GAP = "  "  # between columns
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}
_GROUPS = {"all-linear": "all linear layers", "attention": "attention", "mlp": "the MLP"}
_CHEAPEST = 4  # offers that are shown, besides the fastest
_FITTING, _TOO_SMALL = 4, 2  # sizes of card that are shown on each side of the limit


class Row(NamedTuple):
    """One line of a block; `style` is rich's, and plain text goes without."""

    cells: tuple[str, ...]
    style: str = ""


class Block(NamedTuple):
    """Rows in columns, each aligned by its letter of "<>"; text in the last column is wrapped where it is too long."""

    heading: str
    columns: str
    rows: list[Row]


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"vramplan: {' '.join(message.split())}", file=sys.stderr)


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_json(data: object) -> None:
    """`data` as JSON on stdout."""
    import json

    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_text(text: str) -> None:
    """`text` on stdout, as it is."""
    sys.stdout.write(text)


# ---------------------------------------------------------------------------------------------------------- the plan


def print_plan(plan: Plan, *, explain: bool = False, advice: bool = False, timeline: bool = False) -> None:
    """The plan as text.

    With `explain`, how each of its memory rows is worked out, and by what source; with `advice`, what would lower the
    peak; with `timeline`, a drawing of the memory over the step.
    """
    show(plan_page(plan, explain=explain, advice=advice, timeline=timeline))


def plan_page(plan: Plan, *, explain: bool = False, advice: bool = False, timeline: bool = False) -> list[Block]:
    """The same as blocks, the title and the verdict first."""
    top = [Row((title(plan),), "bold")]
    if plan.fit:
        top.append(verdict(plan.fit.to_dict()))
    (costs, doubts), sizes = plan.costs(), plan.sizes()
    page = [Block("", "<", top), _parameters(plan), _memory(plan), *_phases(plan), _gpus(plan.gpus)]
    if plan.time:
        page.append(_time(plan.time))
    page += [_costs(plan, costs), _sizes(sizes, plan.options.num_gpus)]
    if advice:
        page.append(_advice(plan))
    if timeline:
        page.append(_timeline(plan))
    if notes := [*_notes(plan), *doubts]:
        page.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    if explain:
        page.append(_explained("How each row of memory is worked out", plan.memory.components))
        for phase in plan.memory.phases:
            if phase.name != plan.memory.phase:
                page.append(_explained(f"The same for {phase.name}: {phase.peak_phase}", phase.components))
        page.append(_explained("What stands beside the GPU's memory", sizes))
    return page


def title(plan: Plan) -> str:
    """The recipe in words: what is trained, on what, how; options at their default go without saying."""
    return recipe(plan.model.name, plan.options)


def recipe(model: str, run: TrainingOptions) -> str:
    """The same of a model's name and a run's options."""
    method = METHODS[run.method]
    if run.lora:
        method += f" r={run.rank} on {_targets(run)}"
    extras = ((run.padded, "padded"), *_precision(run), *_settings(run))
    parts = [
        model,
        method,
        f"batch {run.batch_size} x {run.seq_len}",
        run.optimizer,
        "checkpointing" if run.gradient_checkpointing else "no checkpointing",
        *(words for said, words in extras if said),
        _sharing(run),
    ]
    return ", ".join(parts)


def _sharing(run: TrainingOptions) -> str:
    if run.num_gpus == 1:
        return "one GPU"
    kept = run.parallel != "ddp" and not run.reshard_after_forward
    offloaded = ", offloaded to host memory" if run.cpu_offload else ""
    return f"{run.num_gpus:,} GPUs, {run.parallel}{' without resharding' if kept else ''}{offloaded}"


def brief(model: str, run: TrainingOptions) -> str:
    """The recipe in a few words, for a row of a table: only what is not at its default is said of the settings."""
    said = (
        (run.rank not in (0, 16), f"r={run.rank}"),
        (run.target_modules not in ((), ("all-linear",)), f"on {_targets(run)}"),
        (run.optimizer != "adamw_torch_fused", run.optimizer),
        (not run.gradient_checkpointing, "no checkpointing"),
        (run.padded, "padded"),
        *_precision(run),
        *_settings(run),
        (run.num_gpus > 1, _sharing(run)),
    )
    method = METHODS[run.method].removesuffix(" fine-tuning")
    first = f"{model} {method} {run.batch_size} x {run.seq_len}"
    return ", ".join([first, *(words for true, words in said if true)])


def _targets(run: TrainingOptions) -> str:
    return ", ".join(_GROUPS.get(name, name) for name in run.target_modules)


def _precision(run: TrainingOptions) -> tuple[tuple[bool, str], ...]:
    autocast = "no autocast" if run.mixed_precision == "no" else f"{run.mixed_precision} autocast"
    return (
        (run.weights_dtype != "bf16", f"{run.weights_dtype} weights"),
        (run.mixed_precision != "bf16", autocast),
        (run.method == "qlora" and not run.double_quant, "no double quantisation"),
        (run.method == "qlora" and run.trainer != "trl" and not run.prepare_kbit, "no prepare_kbit"),
        (run.trainer == "trl" and run.prepare_kbit, "prepare_kbit"),
    )


def _settings(run: TrainingOptions) -> tuple[tuple[bool, str], ...]:
    return (
        (run.lora_dropout > 0, f"LoRA dropout {run.lora_dropout}"),
        (run.gradient_accumulation_steps > 1, f"{run.gradient_accumulation_steps} micro-steps"),
        (run.attention != "sdpa", f"{run.attention} attention"),
        (run.trainer == "trl", "trl's SFTTrainer"),
        (run.expandable_segments, "expandable segments"),
    )


def verdict(fit: Mapping[str, Any]) -> Row:
    """Whether a plan fits the GPU that was named, and by how much; `fit` is an entry of the contract's "gpus"."""
    needed, seen = format_gib(fit["needed_bytes"]), format_gib(fit["budget_bytes"])
    share = f"{needed} of the {seen} that CUDA sees"
    if fit["retries"] is not None:
        often = "once" if fit["retries"] == 1 else f"{fit['retries']} times"
        words = (
            f"fits {fit['name']}, but only just: it would take {needed}, and CUDA sees {seen}; PyTorch gives its cache "
            f"back {often} in the first steps to stay within, which costs time"
        )
        return Row((words,), "yellow")
    if fit["fits"]:
        return Row((f"fits {fit['name']}: {share}, {format_gib(fit['headroom_bytes'])} to spare",), "green")
    words = f"does not fit {fit['name']}: {share}, {format_gib(-fit['headroom_bytes'])} too much"
    return Row((words,), "bold red")


def _parameters(plan: Plan) -> Block:
    counts = plan.counts
    rows = [Row(("base model", format_count(counts.total), ""))]
    if plan.options.lora:
        share = 100 * counts.trainable / (counts.total + counts.trainable)
        rows.append(Row(("trainable", format_count(counts.trainable), f"{share:.4f} % of both, as PEFT counts")))
        size = counts.adapter_bytes
        rows.append(Row(("adapter file", f"{format_count(size)} B", format_bytes(size))))
    else:
        rows.append(Row(("trainable", format_count(counts.trainable), "100 %")))
    return Block("Parameters", "<><", rows)


def _memory(plan: Plan) -> Block:
    """The parts alive at the peak, then what stands around it; each printed sum is that of the printed rows."""
    memory = plan.memory
    digits = 2 if memory.device_bytes >= GIB else 4
    names, sizes = _shown_parts(plan, digits)
    allocated, reserved, device = (
        _scaled(size, digits) for size in (memory.peak_allocated_bytes, memory.peak_reserved_bytes, memory.device_bytes)
    )
    rows = [
        *((name, shown, "") for name, shown in zip(names, rounded(sizes, digits), strict=True)),
        ("= peak allocated", allocated, "bold"),
        ("cached by PyTorch, unused", reserved - allocated, ""),
        ("= peak reserved", reserved, "bold"),
        ("CUDA context" + " and NCCL" * bool(memory.nccl_bytes), device - reserved, ""),
        ("= device total", device, "bold"),
    ]
    if (ranks := plan.options.num_gpus) > 1:
        rows.append((f"{ranks:,} GPUs together", device * ranks, ""))
    shown_rows = [Row((name, _decimal(shown, digits)), style) for name, shown, style in rows]
    return Block(f"Memory at the peak: {memory.peak_phase}", "<>", [Row(("", "GiB"), "dim"), *shown_rows])


def _phases(plan: Plan) -> list[Block]:
    """What each phase of the run takes, where others than training were asked for; the highest is the one above."""
    memory = plan.memory
    if plan.options.phases == ("training",):
        return []
    rows = [Row(("GiB", "allocated", "reserved", "device", "highest at"), "dim")]
    for phase in memory.phases:
        sizes = phase.peak_allocated_bytes, phase.peak_reserved_bytes, phase.peak_reserved_bytes + memory.context_bytes
        shown = (_decimal(_scaled(size, 2), 2) for size in sizes)
        rows.append(Row((phase.name, *shown, phase.peak_phase), "bold" if phase.name == memory.phase else ""))
    return [Block("Phases", "<>>><", rows)]


def _time(time: StepTime) -> Block:
    """A step's seconds and what they go to, the most first; what is less than a hundredth of it is put together."""
    span = f"{_seconds(time.low_s)} to {_seconds(time.high_s)}, host and kernels at their fastest and slowest"
    rows = [
        Row(("one step", _seconds(time.step_s), span), "bold"),
        Row(("tokens a second", format_count(round(time.tokens_per_s)), "")),
    ]
    parts = sorted(time.parts, key=lambda part: -part.seconds)
    large = [part for part in parts if part.seconds >= 0.01 * time.step_s]
    rows += [Row((part.name, _seconds(part.seconds), f"{part.seconds / time.step_s:.0%}")) for part in large]
    return Block("Time of a step", "<><", rows)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _costs(plan: Plan, costs: Sequence[Cost]) -> Block:
    """The cheapest offers, of each GPU one where none is named, and the fastest; or why there is none."""
    from vramplan.planner import cost

    heading = whole_run(plan.options)
    best: dict[tuple[str, ...], Cost] = {}
    for each in costs:
        best.setdefault((each.offer.provider, each.offer.kind) if plan.fit else (each.offer.gpu,), each)
    if not best:
        return Block(heading, "<", [Row((plan.unpriced(),))])
    shown = list(best.values())[:_CHEAPEST]
    fastest = cost.fastest_first(best.values())[0]
    if fastest.hours < shown[0].hours and fastest not in shown:
        shown.append(fastest)
    rows = [Row(("$", "hours", "", "kWh", "GPU", "offer"), "dim")]
    for each in shown:
        span = f"{short(each.hours_low)}-{short(each.hours_high)}"
        kwh = "" if each.kwh is None else short(each.kwh)
        by = offered(each) + (", the fastest" if each is fastest and each.hours < shown[0].hours else "")
        rows.append(
            Row((f"{each.usd:.2f}", short(each.hours), span, kwh, gpus_in_use(each.offer.gpu, each.num_gpus), by))
        )
    return Block(heading, ">>>><<", rows)


def whole_run(run: TrainingOptions) -> str:
    """How long a run is."""
    from vramplan.planner import cost

    epochs = f"{run.epochs:g} {'epoch' if run.epochs == 1 else 'epochs'}"
    return (
        f"The whole run: {format_count(run.examples)} examples of {format_count(run.tokens_per_example)} tokens, "
        f"{epochs}, {format_count(cost.work(run).steps)} steps"
    )


def short(value: float) -> str:
    """Hours or kWh with as many decimals as say something."""
    if value >= 1:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.01 or not value else f"{value:.1g}"


def gpus_in_use(gpu: str, num_gpus: int) -> str:
    """GPUs that a run uses."""
    return gpu if num_gpus == 1 else f"{num_gpus:,} x {gpu}"


def offered(made: Cost) -> str:
    """By whom, on which terms, of which day the price is, and how often the run is cut off."""
    offer = made.offer
    count = f"{offer.gpu_count} GPUs" if offer.gpu_count > made.num_gpus else ""  # of which others idle
    if made.instances > 1:
        count = f"{made.instances} x {offer.gpu_count} GPUs"
    sessions = f"{made.sessions} sessions of {(offer.session_limit_s or 0) / 3600:g} h" if made.sessions > 1 else ""
    return ", ".join(filter(None, [offer.provider, count, f"{offer.kind} {offer.date}", sessions]))


def _sizes(parts: Iterable[Component], num_gpus: int) -> Block:
    heading = "Beside the GPU" if num_gpus == 1 else "Beside the GPUs; host memory is that of one host"
    return Block(heading, "<>", [Row((part.name, format_bytes(part.bytes))) for part in parts])


def _shown_parts(plan: Plan, digits: int) -> tuple[list[str], list[int]]:
    """The components, those that would print as nothing put together."""
    parts = plan.memory.components
    large = [part for part in parts if _scaled(part.bytes, digits) > 0]
    small = [part for part in parts if _scaled(part.bytes, digits) == 0]
    names, sizes = [part.name for part in large], [part.bytes for part in large]
    if small:
        names.append(small[0].name if len(small) == 1 else f"{len(small)} smaller parts")
        sizes.append(sum(part.bytes for part in small))
    return names, sizes


def rounded(sizes: Sequence[int], digits: int = 2) -> list[int]:
    """`sizes` in bytes as whole 10**-digits GiB that add up to their rounded sum: the largest remainders go up."""
    scale = 10**digits
    parts = [divmod(size * scale, GIB) for size in sizes]
    missing = _scaled(sum(sizes), digits) - sum(whole for whole, _ in parts)
    up = set(sorted(range(len(parts)), key=lambda index: -parts[index][1])[:missing])
    return [whole + (index in up) for index, (whole, _) in enumerate(parts)]


def _scaled(size: int, digits: int) -> int:
    """Bytes as the nearest whole number of 10**-digits GiB."""
    scale: int = 10**digits
    return (2 * size * scale + GIB) // (2 * GIB)


def _decimal(scaled: int, digits: int) -> str:
    whole, rest = divmod(scaled, 10**digits)
    return f"{whole:,}.{rest:0{digits}d}"


def _gpus(fits: Sequence[Fit]) -> Block:
    """The smallest cards that hold the plan and the largest that do not, cards of one size on one line.

    A card that holds it only just has its own line above.
    """
    small, large = card_groups(fits)
    rows = [Row(("", "GB", "headroom", ""), "dim")]
    rows += [Row(("too small", *_card_line(group))) for group in small]
    rows += [Row(("fits", *_card_line(group))) for group in large]
    if not large:
        rows.append(Row(("fits", "", "", "none of the known cards")))
    lacking = sorted({ability for group in (*small, *large) for fit in group for ability in fit.lacks})
    if lacking:
        remedy = "planned in fp16 where named (--gpu)" if lacking == ["bf16"] else "which this plan uses"
        rows.append(Row(("", "", "", f"* without {' or '.join(lacking)}, {remedy}"), "dim"))
    return Block("GPUs", "<>><", rows)


def card_groups(fits: Sequence[Fit]) -> tuple[list[list[Fit]], list[list[Fit]]]:
    """The largest sizes of card that do not hold a plan, and the smallest that do with their whole cache."""
    with_room = [fit for fit in fits if fit.retries is None]
    groups = [list(group) for _, group in groupby(with_room, key=lambda fit: (fit.gpu.memory_gb, fit.fits))]
    small = [group for group in groups if not group[0].fits][-_TOO_SMALL:]
    return small, [group for group in groups if group[0].fits][:_FITTING]


def _card_line(group: Sequence[Fit]) -> tuple[str, str, str]:
    # The least headroom of the line is that of all its cards.
    names = [fit.gpu.name + "*" * bool(fit.lacks) for fit in group]
    return str(group[0].gpu.memory_gb), format_gib(min(fit.headroom_bytes for fit in group)), ", ".join(names)


def _advice(plan: Plan) -> Block:
    """Each change with what it does to the peak; the last is twice the batch."""
    rows = []
    for each in plan.advice():
        sign = "-" if each.saves_bytes > 0 else "+"
        rows.append(Row((f"{sign}{format_gib(abs(each.saves_bytes))}", each.flags)))
    return Block("What would change the peak, each planned by itself", "><", rows)


def part_of_step(stretch: str) -> str:
    """Which part of the step a stretch belongs to, for the drawing's axis."""
    word = stretch.replace(",", "").split()[0]
    return {"batch": "forward", "autocast": "loss", "forward": "forward", "loss": "loss", "backward": "backward"}.get(
        word, word if word in PHASES else "update"
    )


def first_of(names: Iterable[str]) -> list[tuple[int, str]]:
    """Where each name first stands."""
    found: dict[str, int] = {}
    for index, name in enumerate(names):
        found.setdefault(name, index)
    return [(index, name) for name, index in found.items()]


def _timeline(plan: Plan, width: int = 60, height: int = 14) -> Block:
    """Allocated memory over the step that holds the peak, one stretch after another, drawn by plotille."""
    try:
        "\u28ff".encode(sys.stdout.encoding or "ascii")  # braille: what the drawing is made of
    except UnicodeEncodeError:
        raise UsageError(
            f"{sys.stdout.encoding} has no characters to draw --timeline with; set PYTHONUTF8=1, or take it from --json"
        ) from None
    import plotille

    moments = plan.memory.timeline
    phases = [moment.phase for moment in moments]
    across = [x for index in range(len(moments)) for x in (index + 0.5, index + 1.0)]
    up = [value / GIB for moment in moments for value in (moment.peak_bytes, moment.end_bytes)]
    top = max(up)
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = width, height, False
    figure.set_x_limits(0, len(moments))
    figure.set_y_limits(min(up), top + (top - min(up)) / height)  # room for the peak's mark
    figure.y_label = figure.x_label = ""
    figure.y_ticks_fkt = lambda low, _: f"{low:8.2f}"
    figure.x_ticks_fkt = lambda _, __: ""
    figure.plot(across, up)
    at = next(index for index, moment in enumerate(moments) if moment.phase == plan.memory.peak_phase)
    beside = at + 1.0 if at < len(moments) * 0.8 else at - len(moments) * 0.1
    figure.text([beside], [top], ["peak"])
    # plotille's first line is the head of its axis, its last two the ticks of the other
    lines = [line.rstrip() for line in figure.show().splitlines()[2:-2]]
    left = lines[0].index("|") + 2
    starts = [(left + index * width // len(moments), name) for index, name in first_of(map(part_of_step, phases))]
    axis = ""
    for (start, name), (end, _) in zip(starts, [*starts[1:], (left + width, "")], strict=True):
        axis = axis.ljust(start) + (f"|{name}" if len(name) < end - start else "|")
    peak = f"peak {format_gib(plan.memory.peak_allocated_bytes)} in {plan.memory.peak_phase}"
    rows = [Row((line,)) for line in (*lines, axis)]
    over = "the step" if plan.memory.phase == "training" else plan.memory.phase
    return Block(f"Allocated memory over {over}, GiB: {peak}", "<", rows)


def _notes(plan: Plan) -> list[str]:
    notes = [*plan.warnings, *plan.memory.notes]
    if plan.time and plan.time.assumed:
        notes.append(plan.time.assumed)
    if plan.device.calibration:
        notes.append(_learned(plan.device.calibration))
    if plan.bundled and plan.bundled.verified != "exact":
        notes.append(f"the parameter count of {plan.model.name} agrees with no published one: its shape was read only")
    if plan.architecture.assumed:
        notes.append(f"not in the config, so transformers' defaults: {', '.join(plan.architecture.assumed)}")
    return notes


def _learned(known: Calibration) -> str:
    """Which figures are not from tables and rules, and since when."""
    figures = {
        "CUDA context": known.process_bytes,
        "cuBLAS workspace": known.workspace_bytes,
        "attention kernel": known.kernel,
    }
    used = " and ".join(name for name, value in figures.items() if value is not None) or "nothing yet"
    return (
        f"calibrated: {used} as measured on this machine's {known.gpu} ({known.date}, driver {known.driver}); "
        "--no-calibration plans without"
    )


def _explained(heading: str, parts: Iterable[Component]) -> Block:
    rows = []
    for part in parts:
        rows.append(Row((f"{format_count(part.bytes)} B", part.name), "bold"))
        rows += [Row(("", part.formula)), Row(("", part.source), "dim")]
    return Block(heading, "><", rows)


# ------------------------------------------------------------------------------------------------------- verification

_Item = TypeVar("_Item")
_SPREAD = ("allocated", "reserved", "device", "step")  # figures of the table; the JSON has them all
_WORST = 5


def tracked(items: Iterable[_Item], total: int, doing: str) -> Iterator[_Item]:
    """The items, with a bar on stderr while they come, where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, doing, total, console=Console(stderr=True), transient=True)


def print_scores(scores: Sequence[Score], tolerance: dict[str, float] | None) -> None:
    """How plans compare with measured runs: the spread of their errors, the worst of them, and what is wrong."""
    from vramplan.planner.verify import spreads

    top = Block("", "<", [Row((line,), style) for line, style in _scored(scores, tolerance)])
    header = Row(("", "", "runs", "median", "p95", "worst", "bias"), "dim")
    rows: list[Row] = []
    for figure, groups in spreads(scores).items():
        if figure in _SPREAD and groups:
            for group in ("all", *sorted(groups.keys() - {"all"})):
                found = groups[group]
                shares = map(percent, (found.median, found.p95, found.worst, found.bias))
                rows.append(Row((figure if group == "all" else "", group, str(found.n), *shares)))
    page = [top]
    if rows:
        page.append(Block("Planned against measured, error in percent", "<<>>>>>", [header, *rows]))
        page += [_furthest(scores, figure) for figure in ("allocated", "reserved")]
    wrong = [(each.run, reasons) for each in scores if (reasons := each.beyond(tolerance or {}))]
    if wrong:
        lines = [Row(("-", f"{run.id} ({run.file}, line {run.line}): {'; '.join(why)}")) for run, why in wrong]
        page.append(Block("Beyond the tolerance" if tolerance else "Not as it should be", "<<", lines))
    show(page)


def _scored(scores: Sequence[Score], tolerance: dict[str, float] | None) -> Iterator[tuple[str, str]]:
    exact = [each.trainable_exact for each in scores if each.trainable_exact is not None]
    ran_out = sum(each.run.outcome != "ok" for each in scores)
    ended = [each.fits_as_measured for each in scores if each.fits_as_measured is not None]
    yield f"{sum(not each.failed for each in scores)} of {len(scores)} measured runs planned", "bold"
    if exact:
        yield f"trainable parameters exact in {sum(exact)} of {len(exact)}", ""
    if ended:
        yield f"ended as planned: {sum(ended)} of {len(ended)}, of which {ran_out} ran out of memory", ""
    yield f"dangerous, the device planned more than 2 % too small: {sum(each.dangerous for each in scores)}", ""
    if tolerance is not None:
        beyond = sum(bool(each.beyond(tolerance)) for each in scores)
        words = ", ".join(f"{name} {100 * share:g} %" for name, share in tolerance.items())
        if beyond:
            yield f"{beyond} of {len(scores)} beyond the tolerance ({words})", "bold red"
        else:
            yield f"all within the tolerance ({words})", "green"


def _furthest(scores: Sequence[Score], figure: str) -> Block:
    """The runs whose plan is furthest off in `figure`, with the other figures beside it."""
    measured = [each for each in scores if figure in each.errors]
    rows = [Row((*_SPREAD, "run"), "dim")]
    for each in sorted(measured, key=lambda each: -abs(each.errors[figure]))[:_WORST]:
        rows.append(
            Row((*(percent(each.errors[name]) if name in each.errors else "" for name in _SPREAD), each.run.id))
        )
    return Block(f"Furthest off in {figure} memory", ">" * len(_SPREAD) + "<", rows)


def percent(share: float) -> str:
    """A share in percent, to two decimals: 0.00 is exact, what would only print so is not."""
    text = f"{100 * share:.2f}"
    return text if float(text) or not share else "<0.01"


# ----------------------------------------------------------------------------------------------------- models and GPUs


def print_models(models: Sequence[Model]) -> None:
    """One line a model."""
    rows = [Row(("model", "parameters", "context", "type"), "dim")]
    for model in models:
        parameters, context = format_count(model.total_parameters), format_count(model.context_length)
        rows.append(Row((model.name, parameters, context, str(model.config["model_type"]))))
    show([Block("", "<>><", rows)])


def print_gpus(gpus: Sequence[Gpu]) -> None:
    """One line a card."""
    rows = [Row(("GPU", "GB", "budget", "bf16", "architecture"), "dim")]
    for gpu in gpus:
        bf16 = {True: "yes", False: "no", None: "?"}[gpu.bf16]
        rows.append(
            Row((gpu.name, str(gpu.memory_gb or "?"), format_gib(gpu.budget_bytes), bf16, gpu.architecture or "?"))
        )
    show([Block("", "<>><<", rows)])


def print_prices(offers: Sequence[Offer], warnings: Sequence[str] = ()) -> None:
    """One line an offer: the smallest GPUs first, and of one kind the cheapest for each GPU."""
    from vramplan.planner import catalog
    from vramplan.planner.prices import stale

    size = {gpu.name: gpu.budget_bytes for gpu in catalog.gpus()}
    rows = [Row(("GPU", "n", "$/h", "", "as of", "offer"), "dim")]
    for offer in sorted(offers, key=lambda offer: (size[offer.gpu], offer.gpu, offer.usd_per_hour / offer.gpu_count)):
        price = f"{offer.usd_per_hour:.2f}"
        rows.append(Row((offer.gpu, str(offer.gpu_count), price, offer.kind, offer.date, _who(offer))))
    page = [Block("", "<>><<<", rows)]
    if notes := [*warnings, *filter(None, [stale(offers)])]:
        page.append(Block("Notes", "<<", [Row(("-", note)) for note in notes]))
    show(page)


def _who(offer: Offer) -> str:
    limit = "" if offer.session_limit_s is None else f"sessions of {offer.session_limit_s / 3600:g} h"
    region = "" if offer.region == "any" else offer.region
    return ", ".join(filter(None, [offer.provider, offer.instance, region, limit]))


def print_refreshed(refreshed: Refreshed, as_json: bool) -> None:
    """How many prices came, and what is missing."""
    if as_json:
        print_json({**refreshed._asdict(), "file": str(refreshed.file), "fetched": fields(refreshed.fetched)})
        return
    providers = ", ".join(dict.fromkeys(offer.provider for offer in refreshed.fetched))
    missing = [f"{name}: {why}" for name, why in refreshed.silent.items()]
    missing += [f"{name}: none for {', '.join(gpus)}" for name, gpus in refreshed.partial.items()]
    page = [
        Block("", "<", [Row((f"prices fetched: {len(refreshed.fetched)} of {providers}, kept in {refreshed.file}",))])
    ]
    if missing:
        page.append(Block("Not answered, so earlier prices stay", "<<", [Row(("-", line)) for line in missing]))
    show(page)


def fields(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows of a table, for JSON, with every field."""
    return [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in rows]


# ------------------------------------------------------------------------------------------------------------- layout


def show(page: Sequence[Block]) -> None:
    """Writes the page at once, so that a full disk or a closed pipe stops it at one place."""
    text = _rich(page) if sys.stdout.isatty() else "\n".join(plain(page))
    sys.stdout.write(f"{text}\n")


def plain(page: Sequence[Block], width: int = _WIDTH) -> Iterator[str]:
    """The page's lines, none longer than `width` but for words that are, and none with spaces at its end."""
    for index, block in enumerate(page):
        if index:
            yield ""
        if block.heading:
            yield block.heading
        sides = [max(map(len, column)) for column in zip(*(row.cells[:-1] for row in block.rows), strict=True)]
        indent = sum(sides) + len(_GAP) * len(sides)
        last = max((len(row.cells[-1]) for row in block.rows), default=0) if block.columns[-1] == ">" else 0
        for row in block.rows:
            cells = [*map(_aligned, row.cells[:-1], block.columns, sides)]
            first, *more = _wrapped(row.cells[-1].rjust(last), width - indent)
            yield _GAP.join([*cells, first]).rstrip()
            yield from (" " * indent + line for line in more)


def _aligned(cell: str, align: str, side: int) -> str:
    return cell.rjust(side) if align == ">" else cell.ljust(side)


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`, broken between words only (textwrap does as much, and loads longer)."""
    if len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def _rich(page: Sequence[Block]) -> str:
    """The page as rich lays it out for this terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        lay_out(page, console)
    return captured.get().rstrip("\n")


def lay_out(page: Sequence[Block], console: Console) -> None:
    """Prints the page on a console of rich's."""
    from rich.table import Table
    from rich.text import Text

    for index, block in enumerate(page):
        if index:
            console.print()
        if block.heading:
            console.print(Text(block.heading, "bold"))
        table = Table(box=None, padding=(0, len(_GAP), 0, 0), pad_edge=False, show_header=False)
        for align in block.columns:
            table.add_column(justify="right" if align == ">" else "left", no_wrap=align == ">", overflow="fold")
        for row in block.rows:
            table.add_row(*map(Text, row.cells), style=row.style)
        console.print(table)
