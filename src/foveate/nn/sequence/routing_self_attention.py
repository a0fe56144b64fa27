"""A layer of the Routing Transformer: some heads with a local window, and some that route by content.

Efficient Content-Based Sparse Attention with Routing Transformers (2020), arXiv 2003.05997.
"""

from __future__ import annotations

from typing import Any, Self, final

import torch
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.parts.heads import HeadScheme, merge, split, width
from foveate.nn.parts.linear_maps import Linear
from foveate.nn.parts.positions import Position
from foveate.ops.sparse.routing_attention import RoutingAttention
from foveate.ops.sparse.sliding_window import SlidingWindow


@final
class RoutingSelfAttention(HeadScheme):
    """`concat(local heads, routing heads) W_o`: causal windows, and clusters of tokens from anywhere in the past.

    In training mode each call moves the centroids towards its tokens; hidden ones have no influence. In evaluation
    they stay. Cost O(N window D) for a local head and that of `RoutingAttention` for a routing head. Causal only. It
    cannot go one token at a time, since a centroid takes the nearest tokens of the whole call. The wrong choice where
    the choice must not depend on later tokens.

    Args:
        dim: C.
        heads: all heads.
        local_heads: heads with a local window; None for half of them. The paper routes only in some layers of long
            models: two of eight heads, in the last two of 22 layers.
        clusters, window, shared_qk, decay: those of `RoutingAttention`.
        local_window: keys that a local head sees, the token's own included.
        head_dim: D; None for `dim / heads`.
        position: a position scheme for all heads, or None.
        bias: True gives all projections biases.

    The paper's relative positions are left to `position`. Its release adds a dense layer, shared by all heads, which is
    left out.

    Raises:
        OptionError: an option out of range, or no head that routes.
    """

    op: RoutingAttention

    def __init__(
        self, dim: int, heads: int, local_heads: int | None = None, clusters: int = 16, window: int | None = None, *,
        local_window: int = 256, shared_qk: bool = False, decay: float = 0.999, head_dim: int | None = None,
        position: Position | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        self_width = width(dim, heads, head_dim)
        local_heads = heads // 2 if local_heads is None else local_heads
        validate.count("local_heads", local_heads)
        if local_heads >= heads:
            raise OptionError(f"local_heads={local_heads} must be less than heads={heads}, so that some head routes")
        op = RoutingAttention(
            heads - local_heads, self_width, clusters, window, shared_qk=shared_qk, decay=decay,
        )  # fmt: skip
        super().__init__(dim, heads, head_dim=self_width, op=op, position=position, bias=bias)
        self.local_heads, self.local = local_heads, SlidingWindow(local_window)
        self.q, self.k, self.v = (Linear(dim, heads * self_width, bias=bias) for _ in range(3))
        self._declare(patterns=frozenset({"causal self"}), masks=frozenset({"keys"}))

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, causal: bool, **inputs: Any
    ) -> Tensor:
        q, k = self._rotated(q, 0), self._rotated(k, 0)
        near, far = zip(
            *(x.split([self.local_heads, self.heads - self.local_heads], 1) for x in (q, k, v)), strict=True
        )
        out = self.op(*far, mask=mask, causal=causal)
        if self.training:
            self.op.update(*(masks.without_hidden(x, mask) for x in far[:2]))
        if self.local_heads:
            out = torch.cat([self.local(*near, mask=mask, causal=causal), out], 1)
        return self.out(merge(out))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, heads // 2, 3, max(1, length // 2), local_window=3)
