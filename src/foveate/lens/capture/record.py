"""What a lens saw of one sequence at one layer, call after call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.lens.capture.tiles import Readings
from foveate.lens.measures import Measure, Tokens


@dataclass(eq=False)
class Record:
    """Readings joined over the calls of a sequence: queries in order, keys by their position in the sequence.

    Args:
        batch: sequences side by side.
        is_open: False once another sequence came; then nothing is added.
    """

    batch: int
    is_open: bool = True
    live: list[Tensor] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, new: Readings, measures: tuple[Measure, ...], tokens: Tokens, seen: int) -> None:
        """One more call; `seen` are the tokens of the sequence so far."""
        heads = next(iter(new.values.values())).shape[1] if new.values else new.live.shape[1]
        self.live.append(new.live.expand(-1, heads, -1))
        for measure in measures:
            if measure.over == "queries":
                self.rows.setdefault(measure.name, []).append(new.values[measure.name])
            else:
                self._sum(measure.name, by_position(new.values[measure.name], tokens, seen))
        self._sum("visible", by_position(new.visible.expand(-1, heads, -1), tokens, seen))

    def _sum(self, name: str, value: Tensor) -> None:
        so_far = self.totals.get(name)
        if so_far is not None:
            value = value + F.pad(so_far, (0, value.shape[-1] - so_far.shape[-1]))
        self.totals[name] = value

    def values(self, measure: Measure) -> Tensor:
        """`(B, Hq, queries looked at)`, or `(B, Hq, positions)` for a measure over keys."""
        if measure.over == "queries":
            return torch.cat(self.rows[measure.name], 2)
        return measure.finish(self.totals[measure.name], self.totals["visible"])

    def reduced(self, measure: Measure) -> Float[Tensor, "b h"]:
        """One number for each sequence and head; NaN where nothing counted."""
        count = torch.cat(self.live, 2) if measure.over == "queries" else self.totals["visible"]
        return measure.reduce(self.values(measure), count).detach()

    def map(self, head: int) -> Float[Tensor, "b r n"]:
        """The rows of weights that were kept of a head, over all positions."""
        parts = self.maps[head]
        return torch.cat([F.pad(part, (0, parts[-1].shape[-1] - part.shape[-1])) for part in parts], 1)


def by_position(values: Float[Tensor, "b h s"], tokens: Tokens, seen: int) -> Float[Tensor, "b h n"]:
    """What belongs to slots, at the positions that they hold; what belongs to no single token is left out."""
    groups = values.shape[1] // tokens.positions.shape[1]
    places = tokens.positions.repeat_interleave(groups, 1)
    out = values.new_zeros(*values.shape[:2], seen)
    return out.scatter_add_(2, places.clamp_min(0), values.masked_fill(places < 0, 0.0))
