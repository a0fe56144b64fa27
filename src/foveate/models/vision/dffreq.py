"""DFFreq: a detector of generated images, a frequency block in front of half a ResNet.

Dual Frequency Branch Framework with Reconstructed Sliding Windows Attention for AI-Generated Image Detection (2025),
arXiv 2501.15253.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.models.base.network import Network
from foveate.nn.vision.dual_frequency import DualFrequencyBlock


@final
class DFFreqDetector(Network):
    """A detector from images `(B, channels, H, W)`, of any side, to logits `(B, classes)`.

    A `DualFrequencyBlock`, a 3x3 convolution of stride 2 and a pool come first, then the first two stages of a
    ResNet-50, the mean over all positions and a linear map. Shallow stages keep the detector with the traces of
    generators, and away from what the image shows. The paper trains it from scratch, with binary cross-entropy, on
    images of one generator, and tests it on those of others.

    Args:
        classes: number of logits; 1 for "generated or not".
        channels: number of the images' channels.
        depths: number of bottleneck blocks of each stage; each stage after the first halves the side.
        width: channels of the first convolution, and inside the blocks of the first stage; each further stage has twice
            as many. A block's output has four times its width.
        dwt_window, fft_window: see `DualFrequencyBlock`.

    Raises:
        OptionError: an option out of range.
        ShapeError: images of another form.
    """

    released_names: ClassVar = (
        (r"^.*\bi?dwt_transform\..*$", ""),
        (r"^FreqLCBlock\.norm1\.body\.", "frequency.norm."),
        (r"^FreqLCBlock\.(dwt|fft)_attn\.", r"frequency.\1."),
        (r"^FreqLCBlock\.", "frequency."),
        (r"\.mlp\.0\.", ".pixels."),
        (r"\.qkv_dwconv\.", ".around."),
        (r"\.temperature$", ".tau"),
        (r"\.project_out\.", ".out."),
        (r"^layer1\.", "stages.0."),
        (r"^layer2\.", "stages.1."),
        (r"\.downsample\.0\.", ".shortcut.0."),
        (r"\.downsample\.1\.", ".shortcut.1."),
        (r"^fc1\.", "head."),
    )

    def __init__(
        self, classes: int = 1, *, channels: int = 3, depths: Sequence[int] = (3, 4), width: int = 64,
        dwt_window: int = 4, fft_window: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        if not depths:
            raise OptionError("depths=() must hold the number of blocks of at least one stage")
        for name, value in (("classes", classes), ("width", width), *(("depths", each) for each in depths)):
            validate.count(name, value, 1)
        self.channels = channels
        self.frequency = DualFrequencyBlock(channels, dwt_window, fft_window)
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.stages, before = nn.ModuleList(), width
        for stage, depth in enumerate(depths):
            inner = width << stage
            first = Bottleneck(before, inner, 2 if stage else 1)
            self.stages.append(nn.Sequential(first, *(Bottleneck(4 * inner, inner) for _ in range(depth - 1))))
            before = 4 * inner
        self.head = nn.Linear(before, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images must be (B, {self.channels}, H, W); got {tuple(images.shape)}")
        x = F.relu(self.bn1(self.conv1(self.frequency(images))))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))

    @classmethod
    def example(cls) -> Self:
        return cls(2, depths=(2, 1), width=4, fft_window=4)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 16, 12, generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        (images,) = cls.example_inputs(batch)
        return (images[..., :13, :9],), (images[..., :5, :],), (images[..., :1, :2],)


@final
class Bottleneck(nn.Module):
    """A residual block: 1x1, 3x3 and 1x1 convolutions with batch norms, `channels` to `4 width` channels.

    Args:
        channels: channels of the input.
        width: channels inside.
        stride: step of the 3x3 convolution.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        changes = stride > 1 or channels != out
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.shortcut(x) + self.bn3(self.conv3(inner)))
