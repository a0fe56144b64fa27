"""Measures of where attention goes: how far, at which offset, and within which window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.host.fused_statistics import Statistics, grouped
from foveate.lens.measures import KeyTokens, Measure


@final
@dataclass(frozen=True)
class MeanDistance(Measure):
    """The mean distance in tokens between a query and the keys that it attends to. Reduced to its mean.

    Where a query sees later keys, the distance counts in both directions; then the weights are needed.
    """

    name: str = field(default="mean_distance", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"
    compares_places: ClassVar[bool] = True

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        if not call.causal or tokens.queries is None:
            return None
        first = int(tokens.positions[0, 0, 0])  # the keys of a whole cache are adjacent tokens
        distance = (tokens.queries - first).to(call.q.dtype) - call.mean_place
        return torch.where(call.counted, distance, 0.0)

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        return (weights * tokens.distances(weights.shape[1]).abs()).sum(-1)


@final
@dataclass(frozen=True)
class AtOffset(Measure):
    """The mass that a query puts on the token at a fixed offset before itself. Reduced to its mean.

    Args:
        offset: tokens before the query: 0 is the token itself, 1 the previous one; negative for later tokens.
    """

    offset: int = 1
    over: ClassVar[Literal["queries", "keys"]] = "queries"
    compares_places: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("offset", abs(self.offset))

    @property
    def name(self) -> str:
        return {0: "own_token", 1: "previous_token"}.get(self.offset, f"offset_{self.offset}")

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        return None if tokens.queries is None else mass_at(call, tokens, self.offset)

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        return (weights * (tokens.distances(weights.shape[1]) == self.offset)).sum(-1)


@final
@dataclass(frozen=True)
class WindowMass(Measure):
    """The mass that a query puts on the tokens around itself: at most `width` away. Reduced to its mean.

    Args:
        width: the largest distance in tokens, in both directions where later keys are seen.
    """

    width: int = 4
    over: ClassVar[Literal["queries", "keys"]] = "queries"
    compares_places: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("width", self.width)

    @property
    def name(self) -> str:
        return f"within_{self.width}"

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        if tokens.queries is None:
            return None
        first = 0 if call.causal else -self.width
        return sum((mass_at(call, tokens, offset) for offset in range(first, self.width + 1)), call.lse.new_zeros(()))

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        return (weights * (tokens.distances(weights.shape[1]).abs() <= self.width)).sum(-1)


def mass_at(call: Statistics, tokens: KeyTokens, offset: int) -> Tensor:
    """Return the weight `(B, Hq, Nq)` of each query's key at an offset, from one logit and the log-sum-exp."""
    assert tokens.queries is not None
    n = call.k.shape[2]
    place = tokens.queries - offset - int(tokens.positions[0, 0, 0])
    seen = (place >= 0) & (place < n)
    if call.causal and offset < 0:
        seen = torch.zeros_like(seen)
    place = place.clamp(0, n - 1)
    keys = grouped(call.k[:, :, place], call.q.shape[1])
    weight = (call.scale * (call.q * keys).sum(-1) - call.lse).exp()
    seen = seen[None, None] & call.counted
    if call.key_mask is not None:
        seen = seen & call.key_mask[:, None, place]
    return torch.where(seen, weight, 0.0)
