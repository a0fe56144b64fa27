"""Residual attention: a mask from a small hourglass network weighs the output of a few residual units.

Residual Attention Network for Image Classification (2017), arXiv 1704.06904.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.spatial import BATCH_NORM, CONV, halve, resize

Mode = Literal["arl", "nal"]
Activation = Literal["mixed", "channel", "spatial"]

EPS = 1e-5


@final
class ResidualUnit(nn.Module):
    """A pre-activation bottleneck unit: `x + W_3 r(W_2 r(W_1 r(x)))`, with r a batch norm and a ReLU.

    Where the output has other channels, or `stride` is above 1, x is replaced by a 1x1 convolution of r(x).

    Args:
        channels: C of the input.
        out: C of the output, at least 4; None for that of the input. Inside there are a quarter as many.
        stride: step of the 3x3 convolution.
        dims: number of spatial axes.
    """

    def __init__(self, channels: int, out: int | None = None, stride: int = 1, *, dims: int = 2) -> None:
        super().__init__()
        out = channels if out is None else out
        validate.count("channels", channels, 1)
        validate.count("out", out, 4)
        validate.count("stride", stride, 1)
        inner, conv, norm = out // 4, CONV[dims], BATCH_NORM[dims]
        self.norm1, self.conv1 = norm(channels), conv(channels, inner, 1, bias=False)
        self.norm2, self.conv2 = norm(inner), conv(inner, inner, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = norm(inner), conv(inner, out, 1, bias=False)
        changes = stride > 1 or out != channels
        self.shortcut = conv(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b o *small"]:
        active = F.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(active)
        inner = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return short + self.conv3(F.relu(self.norm3(inner)))


@final
class SoftMask(nn.Module):
    """The mask branch: `down` times down and up again, then two 1x1 convolutions and an activation.

    On the way down, units follow each pool, and twice as many the last one. On the way up each interpolation but the
    last is added to the map of its size from the way down, after one unit, and goes through units again.

    Args:
        channels: C.
        down: number of pools, at least 1.
        units: r, the number of units between two pools.
        activation: "mixed", a sigmoid of each entry; "channel", each position over its norm; "spatial", a sigmoid of
            each channel after its mean and deviation over the positions.
        dims: number of spatial axes.
    """

    def __init__(
        self, channels: int, down: int = 3, units: int = 1, activation: Activation = "mixed", *, dims: int = 2
    ) -> None:
        super().__init__()
        validate.count("down", down, 1)
        validate.count("r", units, 1)
        self.activation = activation
        counts = [units] * (down - 1) + [2 * units]
        self.down = nn.ModuleList(residual_units(channels, count, dims) for count in counts)
        self.skip = nn.ModuleList(ResidualUnit(channels, dims=dims) for _ in range(down - 1))
        self.up = nn.ModuleList(residual_units(channels, units, dims) for _ in range(down - 1))
        self.out = nn.Sequential(*_norm_relu_conv(channels, dims), *_norm_relu_conv(channels, dims))

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        maps, out = [], x
        for units in self.down:
            out = units(halve(out))
            maps.append(out)
        for level in reversed(range(len(self.up))):
            out = resize(out, maps[level].shape[2:]) + self.skip[level](maps[level])
            out = self.up[level](out)
        return self._activate(self.out(resize(out, x.shape[2:])))

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "channel":
            return F.normalize(x, dim=1)
        if self.activation == "spatial":
            space = tuple(range(2, x.dim()))
            x = x - x.mean(space, keepdim=True)
            x = x / (x.square().mean(space, keepdim=True) + EPS).sqrt()
        return torch.sigmoid(x)


@final
class ResidualAttentionModule(FeatureGate):
    """`Q((1 + M(x)) T(x))` for `x = P(input)`: a trunk T of residual units, and a mask M from a coarser view.

    P and Q are residual units too. The 1 ("attention residual learning") lets a mask near 0 leave the trunk as it is,
    so that many modules can be stacked. A mask multiplies the gradient of its trunk as well, which the authors expect
    to help where labels are wrong. This is a stage of a network: each unit has `17 C² / 16` weights, and P, T and Q are
    `2 p + t` of them. The wrong choice where a light gate is wanted.

    Args:
        channels: C, at least 4.
        down: number of pools in the mask branch. The paper takes as many as make the smallest map 7 wide: 3, 2 and 1
            for maps of 56, 28 and 14.
        p: number of units in P, and in Q.
        t: number of units in T.
        r: number of units between two pools of the mask branch.
        mode: "arl" as above; "nal" ("naive attention learning") is `M T`, without the 1.
        gate: the activation of M; see `SoftMask`. Only "mixed" and "spatial" stay between 0 and 1.
        dims: number of spatial axes, 1, 2 or 3; the paper's networks have 2.

    The paper leaves open how pools treat borders and how maps are interpolated. Both, and the order of interpolating,
    adding and units on the way up, are those of the release's Caffe networks.
    """

    def __init__(
        self, channels: int, down: int = 3, p: int = 1, t: int = 2, r: int = 1, *, mode: Mode = "arl",
        gate: Activation = "mixed", dims: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        if channels < 4:
            raise OptionError(f"channels={channels} must be at least 4: units have a quarter as many inside")
        validate.count("p", p, 1)
        validate.count("t", t, 1)
        validate.one_of("mode", mode, ("arl", "nal"))
        validate.one_of("gate", gate, ("mixed", "channel", "spatial"))
        self.mode = mode
        self.before = residual_units(channels, p, dims)
        self.trunk = residual_units(channels, t, dims)
        self.mask = SoftMask(channels, down, r, gate, dims=dims)
        self.after = residual_units(channels, p, dims)
        initialise(self)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """Return the mask M of such a call."""
        self._check(x)
        return self.mask(self.before(x))

    def _gate(self, x: Tensor) -> Tensor:
        x = self.before(x)
        trunk, mask = self.trunk(x), self.mask(x)
        return self.after((1 + mask) * trunk if self.mode == "arl" else mask * trunk)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, down=2, t=1, dims=dims)


def residual_units(channels: int, count: int, dims: int = 2) -> nn.Sequential:
    """Make so many residual units that keep the map's size."""
    return nn.Sequential(*(ResidualUnit(channels, dims=dims) for _ in range(count)))


def initialise(module: nn.Module) -> None:
    """Draw the weights of all convolutions as He et al. do for ReLUs: normal, with a variance of 2 / fan-in."""
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")


def _norm_relu_conv(channels: int, dims: int) -> tuple[nn.Module, ...]:
    return BATCH_NORM[dims](channels), nn.ReLU(), CONV[dims](channels, channels, 1, bias=False)
