"""What loading leaves on the GPU: weights, quantised or not, buffers, k-bit preparation, the adapter.

Weights are played as the measured runs have them: random numbers drawn on the GPU in 16 bit, scaled into a second
tensor, and quantised one weight at a time. A checkpoint comes without the first of the two; what loading leaves
allocated is the same but for block rounding, and what it leaves reserved differs by the segments of that temporary,
most of which prepare_model_for_kbit_training gives back.

Sources: bitsandbytes/functional.py (quantize_4bit, QuantState), peft/utils/other.py (prepare_model_for_kbit_training),
transformers/models/*/modeling_*.py (inv_freq and original_inv_freq, float32).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vramplan.planner.allocator import block_bytes
from vramplan.planner.around import SCALED_EMBEDDING, TABLES_BY_TYPE
from vramplan.planner.blocks import layer_type
from vramplan.planner.paper import ITEMSIZE
from vramplan.planner.versions import GPTJ_BY_LAYER

if TYPE_CHECKING:
    from vramplan.planner.layers import Architecture, Module
    from vramplan.planner.run import Run, Stretch

BLOCK = 64  # bitsandbytes quantises 64 weights with one absmax,
NESTED = 256  # and with double quantisation 256 of those absmax with one more
MAP_BYTES = 256 * 4  # the 256 values that an 8-bit absmax stands for


def nf4_tensors(numel: int, double_quant: bool) -> list[tuple[str, int]]:
    """The tensors of one NF4 weight of `numel` elements, as (label, bytes): 4 bits a weight and what scales them.

    In the order in which quantize_4bit makes them; without double quantisation the absmax itself is kept, and first.
    """
    blocks = -(-numel // BLOCK)
    packed, code = ("weight, 4 bit", -(-numel // 2)), ("NF4 code", 16 * 4)
    if not double_quant:
        return [("absmax, float32", 4 * blocks), packed, code]
    return [
        packed,
        code,
        ("absmax offset", 4),
        ("absmax of absmax, float32", 4 * -(-blocks // NESTED)),
        ("absmax, 8 bit", blocks),
        ("absmax code", 256 * 4),
    ]


def held_bytes(run: Run) -> int:
    """What `play` and the first forward leave, in the allocator's 512-byte blocks, without playing them."""
    a, s = run.architecture, run.settings
    cast = ITEMSIZE[s.compute_dtype]
    groups: list[tuple[tuple[Module, ...], frozenset[str], int]] = [(a.outside, run.quantised_outside, 1)]
    for (kind, _, quantised), n in Counter(run.signatures).items():
        groups.append((a.kinds[kind].modules, quantised, n))
    total = MAP_BYTES if s.method == "qlora" and s.double_quant else 0
    for modules, quantised, n in groups:
        for module in modules:
            for weight in a.own_weights(module):
                if module.name in quantised and weight.name == "weight":
                    total += n * sum(block_bytes(size) for _, size in nf4_tensors(weight.numel, s.double_quant))
                else:
                    itemsize = cast if module.name in quantised else ITEMSIZE[weight.dtype(s.frozen_dtype)]
                    total += n * block_bytes(weight.numel * itemsize)
    total += sum(block_bytes(size) for _, size in buffers(a))
    if s.method != "full":
        total += sum(block_bytes(p.numel * ITEMSIZE[p.dtype]) for p in run.parameters)
    return total


