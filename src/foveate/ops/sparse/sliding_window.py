"""A sliding window with attention sinks: the baseline of sparse attention.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.selection import Blocks, Rule, Selection
from foveate.ops.operator import Pattern
from foveate.ops.sparse.selective import Selective

_TILE = 128


@final
class SlidingWindow(Selective):
    """Each query sees the last `window` keys, its own included, and the first `sinks` keys. Causal only.

    Cost O(N (window + sinks) D). What lies between the sinks and the window is lost for good: the wrong choice where an
    answer may stand anywhere in the input.

    Args:
        window: keys up to and including the query's own; at least 1.
        sinks: first keys that every query sees (the paper uses 4); 0 for a plain window.
    """

    patterns: frozenset[Pattern] = frozenset({"causal self", "causal cross"})

    def __init__(self, window: int = 512, sinks: int = 4) -> None:
        super().__init__()
        validate.at_least("window", window, 1)
        validate.at_least("sinks", sinks, 0)
        self.window, self.sinks = window, sinks

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        return _selection(q.shape[2], k.shape[2], self.window, self.sinks, q.device)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(window=max(1, length // 4), sinks=2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(window=length, sinks=0)


@lru_cache(maxsize=64)
def _selection(n_queries: int, n_keys: int, window: int, sinks: int, device: torch.device) -> Blocks:
    """The tiles that the band and the sinks touch; on tiles well inside the band nothing has to be masked."""
    shift = n_keys - n_queries
    first = torch.arange(-(-n_queries // _TILE), device=device)[:, None] * _TILE + shift
    last = (first + _TILE - 1).clamp_max(n_keys - 1)
    start = torch.arange(-(-n_keys // _TILE), device=device) * _TILE
    end = start + _TILE - 1
    touched = (start <= last) & ((first - end < window) | (start < sinks))
    whole = (end <= first) & ((last - start < window) | (end < sinks))
    return Blocks(
        touched[None, None], (_TILE, _TILE), n_queries, n_keys, _rule(window, sinks, shift), whole[None, None]
    )


@lru_cache(maxsize=64)
def _rule(window: int, sinks: int, shift: int) -> Rule:
    return lambda b, h, q, k: ((q + shift - k < window) | (k < sinks)) & (k <= q + shift)
