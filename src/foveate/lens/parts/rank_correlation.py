"""Spearman's rank correlation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rank_correlation(x: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """Return Spearman's rank correlation between the rows of a matrix; NaN for a row whose numbers are all equal."""
    ranks = _ranks(x).double()
    ranks = ranks - ranks.mean(-1, keepdim=True)
    ranks = ranks / ranks.norm(dim=-1, keepdim=True)
    return ranks @ ranks.T


def _ranks(x: Tensor) -> Tensor:
    """Return ranks along the last axis; equal numbers share their mean rank."""
    x = x.contiguous()
    ordered = x.sort(-1).values
    return (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)) / 2
