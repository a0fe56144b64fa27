"""Measures of attention: named reductions of its weights, each computed in two ways that agree.

`fused` uses only a call's statistics; `from_weights` uses all weights or some rows of them. The first serves calls of
the model's own kernel, the second all others. `foveate.lens.registry` has the measures by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host.fused_statistics import Statistics
from foveate.host.site import Site


@dataclass(frozen=True, eq=False)
class KeyTokens:
    """The tokens that the keys of a call belong to.

    Args:
        positions: each key's position in the sequence, padding included; negative for a slot that is no single token.
            `h` is 1 if all heads hold the same keys.
        real: True for the tokens of the sequence that are not padding; None if there is no padding.
        queries: each query's position in the sequence; None for queries of another sequence.
        ids: the tokens of the sequence so far, negative where they are unknown; None if all are.
    """

    positions: Int[Tensor, "b h s"]
    real: Bool[Tensor, "b n"] | None = None
    queries: Int[Tensor, " r"] | None = None
    ids: Int[Tensor, "b n"] | None = None

    @classmethod
    def of(cls, site: Site, ids: Int[Tensor, "b n"] | None = None) -> Self:
        """Return the tokens of a call; `ids` are those of the sequence so far, if the call is not its first."""
        positions = site.positions[:, :1] if site.is_whole else site.positions
        if site.crosses:
            return cls(positions, site.real)
        if ids is None and site.seen == site.q.shape[2]:
            ids = site.ids
        return cls(positions, site.real, site.query_positions, ids)

    @classmethod
    def plain(cls, weights: Tensor) -> Self:
        """Return the tokens of a plain weight matrix: key j is token j, and the rows are the last tokens."""
        n = weights.shape[-1]
        places = torch.arange(n, device=weights.device)
        return cls(places.expand(weights.shape[0], 1, n), None, places[n - weights.shape[-2] :])

    def narrow(self, keys: slice, rows: slice = slice(None)) -> KeyTokens:
        queries = None if self.queries is None else self.queries[rows]
        return KeyTokens(self.positions[..., keys], self.real, queries, self.ids)

    def distances(self, heads: int) -> Int[Tensor, "b hq r s"]:
        """Return how far each key lies before each query; keys that are no single token are far away."""
        assert self.queries is not None
        places = self.positions.masked_fill(self.positions < 0, -(1 << 30))[:, :, None]
        return (self.queries[:, None] - places).repeat_interleave(heads // self.positions.shape[1], 1)

    def first(self, count: int) -> Bool[Tensor, "b h s"]:
        """Mark the keys that are among the first `count` real tokens."""
        if self.real is None:
            return (self.positions >= 0) & (self.positions < count)
        early = self.real & (self.real.cumsum(-1) <= count)
        places = self.positions.clamp_min(0)
        found = early[:, None].expand(-1, places.shape[1], -1).gather(2, places)
        return found & (self.positions >= 0)

    def among(self, positions: tuple[int, ...]) -> Bool[Tensor, "b h s"]:
        """Mark the keys at some positions of the sequence."""
        return torch.isin(self.positions, torch.tensor(positions, device=self.positions.device))


class Measure(ABC):
    """A named measure: a value for each query, `(B, Hq, Nq)`, or for each key, `(B, Hq, Nk)`.

    A new measure is one function: `from_weights`, or `from_output` for one of what heads give. With `fused` a measure
    of weights needs none where the model's own softmax runs. All return values that can be joined over calls: a measure
    over queries its values, one over keys the sum over rows, from which `finish` computes the values.
    """

    over: ClassVar[Literal["queries", "keys"]]
    #: True if the measure compares the places of queries and keys, which have to be in one sequence.
    compares_places: ClassVar[bool] = False

    #: True for a measure that compares tokens, and so has to know their ids.
    needs_ids: ClassVar[bool] = False
    #: True for a measure of weights whose rows need the token that comes next: the last row of a call waits for it.
    looks_ahead: ClassVar[bool] = False
    #: True for a measure of heads' outputs.
    reads_output: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which the values are returned."""

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        """Compute the measure from statistics, in O(N) memory; queries that do not count give zero.

        None, the default, if it needs the weights.
        """
        return None

    def from_weights(self, weights: Float[Tensor, "b h r k"], tokens: KeyTokens | None = None) -> Tensor:
        """Compute the measure from weights of some rows.

        With `tokens=None`, key j is token j, the rows are the last tokens, and there is no padding.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no from_weights")

    def from_output(self, out: Float[Tensor, "b h r dv"], holder: nn.Module) -> Tensor:
        """Compute the measure from the heads' outputs; `holder` is the module that has the output projection."""
        raise NotImplementedError(f"{type(self).__name__} defines no from_output")

    def applies(self, tokens: KeyTokens, causal: bool) -> Bool[Tensor, "#b 1 r"] | None:
        """Return the queries whose values count, of those that are no padding; None, the default, for all.

        `causal` is False if a query sees later keys.
        """
        return None

    def askers(self, counted: Bool[Tensor, "b _ r"], tokens: KeyTokens, seen: int) -> Float[Tensor, "b _ n"] | None:
        """Return, for a measure over keys, over how many counted queries each token's sum is a mean.

        They count also if the token has left the cache. `seen` is the number of tokens so far. None, the default, for
        the queries that see the key.
        """
        return None

    def check(self, length: int) -> None:  # noqa: B027  most measures name no tokens
        """Refuse a text of this many tokens, padding included, if the measure names tokens that it does not have.

        Raises:
            OptionError: as a message of one line.
        """

    def finish(self, total: Tensor, visible: Tensor) -> Tensor:
        """Return the keys' values, given the sum over all rows and the number of rows that see each key."""
        return total

    def reduce(self, values: Tensor, count: Tensor) -> Float[Tensor, "b h"]:
        """Average over the queries that count or the keys that are seen; NaN without any.

        `count` is 1 for a query that counts, and for a key the number of rows that see it.
        """
        return (values * (count > 0)).sum(-1) / (count > 0).sum(-1)


