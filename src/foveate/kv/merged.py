"""Merged values: what a policy drops is added to the most similar token that stays.

As kvpress's merging wrapper does it, after Token Merging: Your ViT But Faster (2022), arXiv 2210.09461, and D2O:
Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models (2024),
arXiv 2406.13035.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.host import Method, Slots
from foveate.host.padding import tokens
from foveate.host.site import Site

#: The largest number of similarities that are held at a time.
TILE = 1 << 21


@final
@dataclass(eq=False)
class Merged(Method):
    """Add each dropped value to that of the kept token with the most similar key: `apply(model, SnapKV(), Merged())`.

    A dropped token goes to the kept one of the largest cosine between their keys, with the weight
    `cosine · |v| / (|v| + |v kept|)`; the sum is divided by one and the sum of the weights. Keys stay. Cost: the
    cosines of all dropped and kept keys, each time that a policy drops. It works with every policy that evicts. Applied
    after a policy that changes values itself, as Attention Matching does, it replaces that change. The wrong choice
    where single values have to be read out exactly: a kept value is mixed with others. Useless without a policy that
    evicts. Layers with a window are left alone, since what leaves the window must not come back.

    Args:
        threshold: the least cosine at which a token is merged. kvpress's option to merge only a share of the dropped
            tokens is not here.
    """

    threshold: float = 0.0
    needs_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.between("threshold", self.threshold, 0.0, 1.0)

    def refit(self, site: Site, kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
        if site.slots is not None and site.slots.window is not None:
            return kept
        found = tokens(site)
        own = [x if found is None else found.own(x) for x in (kept.positions, dropped.positions)]
        able = (own[0] >= 0) & (kept.positions < site.seen)
        return replace(kept, v=merged(kept, dropped, able, own[1] >= 0, self.threshold))


def merged(
    kept: Slots, dropped: Slots, able: Bool[Tensor, "b h s"], real: Bool[Tensor, "b h n"], threshold: float
) -> Float[Tensor, "b h s d"]:
    """Return the kept values with the dropped ones added.

    Args:
        kept, dropped: the tokens.
        able: the kept tokens that others may be added to.
        real: the dropped slots that are tokens.
        threshold: the least cosine.
    """
    v, gone = (torch.where(x[..., None], y, 0.0).float() for x, y in ((able, kept.v), (real, dropped.v)))
    total, weights = v.clone(), torch.ones_like(v[..., :1])
    step = max(1, TILE // max(1, v.shape[0] * v.shape[1] * v.shape[2]))
    for start in range(0, gone.shape[2], step):
        some = slice(start, start + step)
        cosine, target = nearest(kept.k, able, dropped.k[:, :, some], real[:, :, some])
        size, other = gone[:, :, some].norm(dim=-1), v.norm(dim=-1).gather(2, target)
        weight = cosine.clamp_min(0.0) * (cosine >= threshold) * size / (size + other).clamp_min(1e-6)
        weight, target = (weight * real[:, :, some])[..., None], target[..., None]
        weights = weights.scatter_add(2, target, weight)
        total = total.scatter_add(2, target.expand(*target.shape[:3], v.shape[-1]), weight * gone[:, :, some])
    return torch.where((weights > 1.0) & able[..., None], (total / weights).to(kept.v.dtype), kept.v)


def nearest(
    k: Tensor, able: Bool[Tensor, "b h s"], others: Tensor, real: Bool[Tensor, "b h n"]
) -> tuple[Float[Tensor, "b h n"], Int[Tensor, "b h n"]]:
    """Return the largest cosine of each other key with an able one, and the slot of that one."""
    pairs = ((able, k), (real, others))
    a, b = (torch.nn.functional.normalize(torch.where(x[..., None], y, 0.0).float(), dim=-1) for x, y in pairs)
    best = (b @ a.mT).masked_fill(~able[:, :, None], -1.0).max(-1)
    return best.values, best.indices
