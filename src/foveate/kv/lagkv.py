"""LagKV: tokens whose keys and values leave the range of the tokens after them are kept.

LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important (2025), arXiv 2504.04704.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host import Host
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.window_queries import per_kv_head

#: The smallest range of a channel: a channel that does not vary in the reference would give infinite scores.
_RANGE = 1e-6


@final
@dataclass(eq=False)
class LagKV(ScorePolicy):
    """A token's score is how unevenly its channels lie in the ranges that the next `lag` tokens span.

    The text after the sinks is cut into partitions of `lag` tokens. The minimum and maximum of each channel over the
    next partition scale a partition's keys, and likewise its values. A token's standard deviation over channels,
    softmax over the partition, mean of keys and values, is its score. Each partition keeps its best, as many as the
    others; the last whole one and the tokens after it have no reference and stay. Cost: O(S D) for each head, no query
    and no attention weights. The wrong choice for texts shorter than a few `lag`: below `sink + 2 lag` tokens only the
    newest stay. If the budget does not hold the tokens without a reference, the newest of them stay.

    Args:
        lag: tokens of a partition (128 in kvpress; 1024 by default in the paper's release).
        cross: compare scores over all partitions, instead of ranks within each. Needed for `heads="adaptive"` to tell
            heads apart.
        share, sink, recent, heads, safeguard, every, layers: see `ScorePolicy`. `share` counts all tokens, as in
            kvpress; in the release each partition keeps that share of itself, and the rest comes on top.

    Partitions are counted in the text, so that tokens that stayed keep their partition in later calls. The range is
    then that of the tokens left in the next one.
    """

    lag: int = 128
    cross: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("lag", self.lag, 1)
        validate.flag("cross", self.cross)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        own, count = own_positions(site)
        whole = (count - self.sink).clamp_min(0)[:, None, None] // self.lag
        nowhere = site.seen // self.lag + 2  # for sinks, padding and drafts
        outside = (own < self.sink) | (own >= count[:, None, None])
        partition = ((own - self.sink).clamp_min(0) // self.lag).masked_fill(outside, nowhere).long()
        parts = [per_kv_head(_uneven(x.float(), partition, nowhere), site) for x in (site.k, site.v)]
        scores, newness = (parts[0] + parts[1]) / 2, own / count[:, None, None]
        if not self.cross:
            scores = (self.lag - 1 - _ranks_within(scores, partition, own) + newness) / self.lag
        return torch.where(partition < whole - 1, scores, 1.0 + newness)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The tokens without a reference, up to `2 lag`, take no more than half the budget."""
        made = super().at_budget(budget, host, length, **learnt)
        made.lag = max(1, min(made.lag, cls.tokens(budget, length) // 4))
        return made


def _uneven(x: Float[Tensor, "b h s d"], partition: Int[Tensor, "b g s"], last: int) -> Float[Tensor, "b h s"]:
    """Return the standard deviation of each slot's scaled channels, softmax over its partition."""
    partition = partition.repeat_interleave(x.shape[1] // partition.shape[1], 1)
    where = partition[..., None].expand_as(x)
    empty = x.new_zeros(*x.shape[:2], last + 1, x.shape[3])
    low, high = (empty.scatter_reduce(2, where, x, how, include_self=False) for how in ("amin", "amax"))
    after = (where + 1).clamp_max(last)
    low, high = low.gather(2, after), high.gather(2, after)
    spread = ((x - low) / (high - low).clamp_min(_RANGE)).std(-1)
    top = empty[..., 0].scatter_reduce(2, partition, spread, "amax", include_self=False)
    weight = (spread - top.gather(2, partition)).exp()
    return weight / empty[..., 0].scatter_add(2, partition, weight).gather(2, partition)


def _ranks_within(
    scores: Float[Tensor, "b h s"], partition: Int[Tensor, "b h s"], own: Int[Tensor, "b h s"]
) -> Int[Tensor, "b h s"]:
    """Return each slot's rank among the slots of its partition, 0 for the best; of equal scores the older is first."""
    order = own.argsort(-1)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order.gather(-1, partition.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_parts = partition.gather(-1, order).contiguous()
    start = torch.searchsorted(sorted_parts, sorted_parts)
    numbers = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, numbers - start)
