"""What the recurrent families do with a call before they compute it: one head count, one wide dtype, a known engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedEngine

if TYPE_CHECKING:
    from foveate.ops.operator import Operator


def engine_of(op: Operator, engine: str) -> str:
    """The engine that runs a call: the operator's first one for "auto"."""
    if engine == "auto":
        return op.engines[0]
    if engine not in op.engines:
        raise UnsupportedEngine(f'engine="{engine}" cannot run {op.name}; it runs on auto, {", ".join(op.engines)}')
    return engine


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys, values or rates `(B, Hkv, ...)` with one head to each query head; a view where the numbers agree."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a running sum of such numbers is kept in: float32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)
