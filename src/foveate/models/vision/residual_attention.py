"""Residual attention networks: stages of attention modules between residual units.

Residual Attention Network for Image Classification (2017), arXiv 1704.06904.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base.network import Network, Size
from foveate.nn.parts.spatial import halve
from foveate.nn.vision.residual_attention import (
    Activation,
    Mode,
    ResidualAttentionModule,
    ResidualUnit,
    initialise,
)

Form = Literal["imagenet", "cifar"]
IMAGE = ((3, 224, 224),)

#: Attention-92 has 52.5 M parameters and 10.5 G multiply-adds by the release's own network, 2.3 % and 1.3 % more than
#: the paper's table says. Attention-56 has 31.8 M and 6.27 G.
_IMAGENET = "the paper's table of networks for ImageNet"
#: Counted with CIFAR-100's classes. The table has two digits.
_CIFAR = "the paper's table of results on CIFAR"


@final
class ResidualAttentionNet(Network):
    """A classifier from images `(B, channels, H, W)` to `(B, classes)`, of any side.

    There are three stages, each with half the side and twice the channels of the one before. A stage begins with a
    residual unit and has attention modules with 3, 2 and 1 pools in their mask branches. "Attention-N" is named after
    its number of layers with weights, without the mask branches: `trunk_depth`.

    Args:
        modules: the number of attention modules of each stage.
        classes: number of classes.
        channels: number of the images' channels.
        form: "imagenet" begins with a 7x7 convolution of stride 2 and a pool, and ends with three units at half the
            side of the third stage. "cifar" begins with a 3x3 convolution, and each stage ends with a second unit.
        width: channels of the first convolution; a stage has 4, 8 and 16 times as many. None for 64 ("imagenet") or
            16 ("cifar").
        p, t, r, mode, gate: see `ResidualAttentionModule`.

    The paper draws the network for ImageNet only; for CIFAR it says that a stage has two residual units and equally
    many modules, so that the depth is `36 m + 20` with m of them. Widths, pools and the units' places in "cifar" are
    ours: widths of pre-activation ResNets, pools as in "imagenet". They give the paper's numbers of parameters for
    Attention-92 and -236, and 10.1 M in place of 8.6 M for Attention-452.
    """

    sizes: ClassVar[Mapping[str, Size]] = {
        "attention56": Size({"modules": (1, 1, 1)}, 31.9e6, 6.2e9, IMAGE, _IMAGENET, macs_tolerance=0.015),
        "attention92": Size({"modules": (1, 2, 3)}, 51.3e6, 10.4e9, IMAGE, _IMAGENET, 0.025, 0.015),
        "cifar92": Size({"modules": (2, 2, 2), "form": "cifar", "classes": 100}, 1.9e6, source=_CIFAR, tolerance=0.02),
        "cifar236": Size({"modules": (6, 6, 6), "form": "cifar", "classes": 100}, 5.1e6, source=_CIFAR),
    }

    def __init__(
        self, modules: tuple[int, int, int] = (1, 1, 1), classes: int = 1000, *, channels: int = 3,
        form: Form = "imagenet", width: int | None = None, p: int = 1, t: int = 2, r: int = 1, mode: Mode = "arl",
        gate: Activation = "mixed",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.one_of("form", form, ("imagenet", "cifar"))
        width = {"imagenet": 64, "cifar": 16}[form] if width is None else width
        for name, value in (("classes", classes), ("channels", channels), ("width", width)):
            validate.count(name, value, 1)
        if not isinstance(modules, tuple | list) or len(modules) != 3:
            raise OptionError(f"modules={shown(modules)} must be three whole numbers, one for each stage")
        for count in modules:
            validate.count("modules", count, 0)
        self.channels, self.trunk_depth = channels, _depth(modules, p, t)
        self.stem = _stem(channels, width, form)
        make = partial(ResidualAttentionModule, p=p, t=t, r=r, mode=mode, gate=gate)
        stages, before = [], width
        for index, count in enumerate(modules):
            wide = 4 * width * 2**index
            parts = [ResidualUnit(before, wide, min(index + 1, 2)), *(make(wide, 3 - index) for _ in range(count))]
            stages.append(nn.Sequential(*parts, *([ResidualUnit(wide)] if form == "cifar" else [])))
            before = wide
        self.stages = nn.Sequential(*stages)
        after = before if form == "cifar" else 2 * before
        units = [] if form == "cifar" else [ResidualUnit(before, after, 2), ResidualUnit(after), ResidualUnit(after)]
        self.head = nn.Sequential(*units, nn.BatchNorm2d(after), nn.ReLU())
        self.classifier = nn.Linear(after, classes)
        initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images must be (B, {self.channels}, H, W); got {shown(images)}")
        return self.classifier(self.head(self.stages(self.stem(images))).mean((2, 3)))

    @classmethod
    def example(cls) -> Self:
        return cls((1, 2, 1), classes=5, form="cifar", width=4)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 7, 10, generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        draw = torch.Generator().manual_seed(1)
        return tuple((torch.randn(batch, 3, *side, generator=draw),) for side in ((8, 8), (1, 5), (13, 9)))


class _Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return halve(x)


def _stem(channels: int, width: int, form: Form) -> nn.Sequential:
    if form == "cifar":
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False))
    conv = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), _Halve())


def _depth(modules: tuple[int, int, int], p: int, t: int) -> int:
    """Count layers with weights: the first and the last one, and three in each unit of the trunk."""
    return 2 + 3 * (6 + sum(modules) * (2 * p + t))
