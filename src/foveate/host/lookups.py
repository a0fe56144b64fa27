"""The slots that a sequence's last queries attend to, and whether a policy lets the same heads see them.

Only the rows of those queries are computed, in each layer, and of each row only the largest weights are held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile


@dataclass(frozen=True, eq=False)
class LookUps:
    """Slots that queries attend to, one entry for each layer, query head, query and slot.

    Args:
        layer, head, step, slot: an entry's layer in the cache, its query head, the number of its query, and the
            position of its slot.
        mass: its attention weight.
    """

    layer: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    step: Int[Tensor, " n"]
    slot: Int[Tensor, " n"]
    mass: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.mass.numel()


@dataclass(eq=False)
class LookUpReader(Method):
    """Reads which slots the last `queries` of one sequence attend to. For one call that reads the whole sequence.

    Sinks and near tokens take most of the mass of most heads and are no look-ups, so they are left out.

    Args:
        queries: number of queries at the end of the sequence.
        first, last: positions of the slots that count, `first <= position < last`.
        most: slots held of each row, those with the largest weights.
        least: the smallest weight that counts.
    """

    queries: int
    first: int
    last: int
    most: int = 8
    least: float = 0.05
    _found: list[LookUps] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.count("queries", self.queries, 1)
        validate.count("most", self.most, 1)
        validate.between("least", self.least, 0.0, 1.0)

    def read(self, site: Site, out: Tensor) -> None:
        n = site.q.shape[2]
        tile = weight_tile(site, slice(max(0, n - self.queries), n))
        positions = site.positions[0, 0, tile.keys]
        weights = tile.weights[0].masked_fill((positions < self.first) | (positions >= self.last), 0.0)
        mass, index = weights.topk(min(self.most, weights.shape[-1]), -1)
        head, step, rank = (mass >= self.least).nonzero(as_tuple=True)
        slot = positions[index[head, step, rank]]
        layer = torch.full_like(head, site.layer)
        self._found.append(LookUps(*(x.cpu() for x in (layer, head, step, slot, mass[head, step, rank].float()))))

    def found(self) -> LookUps:
        """Return the look-ups of all layers."""
        names = ("layer", "head", "step", "slot", "mass")
        return LookUps(*(torch.cat([getattr(each, name) for each in self._found]) for name in names))


@dataclass(eq=False)
class VisibilityReader(Method):
    """Reads whether the heads of a run see the slots that `wanted` names, when the run reaches the same queries.

    Args:
        wanted: the look-ups of another run on the same tokens.
        prompt: the tokens up to the first query, that one included; later queries come one in a call.
        seen: for each entry 1 if the slot was there and visible, 0 if it was not, -1 if that is unknown, as where an
            operator replaces attention.
    """

    wanted: LookUps
    prompt: int
    seen: Int[Tensor, " n"] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = torch.full_like(self.wanted.slot, -1)

    def read(self, site: Site, out: Tensor) -> None:
        entries = ((self.wanted.layer == site.layer) & (self.wanted.step == site.seen - self.prompt)).nonzero()[:, 0]
        if not entries.numel() or (site.replaced and site.is_whole):
            return
        n = site.q.shape[2]
        tile = weight_tile(site, slice(n - 1, n))
        positions = site.positions[0, :, tile.keys]
        head, slot = self.wanted.head[entries].to(positions.device), self.wanted.slot[entries].to(positions.device)
        there = positions[head // (site.q.shape[1] // positions.shape[0])] == slot[:, None]
        self.seen[entries] = (there & _visible(tile.seen, head)).any(-1).long().cpu()


def _visible(seen: Bool[Tensor, "b h q k"] | None, head: Int[Tensor, " n"]) -> Bool[Tensor, "#n k"] | Bool[Tensor, ""]:
    """Return the keys that each entry's head sees."""
    if seen is None:
        return torch.ones((), dtype=torch.bool, device=head.device)
    rows = seen[0, :, 0]
    return rows[head] if rows.shape[0] > 1 else rows
