"""CrossFormer: an image classifier of cross-scale embeddings and attention at short and long distance.

CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021), arXiv 2108.00154.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self, final

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.models.base import network
from foveate.nn.parts.blocks import Block, GridStage, gelu_mlp
from foveate.nn.parts.grid import Size, to_map, to_tokens
from foveate.nn.parts.linear_maps import start_small
from foveate.nn.vision.crossformer import CrossScaleEmbedding, LongShortAttention

_SOURCE = "the release's table of results on ImageNet; multiply-adds have one decimal"
_IMAGE = ((3, 224, 224),)


@final
class CrossFormer(network.ImageNetwork):
    """A classifier from images `(B, channels, H, W)` to `(B, classes)`, of any side.

    A stage has blocks `x += LongShortAttention(LN(x));  x += MLP(LN(x))`, those with even numbers at short and those
    with odd numbers at long distance. A cross-scale embedding of stride 4 comes before the first stage, and one of
    stride 2, behind a LayerNorm, between stages. The defaults are CrossFormer-S;
    `CrossFormer.of_size("tiny")`, "base" and "large" are the others.

    Args:
        depths, dims, heads: blocks, width and heads of each stage.
        channels, classes: number of channels and of classes.
        group: G, one number for all stages or one for each.
        intervals: the interval of long distances in each stage; None for one that depends on the map.
        kernels, merge_kernels: kernels of the first embedding, whose stride is the first of them, and of those between
            stages.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        fit, padding: see `LongShortAttention`; `fit="release"` is the release's on maps that groups do not divide.

    Raises:
        OptionError: an option out of range.

    The release's stochastic depth is left out, and so is what CrossFormer++ (2023) adds to it: group sizes that grow
    with the depth, and convolutions between blocks.
    """

    sizes: ClassVar = {
        name: network.Size(
            {"depths": depths, "dims": tuple(dim << stage for stage in range(4)),
             "heads": tuple(dim // 32 << stage for stage in range(4))},
            millions, macs, _IMAGE, _SOURCE, macs_tolerance=0.05e9 / macs if name == "tiny" else 0.01,
        )
        for name, millions, macs, depths, dim in (
            ("tiny", 27.8e6, 2.9e9, (1, 1, 8, 6), 64),
            ("small", 30.7e6, 4.9e9, (2, 2, 6, 2), 96),
            ("base", 52.0e6, 9.2e9, (2, 2, 18, 2), 96),
            ("large", 92.0e6, 16.1e9, (2, 2, 18, 2), 128),
        )
    }  # fmt: skip
    released_names: ClassVar = (
        (r"^patch_embed\.projs\.", "embed.convs."),
        (r"^patch_embed\.norm\.", "embed_norm."),
        (r"^layers\.(\d+)\.downsample\.norm\.", r"merges.\1.norm."),
        (r"^layers\.(\d+)\.downsample\.reductions\.", r"merges.\1.embed.convs."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.norm1\.", ".norm."),
        (r"\.norm2\.", ".mlp_norm."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
        (r"\.attn\.proj\.", ".mixer.out."),
        (r"\.attn\.pos\.pos_proj\.", ".mixer.bias.mlp.0."),
        *((rf"\.attn\.pos\.pos{i}\.{j}\.", f".mixer.bias.mlp.{3 * i - 2 + j}.") for i in (1, 2, 3) for j in (0, 2)),
        (r"\.attn\.", ".mixer."),
    )

    def __init__(
        self, depths: Sequence[int] = (2, 2, 6, 2), dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24), *, channels: int = 3, classes: int = 1000,
        group: int | Sequence[int] = 7, intervals: Sequence[int] | None = (8, 4, 2, 1),
        kernels: Sequence[int] = (4, 8, 16, 32), merge_kernels: Sequence[int] = (2, 4), mlp_ratio: float = 4.0,
        fit: Literal["map", "release"] = "map", padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__()
        count = len(depths)
        spaced = (None,) * count if intervals is None else tuple(intervals)
        sides = (group,) * count if isinstance(group, int) else tuple(group)
        lists = {"dims": dims, "heads": heads, "group": sides, "intervals": spaced}
        for option, each in lists.items():
            if len(each) != count or not count:
                raise OptionError(f"{option} must have a number for each stage; got {len(each)} for {count} depths")
        for depth in depths:
            validate.count("depths", depth, 1)
        validate.count("classes", classes, 1)
        if not kernels:
            raise OptionError("kernels=() must hold at least one kernel's side")
        self.channels = channels
        self.embed, self.embed_norm = CrossScaleEmbedding(channels, dims[0], kernels, kernels[0]), nn.LayerNorm(dims[0])
        self.merges = nn.ModuleList(_Merge(*pair, merge_kernels) for pair in pairwise(dims))

        def block(place: int, stage: int) -> nn.Module:
            kind: Literal["short", "long"] = "long" if place % 2 else "short"
            attention = LongShortAttention(
                dims[stage], heads[stage], sides[stage], kind, interval=spaced[stage], fit=fit, padding=padding
            )
            return Block(attention, gelu_mlp(dims[stage], mlp_ratio), nn.LayerNorm)

        self.stages = nn.ModuleList(
            GridStage(block(place, stage) for place in range(depth)) for stage, depth in enumerate(depths)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)
        self.apply(start_small)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        found = self.embed(images)
        x, size = self.embed_norm(to_tokens(found)), (found.shape[2], found.shape[3])
        for index, stage in enumerate(self.stages):
            if index:
                x, size = self.merges[index - 1](x, size)
            x = stage(x, size)
            yield to_map(x, size)

    @classmethod
    def example(cls) -> Self:
        return cls(
            (2, 1), (32, 64), (2, 4), channels=2, classes=5, group=3, intervals=(2, 1), kernels=(2, 4, 8),
            merge_kernels=(2, 4), mlp_ratio=1.0,
        )  # fmt: skip


@final
class _Merge(nn.Module):
    """A norm, and a cross-scale embedding of stride 2."""

    def __init__(self, dim: int, wider: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.embed = nn.LayerNorm(dim), CrossScaleEmbedding(dim, wider, kernels, 2)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        found = self.embed(to_map(self.norm(x), size))
        return to_tokens(found), (found.shape[2], found.shape[3])
