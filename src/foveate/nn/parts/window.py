"""Attention inside the windows of a grid: the partition, and the layer that attends window by window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size, sides
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.offsets import OffsetBias
from foveate.ops.operator import Operator


@dataclass(frozen=True)
class Windows:
    """A grid cut into windows; if they do not divide it, rows and columns of zeros are added below and right.

    Args:
        size: `(H, W)` of the grid.
        window: `(h, w)` of a window.
        interval: rows and columns from one token of a window to the next. 1 makes windows of neighbours. With larger
            ones, an area of `window * interval` rows and columns holds as many windows, which interleave.
    """

    size: Size
    window: Size
    interval: Size = (1, 1)

    @property
    def areas(self) -> Size:
        """The number of areas in rows and columns; an area is a window where the interval is 1."""
        (h, w), (i, j) = self.window, self.interval
        return -(-self.size[0] // (h * i)), -(-self.size[1] // (w * j))

    @property
    def counts(self) -> Size:
        """The number of windows in rows and columns."""
        return self.areas[0] * self.interval[0], self.areas[1] * self.interval[1]

    @property
    def padding(self) -> Size:
        """The number of added rows and columns."""
        (rows, columns), (h, w) = self.counts, self.window
        return rows * h - self.size[0], columns * w - self.size[1]

    def partition(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "windows t c"]:
        """Return the tokens of each window, row by row; the windows of one image are neighbours in the batch."""
        below, right = self.padding
        x, (h, w), (i, j) = x.unflatten(1, self.size), self.window, self.interval
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return rearrange(x, "b (r h i) (s w j) c -> (b r i s j) (h w) c", h=h, w=w, i=i, j=j)

    def around(self, x: Float[Tensor, "b n c"], halo: int) -> Float[Tensor, "windows t c"]:
        """Return the tokens of each window and those up to `halo` rows and columns around it; zeros off the grid.

        Windows hold neighbours here: `interval` is 1.
        """
        (below, right), (h, w) = self.padding, self.window
        x = F.pad(x.unflatten(1, self.size), (0, 0, halo, right + halo, halo, below + halo))
        x = x.unfold(1, h + 2 * halo, h).unfold(2, w + 2 * halo, w)
        return rearrange(x, "b r s c h w -> (b r s) (h w) c")

    def merge(self, x: Float[Tensor, "windows t c"]) -> Float[Tensor, "b n c"]:
        """Undo `partition`, without the added tokens."""
        (rows, columns), (h, w), (i, j) = self.areas, self.window, self.interval
        x = rearrange(x, "(b r i s j) (h w) c -> b (r h i) (s w j) c", r=rows, s=columns, h=h, w=w, i=i, j=j)
        return x[:, : self.size[0], : self.size[1]].flatten(1, 2)

    def real(self, device: torch.device | str | None = None, halo: int = 0) -> Bool[Tensor, "windows t"]:
        """Return a mask of the tokens of each window, and of its halo, that belong to the grid."""
        ones = torch.ones(1, self.size[0] * self.size[1], 1, device=device)
        return (self.around(ones, halo) if halo else self.partition(ones))[..., 0] > 0


@final
class WindowAttention(Layer):
    """Multi-head attention among the tokens of each window: O(N t C) for windows of t tokens.

    Windows do not exchange information: other layers have to do that.

    Args:
        dim, heads: C and H.
        window: `(h, w)`, or one number for both.
        op: an operator or its key; see `MultiHeadAttention`.
        bias, head_dim, out_dim, out_bias: see `MultiHeadAttention`.
        padding: "seen" attends to the zeros that fill up the last windows, as in most releases (a padded key is then
            the projection's bias); "hidden" masks them.
        relative: True adds a learned bias for each head and each offset from key to query, as in Swin.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(
        self, dim: int, heads: int, window: int | Size = 7, *, op: str | Operator = "softmax", bias: bool = True,
        padding: Literal["seen", "hidden"] = "seen", head_dim: int | None = None, out_dim: int | None = None,
        out_bias: bool | None = None, relative: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        self.window = sides("window", window)
        validate.one_of("padding", padding, ("seen", "hidden"))
        self.padding = padding
        self.bias = OffsetBias(heads, self.window) if relative else None
        self.attention = MultiHeadAttention(
            dim, heads, head_dim=head_dim, op=op, bias=bias, out_dim=out_dim, out_bias=out_bias
        )

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        windows = Windows(inputs["size"], self.window)
        mask = None if self.bias is None else self.bias()[None]
        if self.padding == "hidden" and any(windows.padding):
            real = windows.real(x.device).repeat(x.shape[0], 1)[:, None, None]
            mask = masks.combine(real, mask)
        return windows.merge(self.attention(windows.partition(x), mask=mask))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, (2, 3), padding="hidden")

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}
