"""The measurements of one sequence at one layer, joined over its calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
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
    seen: int = 0
    counted: list[Tensor] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    applies: dict[str, list[Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    askers: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, new: Measurements, measures: tuple[Measure, ...], tokens: KeyTokens, seen: int) -> None:
        """Add one call; `seen` is the number of the sequence's tokens so far."""
        heads = next(iter(new.values.values())).shape[1] if new.values else new.counted.shape[1]
        self.seen = seen
        self.counted.append(new.counted.expand(-1, heads, -1))
        for measure in measures:
            if measure.over == "queries":
                self.rows.setdefault(measure.name, []).append(new.values[measure.name])
            else:
                _sum(self.totals, measure.name, by_position(new.values[measure.name], tokens, seen))
        for name, applies in new.applies.items():
            self.applies.setdefault(name, []).append(applies.expand(self.batch, heads, -1).clone())
        for name, askers in new.askers.items():
            _sum(self.askers, name, askers.expand(-1, heads, -1))
        _sum(self.totals, "visible", by_position(new.visible.expand(-1, heads, -1), tokens, seen))

    def complete(self, name: str, value: Float[Tensor, "b h 1"], applies: Bool[Tensor, "b 1 1"] | None) -> None:
        """Replace the last row of a measure, which had to wait for the token after it."""
        self.rows[name][-1][..., -1:] = value
        if applies is not None:
            self.applies[name][-1][..., -1:] = applies

    def values(self, measure: Measure) -> Tensor:
        """Return `(B, Hq, measured queries)`, or `(B, Hq, positions)` for a measure over keys."""
        measure.check(self.seen)
        if measure.over == "queries":
            return torch.cat(self.rows[measure.name], 2)
        return measure.finish(self.totals[measure.name], self._askers(measure))

    def reduced(self, measure: Measure) -> Float[Tensor, "b h"]:
        """Return one number for each sequence and head; NaN if no query counted."""
        if measure.over == "keys":
            count = self._askers(measure)
        else:
            count = torch.cat(self.counted, 2)
            if measure.name in self.applies:
                count = count & torch.cat(self.applies[measure.name], 2)
        return measure.reduce(self.values(measure), count).detach()

    def _askers(self, measure: Measure) -> Float[Tensor, "b h n"]:
        return self.askers.get(measure.name, self.totals["visible"])

    def map(self, head: int) -> Float[Tensor, "b r n"]:
        """Return the kept rows of a head's weights, over all positions."""
        parts = self.maps[head]
        return torch.cat([F.pad(part, (0, parts[-1].shape[-1] - part.shape[-1])) for part in parts], 1)


def _sum(totals: dict[str, Tensor], name: str, value: Float[Tensor, "b h n"]) -> None:
    """Add a call's sums of keys to those of earlier calls, which had fewer keys."""
    so_far = totals.get(name)
    totals[name] = value if so_far is None else value + F.pad(so_far, (0, value.shape[-1] - so_far.shape[-1]))


def by_position(values: Float[Tensor, "b h s"], tokens: KeyTokens, seen: int) -> Float[Tensor, "b h n"]:
    """Move values from slots to the positions that they hold; slots that are no single token are left out."""
    groups = values.shape[1] // tokens.positions.shape[1]
    places = tokens.positions.repeat_interleave(groups, 1)
    out = values.new_zeros(*values.shape[:2], seen)
    return out.scatter_add_(2, places.clamp_min(0), values.masked_fill(places < 0, 0.0))
