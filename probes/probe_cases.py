"""What a probe runs: a plan on this machine's GPU, what the planner says of it there, and which are worth a try."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner import catalog, memory
from vramplan.planner.errors import Failure, UsageError, shown
from vramplan.planner.fit import largest
from vramplan.planner.plan import plan
from vramplan.planner.training import parse_options
from vramplan.planner.units import GIB, MIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vramplan.planner.catalog import Gpu
    from vramplan.planner.fit import Boundary
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.plan import Plan
    from vramplan.planner.training import TrainingOptions

STEPS = 4  # the planner plays as many: the first makes states, the second meets them, fragmentation settles
TOKEN_STEP = 64  # of a boundary over seq_len
_MOST_BATCH, _MOST_TOKENS = 100_000, 2**20
# Options that say nothing of what the GPU holds.
_NOT_MEASURED = ("examples", "tokens_per_example", "epochs", "phases")


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPU here, as CUDA and NVML show it: `name` is CUDA's, `card` the catalog's, with this one's own memory.

    `others_bytes` are other processes'; `bitsandbytes` says why that cannot quantise here, and is empty where it can;
    `alone`: it stands for all GPUs of a run on several.
    """

    card: Gpu
    name: str
    uuid: str
    driver: str
    stack: Mapping[str, str]
    others_bytes: int = 0
    bitsandbytes: str = ""
    notes: tuple[str, ...] = ()
    alone: bool = False

    @property
    def free_bytes(self) -> int:
        """What CUDA shows, less what other processes hold."""
        return self.card.budget_bytes - self.others_bytes


@dataclass(frozen=True, slots=True)
class Case:
    """One run to measure. `predicted` is what the planner says where PyTorch may reserve `room_bytes`.

    `limited`: the room is less than the GPU has, and PyTorch is told so. `record`: with the last step's memory history.
    `alone`: one GPU stands for all of several, so that NCCL takes nothing.
    """

    plan: Plan
    predicted: MemoryEstimate
    room_bytes: int
    limited: bool
    steps: int = STEPS
    record: bool = False
    alone: bool = False

    @property
    def id(self) -> str:
        """The model, the options that were asked for, and what PyTorch may reserve where that is limited."""
        values, given = self.plan.options.as_dict(), self.plan.options.given
        said = [f"{name}={value}" for name, value in values.items() if name in given]
        if self.alone:
            said.append("alone")
        if self.limited:
            said.append(f"room={format_gib(self.room_bytes)}")
        return re.sub(r"[\[\]' ]", "", "-".join([self.plan.model.name, *said]))

    @property
    def config(self) -> dict[str, Any]:
        """The model's config as a measured run's line has it: where it was saved is nobody's business."""
        return {name: value for name, value in self.plan.model.config.items() if name != "_name_or_path"}

    @property
    def options(self) -> dict[str, Any]:
        """The plan's options as a measured run's line has them: those that mean something for it and for its memory."""
        values = self.plan.options.as_dict()
        left_out = (*_NOT_MEASURED, *(("num_gpus", "parallel") if self.plan.options.num_gpus == 1 else ()))
        return {name: v for name, v in values.items() if v is not None and name not in left_out}

    @property
    def survives(self) -> bool:
        """Whether the planner says so."""
        return not self.predicted.out_of_memory


def card_of(
    name: str,
    capability: tuple[int, int],
    total_bytes: int,
    driver_bytes: int | None,
    *,
    multiprocessors: int | None = None,
    sliced: bool = False,
) -> Gpu:
    """The catalog's card of this name, as large as this one is.

    Where there is none, it is a card made of what is known, named by its size, which `--gpu` takes too. A slice of a
    GPU (MIG) is none of the catalog's. `driver_bytes`, NVML's total, is left out where it is less than
    `total_bytes`, CUDA's: then the two count different things.
    """
    known = None if sliced else _known(name, total_bytes)
    if known is None:
        known = catalog.Gpu(
            name=f"{total_bytes // MIB}MiB",
            title=name,
            budget_bytes=total_bytes,
            vendor="NVIDIA",
            compute_capability=f"{capability[0]}.{capability[1]}",
            bf16=capability >= (8, 0),
            flash_attention_2=capability >= (8, 0),
        )
    return replace(
        known,
        budget_bytes=total_bytes,
        budget_derived=False,
        driver_bytes=driver_bytes if driver_bytes is not None and driver_bytes >= total_bytes else None,
        multiprocessors=multiprocessors or known.multiprocessors,
    )


