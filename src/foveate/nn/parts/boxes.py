"""Boxes of a grid of frames: windows with a third axis, and windows that are shifted by half their sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int, int]  # (frames, H, W)


@dataclass(frozen=True)
class Boxes:
    """A grid cut into boxes of `(t, h, w)` tokens; if they do not divide it, zeros fill up the end of each axis.

    Args:
        grid: `(F, H, W)`; an image has one frame.
        box: sides of a box.
        shift: tokens along each axis by which boxes start later. Those before the first box wrap around to the last
            one.
    """

    grid: Grid
    box: Grid
    shift: Grid = (0, 0, 0)

    @classmethod
    def fitting(cls, grid: Grid, box: Grid, *, shifted: bool = False) -> Self:
        """Make boxes no longer than the grid along each axis, if wanted shifted by half their sides."""
        f, h, w = (min(side, length) for side, length in zip(box, grid, strict=True))
        return cls(grid, (f, h, w), (f // 2, h // 2, w // 2) if shifted else (0, 0, 0))

    @property
    def counts(self) -> Grid:
        """The number of boxes along each axis."""
        (f, h, w), (x, y, z) = self.grid, self.box
        return -(-f // x), -(-h // y), -(-w // z)

    @property
    def filled(self) -> Grid:
        """The sides of the grid with the zeros that fill it up."""
        (f, h, w), (x, y, z) = self.counts, self.box
        return f * x, h * y, w * z

    def partition(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "boxes t c"]:
        """Return the tokens of each box, frame by frame and row by row; one example's boxes are neighbours."""
        f, h, w = (long - side for long, side in zip(self.filled, self.grid, strict=True))
        x = x.unflatten(1, self.grid)
        if f or h or w:
            x = F.pad(x, (0, 0, 0, w, 0, h, 0, f))
        if any(self.shift):
            x = x.roll([-by for by in self.shift], (1, 2, 3))
        return self._cut(x)

    def merge(self, x: Float[Tensor, "boxes t c"]) -> Float[Tensor, "b n c"]:
        """Undo `partition`, without the zeros."""
        (f, h, w), (i, j, k) = self.counts, self.box
        x = rearrange(x, "(b f h w) (i j k) c -> b (f i) (h j) (w k) c", f=f, h=h, w=w, i=i, j=j, k=k)
        if any(self.shift):
            x = x.roll(self.shift, (1, 2, 3))
        return x[:, : self.grid[0], : self.grid[1], : self.grid[2]].flatten(1, 3)

    def real(self, device: torch.device | str | None = None) -> Bool[Tensor, "boxes t"]:
        """Return a mask of the tokens of each box that belong to the grid."""
        f, h, w = self.grid
        return self.partition(torch.ones(1, f * h * w, 1, device=device))[..., 0] > 0

    def mask(self, device: torch.device | str | None = None) -> Bool[Tensor, "boxes t t"] | None:
        """Return which tokens of a box may attend to which: real ones that did not wrap around, or did so together."""
        if self.filled == self.grid and not any(self.shift):
            return None
        wrapped = torch.zeros(*self.filled, device=device)
        for axis, by in enumerate(self.shift):
            length = self.filled[axis]
            behind = torch.arange(length, device=device) >= length - by
            wrapped += 2**axis * behind.view(-1, *(1,) * (2 - axis))
        group = self._cut(wrapped[None, ..., None])[..., 0]
        return (group[:, :, None] == group[:, None]) & self.real(device)[:, None]

    def _cut(self, x: Float[Tensor, "b f h w c"]) -> Float[Tensor, "boxes t c"]:
        i, j, k = self.box
        return rearrange(x, "b (f i) (h j) (w k) c -> (b f h w) (i j k) c", i=i, j=j, k=k)
