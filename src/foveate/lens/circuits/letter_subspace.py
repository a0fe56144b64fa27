"""Subspaces of a head's queries, keys and values: what a head needs of them, and what its keys at labels stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.lens.circuits.head_inputs import EditInputs, Input
from foveate.lens.circuits.interventions import Head


@final
@dataclass(frozen=True, eq=False)
class Subspace:
    """A point and some orthonormal directions.

    Args:
        mean: the point.
        basis: the directions, one a column.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d r"]

    @classmethod
    def fit(cls, data: Float[Tensor, "... d"], rank: int) -> Self:
        """Return the mean of vectors and the directions in which they vary most; rank d is the whole space."""
        rows = _rows(data, rank)
        centred = rows - rows.mean(0)
        return cls(rows.mean(0), torch.linalg.eigh(centred.mT @ centred)[1].flip(-1)[:, :rank])

    @classmethod
    def random(cls, data: Float[Tensor, "... d"], rank: int, generator: torch.Generator | None = None) -> Self:
        """Return the mean of vectors and random directions: the baseline of `fit`."""
        rows = _rows(data, rank)
        draw = torch.randn(rows.shape[1], rank, generator=generator, dtype=rows.dtype)
        return cls(rows.mean(0), torch.linalg.qr(draw)[0])

    def project(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return the nearest points of the subspace."""
        mean, basis = self.mean.to(x), self.basis.to(x)
        return mean + (x - mean) @ basis @ basis.mT


def compress_head(
    head: Head,
    *,
    q: Subspace | None = None,
    k: Subspace | None = None,
    v: Subspace | None = None,
    query: int | None = -1,
    keys: Int[Tensor, "b c"] | None = None,
) -> EditInputs:
    """Return the method that projects a head's queries, keys and values on subspaces; its neighbours keep theirs.

    Args:
        head: the layer and the head.
        q, k, v: the subspaces; None leaves that input as it is.
        query: the position whose query is projected; negative ones count from the end of the call. None is all.
        keys: positions of the tokens of each text whose keys and values are projected: the labels; None is all.
    """
    given: list[tuple[Input, Subspace | None]] = [("q", q), ("k", k), ("v", v)]
    chosen = {name: subspace for name, subspace in given if subspace is not None}
    if not chosen:
        raise OptionError("q, k and v are all None; give at least one subspace")

    def change(_: Head, name: Input, x: Tensor, places: Tensor) -> Tensor:
        new = chosen[name].project(x)
        if name == "q":
            if query is None:
                return new
            at = query + int(places[-1]) + 1 if query < 0 else query
            return torch.where((places == at)[:, None], new, x)
        if keys is None:
            return new
        return torch.where((places[:, None] == keys.to(places)[:, None]).any(-1)[..., None], new, x)

    return EditInputs({head: tuple(chosen)}, change)


def item_accuracy(fitted: Float[Tensor, "m c d"], tested: Float[Tensor, "n c d"], rank: int = 3) -> float:
    """Return how well a subspace of labels' keys tells the items of other prompts apart, as a share of 0..1.

    Each key is taken less the mean over its prompt's labels. The directions and the mean of each item come from
    `fitted`; a key of `tested` counts if the nearest of these means is that of its own item. Chance is 1/c.

    If `tested` has prompts whose labels are random letters, a high share says that the keys stand for "N-th item". A
    share near chance says that they stand for the letters. Keys are taken after the rotary embedding, so that their
    positions also tell items apart where all prompts are of one form: begin prompts with texts of different lengths.

    Args:
        fitted, tested: a head's keys at the labels, in the order of the items.
        rank: number of directions.
    """
    if fitted.ndim != 3 or tested.ndim != 3 or fitted.shape[1:] != tested.shape[1:]:
        raise ShapeError(f"fitted and tested must be (prompts, items, D) alike; got {shown(fitted)}, {shown(tested)}")
    known, new = (keys.double() - keys.double().mean(1, keepdim=True) for keys in (fitted, tested))
    basis = Subspace.fit(known, rank).basis
    means = (known @ basis).mean(0)
    nearest = torch.cdist((new @ basis).flatten(0, 1), means).argmin(-1).view(new.shape[:2])
    return float((nearest == torch.arange(new.shape[1])).double().mean())


def _rows(data: Tensor, rank: int) -> Float[Tensor, "n d"]:
    validate.count("rank", rank, 1)
    if not isinstance(data, Tensor) or data.ndim < 2 or not data.numel() or rank > data.shape[-1]:
        raise ShapeError(f"data must be vectors (..., D) with D of at least rank={rank}; got {shown(data)}")
    return data.detach().double().cpu().flatten(0, -2)
