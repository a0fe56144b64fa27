"""Measures within a window: the distance of what a head looks at, and what later tokens make of a token.

Both are those of Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy
Optimization (2025), arXiv 2510.13554; `foveate.lens.preplan_anchor` averages them over sets of heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.host.fused_statistics import Statistics
from foveate.lens.measures import KeyTokens, Measure
from foveate.lens.parts.gaps import bands, mass_from_later, windowed_distance


@final
@dataclass(frozen=True)
class WindowedDistance(Measure):
    """The mean distance in tokens of what a query attends to, where none counts more than `window`: WAAD.

    It tells a head that looks one token back from one that looks three back, and leaves sinks out of account. Reduced
    to its mean.

    Args:
        window: the largest distance; it counts in both directions where later keys are seen.
    """

    window: int = 10
    over: ClassVar[Literal["queries", "keys"]] = "queries"
    compares_places: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("window", self.window, 1)

    @property
    def name(self) -> str:
        return "windowed_distance" if self.window == 10 else f"windowed_distance_{self.window}"

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        if tokens.queries is None:
            return None
        nearer, widest = torch.zeros_like(call.lse), self.window - 1
        for rows, _, gaps, weights in bands(call, past_of(tokens), 0 if call.causal else -widest, widest):
            nearer[:, :, rows] += (weights * (self.window - gaps.abs())).sum(-1)
        return torch.where(call.counted, self.window - nearer, 0.0)

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        return windowed_distance(weights, tokens.distances(weights.shape[1]).abs(), self.window)


@final
@dataclass(frozen=True)
class FutureInfluence(Measure):
    """The mean weight that a token gets from the tokens `low` to `high` after it: FAI. Reduced to its mean.

    Tokens that no token of the range follows do not count.

    Args:
        low, high: the range of distances, both included; `high=None` is up to the end.
    """

    low: int = 10
    high: int | None = 100
    over: ClassVar[Literal["queries", "keys"]] = "keys"
    compares_places: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("low", self.low, 1)
        if self.high is not None:
            validate.count("high", self.high, self.low)

    @property
    def name(self) -> str:
        last = "end" if self.high is None else self.high
        return "future_influence" if (self.low, self.high) == (10, 100) else f"future_influence_{self.low}_{last}"

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        if tokens.queries is None or (self.high is None and not call.causal):
            return None
        low, high = (0, self.low - 1) if self.high is None else (self.low, self.high)
        total = call.lse.new_zeros(*call.lse.shape[:2], call.k.shape[2])
        for _, keys, _, weights in bands(call, past_of(tokens), low, high):
            total[..., keys] += weights.sum(-2)
        return (call.received - total).clamp_min(0.0) if self.high is None else total

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        return mass_from_later(weights, tokens.distances(weights.shape[1]), None, self.low, self._last)

    def askers(self, counted: Bool[Tensor, "b _ r"], tokens: KeyTokens, seen: int) -> Float[Tensor, "b _ n"] | None:
        assert tokens.queries is not None
        before, rows = F.pad(counted.long().cumsum(-1), (1, 0)), counted.shape[2]
        places = torch.arange(seen, device=counted.device) - tokens.queries[0]
        last = 1 << 40 if self.high is None else self.high
        more, fewer = (before[..., (places + end).clamp(0, rows)] for end in (last + 1, self.low))
        found = (more - fewer).clamp_min(0).float()
        return found if tokens.real is None else found * tokens.real[:, None, :seen]

    def finish(self, total: Tensor, visible: Tensor) -> Tensor:
        return total / visible.clamp_min(1.0)

    @property
    def _last(self) -> float:
        return math.inf if self.high is None else self.high


def past_of(tokens: KeyTokens) -> int:
    """Return the index of the first query's own key, for a call whose keys are adjacent tokens."""
    assert tokens.queries is not None
    return int(tokens.queries[0] - tokens.positions[0, 0, 0])
