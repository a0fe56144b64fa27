"""Random heads of rank 1 on two points, with the best output weights: their expected error in closed form.

On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153. With two points, a hard head of rank 1 takes the
one that `sign(<q, y> <k, x_1 - x_2>)` names, and the target the one that `sign(<y, x_1 - x_2>)` names. For points and
queries that are uniform on the sphere, two heads agree with probability `1/2 + 2/π² asin<q, q'> asin<k, k'>`, and the
weights a that minimise the squared error solve `C a = b`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.core.linear_systems import solve_positive
from foveate.studies.attention_rank.nearest_point import on_sphere
from foveate.studies.attention_rank.rank_attention import RankAttention


def head_agreement(q: Float[Tensor, "h d"], k: Float[Tensor, "h d"]) -> Float[Tensor, "h h"]:
    """Return C, the probabilities that two heads of unit q and k choose the same of two points."""
    angles = (q @ q.mT).clamp(-1, 1).asin() * (k @ k.mT).clamp(-1, 1).asin()
    return 0.5 + 2 / math.pi**2 * angles


def target_agreement(q: Float[Tensor, "h d"], k: Float[Tensor, "h d"], nodes: int = 64) -> Float[Tensor, " h"]:
    """Return b, the probabilities that heads of unit q and k choose the nearest of two points.

    `b = 1/2 + E_w[sign<k, w> asin<q, w>] / π` over uniform unit vectors w, the directions of `x_1 - x_2`. It depends on
    the angle between q and k and on the dimension. In two dimensions it is a quadratic on each side of the right angle;
    in more it is an integral over two angles of w, by Gauss and Legendre's rule with `nodes` nodes for each.
    """
    theta = (q * k).sum(-1).clamp(-1, 1).acos()
    if q.shape[1] == 2:
        acute = torch.minimum(theta, math.pi - theta)
        return 0.5 + (math.pi / 2 - theta).sign() * (0.25 - (acute / math.pi) ** 2)
    polar, polar_weights = _rule(nodes, math.pi / 2, q.shape[1] - 2, q.dtype)  # the angle of w and k
    turn, turn_weights = _rule(nodes, math.pi, q.shape[1] - 3, q.dtype)  # the one of q around k
    along = theta.cos()[:, None, None] * polar.cos()[:, None]
    across = theta.sin()[:, None, None] * polar.sin()[:, None] * turn.cos()
    mean = ((along + across).clamp(-1, 1).asin() @ turn_weights) @ polar_weights
    return 0.5 + mean / math.pi


def _rule(nodes: int, stop: float, power: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of a mean over angles in 0..stop with the density `sin ** power`."""
    at, weights = (torch.from_numpy(each).to(dtype) for each in numpy.polynomial.legendre.leggauss(nodes))
    angles = stop / 2 * (at + 1)
    weights = weights * angles.sin() ** power
    return angles, weights / weights.sum()


def expected_error(
    a: Float[Tensor, " h"], agreement: Float[Tensor, "h h"], target: Float[Tensor, " h"]
) -> Float[Tensor, ""]:
    """Return the mean squared error of heads with output weights a: `1 - 2 a.b + aᵀ C a`."""
    return 1 - 2 * (a * target).sum() + a @ agreement @ a


@final
@dataclass(frozen=True, eq=False)
class RandomHeads:
    """Hard heads of rank 1 with the output weights that minimise their error on two points.

    Args:
        q, k: unit vectors `(H, d)`.
        a: the output weights `(H,)`.
        error: the expected squared error.
    """

    q: Tensor
    k: Tensor
    a: Tensor
    error: float

    @classmethod
    def drawn(cls, dim: int, heads: int, generator: torch.Generator | None = None) -> RandomHeads:
        """Draw q and k uniformly and independently, in float64, and fit the weights."""
        return cls.fitted(*draw_vectors(dim, heads, generator))

    @classmethod
    def fitted(cls, q: Float[Tensor, "h d"], k: Float[Tensor, "h d"]) -> RandomHeads:
        """Fit the weights of given heads."""
        _check(q, k)
        agreement, target = head_agreement(q, k), target_agreement(q, k)
        a = solve_positive(agreement, target[:, None])[:, 0]
        return cls(q, k, a, expected_error(a, agreement, target).item())

    def module(self) -> RankAttention:
        """Return the heads as a layer."""
        return RankAttention.of_vectors(self.q, self.k, self.a)


def error_curve(q: Float[Tensor, "h d"], k: Float[Tensor, "h d"]) -> Float[Tensor, " h"]:
    """Return the least expected error of the first head, of the first two, and so on, from one Cholesky factor."""
    _check(q, k)
    factor = torch.linalg.cholesky(head_agreement(q, k))
    solved = torch.linalg.solve_triangular(factor, target_agreement(q, k)[:, None], upper=False)[:, 0]
    return 1 - solved.square().cumsum(0)


def draw_vectors(dim: int, heads: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw unit vectors q and k of heads, in float64."""
    validate.count("dim", dim, 2)
    validate.count("heads", heads, 1)
    q, k = on_sphere(2, heads, dim, generator=generator, dtype=torch.float64)
    return q, k


def _check(q: Tensor, k: Tensor) -> None:
    if q.dim() != 2 or q.shape != k.shape or q.shape[1] < 2:
        raise ShapeError(f"q and k must be (H, d) of one shape with d of at least 2; got {q.shape}, {k.shape}")
