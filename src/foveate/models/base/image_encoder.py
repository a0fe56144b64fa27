"""A small transformer over image patches, built from any layers, that classifies images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn import Block, GatedMLP, Layer
from foveate.nn.parts.blocks import stacked


class ImageEncoder(nn.Module):
    """A classifier from images `(B, C, H, W)` to `(B, classes)`: patches, positions, blocks, mean over tokens, head.

    Args:
        channels, side: channels and side of the images, which are square.
        classes: number of classes.
        mixers: the layers, first to last, of one width. Layers of grids get the grid's size.
        patch: side of a patch, a divisor of `side`.
        hidden: width inside the MLPs; None is their default.
        causal: whether tokens see only earlier tokens, row by row.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        mixers: Sequence[Layer],
        *,
        patch: int = 2,
        causal: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("side", side), ("classes", classes), ("patch", patch)):
            validate.count(name, value, 1)
        if side % patch:
            raise OptionError(f"patch={patch} must divide side={side}")
        if not mixers or len({mixer.dim for mixer in mixers}) > 1:
            raise OptionError(f"mixers must be layers of one width; got widths {[mixer.dim for mixer in mixers]}")
        dim = mixers[0].dim
        self.channels, self.side, self.patch, self.causal = channels, side, patch, causal
        self.grid = (side // patch, side // patch)
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.places = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList([Block(mixer, GatedMLP(dim, hidden)) for mixer in mixers])
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if images.dim() != 4 or images.shape[1:] != (self.channels, self.side, self.side):
            raise ShapeError(
                f"images must be (B, {self.channels}, {self.side}, {self.side}); got {tuple(images.shape)}"
            )
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=self.patch, q=self.patch)
        x = self.embed(patches) + self.places
        for block in stacked(self.blocks):
            x = block(x, causal=self.causal, **({"size": self.grid} if block.mixer.capabilities.grid else {}))
        return self.head(self.norm(x).mean(1))
