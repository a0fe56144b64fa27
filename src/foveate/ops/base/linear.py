"""The family of linear operators: a product of features in place of a softmax, and so a state in place of a cache."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks as mask_algebra
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.errors import ShapeError
from foveate.ops.base import linear_spans as spans
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional import causal as past, linear_forms as forms
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.operator import Capabilities


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


class Linear(Streaming):
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

    capabilities = Capabilities(masks=frozenset({"keys"}), engines=("chunked", "recurrent", "reference"), growth="N")
    state_type: ClassVar[type] = LinearState
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

    def feature_macs(self, width: int) -> int:
        """Multiply-adds in the features of one query or key of `width` numbers: for plans."""
        return 0

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor | None:
        """Log of the factor on the state before a token is written, or None.

        Per head `(H,)`, per head and feature `(H, F)`, per token `(B, H, N)`, or per token and feature `(B, H, N, F)`.
        At most 0; `-inf` (forget all) is allowed. `k (B, H, N, D)` has one head to each query head.
        """
        return None

    def encode_queries(self, q: Tensor, scale: float, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of all queries of a call; a system in which they depend on the call's inputs overrides it."""
        return self.query_features(q, scale)

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: Mapping[str, Tensor]
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
    def _attend(self, call: AttentionCall) -> Tensor:
        engine = self._engine(call)
        if call.n_queries == 0:
            return call.no_output
        if engine == "chunked" and self.tokenwise:
            return spans.attend(self, call)[0]
        if engine == "chunked" and not call.causal and not call.inputs:
            fk, v, _ = self.encoded_keys(call)
            return spans.read(self, call.q, forms.absorb(fk, v), call.scale)
        fq, fk, v, decay = self.encoded(call)
        if engine == "reference":
            weights = forms.matrix(fq, fk, call.causal, decay)
            out = past.product(weights, v) if call.causal else weights @ v
        elif call.causal:
            out = self._causal(fq, fk, v, decay, engine)
        else:
            out = fq @ _written(fk, v, None, engine)
        return self.normalise(out).to(call.q.dtype)

    def _causal(
        self, fq: Tensor, fk: Tensor, v: Tensor, decay: Tensor | None, engine: str, state: Tensor | None = None
    ) -> Tensor:
        """The causal form of the last queries, from a state on."""
        earlier = fk.shape[2] - fq.shape[2]
        if not earlier:  # a cut would give back a gradient as large as the whole, filled up with zeros
            state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3]) if state is None else state
        else:
            (old_k, fk), (old_v, v) = (x.tensor_split([earlier], 2) for x in (fk, v))
            old, decay = (None, None) if decay is None else decay.tensor_split([earlier], 2)
            state = _written(old_k, old_v, old, engine, state)
        if not fq.shape[2]:
            return fq @ state
        run = self.scan if engine == "chunked" else forms.recurrent
        return run(fq, fk, v, decay, state)

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        fq, fk, _, decay = self.encoded(call)
        weights = forms.matrix(fq, fk, call.causal, decay)
        if self.normalised:
            weights = self.normalise(torch.cat([weights, weights.sum(-1, keepdim=True)], -1))
        return weights.to(call.q.dtype)

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        why = "asked for" if call.engine != "auto" else "a state of fixed size: linear in the length"
        engine, q = self._engine(call), call.q
        b, h, nq, _ = q.shape
        nk, width, out = call.n_keys, self._width(q, call.scale), call.v.shape[-1] + self.normalised
        inside = {"reference": nk, "chunked": self.block if call.causal else 0, "recurrent": 0}[engine]
        state = 0 if engine == "reference" else 2 * (nq + nk) * width * out
        maps = 2 * (nq + nk) * self.feature_macs(q.shape[3])
        flops = b * h * (2 * nq * inside * (width + out) + state + maps)
        return Plan(engine=engine, flops=flops, bytes=call.traffic, why=why)

    @final
    def _init_state(self, sizes: StateSizes) -> LinearState:
        key = torch.zeros(
            sizes.batch, sizes.heads, 1, sizes.key_dim, dtype=accumulating(sizes.dtype), device=sizes.device
        )
        memory = key.new_zeros(sizes.batch, sizes.heads, self._width(key, 1.0), sizes.value_dim + self.normalised)
        return LinearState(memory, self.normalised, self.carried(key[:, :, :0]))

    @final
    def _step(self, call: AttentionCall, state: LinearState) -> tuple[Tensor, LinearState]:
        carried, carry = self._after(call, state)
        fq, fk, v, decay = self.encoded(carried)
        decay = None if decay is None else decay[:, :, -1:].to(v.dtype)
        memory = forms.write(state.memory, fk[:, :, -1:].to(v.dtype), v[:, :, -1:], decay)
        return self.normalise(fq @ memory).to(call.q.dtype), LinearState(memory, self.normalised, carry)

    @final
    def _prefill(self, call: AttentionCall, state: LinearState | None) -> tuple[Tensor, LinearState]:
        before = None if state is None else state.memory
        if self.tokenwise:
            out, memory = spans.attend(self, call, before)
            return out, LinearState(memory, self.normalised)
        carried, carry = self._after(call, state)
        fq, fk, v, decay = self.encoded(carried)
        if carried.n_keys > call.n_keys:  # the key that stands for the past is in the state already
            fk, v, decay = fk[:, :, 1:], v[:, :, 1:], None if decay is None else decay[:, :, 1:]
        out = self.normalise(self._causal(fq, fk, v, decay, "chunked", before))
        memory = _written(fk, v, decay, "chunked", before)
        return out.to(call.q.dtype), LinearState(memory, self.normalised, carry)

    def _after(self, call: AttentionCall, state: LinearState | None) -> tuple[AttentionCall, Tensor | None]:
        """The call with the past before its tokens as one key, where features depend on it; and that key after it."""
        heads, past_key = call.q.shape[1], None if state is None else state.carry
        if past_key is None:
            wide = accumulating(call.k.dtype)
            return call, self.carried(per_query_head(call.k, heads).to(wide)) if state is None else None
        k = torch.cat([past_key, per_query_head(call.k, heads).to(past_key.dtype)], 2)
        v = F.pad(per_query_head(call.v, heads), (0, 0, 1, 0))
        return replace(call, k=k, v=v), self.carried(k)

    @final
    def encoded(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The summands of a call, clean of what is masked: features of queries and keys, values, and log decays.

        Values have a column of ones where `normalised`.
        """
        fq = self.encode_queries(call.q.to(accumulating(call.q.dtype)), call.scale, call.inputs)
        return fq, *self.encoded_keys(call)

    @final
    def encoded_keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """The part of `encoded` besides the queries' features."""
        heads, wide, mask = call.q.shape[1], accumulating(call.v.dtype), call.mask
        v = per_query_head(call.v, heads).to(wide)
        k = per_query_head(call.k, heads).to(torch.promote_types(call.k.dtype, wide))
        hidden = None if mask is None else ~mask_algebra.keys_of(mask, k.shape[0], k.shape[2])[:, None, :, None]
        if hidden is not None:
            # before the features and after them: neither a value nor a gradient of what stands there may get out
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        fk, decay = self.encode_keys(k, call.scale, call.causal, hidden, call.inputs)
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


def _written(fk: Tensor, v: Tensor, decay: Tensor | None, engine: str, state: Tensor | None = None) -> Tensor:
    """The state after some keys, as the engine goes about it; it goes on from `state`."""
    if engine == "chunked":
        return forms.absorb(fk, v, decay, state)
    state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3]) if state is None else state
    for index in range(fk.shape[2]):
        at = slice(index, index + 1)
        state = forms.write(state, fk[:, :, at], v[:, :, at], None if decay is None else decay[:, :, at])
    return state
