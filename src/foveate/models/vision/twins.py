"""Twins: image classifiers whose blocks attend inside windows and to a sub-sampled image, or to the latter alone.

Twins: Revisiting the Design of Spatial Attention in Vision Transformers (2021), arXiv 2104.13840.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast, final

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.models.base import network
from foveate.nn.base.layer import Layer
from foveate.nn.parts.blocks import Block
from foveate.nn.parts.grid import DepthwiseConv, Size, filled, to_map, to_tokens
from foveate.nn.parts.subsampled import GlobalSubsampledAttention
from foveate.nn.parts.window import WindowAttention

Variant = Literal["paper", "release"]


def _size(options: dict[str, Any], millions: float, billions: float) -> network.Size:
    """Return a size of the paper's table. Its multiply-adds include the products of attention, unlike the release's."""
    source = "the paper's table of ImageNet results"
    return network.Size(options, 1e6 * millions, 1e9 * billions, ((3, 224, 224),), source)


class _Twins(network.ImageNetwork):
    """The common part: patches, blocks with a conditional position after the first one of each stage, and the head."""

    released_names: ClassVar = (
        (r"^patch_embeds\.(\d+)\.proj\.", r"embeds.\1.conv."), (r"^patch_embeds\.(\d+)\.norm\.", r"embeds.\1.norm."),
        (r"^pos_block\.(\d+)\.proj\.0\.", r"positions.\1.conv."),
        (r"\.attn\.(qkv|q|kv)\.", r".mixer.attention.\1."), (r"\.attn\.proj\.", ".mixer.attention.out."),
        (r"\.attn\.sr\.", ".mixer.conv."), (r"\.attn\.norm\.", ".mixer.norm."),
        (r"\.norm1\.", ".norm."), (r"\.norm2\.", ".mlp_norm."), (r"\.fc1\.", ".0."), (r"\.fc2\.", ".2."),
    )  # fmt: skip
    released_parts: ClassVar = ((r"\.qkv\.", (".q.", ".k.", ".v.")), (r"\.kv\.", (".k.", ".v.")))
    example_sides: ClassVar = ((16, 24), (13, 21), (9, 24))

    def __init__(
        self, depths: Sequence[int], dims: Sequence[int], heads: Sequence[int], ratios: Sequence[int],
        mlp_ratios: Sequence[float], *, channels: int, classes: int, patch: int, variant: Variant,
    ) -> None:  # fmt: skip
        super().__init__()
        stages = {"depths": depths, "dims": dims, "heads": heads, "ratios": ratios, "mlp_ratios": mlp_ratios}
        lengths = {name: len(each) for name, each in stages.items()}
        if len(set(lengths.values())) > 1 or not depths:
            raise OptionError(f"{', '.join(stages)} must have one number for each stage; got {lengths}")
        for name in ("depths", "dims", "ratios"):
            for value in stages[name]:
                validate.count(name, value, 1)
        for name, value in (("channels", channels), ("classes", classes), ("patch", patch)):
            validate.count(name, value, 1)
        validate.one_of("variant", variant, ("paper", "release"))
        self.channels, self.variant = channels, variant
        sides = (patch, *[2] * (len(dims) - 1))
        self.embeds = nn.ModuleList(
            _Patches(before, dim, side, variant)
            for before, dim, side in zip((channels, *dims[:-1]), dims, sides, strict=True)
        )
        self.positions = nn.ModuleList(DepthwiseConv(dim) for dim in dims)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(self._mixer(place, dim, number, ratio), _mlp(dim, wider), partial(nn.LayerNorm, eps=1e-6))
                for place in range(depth)
            )
            for depth, dim, number, ratio, wider in zip(depths, dims, heads, ratios, mlp_ratios, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)
        self.apply(_initialise)

    @abstractmethod
    def _mixer(self, place: int, dim: int, heads: int, ratio: int) -> Layer:
        """Make the attention of the block with this number in its stage; it may read `self.variant`."""

    def _global(self, dim: int, heads: int, ratio: int) -> Layer:
        padding: Literal["dropped", "hidden"] = "dropped" if self.variant == "release" else "hidden"
        return GlobalSubsampledAttention(dim, heads, ratio, padding=padding)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        image = images
        for embed, position, stage in zip(self.embeds, self.positions, self.blocks, strict=True):
            x, size = embed(image)
            for place, block in enumerate(cast(nn.ModuleList, stage)):
                x = block(x, size=size)
                if place == 0:
                    x = x + position(x, size)
            image = to_map(x, size)
            yield image


@final
class TwinsSVT(_Twins):
    """A classifier from `(B, channels, H, W)` to `(B, classes)`: attention inside windows and across them in turns.

        even blocks: x += WindowAttention(norm(x));            x += MLP(norm(x))
        odd blocks:  x += GlobalSubsampledAttention(norm(x));  x += MLP(norm(x))

    Windows (the paper's LSA, locally-grouped attention) do not exchange information; the sub-sampled attention (GSA)
    does that. A stage with ratio 1, as the last one, attends globally in all blocks. After the first block of a stage a
    depthwise 3x3 convolution with a residual adds conditional positions, so that images of any size go in: zeros fill
    sides up that a patch or a square of the sub-sampling does not divide, and are masked in windows. For N tokens, the
    attention of two blocks costs `N w² + N² / r²`, least near `w² r² = N`.

    Args:
        depths, dims, heads: blocks, width and heads of each stage; `TwinsSVT.of_size("small")` has the paper's.
        ratios: r of each stage; see `GlobalSubsampledAttention`.
        mlp_ratios: hidden width of each stage's MLPs, as a multiple of `dims`.
        window: w, side of the windows.
        channels, classes: number of channels and of classes.
        patch: side of the first stage's tokens in pixels.
        variant: "release" alternates in a stage with ratio 1 too, attends to the zeros that fill windows up, and drops
            what a patch or a square does not divide. For the paper's images of 224 x 224 both are the same, and the
            parameters are always.

    The release's stochastic depth is left out.
    """

    sizes: ClassVar = {
        name: _size({"depths": depths, "dims": dims, "heads": heads}, millions, billions)
        for name, depths, dims, heads, millions, billions in (
            ("small", (2, 2, 10, 4), (64, 128, 256, 512), (2, 4, 8, 16), 24.0, 2.9),
            ("base", (2, 2, 18, 2), (96, 192, 384, 768), (3, 6, 12, 24), 56.0, 8.6),
            ("large", (2, 2, 18, 2), (128, 256, 512, 1024), (4, 8, 16, 32), 99.2, 15.1),
        )
    }

    def __init__(
        self, depths: Sequence[int] = (2, 2, 10, 4), dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16), ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4), *, window: int = 7, channels: int = 3, classes: int = 1000,
        patch: int = 4, variant: Variant = "paper",
    ) -> None:  # fmt: skip
        self.window = window
        super().__init__(
            depths, dims, heads, ratios, mlp_ratios, channels=channels, classes=classes, patch=patch, variant=variant
        )

    def _mixer(self, place: int, dim: int, heads: int, ratio: int) -> Layer:
        released = self.variant == "release"
        if place % 2 or (ratio == 1 and not released):
            return self._global(dim, heads, ratio)
        return WindowAttention(dim, heads, self.window, padding="seen" if released else "hidden")

    @classmethod
    def example(cls) -> Self:
        return cls((2, 1, 2), (8, 12, 12), (2, 3, 2), (2, 2, 1), (2, 2, 2), window=3, channels=2, classes=5, patch=2)


@final
class TwinsPCPVT(_Twins):
    """A classifier from `(B, channels, H, W)` to `(B, classes)`: PVT with conditional positions.

        x += GlobalSubsampledAttention(norm(x));  x += MLP(norm(x))

    All blocks attend to a sub-sampled image. A depthwise 3x3 convolution with a residual, after the first block of each
    stage, takes the place of PVT's learned positions, so that images of any size go in.

    Args:
        depths, dims, heads: blocks, width and heads of each stage; `TwinsPCPVT.of_size("small")` has the paper's.
        ratios: r of each stage; see `GlobalSubsampledAttention`.
        mlp_ratios: hidden width of each stage's MLPs, as a multiple of `dims`.
        channels, classes: number of channels and of classes.
        patch: side of the first stage's tokens in pixels.
        variant: "release" drops what a patch or a square does not divide; "paper" fills it up with zeros.

    The release's stochastic depth is left out.
    """

    sizes: ClassVar = {
        name: _size({"depths": depths}, millions, billions)
        for name, depths, millions, billions in (
            ("small", (3, 4, 6, 3), 24.1, 3.8), ("base", (3, 4, 18, 3), 43.8, 6.7), ("large", (3, 8, 27, 3), 60.9, 9.8),
        )
    }  # fmt: skip

    def __init__(
        self, depths: Sequence[int] = (3, 4, 6, 3), dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8), ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4), *, channels: int = 3, classes: int = 1000, patch: int = 4,
        variant: Variant = "paper",
    ) -> None:  # fmt: skip
        super().__init__(
            depths, dims, heads, ratios, mlp_ratios, channels=channels, classes=classes, patch=patch, variant=variant
        )

    def _mixer(self, place: int, dim: int, heads: int, ratio: int) -> Layer:
        return self._global(dim, heads, ratio)

    @classmethod
    def example(cls) -> Self:
        return cls((1, 2), (8, 12), (2, 3), (2, 1), (3, 2), channels=2, classes=5, patch=2)


@final
class _Patches(nn.Module):
    """A convolution of the pixels of each square to one token, and a norm."""

    def __init__(self, channels: int, dim: int, side: int, variant: Variant) -> None:
        super().__init__()
        self.side, self.variant = side, variant
        self.conv, self.norm = nn.Conv2d(channels, dim, side, stride=side), nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Size]:
        height, width = image.shape[2:]
        if self.variant == "release" and min(height, width) < self.side:
            raise ShapeError(f'{height} x {width} is less than a patch of {self.side}; variant="paper" fills it up')
        found = self.conv(image if self.variant == "release" else filled(image, self.side))
        return self.norm(to_tokens(found)), (found.shape[2], found.shape[3])


def _mlp(dim: int, ratio: float) -> nn.Sequential:
    validate.at_least("mlp_ratios", ratio, 1 / dim)
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _initialise(module: nn.Module) -> None:
    """Set the release's initial weights: linear maps 0.02, convolutions by their outputs (He), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
