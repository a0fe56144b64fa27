"""R-KV: while a model reasons, tokens that matter and do not repeat what others say stay.

R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (2025), arXiv 2505.24133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.masks import NEG_INF
from foveate.core.scoring import safe_softmax
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.window_queries import LastQueries, per_kv_head, pooled, window_logits

#: The largest number of similarities that are held at a time.
_TILE = 1 << 22


@final
@dataclass(eq=False)
class RKV(ScorePolicy):
    """A token's score is its importance, minus its redundancy: `mix * A - (1 - mix) * Z`.

    The importance `A` is the mean attention of the last `recent` queries to the tokens before them, by the largest
    logit of a key/value head's query heads, max-pooled over neighbours. The redundancy `Z` is a softmax over the tokens
    of the mean cosine similarity of a token's key to all keys. The latest of the tokens that are alike is spared: for
    each key, its last neighbour with a similarity above `alike` does not count. Cost: O(S^2 D) for each compression, a
    few rows at a time; the last queries of each layer are kept. For long chains of thought, which repeat themselves.
    The wrong choice for a prompt without repetition.

    The paper keeps a fixed number of tokens, `limit`, and compresses every 128 steps; here the prompt counts too, as in
    the release. In the release, a key without any neighbour spares the first token; here it spares none.

    Args:
        limit: tokens that a head keeps; None for a share of all tokens so far.
        recent: queries that score, and tokens that stay.
        every: compress again after that many new tokens.
        mix: weight of the importance, 0.07 in the release.
        alike: similarity from which two keys are neighbours.
        pool: odd number of tokens over which the importance is max-pooled; 1 for none.
        share, sink, heads, safeguard, layers: see `ScorePolicy`. The paper keeps no sinks by rule.
    """

    share: float = 1.0
    sink: int = 0
    recent: int = 8
    limit: int | None = 1024
    every: int | None = 128
    mix: float = 0.07
    alike: float = 0.5
    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("recent", self.recent, 1)
        validate.between("mix", self.mix, 0.0, 1.0)
        validate.between("alike", self.alike, -1.0, 1.0)
        validate.count("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, so that a token stands in the middle of its pool")

    def read(self, site: Site, out: Tensor) -> None:
        LastQueries.noted(site.notes(self), site, self.recent)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return self.mix * self._importance(site) - (1.0 - self.mix) * self._redundancy(site)

    def _importance(self, site: Site) -> Float[Tensor, "b hkv s"]:
        queries = LastQueries.in_notes(site.notes(self))
        logits = per_kv_head(window_logits(site, queries), site, "max")
        (own, _), first = own_positions(site), queries.at.masked_fill(~queries.real, site.seen).amin(-1)
        before = (own >= 0) & (site.positions < first[:, None, None])
        weights = safe_softmax(logits.masked_fill(~before[:, :, None], NEG_INF))
        weights = weights * queries.real[:, None, :, None]
        mean = weights.sum(2) / queries.real.sum(-1).clamp_min(1)[:, None, None]
        return pooled(mean, site, self.pool, "max").masked_fill(~before, 0.0)

    def _redundancy(self, site: Site) -> Float[Tensor, "b hkv s"]:
        own, _ = own_positions(site)
        real = own >= 0
        k = site.k.unflatten(1, (own.shape[1], -1)).mean(2) if site.k.shape[1] != own.shape[1] else site.k
        k = F.normalize(k.float(), dim=-1).masked_fill(~real[..., None], 0.0)
        total, step = torch.zeros(own.shape, device=k.device), max(1, _TILE // max(1, own.numel()))
        for start in range(0, own.shape[2], step):
            rows = slice(start, min(start + step, own.shape[2]))
            like = k[:, :, rows] @ k.mT
            like.diagonal(start, 2, 3).zero_()
            place = own[:, :, None].masked_fill(~(like > self.alike), -1)
            latest = place.max(-1, keepdim=True)
            like.scatter_(-1, latest.indices, torch.where(latest.values >= 0, 0.0, like.gather(-1, latest.indices)))
            total += like.sum(2)
        held = real.sum(-1, keepdim=True).clamp_min(1)
        return safe_softmax((total / held).masked_fill(~real, NEG_INF))
