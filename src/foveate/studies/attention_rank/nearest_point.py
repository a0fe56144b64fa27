"""The task of On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153: find the nearest point."""

from __future__ import annotations

from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError


class Points(NamedTuple):
    """Points `x (B, N, d)`, queries `y (B, M, d)` and the point that each query asks for, `target (B, M, d)`."""

    x: Tensor
    y: Tensor
    target: Tensor


@final
class NearestPointTask(Checked):
    """Points on the unit sphere, of which each query asks for the nearest one.

    Without queries each point asks for the farthest one, so that it does not find itself. All vectors have length 1:
    the mean squared error of always answering 0 is 1.

    Args:
        dim: the dimension d.
        n: the number of points drawn.
        queries: the number of queries, drawn from the sphere; None lets the points themselves ask.
        mode: "unif" draws the points independently; "ortho" draws orthonormal ones, at most d and with queries;
            "doubled" adds the opposite of each point, so that there are 2n.
    """

    def __init__(
        self, dim: int = 16, n: int = 8, queries: int | None = None, mode: Literal["unif", "ortho", "doubled"] = "unif"
    ) -> None:
        for name, value in (("dim", dim), ("n", n), ("queries", 1 if queries is None else queries)):
            validate.count(name, value, 1)
        validate.one_of("mode", mode, ("unif", "ortho", "doubled"))
        if mode == "ortho" and n > dim:
            raise OptionError(f"n={n} must be at most dim={dim} with mode='ortho'")
        if mode == "ortho" and queries is None:
            raise OptionError("queries=None must be a number with mode='ortho', where no point is the farthest")
        self.dim, self.n, self.queries, self.mode = dim, n, queries, mode

    def batch(
        self, size: int, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Points:
        """Draw `size` sets of points with their queries and targets."""
        validate.count("size", size, 1)
        x = self._points(size, generator, dtype)
        if self.queries is None:
            return Points(x, x, farthest(x, x))
        y = on_sphere(size, self.queries, self.dim, generator=generator, dtype=dtype)
        return Points(x, y, nearest(x, y))

    def _points(self, size: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        if self.mode == "ortho":
            q, r = torch.linalg.qr(torch.randn(size, self.dim, self.n, generator=generator, dtype=dtype))
            return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT  # the signs make rotations uniform
        x = on_sphere(size, self.n, self.dim, generator=generator, dtype=dtype)
        return torch.cat([x, -x], 1) if self.mode == "doubled" else x


def on_sphere(
    *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*b d"]:
    """Draw unit vectors uniformly."""
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def nearest(x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
    """Return the point of x with the largest inner product with each query."""
    return _chosen(x, (y @ x.mT).argmax(-1))


def farthest(x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
    """Return the point of x with the smallest inner product with each query."""
    return _chosen(x, (y @ x.mT).argmin(-1))


def _chosen(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
