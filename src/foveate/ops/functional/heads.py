"""Head and dtype helpers of the families: one head count for q, k and v, and a dtype that is wide enough for sums."""

from __future__ import annotations

import torch
from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys, values or rates `(B, Hkv, ...)` with one head to each query head; a view where the numbers agree."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a running sum of such numbers is kept in: float32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)
