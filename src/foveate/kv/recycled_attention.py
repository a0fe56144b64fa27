"""Recycled Attention: some steps are full; the steps between them read what the last full step attended to.

Recycled Attention: Efficient inference for long-context language models (2024), arXiv 2411.05787. There is no official
code. Three points that the paper leaves open are arguments here: the place of the first full step in the schedule
(`phase`), whether the set grows with new tokens (`grow`), and the smoothing (`pool`). We reconstructed how layers agree
on a dynamic schedule: all compare at the same step, and the mean decides about the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.scoring import safe_softmax
from foveate.core.selection import Indices, Selection
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.padding import last_query, tokens
from foveate.host.probing import logits_of, read
from foveate.host.site import Site
from foveate.kv.base.policy import Policy
from foveate.kv.parts.head_split import check_reach, far_layers, far_numbers
from foveate.kv.parts.last_query import cosine, has_everything, last_logits, top_keys


@dataclass(frozen=True)
class Dynamic:
    """A dynamic schedule: every `every` tokens, the layers compare their query with that of the last full step.

    If the mean cosine over layers and sequences is below the threshold, the next step is full. Each comparison makes
    the host wait for the device once.
    """

    threshold: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        validate.between("threshold", self.threshold, -1.0, 1.0)
        validate.count("every", self.every, 1)


@final
@dataclass(eq=False)
class RecycledAttention(Policy):
    """Every `stride`-th decoding step is full and chooses `k` tokens per head; the others read these and newer tokens.

    Nothing is evicted, so that a token that was not chosen can be chosen later: memory stays, and reads fall to about
    `1 / stride + k / N`. Prefill is dense and makes the first choice. The wrong choice if each token needs other
    distant tokens than the one before. Layers with a window of their own, or from which another method evicts, read all
    that they hold.

    Args:
        k: tokens chosen per key/value head.
        stride: a full step every so many tokens; 1 is dense decoding.
        group_reduce: how the weights of the query heads of one key/value head are combined.
        pool: odd width of a max-pool along the weights, which also chooses neighbours; 0 is none.
        dynamic: a dynamic schedule that replaces `stride`. It couples the sequences of a batch.
        grow: whether the set grows by each token until the next full step; else each new token replaces the one with
            the least weight.
        phase: the first full step after the prompt; the others follow every `stride` steps. 0 counts from the prompt.
    """

    k: int = 4096
    stride: int = 50
    group_reduce: Literal["max", "mean"] = "max"
    pool: int = 0
    dynamic: Dynamic | None = None
    grow: bool = True
    phase: int = 0
    in_place: ClassVar[bool] = True
    _far: frozenset[int] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("stride", 1), ("pool", 0), ("phase", 0)):
            validate.count(name, getattr(self, name), least)
        validate.one_of("group_reduce", self.group_reduce, ("max", "mean"))
        if self.pool and self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, or 0 for none")
        validate.flag("grow", self.grow)
        if self.dynamic is not None and not isinstance(self.dynamic, Dynamic):
            raise OptionError(f"dynamic must be a Dynamic(threshold, every) or None; got {type(self.dynamic).__name__}")

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_reach("k: recycled_attention", self.k, host)
        self._far = far_numbers(host)

    def at(self, site: Site) -> bool:
        return site.layer in self._far and has_everything(site)

    def select(self, site: Site) -> Selection | None:
        notes, total = site.notes(self), site.k.shape[2]
        if self._is_full(site) or "chosen" not in notes:
            return None
        chosen, since = notes["chosen"], torch.arange(notes["seen"], total, device=site.k.device)
        if not self.grow:
            chosen = chosen[..., : max(0, chosen.shape[-1] - since.numel())]  # sorted by weight
            since = since[-self.k :]
        index = torch.cat([chosen, since.expand(*chosen.shape[:2], -1)], -1)[:, :, None]
        return Indices(index, 1, total) if index.shape[-1] < total else None

    def read(self, site: Site, out: Tensor) -> None:
        notes = site.notes(self)
        if self._is_full(site):
            notes.update(chosen=self._choose(site), seen=site.seen)
            if self.dynamic is not None:
                notes["query"] = last_query(site)[0].clone()
            return
        shared = site.notes(self, all_layers=True)
        if self.dynamic is not None and shared["step"] % self.dynamic.every == 0 and "query" in notes:
            shared["cosines"].append(cosine(site.q[:, :, -1], notes["query"]).mean())

    def _is_full(self, site: Site) -> bool:
        """Return whether this is a full step; the first layer of a pass decides for all layers."""
        if id(self) in site.step:
            return site.step[id(self)]
        shared = site.notes(self, all_layers=True)
        if site.phase == "prefill" or shared.get("seen") != site.seen - 1:  # the cache may be cropped or copied
            shared["step"], full = 0, True
        else:
            shared["step"] += 1
            full = self._is_due(shared["step"], shared["cosines"])
        shared["seen"], shared["cosines"], site.step[id(self)] = site.seen, [], full
        return full

    def _is_due(self, step: int, cosines: list[Tensor]) -> bool:
        if self.dynamic is None:
            return step >= self.phase and (step - self.phase) % self.stride == 0
        if not cosines:
            return False
        mean = torch.stack([cosine.to(cosines[0].device) for cosine in cosines]).mean()
        return mean.item() < self.dynamic.threshold  # the host waits for the device here

    def _choose(self, site: Site) -> Int[Tensor, "b hkv k"]:
        """Choose the keys that each sequence's last token attends to; without a new token the last choice stays."""
        weights = safe_softmax(last_logits(site)).unflatten(1, (site.k.shape[1], -1))
        scores = weights.amax(2) if self.group_reduce == "max" else weights.mean(2)
        has, before = last_query(site)[1], site.notes(self).get("chosen")
        padded = tokens(site)
        if has is not None and padded is not None and (before is None or before.shape[2] < self.k):
            real = padded.real[:, None].to(scores.dtype)
            return top_keys(torch.where(has[:, None, None], scores, real), self.k, site, self.pool)
        chosen = top_keys(scores, self.k, site, self.pool)
        return chosen if has is None or before is None else torch.where(has[:, None, None], chosen, before)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. A quarter of the budget pays for full steps, or less if the stride reaches 50.

        Choices are smoothed over 13 tokens: the tokens after a chosen one are often needed in the next steps. The width
        was chosen on the lab's needle task, so its score there is not independent.
        """
        cls.tokens(budget, length)
        stride = min(50, max(2, math.ceil(4 / max(budget, 0.08))))
        sparse = max(0.0, budget - 1 / stride) / (1 - 1 / stride)
        return cls(max(1, round(sparse * length - stride / 2)), stride, pool=13)


class Overlap(NamedTuple):
    """Share of the attention mass that is recovered, per lag, by an earlier step's choice and by sinks and a window."""

    recycled: Float[Tensor, " lags"]
    sink_recent: Float[Tensor, " lags"]


