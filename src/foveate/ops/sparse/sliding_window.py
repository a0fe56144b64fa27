"""A sliding window with attention sinks: the baseline of sparse attention.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.selection import Selection
from foveate.core.window_selection import window
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.selective import Selective
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class SlidingWindow(Selective):
    """A query sees the last `window` keys, its own included, and the first `sinks` keys. Causal only.

    Cost O(N (window + sinks) D). Keys between the sinks and the window are lost for good: the wrong choice if an answer
    may be anywhere in the input. A stream keeps `sinks + window` keys.

    Args:
        window: keys up to and including the query's own; at least 1.
        sinks: first keys that every query sees (the paper uses 4); 0 for a plain window.
    """

    capabilities = replace(Selective.capabilities, patterns=CAUSAL_PATTERNS, growth="N")

    def __init__(self, window: int = 512, sinks: int = 4) -> None:
        super().__init__()
        validate.count("window", window, 1)
        validate.count("sinks", sinks, 0)
        self.window, self.sinks = window, sinks

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        return window(q.shape[2], k.shape[2], self.window, self.sinks, q.device)

    def trim_state(self, state: KVState) -> KVState:
        if state.k.shape[2] <= self.sinks + self.window:
            return state
        first, last = slice(0, self.sinks), slice(state.k.shape[2] - self.window, None)
        return KVState(*(torch.cat([x[:, :, first], x[:, :, last]], 2) for x in (state.k, state.v)))

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        return cls(window=max(1, round(budget * length) - 4), sinks=4)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(window=max(1, length // 4), sinks=2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(window=length, sinks=0)
