"""The base class of fusions: several sequences or modalities in, and each as the others inform it out.

A stream is one of the inputs, by name. An example may lack some streams. The base class checks a call and joins masks
and missing streams; subclasses define `_fuse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown


@dataclass(frozen=True)
class Stream:
    """One input or output of a fusion.

    Args:
        name: its name in a call, or among the outputs.
        dim: the width of its vectors; None for one number in place of each vector, such as a logit.
        axes: names of its axes between batch and width: `("N",)` for tokens, `()` for one vector. Axes of one name have
            equal sizes in all streams.
        optional: whether a call may leave it out.
    """

    name: str
    dim: int | None
    axes: tuple[str, ...] = ("N",)
    optional: bool = False

    @property
    def shape(self) -> str:
        width = () if self.dim is None else (str(self.dim),)
        return f"({', '.join(('B', *self.axes, *width))})"

    def fits(self, x: Tensor) -> bool:
        """Return True if a tensor has the stream's axes and width."""
        if self.dim is None:
            return x.dim() == len(self.axes) + 1
        return x.dim() == len(self.axes) + 2 and x.shape[-1] == self.dim

    def places(self, x: Tensor) -> tuple[int, ...]:
        """Return the sizes of batch and axes: one place for each vector or number."""
        return tuple(x.shape if self.dim is None else x.shape[:-1])

    def cleaned(self, x: Tensor, real: Tensor) -> Tensor:
        """Return the tensor with zeros where nothing is real."""
        return x.masked_fill(~(real if self.dim is None else real[..., None]), 0.0)


class Fusion(Checked, nn.Module, ABC):
    """A layer that lets several streams inform each other.

    Attributes:
        streams: the inputs, in the order of a call without names.
        outputs: the outputs; the one that continues a stream has its name.
    """

    def __init__(self, streams: Sequence[Stream], outputs: Sequence[Stream]) -> None:
        super().__init__()
        self.streams, self.outputs = tuple(streams), tuple(outputs)

    def forward(
        self, *inputs: Tensor | None, masks: Mapping[str, Bool[Tensor, "..."]] | None = None,
        present: Mapping[str, Bool[Tensor, " b"]] | None = None, **named: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the outputs by name, in the shapes of `outputs`.

        Args:
            inputs, named: the streams, in their order or by name; None leaves an optional one out.
            masks: for some streams, True for real vectors, `(B, *axes)`; all are real without one.
            present: for some streams, True for the examples that have it, `(B,)`; all have it without one. What stands
                in a missing stream, or behind a mask, has no effect on any output.

        Raises:
            ShapeError: a stream, a mask or `present` of the wrong shape.
            OptionError: a stream that is missing or unknown.
        """
        given = self._named(inputs, named)
        self._check(given)
        real = self._real(given, masks or {}, present or {})
        clean = {each.name: each.cleaned(given[each.name], real[each.name]) for each in self._of(given)}
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

    def _of(self, given: Mapping[str, Any]) -> list[Stream]:
        return [stream for stream in self.streams if stream.name in given]

    def _named(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        names = [stream.name for stream in self.streams]
        takes = f"{self.name} takes the streams {', '.join(names)}"
        if len(inputs) > len(names):
            raise OptionError(f"{takes}; got {len(inputs)} inputs")
        given = dict(zip(names, inputs, strict=False))
        for name, x in named.items():
            if name not in names or name in given:
                raise OptionError(f"{takes}; got {name!r}{' twice' if name in given else ''}")
            given[name] = x
        for stream in self.streams:
            if given.get(stream.name) is None and not stream.optional:
                raise OptionError(f"{self.name} needs the stream {stream.name!r}, {stream.shape}")
        return {name: x for name, x in given.items() if x is not None}

    def _check(self, given: Mapping[str, Any]) -> None:
        sizes: dict[str, int] = {}
        for stream in self._of(given):
            x = given[stream.name]
            if not isinstance(x, Tensor) or not x.is_floating_point() or not stream.fits(x):
                raise ShapeError(f"{stream.name} must be real numbers {stream.shape}; got {shown(x)}")
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
        for stream in self._of(given):
            name, device, shape = stream.name, given[stream.name].device, stream.places(given[stream.name])
            real[name] = torch.ones(shape, dtype=torch.bool, device=device)
            if name in masks:
                validate.bool_mask(f"masks[{name!r}]", masks[name], ", ".join(("B", *stream.axes)), shape, device)
                real[name] = masks[name].expand(shape)
            if name in present:
                validate.bool_mask(f"present[{name!r}]", present[name], "B", shape[:1], device)
                real[name] = real[name] & present[name].view(-1, *[1] * (len(shape) - 1))
        return real
