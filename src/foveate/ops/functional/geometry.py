"""Actions of geometric groups on channels: a camera pose or a place in an image transforms a vector.

An action maps `x (B, H, N, ·)` of tokens `(B, N)` into the common frame, and back. If it preserves dot products
(rotations), it maps queries as keys; if not (translations), it maps queries by the inverse transpose, so that
`(ρ(g_i)⁻ᵀ q)ᵀ (ρ(g_j) k) = qᵀ ρ(g_i⁻¹ g_j) k` holds for any invertible ρ.
"""

from __future__ import annotations

import math
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.ops.functional import rotary


class Action(Protocol):
    def query(self, q: Tensor) -> Tensor: ...
    def key(self, k: Tensor) -> Tensor: ...
    def value(self, v: Tensor) -> Tensor: ...
    def back(self, out: Tensor) -> Tensor: ...


@final
class Matrices:
    """Groups of g channels times an invertible matrix per token: `into (B, N, g, g)`, and `out`, its inverse."""

    def __init__(self, into: Float[Tensor, "b n g g"], out: Float[Tensor, "b n g g"]) -> None:
        self.into, self.out = into, out

    def query(self, q: Tensor) -> Tensor:
        return by_groups(q, self.out.mT)

    def key(self, k: Tensor) -> Tensor:
        return by_groups(k, self.into)

    def value(self, v: Tensor) -> Tensor:
        return by_groups(v, self.into)

    def back(self, out: Tensor) -> Tensor:
        return by_groups(out, self.out)


@final
class Points:
    """Groups of 3 channels as points in space, moved by rigid 4 x 4 matrices, which preserve distances.

    They do not preserve dot products. A value has four channels, the last one 1, so that outputs are right even if
    weights do not sum to 1.
    """

    def __init__(self, into: Float[Tensor, "b n 4 4"], out: Float[Tensor, "b n 4 4"]) -> None:
        self.into, self.out = into, out

    def query(self, q: Tensor) -> Tensor:
        return self.key(q)

    def key(self, k: Tensor) -> Tensor:
        return _three(self.value(k))

    def value(self, v: Tensor) -> Tensor:
        groups = v.unflatten(-1, (-1, 3))
        return by_groups(torch.cat([groups, torch.ones_like(groups[..., :1])], -1).flatten(-2), self.into)

    def back(self, out: Tensor) -> Tensor:
        return _three(by_groups(out, self.out))


@final
class Rotation:
    """Rotations of pairs of neighbouring channels by angles `(B, N, C)`."""

    def __init__(self, angles: Float[Tensor, "b n c"]) -> None:
        self.angles = angles[:, None]

    def query(self, q: Tensor) -> Tensor:
        return rotary.rotate(q, self.angles, "interleaved")

    def key(self, k: Tensor) -> Tensor:
        return self.query(k)

    def value(self, v: Tensor) -> Tensor:
        return self.query(v)

    def back(self, out: Tensor) -> Tensor:
        return rotary.rotate(out, -self.angles, "interleaved")


def by_groups(x: Tensor, matrices: Float[Tensor, "b n g g"]) -> Tensor:
    """Multiply each group of g channels of `x (B, H, N, ·)` by its token's matrix, in the dtype of `x`."""
    tokens = x.transpose(1, 2)
    groups = tokens.flatten(2).unflatten(2, (-1, matrices.shape[-1])).to(matrices.dtype)
    return (groups @ matrices.mT).flatten(2).view_as(tokens).transpose(1, 2).to(x.dtype)


def _three(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4))[..., :3].flatten(-2)


# -- representations ---------------------------------------------------------------------------------------------------


def rigid(poses: Float[Tensor, "b n 4 4"], stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Return poses with their translations multiplied by `stretch`, and the inverses."""
    rotation, shift = poses[..., :3, :3], poses[..., :3, 3:] * stretch
    last = torch.eye(4, dtype=poses.dtype, device=poses.device)[3:].expand(*poses.shape[:-2], 1, 4)
    back = rotation.mT
    into = torch.cat([torch.cat([rotation, shift], -1), last], -2)
    return into, torch.cat([torch.cat([back, -back @ shift], -1), last], -2)


def wigner(rotation: Float[Tensor, "*n 3 3"]) -> Float[Tensor, "*n 8 8"]:
    """Return a rotation's matrices of degrees 1 and 2: on vectors (3) and on symmetric traceless matrices (5)."""
    basis = _quadratics(rotation)
    five = torch.einsum("aij,...ik,bkl,...jl->...ab", basis, rotation, basis, rotation)
    out = rotation.new_zeros(*rotation.shape[:-2], 8, 8)
    out[..., :3, :3], out[..., 3:, 3:] = rotation, five
    return out


def _quadratics(like: Tensor) -> Float[Tensor, "5 3 3"]:
    """Return an orthonormal basis of symmetric traceless 3 x 3 matrices."""
    basis = like.new_zeros(5, 3, 3)
    for n, (i, j) in enumerate(((0, 1), (1, 2), (0, 2))):
        basis[n, i, j] = basis[n, j, i] = 0.5**0.5
    basis[3] = torch.diag(like.new_tensor([1.0, -1.0, 0.0])) / math.sqrt(2)
    basis[4] = torch.diag(like.new_tensor([1.0, 1.0, -2.0])) / math.sqrt(6)
    return basis


def shift(coords: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n 3 3"]:
    """Return translations of the plane, `(x, y)` in the last row, and their inverses, those of `-coords`."""
    eye = torch.eye(3, dtype=coords.dtype, device=coords.device)[:2].expand(*coords.shape[:-1], 2, 3)
    last = torch.cat([coords, torch.ones_like(coords[..., :1])], -1)
    return torch.cat([eye, last[..., None, :]], -2)


def octaves(count: int, device: torch.device | str | None = None) -> Float[Tensor, " f"]:
    """Return angles per unit of a coordinate in [0, 1): 2π for the fastest, half as much for each next, in float64."""
    return 2 * math.pi * torch.exp2(torch.arange(1 - count, 1, dtype=torch.float64, device=device))
