"""Softmax attention, the baseline.

Attention Is All You Need (2017), arXiv 1706.03762.
"""

from __future__ import annotations

from typing import Self, final

from foveate.ops.base.scored import Scored


@final
class Softmax(Scored):
    """`softmax(q kᵀ · scale) v`: scaled dot-product attention.

    Cost O(Nq Nk D) time and O(N) memory through PyTorch's fused kernel. The wrong choice if Nk is large and few keys
    matter. It has no options.
    """

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls()
