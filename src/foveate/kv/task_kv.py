"""Task-KV: heads whose output is far from the layer's mean keep everything; others keep sinks, recent, middle tokens.

Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads (2025), arXiv 2501.15113.
There is no official code. The paper says that heads are told apart by their distance from a semantic centre, that far
ones keep everything, and that the others keep sinks, recent tokens and "middle activations". Reconstructed here: that a
head's vector is its output behind its own part of the output projection, so that all heads share a space; that the
farthest share of heads is taken (or those beyond some standard deviations); that middle tokens are those which an
observation window attends to most, pooled as in SnapKV; and the sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.output_projection import check_projections, projected_heads
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget
from foveate.kv.base.scored import own_positions, ranks
from foveate.kv.parts.window_queries import LastQueries, last_rows, per_kv_head, pooled, window_weights


@final
@dataclass(eq=False)
class TaskKV(Policy):
    """After the prompt, each layer's heads are told apart by the distance of their output from the layer's mean.

    The far ("heterogeneous") heads keep all tokens. Each other head keeps the first `sink` and the last `recent`
    tokens, and the `middle` tokens between them that the last `window` queries attend to most. The choice is made anew
    for each prompt, so that it follows the task; while decoding it stays, and the recent tokens slide. Cost, once: one
    output for each head through the output projection, and `window` rows of the attention matrix. The wrong choice for
    models with few key/value heads (with two, one far head is half of a layer's cache), and where a later question
    needs other heads than the end of the prompt. In a batch, a head takes the memory of its longest sequence.

    Args:
        hetero_ratio: share of a layer's key/value heads that keep everything, rounded up.
        deviations: if given, heads farther than the mean distance and that many standard deviations keep everything,
            in place of a fixed share.
        sink: first tokens that every head keeps.
        recent: last tokens that every head keeps.
        middle: tokens between them.
        window: last queries whose attention chooses the middle tokens.
        pool: tokens over which that attention is averaged, an odd number.
        last: last tokens of the prompt whose outputs are averaged.

    The distance of a key/value head is the mean over its query heads. A prompt in several pieces is decided on after
    each piece; a head that has dropped tokens does not get them back. Models without a linear output projection
    (`o_proj` or `out_proj`) are refused.
    """

    hetero_ratio: float = 0.25
    deviations: float | None = None
    sink: int = 4
    recent: int = 256
    middle: int = 256
    window: int = 32
    pool: int = 5
    last: int = 1
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.between("hetero_ratio", self.hetero_ratio, 0.0, 1.0)
        if self.deviations is not None:
            validate.at_least("deviations", self.deviations, 0.0)
        validate.count("sink", self.sink)
        validate.count("recent", self.recent, 1)
        validate.count("middle", self.middle)
        validate.count("window", self.window, 1)
        validate.count("pool", self.pool, 1)
        validate.count("last", self.last, 1)
        if self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, so that a token stands in the middle of its pool")

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_projections(host)

    def at(self, site: Site) -> bool:
        return self.hetero_ratio < 1.0 or self.deviations is not None

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "prefill":
            notes, far = site.notes(self), self.separated(head_distances(site, out, self.last))
            if "full" in notes:  # a sequence whose prompt ended in an earlier piece keeps its heads
                far = torch.where(last_rows(site, 1)[1], far, notes["full"])
            notes["full"] = far

    def separated(self, distance: Float[Tensor, "b hkv"]) -> Bool[Tensor, "b hkv"]:
        """Return the heads that keep everything."""
        if self.deviations is not None:
            spread = distance.std(-1, keepdim=True, correction=0)
            return distance > distance.mean(-1, keepdim=True) + self.deviations * spread
        return ranks(distance) < math.ceil(self.hetero_ratio * distance.shape[1] - 1e-9)

    def keep(self, site: Site) -> Bool[Tensor, "b hkv s"] | None:
        notes, (own, count) = site.notes(self), own_positions(site)
        if "full" not in notes:  # no prompt has been read under the policy, which could tell the heads apart
            return None
        if site.phase == "prefill":  # what is stored before this position stays
            notes["edge"] = (count - self.recent).clamp_min(self.sink + self.middle)
        if site.seen <= self.sink + self.recent + self.middle:
            return None
        newest = (count - self.recent)[:, None, None]
        kept = notes["full"][..., None] | (own >= newest)
        if site.phase == "decode":
            return (kept | (own < notes["edge"][:, None, None])) & (own >= 0)
        between = (own >= self.sink) & (own < newest)
        scores = self._observed(site).masked_fill(~between, -torch.inf)
        return (kept | (own < self.sink) | (between & (ranks(scores) < self.middle))) & (own >= 0)

    def _observed(self, site: Site) -> Float[Tensor, "b h s"]:
        """Return the attention that the last queries pay to each slot on average, pooled over its neighbours."""
        queries = LastQueries.of(site, self.window)
        received = window_weights(site, queries).sum(2) / queries.real.sum(-1).clamp_min(1)[:, None, None]
        return per_kv_head(pooled(received, site, self.pool), site)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. As many heads keep everything as leave the others a sixteenth of the prompt."""
        check_budget(budget, length)
        heads, least = layout(host).kv_heads, min(budget, 1 / 16)
        full = int((budget - least) / (1 - least) * heads + 1e-6) if least < 1 else heads
        if budget >= 1.0:
            return cls(hetero_ratio=1.0)
        rest = max(1, int((budget * heads - full * 1.0) * length / (heads - full)))
        sink = min(4, rest - 1)
        recent = max(1, (rest - sink) // 2)
        return cls(hetero_ratio=full / heads, sink=sink, recent=recent, middle=rest - sink - recent)


def head_distances(site: Site, out: Float[Tensor, "b hq nq dv"], last: int = 1) -> Float[Tensor, "b hkv"]:
    """Return how far each head's output is from the mean over the layer's heads, in the residual stream.

    Outputs are averaged over each sequence's last `last` tokens. A key/value head has the mean of its query heads.
    """
    rows, real = last_rows(site, last)
    index = rows[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
    some = out.detach().gather(2, index).float().masked_fill(~real[:, None, :, None], 0.0)
    vectors = projected_heads(site, some.sum(2) / real.sum(-1).clamp_min(1)[:, None, None])
    return per_kv_head((vectors - vectors.mean(1, keepdim=True)).norm(dim=-1), site)
