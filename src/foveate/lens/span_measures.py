"""Measures between named spans of a text: the mass that the queries of one span put on the keys of another.

spans = {"question": (3, 9), "context": (9, 200)}
seen = foveate.look(model, ids, measures=span_masses(spans))
seen.measures()                     # "question->context" and the other pairs, for every layer and head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown, unknown
from foveate.host.fused_statistics import Statistics
from foveate.lens.measures import KeyTokens, Measure

#: A span's first position and the one behind its last, in the sequence with its padding: for all texts, or for each.
Span = tuple[int, int] | Sequence[tuple[int, int]]

#: Spans as they are kept: names with one place, or with one for each text.
_Places = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]

_FEW = 64  # keys whose logits are cheaper than a pass of the kernel


@final
@dataclass(frozen=True)
class SpanMass(Measure):
    """The mass that queries put on a named span, of which they see what the mask allows. Reduced to their mean.

    All measures of the same spans share one pass of the kernel.

    Args:
        spans: places by name, as `{"question": (3, 9)}`, counted with padding; one for all texts, or a list with one
            for each. No two share a token.
        target: the span that is looked at.
        source: the span whose queries count; None for all queries.
    """

    spans: Mapping[str, Span] | _Places
    target: str
    source: str | None = None
    over: ClassVar[Literal["queries", "keys"]] = "queries"

    def __post_init__(self) -> None:
        places = _checked(dict(self.spans))
        object.__setattr__(self, "spans", places)
        names = [name for name, _ in places]
        for name in (self.target, self.source):
            if name is not None and name not in names:
                raise unknown("span", name, names)

    @property
    def name(self) -> str:
        return f"{'all' if self.source is None else self.source}->{self.target}"

    def check(self, length: int) -> None:
        for name, places in self._places:
            for start, stop in places:
                if stop > length:
                    raise OptionError(
                        f'spans: "{name}"=({start}, {stop}) must lie within the text, which has {length} tokens'
                    )

    def applies(self, tokens: KeyTokens, causal: bool) -> Bool[Tensor, "#b 1 r"] | None:
        if self.source is None:
            return None
        assert tokens.queries is not None
        return self._inside(tokens.queries[None])[..., self._number(self.source)][:, None]

    def fused(self, call: Statistics, tokens: KeyTokens) -> Tensor | None:
        inside, target = self._inside(tokens.positions[:, 0]), self._number(self.target)
        if sum(stop - start for _, places in self._places for start, stop in places[:1]) <= _FEW:
            return call.mass_on(inside[..., target])
        mean = call.mean_of(("spans", self.spans), lambda: inside.to(call.q.dtype)[:, None])
        return torch.where(call.counted, mean[..., target], 0.0)

    def from_weights(self, weights: Tensor, tokens: KeyTokens | None = None) -> Tensor:
        tokens = KeyTokens.plain(weights) if tokens is None else tokens
        inside = torch.stack(
            [self._inside(head)[..., self._number(self.target)] for head in tokens.positions.unbind(1)], 1
        )
        return (weights * inside.repeat_interleave(weights.shape[1] // inside.shape[1], 1)[:, :, None]).sum(-1)

    @property
    def _places(self) -> _Places:
        assert isinstance(self.spans, tuple)
        return self.spans

    def _number(self, name: str) -> int:
        return [each for each, _ in self._places].index(name)

    def _inside(self, positions: Int[Tensor, "b s"]) -> Bool[Tensor, "b s c"]:
        """Return whether each position is in each span."""
        ends = torch.tensor([places for _, places in self._places], device=positions.device)  # (c, texts, 2)
        if ends.shape[1] > 1 and positions.shape[0] > 1 and ends.shape[1] != positions.shape[0]:
            raise ShapeError(f"spans are those of {ends.shape[1]} texts; the call has {positions.shape[0]}")
        start, stop = ends.transpose(0, 1).unbind(-1)
        return (positions[..., None] >= start[:, None]) & (positions[..., None] < stop[:, None])


def span_masses(spans: Mapping[str, Span]) -> list[Measure]:
    """Return the measures between all pairs of spans, a span to itself included.

    Args:
        spans: see `SpanMass`.
    """
    _checked(spans)
    return [SpanMass(spans, target, source) for source, target in product(spans, repeat=2)]


def _checked(spans: Mapping[str, Span]) -> _Places:
    """Return spans as they are kept; refuse empty ones, and two that share a token."""
    found = tuple((name, _places_of(name, span)) for name, span in spans.items())
    texts = max((len(places) for _, places in found), default=0)
    if not found or any(len(places) not in (1, texts) for _, places in found):
        raise OptionError(f"spans={shown(dict(spans))} must have names with one place, or with one for each text")
    for (one, first), (other, second) in combinations(found, 2):
        for text in range(texts):
            a, b = first[text if len(first) > 1 else 0], second[text if len(second) > 1 else 0]
            if max(a[0], b[0]) < min(a[1], b[1]):
                raise OptionError(f'spans: "{one}"={a} and "{other}"={b} overlap; a token may be in one span only')
    width = {name: places if len(places) == texts else places * texts for name, places in found}
    return tuple(width.items())


def _places_of(name: object, span: Span) -> tuple[tuple[int, int], ...]:
    given: Any = span
    single = isinstance(given, tuple) and len(given) == 2 and all(type(end) is int for end in given)
    places = (given,) if single else tuple(tuple(place) if isinstance(place, list) else place for place in given)
    for place in places:
        whole = isinstance(place, tuple) and len(place) == 2 and all(type(end) is int for end in place)
        if not isinstance(name, str) or not name or not whole or not 0 <= place[0] < place[1]:
            raise OptionError(f'spans: "{name}"={shown(span)} must be (start, stop) with 0 <= start < stop')
    return places
