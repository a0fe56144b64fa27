"""MambaOut: Mamba's block without its state space model, and the lengths at which such a model pays.

MambaOut: Do We Really Need Mamba for Vision? (2024), arXiv 2405.07992.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, unknown
from foveate.models.base.network import ImageNetwork, Size
from foveate.nn.base.layer import Layer

#: Number of blocks and width of each stage.
SIZES = {
    "femto": ((3, 3, 9, 3), (48, 96, 192, 288)),
    "kobe": ((3, 3, 15, 3), (48, 96, 192, 288)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 576)),
    "small": ((3, 4, 27, 3), (96, 192, 384, 576)),
    "base": ((3, 4, 27, 3), (128, 256, 512, 768)),
}

#: Millions of parameters, and billions of multiply-adds for an image of 224 x 224; both with one decimal.
_COSTS = {"femto": (7.3, 1.2), "kobe": (9.1, 1.5), "tiny": (26.5, 4.5), "small": (48.5, 9.0), "base": (84.8, 15.8)}


@final
class GatedCNNBlock(nn.Module):
    """`x + (gelu(g) * [i, conv(c)]) W_2` with `[g, i, c] = LN(x) W_1`: images `(B, H, W, C)` in and out.

    This is a Mamba block without the state space model: a gated MLP with a depthwise convolution in some channels. Cost
    O(H W C²). A pixel sees `kernel` pixels in each direction of the grid: the wrong choice if distant pixels have to be
    compared. For that, `with_token_mixer` puts a mixer after the convolution.

    Args:
        dim: C.
        expansion: width of the gate, as a multiple of C, rounded down.
        kernel: side of the convolution, odd.
        conv_ratio: number of convolved channels, as a multiple of C, rounded down; with 0 there is no mixing of pixels.

    The release's stochastic depth is left out.
    """

    def __init__(self, dim: int, expansion: float = 8 / 3, kernel: int = 7, conv_ratio: float = 1.0) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.at_least("expansion", expansion, 1 / dim)
        validate.count("kernel", kernel, 1)
        validate.between("conv_ratio", conv_ratio, 0, expansion)
        if kernel % 2 == 0:
            raise OptionError(f"kernel={kernel} must be odd")
        hidden, convolved = int(expansion * dim), int(conv_ratio * dim)
        self.dim, self.split = dim, (hidden, hidden - convolved, convolved)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        padding = kernel // 2
        self.conv = nn.Conv2d(convolved, convolved, kernel, padding=padding, groups=convolved) if convolved else None
        self.mixer: Layer | None = None
        self.causal = False
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        gate, kept, mixed = self.fc1(self.norm(x)).split(self.split, -1)
        if self.conv is not None:
            mixed = self._mixed(self.conv(mixed.movedim(-1, 1)).movedim(1, -1))
        return x + self.fc2(F.gelu(gate) * torch.cat([kept, mixed], -1))

    def _mixed(self, x: Tensor) -> Tensor:
        if self.mixer is None:
            return x
        grid = {"size": (x.shape[1], x.shape[2])} if self.mixer.capabilities.grid else {}
        return self.mixer(x.flatten(1, 2), causal=self.causal, **grid).view_as(x)


def with_token_mixer(block: GatedCNNBlock, mixer: Layer | None, *, causal: bool = False) -> GatedCNNBlock:
    """Return a copy of a block with `mixer` after its convolution, the place of Mamba's state space model.

    Args:
        block: its parameters are copied.
        mixer: any layer as wide as the convolution; it reads pixels row by row. None gives MambaOut's block.
        causal: whether the mixer sees only earlier pixels, as a state space model does (the convolution sees both
            sides).
    """
    if mixer is not None and (block.conv is None or mixer.dim != block.split[2]):
        raise OptionError(f"mixer must be as wide as the convolution ({block.split[2]}); got dim={mixer.dim}")
    other = copy.deepcopy(block)
    other.mixer, other.causal = mixer, causal
    return other


@final
class MambaOut(ImageNetwork):
    """A classifier from `(B, channels, H, W)` to `(B, classes)`: stages of gated CNN blocks.

    The four stages of the paper's sizes work at 1/4, 1/8, 1/16 and 1/32 of the image's side. Parts have timm's names,
    so that its weights load unchanged.

    Args:
        name: "femto", "kobe", "tiny", "small" or "base".
        channels, classes: number of channels and of classes.
        expansion, kernel, conv_ratio: see `GatedCNNBlock`.
        depths, dims: number of blocks and width of each stage; they replace those of the named size.
    """

    sizes: ClassVar = {
        name: Size(
            {"name": name}, 1e6 * parameters, 1e9 * macs, ((3, 224, 224),), "the release's table of models",
            macs_tolerance=0.01 + 0.05 / macs,  # their counter adds norms
        )
        for name, (parameters, macs) in _COSTS.items()
    }  # fmt: skip

    def __init__(
        self, name: str = "tiny", *, channels: int = 3, classes: int = 1000, expansion: float = 8 / 3,
        kernel: int = 7, conv_ratio: float = 1.0, depths: tuple[int, ...] | None = None,
        dims: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if name not in SIZES:
            raise unknown("size of MambaOut", name, SIZES)
        depths, dims = SIZES[name][0] if depths is None else depths, SIZES[name][1] if dims is None else dims
        if not len(depths) == len(dims) > 0:
            raise OptionError(f"depths and dims must be as long as each other; got {len(depths)}, {len(dims)}")
        sizes = [("channels", channels), ("classes", classes)]
        for option, value in [*sizes, *(("depths", d) for d in depths), *(("dims", d) for d in dims)]:
            validate.count(option, value, 1)
        self.channels = channels
        self.stem = _Stem(channels, dims[0])
        stages = zip((None, *dims), dims, depths, strict=False)
        self.stages = nn.ModuleList(_Stage(*stage, (expansion, kernel, conv_ratio)) for stage in stages)
        self.head = _Head(dims[-1], classes)
        self.apply(_initialise)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            yield x.movedim(-1, 1)

    def _classify(self, last: Tensor) -> Tensor:
        return self.head(last.movedim(1, -1))

    @classmethod
    def example(cls) -> Self:
        return cls(depths=(1, 2), dims=(6, 10), channels=2, classes=5)


@final
class _Stem(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        middle = max(1, dim // 2)
        self.conv1, self.norm1 = _halving(channels, middle), nn.LayerNorm(middle, eps=1e-6)
        self.conv2, self.norm2 = _halving(middle, dim), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x).movedim(1, -1)))
        return self.norm2(self.conv2(x.movedim(-1, 1)).movedim(1, -1))


@final
class _Down(nn.Module):
    def __init__(self, dim: int, wider: int) -> None:
        super().__init__()
        self.conv, self.norm = _halving(dim, wider), nn.LayerNorm(wider, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))


@final
class _Stage(nn.Module):
    def __init__(self, before: int | None, dim: int, depth: int, options: tuple[float, int, float]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if before is None else _Down(before, dim)
        self.blocks = nn.Sequential(*(GatedCNNBlock(dim, *options) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


@final
class _Head(nn.Module):
    """The mean over pixels, and a classifier with one hidden layer, which is four times as wide."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = nn.ModuleDict({"fc": nn.Linear(dim, 4 * dim), "norm": nn.LayerNorm(4 * dim, eps=1e-6)})
        self.fc = nn.Linear(4 * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.pre_logits["fc"](self.norm(x.mean((1, 2)))))
        return self.fc(self.pre_logits["norm"](hidden))


class Flops(NamedTuple):
    """The operations of a transformer block whose MLP is four times as wide."""

    linear: int
    attention: int


def block_flops(tokens: int, dim: int) -> Flops:
    """Count operations: `24 C² L` for the projections and the MLP, `4 C L²` for scores and their sum over values."""
    validate.count("tokens", tokens, 1)
    validate.count("dim", dim, 1)
    return Flops(24 * dim * dim * tokens, 4 * dim * tokens * tokens)


def is_long_sequence(tokens: int, dim: int) -> bool:
    """Return whether attention is most of a transformer block's cost, `L > 6 C`.

    The paper expects recurrence to pay then.
    """
    linear, attention = block_flops(tokens, dim)
    return attention > linear


def _halving(dim: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(dim, out, 3, stride=2, padding=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