@final
@dataclass(frozen=True)
class Entropy(Measure):
    """The entropy of a query's weights in nats: 0 on one key, log n over n equal keys. Reduced to its mean."""

    name: str = field(default="entropy", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor:
        expected = call.mean_logit
        return torch.where(call.counted, (call.lse - expected).clamp_min(0.0), 0.0)

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        return torch.special.entr(weights).sum(-1)


@final
@dataclass(frozen=True)
class SinkMass(Measure):
    """The mass that a query puts on attention sinks. Reduced to its mean.

    Args:
        first: the number of first tokens, without padding, that are the sinks.
        positions: the sinks' positions in the sequence, with padding, instead of `first`; meant to be few.
    """

    first: int = 1
    positions: tuple[int, ...] | None = None
    name: str = field(default="sink_mass", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"

    def __post_init__(self) -> None:
        validate.at_least("first", self.first, 1)
        if self.positions is not None and (not self.positions or min(self.positions) < 0):
            raise OptionError(f"positions={self.positions} must be a non-empty tuple of positions, each at least 0")

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor:
        return call.mass_on(self._sinks(tokens)[:, 0])

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        sinks = self._sinks(KeyTokens.plain(weights) if tokens is None else tokens)
        sinks = sinks.repeat_interleave(weights.shape[1] // sinks.shape[1], 1)
        return (weights * sinks[:, :, None]).sum(-1)

    def _sinks(self, tokens: KeyTokens) -> Bool[Tensor, "b h s"]:
        return tokens.first(self.first) if self.positions is None else tokens.among(self.positions)


@final
@dataclass(frozen=True)
class ReceivedMass(Measure):
    """The mass that a key receives from all queries together.

    Reduced to the share of the key with the largest mass: 1 if a single key receives everything.

    Args:
        per_row: take the mean over the queries that see the key, so that early and late keys are comparable (few
            queries see the last ones). It is named `received_mean`, and reduced to its mean.
    """

    per_row: bool = False
    over: ClassVar[Literal["queries", "keys"]] = "keys"

    @property
    def name(self) -> str:
        return "received_mean" if self.per_row else "received_mass"

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor:
        return call.received

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        return weights.sum(-2)

    def finish(self, total: Tensor, visible: Tensor) -> Tensor:
        return total / visible.clamp_min(1.0) if self.per_row else total

    def reduce(self, values: Tensor, count: Tensor) -> Tensor:
        return super().reduce(values, count) if self.per_row else values.amax(-1) / values.sum(-1)
