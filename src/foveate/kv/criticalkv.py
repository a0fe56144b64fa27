"""CriticalKV: among the tokens that attention leaves open, those whose values change the output most are kept.

CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective (2025), arXiv 2502.03805.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host import Host
from foveate.host.output_projection import check_projections, projected_norms
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, ranks
from foveate.kv.base.wrapping import Wrapper
from foveate.kv.parts.window_queries import per_kv_head
from foveate.kv.snapkv import SnapKV


@final
@dataclass(eq=False)
class CriticalKV(Wrapper):
    """The best half by another policy's score stays; the other half is chosen by score times the output's norm.

    A token's norm is that of its value behind a head's part of the output projection, `sum |v W_o,h|`, averaged over
    the query heads of a group. Cost: the values through the output projection once, which is as much as the layer's own
    projection. The wrong choice around scores that may be negative (KNorm, KeyDiff): the product then means nothing.
    Also where no few tokens (sinks, for instance) hold most of the attention: the paper assumes that the first half
    does, and without it the softmax over what is left weighs more than the values that are dropped.

    Around a policy with adaptive heads (`CriticalKV(AdaKV(...))`), that policy says how many tokens each head keeps.

    Args:
        base: the policy whose scores, share and tokens that always stay are used.
        first: share of a head's budget that the score alone decides.
        epsilon: added to scores before they are multiplied, as in the release.

    Models without a linear output projection (`o_proj` or `out_proj`) are refused.
    """

    base: ScorePolicy = field(default_factory=SnapKV)
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.between("first", self.first, 0.0, 1.0)
        validate.at_least("epsilon", self.epsilon, 0.0)

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_projections(host)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        scores = self.base.score(site).float()
        ranked, size = self.ranked(site, scores), self.size(site)
        budget = self._budget(ranked, size)
        always = (ranks(ranked) < (budget * self.first).long()) | ranked.isposinf()
        critical = (scores + self.epsilon) * per_kv_head(projected_norms(site), site)
        critical = critical.masked_fill(always, torch.inf).masked_fill(ranked.isneginf(), -torch.inf)
        if self.heads == "adaptive":  # the budgets are fixed: the best of the layer are those of each head
            critical = critical.masked_fill(ranks(critical) < budget, torch.inf)
        return critical

    def _budget(self, ranked: Float[Tensor, "b h s"], size: Int[Tensor, " b"]) -> Int[Tensor, "b h 1"]:
        """Return the number of tokens that each head keeps."""
        if self.heads == "adaptive":
            return self.base._best_of_layer(ranked, size).sum(-1, keepdim=True)
        return size[:, None, None].expand(-1, ranked.shape[1], -1)
