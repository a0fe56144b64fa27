"""AdaKV: a layer's budget goes to the heads that need it.

Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference (2024), arXiv 2407.11550.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, ranks
from foveate.kv.base.wrapping import Wrapper
from foveate.kv.snapkv import SnapKV


@final
@dataclass(eq=False)
class AdaKV(Wrapper):
    """A head's budget grows with its part of the layer's best scores: `AdaKV(SnapKV(share=0.2))`.

    Heads that attend to few tokens keep few, and leave room to the others. Each head then keeps its own best tokens.
    Cost: that of `base`, and one ranking of a layer's scores. Heads hold different numbers of tokens, so that attention
    runs once for each number. The wrong choice where scores of different heads do not compare (attention weights do),
    or where kernels need one length.

    Args:
        base: the policy whose scores, share and tokens that always stay are used.
        safeguard: share of its equal budget that each head keeps in any case; 1 gives all heads the same.
        variant: "paper" mixes budgets, as the release does: `(1 - safeguard) * adaptive + safeguard * equal`. "kvpress"
            sets the safeguard's tokens apart, and gives the rest to the best scores of the layer.
    """

    base: ScorePolicy = field(default_factory=SnapKV)
    safeguard: float = field(default=0.2, kw_only=True)
    variant: Literal["paper", "kvpress"] = field(default="paper", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("variant", self.variant, ("paper", "kvpress"))
        self.heads = "adaptive"

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return self.base.score(site)

    def _best_of_layer(self, scores: Float[Tensor, "b h s"], size: Int[Tensor, " b"]) -> Bool[Tensor, "b h s"]:
        if self.variant == "kvpress":
            return super()._best_of_layer(scores, size)
        best = (ranks(scores.flatten(1)) < (size * scores.shape[1])[:, None]).view_as(scores)
        budget = (1 - self.safeguard) * best.sum(-1) + self.safeguard * size[:, None]
        return ranks(scores) < budget.round()[..., None]
