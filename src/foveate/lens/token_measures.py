"""Measures of which tokens a head looks at: earlier copies of a token, what followed them, and what comes next.

They need the ids of the tokens, which a lens knows from the call. On a text, a query counts if there is a token that it
could look at, so that the mean says what a head does where it has the choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.engines.fused import FEW
from foveate.core.errors import OptionError
from foveate.host.fused_statistics import Statistics
from foveate.lens.measures import KeyTokens, Measure
from foveate.lens.parts.matching import mass_on_equal

#: Labels of what lies outside the text, which no token has.
_NO_QUERY, _NO_KEY = -(1 << 60), -(1 << 61)


class TokenMeasure(Measure):
    """The mass that a query puts on keys by their tokens. Reduced to the mean over queries with such a key.

    A key counts if the token `key_shift` places after it is the one `query_shift` places after the query, at another
    place of the text.
    """

    over: ClassVar[Literal["queries", "keys"]] = "queries"
    compares_places: ClassVar[bool] = True
    needs_ids: ClassVar[bool] = True
    query_shift: ClassVar[int] = 0
    key_shift: ClassVar[int] = 0

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        if call.q.shape[2] <= FEW:
            return None  # a few whole rows are cheaper than groups of equal tokens
        asked, told = self._asked(tokens), self._told(tokens)[:, 0]
        shift = self.query_shift - self.key_shift
        return mass_on_equal(call, asked, told, excluded=self._places(tokens) + shift - int(tokens.positions[0, 0, 0]))

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        same = self._asked(tokens)[:, None, :, None] == self._told(tokens)[:, :, None]
        itself = self._places(tokens)[:, None] + self.query_shift == tokens.positions[:, :, None] + self.key_shift
        found = (same & ~itself).repeat_interleave(weights.shape[1] // tokens.positions.shape[1], 1)
        return (weights * found).sum(-1)

    def applies(self, tokens: KeyTokens, causal: bool) -> Bool[Tensor, "b 1 r"]:
        """Return the queries with a key that they could look at: an earlier one, or any if they see later ones."""
        labels, asked = self._labels(tokens), self._asked(tokens)
        at, n = self._places(tokens) + self.query_shift, labels.shape[1]
        places = torch.arange(n, device=labels.device)
        key = places - self.key_shift
        labels = torch.where((key >= 0) & (key < n), labels, -1 - places)
        ordered, order = labels.sort(dim=-1, stable=True)
        low, high = torch.searchsorted(ordered, asked), torch.searchsorted(ordered, asked, right=True)
        first, last = (order.gather(1, place.clamp(0, n - 1)) for place in (low, high - 1))
        found = (high > low) & (asked >= 0)
        return (found & ((first < at) if causal else (first != at) | (last != at)))[:, None]

    def _asked(self, tokens: KeyTokens) -> Int[Tensor, "b r"]:
        """Return the token that each query is compared by."""
        labels, at = self._labels(tokens), self._places(tokens) + self.query_shift
        n = labels.shape[1]
        return torch.where((at >= 0) & (at < n), labels[:, at.clamp(0, n - 1)], _NO_QUERY)

    def _told(self, tokens: KeyTokens) -> Int[Tensor, "b h s"]:
        """Return the token that each key is compared by."""
        labels, at = self._labels(tokens), tokens.positions + self.key_shift
        n = labels.shape[1]
        inside = (tokens.positions >= 0) & (at >= 0) & (at < n)
        found = labels[:, None].expand(-1, at.shape[1], -1).gather(2, at.clamp(0, n - 1))
        return torch.where(inside, found, _NO_KEY)

    def _labels(self, tokens: KeyTokens) -> Int[Tensor, "b n"]:
        """Return the tokens of the text; padding and unknown ones have negative labels, each its own."""
        ids = tokens.ids
        if ids is None:
            raise OptionError(
                f"{self.name} compares tokens, whose ids are unknown here; give the model input_ids of one stack"
            )
        known = ids >= 0 if tokens.real is None else (ids >= 0) & tokens.real[:, : ids.shape[1]]
        return torch.where(known, ids, -1 - torch.arange(ids.shape[1], device=ids.device))

    @staticmethod
    def _places(tokens: KeyTokens) -> Int[Tensor, " r"]:
        assert tokens.queries is not None
        return tokens.queries


@final
@dataclass(frozen=True)
class DuplicateMass(TokenMeasure):
    """The mass on other places with the query's own token: on the earlier ones, where only those are seen."""

    name: str = field(default="duplicate_token", init=False)


@final
@dataclass(frozen=True)
class InductionMass(TokenMeasure):
    """The mass on what followed the query's token where it stood before: that of an induction head.

    In-context Learning and Induction Heads (2022), arXiv 2209.11895, calls it prefix matching.
    """

    name: str = field(default="induction", init=False)
    key_shift: ClassVar[int] = -1


@final
@dataclass(frozen=True)
class CopyMass(TokenMeasure):
    """The mass on the token that comes next, where it stood before: the one that a head would have to copy.

    The last query of the text does not count, since nothing comes after it.
    """

    name: str = field(default="copying", init=False)
    looks_ahead: ClassVar[bool] = True
    query_shift: ClassVar[int] = 1
