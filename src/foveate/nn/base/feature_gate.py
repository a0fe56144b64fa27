"""The base class of feature gates: a feature map `(B, C, *space)` in, and the same shape out.

Channel, spatial and volumetric attention weigh a map, or add a weighted copy to it. The base class checks a call,
refuses by name what the gate does not define, and keeps the memory format; subclasses define `_gate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown

_SPACE = {1: "(B, C, L)", 2: "(B, C, H, W)", 3: "(B, C, D, H, W)"}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class FeatureGate(Checked, nn.Module, ABC):
    """A layer for feature maps that keeps their shape.

    The constructor of a subclass takes `channels` first, and `dims` by name, None by default if one object works with
    each of `axes`; then `for_map` and `example` need no definition of their own.

    Attributes:
        axes: numbers of spatial axes for which the mechanism is defined.
        channels: C; None for any number.
        dims: number of spatial axes of this gate; None if one object works with each of `axes`.
    """

    axes: ClassVar[frozenset[int]] = frozenset({1, 2, 3})

    def __init__(self, channels: int | None, dims: int | None = None) -> None:
        super().__init__()
        if channels is not None:
            validate.count("channels", channels, 1)
        if dims is not None:
            validate.one_of("dims", dims, tuple(sorted(self.axes)))
        self.channels, self.dims = channels, dims

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """Return the gated map. A map in `channels_last` stays in it.

        Raises:
            ShapeError: `x` has other channels, or another number of spatial axes, than the gate.
        """
        self._check(x)
        return self._in_format_of(x, self._gate(x))

    # -- for tests, tables and `insert` --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def for_map(cls, channels: int, dims: int, **options: Any) -> Self:
        """Make a gate for maps of so many channels and spatial axes; `insert` calls it."""
        return cls(channels, dims=dims, **options)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        """Make an instance for small maps, in which the mechanism has an effect; tests run it."""
        return cls.for_map(channels, dims)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _gate(self, x: Tensor) -> Tensor:
        """Return the gated map."""

    def _in_format_of(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the output in `channels_last` if x is in it; a gate with a `forward` of its own calls it."""
        last = _CHANNELS_LAST.get(x.dim() - 2)
        if last is not None and x.is_contiguous(memory_format=last):
            return out.contiguous(memory_format=last)
        return out.contiguous()

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor) -> None:
        wanted = [self.dims] if self.dims is not None else sorted(self.axes)
        shapes = " or ".join(_SPACE[axes] for axes in wanted)
        if not isinstance(x, Tensor) or x.dim() - 2 not in wanted or not x.is_floating_point():
            raise ShapeError(f"x must be a map {shapes} of real numbers for {self.name}; got {shown(x)}")
        if self.channels is not None and x.shape[1] != self.channels:
            raise ShapeError(f"x must have C={self.channels} channels; got {tuple(x.shape)}")
        if 0 in x.shape[2:]:
            raise ShapeError(f"x must have at least one position; got {tuple(x.shape)}")
