"""Mean and covariance of a sequence's keys, updated as tokens come in, and the attention mass that they predict."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.host.site import Site
from foveate.kv.parts.own_places import Places


def add_keys(notes: dict[str, Any], site: Site, places: Places, first: int) -> None:
    """Add the call's keys to the moments in `notes`; the first tokens of each sequence are left out.

    Notes get `count (B, 1, 1, 1)`, `mean (B, Hkv, 1, D)` and `spread (B, Hkv, D, D)`, the sum of the products of
    deviations from the mean. After a crop, or if earlier tokens were not seen, all keys are read again.
    """
    known = notes.get("seen") == places.past
    start = places.past if known else 0
    number = torch.arange(start, places.total, device=site.k.device).expand(site.k.shape[0], -1)
    left_out = places.own(number) < first
    k = site.k[:, :, start:].to(torch.promote_types(site.k.dtype, torch.float32))
    left_out = left_out[:, None, :, None]
    count = (~left_out).sum(2, keepdim=True)
    mean = k.masked_fill(left_out, 0.0).sum(2, keepdim=True) / count.clamp_min(1)
    deviation = (k - mean).masked_fill(left_out, 0.0)
    spread = deviation.mT @ deviation
    if known:
        before, shift = notes["count"], mean - notes["mean"]
        part = count / (before + count).clamp_min(1)
        mean = notes["mean"] + part * shift
        spread = notes["spread"] + spread + part * before * (shift.mT @ shift)
        count = before + count
    notes.update(count=count, mean=mean, spread=spread, seen=places.total)


def gaussian_mass(
    q: Float[Tensor, "b hkv g d"],
    mean: Float[Tensor, "b hkv 1 d"],
    covariance: Float[Tensor, "b hkv d d"],
    count: Int[Tensor, "b 1 1"],
    scale: float,
) -> Float[Tensor, "b hkv g"]:
    """Return the log of the expected sum of `exp(scale q.k)` over `count` Gaussian keys; -inf if there are none."""
    q = q.to(mean.dtype) * scale
    first = (q * mean).sum(-1)
    second = ((q @ covariance) * q).sum(-1)
    return count.clamp_min(0).log() + first + second / 2
