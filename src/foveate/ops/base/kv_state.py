"""The streaming state of operators that read the whole past: a growing cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from foveate.core.errors import ShapeError


@dataclass(frozen=True)
class KVState:
    """Keys `(B, Hkv, n, D)` and values `(B, Hkv, n, Dv)` of the tokens so far."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Self:
        new = torch.empty
        return cls.of(
            new(batch, kv_heads, 0, key_dim, dtype=dtype, device=device),
            new(batch, kv_heads, 0, value_dim, dtype=dtype, device=device),
        )

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Self:
        """Return the state of a sequence that begins with these keys and values."""
        return cls(k, v)

    def append(self, k: Tensor, v: Tensor) -> KVState:
        for name, held, new in (("k", self.k, k), ("v", self.v, v)):
            if held.shape[:2] != new.shape[:2] or held.shape[3] != new.shape[3] or held.dtype != new.dtype:
                ours, theirs = (f"{tuple(x.shape)} {x.dtype}" for x in (held, new))
                raise ShapeError(f"{name} must fit the state, which holds {ours}; got {theirs}")
        return KVState(torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
