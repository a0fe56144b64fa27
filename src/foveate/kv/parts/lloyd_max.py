"""The best scalar quantiser for a coordinate of a random unit vector, by the algorithm of Lloyd and Max."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

_GRID, _STEPS = 1 << 16, 1000


@lru_cache(maxsize=64)
def centroids(bits: int, width: int) -> Float[Tensor, " c"]:
    """Return the `2 ** bits` values that represent a coordinate with the least mean squared error, in ascending order.

    A coordinate of a vector that is uniform on the unit sphere of `width` dimensions has a density proportional to
    `(1 - x^2) ^ ((width - 3) / 2)`. Each value is the mean of the coordinates that are nearest to it.
    """
    with torch.inference_mode(False), torch.no_grad():
        x, mass, moment = _integrals(width)
        count = 2**bits
        found = _start(x, mass, count)
        for _ in range(_STEPS):
            edges = torch.cat([x[:1], (found[1:] + found[:-1]) / 2, x[-1:]])
            mean = _read(x, moment, edges).diff() / _read(x, mass, edges).diff()
            moved, found = float((mean - found).abs().max()), mean
            if moved < 1e-11:
                break
        return (found - found.flip(0)) / 2  # the density is even


def distortion(bits: int, width: int) -> float:
    """Return the mean squared error of a unit vector whose coordinates are replaced by their nearest centroids."""
    x, mass, moment = _integrals(width)
    found = centroids(bits, width)
    edges = torch.cat([x[:1], (found[1:] + found[:-1]) / 2, x[-1:]])
    # the sum of x^2 over all coordinates is 1, and a centroid is the mean of its cell
    return 1.0 - width * float((found * _read(x, moment, edges).diff()).sum() / mass[-1])


def _integrals(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a grid of coordinates, with the integrals of the density and of `x` times the density up to each."""
    reach = math.asin(min(1.0, 14 / math.sqrt(width)))
    angle = torch.linspace(-reach, reach, _GRID + 1, dtype=torch.float64)
    x, density = angle.sin(), angle.cos().pow(width - 2)  # d x = cos(angle) d angle
    step = 2 * reach / _GRID
    both = torch.stack([density, x * density])
    summed = torch.cat([both.new_zeros(2, 1), ((both[:, 1:] + both[:, :-1]) * (step / 2)).cumsum(1)], 1)
    return x, summed[0], summed[1]


def _start(x: Tensor, mass: Tensor, count: int) -> Tensor:
    """Return values as dense as the cube root of the density, which is the best for many values."""
    root = (mass.diff() / x.diff()).clamp_min(0).pow(1 / 3) * x.diff()
    share = torch.cat([root.new_zeros(1), root.cumsum(0)])
    wanted = share[-1] * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return _read(share, x, wanted)


def _read(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Interpolate the line through `(x, y)` at some places."""
    right = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return torch.lerp(y[right - 1], y[right], share)
