"""Multi-head attention around any operator: projections, positions, gates, and a state to stream with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.nn.parts.heads import HeadScheme, HeadState, QKNorm, activation, head_norm, merge, split
from foveate.nn.parts.linear_maps import Linear
from foveate.nn.parts.positions import Position, Rotary
from foveate.nn.parts.short_conv import ShortConv
from foveate.ops.operator import Operator


@dataclass(frozen=True)
class ConvState:
    """The state of a layer with a convolution: the convolution's last tokens, and the state of the heads."""

    past: Tensor
    heads: HeadState


@final
class MultiHeadAttention(HeadScheme):
    """`concat_h(op(x W_q, x W_k, x W_v)) W_o`: a transformer's attention layer around any operator.

    Cost: that of the operator, and four projections. Its capabilities (patterns, masks, streaming) are those of the
    operator without those that the options rule out. With the defaults it is `torch.nn.MultiheadAttention` without
    biases.

    Args:
        dim: C.
        heads: Hq.
        kv_heads: Hkv, a divisor of Hq; None for `heads`.
        head_dim: D of queries and keys; None for `dim / heads`.
        value_dim: Dv; None for `head_dim`.
        op: an operator, or a catalogue key, which builds it for these heads and widths with its own defaults.
        position: a position scheme: `Rotary()`, `Alibi(heads)`, `RelativeBias(heads)`, or None.
        conv: taps of a short causal convolution on queries, keys and values; 0 for none. Causal only.
        qk_norm: the norm of each head's queries and keys: True or "rms" (RMSNorm, learned gains), "layer" (LayerNorm,
            learned gains and shifts), or False for none.
        out_norm: True applies an RMSNorm to each head's output, which operators without a normalizer need.
        gate: the activation of a gate on the outputs, from the token: "sigmoid", "silu", or None.
        bias: True gives all projections biases, the gate's included.
        out_dim: width of the output; None for `dim`.
        out_bias: True or False overrides `bias` for the output projection.

    A linear map makes the operator's gates from each token (`Capabilities.gates`: rates of decay, of learning). The
    layer passes an operator's other inputs on: `layer(x, poses=...)`.

    Raises:
        OptionError: an option out of range, or options that exclude each other.
    """

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None,
        value_dim: int | None = None, op: str | Operator = "softmax", position: Position | None = None, conv: int = 0,
        qk_norm: QKNorm = False, out_norm: bool = False, gate: Literal["sigmoid", "silu"] | None = None,
        bias: bool = False, out_dim: int | None = None, out_bias: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, op=op, position=position,
            out_dim=out_dim, bias=bias if out_bias is None else out_bias,
        )  # fmt: skip
        validate.count("conv", conv, 0)
        validate.one_of("gate", gate, (None, "sigmoid", "silu"))
        widths = heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        self.q = Linear(dim, widths[0], bias=bias)
        self.k = Linear(dim, widths[1], bias=bias)
        self.v = Linear(dim, widths[2], bias=bias)
        self.k.requires_grad_(self.op.capabilities.reads_keys)
        self.conv = ShortConv(sum(widths), conv) if conv else None
        self.q_norm = head_norm("qk_norm", qk_norm, self.head_dim)
        self.k_norm = head_norm("qk_norm", qk_norm, self.head_dim)
        self.out_norm = nn.RMSNorm(self.value_dim) if out_norm else None
        self.gate, self.gating = gate, Linear(dim, heads * self.value_dim, bias=bias) if gate else None
        if conv:
            can = self.capabilities
            self._declare(patterns=can.patterns & {"causal self"}, masks=can.masks & {"keys"})

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.conv is None:
            return self._heads(self.q(x), self.k(source), self.v(source))
        if mask is not None:  # a hidden token must not enter its neighbours either
            x = x.masked_fill(~masks.keys_of(mask, x.shape[0], x.shape[1])[..., None], 0.0)
        return self._heads(*self._parts(self.conv(self._raw(x))))

    def _raw(self, x: Tensor) -> Tensor:
        """Return the channels that the convolution mixes."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    def _parts(self, mixed: Tensor) -> tuple[Tensor, ...]:
        return mixed.split([self.q.out_features, self.k.out_features, self.v.out_features], -1)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def weigh(self, out: Tensor, x: Tensor, q: Tensor | None = None) -> Tensor:
        if self.out_norm is not None:
            out = self.out_norm(out)
        return out if self.gating is None else out * split(activation(self.gating(x), self.gate), self.heads)

    # -- for callers with another attention
    # -----------------------------------------------------------------------------

    def projected(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values for the operator, of tokens at positions `at`, without a convolution."""
        q, k, v = self._heads(self.q(x), self.k(x), self.v(x))
        return (q, k, v) if self.position is None else (self.position.rotate(q, at), self.position.rotate(k, at), v)

    def merged(self, out: Tensor, x: Tensor) -> Tensor:
        """Merge heads' outputs `(B, H, N, Dv)` to tokens `(B, N, C)`; x is the layer's input."""
        return self.out(merge(self.weigh(out, x)))

    # -- a stream, through the convolution -----------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        heads = super()._init_state(batch, dtype, device)
        return heads if self.conv is None else ConvState(self.conv.init_state(batch, dtype, device), heads)

    def _step(self, x: Tensor, state: Any, **inputs: Tensor) -> tuple[Tensor, Any]:
        if self.conv is None:
            return super()._step(x, state, **inputs)
        mixed, past = self.conv.step(self._raw(x), state.past)
        out, heads = self.attend_next(*self._heads(*self._parts(mixed)), x, state.heads, **inputs)
        return out, ConvState(past, heads)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        out, heads = super()._prefill(x, **inputs)
        if self.conv is None:
            return out, heads
        past = F.pad(self._raw(x), (0, 0, self.conv.kernel - 1, 0))[:, x.shape[1] :]
        return out, ConvState(past, heads)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, kv_heads=1, position=Rotary(), qk_norm=True, out_norm=True, gate="sigmoid", bias=True)