def _known(name: str, total_bytes: int) -> Gpu | None:
    """The catalog's card of CUDA's name, or of it with its size where the name alone means several."""
    for each in (f"{name} {round(total_bytes / GIB)}GB", name):
        try:
            found = catalog.gpu(each)
        except UsageError:
            continue
        if abs(found.budget_bytes - total_bytes) <= found.budget_bytes // 20:
            return found
    return None


def case_of(model: Any, options: Mapping[str, Any], machine: Machine, limit_bytes: int | None = None) -> Case:
    """The run of `model` with `options` here; `limit_bytes` is a smaller card's memory, as CUDA would show it.

    Raises UsageError for what cannot be planned, and for a limit that leaves nothing beside the CUDA context.
    """
    made = plan(model, gpu=machine.card, **options)
    budget = machine.free_bytes if limit_bytes is None else min(limit_bytes, machine.free_bytes)
    alone = machine.alone and made.options.num_gpus > 1
    context = made.memory.context_bytes - made.device.hidden_bytes - alone * made.memory.nccl_bytes
    room = budget - context
    if room <= 0:
        raise UsageError(
            f"of {format_gib(budget)} nothing is left beside the CUDA context, {format_gib(context)}; "
            "give more (--memory-limit)"
        )
    predicted = memory.estimate(made.architecture, made.options, made.device, made.counts, limit_bytes=room)
    return Case(made, predicted, room, limit_bytes is not None, alone=alone)


# ------------------------------------------------------------------------------------------------------------- choosing


def bundled(*, grid: bool, sharing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's runs, each a model and options.

    With options of `training.SHARING` they are those for several GPUs, shared so; of the grid's, those that are shared
    so. Raises UsageError where none of the grid's is.
    """
    if sharing:
        return _of_several(sharing, grid=grid)
    return [*_table()["default"], *(_grid(_table()["full"]) if grid else [])]


def possible(asked: list[dict[str, Any]], machine: Machine) -> tuple[list[dict[str, Any]], list[str]]:
    """Those of `asked` that this GPU's kind and libraries can do; notes on the others."""
    notes: list[str] = []
    if any(_by_deepspeed(each) for each in asked) and not find_spec("deepspeed"):
        notes.append("deepspeed is not installed; runs that need it are left out")
        asked = [each for each in asked if not _by_deepspeed(each)]
    if machine.bitsandbytes:
        notes.append(f"{machine.bitsandbytes}; runs that need it are left out")
        asked = [each for each in asked if not parse_options(each["options"]).bitsandbytes]
    if machine.card.bf16 is False:
        notes.append(f"{machine.name} has no bf16, so everything is run in fp16")
        all_asked = [{**each, "options": each["options"] | _in_fp16(each["options"]["method"])} for each in asked]
        asked = [each for each in all_asked if not _contradiction(each)]
        if not asked:
            raise UsageError(_contradiction(all_asked[0]))
        if len(asked) < len(all_asked):
            notes.append("runs that cannot be in fp16 are left out")
    return asked, notes


def _grid(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"model": model, "options": each} for model in table["models"] for each in table["settings"]]


def _of_several(sharing: Mapping[str, Any], *, grid: bool) -> list[dict[str, Any]]:
    """The table's runs on several GPUs, as `sharing` says; a grid's have ways to share of their own."""
    asked = [each for table in _table()["several_full"] for each in _grid(table)] if grid else _table()["several"]
    found = [{**each, "options": each["options"] | sharing} for each in asked]
    if not grid:
        return found
    if "parallel" not in sharing:
        return [each for each in found if not _contradiction(each)]
    way, ways = sharing["parallel"], list(dict.fromkeys(each["options"]["parallel"] for each in asked))
    if way not in ways:
        raise UsageError(
            f"--full has no runs with parallel {shown(way)}; choose --parallel {', '.join(ways[:-1])} or {ways[-1]}, "
            "or leave out --full"
        )
    return [new for new, each in zip(found, asked, strict=True) if each["options"]["parallel"] == way]


