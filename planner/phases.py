"""The phases of a run beside its training: loading, evaluation, saving, generation, merging.

They are played by the blocks and ops of the training step, without gradients, and replayed through the allocator of the
process in which they happen. Evaluation and saving come after a step, inside the Trainer's loop: adapter, optimizer
states and what training left cached are there, gradients are not. Generation follows in the same process when training
has ended. Loading and merging are processes of their own. Merging loads the base in 16 bit, also after QLoRA, because
an adapter merged into 4-bit weights is quantised again.

Sources: transformers/trainer.py (evaluation_loop, prediction_step, _save_checkpoint), trainer_pt_utils.py
(EvalLoopContainer), generation/utils.py (GenerationMixin.generate, _prefill, _sample), cache_utils.py,
peft/peft_model.py (from_pretrained, load_adapter), peft/tuners/lora/layer.py (merge, get_delta_weight).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vramplan.planner import around, loading, memory
from vramplan.planner.allocator import Allocator
from vramplan.planner.memory import Moment, Phase
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.passes import Passes
from vramplan.planner.run import Stretch, alive
from vramplan.planner.step import NOWHERE
from vramplan.planner.trainer import TRAINERS
from vramplan.planner.training import OF_TRAINING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vramplan.planner.allocator import OutOfMemory
    from vramplan.planner.device import Device
    from vramplan.planner.memory import MemoryEstimate
    from vramplan.planner.parameters import ParameterCounts
    from vramplan.planner.run import Run
    from vramplan.planner.training import TrainingOptions

EMPTIED = "cache given back"  # a stretch of this name is torch.cuda.empty_cache()
WHERE = {
    "loading": "in a process of its own, from_pretrained with a device_map, k-bit preparation, a new adapter",
    "evaluation": "after a step, in the Trainer's loop: optimizer states and training's cache are there, gradients not",
    "saving": "a checkpoint after a step; tensors go to the host one by one",
    "generation": "model.generate in eval mode when training has ended, its optimizer and cache still there; greedy",
    "merging": "in a process of its own, the base in 16 bit, the adapter from its file, merge_and_unload",
}
_BATCHES = 4  # of an evaluation, played before its last
_TOKENS = 64  # of a generation that are played; of more, every second, third, ...


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluation(run: Run, options: TrainingOptions) -> Iterator[Stretch]:
    """Trainer.evaluate: batch after batch; where logits are kept, all so far are put together after each."""
    s = replace(run.settings, mode="evaluation", batch=options.per_device_eval_batch_size, checkpointing=False)
    new, keeps, every = run.program.new, not options.prediction_loss_only, options.eval_accumulation_steps
    trainer = TRAINERS[options.trainer]
    passes = [replace(trainer, loss=trainer.evaluated)]
    if keeps:
        with_logits = replace(TRAINERS["transformers"], loss=around.predicted)
        # SFTTrainer scores without logits, and runs the model once more for them
        passes = (
            [with_logits]
            if options.trainer == "transformers"
            else [*passes, replace(with_logits, forward=around.without_loss)]
        )
    batch: list[int] = []
    kept = _Kept(), _Kept(), _Kept()
    losses, logits, labels = kept
    for number in _numbers(options):
        since = number // every * every if every else 0  # batches whose results are on the host
        rows = min((number + 1) * s.batch, options.eval_examples or (number + 1) * s.batch) - since * s.batch
        fetched = [new(8 * s.batch * s.seq, name, "batch") for name in trainer.batch]
        gone = [i for i in batch if i not in (labels.last, labels.whole)]
        yield Stretch("evaluation, batch", [*(2 * i for i in fetched), *_frees(gone)])
        batch = fetched
        made: list[int] = []
        for how in passes:
            stretches, made = Passes(run).forward(s, how, "evaluation")
            yield from stretches
        loss = new(4 * s.batch, "loss of each example", "")
        events = [e for each in kept for e in each.let_go()] + [2 * loss]
        events += losses.add(loss, new(4 * rows, "losses of the evaluation so far", ""))
        if keeps:
            wide, *others = sorted(made, key=lambda i: -run.program.sizes[i])
            events += _frees(others)
            run.program.parts[wide] = KEPT
            of_one = run.program.sizes[wide] // s.batch
            events += logits.add(wide, new(of_one * rows, "logits of the evaluation so far", KEPT))
            events += labels.add(batch[trainer.batch.index("labels")], new(8 * s.seq * rows, "labels so far", KEPT))
        yield Stretch("evaluation, gathering", events)
        if every and (number + 1) % every == 0:
            yield Stretch("evaluation, to the host", _frees(_ended(batch, kept)))
            yield Stretch(EMPTIED, [])
            batch = []
    yield Stretch("evaluation ends", _frees(_ended(batch, kept)))


KEPT = "kept for compute_metrics"


@dataclass(slots=True)
class _Kept:
    """EvalLoopContainer: what all batches so far are put together in, and the last one's, which a local holds too."""

    whole: int = NOWHERE
    last: int = NOWHERE

    def let_go(self) -> list[int]:
        """The local has the next batch's instead."""
        events = _frees([self.last]) if self.last != self.whole else []
        self.last = self.whole
        return events

    def add(self, one: int, both: int) -> list[int]:
        """`nested_concat` of what was there and `one` into `both`; the first is kept as it is."""
        old, self.last = self.whole, one
        self.whole = one if old == NOWHERE else both
        return [] if old == NOWHERE else [2 * both, *_frees([old])]


