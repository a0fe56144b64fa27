"""One query that stands for a window of queries."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate

#: How the queries of a window are weighted.
Weighting = Literal["activation", "mean", "last"]


def activation_bias(q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n"]:
    """Return how far each query is from the mean of its window.

    That is the squared deviation of each channel divided by the channel's variance in the window, averaged over
    channels and heads: a diagonal Mahalanobis distance, whose mean over the window is 1. A channel that does not vary
    counts as 0.
    """
    deviation = (q - q.mean(2, keepdim=True)).square().to(torch.promote_types(q.dtype, torch.float32))
    variance = deviation.mean(2, keepdim=True)
    return torch.where(variance > 0, deviation / variance, 0.0).mean((1, 3))


def probe_query(q: Float[Tensor, "b h n d"], weighting: Weighting = "activation") -> Float[Tensor, "b h d"]:
    """Return one query for each head, a weighted mean of the window's queries.

    Args:
        q: the queries of a window.
        weighting: "activation" weights a query by its activation bias, so that the few that differ from the others
            decide; "mean" weights all equally; "last" is the last query alone.
    """
    validate.one_of("weighting", weighting, ("activation", "mean", "last"))
    if weighting == "last" or q.shape[2] == 1:
        return q[:, :, -1]
    if weighting == "mean":
        return q.mean(2)
    bias = activation_bias(q)
    total = bias.sum(-1, keepdim=True)
    weights = torch.where(total > 0, bias / total, 1 / q.shape[2])  # equal queries have no bias
    return (weights[:, None, :, None] * q).sum(2).to(q.dtype)
