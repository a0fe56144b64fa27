"""The maps of one stack of layers, the tokens on both sides, and the queries and keys that the maps come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown

#: Queries and keys by the segment that they stand in.
Segments = Literal["all", "A->A", "A->B", "B->A", "B->B"]


@final
@dataclass(frozen=True, eq=False)
class Products:
    """Queries and keys of one layer, and how the model makes weights of their products.

    Args:
        q, k: of all heads; with grouped queries, `k` has fewer heads.
        scale: the factor of a product of a query and a key.
        bias: what the model adds to the scaled products; None is nothing.
        softcap: the cap of `cap * tanh(logit / cap)`, taken before the bias; None is no cap.
        sinks: one more logit of each head, without a key; None if there is none.
    """

    q: Float[Tensor, "h n d"]
    k: Float[Tensor, "hkv m d"]
    scale: float
    bias: Float[Tensor, "#h n m"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " h"] | None = None

    def __post_init__(self) -> None:
        fits = self.q.ndim == self.k.ndim == 3 and self.q.shape[2] == self.k.shape[2]
        if not fits or not len(self.k) or len(self.q) % len(self.k):
            raise ShapeError(f"q must be (H, N, D) and k (Hkv, M, D); got {shown(self.q)} and {shown(self.k)}")

    def keys_of(self, head: int) -> Float[Tensor, "m d"]:
        """Return the keys that a query head reads."""
        return self.k[head // (len(self.q) // len(self.k))]

    def only(self, queries: Sequence[int] | Tensor, keys: Sequence[int] | Tensor) -> Self:
        """Return the products of some queries and keys."""
        bias = None if self.bias is None else self.bias[:, queries][:, :, keys]
        return replace(self, q=self.q[:, queries], k=self.k[:, keys], bias=bias)


@final
@dataclass(frozen=True, eq=False)
class Stack:
    """The maps of one stack of layers: an encoder's, a decoder's, or those from a decoder to its encoder.

    Args:
        maps: the weights `(queries, keys)` of each head, by `(layer, head)`; heads may be missing.
        queries, keys: the texts of the tokens.
        places: each query's place among the keys; None if they are tokens of another sequence.
        boundary: the place of the first token of the second segment; None if there is one segment.
        products: queries and keys by layer; empty if they are not known.
        grid: rows and columns of patches, which are the last tokens; None if tokens are no patches.
        image: the image that the patches are of, from 0 to 1.
        prompt: the number of tokens that were read; the others were generated. None is all.
    """

    maps: Mapping[tuple[int, int], Float[Tensor, "n m"]]
    queries: Sequence[str]
    keys: Sequence[str]
    places: Sequence[int] | None = None
    boundary: int | None = None
    products: Mapping[int, Products] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    image: Float[Tensor, "3 y x"] | None = None
    prompt: int | None = None

    def __post_init__(self) -> None:
        if not self.maps:
            raise OptionError("maps must hold the map of at least one head; got none")
        size = (len(self.queries), len(self.keys))
        for (layer, head), weights in self.maps.items():
            if tuple(weights.shape) != size:
                raise ShapeError(
                    f"the map of layer {layer}, head {head} must be {size} for {size[0]} query and {size[1]} key "
                    f"tokens; got {shown(weights)}"
                )
        self._check_places(size)
        if self.grid is not None and self.grid[0] * self.grid[1] > size[1]:
            raise OptionError(f"grid={self.grid} must have at most {size[1]} patches, the number of tokens")

    def _check_places(self, size: tuple[int, int]) -> None:
        places = self.places
        if places is not None and (len(places) != size[0] or not all(0 <= at < size[1] for at in places)):
            raise OptionError(f"places must hold a place in 0..{size[1] - 1} for each of {size[0]} queries")
        if self.boundary is None:
            return
        if self.places is None:
            raise OptionError(f"boundary={self.boundary} needs queries and keys of the same text")
        if not 0 < self.boundary < size[1]:
            raise OptionError(f"boundary={self.boundary} must be in 1..{size[1] - 1}, inside the text")

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.maps})

    @property
    def depth(self) -> int:
        """The number of rows of a picture of all heads."""
        return max(layer for layer, _ in self.maps) + 1

    @property
    def width(self) -> int:
        """The number of columns of a picture of all heads."""
        return max(head for _, head in self.maps) + 1

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Return the heads of a layer that have a map.

        Raises:
            OptionError: the layer has none.
        """
        found = tuple(sorted(head for at, head in self.maps if at == layer))
        if not found:
            raise OptionError(f"layer={layer} must be one of the layers with a map: {_listed(self.layers)}")
        return found

    def map(self, layer: int, head: int) -> Float[Tensor, "n m"]:
        """Return the weights of a head.

        Raises:
            OptionError: the head has no map.
        """
        known = self.heads_of(layer)
        if head not in known:
            raise OptionError(f"head={head} must be one of layer {layer}'s heads with a map: {_listed(known)}")
        return self.maps[layer, head]

    def in_segments(self, segments: Segments) -> Bool[Tensor, "n m"]:
        """Return the pairs whose query and key stand in some segments, as a mask."""
        n, m = len(self.queries), len(self.keys)
        if segments == "all":
            return torch.ones(n, m, dtype=torch.bool)
        if segments not in ("A->A", "A->B", "B->A", "B->B"):
            raise OptionError(f'segments={segments!r} must be "all", "A->A", "A->B", "B->A" or "B->B"')
        if self.boundary is None or self.places is None:
            raise OptionError(f'segments="{segments}" needs a second segment: give boundary=')
        second = torch.arange(m) >= self.boundary
        source, target = (name == "B" for name in (segments[0], segments[-1]))
        return (second[list(self.places)] == source)[:, None] & (second == target)


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as a short text."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))
