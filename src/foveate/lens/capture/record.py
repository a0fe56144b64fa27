"""The measurements of one sequence at one layer, joined over its calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.lens.capture.tiles import Measurements
from foveate.lens.measures import KeyTokens, Measure


@dataclass(eq=False)
class Record:
    """Measurements joined over the calls of a sequence: queries in order, keys by their position in the sequence.

    Args:
        batch: the batch size.
        is_open: False after another sequence has started; then nothing more is added.
    """

    batch: int
    is_open: bool = True
    counted: list[Tensor] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, new: Measurements, measures: tuple[Measure, ...], tokens: KeyTokens, seen: int) -> None:
        """Add one call; `seen` is the number of the sequence's tokens so far."""
        heads = next(iter(new.values.values())).shape[1] if new.values else new.counted.shape[1]
        self.counted.append(new.counted.expand(-1, heads, -1))
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
        """Return `(B, Hq, measured queries)`, or `(B, Hq, positions)` for a measure over keys."""
        if measure.over == "queries":
            return torch.cat(self.rows[measure.name], 2)
        return measure.finish(self.totals[measure.name], self.totals["visible"])

    def reduced(self, measure: Measure) -> Float[Tensor, "b h"]:
        """Return one number for each sequence and head; NaN if no query counted."""
        count = torch.cat(self.counted, 2) if measure.over == "queries" else self.totals["visible"]
        return measure.reduce(self.values(measure), count).detach()

    def map(self, head: int) -> Float[Tensor, "b r n"]:
        """Return the kept rows of a head's weights, over all positions."""
        parts = self.maps[head]
        return torch.cat([F.pad(part, (0, parts[-1].shape[-1] - part.shape[-1])) for part in parts], 1)


def by_position(values: Float[Tensor, "b h s"], tokens: KeyTokens, seen: int) -> Float[Tensor, "b h n"]:
    """Move values from slots to the positions that they hold; slots that are no single token are left out."""
    groups = values.shape[1] // tokens.positions.shape[1]
    places = tokens.positions.repeat_interleave(groups, 1)
    out = values.new_zeros(*values.shape[:2], seen)
    return out.scatter_add_(2, places.clamp_min(0), values.masked_fill(places < 0, 0.0))
