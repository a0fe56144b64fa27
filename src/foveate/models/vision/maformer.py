"""MAFormer: an image classifier whose early stages fuse windows with learned global tokens.

MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition (2022), arXiv 2209.01620.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, Self, final

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.models.base import network
from foveate.nn.parts.blocks import Block, GridStage, gelu_mlp
from foveate.nn.parts.linear_maps import start_small
from foveate.nn.parts.spatial import halving, quartering
from foveate.nn.parts.subsampled import GlobalSubsampledAttention
from foveate.nn.vision.maformer import MAFBlock


@final
class MAFormer(network.ImageNetwork):
    """A classifier from images `(B, channels, H, W)` to `(B, classes)`, best at `side` pixels and open to any side.

    A convolution of stride 2 (two of them at first) and a batch norm stand before each stage. The early stages have
    `MAFBlock`s; the later ones `x += attention(norm(x));  x += MLP(norm(x))` over the whole map, which is small there.

    Args:
        depths, dims, heads: blocks, width and heads of each stage.
        side: side of the images in pixels for which the global tokens are made; see `MAFBlock`. The maps of the stages
            have a quarter of it, an eighth, and so on. The first stage costs O(side⁴).
        fused: number of stages with `MAFBlock`s.
        window, reduction, fusion: see `MAFBlock`.
        channels, classes: number of channels and of classes.
        mlp_ratio: hidden width of the MLPs over that of the tokens.

    Raises:
        OptionError: an option out of range.

    The defaults are those of a later paper (U-MAFT, 2026). MAFormer's own widths and depths, its stem, and the number
    of its early stages were out of reach, so that `sizes` is empty.
    """

    def __init__(
        self, depths: Sequence[int] = (2, 2, 2, 2), dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 8), *, side: int = 224, fused: int = 2, window: int = 7, reduction: int = 2,
        fusion: Literal["attention", "gate"] = "attention", channels: int = 3, classes: int = 1000,
        mlp_ratio: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not len(depths) == len(dims) == len(heads) > 0:
            raise OptionError(
                f"depths, dims and heads must be as long as each other; got {len(depths)}, {len(dims)}, {len(heads)}"
            )
        counts = [("channels", channels), ("classes", classes), ("side", side)]
        for option, count in [*counts, *(("depths", n) for n in depths), *(("dims", n) for n in dims)]:
            validate.count(option, count, 1)
        validate.count("fused", fused, 0)
        self.channels = channels

        def block(stage: int) -> nn.Module:
            dim, number, grid = dims[stage], heads[stage], -(-side // 2 ** (stage + 2))
            if stage < fused:
                return MAFBlock(dim, number, window, (grid, grid), reduction, fusion, mlp_ratio=mlp_ratio)
            return Block(GlobalSubsampledAttention(dim, number), gelu_mlp(dim, mlp_ratio), nn.LayerNorm)

        self.downs = nn.ModuleList([quartering(channels, dims[0]), *(halving(*pair) for pair in pairwise(dims))])
        self.stages = nn.ModuleList(
            GridStage(block(stage) for _ in range(depth)) for stage, depth in enumerate(depths)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)
        self.apply(start_small)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        return network.pyramid(images, self.downs, self.stages)

    @classmethod
    def example(cls) -> Self:
        return cls((1, 1, 1), (8, 12, 16), (2, 3, 4), side=24, window=2, channels=2, classes=5, mlp_ratio=2.0)
