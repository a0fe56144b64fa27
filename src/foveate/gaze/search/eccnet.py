"""eccNET: a convolutional network whose pools are eccentricity-dependent, its weights unchanged.

Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases (2021), arXiv 2106.02953.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.gaze.search.eccentricity_pool import EccentricityPool2d, Kind, same_pool

#: Slopes of the five pools of VGG16, in the paper's fit to receptive fields of macaques.
SLOPES = (0.0, 0.0, 3.5 * 0.02, 8 * 0.02, 16 * 0.02)
#: Blocks of VGG16: the width of their convolutions over that of the first, and how many there are.
_VGG16 = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


@final
class EccNet(Checked, nn.Module):
    """The blocks of a network such as VGG16, each followed by an `EccentricityPool2d` in place of its own pool.

    It shares the network's modules, and so its weights; nothing is trained. Pool l has
    `deg2px` of round(deg2px / (product of the strides before it)).

    Args:
        cnn: convolutions, activations and pools in a row, which end with a pool: `vgg.features` of torchvision's
            VGG16, `vgg16_features()`, or a network of your own. Convolutions keep the sides of their map.
        slopes: for each pool, how fast its windows grow; the paper's by default, for five pools. Zeros turn
            eccentricity off.
        deg2px: pixels of the image per degree of visual angle.
        fovea_deg: the fovea's diameter in degrees.
        ring_deg: the step of diameter from one ring to the next, in degrees.
        kind: "avg" (the paper) or "max", the pools of VGG16, as in IVSN.

    Raises:
        OptionError: a network with other modules, without a pool at its end, or slopes for another number of pools.

    Example:
        >>> net = EccNet(vgg16_features())
        >>> [tuple(x.shape[1:]) for x in net.features(torch.randn(1, 3, 224, 224), (3, 4, 5))]
        [(256, 14, 14), (512, 14, 14), (512, 14, 14)]
    """

    def __init__(
        self, cnn: nn.Sequential, slopes: Sequence[float] | None = None, *, deg2px: float = 30, fovea_deg: float = 4,
        ring_deg: float = 1, kind: Kind = "avg",
    ) -> None:  # fmt: skip
        super().__init__()
        blocks, pools = _blocks(cnn)
        if slopes is None and len(pools) != len(SLOPES):
            raise OptionError(f"slopes: the paper's are for {len(SLOPES)} pools; give one for each of the {len(pools)}")
        found = SLOPES if slopes is None else tuple(slopes)
        if len(found) != len(pools):
            raise OptionError(f"slopes={found} must have one for each of the network's {len(pools)} pools")
        self.blocks, self.pools = nn.ModuleList(blocks), nn.ModuleList()
        self.kind, scale = kind, 1
        for slope, (window, stride) in zip(found, pools, strict=True):
            at_layer = round(deg2px / scale)
            self.pools.append(EccentricityPool2d(stride, window, slope, at_layer, fovea_deg, ring_deg, kind=kind))
            scale *= stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the map behind the last pool."""
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x = pool(block(x))
        return x

    def features(
        self, x: Float[Tensor, "b c h w"], layers: Sequence[int], *, pooled: bool = False
    ) -> list[Float[Tensor, "b c2 h2 w2"]]:
        """Return the activations before pools, or behind them, each pooled uniformly to the grid of the last layer.

        Args:
            x: images `(B, C, H, W)`; the fixation is their centre, the pixel (H // 2, W // 2).
            layers: numbers of pools, the first is 1; ascending.
            pooled: behind the pools, one pool deeper.
        """
        check_layers(layers, len(self.pools))
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ShapeError(f"x must be floating point (B, C, H, W); got {shown(x)}")
        found: dict[int, Tensor] = {}
        for number in range(1, layers[-1] + 1):
            before = self.blocks[number - 1](x)
            if number < layers[-1] or pooled:
                x = self.pools[number - 1](before)
                found = {layer: self._uniform(number, each) for layer, each in found.items()}
            if number in layers:
                found[number] = x if pooled else self._last(number, before, layers)
        return [found[layer] for layer in layers]

    def stride(self, layer: int) -> int:
        """Return the product of the strides of the pools before one, in pixels of the image."""
        total = 1
        for number in range(1, layer):
            total *= self._pool(number).stride
        return total

    def _last(self, number: int, before: Tensor, layers: Sequence[int]) -> Tensor:
        """Return the activations before a pool, pooled uniformly there unless it is the last layer."""
        return before if number == layers[-1] else self._uniform(number, before)

    def _uniform(self, number: int, x: Tensor) -> Tensor:
        pool = self._pool(number)
        return same_pool(x, pool.rf_min, pool.stride, self.kind)

    def _pool(self, number: int) -> EccentricityPool2d:
        pool = self.pools[number - 1]
        assert isinstance(pool, EccentricityPool2d)
        return pool


