"""The base class of policies that rank slots by a score, and keep the best of each head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.host.slots.slots import EMPTY
from foveate.kv.base.policy import Policy, check_budget

#: The way in which a layer's budget is shared out between its heads.
Heads = Literal["equal", "adaptive"]


@dataclass(eq=False)
class ScorePolicy(Policy):
    """Each head keeps the tokens with the best scores, of those that it has when the prompt was read.

    A system writes `score`. The base counts the budget in each sequence's own tokens, always keeps sinks and the newest
    tokens, never keeps padding, and shares the budget out between heads. A prompt in several pieces is compressed after
    each piece, to the same share of what has been read so far. Tokens that are made later all stay, unless `every` is
    given. The wrong choice where all of a text may be asked for again, as every eviction is.

    Args:
        share: share of a sequence's tokens that a head keeps, on average over the heads of a layer.
        sink: first tokens that always stay.
        recent: last tokens that always stay.
        heads: "equal" gives each head the same number of tokens; "adaptive" keeps the best scores over all heads of a
            layer (AdaKV), so that heads hold different numbers.
        safeguard: share of its equal budget that each head keeps in any case, and at least one token, where `heads` is
            "adaptive"; 0 for neither.
        every: while decoding, compress again after that many new tokens; None for never.
        layers: numbers of the layers, in the cache, that the policy acts on; None for all.
    """

    share: float = 0.25
    sink: int = 4
    recent: int = 0
    heads: Heads = "equal"
    safeguard: float = 0.2
    every: int | None = None
    layers: tuple[int, ...] | None = None
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.between("share", self.share, 0.0, 1.0)
        validate.count("sink", self.sink)
        validate.count("recent", self.recent)
        validate.one_of("heads", self.heads, ("equal", "adaptive"))
        validate.between("safeguard", self.safeguard, 0.0, 1.0)
        if self.every is not None:
            validate.count("every", self.every, 1)
        if self.layers is not None and not isinstance(self.layers, tuple | list):
            raise OptionError(f"layers={self.layers!r} must be a tuple of layer numbers, or None for all")

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        """Return a score of each slot of the call; larger is better. Scores of empty slots do not matter.

        `hkv` are the heads of `site.k`. A model that expands its stored heads to more gets their mean.
        """

    def layer_share(self, site: Site) -> float:
        """Return the share that this layer's heads keep on average."""
        return self.share

    # -- what the base makes of it -------------------------------------------------------------------------------------

    def at(self, site: Site) -> bool:
        return self.layers is None or site.layer in self.layers

    def keep(self, site: Site) -> Bool[Tensor, "b hkv s"] | None:
        if self.layer_share(site) >= 1.0 or not self._is_due(site):
            return None
        scores, size = self.ranked(site, self.score(site)), self.size(site)
        kept = self._best_of_layer(scores, size) if self.heads == "adaptive" else ranks(scores) < size[:, None, None]
        return kept & (own_positions(site)[0] >= 0)

    def size(self, site: Site) -> Int[Tensor, " b"]:
        """Return how many tokens of each sequence a head keeps, on average over the heads of a layer."""
        _, count = own_positions(site)
        return (count * self.layer_share(site)).round().long().clamp_min(1)

    def stays(self, site: Site) -> Bool[Tensor, "b h s"]:
        """Return the slots of the tokens that stay in any case: sinks, and the newest where not all of both fit."""
        (own, count), size = own_positions(site), self.size(site)
        sinks = (size - 1).clamp_max(self.sink)
        newest = (size - sinks).clamp_max(self.recent)
        return ((own >= 0) & (own < sinks[:, None, None])) | (own >= (count - newest)[:, None, None])

    def ranked(self, site: Site, scores: Float[Tensor, "b hk s"]) -> Float[Tensor, "b h s"]:
        """Return scores of the cache's heads, with the tokens that stay in any case at inf, and no tokens at -inf."""
        own, _ = own_positions(site)
        scores = scores.float().unflatten(1, (own.shape[1], -1)).mean(2)  # keys that models expand have more heads
        return scores.masked_fill(self.stays(site), torch.inf).masked_fill(own < 0, -torch.inf)

    def _best_of_layer(self, scores: Float[Tensor, "b h s"], size: Int[Tensor, " b"]) -> Bool[Tensor, "b h s"]:
        """Choose the best slots of all heads together, after those that each head keeps in any case."""
        own = (size * self.safeguard).long().clamp_min(1 if self.safeguard else 0)
        safe = scores.masked_fill(ranks(scores) < own[:, None, None], torch.inf)
        return (ranks(safe.flatten(1)) < (size * scores.shape[1])[:, None]).view_as(scores)

    def _is_due(self, site: Site) -> bool:
        notes = site.notes(self)
        if site.phase == "prefill":
            notes["seen"] = site.seen
            return True
        if self.every is None or site.seen - notes.get("seen", 0) < self.every:
            return False
        notes["seen"] = site.seen
        return True

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        check_budget(budget, length)
        total = cls.tokens(budget, length)
        base = cls()
        sink = min(base.sink, max(0, total - 1))
        return cls(share=float(budget), sink=sink, recent=min(base.recent, max(1, (total - sink) // 2)))


def own_positions(site: Site) -> tuple[Int[Tensor, "b hkv s"], Int[Tensor, " b"]]:
    """Return each slot's position in its own sequence, and the tokens so far.

    Positions of padding, of empty slots and of tentative tokens are negative.
    """
    found, positions = tokens(site), site.positions
    positions = positions.masked_fill(positions >= site.seen, EMPTY)  # tentative tokens, which will be removed again
    if found is not None:
        return found.own(positions), found.count
    return positions, torch.full((positions.shape[0],), site.seen, device=positions.device)


def ranks(scores: Float[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Return the rank of each score along the last axis: 0 for the largest, and for the first slot of equal scores."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    numbers = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, numbers.expand_as(order))
