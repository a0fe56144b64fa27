"""Pooling by multi-head cross-attention, the common attentive probe."""

from __future__ import annotations

from typing import Self, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.pool import Pool, Pooled
from foveate.nn.parts.linear_maps import Linear


@final
class CrossAttentionPool(Pool):
    """One learned vector u attends to the tokens with H heads: `concat_h softmax(q_h k_hᵀ (C / H)^-0.5) v_h`.

    `q = u W_q`, `k = x W_k` and `v = x W_v`, without biases. No output map follows: a probe's linear head stands
    there. It costs O(N C²) and has `3 C² + C` parameters: the wrong choice if a probe has to be small.

    Args:
        dim: C, a multiple of `heads`.
        heads: H.

    It is the multi-head cross-attention that Attention, Please! Revisiting Attentive Probing for Masked Image Modeling
    (2025), arXiv 2506.10178, starts from. Published probes put norms, biases, an output map or an MLP around it.
    """

    def __init__(self, dim: int, heads: int = 8) -> None:
        validate.count("dim", dim, 1)
        validate.count("heads", heads, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        super().__init__(dim, maps=heads)
        self.query = nn.Parameter(0.02 * torch.randn(1, dim))
        self.q, self.k, self.v = (Linear(dim, dim, bias=False) for _ in range(3))

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        q, k, v = (t.unflatten(-1, (self.maps, -1)) for t in (self.q(self.query)[0], self.k(x), self.v(x)))
        weights = self._softmax(torch.einsum("hd,bnhd->bhn", q * q.shape[-1] ** -0.5, k), mask)
        return Pooled(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)[:, None], weights)

    @classmethod
    def example(cls, dim: int) -> Self:
        made = cls(dim, 2 if dim % 2 == 0 else 1)
        with torch.no_grad():
            made.query.mul_(100)  # with the first query all maps are nearly flat
        return made