def buffers(a: Architecture) -> list[tuple[str, int]]:
    """What modules hold beside weights, float32: inv_freq and original_inv_freq, for each type of layer if they differ.

    gptj keeps sines and cosines of every position instead, before transformers 5.24 in each layer; a scaled embedding
    keeps its scale. gpt_bigcode's model keeps a causal mask of all its positions, which nothing reads any more
    (GPTBigCodeModel.__init__, bias: bool).
    """
    if a.model_type == "gpt_bigcode":
        positions = next(m for m in a.embeddings if m.role == "position_embedding").in_features
        return [("causal mask of every position", positions**2)]
    if a.model_type == "gptj":
        attention, family = a.kinds[0].attention, a.kinds[0].family
        table = ("rotary table", 4 * attention.positions * attention.rotary_dim)
        return [table] * (a.num_hidden_layers if family == GPTJ_BY_LAYER else 1)
    dims = {layer_type(layer.attention): layer.attention.rotary_dim for layer in a.kinds}
    each = list(dims.values()) if a.model_type in TABLES_BY_TYPE else [max(dims.values())]
    found = [("rotary frequencies", 4 * (dim // 2)) for dim in each if dim for _ in range(2)]
    return [*found, *([("embedding scale", 4)] if a.model_type in SCALED_EMBEDDING else [])]


def play(run: Run, *, checkpoint: bool = False) -> tuple[Stretch, Stretch, Stretch]:
    """Three stretches: the model on the GPU (`loaded_bytes`), k-bit preparation, the adapter (`ready_bytes`).

    `checkpoint`: as from_pretrained with a device_map loads them, by the weights' names. It begins with one tensor as
    large as all together, which it lets go at once (transformers/modeling_utils.py, caching_allocator_warmup).
    """
    from vramplan.planner.run import Stretch

    program, s, a = run.program, run.loaded, run.architecture
    itemsize = ITEMSIZE[s.weights_dtype]
    events: list[int] = []
    plain: list[tuple[int, int]] = []  # id and elements of the weights that are not quantised
    biases: dict[int, int] = {}  # the layers of those beside a quantised weight, by their place among them
    weights = [(name, module, layer, weight) for name, module, layer in a.modules() for weight in a.own_weights(module)]

    def narrow(module: Module, layer: int | None) -> bool:
        return module.name in (run.quantised_outside if layer is None else run.quantised[layer])

    if checkpoint:
        weights.sort(key=lambda each: _natural(f"{each[0]}.{each[3].name}"))
        halves = sum(
            weight.numel
            * (1 if narrow(module, layer) and weight.name == "weight" else 2 * ITEMSIZE[weight.dtype(s.weights_dtype)])
            for _, module, layer, weight in weights
        )
        whole = program.new(halves // 2, "room for all weights", "")
        events += (2 * whole, 2 * whole + 1)
    first = True
    for name, module, layer, weight in weights:
        quantised = narrow(module, layer)
        if quantised and weight.name == "weight":
            events += _quantise(run, weight.numel, itemsize, name, first, drawn=not checkpoint)
            first = False
        else:
            dtype = weight.dtype(s.weights_dtype)
            nbytes = weight.numel * ITEMSIZE[dtype]
            made = program.new(nbytes, f"weight, {dtype}", "weights", name)
            if s.method == "qlora" and not checkpoint:
                drawn = program.new(nbytes, "weight as drawn", "", name)
                events += (2 * drawn, 2 * made, 2 * drawn + 1)
            else:
                events.append(2 * made)
            if quantised and layer is not None:
                biases[len(plain)] = layer
            plain.append((made, weight.numel))
    events += [2 * program.new(size, label, "weights") for label, size in buffers(a)]
    loaded = Stretch("loading", events)

    events = []
    if s.frozen_dtype != s.weights_dtype:
        for i, (old, numel) in enumerate(plain):
            if program.sizes[old] == 4 * numel:  # float32 already
                continue
            label = "weight, cast to float32 by prepare_model_for_kbit_training"
            made = program.new(4 * numel, label, "weights", program.scopes[old])
            events += (2 * made, 2 * old + 1)
            plain[i] = (made, numel)
    if s.frozen_dtype != s.compute_dtype and not checkpoint:
        for i, layer in biases.items():
            run.biases.setdefault(layer, []).append(plain[i])
    run.plain_parameters = sum(numel for _, numel in plain)
    prepared = Stretch("k-bit preparation", events)
    return loaded, prepared, Stretch("adapter", _adapter(run) if s.method != "full" else [])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """The order in which a checkpoint's weights are loaded (transformers/core_model_loading.py, dot_natural_key)."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _quantise(run: Run, numel: int, itemsize: int, name: str, first: bool, *, drawn: bool) -> list[int]:
    """One weight is made on the GPU in 16 bit and quantised there (bitsandbytes/functional.py, quantize_4bit)."""
    new, double_quant = run.program.new, run.loaded.double_quant
    part = "weights, 4 bit"
    wide = new(numel * itemsize, "weight before quantisation", "", name)
    events = [2 * wide]
    if drawn:
        random = new(numel * itemsize, "weight as drawn", "", name)
        events = [2 * random, 2 * wide, 2 * random + 1]
    kept = [2 * new(nbytes, label, part, name) for label, nbytes in nf4_tensors(numel, double_quant)]
    if double_quant:
        absmax, centred = (new(4 * -(-numel // BLOCK), "absmax, float32", "", name) for _ in range(2))
        events += (2 * absmax, *kept[:3], 2 * centred)
        if first:  # made once for the process (functional.py, name2qmap)
            events.append(2 * new(MAP_BYTES, "map of 8-bit values", part, name))
        events += (*kept[3:], 2 * centred + 1, 2 * absmax + 1)
    else:
        events += kept
    events.append(2 * wide + 1)
    return events


def _adapter(run: Run) -> list[int]:
    """PEFT makes adapter weights in the base weight's dtype and casts them to float32 (cast_adapter_dtype).

    A 4-bit weight has the dtype that it was quantised from, whatever k-bit preparation made of the others. SFTTrainer
    casts adapters on a quantised base once more, one by one (trl/trainer/sft_trainer.py).
    """
    dtypes = _base_dtypes(run)
    events: list[int] = []

    def make(i: int) -> int:
        p = run.trained[i]
        made = run.program.new(p.numel * ITEMSIZE[dtypes[i]], "adapter weight", "adapter", p.name)
        events.append(2 * made)
        return made

    ids = [make(i) for i in range(len(dtypes))]
    for dtype in ("fp32", run.loaded.adapter_dtype):
        for i, old in enumerate(ids):
            if dtypes[i] != dtype:
                dtypes[i] = dtype
                ids[i] = make(i)
                events.append(2 * old + 1)
    return events


def _base_dtypes(run: Run) -> list[str]:
    """For each adapter weight, the dtype of the weight that it adapts."""
    s = run.loaded
    wide = {f"{m.name}.{w.name}" for kind in run.architecture.kinds for m in kind.modules for w in m.weights if w.wide}
    found: dict[int, list[str]] = {}
    for held in (run.outer, *run.layers):
        if id(held) not in found:
            dtypes = {
                id(w): s.weights_dtype for p in held.projections.values() if p.quantised for w in (p.lora_a, p.lora_b)
            }
            dtypes |= {id(w): "fp32" for name in wide & held.factors.keys() for w in held.factors[name]}
            found[id(held)] = [dtypes.get(id(p), s.frozen_dtype) for p in held.parameters]
    inner = [dtype for held in run.layers for dtype in found[id(held)]]
    outer = list(zip(run.outer.parameters, found[id(run.outer)], strict=True))
    before = [dtype for p, dtype in outer if p.name in run.early]
    return [*before, *inner, *(dtype for p, dtype in outer if p.name not in run.early)]
