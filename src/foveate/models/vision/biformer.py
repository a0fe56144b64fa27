"""BiFormer: an image classifier whose stages attend to routed regions.

BiFormer: Vision Transformer with Bi-Level Routing Attention (2023), arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self, final

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.models.base import network
from foveate.nn.parts.blocks import GridStage, gelu_mlp
from foveate.nn.parts.grid import DepthwiseConv, Size
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.linear_maps import start_small
from foveate.nn.parts.spatial import halving, quartering
from foveate.nn.vision.biformer import BiLevelRoutingAttention
from foveate.ops.dense.softmax import Softmax

_SOURCE = "the release's table of results on ImageNet; multiply-adds have one decimal"
_IMAGE = ((3, 224, 224),)


@final
class BiFormer(network.ImageNetwork):
    """A classifier from images `(B, channels, H, W)` to `(B, classes)`, of any side.

    Each stage begins with a convolution of stride 2 (the first one with two). A block is
    `x += conv3x3(x);  x += attention(LN(x));  x += MLP(LN(x))`. The defaults are BiFormer-T;
    `BiFormer.of_size("small")` and "base" are the larger ones.

    Args:
        depths, dims: blocks and width of each stage; widths are multiples of `head_dim`.
        channels, classes: number of channels and of classes.
        topk: routed regions in each stage. None attends to the whole map as the release does in its last stage: 8
            heads, queries, keys and values without biases, and a convolution of the block's tokens in place of the
            values. A number there, such as 49, gives the routed layer, as the paper writes it.
        n_win, side_dwconv, padding: see `BiLevelRoutingAttention`.
        head_dim: width of a head in routed layers.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        scale: the factor of dot products in routed layers, "width" for `C ** -0.5`, with which the released networks
            were trained, or "head" for `head_dim ** -0.5`.

    Raises:
        OptionError: an option out of range.

    The release's stochastic depth is left out. On sides that `n_win` does not divide, the released network either stops
    or fills up the map before its projection; this one follows `BiLevelRoutingAttention`.
    """

    sizes: ClassVar = {
        name: network.Size({"depths": depths, "dims": dims}, millions, macs, _IMAGE, _SOURCE)
        for name, millions, macs, depths, dims in (
            ("tiny", 13.1e6, 2.2e9, (2, 2, 8, 2), (64, 128, 256, 512)),
            ("small", 25.5e6, 4.5e9, (4, 4, 18, 4), (64, 128, 256, 512)),
            ("base", 56.8e6, 9.8e9, (4, 4, 18, 4), (96, 192, 384, 768)),
        )
    }
    released_names: ClassVar = (
        (r"^downsample_layers\.", "downs."),
        (r"\.pos_embed\.", ".position.conv."),
        (r"\.norm1\.", ".norm."),
        (r"\.norm2\.", ".mlp_norm."),
        (r"\.mlp\.3\.", ".mlp.2."),
        (r"\.attn\.qkv(\.qkv)?\.", ".attention.qkv."),
        (r"\.attn\.(wo|proj)\.", ".attention.out."),
        (r"\.attn\.lepe\.", ".attention.local.conv."),
    )

    def __init__(
        self, depths: Sequence[int] = (2, 2, 8, 2), dims: Sequence[int] = (64, 128, 256, 512), *, channels: int = 3,
        classes: int = 1000, topk: Sequence[int | None] = (1, 4, 16, None), n_win: int = 7, head_dim: int = 32,
        side_dwconv: int = 5, mlp_ratio: float = 3.0, scale: Literal["width", "head"] = "width",
        padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__()
        if not len(depths) == len(dims) == len(topk) > 0:
            raise OptionError(
                f"depths, dims and topk must be as long as each other; got {len(depths)}, {len(dims)}, {len(topk)}"
            )
        counts = [("channels", channels), ("classes", classes), ("head_dim", head_dim)]
        for option, count in [*counts, *(("depths", n) for n in depths), *(("dims", n) for n in dims)]:
            validate.count(option, count, 1)
        validate.one_of("scale", scale, ("width", "head"))
        self.channels = channels

        def attention(dim: int, regions: int | None) -> nn.Module:
            if regions is None:
                return _WholeMap(dim, side_dwconv)
            if dim % head_dim:
                raise OptionError(f"dims={shown(dims)} must be multiples of head_dim={head_dim}")
            return BiLevelRoutingAttention(
                dim, dim // head_dim, n_win, regions, side_dwconv=side_dwconv, padding=padding,
                scale=(dim if scale == "width" else head_dim) ** -0.5,
            )  # fmt: skip

        self.downs = nn.ModuleList([quartering(channels, dims[0]), *(halving(*pair) for pair in pairwise(dims))])
        self.stages = nn.ModuleList(
            GridStage(_Block(attention(dim, regions), dim, mlp_ratio) for _ in range(depth))
            for depth, dim, regions in zip(depths, dims, topk, strict=True)
        )
        self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], classes)
        self.apply(start_small)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        return network.pyramid(images, self.downs, self.stages)

    def _classify(self, last: Tensor) -> Tensor:
        return self.head(self.norm(last).mean((2, 3)))

    @classmethod
    def example(cls) -> Self:
        return cls((1, 2), (8, 16), channels=2, classes=5, topk=(2, None), n_win=3, head_dim=4, side_dwconv=3)


@final
class _Block(nn.Module):
    def __init__(self, attention: nn.Module, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.position, self.attention = DepthwiseConv(dim, 3), attention
        self.norm, self.mlp_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = gelu_mlp(dim, mlp_ratio)

    def forward(self, x: Tensor, *, size: Size) -> Tensor:
        x = x + self.position(x, size)
        x = x + self.attention(self.norm(x), size=size)
        return x + self.mlp(self.mlp_norm(x))


@final
class _WholeMap(nn.Module):
    """The released attention of the last stage, `(softmax(q kᵀ · scale) v + conv(x)) W_o` with 8 heads."""

    HEADS = 8

    def __init__(self, dim: int, side_dwconv: int) -> None:
        super().__init__()
        if dim % self.HEADS:
            raise OptionError(f"dims={dim} must be a multiple of {self.HEADS} where topk is None")
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.local = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.op = Softmax()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        out = merge(self.op(*(split(part, self.HEADS) for part in self.qkv(x).chunk(3, -1))))
        return self.out(out if self.local is None else out + self.local(x, size))
