"""Attention whose heads have queries and keys of any rank: the model of On the Benefits of Rank in Attention Layers.

On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153.
"""

from __future__ import annotations

import math
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError


@final
class RankAttention(Checked, nn.Module):
    """A layer of attention whose heads' rank and number are free: `out(y) = sum_h VO_h X alpha_h(y)`.

    `alpha_h` is the softmax of `scale * yᵀ Q_hᵀ K_h x_i` over the points x_i, or 1 at the largest. Values and outputs
    have full rank in every head, so that only queries and keys limit what heads express.

    Args:
        dim: the dimension d of points, queries and outputs.
        rank: the rank r of queries and keys: `q` and `k` are `(H, r, d)`.
        heads: the number H of heads.
        hard: the largest score takes all the weight; its position has no gradient.
        scale: the factor of the scores; None is `rank ** -0.5`. (The authors' code has `dim ** -0.5`.)
        generator: draws the initial weights, uniform in `± sqrt(6 / (r + d))` for q and k, and in
            `± sqrt(6 / (H d + d))` for `vo (H, d, d)`.
    """

    def __init__(
        self, dim: int, rank: int, heads: int, hard: bool = False, *, scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("rank", rank), ("heads", heads)):
            validate.count(name, value, 1)
        self.dim, self.rank, self.heads, self.hard = dim, rank, heads, hard
        self.scale = validate.scale(scale, rank)

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(bound * (2 * torch.rand(*shape, generator=generator) - 1))

        self.q = uniform(math.sqrt(6 / (rank + dim)), heads, rank, dim)
        self.k = uniform(math.sqrt(6 / (rank + dim)), heads, rank, dim)
        self.vo = uniform(math.sqrt(6 / (heads * dim + dim)), heads, dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """Return the output for each query."""
        return torch.einsum("bhmn,bnd,hed->bme", self.weights(x, y), x, self.vo)

    def weights(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b h m n"]:
        """Return the weight of each point for each head and query."""
        for name, value in (("x", x), ("y", y)):
            if value.dim() != 3 or value.shape[2] != self.dim or len(value) != len(x):
                raise ShapeError(f"{name} must be (B, N, {self.dim}) with B={len(x)}; got {tuple(value.shape)}")
        q, k = torch.einsum("bmd,hrd->bhmr", y, self.q), torch.einsum("bnd,hrd->bhnr", x, self.k)
        scores = self.scale * q @ k.mT
        if self.hard:
            return F.one_hot(scores.argmax(-1), x.shape[1]).to(x.dtype)
        return scores.softmax(-1)

    @classmethod
    def full_rank(cls, dim: int, *, temperature: float = 0.0, farthest: bool = False) -> Self:
        """Make the one head of full rank that finds the nearest point: `Q = K = VO = I`.

        Args:
            dim: the dimension.
            temperature: 0 gives a hard head, which is exact; above it the softmax of scores over the temperature.
            farthest: find the farthest point instead, by `Q = -I`.
        """
        validate.at_least("temperature", temperature, 0)
        one, scale = torch.eye(dim)[None], 1 / temperature if temperature else 1.0
        return cls._filled(-one if farthest else one, one, torch.ones(1), not temperature, scale)

    @classmethod
    def of_vectors(cls, q: Float[Tensor, "h d"], k: Float[Tensor, "h d"], a: Float[Tensor, " h"]) -> Self:
        """Make hard heads of rank 1 with given queries and keys, whose outputs are the chosen points times `a`."""
        return cls._filled(q[:, None], k[:, None], a, True, 1.0)

    @classmethod
    def spaced(cls, heads: int) -> Self:
        """Make hard heads of rank 1 in two dimensions with `q = k` at equal angles, and average their outputs."""
        angles = torch.arange(heads, dtype=torch.float64) * (math.pi / heads)
        q = torch.stack([angles.cos(), angles.sin()], 1)
        return cls.of_vectors(q, q, q.new_full((heads,), 1 / heads))

    @classmethod
    @torch.no_grad()
    def _filled(cls, q: Tensor, k: Tensor, a: Tensor, hard: bool, scale: float) -> Self:
        """Make heads of given q and k, `(H, r, d)`, with `VO_h = a_h I`, in the dtype of q."""
        heads, rank, dim = q.shape
        made = cls(dim, rank, heads, hard, scale=scale, generator=torch.Generator()).to(q.dtype)
        made.q.copy_(q)
        made.k.copy_(k)
        made.vo.copy_(a.to(q.dtype)[:, None, None] * torch.eye(dim, dtype=q.dtype))
        return made
