"""One budget shared by the layers of a model, in whole blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate

#: Halvings of the interval in which the common factor lies.
_STEPS = 50


def layer_budgets(share: Float[Tensor, "b l"], blocks: int, spread: float = 2.0) -> Int[Tensor, "b l"]:
    """Split `layers * blocks` over the layers in proportion to `share`; the sum is exact.

    A layer gets from `blocks / spread` to `blocks * spread` blocks, and at least one. What limits take from some layers
    goes to the others.

    Args:
        share: the layers' shares, not negative.
        blocks: blocks of a layer on average.
        spread: the largest factor by which a layer may differ from the average; 1 gives all the same.
    """
    validate.count("blocks", blocks, 1)
    validate.at_least("spread", spread, 1)
    least, most, total = max(1, int(blocks / spread)), -int(-blocks * spread // 1), share.shape[-1] * blocks
    share = share.double().clamp_min(0) + 1e-9
    low, high = torch.zeros_like(share[..., :1]), most / share.amin(-1, keepdim=True)
    for _ in range(_STEPS):  # the clamped sum grows with the factor
        middle = (low + high) / 2
        over = (middle * share).clamp(least, most).sum(-1, keepdim=True) > total
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    exact = (low * share).clamp(least, most)
    whole = exact.floor()
    left = total - whole.sum(-1, keepdim=True)
    rest = (exact - whole).masked_fill(whole >= most, -1.0)
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < left)).long()
