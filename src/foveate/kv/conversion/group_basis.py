"""Bases of what a group of heads caches: main directions, directions that commute with a rotation, and means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kv.conversion.attention_modules import Sizes
from foveate.kv.renumbered import Rotation

_POSITIONS = 64  # positions over which rotated weights are averaged


@dataclass(frozen=True, eq=False)
class Basis:
    """Maps between the t heads of a group and its one head: `x' = Σᵢ xᵢ downᵢ` and `xᵢ ≈ x' upᵢᵀ`.

    Args:
        down, up: for each head in order, `(heads, d, d)`.
        groups: number of groups, of `heads / groups` neighbours each.
    """

    down: Float[Tensor, "h d d"]
    up: Float[Tensor, "h d d"]
    groups: int

    def merged(self, rows: Float[Tensor, "h d c"]) -> Float[Tensor, "g d c"]:
        """Apply `down` to the rows of a projection."""
        return (self.down.transpose(1, 2) @ rows).unflatten(0, (self.groups, -1)).sum(1)


def group_basis(moments: Float[Tensor, "g td td"], width: int, rotation: Rotation | None) -> Basis:
    """Return the basis of the d main directions of each group, from its second moments.

    With a rotation, the directions commute with it: each pair of channels that rotates together is taken as a complex
    number, and the t numbers of a group become one.
    """
    groups, both, _ = moments.shape
    if rotation is None:
        found = torch.linalg.eigh(moments).eigenvectors[..., -width:].flip(-1)
    else:
        found = _commuting(moments.reshape(groups, both // width, width, both // width, width), rotation)
    blocks = found.unflatten(1, (-1, width)).flatten(0, 1)
    return Basis(blocks, blocks, groups)


def _commuting(moments: Float[Tensor, "g t d t d"], rotation: Rotation) -> Float[Tensor, "g td d"]:
    groups, t, width = moments.shape[:3]
    n = rotation.angles.shape[0]
    found = moments.new_zeros(groups, t, width, width)
    for pair in range(n):
        a, b = (2 * pair, 2 * pair + 1) if rotation.neighbours else (pair, pair + n)
        real = moments[:, :, a, :, a] + moments[:, :, b, :, b]
        imaginary = moments[:, :, b, :, a] - moments[:, :, a, :, b]
        main = torch.linalg.eigh(torch.complex(real, imaginary)).eigenvectors[..., -1]  # of E[z zᴴ]
        found[:, :, a, a] = found[:, :, b, b] = main.real
        found[:, :, b, a], found[:, :, a, b] = main.imag, -main.imag
    if 2 * n < width:  # channels that do not rotate
        rest = moments[:, :, 2 * n :, :, 2 * n :].flatten(3).flatten(1, 2)
        main = torch.linalg.eigh(rest).eigenvectors[..., -(width - 2 * n) :]
        found[:, :, 2 * n :, 2 * n :] = main.unflatten(1, (t, -1))
    return found.flatten(1, 2)


def pooled_basis(sizes: Sizes, groups: int) -> Basis:
    """Return the basis that takes the mean of a group's heads."""
    eye = torch.eye(sizes.width, dtype=torch.float64).repeat(sizes.kv_heads, 1, 1)
    return Basis(eye * groups / sizes.kv_heads, eye, groups)


def weight_moments(
    rows: Float[Tensor, "h d c"], groups: int, rotation: Rotation | None, length: int
) -> Float[Tensor, "g td td"]:
    """Return the second moments of a projection's rows by group; the mean over rotated rows if there is a rotation.

    Args:
        rows: the projection's weight by head.
        groups: number of groups of neighbours.
        rotation: the rotation of these channels with a token's position.
        length: positions over which the mean is taken, at even distances.
    """
    beside = rows.transpose(1, 2)  # as the keys of C tokens, each of which is one unit of the hidden state
    found = rows.new_zeros(groups, rows.shape[0] // groups * rows.shape[1], rows.shape[0] // groups * rows.shape[1])
    places = [0] if rotation is None else torch.linspace(0, length - 1, _POSITIONS).round().long().tolist()
    for place in places:
        turned = beside
        if rotation is not None:
            turned = rotation(beside[None], torch.full((1, *beside.shape[:2]), place))[0].double()
        sides = turned.unflatten(0, (groups, -1)).permute(0, 2, 1, 3).flatten(2)
        found += sides.transpose(1, 2) @ sides / len(places)
    return found
