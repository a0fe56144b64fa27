"""Heads: cutting tokens into them, and the layer whose middle is an operator and whose heads a scheme makes."""

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
    """Tokens cut into heads, which take neighbouring channels."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n hd"]:
    """Heads put together again."""
    return rearrange(x, "b h n d -> b n (h d)")


def activation(x: Tensor, how: str | None) -> Tensor:
    """`x` through the function of this name (see `foveate.ops.operator.Gate`), or as it is."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid, "softplus": F.softplus, "exp": torch.exp, "logsigmoid": F.logsigmoid, "silu": F.silu,
    }  # fmt: skip
    return x if how is None else functions[how](x)


class Rates(nn.ModuleDict):
    """The inputs that an operator takes from each token (rates of decay, of learning), by a linear map for each.

    From the tokens x, or from the source tokens, as the operator's gates say.
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
    """A scheme in the middle of a stream: the operator's state, and how many tokens went by."""

    op: Any
    seen: int


class HeadScheme(StreamingLayer):
    """`concat_h(op(q, k, v)_h) W_o`: what q, k and v are, and what is done to a head's output, a system says.

    It writes `project`, and `weigh` where it changes what heads give. The base attends, turns queries and keys by their
    positions, streams, and declares what the operator can do as what the layer can.

    Args:
        dim: C.
        heads: Hq.
        kv_heads: Hkv; `heads` where None.
        head_dim: D; `dim / heads` where None.
        value_dim: Dv; `head_dim` where None.
        op: an operator or its key.
        position: how positions enter, or None.
        out_dim: width that W_o gives; `dim` where None.
        bias: whether all projections have biases: W_o, which the base makes, and those that a system makes.
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
        self.op, self.position = sized(op, heads, self.head_dim, self.value_dim), position
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

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, Hq, N, D)` from x, and k, v `(B, Hkv, M, ·)` from the source, which may be x."""

    def weigh(self, out: Float[Tensor, "b h n dv"], x: Tensor, q: Tensor) -> Float[Tensor, "b h n dv"]:
        """Heads' outputs as they enter W_o; q are queries that positions have not turned."""
        return out

    # -- a call --------------------------------------------------------------------------------------------------------

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        source = x if source is None else source
        q, k, v = self.project(x, source, mask)
        return self.attend(q, k, v, x, mask, causal, **self.rates(x, source), **inputs)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, causal: bool, **inputs: Any
    ) -> Tensor:
        """The call from projected heads on; the last query is as far as the last key where `causal`."""
        start = k.shape[2] - q.shape[2] if causal else 0
        if self.position is not None:
            bias = self.position.bias(_places(start, q, x.device), _places(0, k, x.device))
            mask = masks.combine(mask, None if bias is None else bias.to(x.dtype))
        out = self.op(self._turned(q, start), self._turned(k, 0), v, mask=mask, causal=causal, **inputs)
        return self.out(merge(self.weigh(out, x, q)))

    def _turned(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys as the positions turn them, the first of which is at place `start`."""
        return x if self.position is None else self.position.turn(x, _places(start, x, x.device))

    @property
    def _streaming_op(self) -> Streaming:
        assert isinstance(self.op, Streaming)  # `capabilities.streaming` says so
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
        """`_step` from projected heads on."""
        at = state.seen
        out, op = self._streaming_op.step(
            self._turned(q, at), self._turned(k, at), v, state.op, **self.rates(x), **inputs
        )
        return self.out(merge(self.weigh(out, x, q))), HeadState(op, at + 1)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **inputs: Any) -> tuple[Tensor, HeadState]:
        """`_prefill` from projected heads on."""
        out, op = self._streaming_op.prefill(self._turned(q, 0), self._turned(k, 0), v, **self.rates(x), **inputs)
        return self.out(merge(self.weigh(out, x, q))), HeadState(op, x.shape[1])


def head_norm(name: str, kind: object, head_dim: int) -> nn.RMSNorm | nn.LayerNorm | None:
    """Return the norm of a head's channels that the option `name` asks for: one of `QKNorm`."""
    validate.one_of(name, kind, (False, True, "rms", "layer"))
    if kind == "layer":
        return nn.LayerNorm(head_dim)
    return nn.RMSNorm(head_dim) if kind else None


def _places(start: int, x: Float[Tensor, "b h n d"], device: torch.device) -> Tensor:
    return torch.arange(start, start + x.shape[2], device=device)


def width(dim: int, heads: int, head_dim: int | None) -> int:
    """A head's width: `dim / heads` unless given."""
    validate.count("heads", heads, 1)
    if head_dim is None:
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}, or head_dim be given")
        return dim // heads
    validate.count("head_dim", head_dim, 1)
    return head_dim
