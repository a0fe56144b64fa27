"""The base class of policies that rank slots by a score, and keep the best of each head."""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host import Host
from foveate.host.method import overrides
from foveate.host.padding import tokens
from foveate.host.pass_end import PassEnd
from foveate.host.site import Site
from foveate.host.slots.ends import AT_END, AtEnd
from foveate.host.slots.slots import EMPTY
from foveate.kv.base.policy import Policy, check_budget, check_layers

#: The way in which the budget is shared out between heads.
Heads = Literal["equal", "adaptive", "global"]

_SCORES = "scores"
#: The note of a pass that heads of a layer may keep different numbers of tokens, whatever a policy's own `heads` is.
UNEVEN = "heads keep different numbers of tokens"


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
            layer (AdaKV), "global" over all heads of all layers, so that heads hold different numbers. Scores then have
            to mean the same in all of them.
        safeguard: share of its equal budget that each head keeps in any case, and at least one token, where `heads` is
            not "equal"; 0 for neither.
        threshold: keep the tokens whose score is at least this, in place of a share; what is kept follows the text.
        limit: most tokens that a head keeps, on average over the heads of a layer; None for no limit.
        every: while decoding, compress again after that many new tokens; None for never.
        layers: numbers of the layers, in the cache, that the policy acts on; None for all.
    """

    share: float = 0.25
    sink: int = 4
    recent: int = 0
    heads: Heads = "equal"
    safeguard: float = 0.2
    threshold: float | None = None
    limit: int | None = None
    every: int | None = None
    layers: tuple[int, ...] | None = None
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.between("share", self.share, 0.0, 1.0)
        validate.count("sink", self.sink)
        validate.count("recent", self.recent)
        validate.one_of("heads", self.heads, get_args(Heads))
        validate.between("safeguard", self.safeguard, 0.0, 1.0)
        if self.threshold is not None:
            validate.at_least("threshold", self.threshold, -math.inf)
        for name in ("limit", "every"):
            if getattr(self, name) is not None:
                validate.count(name, getattr(self, name), 1)
        if self.heads == "global" and overrides(self, "refit"):
            raise OptionError(f'heads="global" chooses when queries are gone, and {type(self).__name__} needs them')
        if self.heads == "global" and self.threshold is None and self.every is not None:
            raise OptionError(
                f'heads="global" compares layers after a prompt only, so that every={self.every} must be None'
            )
        if self.layers is not None and not isinstance(self.layers, tuple | list):
            raise OptionError(f"layers={shown(self.layers)} must be a tuple of layer numbers, or None for all")

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

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_layers(self.layers, host)

    def at(self, site: Site) -> bool:
        return self.layers is None or site.layer in self.layers

    def keep(self, site: Site) -> Bool[Tensor, "b hkv s"] | AtEnd | None:
        if self.is_off(site) or not self.is_due(site):
            return None
        scores = self.ranked(site, self._checked(site, self.score(site)))
        if self.heads == "global" and self.threshold is None:
            site.step[_SCORES, self, site.layer] = scores
            return AT_END
        kept = self.best(site, scores)
        self.note_kept(site, kept)
        return kept

    def _checked(self, site: Site, scores: object) -> Float[Tensor, "b hk s"]:
        """Refuse what is no score of each slot: a policy of one's own gets one line in place of a later error."""
        wanted = tuple(site.k.shape[:3])
        if not isinstance(scores, Tensor) or scores.ndim != 3 or tuple(scores.shape[:2]) != wanted[:2]:
            raise ShapeError(
                f"{type(self).__name__}.score must return a tensor (B, heads of the keys, slots)={wanted}; got "
                f"{shown(scores)}"
            )
        return scores

    def keep_all(self, end: PassEnd) -> list[Tensor | None]:
        return self.best_of_all(end.sites, [site.step.pop((_SCORES, self, site.layer)) for site in end.sites])

    def is_off(self, site: Site) -> bool:
        """Return whether this layer keeps everything."""
        return self.threshold is None and self.limit is None and self.layer_share(site) >= 1.0

    def best(self, site: Site, scores: Float[Tensor, "b h s"]) -> Bool[Tensor, "b h s"]:
        """Choose a layer's slots by their scores, given as by `ranked`."""
        if self.threshold is not None:
            real = site.real_queries if tokens(site) is not None else None
            waits = False if real is None else ~real.any(-1).to(scores.device)[:, None, None]  # nothing new was read
            return ((scores >= self.threshold) | waits) & ~scores.isneginf()
        if self.heads == "adaptive":
            kept = self._best_of_layer(scores, self.size(site))
        else:
            known = self._known_size(site)
            kept = ranks(scores) < self.size(site)[:, None, None] if known is None else top(scores, known)
        return kept & ~scores.isneginf()

    def best_of_all(self, sites: list[Site], scores: list[Float[Tensor, "b h s"]]) -> list[Tensor | None]:
        """Choose the slots of several layers; all heads of all layers together if `heads` is "global"."""
        if self.heads == "global" and self.threshold is None:
            kept = self._best_of_model(sites, scores)
        else:
            kept = [self.best(site, each) for site, each in zip(sites, scores, strict=True)]
        out: list[Tensor | None] = []
        for site, each in zip(sites, kept, strict=True):  # a call with drafts has more slots than got scores
            whole = F.pad(each, (0, site.positions.shape[2] - each.shape[2]))
            self.note_kept(site, whole)
            out.append(whole)
        return out

    def note_kept(self, site: Site, kept: Bool[Tensor, "b h s"]) -> None:
        """Update notes on the tokens of a layer, given what it keeps."""

    def size(self, site: Site) -> Int[Tensor, " b"]:
        """Return how many tokens of each sequence a head keeps, on average over the heads of a layer."""
        _, count = own_positions(site)
        size = (count * self.layer_share(site)).round().long().clamp_min(1)
        return size if self.limit is None else size.clamp_max(self.limit)

    def _known_size(self, site: Site) -> int | None:
        """Return `size` as a number without asking the device; None if sequences differ, or a subclass sets it."""
        if tokens(site) is not None or type(self).size is not ScorePolicy.size:
            return None
        size = max(1, round(_single(_single(site.seen) * _single(self.layer_share(site)))))
        return size if self.limit is None else min(size, self.limit)

    def stays(self, site: Site) -> Bool[Tensor, "b h s"]:
        """Return the slots of the tokens that stay in any case: sinks, and the newest where not all of both fit."""
        own, count = own_positions(site)
        size = self.size(site) if self.threshold is None else count
        sinks = (size - 1).clamp_max(self.sink)
        newest = (size - sinks).clamp_max(self.recent)
        return ((own >= 0) & (own < sinks[:, None, None])) | (own >= (count - newest)[:, None, None])

    def ranked(self, site: Site, scores: Float[Tensor, "b hk s"]) -> Float[Tensor, "b h s"]:
        """Return scores of the cache's heads: inf for tokens that stay in any case.

        They are -inf for empty slots, and for tokens that leave the layer's window after the call.
        """
        own, _ = own_positions(site)
        scores = scores.float().unflatten(1, (own.shape[1], -1)).mean(2)  # keys that models expand have more heads
        gone, window = own < 0, None if site.slots is None else site.slots.window
        if window is not None:
            gone = gone | (site.positions <= site.seen - window)
        return scores.masked_fill(self.stays(site), torch.inf).masked_fill(gone, -torch.inf)

    def _best_of_layer(self, scores: Float[Tensor, "b h s"], size: Int[Tensor, " b"]) -> Bool[Tensor, "b h s"]:
        """Choose the best slots of all heads together, after those that each head keeps in any case."""
        safe = self._safe(scores, size)
        return (ranks(safe.flatten(1)) < (size * scores.shape[1])[:, None]).view_as(scores)

    def _best_of_model(self, sites: list[Site], scores: list[Float[Tensor, "b h s"]]) -> list[Bool[Tensor, "b h s"]]:
        sizes = [self.size(site) for site in sites]
        safe = [self._safe(each, size).flatten(1) for each, size in zip(scores, sizes, strict=True)]
        total = torch.stack([size * each.shape[1] for each, size in zip(scores, sizes, strict=True)]).sum(0)
        kept = (ranks(torch.cat(safe, 1)) < total[:, None]).split([each.shape[1] for each in safe], 1)
        return [part.view_as(each) & ~each.isneginf() for part, each in zip(kept, scores, strict=True)]

    def _safe(self, scores: Float[Tensor, "b h s"], size: Int[Tensor, " b"]) -> Float[Tensor, "b h s"]:
        """Return scores with inf for the tokens that each head keeps in any case."""
        own = (size * self.safeguard).long().clamp_min(1 if self.safeguard else 0)
        return scores.masked_fill(ranks(scores) < own[:, None, None], torch.inf)

    def is_due(self, site: Site) -> bool:
        """Return whether it is time to compress, and note the time if so."""
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


def _single(x: float) -> float:
    """Round a number to single precision, in which `size` is computed."""
    return struct.unpack("f", struct.pack("f", x))[0]


def top(scores: Float[Tensor, "*b n"], size: int) -> Bool[Tensor, "*b n"]:
    """Return the `size` largest scores along the last axis, and of equal ones the first: `ranks(scores) < size`.

    Scores must not be NaN.
    """
    n = scores.shape[-1]
    if size >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.kthvalue(n - size + 1, dim=-1, keepdim=True).values
    above, level = scores > least, scores == least
    return above | (level & (level.cumsum(-1) <= size - above.sum(-1, keepdim=True)))


def ranks(scores: Float[Tensor, "*b n"]) -> Int[Tensor, "*b n"]:
    """Return the rank of each score along the last axis: 0 for the largest, and for the first slot of equal scores."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    numbers = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, numbers.expand_as(order))
