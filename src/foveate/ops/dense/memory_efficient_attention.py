"""Memory-efficient attention: exact softmax attention in chunks, without the whole matrix.

Self-attention Does Not Need O(n²) Memory (2021), arXiv 2112.05682.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

from foveate.core import validate
from foveate.core.call import AttentionCall
from foveate.ops.base.scored import Scored


@final
class MemoryEfficientAttention(Scored):
    """`softmax(q kᵀ · scale) v` in chunks of queries and tiles of keys, forward and backward.

    Cost O(Nq Nk D) time, as for softmax attention, and `q_chunk x k_chunk` numbers per head at a time, for any input
    length, in place of `Nq x Nk`. A tile yields its largest logit, a sum of exponentials and a weighted sum of values,
    which merge with those of the other tiles (`core/online_softmax.py`). The backward pass keeps the log of each row's
    sum and recomputes the tiles. Causal calls skip tiles in the future. The wrong choice if a fused kernel runs:
    `softmax` uses it and is faster. This one is for devices without such a kernel, and for an explicit bound on memory.

    Args:
        q_chunk: queries in a chunk; the release has 1024.
        k_chunk: keys in a tile; the release has 4096. The paper's theory has the square root of Nk.

    Lengths need not be multiples of either. A row that sees nothing gives zeros. Sums are kept in float32 for half
    precision. If hidden keys hold NaN or inf, a chunk reads all of its keys at once, to exclude them.

    Raises:
        OptionError: a chunk that is no whole number or is below 1.
    """

    capabilities = replace(Scored.capabilities, engines=("chunked", "reference"))

    def __init__(self, q_chunk: int = 1024, k_chunk: int = 4096) -> None:
        super().__init__()
        validate.count("q_chunk", q_chunk, 1)
        validate.count("k_chunk", k_chunk, 1)
        self.q_chunk, self.k_chunk = q_chunk, k_chunk

    def _prepared(self, call: AttentionCall) -> AttentionCall:
        return replace(super()._prepared(call), chunk=(self.q_chunk, self.k_chunk))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(max(1, length // 3), max(1, length // 4))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(5, 3)
