"""Head and dtype helpers of the families: one head count for q, k and v, and a dtype that is wide enough for sums."""

from __future__ import annotations

import torch
from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of keys, values or rates `(B, Hkv, ...)` for the query heads; a view if the counts are equal."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for a running sum: float32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)
