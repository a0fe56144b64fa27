"""Taylor linear attention: the operator of BASED.

Simple linear attention language models balance the recall-throughput tradeoff (2024), arXiv 2402.18668.
"""

from __future__ import annotations

from typing import ClassVar, Self, final

from torch import Tensor

from foveate.core.errors import OptionError, shown
from foveate.ops.base.linear import Linear
from foveate.ops.functional import taylor


@final
class TaylorAttention(Linear):
    """Weights `1 + s + s² / 2` with `s = scale q . k`, over their sum: the exponential to second order, positive.

    Cost O(N D² Dv), and a state of (1 + D + D²) x (Dv + 1) numbers per head: meant for small D (BASED takes 16 for any
    width of the model), where it stores more than a feature map of D numbers. Nothing decays, and no comparison is
    exact; BASED adds a small sliding window for exact comparisons: `foveate.models.Based`. The wrong choice for wide
    heads, or for logits well beyond 1, where the parabola gives opposite keys large weights.

    Args:
        symmetric: True stores `x_a x_b` once: the same weights from 1 + D + D (D + 1) / 2 features (153 for D = 16 in
            place of 273). The release stores both.

    `scale` defaults to `D ** -0.5`, as in the layer of the release. The sum of the weights is at least half the number
    of keys seen, so the release's eps of 1e-12 has no effect.

    Raises:
        OptionError: `symmetric` is no bool.
    """

    eps: ClassVar[float] = 1e-12
    tokenwise: ClassVar[bool] = True

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__()
        if not isinstance(symmetric, bool):
            raise OptionError(f"symmetric={shown(symmetric)} must be True or False")
        self.symmetric = symmetric

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return taylor.taylor_features(q * scale, 2, symmetric=self.symmetric)

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return taylor.taylor_features(k, 2, symmetric=self.symmetric)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(symmetric=True)
