"""ALiBi's slopes: the rate at which each head's logits fall with distance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def alibi_slopes(heads: int) -> Float[Tensor, " h"]:
    """Return the slopes of H heads: `2 ** (-8 (h + 1) / H)` if H is a power of two.

    Otherwise they are those of the next smaller power, filled up with every other slope of the next larger one.
    """
    base = 2 ** math.floor(math.log2(heads))
    first = torch.exp2(-8 * torch.arange(1, base + 1, dtype=torch.float64) / base)
    finer = torch.exp2(-8 * torch.arange(1, 2 * base + 1, 2, dtype=torch.float64) / (2 * base))
    return torch.cat([first, finer[: heads - base]])
