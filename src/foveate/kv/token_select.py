"""TokenSelect: all heads of a layer vote on the tokens of the cache to read.

TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
Selection (2024), arXiv 2411.02886. Positions are kept: the paper's renumbering, which extends the trained length, needs
keys from before the rotary embedding, and a site's keys have it. With grouped heads, a query head scores the keys of
its own group; the release's kernel reads them in another order. The release has its selection cache off by default
(here: a `sim_threshold` above 1), and votes without the scale of attention (`scale_votes=False`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.scoring import dot_product, safe_softmax
from foveate.core.selection import Indices, Selection
from foveate.host.attention import selected
from foveate.host.hf.model import Host
from foveate.host.padding import attend_unpadded, tokens
from foveate.host.site import Site
from foveate.kv.base.policy import Policy
from foveate.kv.parts.head_split import check_reach, far_numbers
from foveate.kv.parts.last_query import cosine, has_everything, max_pooled, top_keys, visible


@final
@dataclass(eq=False)
class TokenSelect(Policy):
    """Each step and each prompt chunk reads the sinks, a local window and `k` tokens that the layer's heads vote for.

    Nothing is evicted: memory stays, and reads fall to `(sink + local + k) / N` plus one scoring pass over the keys,
    which is skipped while the query stays similar. The decision to skip it makes the host wait for the device, once in
    every layer. Works on a frozen model without calibration. The wrong choice if memory is the limit, or if the heads
    of a layer need different tokens (they share one set). Layers with a window of their own, or from which another
    method evicts, read all that they hold.

    Args:
        sink: number of first tokens that are always read.
        local: number of tokens before the query, or before its chunk, that are always read.
        k: number of other tokens, which are voted for.
        sim_threshold: a vote is used again if the cosine between its query and the current one reaches this; above 1
            every step votes, at -1 the first vote stays.
        pool: odd width of a max-pool along the votes, which also chooses neighbours; 0 is none.
        chunk: number of queries of a prompt that share one vote, by their mean; also for prompts in one call.
        scale_votes: whether logits of the vote have the scale of the model's attention, `1 / sqrt(D)` as a rule. False
            is the release's kernel, whose dot products have none: each head's vote then goes to few tokens.
    """

    sink: int = 128
    local: int = 512
    k: int = 2048
    sim_threshold: float = 0.9
    pool: int = 0
    chunk: int = 8192
    scale_votes: bool = True
    in_place: ClassVar[bool] = True
    _far: frozenset[int] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("sink", 0), ("local", 0), ("k", 1), ("pool", 0), ("chunk", 1)):
            validate.count(name, getattr(self, name), least)
        validate.at_least("sim_threshold", self.sim_threshold, -1)
        validate.flag("scale_votes", self.scale_votes)
        if self.pool and self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, or 0 for none")

    @property
    def reads(self) -> int:
        """Number of earlier tokens that a step reads."""
        return self.sink + self.local + self.k

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_reach("sink, local, k: token_select", self.reads, host)
        self._far = far_numbers(host)

    def at(self, site: Site) -> bool:
        return site.layer in self._far and site.seen - 1 > self.reads and has_everything(site)

    def attend(self, site: Site) -> Tensor | None:
        """Attend in a padded prompt of several chunks, sequence by sequence: chunks count from its own first token."""
        if site.q.shape[2] <= self.chunk or tokens(site) is None:
            return None
        return attend_unpadded(site, lambda part, rows: self._attend_rows(site, part, rows))

    def _attend_rows(self, site: Site, part: Site, rows: Tensor) -> Tensor:
        found, notes = tokens(site), site.notes(self)
        assert found is not None
        notes.update({**self._empty_notes(site), **notes})
        mine = {name: x[rows] if isinstance(x, Tensor) else x for name, x in notes.items()}
        mine["chosen"] = found.rank[rows].gather(1, mine["chosen"]).clamp_min(0).long()
        part.all_notes[id(self), part.layer] = mine
        selection = self.select(part) if self.at(part) else None
        out, _ = selected(part, [] if selection is None else [selection.for_heads(part.q.shape[1])])
        mine["chosen"] = found.order[rows].gather(1, mine["chosen"])
        notes["whole"] = False
        for name in ("query", "chosen", "real", "past"):
            notes[name] = notes[name].index_copy(0, rows, mine[name])
        return out

    def select(self, site: Site) -> Selection | None:
        n, total = site.q.shape[2], site.k.shape[2]
        starts = range(0, n, self.chunk)
        if total - n + starts[-1] <= self.reads:
            return None
        lists = [self._working_set(site, start, min(start + self.chunk, n)) for start in starts]
        if len(lists) == 1:
            (index, valid), group = lists[0], n
            return Indices(index[:, None, None], n, total, None if valid is None else valid[:, None, None], group)
        longest = max(index.shape[1] for index, _ in lists)
        real = [torch.ones_like(index, dtype=torch.bool) if valid is None else valid for index, valid in lists]
        index = torch.stack([F.pad(index, (0, longest - index.shape[1])) for index, _ in lists], 1)
        valid = torch.stack([F.pad(x, (0, longest - x.shape[1])) for x in real], 1)
        return Indices(index[:, None], n, total, valid[:, None], self.chunk)

    def _working_set(self, site: Site, start: int, stop: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"] | None]:
        """Return the keys that a chunk of the queries reads, and a mask of those that count; None if all do."""
        batch, device = site.q.shape[0], site.q.device
        past, end = (site.k.shape[2] - site.q.shape[2] + x for x in (start, stop))
        if past <= self.reads:
            return torch.arange(end, device=device).expand(batch, -1), None
        chosen, real = self._vote(site, start, stop, past)
        sinks = torch.arange(self.sink, device=device).expand(batch, -1)
        found = tokens(site)
        if found is None:
            near = torch.arange(past - self.local, end, device=device).expand(batch, -1)
            index = torch.cat([sinks, chosen, near], 1)
            return index, None if real is None else F.pad(real, (self.sink, near.shape[1]), value=True)
        before = found.before(past)[:, None]
        near = before - self.local + torch.arange(self.local, device=device)
        new = torch.arange(past, end, device=device).expand(batch, -1)
        real = torch.ones_like(chosen, dtype=torch.bool) if real is None else real
        valid = torch.cat([sinks < before - self.local, real, near >= 0, found.real[:, past:end]], 1)
        return torch.cat([found.at(sinks), chosen, found.at(near), new], 1), valid

    def _vote(self, site: Site, start: int, stop: int, past: int) -> tuple[Tensor, Tensor | None]:
        """Return the tokens `(B, k)` that were voted for, and a mask of those that count; None if all do.

        Sequences whose query is like that of their last vote keep that vote.
        """
        notes, found = site.notes(self), tokens(site)
        query, has = _mean_query(site, start, stop)
        own = torch.full_like(site.begins, past) if found is None else found.before(past).long()
        alike = torch.zeros_like(has)
        votes = "past" not in notes or (self.sim_threshold > 1 and found is None)
        if not votes:  # `past` is -1 without a vote, and larger than `own` if the cache was cropped since
            held = (notes["past"] >= 0) & (notes["past"] <= own)
            alike = held & ((cosine(query, notes["query"]) >= self.sim_threshold) | ~has)
        if votes or not bool(alike.all()):  # the host waits for the device here
            notes.update(self._fresh(site, query, past, alike, slice(start, stop)))
        # a sequence that is short without its padding reads all its tokens, and keeps no vote
        held = alike | (own > self.reads)
        before = notes.get("past", torch.full_like(own, -1))
        notes["past"] = torch.where(has, own.masked_fill(~held, -1), before)
        return notes["chosen"], None if notes["whole"] else notes["real"]

    def _fresh(self, site: Site, query: Tensor, past: int, alike: Tensor, rows: slice) -> dict[str, Any]:
        """Vote, and return the new notes; sequences that are `alike` keep their last vote."""
        found, seen, notes = tokens(site), visible(site, rows), site.notes(self)
        first, end, candidate = 0, past, None
        if found is not None:
            rank = found.rank[:, :past]
            candidate = (rank >= self.sink) & (rank < found.before(past)[:, None] - self.local)
        else:  # the candidates are consecutive
            first, end = self.sink, past - self.local
        if seen is not None:
            candidate = seen[:, first:end] if candidate is None else candidate & seen[:, first:end]
        votes = soft_vote(query, site.k[:, :, first:end], 0, site.scale if self.scale_votes else 1.0, candidate)
        place = top_keys(votes, self.k, site, self.pool, candidate, ranked=False).sort().values
        real = torch.ones_like(place, dtype=torch.bool) if candidate is None else candidate.gather(1, place)
        fresh: dict[str, Any] = {"query": query, "chosen": place + first, "real": real}
        for name, value in fresh.items():
            old = alike.view(-1, *[1] * (value.dim() - 1))
            fresh[name] = torch.where(old, notes.get(name, value), value)
        return {**fresh, "whole": seen is None and found is None and notes.get("whole", True)}

    def _empty_notes(self, site: Site) -> dict[str, Any]:
        """Return the notes of sequences that have not voted yet."""
        b, hq, _, d = site.q.shape
        chosen = torch.zeros(b, self.k, dtype=torch.long, device=site.q.device)
        past = torch.full_like(site.begins, -1)
        return {
            "query": site.q.new_zeros(b, hq, d), "chosen": chosen, "real": chosen > 0, "past": past, "whole": False,
        }  # fmt: skip

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Sinks, window and votes share it as by default, 1 : 4 : 16, with at least 4 sinks."""
        total = cls.tokens(budget, length)
        sink, local = min(128, max(min(4, total // 4), total // 21)), min(512, 4 * total // 21)
        return cls(sink, local, max(1, total - sink - local - 1))


def _mean_query(site: Site, start: int, stop: int) -> tuple[Float[Tensor, "b hq d"], Bool[Tensor, " b"]]:
    """Return the mean of some queries without padding, and a mask of the sequences that have any."""
    real = site.real_queries if tokens(site) is not None else None
    if real is None:
        return site.q[:, :, start:stop].mean(2), torch.ones_like(site.begins, dtype=torch.bool)
    real = real[:, start:stop].to(site.q.device)
    count = real.sum(-1)
    total = site.q[:, :, start:stop].masked_fill(~real[:, None, :, None], 0.0).sum(2)
    return total / count.clamp_min(1)[:, None, None].to(total.dtype), count > 0


def soft_vote(
    q: Float[Tensor, "*b hq d"],
    k: Float[Tensor, "*b hkv n d"],
    pool: int = 0,
    scale: float | None = None,
    candidates: Bool[Tensor, "*b n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """Sum the softmax weights of a layer's heads for each key; each head splits one vote.

    Args:
        q: one query for each head.
        k: keys; `Hq` is a multiple of `Hkv`.
        pool: odd width of a max-pool along the keys; 0 is none.
        scale: scale of the logits; None is `d ** -0.5`.
        candidates: the keys that may be voted for; None is all.
    """
    groups = q.unflatten(-2, (k.shape[-3], -1))
    logits = dot_product(groups, k, q.shape[-1] ** -0.5 if scale is None else scale).float()
    if candidates is None:
        return max_pooled(logits.softmax(-1).sum((-3, -2)), pool)
    logits = logits.masked_fill(~candidates[..., None, None, :], float("-inf"))
    return max_pooled(safe_softmax(logits).sum((-3, -2)), pool)
