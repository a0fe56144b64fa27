"""BASED: a decoder of short convolutions, Taylor linear attention, and softmax attention in small windows.

Simple linear attention language models balance the recall-throughput tradeoff (2024), arXiv 2402.18668.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks as mask_algebra, validate
from foveate.core.errors import OptionError
from foveate.models.base.decoder import Decoder
from foveate.nn import Layer, MultiHeadAttention, Rotary, ShortConv
from foveate.nn.parts.heads import HeadState
from foveate.ops.base.kv_state import KVState
from foveate.ops.linear.based import TaylorAttention
from foveate.ops.operator import Growth, MaskKind, Pattern
from foveate.ops.sparse.sliding_window import SlidingWindow

KINDS = ("conv", "linear", "window")


@final
class Based(Decoder):
    """Tokens to logits through layers of three kinds: local mixing, global memory, exact attention to the last few.

    Reads in O(N) and streams with a state that stops growing once the window is full; `feature_dim` and `window` trade
    its bytes for recall. Trained from scratch: it is no drop-in for a pretrained transformer.

    Args:
        vocabulary, dim, depth: tokens, C, layers.
        heads: H of the linear and the window layers, a divisor of `dim`.
        feature_dim: D of queries and keys of the linear layers; their state has 1 + D + D² rows a head.
        window: keys that a window layer sees, the query's own included. The release's `window_size` of w sees w // 2
            keys before the query, and its own.
        pattern: the kinds of layers, separated by commas, over and over until `depth`: "conv" (`GatedConv`), "linear"
            (`TaylorAttention`, without positions), "window" (`SlidingWindow`, with rotary positions). The default has
            the release's mix: every fifth layer linear, and the one after it a window.
        symmetric: see `TaylorAttention`.
        tied: see `Decoder`.

    Raises:
        OptionError: an option out of range, or an unknown kind of layer.
    """

    def __init__(
        self, vocabulary: int, dim: int, depth: int, *, heads: int = 16, feature_dim: int = 16, window: int = 64,
        pattern: str = "conv,linear,window,conv,conv", symmetric: bool = False, tied: bool = True,
    ) -> None:  # fmt: skip
        validate.count("depth", depth, 1)
        kinds = [kind.strip() for kind in pattern.split(",")]
        for kind in kinds:
            if kind not in KINDS:
                raise OptionError(f"pattern={pattern!r} must be a list of {', '.join(KINDS)}; got {kind!r}")
        makers = {
            "conv": lambda: GatedConv(dim),
            "linear": lambda: linear_layer(dim, heads, feature_dim, symmetric=symmetric),
            "window": lambda: WindowAttention(dim, heads, window),
        }
        super().__init__(vocabulary, [makers[kinds[i % len(kinds)]]() for i in range(depth)], tied=tied)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """What all layers together remember of a text of `length` tokens."""
        return sum(state_bytes(block.mixer, length, dtype) for block in self.blocks)


def linear_layer(dim: int, heads: int, feature_dim: int = 16, *, symmetric: bool = False) -> MultiHeadAttention:
    """Taylor linear attention between projections without biases, and no positions."""
    if dim % heads:
        raise OptionError(f"heads={heads} must divide dim={dim}")
    op = TaylorAttention(symmetric=symmetric)
    return MultiHeadAttention(dim, heads, head_dim=feature_dim, value_dim=dim // heads, op=op)


@final
class GatedConv(Layer):
    """`(silu(conv(x W_c)) * x W_u) W_o`, the convolution causal and each channel by itself (BaseConv). O(N).

    Sees `kernel` tokens and no further.

    Args:
        dim: C.
        kernel: tokens that it sees, its own included.
        expand: channels inside, in multiples of C: 2 in the release's language models, 1 in its default.

    The release's biases: on the projections, none on the convolution. SiLU is the release's; the paper's formula has
    none.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal self"})
    masks: ClassVar[frozenset[MaskKind]] = frozenset({"keys"})
    steps: ClassVar[Literal["exact"] | None] = "exact"
    growth: ClassVar[Growth] = "N"

    def __init__(self, dim: int, kernel: int = 3, *, expand: int = 2) -> None:
        super().__init__(dim)
        validate.count("expand", expand, 1)
        self.into, self.out = nn.Linear(dim, 2 * expand * dim), nn.Linear(expand * dim, dim)
        self.conv = ShortConv(expand * dim, kernel, bias=False)

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        seen = None if mask is None else mask_algebra.keys_of(mask, x.shape[0], x.shape[1])[..., None]
        mixed, gate = self.into(x if seen is None else x.masked_fill(~seen, 0.0)).chunk(2, -1)
        return self._gated(self.conv(mixed if seen is None else mixed.masked_fill(~seen, 0.0)), gate)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.conv.init_state(batch, dtype, device)

    def _step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mixed, gate = self.into(x).chunk(2, -1)
        mixed, state = self.conv.step(mixed, state)
        return self._gated(mixed, gate), state

    def _gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        return self.out(F.silu(mixed) * gate)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim)


@final
class WindowAttention(Layer):
    """Softmax attention to the last `window` tokens, with rotary positions, at O(N window); its cache holds no more.

    Args:
        dim, heads: C and H.
        window: keys, the query's own included.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal self"})
    steps: ClassVar[Literal["exact"] | None] = "exact"
    growth: ClassVar[Growth] = "N"

    def __init__(self, dim: int, heads: int, window: int = 64) -> None:
        super().__init__(dim, heads)
        self.window = window
        self.attention = MultiHeadAttention(dim, heads, op=SlidingWindow(window, sinks=0), position=Rotary())

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        return self.attention(x, mask=mask, causal=True)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> HeadState:
        return self.attention.init_state(batch, dtype=dtype, device=device)

    def _step(self, x: Tensor, state: HeadState) -> tuple[Tensor, HeadState]:
        out, state = self.attention.step(x, state)
        held: KVState = state.op
        return out, replace(state, op=KVState(held.k[:, :, -self.window :], held.v[:, :, -self.window :]))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, max(1, length // 3))


def state_bytes(layer: Layer, length: int, dtype: torch.dtype = torch.float32) -> int:
    """What one of BASED's layers remembers of `length` tokens of one text while it streams.

    A linear layer: the same for every length, in float32 at least. A window: `min(length, window)` keys and values. A
    convolution: its last few inputs.
    """
    validate.count("length", length, 0)
    if isinstance(layer, GatedConv):
        return (layer.conv.kernel - 1) * layer.out.in_features * dtype.itemsize
    if isinstance(layer, WindowAttention):
        return 2 * layer.dim * min(length, layer.window) * dtype.itemsize
    if isinstance(layer, MultiHeadAttention) and isinstance(layer.op, TaylorAttention):
        state: Any = layer.init_state(1, dtype=dtype, device="meta").op
        return state.memory.numel() * state.memory.dtype.itemsize
    raise OptionError(f"layer={layer!r} must be one of BASED's: conv, linear or window")
