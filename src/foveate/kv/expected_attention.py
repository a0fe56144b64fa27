"""ExpectedAttention: the queries so far say how those to come will attend, without their attention weights.

Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution (2025),
arXiv 2510.00636. kvpress is the authors' release.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.masks import NEG_INF
from foveate.core.scoring import safe_softmax
from foveate.host import Host
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.query_statistics import Future, add_queries, futures
from foveate.kv.parts.window_queries import per_kv_head


@final
@dataclass(eq=False)
class ExpectedAttention(ScorePolicy):
    """A token's score is the attention that Gaussian future queries pay to it on average, times its value's length.

    The queries of the text, from before their rotary embedding and without the sinks', give a mean `mu` and a
    covariance `S` for each query head. The average rotation over the next `future` positions makes a key `k` into
    `u`; the expected attention is the softmax of `u mu / sqrt(d) + u S u / (2 d)` over all tokens but the sinks.
    Cost: O(S D^2) for each query head, and `D^2 + D` numbers for each query head of a layer, whatever the text's
    length. Not affected by a question at the end of a prompt: the wrong choice if the question is known and says what
    matters. Models whose keys do not rotate by fixed angles are refused. A soft cap of the logits is left out.

    Args:
        sink: first tokens that always stay, and whose queries and keys do not count.
        future: positions over which the rotation is averaged.
        epsilon: is added to the expected attention before the value's length multiplies it, so that long values count
            without attention (0 by default in kvpress; its leaderboard takes 0.01 with `heads="adaptive"`).
        covariance: False leaves the second term out.
        values: False leaves the values' lengths out.
        share, recent, heads, safeguard, every, layers: see `ScorePolicy`. With `every`, later queries count too.
    """

    future: int = 512
    epsilon: float = 0.0
    covariance: bool = True
    values: bool = True
    _futures: dict[int, Future | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("future", self.future, 1)
        validate.at_least("epsilon", self.epsilon, 0.0)
        validate.flag("covariance", self.covariance)
        validate.flag("values", self.values)

    def bind(self, host: Host) -> None:
        super().bind(host)
        self._futures = futures(host, self.future)

    def read(self, site: Site, out: Tensor) -> None:
        if not self.is_off(site) and (site.phase == "prefill" or self.every is not None):
            future = self._futures[site.layer]
            add_queries(site.notes(self), site, None if future is None else future.rotation, self.sink)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        notes, (own, count), future = site.notes(self), own_positions(site), self._futures[site.layer]
        u = site.k.float() if future is None else future.keys(site.k, count)
        mean = notes["mean"].float().unflatten(1, (u.shape[1], -1))
        logits = (u[:, :, None] @ mean.mT)[..., 0] * site.scale
        if self.covariance:
            cov = (notes["spread"] / notes["count"].clamp_min(1)).float().unflatten(1, (u.shape[1], -1))
            quadratic = [((u @ one) * u).sum(-1) for one in cov.unbind(2)]
            logits = logits + torch.stack(quadratic, 2) * (site.scale**2 / 2)
        counts = (own >= self.sink) & (own < count[:, None, None])
        if site.slots is not None and site.slots.window is not None:  # later queries do not see the others
            counts &= site.positions > site.seen - site.slots.window
        counts = counts.repeat_interleave(site.q.shape[1] // counts.shape[1], 1)
        scores = per_kv_head(safe_softmax(logits.flatten(1, 2).masked_fill(~counts, NEG_INF)), site) + self.epsilon
        return scores * per_kv_head(site.v.float().norm(dim=-1), site) if self.values else scores
