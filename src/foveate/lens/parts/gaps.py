"""Sums of attention by the gap between a query and a key: windowed distance, and influence on later tokens.

Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization (2025),
arXiv 2510.13554, defines both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.host.fused_statistics import Statistics, grouped

#: The largest number of weights of a band that are held at a time, where a band of 8 rows has fewer.
TILE = 1 << 16


def windowed_distance(
    weights: Float[Tensor, "... r k"], gaps: Int[Tensor, "... r k"], window: int | None
) -> Float[Tensor, "... r"]:
    """Return the mean of each row's gaps, of which none counts more than `window`; None for no limit."""
    return (weights * (gaps if window is None else gaps.clamp_max(window))).sum(-1)


def mass_from_later(
    weights: Float[Tensor, "... r k"], gaps: Int[Tensor, "... r k"], asks: Bool[Tensor, "... r"] | None, low: int,
    high: float = math.inf, closed: bool = True,
) -> Float[Tensor, "... k"]:  # fmt: skip
    """Return the mass that each key gets from rows `low` to `high` tokens later, of those that `asks` marks.

    `closed` includes the rows at the gap `high`; `asks=None` takes all rows.
    """
    inside = (gaps >= low) & (gaps <= high if closed else gaps < high)
    return (weights * (inside if asks is None else inside & asks[..., None])).sum(-2)


def bands(
    call: Statistics, past: int, low: int, high: int
) -> Iterator[tuple[slice, slice, Int[Tensor, "r k"], Float[Tensor, "b h r k"]]]:
    """Yield the weights at gaps from `low` to `high`, some rows at a time: rows, keys, gaps and weights.

    Weights at other gaps, and of queries and keys that do not count, are zero. Only the logits of the band are
    computed, so that memory is O(N) and time O(N · (high - low)).

    Args:
        call: the call's statistics; its log-sum-exp is all that is needed.
        past: the index of the first query's own key.
        low, high: gaps in tokens; negative for later keys.
    """
    (batch, heads, n), total = call.q.shape[:3], call.k.shape[2]
    width, room = high - low + 1, TILE / (batch * heads)
    step = max(
        8, min(4 * width, int((math.sqrt(width * width + 4 * room) - width) / 2))
    )  # step * (step + width) = room
    for start in range(0, n, step):
        stop = min(n, start + step)
        first, last = max(0, start + past - high), min(total, stop + past - low)
        if first >= last:
            continue
        rows, keys = slice(start, stop), slice(first, last)
        places = torch.arange(start, stop, device=call.q.device) + past
        gaps = places[:, None] - torch.arange(first, last, device=call.q.device)
        seen = (gaps >= max(low, 0) if call.causal else gaps >= low) & (gaps <= high) & call.counted[:, :, rows, None]
        if call.key_mask is not None:
            seen = seen & call.key_mask[:, None, None, keys]
        logits = call.scale * call.q[:, :, rows] @ grouped(call.k[:, :, keys], heads).mT
        yield rows, keys, gaps, torch.where(seen, (logits - call.lse[:, :, rows, None]).exp(), 0.0)
