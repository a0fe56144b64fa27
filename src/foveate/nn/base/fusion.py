"""The base class of fusions: several sequences or modalities in, and each as the others inform it out.

A stream is one of the inputs, by name. An example may lack some streams. The base class checks a call and joins masks
and missing streams; subclasses define `_fuse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown


@dataclass(frozen=True)
class Stream:
    """One input of a fusion.

    Args:
        name: its name in a call.
        dim: the width of its vectors.
        axes: names of its axes between batch and width: `("N",)` for tokens, `()` for one vector. Axes of one name have
            equal sizes in all streams.
        optional: whether a call may leave it out.
    """

    name: str
    dim: int
    axes: tuple[str, ...] = ("N",)
    optional: bool = False

    @property
    def shape(self) -> str:
        return f"({', '.join(('B', *self.axes, str(self.dim)))})"


class Fusion(Checked, nn.Module, ABC):
    """A layer that lets several streams inform each other.

    Attributes:
        streams: the inputs, in the order of a call without names.
    """

    def __init__(self, *streams: Stream) -> None:
        super().__init__()
        self.streams = streams

    def forward(
        self, *inputs: Tensor, masks: Mapping[str, Bool[Tensor, "..."]] | None = None,
        present: Mapping[str, Bool[Tensor, " b"]] | None = None, **named: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the outputs by name; those of a stream have its name.

        Args:
            inputs, named: the streams, in their order or by name.
            masks: for some streams, True for real vectors, `(B, *axes)`; all are real without one.
            present: for some streams, True for the examples that have it, `(B,)`; all have it without one. What stands
                in a missing stream has no effect on any output.

        Raises:
            ShapeError: a stream, a mask or `present` of the wrong shape.
            OptionError: a stream that is missing or unknown.
        """
        given = self._named(inputs, named)
        self._check(given)
        real = self._real(given, masks or {}, present or {})
        clean = {name: x.masked_fill(~real[name][..., None], 0.0) for name, x in given.items()}
        return self._fuse(clean, real)

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """Make a small instance in which the mechanism has an effect; tests run it."""

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _fuse(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name.

        Args:
            x: the streams of the call, with zeros where nothing is real.
            real: bool `(B, *axes)` for each of them, False where a mask says so and in examples that lack the stream.
        """

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _named(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [stream.name for stream in self.streams]
        if len(inputs) > len(names):
            raise OptionError(f"{self.name} takes the streams {', '.join(names)}; got {len(inputs)} inputs")
        given = dict(zip(names, inputs, strict=False))
        for name, x in named.items():
            if name not in names or name in given:
                why = "twice" if name in given else "which it does not have"
                raise OptionError(f"{self.name} takes the streams {', '.join(names)}; got {name!r} {why}")
            given[name] = x
        for stream in self.streams:
            if stream.name not in given and not stream.optional:
                raise OptionError(f"{self.name} needs the stream {stream.name!r}, {stream.shape}")
        return given

    def _check(self, given: Mapping[str, Tensor]) -> None:
        sizes: dict[str, int] = {}
        for stream in self.streams:
            if stream.name not in given:
                continue
            x = given[stream.name]
            if not isinstance(x, Tensor) or x.dim() != len(stream.axes) + 2 or x.shape[-1] != stream.dim:
                raise ShapeError(f"{stream.name} must be {stream.shape}; got {shown(x)}")
            for axis, size in zip(("B", *stream.axes), x.shape, strict=False):
                if (known := sizes.setdefault(axis, size)) != size:
                    raise ShapeError(f"{stream.name} must have {axis}={known} as the others; got {tuple(x.shape)}")

    def _real(
        self, given: Mapping[str, Tensor], masks: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        for name in (*masks, *present):
            if name not in given:
                raise OptionError(f"masks and present must name streams of the call, {', '.join(given)}; got {name!r}")
        real = {}
        for name, x in given.items():
            shape = tuple(x.shape[:-1])
            real[name] = torch.ones(shape, dtype=torch.bool, device=x.device)
            if name in masks:
                validate.bool_mask(f"masks[{name!r}]", masks[name], "B, axes", shape, x.device)
                real[name] = masks[name].expand(shape)
            if name in present:
                validate.bool_mask(f"present[{name!r}]", present[name], "B", shape[:1], x.device)
                real[name] = real[name] & present[name].view(-1, *[1] * (len(shape) - 1))
        return real
