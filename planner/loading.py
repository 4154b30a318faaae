"""What loading leaves on the GPU: weights, quantised or not, buffers, k-bit preparation, the adapter.

Weights are played as the measured runs have them: random numbers drawn on the GPU in 16 bit, scaled into a second
tensor, and quantised one weight at a time. A checkpoint comes without the first of the two; what loading leaves
allocated is the same but for block rounding, and what it leaves reserved differs by the segments of that temporary,
most of which prepare_model_for_kbit_training gives back.

Sources: bitsandbytes/functional.py (quantize_4bit, QuantState), peft/utils/other.py (prepare_model_for_kbit_training),
transformers/models/*/modeling_*.py (inv_freq and original_inv_freq, float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.planner.paper import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vramplan.planner.layers import Module
    from vramplan.planner.run import Run, Stretch

BLOCK = 64  # bitsandbytes quantises 64 weights with one absmax,
NESTED = 256  # and with double quantisation 256 of those absmax with one more


def nf4_tensors(numel: int, double_quant: bool) -> list[tuple[str, int]]:
    """The tensors of one NF4 weight of `numel` elements, as (label, bytes): 4 bits a weight and what scales them."""
    blocks = -(-numel // BLOCK)
    packed = ("weight, 4 bit", -(-numel // 2))
    code = ("NF4 code", 16 * 4)
    if not double_quant:
        return [packed, ("absmax, float32", 4 * blocks), code]
    return [
        packed,
        code,
        ("absmax offset", 4),
        ("absmax of absmax, float32", 4 * -(-blocks // NESTED)),
        ("absmax, 8 bit", blocks),
        ("absmax code", 256 * 4),
    ]


def play(run: Run) -> tuple[Stretch, Stretch, Stretch]:
    """Three stretches: the model on the GPU (`loaded_bytes`), k-bit preparation, the adapter (`ready_bytes`)."""
    from vramplan.planner.run import Stretch

    program, s, a = run.program, run.settings, run.architecture
    itemsize = ITEMSIZE[s.weights_dtype]
    events: list[int] = []
    plain: list[tuple[int, int]] = []  # id and elements of the weights that are not quantised
    first = True
    for name, module, layer in _modules(run):
        quantised = layer is not None and module.name in run.quantised[layer]
        for weight in module.weights:
            if quantised and weight.name == "weight":
                events += _quantise(run, weight.numel, itemsize, name, first)
                first = False
            else:
                made = program.new(weight.numel * itemsize, f"weight, {s.weights_dtype}", "weights", name)
                if s.method == "qlora":
                    drawn = program.new(weight.numel * itemsize, "weight as drawn", "", name)
                    events += (2 * drawn, 2 * made, 2 * drawn + 1)
                else:
                    events.append(2 * made)
                plain.append((made, weight.numel))
    dim = max(layer.attention.rotary_dim for layer in a.kinds)
    for _ in range(2 if dim else 0):
        events.append(2 * program.new(4 * (dim // 2), "rotary frequencies", "weights"))
    loaded = Stretch("loading", events)

    events = []
    if s.frozen_dtype != s.weights_dtype:
        for old, numel in plain:
            label = "weight, cast to float32 by prepare_model_for_kbit_training"
            made = program.new(4 * numel, label, "weights", program.scopes[old])
            events += (2 * made, 2 * old + 1)
    run.plain_parameters = sum(numel for _, numel in plain)
    prepared = Stretch("k-bit preparation", events)
    return loaded, prepared, Stretch("adapter", _adapter(run) if s.method != "full" else [])


def _quantise(run: Run, numel: int, itemsize: int, name: str, first: bool) -> list[int]:
    """One weight is made on the GPU in 16 bit and quantised there (bitsandbytes/functional.py, quantize_4bit)."""
    new = run.program.new
    blocks = -(-numel // BLOCK)
    part = "weights, 4 bit"
    drawn, wide = (new(numel * itemsize, "weight before quantisation", "", name) for _ in range(2))
    absmax = new(4 * blocks, "absmax, float32", "" if run.settings.double_quant else part, name)
    packed = new(-(-numel // 2), "weight, 4 bit", part, name)
    code = new(16 * 4, "NF4 code", part, name)
    events = [2 * drawn, 2 * wide, 2 * drawn + 1, 2 * absmax, 2 * packed, 2 * code]
    if run.settings.double_quant:
        offset = new(4, "absmax offset", part, name)
        centred = new(4 * blocks, "absmax less its mean", "", name)
        events += (2 * offset, 2 * centred)
        kept = [("absmax of absmax, float32", 4 * -(-blocks // NESTED)), ("absmax, 8 bit", blocks), ("absmax code", 1024)]
        if first:  # the map of 256 values is made once for the process (functional.py, name2qmap)
            kept.insert(0, ("map of 8-bit values", 1024))
        events += [2 * new(nbytes, label, part, name) for label, nbytes in kept]
        events += (2 * centred + 1, 2 * absmax + 1)
    events.append(2 * wide + 1)
    return events


def _adapter(run: Run) -> list[int]:
    """PEFT makes adapter weights in the base layer's dtype and casts them to float32 (cast_adapter_dtype)."""
    new, s = run.program.new, run.settings
    events: list[int] = []
    narrow: list[int] = []
    if s.frozen_dtype != "fp32":
        narrow = [new(p.numel * ITEMSIZE[s.weights_dtype], "adapter weight, uncast", "", p.name) for p in run.parameters]
        events += [2 * i for i in narrow]
    for i, p in enumerate(run.parameters):
        events.append(2 * new(p.numel * ITEMSIZE[p.dtype], "adapter weight", "adapter", p.name))
        if narrow:
            events.append(2 * narrow[i] + 1)
    return events


def _modules(run: Run) -> Iterator[tuple[str, Module, int | None]]:
    a = run.architecture
    for module in a.before:
        yield module.name, module, None
    for layer, kind in enumerate(a.order):
        for module in a.kinds[kind].modules:
            yield f"{a.layer_prefix}.{layer}.{module.name}", module, layer
    for module in (*a.after, *(() if a.tied else (a.output,))):
        yield module.name, module, None
