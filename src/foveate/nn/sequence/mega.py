"""Mega: single-head gated attention whose queries, keys and gates come from a moving average of the input.

Mega: Moving Average Equipped Gated Attention (2022), arXiv 2209.10655.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.core.scoring import safe_softmax
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts.ema import DampedEMA
from foveate.nn.parts.positions import Position, RelativeBias
from foveate.ops.functional import rotary
from foveate.ops.functional.causal import causal_product


@dataclass(frozen=True)
class MegaState:
    """The state of a stream: the averages, and keys and values of the current chunk (or of all tokens)."""

    ema: Tensor
    k: Tensor
    v: Tensor


@final
class Mega(StreamingLayer):
    """Gated attention with one head, whose queries and keys come from a damped moving average.

    With `x' = norm(x)` and `m = silu(ema(x') + omega x')`: queries and keys are two scalings of one projection
    `z = silu(m W_z)`; values `silu(x' W_v)` come from the tokens. `h = silu(m W_h + (r * A v) W_o)` with a
    reset gate `r = silu(m W_r)`, and the output is `x + u (h - x)` with an update gate `u = sigmoid(m W_u)`.

    Cost O(N²), and a stream keeps all keys and values. With `chunk=c` attention stays inside blocks of c tokens and
    only the average crosses them: O(N c + N log N), and a stream of constant size. Small chunks are the wrong choice if
    a far token must be recalled exactly: an average blurs it. Norm and residual are inside; use `MegaBlock`, which adds
    a feed-forward network, in place of `Block`.

    Args:
        dim: C.
        zdim: width of queries and keys; None for `dim / 4`.
        hdim: width of values; None for `2 dim`.
        ema_dim: averages per channel (16 in the paper, 2 in the release's class).
        chunk: tokens of a block; None attends to all tokens.
        attention: "softmax" of `q k / sqrt(zdim) + b`, or "laplace" or "relu2" of `q k / n + b`, where n counts the
            keys that the query sees; their rows do not sum to 1.
        bias: b: "simple" is a learned number per offset, "rotary" comes from two learned vectors, rotated by position.
        reach: the largest offset with its own number in "simple"; the release refuses longer inputs. `chunk - 1` with
            a chunk.
        bidirectional: True averages from both sides, only for the pattern "self"; False allows "self" too.
        prenorm: True puts the norm before, as described; False after the residual. norm: a function from a width to it.

    A masked token enters no average and no attention. n counts the keys that the query may see, without masked ones;
    the release includes them if a causal mask is given.

    Raises:
        OptionError: an option out of range.
    """

    capabilities = replace(Layer.capabilities, masks=frozenset({"keys"}))

    def __init__(
        self, dim: int, zdim: int | None = None, hdim: int | None = None, *, ema_dim: int = 16,
        chunk: int | None = None, attention: Literal["softmax", "laplace", "relu2"] = "softmax",
        bias: Literal["simple", "rotary"] = "simple", reach: int = 1023, bidirectional: bool = False,
        prenorm: bool = True, norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        self.zdim = max(1, dim // 4) if zdim is None else zdim
        self.hdim = 2 * dim if hdim is None else hdim
        for name, value in (("zdim", self.zdim), ("hdim", self.hdim), ("ema_dim", ema_dim), ("reach", reach)):
            validate.count(name, value, 1)
        if chunk is not None:
            validate.count("chunk", chunk, 1)
        validate.one_of("attention", attention, ("softmax", *ELEMENTWISE))
        validate.one_of("bias", bias, ("simple", "rotary"))
        self.chunk, self.attention, self.prenorm = chunk, attention, prenorm
        self.ema = DampedEMA(dim, ema_dim, bidirectional=bidirectional)
        self.norm = norm(dim)
        self.v = nn.Linear(dim, self.hdim)
        self.gates = nn.Linear(dim, 2 * dim + self.zdim + self.hdim)
        self.out = nn.Linear(self.hdim, dim)
        for linear in (self.v, self.gates, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.gain = nn.Parameter(torch.randn(2, self.zdim) * 0.02)
        self.shift = nn.Parameter(torch.zeros(2, self.zdim))
        self.bias: RotaryBias | RelativeBias = RotaryBias(self.zdim) if bias == "rotary" else _simple(reach, chunk)
        self._declare(
            patterns=frozenset({"self"} if bidirectional else {"self", "causal self"}),
            streaming=None if bidirectional else "exact", growth="N²" if chunk is None else "N log N",
        )  # fmt: skip

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        seen = None if mask is None else masks.keys_of(mask, x.shape[0], x.shape[1])
        q, k, v, gates = self._parts(x, lambda normed: self.ema(normed, seen))
        if seen is not None:
            k, v = (t.masked_fill(~seen[..., None], 0.0) for t in (k, v))
        return self._merged(x, self._attended(q, k, v, seen, causal), gates)

    def _parts(self, x: Tensor, average: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return queries, keys `(B, N, Z)`, values `(B, N, E)`, and the parts `[u, r, m W_h]` of the output."""
        normed = self.norm(x) if self.prenorm else x
        u, z, r, h = self.gates(F.silu(average(normed))).split([self.dim, self.zdim, self.hdim, self.dim], -1)
        q, k = (F.silu(z)[..., None, :] * self.gain + self.shift).unbind(-2)
        return q, k, F.silu(self.v(normed)), [torch.sigmoid(u), F.silu(r), h]

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
        """Return `A v (B, N, E)`, block by block. Hidden tokens fill up the last block."""
        n = q.shape[1]
        size = max(1, n if self.chunk is None else min(self.chunk, n))
        real = q.new_ones(1, n, dtype=torch.bool) if seen is None else seen
        q, k, v = (F.pad(t, (0, 0, 0, -n % size)).unflatten(1, (-1, size)) for t in (q, k, v))
        visible = F.pad(real, (0, -n % size)).unflatten(1, (-1, 1, size))
        if causal:
            visible = visible & masks.causal(size, size, device=q.device)
        at = torch.arange(size, device=q.device)
        weights = self._weights(q, k, visible, at, at)
        return (causal_product(weights, v) if causal else weights @ v).flatten(1, 2)[:, :n]

    def _weights(self, q: Tensor, k: Tensor, visible: Tensor, at: Tensor, place: Tensor) -> Tensor:
        """Return A of queries at positions `at` for keys at positions `place`, 0 for keys that are not `visible`."""
        bias = self.bias.bias(at, place).to(q.dtype)
        if self.attention == "softmax":
            logits = (q * self.zdim**-0.5) @ k.mT + bias
            return safe_softmax(logits.masked_fill(~visible, masks.NEG_INF))
        count = visible.sum(-1, keepdim=True).clamp_min(1)
        return ELEMENTWISE[self.attention](q @ k.mT / count + bias).masked_fill(~visible, 0.0)

    def _merged(self, x: Tensor, attended: Tensor, gates: list[Tensor]) -> Tensor:
        update, reset, own = gates
        h = F.silu(own + self.out(attended * reset))
        out = x + update * (h - x)
        return out if self.prenorm else self.norm(out)

    # -- a stream ------------------------------------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> MegaState:
        k, v = (torch.zeros(batch, 0, width, dtype=dtype, device=device) for width in (self.zdim, self.hdim))
        return MegaState(self.ema.init_state(batch, dtype, device), k, v)

    def _step(self, x: Tensor, state: MegaState, **inputs: Tensor) -> tuple[Tensor, MegaState]:
        after: list[Tensor] = []

        def average(normed: Tensor) -> Tensor:
            y, ema = self.ema.step(normed, state.ema)
            after.append(ema)
            return y

        q, k, v, gates = self._parts(x, average)
        fresh = state.k.shape[1] == self.chunk  # the block is full: another begins
        k, v = (new if fresh else torch.cat([old, new], 1) for old, new in ((state.k, k), (state.v, v)))
        place = torch.arange(k.shape[1], device=x.device)
        weights = self._weights(q, k, torch.ones_like(place, dtype=torch.bool), place[-1:], place)
        return self._merged(x, weights @ v, gates), MegaState(after[0], k, v)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, MegaState]:
        q, k, v, gates = self._parts(x, self.ema)
        out = self._merged(x, self._attended(q, k, v, None, True), gates)
        kept = x.shape[1] if self.chunk is None else x.shape[1] % self.chunk  # of an unfinished block
        ema = self.ema.state_after(self.norm(x) if self.prenorm else x)
        return out, MegaState(ema, k[:, x.shape[1] - kept :], v[:, x.shape[1] - kept :])

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        layer = cls(dim, ema_dim=3, chunk=max(2, length // 3), attention="laplace")
        with torch.no_grad():  # at the start of training, queries and keys are almost 0
            for linear in (layer.v, layer.gates, layer.out):
                linear.weight.mul_(10.0)
            layer.gain.mul_(50.0)
        return layer


@final
class RotaryBias(Position):
    """`(R_i a) (R_j b)` for positions i, j, learned vectors a, b and rotations R: it depends only on the offset.

    Args:
        width: width of the vectors; even.
    """

    biased = True

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise OptionError(f'zdim={width} must be even with bias="rotary", which rotates pairs of channels')
        self.vectors = nn.Parameter(torch.randn(2, 1, width) * 0.02)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        a, b = (
            rotary.rotate(vector.expand(len(at), -1), rotary.rotary_angles(at, vector.shape[-1]))
            for vector, at in zip(self.vectors, (queries, keys), strict=True)
        )
        return (a @ b.mT)[None]


@final
class MegaBlock(nn.Module):
    """`Mega` and a feed-forward network `x + silu(norm(x) W_1) W_2` after it.

    Args:
        mixer: the layer.
        hidden: hidden width; None for `2 dim`.
    """

    def __init__(self, mixer: Mega, hidden: int | None = None, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        hidden = 2 * mixer.dim if hidden is None else hidden
        validate.count("hidden", hidden, 1)
        self.mixer, self.norm = mixer, norm(mixer.dim)
        self.up, self.down = nn.Linear(mixer.dim, hidden), nn.Linear(hidden, mixer.dim)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """Apply the block; `call` holds the layer's further arguments."""
        x = self.mixer(x, **call)
        return x + self.down(F.silu(self.up(self.norm(x))))


def laplace(s: Tensor) -> Tensor:
    """Return the normal distribution function that fits `relu(s)²` near `sqrt(1/2)` and is bounded by 1."""
    return 0.5 * (1 + torch.erf((s - math.sqrt(0.5)) / math.sqrt(0.5 / math.pi)))


#: Elementwise functions of scores that replace the softmax.
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {"laplace": laplace, "relu2": lambda s: F.relu(s).square()}


def _simple(reach: int, chunk: int | None) -> RelativeBias:
    bias = RelativeBias(1, reach if chunk is None else max(1, chunk - 1))
    nn.init.normal_(bias.table, std=0.02)
    return bias
