"""The base class of layers: a token mixer `(B, N, C) -> (B, N, C)` with declared capabilities.

A `Layer` has projections around a way to attend. The base class checks a call and refuses by name what the layer does
not define; subclasses define `_mix`. A layer that can process one token at a time is a `StreamingLayer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern, shown
from foveate.ops.operator import (
    ALL_MASKS,
    ALL_TRANSFORMS,
    Growth,
    MaskKind,
    Pattern,
    Transform,
    check_mask_kind,
    listed,
)


@dataclass(frozen=True)
class LayerCapabilities:
    """Facts that a layer declares about itself, which programs may read.

    Args:
        patterns: valid patterns: "self" over all tokens, "cross" over those of `source`, "causal self" over the past.
        masks: valid kinds of mask: "keys" (bool `(B, 1, 1, Nk)`), "pairs" (any bool mask), "bias" (float).
        streaming: "exact" if `step` equals the causal call, None if the layer cannot stream.
        grid: True if tokens form a grid, row by row, whose `size=(H, W)` a call has to bring.
        prefix: tokens before those of the grid, such as a class token.
        inputs: names of further tensors that a call may bring.
        growth: the growth of time with the number of tokens.
        transforms: supported transforms of a call: "meta" (the meta device), "vmap", "export".
    """

    patterns: frozenset[Pattern] = frozenset({"self", "causal self", "cross"})
    masks: frozenset[MaskKind] = ALL_MASKS
    streaming: Literal["exact"] | None = None
    grid: bool = False
    prefix: int = 0
    inputs: frozenset[str] = frozenset()
    growth: Growth = "N²"
    transforms: frozenset[Transform] = ALL_TRANSFORMS


class Layer(Checked, nn.Module, ABC):
    """A layer that mixes tokens.

    Attributes:
        capabilities: its declared facts. A class declares them; an instance whose options change them sets its own.
    """

    capabilities: LayerCapabilities = LayerCapabilities()

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a fact that is declared outside `capabilities`, where nothing would read it."""
        super().__init_subclass__(**options)
        if astray := sorted({each.name for each in fields(LayerCapabilities)} & vars(cls).keys()):
            raise TypeError(f"{cls.__name__} declares {', '.join(astray)}: that belongs into its `capabilities`")

    def __init__(self, dim: int, heads: int = 1) -> None:
        """Set `dim`, C, the width of tokens in and out; it is a multiple of `heads` in most layers."""
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("heads", heads, 1)
        self.dim, self.heads = dim, heads

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        source: Float[Tensor, "b m c"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        size: tuple[int, int] | None = None,
        **inputs: Tensor,
    ) -> Float[Tensor, "b fewer out"]:
        """Mix tokens. The output is C wide, unless the layer was built with another `out_dim`; N long without a stride.

        Args:
            x: tokens `(B, N, C)`.
            source: tokens `(B, M, C)` to attend to in place of x.
            mask: bool, True = may attend, or a float bias; broadcastable to `(B, H, N, M)`.
            causal: True = each token sees only the past.
            size: `(H, W)` of the grid of the N tokens, for layers of grids.
            inputs: further tensors, by name.

        Raises:
            ShapeError, OptionError: a malformed call.
            UnsupportedPattern: something that the layer does not define.
        """
        self._check(x, source, mask, causal, size, inputs)
        given: dict[str, Any] = {**inputs, "size": size} if self.capabilities.grid else dict(inputs)
        return self._mix(x, source, mask, causal, **given)

    # -- for tests and tables ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        """Make an instance for these sizes, in which the mechanism has an effect; tests run it."""
        return cls(dim, heads)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        """Make further inputs that a call of the example needs."""
        return {}

    # -- for subclasses ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        """Return the layer's output. Layers of grids get `size` among the inputs."""

    def _declare(self, **facts: Any) -> None:
        """Set the capabilities that this instance's options change; call it in `__init__`."""
        self.capabilities = replace(self.capabilities, **facts)

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _check(
        self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool,
        size: tuple[int, int] | None, inputs: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self._check_tokens(x, source)
        if not isinstance(causal, bool):
            raise OptionError(f"causal={shown(causal)} must be True or False")
        pattern = ("causal " if causal else "") + ("self" if source is None else "cross")
        if pattern not in self.capabilities.patterns:
            raise UnsupportedPattern(
                f'{self.name} does not define "{pattern}" attention; it does {listed(self.capabilities.patterns)}'
            )
        self._check_mask(mask, x, x if source is None else source)
        self._check_size(x, size)
        for name in inputs:
            if name not in self.capabilities.inputs:
                raise OptionError(f"{self.name} takes no input {name!r}; it takes {listed(self.capabilities.inputs)}")

    def _check_tokens(self, x: Tensor, source: Tensor | None) -> None:
        for name, given in (("x", x), ("source", source)):
            if given is None and name == "source":
                continue
            if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[-1] != self.dim:
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ShapeError(f"{name} must be (B, N, C={self.dim}); got {got}")
        if source is not None and source.shape[0] != x.shape[0]:
            raise ShapeError(f"source has B={source.shape[0]}; x has B={x.shape[0]}")

    def _check_mask(self, mask: Tensor | None, x: Tensor, keys: Tensor) -> None:
        if mask is None:
            return
        check_mask_kind(self.name, mask, self.capabilities.masks)
        validate.attention_mask(mask, (x.shape[0], self.heads, x.shape[1], keys.shape[1]), x.device)

    def _check_size(self, x: Tensor, size: tuple[int, int] | None) -> None:
        prefix = self.capabilities.prefix
        if not self.capabilities.grid:
            if size is not None:
                raise OptionError(f"{self.name} takes no grid; got size={shown(size)}")
        elif size is None or len(size) != 2 or size[0] * size[1] != x.shape[1] - prefix:
            before = f" - {prefix}" if prefix else ""
            raise ShapeError(f"size={shown(size)} must be (H, W) with H * W = N{before} = {x.shape[1] - prefix}")


class StreamingLayer(Layer, ABC):
    """A layer with `init_state`, `step` and `prefill`: it processes one token at a time and keeps a state of the past.

    Some options rule streaming out. `capabilities.streaming` is then None, and all three methods raise
    `UnsupportedPattern`.
    """

    def init_state(self, batch: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
        """Make an empty state for `step`."""
        self._check_streaming()
        validate.count("batch", batch, 1)
        return self._init_state(batch, dtype, torch.device(device))

    def step(self, x: Float[Tensor, "b 1 c"], state: Any, **inputs: Tensor) -> tuple[Float[Tensor, "b 1 out"], Any]:
        """Process one token; return its output and the next state."""
        self._check_streaming()
        self._check(x, None, None, True, None, inputs)
        if x.shape[1] != 1:
            raise ShapeError(f"step takes one token; got N={x.shape[1]}")
        return self._step(x, state, **inputs)

    def prefill(self, x: Float[Tensor, "b n c"], **inputs: Tensor) -> tuple[Float[Tensor, "b n out"], Any]:
        """Make the causal call on a prompt; return its output and the state after it, from which `step` continues."""
        self._check_streaming()
        self._check(x, None, None, True, None, inputs)
        return self._prefill(x, **inputs)

    # -- for subclasses ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any: ...

    @abstractmethod
    def _step(self, x: Tensor, state: Any, **inputs: Tensor) -> tuple[Tensor, Any]: ...

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        """Process token by token; layers with a faster form override it."""
        state, out = self._init_state(x.shape[0], x.dtype, x.device), []
        for t in range(x.shape[1]):
            y, state = self._step(x[:, t : t + 1], state, **{name: i[:, t : t + 1] for name, i in inputs.items()})
            out.append(y)
        return torch.cat(out, 1), state

    def _check_streaming(self) -> None:
        if self.capabilities.streaming is None:
            raise UnsupportedPattern(f"{self.name} cannot go one token at a time")


def streaming(layer: Layer) -> StreamingLayer:
    """Return the layer as a `StreamingLayer`, or refuse it by name."""
    if not isinstance(layer, StreamingLayer):
        raise UnsupportedPattern(f"{layer.name} cannot go one token at a time")
    return layer
