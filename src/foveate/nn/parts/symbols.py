"""Symbols: vectors that identify a token without its content (Altabaa and Lafferty, 2024)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.parts.heads import merge, split


class Symbols(nn.Module, ABC):
    """A symbol for each token; one object may serve all layers of a network."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n c"], start: int = 0) -> Float[Tensor, "b n c"]:
        """Return the symbols of tokens x, whose first position is `start`."""


@final
class SymbolicAttention(Symbols):
    """Symbols from a learned library, to which tokens attend by learned templates; similar tokens get similar symbols.

    Only the query has a projection, with a bias; there is no output projection.

    Args:
        dim: C.
        heads: heads of that attention, a divisor of C.
        n_symbols: symbols in the library.
    """

    def __init__(self, dim: int, heads: int = 4, n_symbols: int = 64) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("n_symbols", n_symbols, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.templates = nn.Parameter(torch.randn(n_symbols, dim))
        self.library = nn.Parameter(torch.randn(n_symbols, dim))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        q, k, v = (
            split(self.q(x), self.heads),
            split(self.templates[None], self.heads),
            split(self.library[None], self.heads),
        )
        return merge(torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v)


@final
class PositionalSymbols(Symbols):
    """A learned symbol for each position.

    Args:
        dim: C.
        max_length: positions with a symbol.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        validate.count("max_length", max_length, 1)
        self.library = nn.Parameter(torch.randn(max_length, dim))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        stop = start + x.shape[1]
        if stop > len(self.library):
            raise ShapeError(f"x must have at most max_length={len(self.library)} tokens; got {stop}")
        return self.library[start:stop].expand(len(x), -1, -1)


@final
class RelativeSymbols(nn.Module):
    """A learned symbol for each distance between a query and a key.

    Args:
        dim: C.
        reach: the largest distance with its own symbol, in either direction; larger ones are clipped.
    """

    def __init__(self, dim: int, reach: int) -> None:
        super().__init__()
        validate.count("reach", reach, 1)
        self.reach = reach
        self.library = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * reach + 1, dim)))

    def read(self, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n r"]:
        """Sum a query's weights by distance; the last query is at the last key."""
        n, m = weights.shape[-2:]
        gap = torch.arange(m, device=weights.device) - torch.arange(m - n, m, device=weights.device)[:, None]
        where = (gap.clamp(-self.reach, self.reach) + self.reach).expand(weights.shape)
        return weights.new_zeros(*weights.shape[:-1], len(self.library)).scatter_add(-1, where, weights)
