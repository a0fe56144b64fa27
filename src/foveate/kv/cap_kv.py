"""CapKV: the tokens that add most to what a head's values can say stay.

Rethinking KV Cache Eviction via a Unified Information-Theoretic Objective (2026), arXiv 2604.25975.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.linear_systems import solve_positive
from foveate.core.masks import NEG_INF
from foveate.host import Host
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.query_statistics import Future, add_queries, futures
from foveate.kv.parts.window_queries import per_kv_head


@final
@dataclass(eq=False)
class CapKV(ScorePolicy):
    """A token's score is its relevance to the text's queries, times the leverage of its value among all values.

    The relevance is `w = exp(tau cos(m, k))`, with `m` the mean of the text's queries, as it will be turned on average
    over the next `future` positions. With `A = I + sum w v v'`, the leverage of a value is `v' A^-1 v`: what it says
    that other relevant values do not. Cost: O(S D^2) for each query head, and `D^2 + D` numbers for each query head of
    a layer. The wrong choice where a question at the end says what matters. Models whose keys do not rotate by fixed
    angles are refused.

    As in kvpress, queries and keys are normalised, the largest relevance of a head is 1, and values stand for what a
    token writes; the paper does none of the first two.

    Args:
        tau: how sharply the relevance follows the cosine.
        future: positions over which the rotation is averaged.
        epsilon: added to the relevance inside `A`.
        sink: first tokens that always stay, and whose queries, keys and values do not count.
        share, recent, heads, safeguard, threshold, limit, every, layers: see `ScorePolicy`.
    """

    tau: float = 5.0
    future: int = 512
    epsilon: float = 1e-6
    _futures: dict[int, Future | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.at_least("tau", self.tau, 0.0)
        validate.count("future", self.future, 1)
        validate.at_least("epsilon", self.epsilon, 0.0)

    def bind(self, host: Host) -> None:
        super().bind(host)
        self._futures = futures(host, self.future)

    def read(self, site: Site, out: Tensor) -> None:
        if not self.is_off(site) and (site.phase == "prefill" or self.every is not None):
            future = self._futures[site.layer]
            add_queries(site.notes(self), site, None if future is None else future.rotation, self.sink)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        (own, count), future, heads = own_positions(site), self._futures[site.layer], site.k.shape[1]
        u = site.k.float() if future is None else future.keys(site.k, count)
        mean = site.notes(self)["mean"].float().unflatten(1, (heads, -1))
        size = mean.norm(dim=-1) if future is None else future.shrunk(mean).norm(dim=-1)
        cosine = (u[:, :, None] @ mean.mT)[..., 0] / (size * site.k.float().norm(dim=-1)[:, :, None]).clamp_min(1e-12)
        counts = (own >= self.sink).repeat_interleave(site.q.shape[1] // own.shape[1], 1).unflatten(1, (heads, -1))
        logits = (self.tau * cosine).masked_fill(~counts, NEG_INF)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top.isinf(), 0.0)).exp() * counts
        v = torch.where(counts[..., None], site.v.float()[:, :, None], 0.0)  # empty slots may hold NaN
        scaled = v * ((weights + self.epsilon) * counts).sqrt()[..., None]
        a = torch.eye(v.shape[-1], device=v.device) + scaled.mT @ scaled
        leverage = (solve_positive(a, v.mT) * v.mT).sum(-2)
        return per_kv_head((weights * leverage).flatten(1, 2), site)
