"""Kanerva's Sparse Distributed Memory as attention, and the softmax that it approximates.

Attention Approximates Sparse Distributed Memory (2021), arXiv 2111.05498.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from math import comb
from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import remembered
from foveate.core.scoring import Tile
from foveate.ops.base.scored import Scored

#: Nodes of the quadrature over a cap: logs are exact to 1e-5 for n = 3, and to 1e-9 from n = 8 to n = 512.
NODES = 32


@final
class SparseDistributedMemory(Scored):
    """Weights in proportion to the number of neurons within a radius of both the query and the key.

    A key writes its value to every neuron near it; a query sums the content of the neurons near it. With so many
    neurons that only their density counts, the number is an intersection of two balls, which falls almost exponentially
    with the
    cosine: nearly `softmax(beta · cosine)`, for `beta = fit_beta(n, radius)`. It serves to study that correspondence,
        and to clean up noisy patterns. O(Nq Nk D) time, with 32 times the pointwise work of a softmax in mode
        "continuous"; the wrong choice if that softmax suffices. A query with no key within twice the radius reads
        zeros.

    Args:
        n: bits of an address, which is D of the calls; in mode "continuous" the dimension of the sphere's space.
        radius: Hamming distance that activates a neuron, below n / 2. The paper's for n = 64: 5 (capacity), 11 (signal
            to noise), 15 (critical distance, for noisy queries). A larger one means a smaller beta.
        mode: "continuous": vectors on the unit sphere, and caps of angle `arccos(1 - 2 radius / n)`; "binary": bits are
            the signs of q and k; "neurons": signs, and a count over `neurons` random addresses. The last two pass no
            gradient to q and k.
        neurons: number of addresses, for "neurons"; if n is large and the radius small, hardly any is near.
        generator: draws the addresses, for "neurons".

    `scale` is a power on the weights, 1 unless a call gives another. This class counts neurons pair by pair; the memory
    itself would hold `neurons x Dv` numbers for any number of keys. The released code tabulates the continuous weights,
    up to a factor that the normalization removes; here they are integrated (`cap_intersection`).

    Raises:
        OptionError: an option out of range, or neurons and a generator without their mode.
        ShapeError: vectors of another width than n, in the modes of bits.
    """

    capabilities = replace(Scored.capabilities, default_scale=1.0)
    addresses: Float[Tensor, "r n"]  # of "neurons", each bit 1 or -1

    def __init__(
        self, n: int = 64, radius: int = 11, mode: Literal["continuous", "binary", "neurons"] = "continuous", *,
        neurons: int | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(n, radius)
        validate.one_of("mode", mode, ("continuous", "binary", "neurons"))
        if (neurons is None) == (mode == "neurons") or (generator is None) == (mode == "neurons"):
            raise OptionError(
                f'mode="neurons" needs neurons and a generator, and no other takes them; got mode="{mode}"'
            )
        self.n, self.radius, self.mode = n, radius, mode
        if neurons is not None and generator is not None:
            validate.count("neurons", neurons, 1)
            bits = torch.randint(0, 2, (neurons, n), generator=generator, device=generator.device)
            self.register_buffer("addresses", 2.0 * bits - 1.0)

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        if self.mode != "continuous" and q.shape[-1] != self.n:
            raise ShapeError(f"built for n={self.n} bits; got D={q.shape[-1]}")
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        if self.mode == "continuous":
            return scale * cap_intersection(self.n, self.radius, F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)
        q, k = _signs(q), _signs(k)
        if self.mode == "binary":
            return scale * _log_counts(self.n, self.radius).to(q)[((self.n - q @ k.mT) / 2).long()]
        return scale * (self._active(q) @ self._active(k).mT).log()

    def score_macs(self, width: int) -> int:
        return len(self.addresses) if self.mode == "neurons" else width

    def _active(self, signs: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n r"]:
        """Return 1 for each neuron within the radius, else 0."""
        return (signs @ self.addresses.to(signs.dtype).mT >= self.n - 2 * self.radius).to(signs.dtype)

    @property
    def beta(self) -> float:
        """The inverse temperature of the softmax over cosines that is nearest to this memory."""
        return fit_beta(self.n, self.radius)

    def recall(self, cue: Float[Tensor, "b h q d"], patterns: Float[Tensor, "b h k d"], steps: int = 1) -> Tensor:
        """Clean up a cue: read `steps` times from patterns that are stored under themselves.

        In the modes "binary" and "neurons", patterns are reduced to signs, and so is every reading.
        """
        validate.count("steps", steps, 1)
        stored = patterns if self.mode == "continuous" else _signs(patterns)
        for _ in range(steps):
            read = self(cue, patterns, stored)
            cue = read if self.mode == "continuous" else _signs(read)
        return cue

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(8, 3)


@cache
def circle_intersection(n: int, radius: int, distance: int) -> int:
    """Count the addresses, of `2 ** n`, within `radius` of both of two that are `distance` apart: I(D), exactly.

    An address agrees with both in `a` of the bits that the two share, and with the first in `c` of the bits that
    differ.
    """
    if not 0 <= distance <= n:
        raise OptionError(f"distance={shown(distance)} must be in 0..{n}")
    total = 0
    for a in range(n - distance + 1):
        missing = n - radius - a  # further bits that each of the two has to share with the address
        ways = sum(comb(distance, c) for c in range(max(0, missing), min(distance, distance - missing) + 1))
        total += comb(n - distance, a) * ways
    return total


@remembered
def _log_counts(n: int, radius: int) -> Float[Tensor, " {n}+1"]:
    counts = (circle_intersection(n, radius, distance) for distance in range(n + 1))
    return torch.tensor([math.log(count) if count else masks.NEG_INF for count in counts], dtype=torch.float64)


def cap_intersection(n: int, radius: float, cosine: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the log of the sphere's share within `arccos(1 - 2 radius / n)` of both of two points with that cosine.

    In the plane of the two points, the share is `1/pi` times the integral of `(1 - (c / cos b)^2)^((n - 2) / 2)` over b
    from half of the angle between them to that of the caps, with c the caps' cosine; -inf if they do not meet.
    """
    height = 1 - 2 * radius / n
    reach = math.acos(height)
    tiny = torch.finfo(cosine.dtype).eps
    half = torch.acos(cosine.clamp(-1 + tiny, 1 - tiny)) / 2
    apart = half >= reach
    half = half.masked_fill(apart, 0.0)
    points, shares = (x.to(cosine) for x in _quadrature(NODES))
    angle = half[..., None] + (reach - half)[..., None] * points
    inside = (1 - (height / torch.cos(angle)) ** 2).clamp(min=torch.finfo(cosine.dtype).tiny)
    log_mean = torch.logsumexp((n - 2) / 2 * inside.log() + shares.log(), -1)
    return (log_mean + (reach - half).log() - math.log(math.pi)).masked_fill(apart, masks.NEG_INF)


def fit_beta(n: int, radius: int, near: bool = False) -> float:
    """Return the slope of the least-squares line of `log I(D)` on the cosine `1 - 2 D / n`, over all D with I(D) > 0.

    Args:
        near: True uses only the distances up to the radius.
    """
    _check(n, radius)
    counts = {distance: circle_intersection(n, radius, distance) for distance in range((radius if near else n) + 1)}
    met = {distance: count for distance, count in counts.items() if count}
    x = torch.tensor([1 - 2 * distance / n for distance in met], dtype=torch.float64)
    y = torch.tensor([math.log(count) for count in met.values()], dtype=torch.float64)
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def _check(n: int, radius: int) -> None:
    validate.count("n", n, 3)
    validate.count("radius", radius, 1)
    if 2 * radius >= n:
        raise OptionError(f"radius={radius} must be below n / 2 = {n / 2:g}")


def _signs(x: Tensor) -> Tensor:
    """Return signs as 1 and -1; 0 counts as -1."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


@remembered
def _quadrature(nodes: int) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre points in (0, 1) and their weights, by the Jacobi matrix's eigenvectors (Golub, Welsch)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (points + 1) / 2, vectors[0] ** 2
