"""Forward passes of a whole model without gradients, as evaluation and generation run them.

The pieces are those of a training step (step.py), played in another mode. Sources: transformers/models/*/modeling_*.py,
generation/utils.py (GenerationMixin: `past_key_values` go from one pass to the next).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vramplan.planner import step
from vramplan.planner.cache import Cache
from vramplan.planner.run import Stretch, alive, dtype_of, last_frees_only, linked, moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.blocks import Settings
    from vramplan.planner.run import Run
    from vramplan.planner.trainer import Trainer


@dataclass(slots=True)
class Passes:
    """Passes on the program of a run, one after another; `cached` are ids of each layer's keys and values so far."""

    run: Run
    cached: list[list[int]] = field(default_factory=list)
    _caches: dict[tuple[object, ...], Cache] = field(default_factory=dict)  # by what tells layers apart

    def forward(self, s: Settings, trainer: Trainer, name: str) -> tuple[list[Stretch], list[int]]:
        """One pass under `name`, and the ids of what it leaves beside keys and values."""
        run, a = self.run, self.run.architecture
        inner = step.embedded_dtype(a, run.outer, s)
        shared = step.shared(a, run.outer, s)
        played: dict[tuple[object, ...], step.Piece] = {}
        order: list[tuple[object, ...]] = []
        dtype = inner
        for layer, signature in enumerate(run.signatures):
            key = (*signature, dtype)
            if key not in played:
                kind, cache = a.kinds[a.order[layer]], None
                if s.mode == "generation":
                    cache = self._caches.setdefault(key, Cache(kind.attention.sliding_window, s.caches_as_keys))
                    cache.holds(s.past)
                played[key] = step.play_layer(
                    kind, run.layers[layer], s, shared, dtype, a.hidden_size, False, False, cache
                )
            order.append(key)
            dtype = dtype_of(played[key].sizes[played[key].made], s, a.hidden_size)
        outer = step.play_around(a, run.outer, s, inner, dtype, False, False, trainer)
        return self._put_together(played, order, outer, name)

    def _put_together(
        self, played: dict[tuple[object, ...], step.Piece], order: Sequence[tuple[object, ...]], outer: step.Around,
        name: str,
    ) -> tuple[list[Stretch], list[int]]:  # fmt: skip
        """Layers of one kind share the ids of what is gone when they return; what stays is each one's own."""
        program = self.run.program
        base = program.place(outer.tape)
        bases = {key: program.place(piece) for key, piece in played.items()}
        stays = {key: alive(piece.forward) | {piece.made} for key, piece in played.items()}
        current = base + outer.embeds
        several = {current, *(base + i for i in outer.shared.values())}
        beside = {i - base: i for i in several}
        start, left, _ = outer.split
        stretches: list[Stretch] = []
        positions: list[tuple[int, ...]] = []
        leaving: list[Stretch] = []

        def add(title: str, events: Sequence[int], at: int, links: dict[int, int]) -> None:
            positions.append(linked(events, links))
            stretches.append(Stretch(title, moved(events, at, links, positions[-1])))

        add(f"{name}, embeddings", outer.events[:start], base, beside)
        before, self.cached = self.cached, []
        returned: list[int] = []
        for number, key in enumerate(order):
            piece, at = played[key], bases[key]
            links = {i: base + outer.shared[shared] for shared, i in piece.shared.items()} | {piece.given: current}
            for i in stays[key]:
                part = "KV cache" if i in piece.cache else ""
                links[i] = program.new(piece.sizes[i], piece.labels[i], part, piece.scopes[i])
            if piece.cache:
                *old, keys, values = piece.cache
                links |= dict(zip(old, before[number] if before else (), strict=True))
                self.cached.append([links[keys], links[values]])
            add(f"{name}, layer {number}", piece.forward, at, links)
            stretches[-1].events.extend(2 * i + 1 for i in returned)
            returned = [links[i] for i in piece.returned]
            if piece.leaving:
                leaving.append(Stretch("autocast ends", moved(piece.leaving, at, links, linked(piece.leaving, links))))
            current = links[piece.made]
        add(f"{name}, head", outer.events[start:left], base, beside | {outer.hidden: current})
        last_frees_only(stretches, positions, several)
        stretches[-1].events[:0] = [2 * i + 1 for i in returned]
        stretches += [*leaving, Stretch(f"{name}, outputs", moved(outer.events[left:], base, {}, ()))]
        made = alive(e for stretch in stretches for e in stretch.events)
        return stretches, sorted(made.difference(*self.cached))
