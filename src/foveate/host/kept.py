"""Indices of the tokens that are left of a call: take them out of tensors, and put them back among the others."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.host.slots.slots import EMPTY


def index_of(keep: Bool[Tensor, "b n"], count: int) -> Int[Tensor, "b k"]:
    """Return the tokens that stay, in order. Rows of fewer than `count` tokens begin with `EMPTY`."""
    last = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - count :]
    return last.masked_fill(~keep.gather(1, last), EMPTY)


def joined(index: Int[Tensor, "b n"] | None, chosen: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
    """Return the tokens that are left when some are chosen of those at `index`; None stands for all tokens."""
    return chosen if index is None else index.gather(1, chosen.clamp_min(0)).masked_fill(chosen < 0, EMPTY)


def taken(x: Tensor, index: Int[Tensor, "b k"], dim: int = 1) -> Tensor:
    """Return the entries at `index` along an axis, with the batch in the axis before it.

    An axis of one example is repeated for the batch. `EMPTY` takes the first entry.
    """
    shape = list(x.shape)
    shape[dim - 1] = index.shape[0]
    at = index.clamp_min(0).view(*[1] * (dim - 1), *index.shape, *[1] * (x.dim() - dim - 1))
    at = at.expand(*shape[:dim], index.shape[1], *shape[dim + 1 :])
    return x.expand(shape).gather(dim, at)


def restored(x: Float[Tensor, "b k c"], index: Int[Tensor, "b k"], whole: Float[Tensor, "b n c"]) -> Tensor:
    """Return `whole` with the entries at `index` replaced by those of `x`."""
    spare = F.pad(whole, (0, 0, 0, 1))  # one more entry, for what is no token
    at = torch.where(index < 0, whole.shape[1], index)[..., None].expand(*index.shape, x.shape[-1])
    return spare.scatter(1, at, x.to(whole.dtype))[:, :-1]
