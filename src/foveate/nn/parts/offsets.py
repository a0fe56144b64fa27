"""Offsets between the tokens of a window, and a learned number for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.nn.parts.grid import Size


class Offsets(NamedTuple):
    """The offsets that occur in a window of `(h, w)` tokens, T = h w of them.

    Attributes:
        values: rows and columns from key to query, `((2h - 1) (2w - 1), 2)`, in order from `(1 - h, 1 - w)`.
        place: the index in `values` of each pair of a query and a key, `(T, T)`.
    """

    values: Int[Tensor, "offsets 2"]
    place: Int[Tensor, "t t"]


def offsets(window: Size, device: torch.device | str | None = None) -> Offsets:
    """Return the offsets in a window, whose tokens are numbered row by row."""
    h, w = window
    rows, columns = torch.arange(1 - h, h, device=device), torch.arange(1 - w, w, device=device)
    at = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device))
    apart = at[:, None] - at
    index = (apart[..., 0] + h - 1) * (2 * w - 1) + apart[..., 1] + w - 1
    return Offsets(torch.cartesian_prod(rows, columns), index)


@final
class OffsetBias(nn.Module):
    """A bias on the scores in a window: a learned number for each head and each offset from key to query.

    Args:
        heads: H.
        window: `(h, w)`.
    """

    def __init__(self, heads: int, window: Size) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Float[Tensor, "h t t"]:
        return self.table[offsets(self.window, self.table.device).place].permute(2, 0, 1)


def relative_scores(
    q: Float[Tensor, "b h *space d"], vectors: Sequence[Float[Tensor, "_n _m d"]]
) -> Float[Tensor, "b h q k"]:
    """Return the product of each query on a grid with a vector for each offset to a key, the sum over the axes.

    Args:
        q: queries on a grid of one or more axes.
        vectors: for each axis, the vector of each pair of the query's place and the key's along it.
    """
    axes = len(vectors)
    scores: Tensor | None = None
    for axis, vector in enumerate(vectors):
        along = torch.einsum("...id,ijd->...ij", q.movedim(2 + axis, -2), vector).movedim(-2, 2 + axis)
        keys = [1] * axes
        keys[axis] = vector.shape[1]
        part = along.unflatten(-1, keys)
        scores = part if scores is None else scores + part
    assert scores is not None
    return scores.flatten(2 + axes).flatten(2, 1 + axes)
