"""Zero-shot visual search: where the features of a target are in an image, seen from the current fixation.

Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases (2021), arXiv 2106.02953.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.gaze.base.searcher import Searcher
from foveate.gaze.search.eccnet import EccNet, check_layers, vgg16_features


class Sharpening(NamedTuple):
    """Passes of a difference of Gaussians: A becomes A + G(small) A - G(large) A.

    Args:
        small: the window and the standard deviation of the small Gaussian, in cells of the attention map.
        large: those of the large one.
        passes: how often.
    """

    small: tuple[int, float] = (3, 1.0)
    large: tuple[int, float] = (5, 3.0)
    passes: int = 3


_SHARPENING = Sharpening()


@final
class VisualSearcher(Searcher):
    """Search with a frozen network whose acuity falls with eccentricity (eccNET).

    The image is cut or padded so that the fixation is the centre of the field, which goes through the network. At each
    layer l, the target's activations t_l behind pool l are the kernel of a convolution over the image's activations x_l
    before it: m_l = x_l * t_l. Each map is normalised to 0..1 and weighed by its largest value:

        A = sum_l w_l m_l / sum_l w_l,   w_l = max m_l

    The average is sharpened, brought to the image's size and handed to the winner-takes-all of `Searcher`. Nothing is
    trained. A step costs one pass of the network over a field of four times the image, and its margin.

    Args:
        cnn: an `EccNet`, or a network that becomes one with five pools and the paper's slopes. Its images are
            normalised as those that it was trained on.
        layers: numbers of the pools whose features are compared.
        ior: the side in pixels of the square that is seen around a fixation.
        max_fix: the most fixations, the first one included.
        margin: pixels of the field beyond the image's reach, on each side; rounded up so that cells fit.
        background: the value outside the image, in the network's own units: a number, or one for each channel.
        sharpen: the difference of Gaussians; its sizes are the experiment's. None leaves it out.
        erase: whether what was seen is replaced by the background, as in the release when it knows the objects.

    Raises:
        OptionError: an option out of range, or layers that the network does not have.

    With `EccNet(cnn, slopes=zeros, kind="max")`, one layer and no sharpening it is IVSN, seen from each fixation:
    Finding any Waldo with zero-shot invariant and efficient visual search (Zhang et al., 2018). A map is resized
    without interpolation, as in the release: a fixation is on the first pixel of the winning cell that is open. The
    release does not look for the target at the first fixation when it knows the objects; here every fixation counts.
    """

    def __init__(
        self, cnn: EccNet | nn.Sequential, layers: tuple[int, ...] = (3, 4, 5), ior: int = 10, max_fix: int = 20, *,
        margin: int = 64, background: float | Sequence[float] = 0.0, sharpen: Sharpening | None = _SHARPENING,
        erase: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(ior, max_fix)
        self.net = cnn if isinstance(cnn, EccNet) else EccNet(cnn)
        check_layers(layers, len(self.net.pools))
        validate.count("margin", margin, 0)
        self.layers, self.margin, self.erase = tuple(layers), margin, erase
        self.sharpen = sharpen
        self.background = (float(background),) if isinstance(background, int | float) else tuple(background)

    @classmethod
    def example(cls) -> Self:
        return cls(EccNet(vgg16_features(2)), ior=4, max_fix=4, margin=8)

    def modulation(
        self, target: Float[Tensor, "c h1 w1"], field: Float[Tensor, "c h w"]
    ) -> list[Float[Tensor, "h2 w2"]]:
        """Return the maps m_l of a field around the fixation, one for each layer, before they are normalised."""
        return self._modulation(self._prepare(target), field)

    def _prepare(self, target: Tensor) -> list[Float[Tensor, "1 c h w"]]:
        return self.net.features(target[None], self.layers, pooled=True)

    def _priority(
        self, sought: Any, image: Tensor, at: tuple[int, int], seen: Bool[Tensor, "h w"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "h w"]:  # fmt: skip
        height, width = image.shape[-2:]
        outside = self._outside(image)
        if self.erase:
            image = torch.where(seen, outside, image)
        half_height, half_width = self._half(height), self._half(width)
        field = outside.expand(-1, height + 2 * half_height, width + 2 * half_width).clone()
        field[:, half_height : half_height + height, half_width : half_width + width] = image
        x, y = at
        field = field[:, y : y + 2 * half_height, x : x + 2 * half_width]
        attention = self._sharpened(_joined(self._modulation(sought, field)))
        whole = F.interpolate(attention[None, None], (2 * half_height, 2 * half_width), mode="area")[0, 0]
        whole = whole - whole.min()
        return whole[half_height - y : half_height - y + height, half_width - x : half_width - x + width]

    def _modulation(self, sought: list[Tensor], field: Tensor) -> list[Tensor]:
        seen = self.net.features(field[None], self.layers)
        return [_convolved(x, kernel)[0, 0] for x, kernel in zip(seen, sought, strict=True)]

    def _half(self, side: int) -> int:
        """Return half the field's side: a whole number of cells, so that the fixation begins the middle one."""
        cell = self.net.stride(self.layers[-1])
        return -(-(side + self.margin) // cell) * cell

    def _outside(self, image: Tensor) -> Float[Tensor, "c 1 1"]:
        if len(self.background) not in (1, image.shape[0]):
            raise ShapeError(f"background={self.background} must have one value, or {image.shape[0]}, one a channel")
        return image.new_tensor(self.background).expand(image.shape[0])[:, None, None]

    def _sharpened(self, attention: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
        if self.sharpen is None:
            return attention
        for _ in range(self.sharpen.passes):
            attention = attention + blurred(attention, *self.sharpen.small) - blurred(attention, *self.sharpen.large)
        return attention


def _convolved(x: Float[Tensor, "1 c h w"], kernel: Float[Tensor, "1 c h2 w2"]) -> Float[Tensor, "1 1 h w"]:
    """Convolve with "same" padding; a kernel of even sides reaches one cell farther right and down."""
    high, wide = (side - 1 for side in kernel.shape[2:])
    return F.conv2d(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)), kernel)


def _joined(maps: list[Float[Tensor, "h w"]]) -> Float[Tensor, "h w"]:
    """Return the average of the normalised maps, each weighed by its largest value; zeros if all are."""
    weights = torch.stack([each.max() for each in maps])
    normal = torch.stack([_between_0_and_1(each) for each in maps])
    total = weights.sum()
    return (weights[:, None, None] * normal).sum(0) / total.where(total != 0, 1)


def _between_0_and_1(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return (x - low) / (high - low).where(high > low, 1)


def blurred(x: Float[Tensor, "h w"], window: int, sigma: float) -> Float[Tensor, "h w"]:
    """Blur a map with a Gaussian of an odd window, reflected at the border without repeating it.

    `sigma=0` stands for 0.3 * ((window - 1) / 2 - 1) + 0.8, as in OpenCV.
    """
    if type(window) is not int or window < 1 or window % 2 == 0:
        raise OptionError(f"window={shown(window)} must be an odd whole number")
    validate.at_least("sigma", sigma, 0)
    half = window // 2
    if half >= min(x.shape):
        raise ShapeError(f"a window of {window} needs a map of more than {half} cells a side; got {tuple(x.shape)}")
    width = sigma or 0.3 * (half - 1) + 0.8
    bell = torch.exp(-0.5 * ((torch.arange(window, dtype=x.dtype, device=x.device) - half) / width) ** 2)
    bell = bell / bell.sum()
    padded = F.pad(x[None, None], (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))[0, 0]
