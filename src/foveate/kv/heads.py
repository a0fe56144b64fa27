"""Splitting the cache by head: some key/value heads keep everything, the others sinks and a recent window."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import ShapeError
from foveate.host.model import Host
from foveate.host.site import Site


def keep_ends(site: Site, sink: int, recent: int) -> Bool[Tensor, "b hkv s"]:
    """Slots of the first `sink` tokens, counted from where each sequence begins, and of the last `recent`."""
    own = site.positions - site.begins[:, None, None]
    return ((own >= 0) & (own < sink)) | (site.positions >= site.seen - recent)


def keep_window(site: Site, full: Bool[Tensor, " hkv"], sink: int, recent: int) -> Bool[Tensor, "b hkv s"]:
    """Slots that survive: all of the `full` heads; of the others the first `sink` and the last `recent` tokens."""
    near = keep_ends(site, sink, recent)
    return near | full.to(near.device)[:, None]


def split_at_budget(budget: float, host: Host, length: int) -> tuple[int, int]:
    """How to spend a budget on a head split: `(number of full KV heads, tokens of the other heads' window)`.

    The window is a sixteenth of the prompt, so that most of the budget buys whole heads: those are what retrieval
    needs.
    """
    heads = host.layers * host.kv_heads
    window = max(8, length // 16)
    share = min(1.0, window / length)
    full = int(max(0.0, (budget - share) / (1 - share)) * heads + 1e-6) if share < 1 else heads
    return full, min(window, max(1, round(budget * length)))


def top(scores: Float[Tensor, "l h"], count: int) -> Bool[Tensor, "l h"]:
    """The `count` heads with the largest scores over all layers."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return chosen.view_as(scores)


def per_kv_head(scores: Float[Tensor, "l hq"], kv_heads: int) -> Float[Tensor, "l hkv"]:
    """Scores of query heads as scores of key/value heads: a group is worth its best member."""
    return scores.unflatten(1, (kv_heads, -1)).amax(-1)


def check_heads(name: str, heads: Tensor, host: Host) -> None:
    """Refuse a table of heads that is not `(layers, kv_heads)`."""
    expected = (host.layers, host.kv_heads)
    if tuple(heads.shape) != expected:
        raise ShapeError(f"{name} must be (layers, kv_heads)={expected} for this model; got {tuple(heads.shape)}")
