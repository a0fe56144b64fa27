"""Mean pooling, the baseline of every other pool."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from foveate.nn.base.pool import Pool, Pooled


@final
class MeanPool(Pool):
    """The mean of the real tokens (global average pooling); it has no parameters.

    With a linear head it is linear probing. The wrong choice if a few of many tokens tell the answer.

    Args:
        dim: C, the width of tokens and of the vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        weights = self._softmax(torch.zeros_like(x[:, None, :, 0]), mask)
        return Pooled(weights @ x, weights)
