"""BASED: a decoder of short convolutions, Taylor linear attention, and softmax attention in small windows.

Simple linear attention language models balance the recall-throughput tradeoff (2024), arXiv 2402.18668.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, shown
from foveate.models.base.decoder import Decoder
from foveate.models.base.network import TextNetwork
from foveate.nn import Layer, MultiHeadAttention, Rotary, ShortConv, StreamingLayer
from foveate.nn.parts.blocks import stacked
from foveate.nn.parts.heads import HeadState
from foveate.ops.base.kv_state import KVState
from foveate.ops.linear.based import TaylorAttention
from foveate.ops.sparse.sliding_window import SlidingWindow

KINDS = ("conv", "linear", "window")


@final
class Based(TextNetwork, Decoder):
    """A decoder with layers of three kinds: short convolutions, linear attention, and exact attention to recent tokens.

    Reads in O(N). Its state stops growing once the window is full; `feature_dim` and `window` trade bytes of state for
    recall. It has to be trained from scratch: it does not replace a pretrained transformer.

    Args:
        vocabulary, dim, depth: number of tokens, C, number of layers.
        heads: H of the linear and the window layers, a divisor of `dim`.
        feature_dim: D of queries and keys of the linear layers; their state has 1 + D + D² rows per head.
        window: number of keys that a window layer sees, including the query's own. The release's `window_size` of w
            means w // 2 keys before the query, and its own.
        pattern: the kinds of layers, separated by commas and repeated until `depth`: "conv" (`GatedConv`), "linear"
            (`TaylorAttention`, without positions), "window" (`SlidingWindow`, with rotary positions). The default has
            the release's mix: every fifth layer is linear, and the layer after it has a window.
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
                raise OptionError(f"pattern={shown(pattern)} must be a list of {', '.join(KINDS)}; got {kind!r}")
        makers = {
            "conv": lambda: GatedConv(dim),
            "linear": lambda: linear_layer(dim, heads, feature_dim, symmetric=symmetric),
            "window": lambda: CausalWindowAttention(dim, heads, window),
        }
        super().__init__(vocabulary, [makers[kinds[i % len(kinds)]]() for i in range(depth)], tied=tied)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of all layers' states after a text of `length` tokens."""
        return sum(layer_state_bytes(block.mixer, length, dtype) for block in stacked(self.blocks))

    @classmethod
    def example(cls) -> Self:
        return cls(11, 8, 3, heads=2, feature_dim=3, window=3)


def linear_layer(dim: int, heads: int, feature_dim: int = 16, *, symmetric: bool = False) -> MultiHeadAttention:
    """Make a layer of Taylor linear attention, with projections without biases and without positions."""
    if dim % heads:
        raise OptionError(f"heads={heads} must divide dim={dim}")
    op = TaylorAttention(symmetric=symmetric)
    return MultiHeadAttention(dim, heads, head_dim=feature_dim, value_dim=dim // heads, op=op)


@final
class GatedConv(StreamingLayer):
    """`(silu(conv(x W_c)) * x W_u) W_o`, with a causal convolution of each channel by itself (BaseConv). O(N).

    A query sees the last `kernel` tokens only.

    Args:
        dim: C.
        kernel: number of tokens that a query sees, its own included.
        expand: inner channels, in multiples of C: 2 in the release's language models, 1 in its default.

    As in the release, the projections have biases and the convolution has none. SiLU comes from the release; the
    paper's formula has no activation.
    """

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset({"keys"}),
        streaming="exact",
        growth="N",
    )

    def __init__(self, dim: int, kernel: int = 3, *, expand: int = 2) -> None:
        super().__init__(dim)
        validate.count("expand", expand, 1)
        self.into, self.out = nn.Linear(dim, 2 * expand * dim), nn.Linear(expand * dim, dim)
        self.conv = ShortConv(expand * dim, kernel, bias=False)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        seen = None if mask is None else masks.keys_of(mask, x.shape[0], x.shape[1])[..., None]
        mixed, gate = self.into(x if seen is None else x.masked_fill(~seen, 0.0)).chunk(2, -1)
        return self._gated(self.conv(mixed if seen is None else mixed.masked_fill(~seen, 0.0)), gate)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.conv.init_state(batch, dtype, device)

    def _step(self, x: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        mixed, gate = self.into(x).chunk(2, -1)
        mixed, state = self.conv.step(mixed, state)
        return self._gated(mixed, gate), state

    def _gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        return self.out(F.silu(mixed) * gate)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim)


@final
class CausalWindowAttention(StreamingLayer):
    """Softmax attention to the last `window` tokens with rotary positions, in O(N window); its cache holds only these.

    Args:
        dim, heads: C and H.
        window: number of keys, the query's own included.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"causal self"}), streaming="exact", growth="N")

    def __init__(self, dim: int, heads: int, window: int = 64) -> None:
        super().__init__(dim, heads)
        self.window = window
        self.attention = MultiHeadAttention(dim, heads, op=SlidingWindow(window, sinks=0), position=Rotary())

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self.attention(x, mask=mask, causal=True)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> HeadState:
        return self.attention.init_state(batch, dtype=dtype, device=device)

    def _step(self, x: Tensor, state: HeadState, **inputs: Tensor) -> tuple[Tensor, HeadState]:
        out, state = self.attention.step(x, state)
        held: KVState = state.op
        return out, replace(state, op=KVState(held.k[:, :, -self.window :], held.v[:, :, -self.window :]))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, max(1, length // 3))


def layer_state_bytes(layer: Layer, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of the state of one of BASED's layers after `length` tokens of one text.

    A linear layer has the same state for every length, in float32 or wider. A window layer has `min(length, window)`
    keys and values. A convolution has its last few inputs.
    """
    validate.count("length", length, 0)
    if isinstance(layer, GatedConv):
        return (layer.conv.kernel - 1) * layer.out.in_features * dtype.itemsize
    if isinstance(layer, CausalWindowAttention):
        return 2 * layer.dim * min(length, layer.window) * dtype.itemsize
    if isinstance(layer, MultiHeadAttention) and isinstance(layer.op, TaylorAttention):
        state: Any = layer.init_state(1, dtype=dtype, device="meta").op
        return state.sums.numel() * state.sums.dtype.itemsize
    raise OptionError(f"layer={shown(layer)} must be one of BASED's: conv, linear or window")
