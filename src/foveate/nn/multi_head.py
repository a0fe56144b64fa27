"""Multi-head attention around any operator: projections, positions, gates, and a state to stream with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn import positions
from foveate.nn.heads import Rates, merge, split, squash
from foveate.nn.layer import Layer
from foveate.nn.positions import Position, Rotary
from foveate.nn.short_conv import ShortConv
from foveate.ops import sized
from foveate.ops.operator import Operator


@dataclass(frozen=True)
class LayerState:
    """A layer in the middle of a stream: the operator's state, the convolution's, and how many tokens went by."""

    op: Any
    conv: Tensor | None
    seen: int


@final
class MultiHeadAttention(Layer):
    """`concat_h(op(x W_q, x W_k, x W_v)) W_o`: the layer that a transformer has, with any operator in its middle.

    Cost: the operator's, and four projections. What the layer can do (patterns, masks, streaming) is what the operator
    can, less what the options rule out. With the defaults it is `torch.nn.MultiheadAttention` without biases.

    Args:
        dim: C.
        heads: Hq.
        kv_heads: Hkv, a divisor of Hq; `heads` where None.
        head_dim: D of queries and keys; `dim / heads` where None.
        value_dim: Dv; `head_dim` where None.
        op: an operator, or its catalogue key: it is then built for these heads and widths with its own defaults.
        position: how positions enter: `Rotary()`, `Alibi(heads)`, `RelativeBias(heads)`, or None.
        conv: tokens that a short causal convolution on queries, keys and values sees; 0 for none. Causal only.
        qk_norm: whether queries and keys are normalised per head (RMSNorm, learned gains).
        out_norm: whether each head's output is (RMSNorm): what operators without a normaliser need.
        gate: a gate on the outputs, from the token: "sigmoid", "silu", or None.
        bias: whether the projections have biases.

    What the operator takes from each token (`op.gates`: rates of decay, of learning) the layer makes by a linear map.
    An operator's other inputs are passed on: `layer(x, poses=...)`.

    Raises:
        OptionError: an option out of range, or options that exclude each other.
    """

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None,
        value_dim: int | None = None, op: str | Operator = "softmax", position: Position | None = None, conv: int = 0,
        qk_norm: bool = False, out_norm: bool = False, gate: Literal["sigmoid", "silu"] | None = None,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        validate.count("kv_heads", self.kv_heads, 1)
        if heads % self.kv_heads:
            raise OptionError(f"kv_heads={kv_heads} must divide heads={heads}")
        if head_dim is None and dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}, or head_dim be given")
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        validate.count("head_dim", self.head_dim, 1)
        validate.count("value_dim", self.value_dim, 1)
        validate.count("conv", conv, 0)
        validate.one_of("gate", gate, (None, "sigmoid", "silu"))
        positions.check(position, heads)

        self.op = sized(op, heads, self.head_dim, self.value_dim)
        self.position = position
        widths = heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=bias) for width in widths)
        self.out = nn.Linear(heads * self.value_dim, dim, bias=bias)
        self.conv = ShortConv(sum(widths), conv) if conv else None
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim) if qk_norm else None for _ in range(2))
        self.out_norm = nn.RMSNorm(self.value_dim) if out_norm else None
        self.gate, self.gating = gate, nn.Linear(dim, heads * self.value_dim, bias=bias) if gate else None
        self.rates = Rates(dim, heads, self.op)
        self._declare()

    def _declare(self) -> None:
        """What the operator can do and the options leave."""
        self.inputs = self.op.inputs - set(self.rates)  # type: ignore[misc]
        self.growth = self.op.growth  # type: ignore[misc]
        if self.conv is not None:
            self.patterns, self.masks = self.op.patterns & {"causal self"}, self.op.masks & {"keys"}  # type: ignore[misc]
        else:
            self.patterns = self.op.patterns & Layer.patterns  # type: ignore[misc]
            self.masks = self.op.masks  # type: ignore[misc]
        if self.position is not None and self.position.biased and "bias" not in self.op.masks:
            raise OptionError(f"position={type(self.position).__name__} adds a bias; {self.op.name} takes none")
        streams = self.op.steps == "exact" and not (self.position is not None and self.position.biased)
        self.steps = "exact" if streams and "causal self" in self.patterns else None  # type: ignore[misc]

    # -- a call --------------------------------------------------------------------------------------------------------

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        q, k, v = self._projected(x, x if memory is None else memory, mask)
        if self.position is not None:
            at, place = (torch.arange(t.shape[2], device=x.device) for t in (q, k))
            q, k = self.position.turn(q, at), self.position.turn(k, place)
            bias = self.position.bias(at, place)
            mask = masks.combine(mask, None if bias is None else bias.to(x.dtype))
        rates = self.rates(x if memory is None else memory)
        return self.merged(self.op(q, k, v, mask=mask, causal=causal, **rates, **inputs), x)

    def _projected(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, H, N, ·)`, convolved over time where the layer does that."""
        if self.conv is None:
            return self._heads(self.q(x), self.k(memory), self.v(memory))
        if mask is not None:  # a token that nobody may see must not enter its neighbours either
            seen = masks.keys_of(mask, x.shape[0], x.shape[1])
            x = x.masked_fill(~seen[..., None], 0.0)
        mixed = self.conv(torch.cat([self.q(x), self.k(x), self.v(x)], -1))
        return self._heads(*self._parts(mixed))

    def _parts(self, mixed: Tensor) -> tuple[Tensor, ...]:
        return mixed.split([self.q.out_features, self.k.out_features, self.v.out_features], -1)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def merged(self, out: Tensor, x: Tensor) -> Tensor:
        """Heads' outputs `(B, H, N, Dv)` as tokens `(B, N, C)`; x is what the layer was given."""
        if self.out_norm is not None:
            out = self.out_norm(out)
        out = merge(out)
        if self.gating is not None:
            out = out * squash(self.gating(x), self.gate)
        return self.out(out)

    def projected(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the operator takes them, of tokens at places `at`, without a convolution."""
        q, k, v = self._heads(self.q(x), self.k(x), self.v(x))
        return (q, k, v) if self.position is None else (self.position.turn(q, at), self.position.turn(k, at), v)

    # -- a stream ------------------------------------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        sizes = batch, self.heads, self.kv_heads, self.head_dim, self.value_dim
        conv = None if self.conv is None else self.conv.init_state(batch, dtype, device)
        return LayerState(self.op.init_state(*sizes, dtype=dtype, device=device), conv, 0)

    def _step(self, x: Tensor, state: LayerState, **inputs: Tensor) -> tuple[Tensor, LayerState]:
        conv = state.conv
        if self.conv is None:
            q, k, v = self._projected(x, x, None)
        else:
            mixed, conv = self.conv.step(torch.cat([self.q(x), self.k(x), self.v(x)], -1), conv)
            q, k, v = self._heads(*self._parts(mixed))
        if self.position is not None:
            at = torch.tensor([state.seen], device=x.device)
            q, k = self.position.turn(q, at), self.position.turn(k, at)
        out, op = self.op.step(q, k, v, state.op, **self.rates(x), **inputs)
        return self.merged(out, x), LayerState(op, conv, state.seen + 1)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, LayerState]:
        conv, n = None, x.shape[1]
        if self.conv is not None:
            raw = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
            conv = F.pad(raw, (0, 0, self.conv.kernel - 1, 0))[:, n:]
        q, k, v = self._projected(x, x, None)
        if self.position is not None:
            at = torch.arange(n, device=x.device)
            q, k = self.position.turn(q, at), self.position.turn(k, at)
        out, op = self.op.prefill(q, k, v, **self.rates(x), **inputs)
        return self.merged(out, x), LayerState(op, conv, n)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, kv_heads=1, position=Rotary(), qk_norm=True, out_norm=True, gate="sigmoid", bias=True)
