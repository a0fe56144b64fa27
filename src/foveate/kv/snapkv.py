"""SnapKV: the prompt's last queries say which of its tokens matter.

SnapKV: LLM Knows What You are Looking for Before Generation (2024), arXiv 2404.14469.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy
from foveate.kv.parts.window_queries import LastQueries, per_kv_head, pooled, window_votes


@final
@dataclass(eq=False)
class SnapKV(ScorePolicy):
    """A token's score is the mean attention that the last `recent` queries pay to it, pooled over its neighbours.

    The last `recent` tokens always stay. Cost: `recent` rows of the attention matrix in each layer, once after the
    prompt. If the question ends the prompt, the score knows it. If not, the score measures what the end of the text
    attends to: the wrong choice for a text that is read once and asked about later.

    Args:
        recent: queries that score, and tokens that stay (64 in kvpress; the paper's experiments take 16 to 64).
        pool: tokens over which scores are pooled, an odd number; 1 for none.
        pooling: "mean" or "max". The paper describes and its release uses either; kvpress takes the mean.
        group: how the query heads of a key/value head are combined: "mean", "max" or "sum".
        share, sink, heads, safeguard, every, layers: see `ScorePolicy`. The paper keeps no sinks by rule. With `every`,
            the last `recent` queries, generated ones included, are kept from step to step, and score again.

    As in kvpress, scores are pooled before query heads are combined. With a mean both orders are the same.
    """

    sink: int = 0
    recent: int = 64
    pool: int = 5
    pooling: Literal["mean", "max"] = "mean"
    group: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("recent", self.recent, 1)
        validate.count("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, so that a token stands in the middle of its pool")
        validate.one_of("pooling", self.pooling, ("mean", "max"))
        validate.one_of("group", self.group, ("mean", "max", "sum"))

    def read(self, site: Site, out: Tensor) -> None:
        if self.every is not None:
            LastQueries.noted(site.notes(self), site, self.recent)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        once = self.every is None
        queries = LastQueries.of(site, self.recent) if once else LastQueries.in_notes(site.notes(self))
        received = window_votes(site, queries) / queries.real.sum(-1).clamp_min(1)[:, None, None]
        return per_kv_head(pooled(received, site, self.pool, self.pooling), site, self.group)
