"""CATANet: super-resolution by attention among tokens of like content, and in windows that overlap.

CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025), arXiv 2503.06896.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base.network import Network, Size
from foveate.nn.base.layer import Layer
from foveate.nn.parts import grid
from foveate.nn.parts.grid import DepthwiseConv, to_map, to_tokens
from foveate.nn.parts.linear_maps import start_small
from foveate.nn.parts.overlap import OverlappingWindowAttention
from foveate.nn.vision.token_aggregation import TokenAggregation


@final
class ConvMLP(nn.Module):
    """`(h + gelu(conv(h))) W_2` for `h = gelu(x W_1)`, with a depthwise convolution over the grid.

    Args:
        dim: C.
        hidden: width inside.
        kernel: side of the convolution, odd.
    """

    def __init__(self, dim: int, hidden: int, kernel: int = 5) -> None:
        super().__init__()
        validate.count("hidden", hidden, 1)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = DepthwiseConv(hidden, kernel)

    def forward(self, x: Float[Tensor, "b n c"], size: grid.Size) -> Float[Tensor, "b n c"]:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden + F.gelu(self.conv(hidden, size)))


@final
class ConvMLPBlock(nn.Module):
    """`x += mixer(LN(x));  x += ConvMLP(LN(x))` on maps `(B, C, H, W)`.

    With a `TokenAggregation` this is CATANet's token-aggregation block, with an `OverlappingWindowAttention` its
    local-region self-attention.

    Args:
        mixer: any layer; C is its width.
        hidden: width inside the MLP.
    """

    def __init__(self, mixer: Layer, hidden: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(mixer.dim), mixer
        self.mlp_norm, self.mlp = nn.LayerNorm(mixer.dim), ConvMLP(mixer.dim, hidden)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.mixer.dim:
            raise ShapeError(f"x must be (B, {self.mixer.dim}, H, W); got {shown(x)}")
        size = (x.shape[2], x.shape[3])
        tokens = to_tokens(x)
        tokens = tokens + self.mixer(self.norm(tokens), size=size if self.mixer.capabilities.grid else None)
        return to_map(tokens + self.mlp(self.mlp_norm(tokens), size), size)


@final
class CATANet(Network):
    """A map from images `(B, channels, H, W)`, of any side, to images of `scale` times the side.

    Between two convolutions lie groups. A group is a token-aggregation block, a local-region block and a convolution,
    with a residual around them. Pixel shuffles with LeakyReLUs then raise the resolution, and the network adds what it
    found to the image in bilinear interpolation. The paper trains with the L1 loss on crops of 64 x 64.

    Args:
        scale: 1, 2, 3 or 4.
        dim, heads: C and H of all blocks.
        channels: number of the images' channels.
        qk_dim, mlp_dim: width of queries and keys of all heads together; width inside the MLPs.
        centres, groups, windows: for each group of blocks, M and g of `TokenAggregation` and the window of
            `OverlappingWindowAttention`, whose overlap is 2.
        rounds, ema, padding: see `TokenAggregation`.

    Raises:
        OptionError: an option out of range.
        ShapeError: images of another form.

    The defaults are the release's. It has 477,435, 549,635 and 535,195 parameters for a scale of 2, 3 and 4, by its
    code.
    """

    sizes: ClassVar[Mapping[str, Size]] = {f"x{scale}": Size({"scale": scale}) for scale in (2, 3, 4)}
    released_names: ClassVar = (
        (r"^upconv1\.", "raises.0."), (r"^upconv2\.", "raises.1."), (r"^upconv\.", "raises.0."),
        (r"\.mlp\.norm\.", ".mlp_norm."), (r"\.mlp\.fn\.", ".mlp."),
        (r"\.layer\.0\.norm\.", ".norm."), (r"\.layer\.1\.norm\.", ".mlp_norm."), (r"\.layer\.1\.fn\.", ".mlp."),
        (r"\.dwconv\.depthwise_conv\.0\.", ".conv.conv."),
        (r"\.irca_attn\.to_([kv])\.", r".mixer.centre_\1."),
        (r"\.iasa_attn\.to_([qkv])\.", r".mixer.\1."), (r"\.iasa_attn\.proj\.", ".mixer.out."),
        (r"\.conv1x1\.", ".mixer.mix."), (r"\.means$", ".mixer.centres"), (r"\.initted$", ".mixer.started"),
        (r"\.layer\.0\.fn\.to_([qkv])\.", r".mixer.attention.\1."),
        (r"\.layer\.0\.fn\.proj\.", ".mixer.attention.out."),
    )  # fmt: skip

    def __init__(
        self, scale: int = 2, dim: int = 40, heads: int = 4, *, channels: int = 3, qk_dim: int = 36, mlp_dim: int = 96,
        centres: Sequence[int] = (16, 32, 64, 128) * 2, groups: Sequence[int] = (256, 128, 64, 32) * 2,
        windows: Sequence[int] = (16, 20, 24, 28) * 2, rounds: int = 5, ema: float = 0.999,
        padding: Literal["mirrored", "hidden"] = "mirrored",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.one_of("scale", scale, (1, 2, 3, 4))
        validate.count("channels", channels, 1)
        if not len(centres) == len(groups) == len(windows) > 0:
            lengths = f"{len(centres)}, {len(groups)}, {len(windows)}"
            raise OptionError(f"centres, groups and windows must be as long as each other; got {lengths}")
        self.channels, self.scale = channels, scale

        def group(m: int, g: int, window: int) -> nn.Sequential:
            like = TokenAggregation(dim, heads, m, g, qk_dim=qk_dim, rounds=rounds, ema=ema, padding=padding)
            near = OverlappingWindowAttention(dim, heads, window, min(2, window - 1), qk_dim=qk_dim)
            return nn.Sequential(ConvMLPBlock(like, mlp_dim), ConvMLPBlock(near, mlp_dim))

        self.first_conv = _conv(channels, dim)
        self.blocks = nn.ModuleList(group(*sizes) for sizes in zip(centres, groups, windows, strict=True))
        self.mid_convs = nn.ModuleList(_conv(dim, dim) for _ in self.blocks)
        factors = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]
        self.raises = nn.ModuleList(_conv(dim, dim * factor**2) for factor in factors)
        self.factors = factors
        self.last_conv = _conv(dim, channels)
        self.apply(start_small)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images must be (B, {self.channels}, H, W); got {tuple(images.shape)}")
        x = self.first_conv(images)
        deep = x
        for group, conv in zip(self.blocks, self.mid_convs, strict=True):
            deep = deep + conv(group(deep))
        x = x + deep
        for conv, factor in zip(self.raises, self.factors, strict=True):
            x = F.leaky_relu(F.pixel_shuffle(conv(x), factor), 0.1)
        larger = F.interpolate(images, scale_factor=float(self.scale), mode="bilinear") if self.factors else images
        return self.last_conv(x) + larger

    @classmethod
    def renamed(cls, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the release under our names; its 1x1 convolutions are linear maps here."""
        ours = super().renamed(released)
        return {name: x.flatten(1) if name.endswith(".mix.weight") else x for name, x in ours.items()}

    @classmethod
    def example(cls) -> Self:
        return cls(2, 8, 2, channels=2, qk_dim=6, mlp_dim=12, centres=(3, 4), groups=(16, 8), windows=(4, 5), rounds=2)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 2, 9, 7, generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        (images,) = cls.example_inputs(batch)
        return (images[..., :5, :6],), (images[..., :1, :],), (images[..., :2, :1],)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)
