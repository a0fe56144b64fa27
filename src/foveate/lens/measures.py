"""What can be measured of attention: named reductions of its weights, each computed in two ways that agree.

`fused` takes the call's statistics and never sees a weight; `from_weights` takes weights, whole or some rows of them.
The first is used wherever the model's own kernel ran, the second wherever something else happened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, unknown
from foveate.host.site import Site
from foveate.lens.capture.fused import Statistics


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the keys of a call stand for.

    Args:
        positions: of each key in the sequence, padding included; negative for a slot that is no single token. `h` is 1
            where all heads hold the same.
        real: which tokens of the sequence are no padding (None: all).
    """

    positions: Int[Tensor, "b h s"]
    real: Bool[Tensor, "b n"] | None = None

    @classmethod
    def of(cls, site: Site) -> Self:
        return cls(site.positions[:, :1] if site.is_whole else site.positions, site.real)

    @classmethod
    def plain(cls, weights: Tensor) -> Self:
        """Those of a matrix that nothing else is known of: key j is token j."""
        n = weights.shape[-1]
        return cls(torch.arange(n, device=weights.device).expand(weights.shape[0], 1, n))

    def narrow(self, keys: slice) -> Tokens:
        return Tokens(self.positions[..., keys], self.real)

    def first(self, count: int) -> Bool[Tensor, "b h s"]:
        """The keys that are among the first `count` real tokens."""
        if self.real is None:
            return (self.positions >= 0) & (self.positions < count)
        early = self.real & (self.real.cumsum(-1) <= count)
        places = self.positions.clamp_min(0)
        found = early[:, None].expand(-1, places.shape[1], -1).gather(2, places)
        return found & (self.positions >= 0)

    def among(self, positions: tuple[int, ...]) -> Bool[Tensor, "b h s"]:
        """The keys at some positions of the sequence."""
        return torch.isin(self.positions, torch.tensor(positions, device=self.positions.device))


class Measure(ABC):
    """A named measure: a value for each query, `(B, Hq, Nq)`, or for each key, `(B, Hq, Nk)`.

    Both ways give what adds up over calls: a measure over queries its values, one over keys the sum over the rows,
    which `finish` turns into values.
    """

    name: str
    over: ClassVar[Literal["queries", "keys"]]

    @abstractmethod
    def fused(self, call: Statistics, tokens: Tokens) -> Tensor:
        """From statistics, in O(N) memory; zero for queries that do not count."""

    @abstractmethod
    def from_weights(self, weights: Float[Tensor, "b h r k"], tokens: Tokens | None = None) -> Tensor:
        """From weights of some rows; `tokens` says what the keys are (None: token j is key j, none is padding)."""

    def finish(self, total: Tensor, visible: Tensor) -> Tensor:
        """Values of the keys, from the sum over all rows and the number of rows that see each key."""
        return total

    def reduce(self, values: Tensor, count: Tensor) -> Float[Tensor, "b h"]:
        """One number a head, NaN without any; `count` is 1 for a query that counts, for a key the rows that see it."""
        return (values * (count > 0)).sum(-1) / (count > 0).sum(-1)


@final
@dataclass(frozen=True)
class Entropy(Measure):
    """How spread a query's attention is, in nats: 0 on a single key, log n over n keys alike. Reduced to its mean."""

    name: str = field(default="entropy", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"

    def fused(self, call: Statistics, tokens: Tokens) -> Tensor:
        expected = call.scale * (call.q * call.mean_key).sum(-1)  # the mean logit
        return torch.where(call.live, (call.lse - expected).clamp_min(0.0), 0.0)

    def from_weights(self, weights: Tensor, tokens: Tokens | None = None) -> Tensor:
        return torch.special.entr(weights).sum(-1)


@final
@dataclass(frozen=True)
class SinkMass(Measure):
    """The mass that a query puts on attention sinks. Reduced to its mean.

    Args:
        first: so many first tokens, padding not counted, are the sinks.
        positions: the sinks' positions in the sequence, padding counted, in place of `first`; meant to be few.
    """

    first: int = 1
    positions: tuple[int, ...] | None = None
    name: str = field(default="sink_mass", init=False)
    over: ClassVar[Literal["queries", "keys"]] = "queries"

    def __post_init__(self) -> None:
        validate.at_least("first", self.first, 1)
        if self.positions is not None and (not self.positions or min(self.positions) < 0):
            raise OptionError(f"positions={self.positions} must be positions of the sequence, from 0, and not empty")

    def fused(self, call: Statistics, tokens: Tokens) -> Tensor:
        return call.mass_on(self._sinks(tokens)[:, 0])

    def from_weights(self, weights: Tensor, tokens: Tokens | None = None) -> Tensor:
        sinks = self._sinks(Tokens.plain(weights) if tokens is None else tokens)
        sinks = sinks.repeat_interleave(weights.shape[1] // sinks.shape[1], 1)
        return (weights * sinks[:, :, None]).sum(-1)

    def _sinks(self, tokens: Tokens) -> Bool[Tensor, "b h s"]:
        return tokens.first(self.first) if self.positions is None else tokens.among(self.positions)


@final
@dataclass(frozen=True)
class ReceivedMass(Measure):
    """The mass that a key receives from all queries together.

    Reduced to the share of it all that goes to the key with the most: 1 where a single key takes everything.

    Args:
        per_row: the mean over the queries that can see the key instead, which early and late keys can be compared by
            (the last ones are judged on few queries). It is named `received_mean`, and reduced to its mean.
    """

    per_row: bool = False
    over: ClassVar[Literal["queries", "keys"]] = "keys"

    @property
    def name(self) -> str:  # type: ignore[override]
        return "received_mean" if self.per_row else "received_mass"

    def fused(self, call: Statistics, tokens: Tokens) -> Tensor:
        return call.received

    def from_weights(self, weights: Tensor, tokens: Tokens | None = None) -> Tensor:
        return weights.sum(-2)

    def finish(self, total: Tensor, visible: Tensor) -> Tensor:
        return total / visible.clamp_min(1.0) if self.per_row else total

    def reduce(self, values: Tensor, count: Tensor) -> Tensor:
        return super().reduce(values, count) if self.per_row else values.amax(-1) / values.sum(-1)


#: The measures that can be asked for by name.
MEASURES: dict[str, Measure] = {
    measure.name: measure for measure in (Entropy(), SinkMass(), ReceivedMass(), ReceivedMass(per_row=True))
}


def named(measure: str | Measure) -> Measure:
    """A measure by its name, or the measure itself."""
    if isinstance(measure, Measure):
        return measure
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    return MEASURES[measure]
