"""The family of linear operators: a product of features in place of a softmax, and so a state in place of a cache."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks as mask_algebra
from foveate.core.call import Plan
from foveate.core.errors import ShapeError
from foveate.ops.base import linear_spans as spans
from foveate.ops.functional import causal as past, linear_forms as forms
from foveate.ops.functional.heads import accumulating, engine_of, per_query_head
from foveate.ops.operator import Growth, MaskKind, Operator


@dataclass(frozen=True)
class LinearState:
    """The memory of a linear operator, of one size whatever the length of the past.

    Args:
        memory: `(B, H, F, Dv)` sum of `features(k) vᵀ`; where `normalised`, one more column sums `features(k)`.
        normalised: whether that column is there.
        carry: `(B, H, 1, D)` one key that stands for all of the past, where features depend on each other. It may be
            kept in a wider dtype than the rest.
    """

    memory: Float[Tensor, "b h f e"]
    normalised: bool
    carry: Float[Tensor, "b h 1 d"] | None = None

    @property
    def S(self) -> Float[Tensor, "b h f dv"]:  # noqa: N802
        return self.memory[..., :-1] if self.normalised else self.memory

    @property
    def z(self) -> Float[Tensor, "b h f"] | None:
        return self.memory[..., -1] if self.normalised else None


class Linear(Operator):
    """Kernelised attention: weights `fq_i . fk_j`, faded by a decay, over their sum where the mechanism normalises.

    A system writes `query_features` and `key_features`, and `log_decay` where the past fades (then only the causal
    patterns are defined, and the system declares that). A few say more: `encode_queries` and `encode_keys` where the
    features of a token do not depend on it alone, `normalise`, `scan`. A masked key writes nothing; its place still
    counts where the decay is per head, and not where it is per token.

    Engines: "chunked" (the default; O(N) time and memory), "recurrent" (a token loop), "reference" (the whole matrix).
    The three agree up to rounding. Sums are kept in float32 for half-precision inputs.

    Declared facts:
        normalised: whether the output is divided by the sum of the weights.
        eps: added to that sum. A row whose weights sum to exactly 0 gives zeros.
        block: tokens in a chunk.
        tokenwise: whether features and decay of a token hang on it alone, and no `inputs` are taken. The chunked engine
            then makes the features of a span of tokens at a time, so that those of all tokens never exist at once;
            training keeps them for the backward pass. `scan` is not asked.
    """

    masks: ClassVar[frozenset[MaskKind]] = frozenset({"keys"})
    engines: ClassVar[tuple[str, ...]] = ("chunked", "recurrent", "reference")
    state_type: ClassVar[type] = LinearState
    growth: ClassVar[Growth] = "N"
    normalised: ClassVar[bool] = True
    eps: ClassVar[float] = 0.0
    block: int = 64
    tokenwise: ClassVar[bool] = False

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def query_features(self, q: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        """Features of `q (B, H, N, D)`, token by token. `scale` multiplies the products, here or partly on the keys."""

    @abstractmethod
    def key_features(self, k: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        """Features of `k (B, H, N, D)`, one head to each query head; token by token."""

    def map_products(self, width: int) -> int:
        """Multiply-adds in the features of one query or key of `width` numbers: for plans."""
        return 0

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor | None:
        """Log of the factor on the state before a token is written, or None.

        Per head `(H,)`, per head and feature `(H, F)`, per token `(B, H, N)`, or per token and feature `(B, H, N, F)`.
        At most 0; `-inf` (forget all) is allowed. `k (B, H, N, D)` has one head to each query head.
        """
        return None

    def encode_queries(self, q: Tensor, scale: float, inputs: dict[str, Tensor]) -> Tensor:
        """Features of all queries of a call; a system in which they depend on the call's inputs overrides it."""
        return self.query_features(q, scale)

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Features and log decays of all keys of a call; a system in which they depend on each other overrides it.

        `hidden (B, 1, N, 1)` marks keys that are masked: they are zeros here, and must not matter to the others.
        """
        return self.key_features(k, scale), self.log_decay(k, **inputs) if causal else None

    def carried(self, k: Tensor) -> Tensor | None:
        """One key `(B, H, 1, D)` that does to the encoding of later ones what all of `k` would do, if anything does."""
        return None

    def normalise(self, out: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n dv"]:
        """Outputs from what was summed up, whose last column holds the sums of the weights where `normalised`."""
        if not self.normalised:
            return out
        total = out[..., -1:]
        return torch.where(total == 0, 0.0, out[..., :-1] / torch.where(total == 0, 1.0, total + self.eps))

    def scan(self, fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
        """The causal chunked form from `state` on; a system with a backward pass of its own overrides it.

        `fq, fk (B, H, N, F)`, `v (B, H, N, E)`, `log_decay (B or 1, H, N)` or `(..., N, F)`, `state (B, H, F, E)`;
        gives `(B, H, N, E)`.
        """
        return forms.chunked(fq, fk, v, log_decay, state, self.block)

    # -- what the base makes of it -------------------------------------------------------------------------------------

    @final
    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        engine: str,
        **inputs: Tensor,
    ) -> Tensor:
        engine = engine_of(self, engine)
        if q.shape[2] == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        if engine == "chunked" and self.tokenwise:
            return spans.attend(self, q, k, v, mask, causal, scale)[0]
        if engine == "chunked" and not causal and not inputs:
            fk, v, _ = self.encoded_keys(k, v, q.shape[1], mask, causal, scale, inputs)
            return spans.read(self, q, forms.absorb(fk, v), scale)
        fq, fk, v, decay = self.encoded(q, k, v, mask, causal, scale, inputs)
        if engine == "reference":
            weights = forms.matrix(fq, fk, causal, decay)
            out = past.product(weights, v) if causal else weights @ v
        elif causal:
            out = self._causal(fq, fk, v, decay, engine)
        else:
            out = fq @ _written(fk, v, None, engine)
        return self.normalise(out).to(q.dtype)

    def _causal(self, fq: Tensor, fk: Tensor, v: Tensor, decay: Tensor | None, engine: str) -> Tensor:
        earlier = fk.shape[2] - fq.shape[2]
        if not earlier:  # a cut would give back a gradient as large as the whole, filled up with zeros
            state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3])
        else:
            (old_k, fk), (old_v, v) = (x.tensor_split([earlier], 2) for x in (fk, v))
            old, decay = (None, None) if decay is None else decay.tensor_split([earlier], 2)
            state = _written(old_k, old_v, old, engine)
        if not fq.shape[2]:
            return fq @ state
        run = self.scan if engine == "chunked" else forms.recurrent
        return run(fq, fk, v, decay, state)

    @final
    def _weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> Tensor:
        fq, fk, _, decay = self.encoded(q, k, k, mask, causal, scale, inputs)
        weights = forms.matrix(fq, fk, causal, decay)
        if self.normalised:
            weights = self.normalise(torch.cat([weights, weights.sum(-1, keepdim=True)], -1))
        return weights.to(q.dtype)

    @final
    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, engine: str
    ) -> Plan:
        why = "asked for" if engine != "auto" else "a state of fixed size: linear in the length"
        engine = engine_of(self, engine)
        b, h, nq, _ = q.shape
        nk, width, out = k.shape[2], self._width(q, scale), v.shape[-1] + self.normalised
        inside = {"reference": nk, "chunked": self.block if causal else 0, "recurrent": 0}[engine]
        state = 0 if engine == "reference" else 2 * (nq + nk) * width * out
        traffic = q.numel() + k.numel() + v.numel() + b * h * nq * v.shape[-1]
        maps = 2 * (nq + nk) * self.map_products(q.shape[3])
        flops = b * h * (2 * nq * inside * (width + out) + state + maps)
        return Plan(engine=engine, flops=flops, bytes=traffic * q.element_size(), why=why)

    @final
    def _init_state(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LinearState:
        key = torch.zeros(batch, heads, 1, key_dim, dtype=accumulating(dtype), device=device)
        memory = key.new_zeros(batch, heads, self._width(key, 1.0), value_dim + self.normalised)
        return LinearState(memory, self.normalised, self.carried(key[:, :, :0]))

    @final
    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, scale: float, **inputs: Tensor
    ) -> tuple[Tensor, LinearState]:
        carry = state.carry
        if carry is not None:  # the past stands before the token as one key, which is not written again
            k = torch.cat([carry, per_query_head(k, q.shape[1]).to(carry.dtype)], 2)
            v = F.pad(per_query_head(v, q.shape[1]), (0, 0, 1, 0))
            carry = self.carried(k)
        fq, fk, v, decay = self.encoded(q, k, v, None, True, scale, inputs)
        decay = None if decay is None else decay[:, :, -1:].to(v.dtype)
        memory = forms.write(state.memory, fk[:, :, -1:].to(v.dtype), v[:, :, -1:], decay)
        return self.normalise(fq @ memory).to(q.dtype), LinearState(memory, self.normalised, carry)

    @final
    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **inputs: Tensor) -> tuple[Tensor, LinearState]:
        if self.tokenwise:
            out, memory = spans.attend(self, q, k, v, None, True, scale)
            return out, LinearState(memory, self.normalised)
        carry = self.carried(per_query_head(k, q.shape[1]).to(accumulating(k.dtype)))
        fq, fk, v, decay = self.encoded(q, k, v, None, True, scale, inputs)
        out = self.normalise(self._causal(fq, fk, v, decay, "chunked"))
        return out.to(q.dtype), LinearState(_written(fk, v, decay, "chunked"), self.normalised, carry)

    @final
    def encoded(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
        inputs: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The summands of a checked call: features of queries and keys, values (with a column of ones where
        `normalised`) and log decays, clean of what is masked."""
        fq = self.encode_queries(q.to(accumulating(q.dtype)), scale, inputs)
        return fq, *self.encoded_keys(k, v, q.shape[1], mask, causal, scale, inputs)

    @final
    def encoded_keys(
        self, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool, scale: float,
        inputs: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The part of `encoded` besides the queries' features; `heads` is Hq."""
        wide = accumulating(v.dtype)
        v = per_query_head(v, heads).to(wide)
        k = per_query_head(k, heads).to(torch.promote_types(k.dtype, wide))
        hidden = None if mask is None else ~mask_algebra.keys_of(mask, k.shape[0], k.shape[2])[:, None, :, None]
        if hidden is not None:
            # before the features and after them: neither a value nor a gradient of what stands there may get out
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        fk, decay = self.encode_keys(k, scale, causal, hidden, inputs)
        decay = self._decay(decay, fk, hidden)
        if self.normalised:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        return fk if hidden is None else fk.masked_fill(hidden, 0.0), v, decay

    def _decay(self, decay: Tensor | None, fk: Tensor, hidden: Tensor | None) -> Tensor | None:
        """The log decays as `(B or 1, H, N)` or `(B or 1, H, N, F)`."""
        if decay is None:
            return None
        b, h, n, f = fk.shape
        # below this an exponential is 0 in any case, and sums of such numbers keep their precision
        decay = decay.to(fk.dtype).clamp_min(1.2 * math.log(torch.finfo(fk.dtype).tiny))
        if decay.shape in ((h,), (h, f)):
            return decay[None, :, None].expand(1, h, n, *decay.shape[1:])
        if decay.shape not in ((b, h, n), (b, h, n, f)):
            expected = f"(H,)=({h},), (B, H, N)={(b, h, n)}, or these with F={f}"
            raise ShapeError(f"log decays of {self.name} must be {expected}; got {tuple(decay.shape)}")
        return decay if hidden is None else decay.masked_fill(hidden[..., 0] if decay.dim() == 3 else hidden, 0.0)

    def _width(self, q: Tensor, scale: float) -> int:
        """The number of features of a token."""
        with torch.no_grad():
            return self.key_features(torch.zeros_like(q[:1, :, :1], dtype=accumulating(q.dtype)), scale).shape[-1]


def _written(fk: Tensor, v: Tensor, decay: Tensor | None, engine: str) -> Tensor:
    """The state after some keys, as the engine goes about it."""
    if engine == "chunked":
        return forms.absorb(fk, v, decay)
    state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3])
    for index in range(fk.shape[2]):
        at = slice(index, index + 1)
        state = forms.write(state, fk[:, :, at], v[:, :, at], None if decay is None else decay[:, :, at])
    return state
