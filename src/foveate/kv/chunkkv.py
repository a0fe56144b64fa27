"""ChunkKV: neighbouring tokens are kept or dropped together.

ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference (2025), arXiv 2502.00299.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host import Host
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions, ranks
from foveate.kv.base.wrapping import Wrapper
from foveate.kv.snapkv import SnapKV


@final
@dataclass(eq=False)
class ChunkKV(Wrapper):
    """A sequence is cut into chunks of `chunk` tokens, and the chunks with the best mean score stay whole.

    All heads of a layer keep the same tokens: scores are added over heads. Cost: that of `base`. The wrong choice where
    single tokens far apart matter, or where heads look for different things.

    A budget buys whole chunks; what is left of it stays unused. If not even one chunk fits, its first tokens stay.
    kvpress keeps one chunk in that case, has the first sequence of a batch decide for all, and lets the newest tokens
    stay only as whole chunks. The paper's reuse of a choice by the next layers is not here.

    Args:
        base: the policy whose scores, share and tokens that always stay are used; heads share alike.
        chunk: tokens in a chunk. kvpress takes 20, the paper 10.
    """

    base: ScorePolicy = field(default_factory=SnapKV)
    chunk: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("chunk", self.chunk, 1)
        self.heads = "equal"

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        open_ = self._open(site)
        total = self._summed(site, self.base.score(site).float().masked_fill(~open_, 0.0))
        mean = total / self._summed(site, open_.float())
        best = ranks(mean.nan_to_num(-torch.inf, torch.inf, -torch.inf))  # no two chunks have the same rank
        return -self._spread(site, best).float()

    def best(self, site: Site, scores: Float[Tensor, "b hkv s"]) -> Bool[Tensor, "b hkv s"]:
        kept = super().best(site, scores)
        open_ = self._open(site)
        whole = self._spread(site, self._summed(site, (open_ & ~kept).float()) == 0)
        fits = (kept & open_ & whole).flatten(1).any(-1)
        return kept & (~open_ | whole | ~fits[:, None, None])

    def _open(self, site: Site) -> Bool[Tensor, "b hkv s"]:
        """Return the tokens that do not stay in any case."""
        return (own_positions(site)[0] >= 0) & ~self.stays(site)

    def _chunks(self, site: Site) -> Int[Tensor, "b n"]:
        last = (site.seen - 1) // self.chunk  # drafts, which come after the tokens that count, belong to it too
        return (own_positions(site)[0].long() // self.chunk).clamp(0, last).flatten(1)

    def _summed(self, site: Site, x: Float[Tensor, "b hkv s"]) -> Float[Tensor, "b c"]:
        """Add numbers of slots over heads and the tokens of each chunk."""
        chunks = x.new_zeros(x.shape[0], -(-site.seen // self.chunk))
        return chunks.scatter_add_(1, self._chunks(site), x.flatten(1))

    def _spread(self, site: Site, x: Tensor) -> Tensor:
        """Give each slot its chunk's number."""
        return x.gather(1, self._chunks(site)).view_as(site.positions)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. A chunk takes at most a quarter of the budget."""
        made = super().at_budget(budget, host, length, **learnt)
        return replace(made, chunk=min(made.chunk, max(1, cls.tokens(budget, length) // 4)))
