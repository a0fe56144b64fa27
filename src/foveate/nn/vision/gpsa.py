"""Gated positional self-attention: each head mixes attention by content with attention by position.

ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (2021), arXiv 2103.10697.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.core.scoring import safe_softmax
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.linear_maps import Linear


@final
class GatedPositionalAttention(Layer):
    """`A_h = (1 - s_h) softmax(q k / sqrt(D)) + s_h softmax(v_h r)`, for N tokens on a grid, then `A_h V_h` and W_o.

    `r = (dx, dy, dx² + dy²)` counts columns and rows from query to key, v_h are three learned numbers of a head, and
    `s_h = sigmoid(gate_h)` says how much position counts: 0.73 at the start. Two softmaxes are mixed, not their logits.
    At the start the k² first heads, `k = floor(sqrt(H))`, look at one offset each, as the taps of a k x k convolution
    do; training can leave this. Cost O(N² C). It helps most with few training images; the wrong choice if there is no
    grid, or for tokens such as a class token, which have no place (the paper's network adds it after these layers).

    Args:
        dim, heads: C and H; H divides C.
        locality: how narrow the heads look at the start: v_h is `locality (2 dx, 2 dy, -1)` for the offset (dx, dy).
        local_init: False draws v_h at random, and W_v too, which starts as the identity otherwise.
        bias: True gives queries, keys and values biases. W_o always has one.

    A mask hides keys from both softmaxes. A query that sees nothing gives W_o's bias.
    """

    capabilities = replace(
        Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset({"keys", "pairs"}), grid=True
    )

    def __init__(
        self, dim: int, heads: int = 4, *, locality: float = 1.0, local_init: bool = True, bias: bool = False
    ) -> None:
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.at_least("locality", locality, 0)
        self.q, self.k, self.v = (Linear(dim, dim, bias=bias) for _ in range(3))
        self.out = Linear(dim, dim)
        self.place = nn.Parameter(torch.empty(heads, 3))  # of dx, dy and the squared distance
        self.gate = nn.Parameter(torch.ones(heads))
        for weight in (self.q.weight, self.k.weight, self.v.weight, self.out.weight, self.place):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (self.q, self.k, self.v, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if local_init:
            self.look_at_offsets(locality)

    @torch.no_grad()
    def look_at_offsets(self, locality: float = 1.0) -> None:
        """Set W_v to the identity, and v_h of the k² first heads to `locality (2 dx, 2 dy, -1)`."""
        nn.init.eye_(self.v.weight)
        for head, (dx, dy) in enumerate(head_offsets(self.heads)):
            self.place[head] = torch.tensor([2 * dx, 2 * dy, -1.0])
        self.place.mul_(locality)

    def weights(
        self, x: Float[Tensor, "b n c"], size: Size, mask: Tensor | None = None
    ) -> Float[Tensor, "b h n n"]:  # fmt: skip
        """Return the mixed weights A; each row adds up to 1, or to 0 if it sees nothing."""
        self._check(x, None, mask, False, size, {})
        return self._weights(x, size, mask)

    def non_locality(self, x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, " h"]:
        """Return the mean distance of the keys that each head attends to, in tokens, weighted by A."""
        distance = relative(size, x.device)[..., 2].to(x.dtype).sqrt()
        return (self.weights(x, size) * distance).sum(-1).mean((0, 2))

    def _weights(self, x: Tensor, size: Size, mask: Tensor | None) -> Tensor:
        q, k = split(self.q(x), self.heads), masks.without_hidden(split(self.k(x), self.heads), mask)
        content = q @ k.mT * q.shape[-1] ** -0.5
        position = (relative(size, x.device).to(x.dtype) @ self.place.mT).permute(2, 0, 1)
        if mask is not None:
            content, position = (logits.masked_fill(~mask, masks.NEG_INF) for logits in (content, position))
        share = torch.sigmoid(self.gate)[:, None, None]
        return (1 - share) * safe_softmax(content) + share * safe_softmax(position)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        v = masks.without_hidden(split(self.v(x), self.heads), mask)
        return self.out(merge(self._weights(x, inputs["size"], mask) @ v))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, bias=True)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


def head_offsets(heads: int) -> list[tuple[float, float]]:
    """Return the offset (dx, dy) of each of the k² first heads, `k = floor(sqrt(heads))`, columns by columns.

    For odd k they are the taps of a k x k convolution; for even k they lie between tokens.
    """
    side = math.isqrt(heads)
    middle = (side - 1) / 2
    return [(dx - middle, dy - middle) for dx in range(side) for dy in range(side)]


def relative(size: Size, device: torch.device | None = None) -> Float[Tensor, "n n 3"]:
    """Return columns, rows and squared distance from each query of a grid to each key."""
    rows, columns = (torch.arange(side, device=device) for side in size)
    at = torch.cartesian_prod(rows, columns)
    apart = at - at[:, None]
    return torch.stack([apart[..., 1], apart[..., 0], apart.square().sum(-1)], -1).float()
