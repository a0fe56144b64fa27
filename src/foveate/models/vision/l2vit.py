"""L2ViT: an image classifier of alternating window and linear global attention.

The Linear Attention Resurrection in Vision Transformer (2025), arXiv 2501.16182.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self, final

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.models.base import network
from foveate.nn.base.layer import Layer
from foveate.nn.parts.blocks import GridStage
from foveate.nn.parts.grid import Size, filled, to_map, to_tokens
from foveate.nn.parts.spatial import quartering
from foveate.nn.vision.l2vit import LinearGlobalBlock, LocalWindowBlock

_SOURCE = "the paper's table of ImageNet results, in millions"


@final
class L2ViT(network.ImageNetwork):
    """A classifier from `(B, channels, H, W)` to `(B, classes)`, at a cost linear in the number of pixels.

    In each stage, blocks with even numbers attend in windows, and blocks with odd numbers attend to the whole image.
    Between stages a convolution halves the sides. Zeros at the bottom and on the right first fill an image up to a
    multiple of `patch`, and an odd side between stages to an even one, as in the release.

    Args:
        depths, dims, heads: blocks, width and heads of each stage; `L2ViT.of_size("tiny")` has the paper's.
        window: side of the windows.
        channels, classes: number of channels and of classes.
        patch: side of the first stage's tokens in pixels. 4 gives the paper's stem of two convolutions, another number
            a single convolution, for small images.
        clamp, kernel: see `LinearGlobalBlock`.
        padding: see `LocalWindowBlock`.
        mlp_ratio: hidden width of the MLPs over that of the tokens: one number for all stages, or one for each, as in
            the release.
    """

    sizes: ClassVar = {
        name: network.Size({"depths": depths, "dims": dims, "heads": heads}, millions, source=_SOURCE, tolerance=0.02)
        for name, millions, depths, dims, heads in (
            ("tiny", 29e6, (2, 2, 6, 2), (96, 192, 384, 768), (3, 6, 12, 24)),
            ("small", 50e6, (2, 2, 18, 2), (96, 192, 384, 768), (3, 6, 12, 24)),
            ("base", 89e6, (2, 2, 18, 2), (128, 256, 512, 1024), (4, 8, 16, 32)),
        )
    }

    def __init__(
        self, depths: Sequence[int] = (2, 2, 6, 2), dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24), *, window: int = 7, channels: int = 3, classes: int = 1000,
        patch: int = 4, clamp: float = 100.0, kernel: int | None = 7, padding: Literal["seen", "hidden"] = "seen",
        mlp_ratio: float | Sequence[float] = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not len(depths) == len(dims) == len(heads) > 0:
            raise OptionError(
                f"depths, dims and heads must be as long as each other; got {len(depths)}, {len(dims)}, {len(heads)}"
            )
        for name, count in (("channels", channels), ("classes", classes), ("patch", patch)):
            validate.count(name, count, 1)
        for name, counts in (("depths", depths), ("dims", dims)):
            for count in counts:
                validate.count(name, count, 1)
        ratios = tuple(mlp_ratio) if isinstance(mlp_ratio, Sequence) else (mlp_ratio,) * len(dims)
        if len(ratios) != len(dims):
            raise OptionError(f"mlp_ratio={mlp_ratio!r} must be a number, or {len(dims)} numbers, one for each stage")
        self.channels, self.patch = channels, patch
        self.stem = _stem(channels, dims[0], patch)
        self.stem_norm = nn.LayerNorm(dims[0])
        self.downs = nn.ModuleList(_Down(*pair) for pair in pairwise(dims))

        def block(place: int, dim: int, heads: int, ratio: float) -> Layer:
            if place % 2:
                return LinearGlobalBlock(dim, heads, clamp=clamp, kernel=kernel, mlp_ratio=ratio)
            return LocalWindowBlock(dim, heads, window, padding=padding, mlp_ratio=ratio)

        self.stages = nn.ModuleList(
            GridStage(block(place, dim, number, ratio) for place in range(depth))
            for depth, dim, number, ratio in zip(depths, dims, heads, ratios, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)
        self.apply(_initialise)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        found = self.stem(filled(images, self.patch))
        x, size = self.stem_norm(to_tokens(found)), (found.shape[2], found.shape[3])
        for index, stage in enumerate(self.stages):
            if index:
                x, size = self.downs[index - 1](x, size)
            x = stage(x, size)
            yield to_map(x, size)

    @classmethod
    def example(cls) -> Self:
        return cls((1, 3), (8, 12), (2, 3), window=2, channels=2, classes=5, clamp=1.0, kernel=3)


def _stem(channels: int, dim: int, patch: int) -> nn.Module:
    if patch != 4:
        return nn.Conv2d(channels, dim, patch, stride=patch)
    return quartering(channels, dim, nn.ReLU)


@final
class _Down(nn.Module):
    """A norm, and a convolution of 2x2 tokens to one."""

    def __init__(self, dim: int, wider: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv2d(dim, wider, 2, stride=2)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        image = self.conv(filled(to_map(self.norm(x), size), 2))
        return to_tokens(image), (image.shape[2], image.shape[3])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