def check_layers(layers: Sequence[int], pools: int) -> None:
    """Refuse layers that are not ascending numbers of a network's pools."""
    numbers = layers if isinstance(layers, tuple | list) else ()
    is_inside = all(type(each) is int and 1 <= each <= pools for each in numbers)
    if not numbers or not is_inside or not all(a < b for a, b in pairwise(numbers)):
        raise OptionError(f"layers={layers} must be ascending numbers of pools in 1..{pools}")


def vgg16_features(width: int = 64, state: Mapping[str, Tensor] | None = None) -> nn.Sequential:
    """Make the convolutional part of VGG16, its 13 convolutions and 5 pools, with random weights or those of a state.

    Very Deep Convolutional Networks for Large-Scale Image Recognition (2014), arXiv 1409.1556, configuration D. Modules
    have torchvision's order and names.

    Args:
        width: channels of the first block; 64 in the paper.
        state: the state dict of torchvision's `vgg16`, or of its `features`; entries of the classifier are passed over.

    Raises:
        OptionError: a state that lacks a weight, has another one, or one of another shape.
    """
    validate.count("width", width, 1)
    made: list[nn.Module] = []
    channels = 3
    for factor, count in _VGG16:
        for _ in range(count):
            made += [nn.Conv2d(channels, width * factor, 3, padding=1), nn.ReLU()]
            channels = width * factor
        made.append(nn.MaxPool2d(2, 2))
    cnn = nn.Sequential(*made)
    if state is not None:
        _load(cnn, state)
    return cnn


def _load(cnn: nn.Sequential, state: Mapping[str, Tensor]) -> None:
    kept = {name: x for name, x in state.items() if not name.startswith("classifier.")}
    given = {name.removeprefix("features."): x for name, x in kept.items()}
    own = cnn.state_dict()
    for name in sorted(own.keys() | given.keys()):
        if name not in given or name not in own:
            raise OptionError(f'state {"lacks" if name in own else "has an unknown entry,"} "features.{name}"')
        if given[name].shape != own[name].shape:
            raise OptionError(f'state["features.{name}"] must be {tuple(own[name].shape)}; got {shown(given[name])}')
    cnn.load_state_dict(given)


def _blocks(cnn: nn.Sequential) -> tuple[list[nn.Sequential], list[tuple[int, int]]]:
    """Split a network at its pools; return the blocks, and the window and stride of each pool."""
    if not isinstance(cnn, nn.Sequential):
        raise OptionError(f"cnn must be an nn.Sequential of convolutions and pools; got {type(cnn).__name__}")
    blocks, pools, block = [], [], list[nn.Module]()
    for name, module in cnn.named_children():
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            blocks.append(nn.Sequential(*block))
            pools.append((_side(module.kernel_size), _side(module.stride)))
            block = []
            continue
        if isinstance(module, nn.Conv2d) and not _keeps_sides(module):
            raise OptionError(f"cnn: the convolution {name!r} must keep its map's sides: stride 1 and padding k // 2")
        if isinstance(module, nn.Linear | nn.Flatten | nn.AdaptiveAvgPool2d):
            kind = type(module).__name__
            raise OptionError(f"cnn: {name!r} is a {kind}; pass the convolutional part, such as vgg.features")
        block.append(module)
    if not pools or block:
        raise OptionError(f"cnn must end with a pool; it has {len(pools)} and {len(block)} modules behind the last")
    return blocks, pools


def _keeps_sides(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    sides = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    return conv.stride == (1, 1) and all(2 * pad == dilation * (k - 1) for k, pad, dilation in sides)


def _side(size: int | tuple[int, ...]) -> int:
    if isinstance(size, int):
        return size
    if size[0] != size[1]:
        raise OptionError(f"cnn: a pool's window and stride must be square; got {tuple(size)}")
    return size[0]
