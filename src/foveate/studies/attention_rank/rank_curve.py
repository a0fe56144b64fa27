"""Trained attention of several ranks with the same number of query and key parameters.

On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.studies.attention_rank.nearest_point import NearestPointTask
from foveate.studies.attention_rank.rank_attention import RankAttention

_HELDOUT = 4096  # sets of points that a trained layer is measured on


@dataclass(frozen=True)
class RankError:
    """The mean squared error of a trained layer on fresh points; 1 for an output of 0."""

    rank: int
    heads: int
    error: float


def rank_curve(
    task: NearestPointTask, ranks: Sequence[int], r_times_h: int, *, steps: int = 1500, batch: int = 256,
    rate: float = 0.02, generator: torch.Generator | None = None,
) -> list[RankError]:  # fmt: skip
    """Train one layer of softmax attention for each rank, with `r_times_h / rank` heads.

    Queries and keys then have the same number of parameters for every rank. Values and outputs have `d²` for each
    head, so that layers of low rank have more parameters in all.

    Args:
        task: the task to train on.
        ranks: ranks that divide `r_times_h`.
        r_times_h: rank times heads.
        steps, batch: the number of steps, and sets of points in each.
        rate: the learning rate of AdamW with betas (0.9, 0.95) and no decay; it falls to 0 by a cosine.
        generator: draws weights and points.
    """
    for rank in ranks:
        validate.count("ranks", rank, 1)
        if r_times_h % rank:
            raise OptionError(f"r_times_h={r_times_h} must be a multiple of every rank; got ranks={list(ranks)}")
    found = []
    for rank in ranks:
        net = RankAttention(task.dim, rank, r_times_h // rank, generator=generator)
        train(net, task, steps=steps, batch=batch, rate=rate, generator=generator)
        found.append(RankError(rank, net.heads, mean_error(net, task, _HELDOUT, generator)))
    return found


def train(
    net: RankAttention, task: NearestPointTask, *, steps: int, batch: int, rate: float,
    generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Train a layer in place on the squared error."""
    validate.count("steps", steps, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y, target = task.batch(batch, generator)
        optimizer.zero_grad()
        (net(x, y) - target).square().sum(-1).mean().backward()
        optimizer.step()


@torch.no_grad()
def mean_error(
    net: RankAttention, task: NearestPointTask, draws: int, generator: torch.Generator | None = None
) -> float:
    """Return the mean squared error of a layer on `draws` fresh sets of points, in the layer's dtype."""
    x, y, target = task.batch(draws, generator, dtype=net.q.dtype)
    return (net(x, y) - target).square().sum(-1).mean().item()