@torch.no_grad()
def attention_overlap(model: object, ids: Int[Tensor, "b n"], k: int, lags: Sequence[int]) -> Overlap:
    """Measure how well a step's `k` strongest keys serve later steps.

    That is the weight that queries `lag` tokens later give to these keys and to newer tokens, compared with the weight
    that they give to the same number of sinks (4) and recent tokens. Both are means over heads, sequences, and the
    layers that attend to all tokens.

    Args:
        model: a decoder.
        ids: text without padding, longer than the largest lag.
        k: keys in a set.
        lags: distances, at least 0.
    """
    here = host(model)
    validate.at_least("k", k, 1)
    start = ids.shape[1] - 1 - max(lags)
    if start < 0 or min(lags) < 0:
        raise OptionError(f"lags={tuple(lags)} must be in 0..{ids.shape[1] - 1} for {ids.shape[1]} tokens")
    recovery = _Recovery(k, start, [start + lag for lag in lags], [x.layer for x in far_layers(layout(here))])
    read(here, ids, recovery)
    return Overlap(*torch.stack(recovery.found).mean(0))


class _Recovery(Method):
    """A method that reads, layer by layer, the mass of later rows on a set that was chosen at row `start`."""

    def __init__(self, k: int, start: int, rows: list[int], layers: list[int]) -> None:
        self.k, self.start, self.rows, self.layers = k, start, rows, layers
        self.found: list[Tensor] = []

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.layers

    def read(self, site: Site, out: Tensor) -> None:
        weights = torch.cat([self._row(site, row) for row in (self.start, *self.rows)], 2)
        key = torch.arange(weights.shape[-1], device=weights.device)
        scores = weights[:, :, 0].unflatten(1, (site.k.shape[1], -1)).amax(2)[..., : self.start + 1]
        chosen = scores.topk(min(self.k, scores.shape[-1])).indices.repeat_interleave(site.groups, 1)
        top = torch.zeros_like(weights[:, :, 0], dtype=torch.bool).scatter_(2, chosen, True)
        sinks = min(4, self.k)
        near = (key < sinks) | (key > self.start - (self.k - sinks))
        since = key > self.start
        both = torch.stack([top, near.expand_as(top)]) | since
        self.found.append((weights[:, :, 1:] * both[..., None, :]).sum(-1).mean((1, 2)).cpu())

    def _row(self, site: Site, row: int) -> Float[Tensor, "b hq 1 s"]:
        weights = safe_softmax(logits_of(site, torch.tensor([row], device=site.q.device)))
        return F.pad(weights, (0, site.k.shape[2] - weights.shape[-1]))
