"""The base class of whole networks: their published sizes, their costs, and the names of a release's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown, unknown
from foveate.nn.parts import released as released_parameters
from foveate.nn.parts.grid import to_map, to_tokens


@dataclass(frozen=True)
class Size:
    """A size of a network that its paper, or its release, states.

    Args:
        options: the options that make it.
        parameters: number of trained parameters; None if nothing is stated.
        macs: multiply-adds of a forward pass for one example of the shapes `inputs`; None if nothing is stated.
        inputs: shapes of one example's inputs, without the batch.
        source: where the numbers stand, such as "Table 3".
        tolerance, macs_tolerance: largest relative differences from the stated numbers, which papers round.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: float | None = None
    macs: float | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    source: str = ""
    tolerance: float = 0.01
    macs_tolerance: float = 0.01


class Network(Checked, nn.Module, ABC):
    """A whole network of a paper.

    Attributes:
        sizes: the published sizes by name.
        released_names: pairs of a regular expression and its replacement, which turn the names of the parameters of the
            paper's release into ours, applied in order; empty if there is no release, or if it has our names. A name
            that becomes empty is left out.
        released_parts: for parameters of the release that hold several of ours, a regular expression and the
            replacements for the equal parts along the first axis; see `foveate.nn.parts.released.renamed`.
        batched: whether the first axis of inputs and outputs counts independent examples; False where it counts parts
            of one, such as the nodes of a graph.
    """

    sizes: ClassVar[Mapping[str, Size]] = {}
    released_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    released_parts: ClassVar[tuple[tuple[str, tuple[str, ...]], ...]] = ()
    batched: ClassVar[bool] = True

    @classmethod
    def of_size(cls, name: str, **options: Any) -> Self:
        """Build a published size; `options` replace some of its own, such as the number of classes.

        Raises:
            UnknownKey: no published size has this name.
        """
        if name not in cls.sizes:
            raise unknown(f"size of {cls.__name__}", name, cls.sizes)
        return cls(**{**cls.sizes[name].options, **options})

    @classmethod
    def renamed(cls, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of the paper's release under our names.

        Raises:
            OptionError: two parameters would get one name.
        """
        return released_parameters.renamed(released, cls.released_names, cls.released_parts)

    def load_released(self, released: Mapping[str, Tensor]) -> None:
        """Load the state dict of the paper's release.

        Raises:
            OptionError: parameters that this network lacks, or has alone, or has in another shape.
        """
        released_parameters.load(self, self.renamed(released))

    # -- for tests -----------------------------------------------------------------------------------------------------

    @classmethod
    def example(cls) -> Self:
        """Make a small instance in which the mechanism has an effect; tests run it."""
        return cls()

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        """Make inputs for the example, the same each time."""
        raise NotImplementedError(f"{cls.__name__} has to define example_inputs")

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        """Make inputs of other lengths or sides that the example takes; none if it takes one size."""
        return ()


class TextNetwork(Network):
    """A network that reads the tokens `(B, N)` of texts of any length; its example has a vocabulary of 11."""

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randint(0, 11, (batch, 12), generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        (tokens,) = cls.example_inputs(batch)
        return (tokens[:, :7],), (tokens[:, :1],)


class ImageNetwork(Network):
    """A classifier of images of any side, whose stages make smaller and smaller maps; its example has 2 channels.

    Subclasses define `_maps`. They define `_classify` too if more than a norm and a linear map follow the last stage.

    Attributes:
        channels: number of the images' channels.
        norm, head: the norm of the last map's tokens, and the linear map from their mean to the classes.
        example_sides: heights and widths of images for tests; the first one is that of `example_inputs`.
    """

    channels: int
    norm: nn.Module
    head: nn.Module
    example_sides: ClassVar[tuple[tuple[int, int], ...]] = ((24, 24), (19, 23), (3, 24))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self._classify(self.features(images)[-1])

    def features(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d h2 w2"]]:
        """Return the map of each stage, for detection or segmentation; most networks have 1/4 to 1/32 of the sides.

        Raises:
            ShapeError: images without four axes, or with another number of channels.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images must be (B, {self.channels}, H, W); got {shown(images)}")
        return list(self._maps(images))

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 2, *cls.example_sides[0], generator=torch.Generator().manual_seed(0)),)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        (images,) = cls.example_inputs(batch)
        return tuple((images[..., :height, :width],) for height, width in cls.example_sides[1:])

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _maps(self, images: Float[Tensor, "b c h w"]) -> Iterator[Tensor]:
        """Make the map `(B, C, H, W)` of each stage, in order."""

    def _classify(self, last: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b k"]:
        """Return the classes' scores of the last map."""
        return self.head(self.norm(to_tokens(last)).mean(1))


def pyramid(images: Float[Tensor, "b c h w"], downs: nn.ModuleList, stages: nn.ModuleList) -> Iterator[Tensor]:
    """Make the maps of stages on tokens; a module of `downs` makes the map smaller before each of them."""
    found = images
    for down, stage in zip(downs, stages, strict=True):
        found = down(found)
        size = found.shape[2], found.shape[3]
        found = to_map(stage(to_tokens(found), size), size)
        yield found