def _contradiction(asked: Mapping[str, Any]) -> str:
    """Why a run's options cannot be asked for together; empty where they can."""
    try:
        parse_options(asked["options"])
    except UsageError as error:
        return str(error)
    return ""


def _by_deepspeed(asked: Mapping[str, Any]) -> bool:
    return str(asked["options"].get("parallel", "")).startswith("zero")


def fitting(asked: Iterable[Mapping[str, Any]], machine: Machine, limit_bytes: int | None) -> Iterator[Case]:
    """Those of `asked` that the planner says fit, none twice, each planned when its turn comes.

    Raises Failure in the end if there was none.
    """
    seen: set[str] = set()
    for each in asked:
        case = case_of(each["model"], each["options"], machine, limit_bytes)
        if case.survives and case.id not in seen:
            seen.add(case.id)
            yield case
    if not seen:
        raise Failure(
            f"none of the bundled runs fits the {format_gib(machine.free_bytes)} that are free on {machine.name}; "
            "end what else runs there, or name a smaller model (MODEL)"
        )


def _in_fp16(method: str) -> dict[str, str]:
    return {"weights_dtype": "fp32" if method == "full" else "fp16", "mixed_precision": "fp16"}


@cache
def _table() -> dict[str, Any]:
    text = (Path(__file__).resolve().parent.parent / "tables" / "probe_cases.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def seconds(case: Case, flops_per_s: float) -> float:
    """A rough guess of what a run takes, its process's start included, at this speed; the time budget needs no better.

    A token costs forward, recomputation and backward, 8 FLOP a parameter, at a third of a large product's speed;
    weights are drawn and quantised at about a billion a second, and the first step compiles and loads kernels. Each of
    several ranks imports everything by itself.
    """
    o = case.plan.options
    tokens = o.batch_size * o.seq_len * o.gradient_accumulation_steps * case.steps
    total = case.plan.counts.total
    start_s = 6.0 if o.num_gpus == 1 or case.alone else 40.0
    return start_s + total / 1e9 + 8 * total * tokens / (flops_per_s / 3)


# ----------------------------------------------------------------------------------------------------------- boundaries


def boundary(
    model: Any, options: Mapping[str, Any], machine: Machine, limit_bytes: int | None, over: str
) -> tuple[Boundary, int]:
    """Where the planner says that memory runs out as `over`, batch_size or seq_len, grows; and the step between sizes.

    Raises UsageError where not even the least fits, or where nothing is too much.
    """
    step = 1 if over == "batch_size" else TOKEN_STEP
    least = case_of(model, {**options, over: step}, machine, limit_bytes)
    most = _MOST_BATCH
    if over == "seq_len":
        positions = least.plan.architecture.config.get("max_position_embeddings")
        most = positions if isinstance(positions, int) else _MOST_TOKENS
    made = least.plan

    def survives(size: int) -> bool:
        asked = _sized(made.options, over, size)
        found = memory.estimate(made.architecture, asked, made.device, made.counts, limit_bytes=least.room_bytes)
        return not found.out_of_memory

    found = largest(survives, step, most)
    if found.survives is None:
        raise UsageError(
            f"not even {over} {step} fits into {format_gib(least.room_bytes)} beside the CUDA context; give more "
            "(--memory-limit), or lower something else"
        )
    if found.fails is None:
        raise UsageError(
            f"{over} {found.survives} still fits, and no more is tried; give less (--memory-limit) or raise something "
            "else"
        )
    return found, step


def _sized(options: TrainingOptions, over: str, size: int) -> TrainingOptions:
    return replace(options, batch_size=size) if over == "batch_size" else replace(options, seq_len=size)


def needs_more_than_free(case: Case, machine: Machine) -> str:
    """Why a run cannot be tried for want of free memory, because others hold it; empty where it can."""
    needed = case.plan.memory.needed_bytes
    if not machine.free_bytes < needed <= machine.card.budget_bytes:
        return ""
    return (
        f"the run needs {format_gib(needed)} and {format_gib(max(machine.free_bytes, 0))} are free on {machine.name}: "
        f"other processes hold {format_gib(machine.others_bytes)}; end them, or choose a smaller run"
    )
