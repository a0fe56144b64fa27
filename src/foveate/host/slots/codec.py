"""Codecs: how the keys, or the values, of tokens are held encoded, and read without a copy of the whole cache."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError

#: The tensors that hold some tokens, by name: `(B, h, rows, ...)`, where each row holds equally many tokens. A table,
#: which belongs to all tokens of a head, has no rows: `(B, h, ...)`.
Parts = dict[str, Tensor]


class Codec(ABC):
    """Encodes vectors of some tokens, and decodes them when attention reads them.

    Decoding may return vectors in another space, that of the codes: rotated, or with fewer channels. Then `into` maps
    queries into that space, and `restore` maps vectors back. `restore` is linear, and `into` is its transpose, so that
    dot products and weighted sums may be computed on decoded vectors, and only queries and results are mapped.
    Codecs are equal if they give equal codes: make them frozen dataclasses.

    Attributes:
        tokens: tokens that share a row of every part that has rows: they are encoded together, and dropped together.
        tables: names of the parts that have no rows.
    """

    tables: ClassVar[tuple[str, ...]] = ()

    @property
    def tokens(self) -> int:
        return 1

    @abstractmethod
    def encode(self, x: Float[Tensor, "b h n d"], tables: Parts) -> Parts:
        """Encode tokens, a whole number of times `tokens`.

        Args:
            x: their keys or values.
            tables: the tables of these heads, if the codec has any; none where `x` is zeros, to count bytes.
        """

    @abstractmethod
    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Float[Tensor, "b h n c"]:
        """Decode all tokens of some parts, in the space of the codes.

        Args:
            parts: the result of `encode`, or some rows of it.
            width: channels of the encoded vectors.
            dtype: the type of the result, float32 or float64.
        """

    def into(self, q: Float[Tensor, "b h n d"], parts: Parts) -> Float[Tensor, "b h n c"]:
        """Map queries of each head into the space of the codes."""
        return q

    def restore(self, x: Float[Tensor, "b h n c"], parts: Parts, width: int) -> Float[Tensor, "b h n d"]:
        """Map vectors of each head from the space of the codes back to that of the model."""
        return x


@dataclass(frozen=True)
class Uncoded(Codec):
    """Holds vectors as they are, for a method that encodes keys only, or values only."""

    def encode(self, x: Tensor, tables: Parts) -> Parts:
        return {"x": x}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        return parts["x"].to(dtype)


@dataclass(frozen=True, eq=False)
class Coding:
    """The codecs by which a layer holds its older tokens, and how many it encodes at a time.

    Args:
        keys, values: the codecs.
        group: tokens that are encoded at a time, once the layer has that many beside the residual.
        residual: newest tokens of each head that are never encoded.
        tables: tables for the codecs of all heads of the layer, `(B, Hkv, ...)`. They hold for the first group of each
            head and sequence; later groups take those of the first one.
    """

    keys: Codec
    values: Codec
    group: int
    residual: int
    tables: Parts = field(default_factory=dict)

    def __post_init__(self) -> None:
        for codec in (self.keys, self.values):
            if self.group % codec.tokens:
                raise OptionError(
                    f"group={self.group} must be a multiple of the {codec.tokens} tokens that {type(codec).__name__} "
                    f"encodes together"
                )

    @property
    def unit(self) -> int:
        """Tokens that are dropped together: those that share a row."""
        return math.lcm(self.keys.tokens, self.values.tokens)

    def nbytes(self, tokens: int, width: int, value_width: int, dtype: torch.dtype) -> float:
        """Return the bytes of some tokens of one head, positions and tables included."""
        counted = 0.0
        for codec, channels in ((self.keys, width), (self.values, value_width)):
            parts = codec.encode(torch.zeros(1, 1, self.group, channels, dtype=dtype), {})
            counted += sum(x.nbytes * (1 if name in codec.tables else tokens / self.group) for name, x in parts.items())
        return counted + tokens * torch.int32.itemsize if tokens else 0.0
