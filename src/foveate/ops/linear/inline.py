"""InLine attention's weights: linear attention normalized by a subtraction in place of a division.

Bridging the Divide: Reconsidering Softmax and Linear Attention (2024), arXiv 2412.06590.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.ops.base.linear import Linear

FeatureMap = Literal["identity", "relu", "leaky_relu", "exp"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: torch.exp(0.2 * x),
}


@final
class InLine(Linear):
    """Weights `1/n + phi(q_i) . (phi(k_j) - mean phi(k)) · scale / n` over the n visible keys.

    A subtraction makes rows sum to 1, so weights may be negative, and longer queries give sharper weights. Ordinary
    linear attention divides by the sum, so that `q` and `2 q` give the same weights; this mechanism avoids that. Cost
    O(N D²) time. The weights differ from 1/n only in proportion to scores of size about 1: the wrong choice if one key
    has to stand out. No causal form is defined, as every weight needs the mean of all keys.

    Args:
        phi: the feature map of queries and keys: "identity" (the release's DeiT), "relu", "leaky_relu", or "exp",
            which is `exp(0.2 x)`.

    A call's `scale` multiplies the products; the release folds `1 / n` into it, here it is separate.
    """

    capabilities = replace(Linear.capabilities, patterns=frozenset({"self", "cross"}), streaming=None)
    normalized: ClassVar[bool] = False

    def __init__(self, phi: FeatureMap = "identity") -> None:
        super().__init__()
        validate.one_of("phi", phi, tuple(FEATURE_MAPS))
        self.phi = phi

    def query_features(self, q: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        return _with_ones(FEATURE_MAPS[self.phi](q) * scale)

    def key_features(self, k: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        return _with_ones(FEATURE_MAPS[self.phi](k))

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, None]:
        """Return features such that `fq · fk` is the weight, from the number and the mean of all keys."""
        fk = self.key_features(k, scale)
        if hidden is not None:
            fk = fk.masked_fill(hidden, 0.0)
        seen = fk[..., -1:]  # ones, or zeros for masked keys
        count = seen.sum(2, keepdim=True).clamp_min(1)
        centred = fk - seen * (fk.sum(2, keepdim=True) / count)
        return torch.cat([centred[..., :-1], seen], -1) / count, None

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls("leaky_relu")


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
