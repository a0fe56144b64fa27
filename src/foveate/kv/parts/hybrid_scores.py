"""Approximate weights of the tokens of a page, from a few channels of the query and the extremes of the page's keys."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.masks import NEG_INF


def largest_channels(q: Float[Tensor, "b h g d"], count: int) -> tuple[Int[Tensor, "b h c"], Float[Tensor, "b h g 1"]]:
    """Return a group's channels with the largest sum of |q|, and the share of each head's |q| that they hold."""
    size = q.float().abs()
    channels = size.sum(2).topk(count).indices
    held = size.gather(3, channels[:, :, None].expand(-1, -1, q.shape[2], -1)).sum(-1, keepdim=True)
    return channels, held / size.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def channel_products(
    q: Float[Tensor, "b h g d"], channels: Int[Tensor, "b h c"], table: Float[Tensor, "b h p e"]
) -> Float[Tensor, "b h g p"]:
    """Return products of queries and keys over some channels.

    Args:
        q: the queries of each group.
        channels: channels of each group.
        table: keys, or (with twice the channels) each channel's maximum and then its minimum over a page. A group takes
            the maximum of a channel in which the sum of its queries is positive, and else the minimum.
    """
    few = q.gather(3, channels[:, :, None].expand(-1, -1, q.shape[2], -1))
    column = channels
    if table.shape[3] > q.shape[3]:
        column = channels + q.shape[3] * (few.sum(2) <= 0)
    return few @ table.gather(3, column[:, :, None].expand(-1, -1, table.shape[2], -1)).mT


def token_weights(logits: Float[Tensor, "b h g p"], size: Int[Tensor, "#b #h p"]) -> Float[Tensor, "b h p"]:
    """Return the sum over a group of the softmax weight of one token of each page; all tokens of a page have its logit.

    Args:
        logits: of each page.
        size: tokens of each page; a page without any gets -inf.
    """
    logits = logits.float().masked_fill(size[:, :, None] == 0, NEG_INF)
    total = (logits + size[:, :, None].clamp_min(1).log()).logsumexp(-1, keepdim=True)
    weights = (logits - total).exp().sum(2)
    return weights.masked_fill(size == 0, NEG_INF)
