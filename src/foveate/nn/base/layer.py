"""The seam of layers: a token mixer `(B, N, C) -> (B, N, C)`, with declared capabilities.

A `Layer` owns projections around some way to attend. The base class checks a call and refuses by name what the layer
does not define; a system writes `_mix`. A layer that can go one token at a time is a `StreamingLayer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern, shown
from foveate.ops.operator import (
    ALL_MASKS,
    ALL_TRANSFORMS,
    Growth,
    MaskKind,
    Pattern,
    Transform,
    listed,
    mask_kind,
)


@dataclass(frozen=True)
class LayerCapabilities:
    """Facts that a layer declares about itself, which programs may read.

    Args:
        patterns: "self" over all tokens, "cross" over those of `memory`, "causal self" over the past.
        masks: kinds of mask that it takes: "keys" (bool `(B, 1, 1, Nk)`), "pairs" (any bool mask), "bias" (float).
        streaming: "exact" where `step` gives what the causal call gives, None where it cannot stream.
        grid: whether tokens lie on a grid, row by row, whose `size=(H, W)` a call has to bring.
        prefix: tokens of a layer of grids that come before those of the grid (a class token).
        inputs: names of further tensors that a call may bring.
        growth: how time grows with the number of tokens.
        transforms: what a call goes through besides running: "meta" (the meta device), "vmap", "export".
    """

    patterns: frozenset[Pattern] = frozenset({"self", "causal self", "cross"})
    masks: frozenset[MaskKind] = ALL_MASKS
    streaming: Literal["exact"] | None = None
    grid: bool = False
    prefix: int = 0
    inputs: frozenset[str] = frozenset()
    growth: Growth = "N²"
    transforms: frozenset[Transform] = ALL_TRANSFORMS


class Layer(nn.Module, ABC):
    """Attention as a network uses it.

    Attributes:
        capabilities: what it can do. A class declares it; an instance whose options change it sets its own.
    """

    capabilities: LayerCapabilities = LayerCapabilities()

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a fact that is declared beside `capabilities`, where it would be read by nobody."""
        super().__init_subclass__(**options)
        if astray := sorted({each.name for each in fields(LayerCapabilities)} & vars(cls).keys()):
            raise TypeError(f"{cls.__name__} declares {', '.join(astray)}: that belongs into its `capabilities`")

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses an option of the wrong type before anything is made."""
        validate.options(cls, args, options)
        return super().__new__(cls)

    def __init__(self, dim: int, heads: int = 1) -> None:
        """`dim` is C, the width of tokens in and out; it is a multiple of `heads` unless a layer says otherwise."""
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("heads", heads, 1)
        self.dim, self.heads = dim, heads

    # -- what a user calls ---------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        size: tuple[int, int] | None = None,
        **inputs: Tensor,
    ) -> Float[Tensor, "b n c"]:
        """Mix tokens.

        Args:
            x: tokens `(B, N, C)`.
            memory: tokens `(B, M, C)` to attend to in place of x itself.
            mask: bool, True = may attend, or a float bias; broadcastable to `(B, H, N, M)`.
            causal: only the past.
            size: `(H, W)` of the grid that the N tokens make, for layers of grids.
            inputs: further tensors, by name.

        Raises:
            ShapeError, OptionError: a malformed call.
            UnsupportedPattern: something that the layer does not define.
        """
        self._check(x, memory, mask, causal, size, inputs)
        given: dict[str, Any] = {**inputs, "size": size} if self.capabilities.grid else dict(inputs)
        return self._mix(x, memory, mask, causal, **given)

    # -- what tests and tables read ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        """An instance fit for such sizes, in which the mechanism is at work; tests run it."""
        return cls(dim, heads)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        """Further inputs that a call of the example needs."""
        return {}

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        """The layer's output. Layers of grids find `size` among the inputs."""

    def _declare(self, **facts: Any) -> None:
        """Set capabilities that this instance's options change; for `__init__`."""
        self.capabilities = replace(self.capabilities, **facts)

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _check(
        self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool,
        size: tuple[int, int] | None, inputs: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self._check_tokens(x, memory)
        if not isinstance(causal, bool):
            raise OptionError(f"causal={shown(causal)} must be True or False")
        pattern = ("causal " if causal else "") + ("self" if memory is None else "cross")
        if pattern not in self.capabilities.patterns:
            raise UnsupportedPattern(
                f'{self.name} does not define "{pattern}" attention; it does {listed(self.capabilities.patterns)}'
            )
        self._check_mask(mask, x, x if memory is None else memory)
        self._check_size(x, size)
        for name in inputs:
            if name not in self.capabilities.inputs:
                raise OptionError(f"{self.name} takes no input {name!r}; it takes {listed(self.capabilities.inputs)}")

    def _check_tokens(self, x: Tensor, memory: Tensor | None) -> None:
        for name, given in (("x", x), ("memory", memory)):
            if given is None and name == "memory":
                continue
            if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[-1] != self.dim:
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ShapeError(f"{name} must be (B, N, C={self.dim}); got {got}")
        if memory is not None and memory.shape[0] != x.shape[0]:
            raise ShapeError(f"memory has B={memory.shape[0]}; x has B={x.shape[0]}")

    def _check_mask(self, mask: Tensor | None, x: Tensor, keys: Tensor) -> None:
        if mask is None:
            return
        if (kind := mask_kind(mask)) not in self.capabilities.masks:
            raise UnsupportedPattern(
                f'{self.name} does not take a mask of kind "{kind}"; it takes {listed(self.capabilities.masks)}'
            )
        validate.attention_mask(mask, (x.shape[0], self.heads, x.shape[1], keys.shape[1]), x.device)

    def _check_size(self, x: Tensor, size: tuple[int, int] | None) -> None:
        prefix = self.capabilities.prefix
        if not self.capabilities.grid:
            if size is not None:
                raise OptionError(f"{self.name} knows no grid; got size={shown(size)}")
        elif size is None or len(size) != 2 or size[0] * size[1] != x.shape[1] - prefix:
            before = f" - {prefix}" if prefix else ""
            raise ShapeError(f"size={shown(size)} must be (H, W) with H * W = N{before} = {x.shape[1] - prefix}")


class StreamingLayer(Layer, ABC):
    """A layer with `init_state`, `step` and `prefill`: it goes one token at a time, with a state in place of the past.

    Options may rule streaming out: `capabilities.streaming` is then None, and all three are refused.
    """

    def init_state(self, batch: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
        """Make an empty state for `step`."""
        self._check_streaming()
        validate.count("batch", batch, 1)
        return self._init_state(batch, dtype, torch.device(device))

    def step(self, x: Float[Tensor, "b 1 c"], state: Any, **inputs: Tensor) -> tuple[Float[Tensor, "b 1 c"], Any]:
        """Take one token: with a state, it gives its output and the next state."""
        self._check_streaming()
        self._check(x, None, None, True, None, inputs)
        if x.shape[1] != 1:
            raise ShapeError(f"step takes one token; got N={x.shape[1]}")
        return self._step(x, state, **inputs)

    def prefill(self, x: Float[Tensor, "b n c"], **inputs: Tensor) -> tuple[Float[Tensor, "b n c"], Any]:
        """Make the causal call on a prompt, and the state to go on from it with `step`."""
        self._check_streaming()
        self._check(x, None, None, True, None, inputs)
        return self._prefill(x, **inputs)

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any: ...

    @abstractmethod
    def _step(self, x: Tensor, state: Any, **inputs: Tensor) -> tuple[Tensor, Any]: ...

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        """Go token by token; a layer that knows a faster way overrides it."""
        state, out = self._init_state(x.shape[0], x.dtype, x.device), []
        for t in range(x.shape[1]):
            y, state = self._step(x[:, t : t + 1], state, **{name: i[:, t : t + 1] for name, i in inputs.items()})
            out.append(y)
        return torch.cat(out, 1), state

    def _check_streaming(self) -> None:
        if self.capabilities.streaming is None:
            raise UnsupportedPattern(f"{self.name} cannot go one token at a time")


def streaming(layer: Layer) -> StreamingLayer:
    """Return the layer as one that goes one token at a time, or refuse it by name."""
    if not isinstance(layer, StreamingLayer):
        raise UnsupportedPattern(f"{layer.name} cannot go one token at a time")
    return layer