def _ended(batch: Sequence[int], kept: Sequence[_Kept]) -> list[int]:
    """What the loop holds, which goes."""
    held = {*batch, *(i for each in kept for i in (each.whole, each.last))} - {NOWHERE}
    for each in kept:
        each.whole = each.last = NOWHERE
    return sorted(held)


def _numbers(options: TrainingOptions) -> list[int]:
    """The batches that are played: all of a few, else the first and the last two. Nothing grows where none is kept."""
    size, every = options.per_device_eval_batch_size, options.eval_accumulation_steps
    if options.prediction_loss_only:
        n = max(2, every + 1)
    else:
        n = -(-options.eval_examples // size) if options.eval_examples else every + 1
        n = min(n, every + 1) if every else n
    return sorted({*range(min(n, _BATCHES)), *range(max(n - 2, 0), n)})


def _frees(ids: Sequence[int]) -> list[int]:
    return [2 * i + 1 for i in ids]


def _grown(held: list[int], made: int) -> list[int]:
    """Puts what was held and what is new into `made`."""
    events = [2 * made, *_frees(held)]
    held[:] = [made]
    return events


# --- generation ---------------------------------------------------------------------------------------------------


def generation(run: Run, options: TrainingOptions) -> Iterator[Stretch]:
    """model.generate: the prompt in one pass, then token by token, each with the keys and values of all before it.

    PEFT's generate goes past the forward that accelerate has wrapped: an adapter generates without autocast.
    """
    yield run.end()
    batch, length, new_tokens = options.generation_batch_size, options.prompt_len, options.max_new_tokens
    s = replace(
        run.settings, mode="generation", batch=batch, seq=length, checkpointing=False,
        masked=options.padded and batch > 1, autocast=None if options.lora else run.settings.autocast,
    )  # fmt: skip
    trainer = replace(TRAINERS["transformers"], forward=around.last_logits, loss=around.next_tokens)
    passes, new = Passes(run), run.program.new
    given = [new(8 * batch * length, name, "batch") for name in ("input_ids", "attention_mask")]
    held = [new(8 * batch * length, "position_ids", "batch")]
    yield Stretch("generation, inputs", [2 * i for i in (*given, *held)])
    ids: list[int] = []
    scores: list[int] = []
    every = -(-new_tokens // _TOKENS)
    for token in sorted({*range(0, new_tokens, every), new_tokens - 1}):
        past = length + token - 1 if token else 0
        now = replace(s, seq=1, past=past) if token else s
        name = f"generation, token {token + 1}" if token else "generation, prompt"
        inputs = [new(8 * batch * now.seq, "input_ids, cloned", "batch")]
        yield Stretch(f"{name}, input", [2 * i for i in inputs])
        stretches, kept = passes.forward(now, trainer, name)
        yield from stretches
        total = 8 * batch * (length + token + 1)
        events = _frees(scores) + _frees(inputs)
        events += _grown(ids, new(total, "input_ids so far", "batch"))
        events += _grown(held, new(total, "position_ids", "batch"))
        scores = kept
        yield Stretch(f"{name}, outputs", events)
    gone = [*scores, *ids, *held, *given, *(i for pair in passes.cached for i in pair)]
    yield Stretch("generation ends", _frees(gone))


# --- the processes beside training --------------------------------------------------------------------------------


def saving(run: Run, _: TrainingOptions) -> Iterator[Stretch]:
    """Trainer._save_checkpoint: tensors go to the host as they are written; nothing is made but bitsandbytes' copies.

    The state dict of a 4-bit weight has its own copy of the map of 8-bit values (bitsandbytes/functional.py, as_dict).
    """
    double = run.settings.double_quant
    count = (sum(map(len, run.quantised)) + len(run.quantised_outside)) if double else 0
    copies = [run.program.new(loading.MAP_BYTES, "absmax code, cloned by state_dict", "") for _ in range(count)]
    yield Stretch("saving", [*(2 * i for i in copies), *_frees(copies)])


def merging(run: Run, file_dtype: str) -> Iterator[Stretch]:
    """The base and the adapter are loaded, the adapter's file once more beside it; then each product B A is added.

    `data += delta` casts within its kernel, so a 16-bit weight takes a float32 sum without a copy.
    """
    loaded, _, adapter = loading.play(run, checkpoint=True)
    yield Stretch("merging, base loaded", loaded.events)
    yield Stretch("merging, adapter made", adapter.events)
    new = run.program.new
    held = sorted(alive(adapter.events))
    file = [new(p.numel * ITEMSIZE[file_dtype], "adapter's file on the GPU", "adapter", p.name) for p in run.parameters]
    yield Stretch("merging, adapter read", [*(2 * i for i in file), *_frees(file)])
    workspace = new(run.workspace_bytes, "cuBLAS workspace, forward thread", "cuBLAS workspace")
    numel = {f"{path}.{w.name}": w.numel for path, m, _ in run.architecture.modules() for w in m.weights}
    for pair in range(0, len(held), 2):
        name = run.parameters[pair].name.rpartition(".lora_")[0]
        size = 4 * (numel.get(name) or numel[f"{name}.weight"])
        product, scaled = new(size, "adapter product B A", "", name), new(size, "adapter product, scaled", "", name)
        first = [2 * workspace] if workspace and not pair and run.workspace_bytes else []
        events = [2 * product, *first, 2 * scaled, *_frees([product, scaled]), *_frees(held[pair : pair + 2])]
        yield Stretch("merging, " + name, events)


# --- replayed -----------------------------------------------------------------------------------------------------


def with_others(
    training: MemoryEstimate, run: Run, options: TrainingOptions, on: Device, counts: ParameterCounts,
    allocator: Allocator, sources: Mapping[str, str], limit_bytes: int | None = None,
) -> MemoryEstimate:  # fmt: skip
    """`training` with every phase that was asked for, and the figures of the one that reserves the most.

    `allocator` is as training has left it. Raises UsageError for what no machine holds.
    """
    found: dict[str, Phase] = {}
    before = 0 if OF_TRAINING.isdisjoint(options.phases) else training.retries
    failed, retries = "", before - allocator.retries
    ours = {KEPT: "transformers/trainer_pt_utils.py, EvalLoopContainer", "KV cache": "transformers/cache_utils.py"}
    sources = {**sources, **ours}
    for name in options.phases:
        if name == "training":
            found[name] = training.phases[0]
            continue
        if name in ("loading", "merging"):
            other = memory.run_of(run.architecture, merged(options) if name == "merging" else options, on, counts)
            played = _loading(other) if name == "loading" else merging(other, run.settings.adapter_dtype)
            fresh = Allocator(expandable_segments=options.expandable_segments, limit_bytes=limit_bytes)
            found[name], out = _replayed(name, other, played, fresh, sources)
            retries += fresh.retries
        else:
            played = {"evaluation": evaluation, "saving": saving, "generation": generation}[name](run, options)
            found[name], out = _replayed(name, run, played, allocator, sources)
        if out is not None and limit_bytes is None:
            raise memory.no_room(out, FLAGS[name])
        if out is not None:
            failed = found[name].peak_phase
            break
        if name == "evaluation":  # training goes on, with the cache as it was left
            after, out = _replayed("training", run, iter(run.step(1)), allocator, sources)
            if out is not None:  # only within a limit: without one the step has had its room before
                failed = after.peak_phase
                break
            if "training" in found and after.peak_reserved_bytes > found[name].peak_reserved_bytes:
                found["training"] = replace(found["training"], peak_reserved_bytes=after.peak_reserved_bytes)
    top = max(found.values(), key=lambda phase: (phase.peak_reserved_bytes, phase.peak_allocated_bytes))
    return replace(
        training, phase=top.name, components=top.components, peak_allocated_bytes=top.peak_allocated_bytes,
        peak_reserved_bytes=top.peak_reserved_bytes, peak_phase=top.peak_phase, timeline=top.timeline,
        phases=tuple(found.values()), out_of_memory=failed, retries=allocator.retries + retries,
    )  # fmt: skip


FLAGS = {
    "loading": "the size of the model",
    "evaluation": "--per-device-eval-batch-size or --eval-examples",
    "saving": "the size of the model",
    "generation": "--generation-batch-size or --prompt-len",
    "merging": "--rank",
}


def merged(options: TrainingOptions) -> TrainingOptions:
    """The options under which the adapter of such a run is loaded to be merged."""
    return replace(options, method="lora", prepare_kbit=False, double_quant=False, trainer="transformers")


def _loading(run: Run) -> Iterator[Stretch]:
    loaded, prepared, adapter = loading.play(run, checkpoint=True)
    yield Stretch("loading, weights", loaded.events)
    if prepared.events:
        yield Stretch("loading, k-bit preparation", prepared.events)
        yield Stretch(EMPTIED, [])
    yield Stretch("loading, adapter", adapter.events)


def _replayed(
    name: str, run: Run, played: Iterator[Stretch], allocator: Allocator, sources: Mapping[str, str]
) -> tuple[Phase, OutOfMemory | None]:
    """The phase as `allocator` takes it; and what found no room, if anything."""
    program, before = run.program, allocator.held
    stretches: list[Stretch] = []
    moments: list[Moment] = []
    best, reserved, at, out = -1, 0, (0, -1), None
    for stretch in played:
        stretches.append(stretch)
        if stretch.name == EMPTIED:
            allocator.empty_cache()
            continue
        result = allocator.replay(stretch.events, program.sizes)
        memory.note(moments, Moment(stretch.name, result.peak_allocated_bytes, result.allocated_bytes))
        reserved = max(reserved, result.peak_reserved_bytes)
        if result.peak_allocated_bytes > best:
            best, at = result.peak_allocated_bytes, (len(stretches) - 1, result.peak_allocated_event)
        if out := result.out_of_memory:
            break
    number, event = at  # of an empty phase, what is held
    held = memory.alive_at(before, stretches[: number + 1], event)
    components = memory.components(program, held, best, sources)
    where = stretches[-1].name if out else stretches[number].name
    return Phase(name, WHERE.get(name, ""), best, reserved, where, components, tuple(moments)), out
