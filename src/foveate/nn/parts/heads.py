"""Heads: splitting and merging, and the base class of layers that make heads for an operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts import positions
from foveate.nn.parts.linear_maps import Linear
from foveate.nn.parts.positions import Position
from foveate.ops.base.streaming import Streaming
from foveate.ops.calls import sized
from foveate.ops.operator import Operator

#: The norm of each head's queries and keys; True is "rms".
QKNorm = bool | Literal["rms", "layer"]


def split(x: Float[Tensor, "b n hd"], heads: int) -> Float[Tensor, "b h n d"]:
    """Split tokens into heads of neighbouring channels."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n hd"]:
    """Merge heads to tokens."""
    return rearrange(x, "b h n d -> b n (h d)")


def activation(x: Tensor, how: str | None) -> Tensor:
    """Apply the function of this name to `x` (see `foveate.ops.operator.Gate`); None returns `x`."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid, "softplus": F.softplus, "exp": torch.exp, "logsigmoid": F.logsigmoid, "silu": F.silu,
    }  # fmt: skip
    return x if how is None else functions[how](x)


class Rates(nn.ModuleDict):
    """Linear maps from tokens to an operator's gates (rates of decay, of learning).

    Each gate reads the tokens x or the source tokens, as the operator declares.
    """

    def __init__(self, dim: int, heads: int, op: Operator) -> None:
        super().__init__(
            {name: Linear(dim, heads) for name in sorted(op.capabilities.inputs & set(op.capabilities.gates))}
        )
        self.gates = {name: op.capabilities.gates[name] for name in self}
        for name, rate in self.items():
            assert isinstance(rate, nn.Linear)
            nn.init.constant_(rate.bias, self.gates[name].bias)

    def forward(self, x: Float[Tensor, "b n c"], source: Tensor | None = None) -> dict[str, Float[Tensor, "b h n"]]:
        seen = {"query": x, "key": x if source is None else source}
        made = {name: rate(seen[self.gates[name].of]) for name, rate in self.items()}
        return {name: activation(rate, self.gates[name].activation).transpose(1, 2) for name, rate in made.items()}


@dataclass(frozen=True)
class HeadState:
    """The state of a scheme: that of the operator, and the number of tokens so far."""

    op: Any
    seen: int


class HeadScheme(StreamingLayer):
    """The base of `concat_h(op(q, k, v)_h) W_o`. Subclasses define `project` and, optionally, `weigh`.

    `project` makes q, k and v; `weigh` changes the heads' outputs. The base attends, applies positions, streams, and
    derives the layer's capabilities from those of the operator.

    Args:
        dim: C.
        heads: Hq.
        kv_heads: Hkv; None for `heads`.
        head_dim: D; None for `dim / heads`.
        value_dim: Dv; None for `head_dim`.
        op: an operator or its key.
        position: a position scheme, or None.
        out_dim: output width of W_o; None for `dim`.
        bias: True gives all projections biases: W_o, which the base makes, and those of the subclass.
    """

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None,
        value_dim: int | None = None, op: str | Operator = "softmax", position: Position | None = None,
        out_dim: int | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        self.head_dim = width(dim, heads, head_dim)
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        validate.count("value_dim", self.value_dim, 1)
        validate.count("kv_heads", self.kv_heads, 1)
        if heads % self.kv_heads:
            raise OptionError(f"kv_heads={kv_heads} must divide heads={heads}")
        positions.check(position, heads)
        self.op, self.position = sized(op, heads, self.head_dim, self.value_dim, self.kv_heads), position
        self.rates = Rates(dim, heads, self.op)
        self.out = Linear(heads * self.value_dim, dim if out_dim is None else out_dim, bias=bias)
        self._declare_operator()

    @property
    def name(self) -> str:
        return f"{super().name} of {self.op.name}"

    def _declare_operator(self) -> None:
        """Derive capabilities from those of the operator and the position scheme."""
        biased = self.position is not None and self.position.biased
        if biased and "bias" not in self.op.capabilities.masks:
            raise OptionError(f"position={type(self.position).__name__} adds a bias; {self.op.name} takes none")
        can = self.op.capabilities
        patterns = can.patterns & Layer.capabilities.patterns
        streams = can.streaming == "exact" and "causal self" in patterns and not biased
        self._declare(
            inputs=can.inputs - set(self.rates), growth=can.growth, patterns=patterns, masks=can.masks,
            streaming="exact" if streams else None,
        )  # fmt: skip

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `(B, Hq, N, D)` from x, and k, v `(B, Hkv, M, ·)` from the source, which may be x."""

    def weigh(self, out: Float[Tensor, "b h n dv"], x: Tensor, q: Tensor) -> Float[Tensor, "b h n dv"]:
        """Return heads' outputs for W_o; q are queries before positions are applied."""
        return out

    # -- a call --------------------------------------------------------------------------------------------------------

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        source = x if source is None else source
        q, k, v = self.project(x, source, mask)
        return self.attend(q, k, v, x, mask, causal, **self.rates(x, source), **inputs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, causal: bool, **inputs: Any
    ) -> Tensor:
        """Attend with projected heads; if `causal`, the last query is aligned with the last key."""
        start = k.shape[2] - q.shape[2] if causal else 0
        if self.position is not None:
            bias = self.position.bias(_places(start, q, x.device), _places(0, k, x.device))
            mask = masks.combine(mask, None if bias is None else bias.to(x.dtype))
        out = self.op(self._rotated(q, start), self._rotated(k, 0), v, mask=mask, causal=causal, **inputs)
        return self.out(merge(self.weigh(out, x, q)))

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """Apply positions to queries or keys, from position `start` on."""
        return x if self.position is None else self.position.rotate(x, _places(start, x, x.device))

    @property
    def _streaming_op(self) -> Streaming:
        assert isinstance(self.op, Streaming)  # implied by `capabilities.streaming`
        return self.op

    # -- a stream ------------------------------------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        sizes = batch, self.heads, self.kv_heads, self.head_dim, self.value_dim
        return HeadState(self._streaming_op.init_state(*sizes, dtype=dtype, device=device), 0)

    def _step(self, x: Tensor, state: Any, **inputs: Tensor) -> tuple[Tensor, Any]:
        return self.attend_next(*self.project(x, x, None), x, state, **inputs)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        return self.attend_first(*self.project(x, x, None), x, **inputs)

    def attend_next(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: HeadState, **inputs: Any
    ) -> tuple[Tensor, HeadState]:
        """Make a streaming step with projected heads."""
        at = state.seen
        out, op = self._streaming_op.step(
            self._rotated(q, at), self._rotated(k, at), v, state.op, **self.rates(x), **inputs
        )
        return self.out(merge(self.weigh(out, x, q))), HeadState(op, at + 1)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **inputs: Any) -> tuple[Tensor, HeadState]:
        """Prefill with projected heads."""
        out, op = self._streaming_op.prefill(self._rotated(q, 0), self._rotated(k, 0), v, **self.rates(x), **inputs)
        return self.out(merge(self.weigh(out, x, q))), HeadState(op, x.shape[1])


def head_norm(name: str, kind: object, head_dim: int) -> nn.RMSNorm | nn.LayerNorm | None:
    """Return the norm of a head's channels that `name` selects: one of `QKNorm`."""
    validate.one_of(name, kind, (False, True, "rms", "layer"))
    if kind == "layer":
        return nn.LayerNorm(head_dim)
    return nn.RMSNorm(head_dim) if kind else None


def _places(start: int, x: Float[Tensor, "b h n d"], device: torch.device) -> Tensor:
    return torch.arange(start, start + x.shape[2], device=device)


def width(dim: int, heads: int, head_dim: int | None) -> int:
    """Return a head's width: `dim / heads` unless given."""
    validate.count("heads", heads, 1)
    if head_dim is None:
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}, unless head_dim is given")
        return dim // heads
    validate.count("head_dim", head_dim, 1)
    return head_dim
