"""TokenSelect: all heads of a layer vote on which tokens of the cache are worth reading.

TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
Selection (2024), arXiv 2411.02886. Positions are kept: the renumbering that carries a model past its trained length
needs keys from before the rotary embedding, and a site's keys come after it. Where heads are grouped, a query head
scores the keys of its own group; the release's kernel reads them in another order. The release ships with its selection
cache off (here: a `sim_threshold` over 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.scoring import dot_product, safe_softmax
from foveate.core.selection import Indices, Selection
from foveate.host.model import Host
from foveate.host.site import Site
from foveate.kv.policy import Policy
from foveate.kv.reading import cosine, has_everything, max_pooled, visible


@final
@dataclass(eq=False)
class TokenSelect(Policy):
    """Each step and each prompt chunk reads the sinks, a local window and `k` tokens that the layer's heads vote for.

    Nothing is evicted: memory stays, and reads fall to `(sink + local + k) / N` plus one scoring pass over the keys,
    which is left out while the query stays similar. Works on a frozen model without calibration. The wrong choice where
    memory is what runs short, or where the heads of a layer need different tokens (they share one set). Layers with a
    window of their own, or that another method evicts from, read all they have.

    Args:
        sink: first tokens, always read.
        local: tokens before the query, or before its chunk, always read.
        k: tokens voted for among the rest.
        sim_threshold: cosine, between the queries of now and of the last vote, from which its result is used again;
            above 1 every step votes, at -1 the first vote stays.
        pool: odd width of a max-pool along the votes, so that a hit's neighbours come along; 0 is none.
        chunk: queries of a prompt that share one vote, on their mean; also for prompts that come in one call.
    """

    sink: int = 128
    local: int = 512
    k: int = 2048
    sim_threshold: float = 0.9
    pool: int = 0
    chunk: int = 8192

    def __post_init__(self) -> None:
        for name, least in (("sink", 0), ("local", 0), ("k", 1), ("sim_threshold", -1), ("pool", 0), ("chunk", 1)):
            validate.at_least(name, getattr(self, name), least)
        if self.pool and self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, or 0 for none")

    def at(self, site: Site) -> bool:
        return site.seen - 1 > self.sink + self.local + self.k and has_everything(site)

    def select(self, site: Site) -> Selection | None:
        n, total = site.q.shape[2], site.k.shape[2]
        starts = range(0, n, self.chunk)
        if total - n + starts[-1] <= self.sink + self.local + self.k:
            return None
        lists = [self._working_set(site, start, min(start + self.chunk, n)) for start in starts]
        longest = max(index.shape[1] for index, _ in lists)
        index = torch.stack([F.pad(index, (0, longest - index.shape[1])) for index, _ in lists], 1)
        valid = torch.stack([F.pad(real, (0, longest - real.shape[1])) for _, real in lists], 1)
        return Indices(index[:, None], n, total, valid[:, None], min(self.chunk, n))

    def _working_set(self, site: Site, start: int, stop: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """The keys that a piece of the queries reads, in order, and which of them count."""
        batch, device = site.q.shape[0], site.q.device
        past = site.k.shape[2] - site.q.shape[2] + start
        near = torch.arange(past + stop - start, device=device)
        if past <= self.sink + self.local + self.k:
            return near.expand(batch, -1), torch.ones(batch, near.numel(), dtype=torch.bool, device=device)
        near = near[past - self.local :].expand(batch, -1)
        sinks = site.begins[:, None] + torch.arange(self.sink, device=device)
        chosen, real = self._vote(site, start, stop, past)
        index = torch.cat([sinks, chosen, near], 1)
        valid = torch.cat([sinks < past - self.local, real, torch.ones_like(near, dtype=torch.bool)], 1)
        return index.clamp_max(site.k.shape[2] - 1), valid

    def _vote(self, site: Site, start: int, stop: int, past: int) -> tuple[Tensor, Tensor]:
        """`(B, k)` tokens and which of them count: this piece's vote, or the last one where queries are alike."""
        memory, query = site.memory(self), site.q[:, :, start:stop].mean(2)
        alike = torch.zeros_like(site.begins, dtype=torch.bool)
        if memory.get("past", past + 1) <= past:  # else there was no vote, or the cache was cropped to before it
            alike = memory["final"] & (cosine(query, memory["query"]) >= self.sim_threshold)
        memory["past"] = past
        if bool(alike.all()):
            return memory["chosen"], memory["real"]
        key = torch.arange(past, device=query.device)
        candidate = (key >= site.begins[:, None] + self.sink) & (key < past - self.local)
        seen = visible(site, slice(start, stop))
        candidate = candidate if seen is None else candidate & seen[:, :past]
        votes = soft_vote(query, site.k[:, :, :past], self.pool, site.scale, candidate)
        chosen = votes.masked_fill(~candidate, -1.0).topk(self.k).indices.sort().values
        # a sequence that padding makes short reads all it has: no vote to hold on to
        final = past - site.begins > self.sink + self.local + self.k
        fresh = {"query": query, "chosen": chosen, "real": candidate.gather(1, chosen), "final": final}
        for name, value in fresh.items():
            old = alike.view(-1, *[1] * (value.dim() - 1))
            memory[name] = torch.where(old, memory.get(name, value), value)
        return memory["chosen"], memory["real"]

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Sinks, window and votes share it as in the defaults, 1 : 4 : 16; at least 4 sinks."""
        total = cls.tokens(budget, length)
        sink, local = min(128, max(min(4, total // 4), total // 21)), min(512, 4 * total // 21)
        return cls(sink, local, max(1, total - sink - local - 1))


def soft_vote(
    q: Float[Tensor, "*b hq d"],
    k: Float[Tensor, "*b hkv n d"],
    pool: int = 0,
    scale: float | None = None,
    candidates: Bool[Tensor, "*b n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """How much each key matters to a layer: the sum of its heads' softmax weights; each head has one vote to split.

    Args:
        q: one query a head.
        k: keys; `Hq` is a multiple of `Hkv`.
        pool: odd width of a max-pool along the keys; 0 is none.
        scale: of the logits; None is `d ** -0.5`.
        candidates: who may be voted for; None is everyone.
    """
    groups = q.unflatten(-2, (k.shape[-3], -1))
    logits = dot_product(groups, k, q.shape[-1] ** -0.5 if scale is None else scale).float()
    if candidates is not None:
        logits = logits.masked_fill(~candidates[..., None, None, :], float("-inf"))
    return max_pooled(safe_softmax(logits).sum((-3, -2)), pool)
