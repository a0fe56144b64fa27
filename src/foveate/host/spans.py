"""Named spans: which tokens of a sequence are an image's, which ask about it, which were generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, shown


class Place(NamedTuple):
    """The tokens that spans are about: those at positions `first .. stop` of `batch` sequences.

    If tokens were dropped, `left (B, N)` are those of them that are left; below 0 stands for none.
    """

    batch: int
    first: int
    stop: int
    device: torch.device
    left: Int[Tensor, "b n"] | None = None


class Found(Protocol):
    """Spans that the host found by itself; see `foveate.host.hf.tokens_read.TokensRead`."""

    def names(self) -> tuple[str, ...]: ...

    def whole(self, stop: int) -> Mapping[str, Bool[Tensor, "b n"]]: ...


class Spans(Mapping[str, Tensor]):
    """The spans of some tokens by name, bool `(B, N)` each, True for the tokens that belong to the span.

    Spans that the caller gave come before those of the same name that the host found. Each is computed when it is read.

    Args:
        given: the caller's spans; see `span_mask`.
        found: the host's.
        place: returns the tokens that they are about.
    """

    def __init__(self, given: Mapping[str, Any], found: Found | None, place: Callable[[], Place]) -> None:
        self._given, self._found, self._place = given, found, place

    def __getitem__(self, name: str) -> Bool[Tensor, "b n"]:
        if name in self._given:
            return span_mask(name, self._given[name], self._place())
        if self._found is None or name not in self._found.names():
            raise KeyError(name)
        place = self._place()
        return span_mask(name, self._found.whole(place.stop)[name], place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def _names(self) -> dict[str, None]:
        found = () if self._found is None else self._found.names()
        return dict.fromkeys((*self._given, *found))

    def __len__(self) -> int:
        return len(self._names)

    def required(self, name: str, who: str) -> Bool[Tensor, "b n"]:
        """Return a span that a method cannot do without.

        Raises:
            OptionError: there is no such span.
        """
        if name not in self:
            raise OptionError(
                f'{who} needs the span "{name}", which was not found in the inputs: set run.spans["{name}"] to the '
                f"positions of its tokens"
            )
        return self[name]


def span_mask(name: str, span: Any, place: Place) -> Bool[Tensor, "b n"]:
    """Return which tokens belong to a span.

    Args:
        name: the span's name.
        span: positions in the sequence, padding counted, as whole numbers `(M,)`; or bool `(N,)` or `(B, N)` over the
            first N positions, in which case later tokens are outside. A span of fewer sequences than the batch is one
            of prompts that beam search has repeated.
        place: the tokens.
    """
    if not isinstance(span, Tensor):
        span = torch.as_tensor(span)
    if span.dtype != torch.bool:
        span = _at_positions(name, span)
    if span.dim() == 1:
        span = span[None]
    if span.dim() != 2 or place.batch % max(1, span.shape[0]) or not span.shape[0]:
        raise OptionError(
            f'spans: "{name}" must be positions (M,), or bool (N,) or (B, N) with B={place.batch}; got {shown(span)}'
        )
    some = span[:, place.first : place.stop].to(place.device)
    some = F.pad(some, (0, place.stop - place.first - some.shape[1]))
    some = some.repeat_interleave(place.batch // span.shape[0], 0)
    return some if place.left is None else some.gather(1, place.left.clamp_min(0)) & (place.left >= 0)


def _at_positions(name: str, positions: Tensor) -> Bool[Tensor, " n"]:
    whole = not positions.is_floating_point() and not positions.is_complex() and positions.dim() == 1
    if not whole or (positions.numel() and int(positions.min()) < 0):
        raise OptionError(f'spans: "{name}" must be positions (M,), none below 0, or bool; got {shown(positions)}')
    end = int(positions.max()) + 1 if positions.numel() else 0
    mask = torch.zeros(end, dtype=torch.bool, device=positions.device)
    mask[positions.long()] = True
    return mask
