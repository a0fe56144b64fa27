"""The family of linear operators: they replace the softmax by a product of features, and the cache by a state."""

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

from foveate.core import masks
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.errors import ShapeError
from foveate.ops.base import linear_spans
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional import linear_forms
from foveate.ops.functional.causal import causal_product
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.operator import Capabilities


@dataclass(frozen=True)
class LinearState:
    """The state of a linear operator, whose size does not depend on the length of the past.

    Args:
        sums: `(B, H, F, Dv)`, the sum of `features(k) vᵀ`. If `normalized`, one more column sums `features(k)`.
        normalized: True if that column exists.
        carry: `(B, H, 1, D)`, one key that represents the past, for features that depend on each other. It may have a
            wider dtype than the rest.
    """

    sums: Float[Tensor, "b h f e"]
    normalized: bool
    carry: Float[Tensor, "b h 1 d"] | None = None

    @property
    def S(self) -> Float[Tensor, "b h f dv"]:  # noqa: N802
        return self.sums[..., :-1] if self.normalized else self.sums

    @property
    def z(self) -> Float[Tensor, "b h f"] | None:
        return self.sums[..., -1] if self.normalized else None


class Linear(Streaming):
    """Kernelised attention: weights `fq_i . fk_j`, times a decay, divided by their sum if the mechanism normalizes.

    Subclasses define `query_features` and `key_features`, and `log_decay` if the past fades (then only the causal
    patterns are defined, and the subclass declares them). A few override more: `encode_queries` and `encode_keys` if
    the features of a token do not depend on it alone, `normalize`, `scan`. A masked key writes nothing. Its step of
    decay still counts if the decay is per head, and does not if it is per token.

    Engines: "chunked" (the default; O(N) time and memory), "recurrent" (a token loop), "reference" (the whole matrix).
    The three agree up to rounding. Sums are kept in float32 for half-precision inputs.

    Declared facts:
        normalized: True divides the output by the sum of the weights.
        eps: added to that sum. A row whose weights sum to exactly 0 gives zeros.
        block: tokens in a chunk.
        tokenwise: True if features and decay of a token depend on it alone and the operator takes no `inputs`. The
            chunked engine then makes the features of one span of tokens at a time, so that those of all tokens never
            exist at once; training keeps them for the backward pass. `scan` is not called.
    """

    capabilities = Capabilities(masks=frozenset({"keys"}), engines=("chunked", "recurrent", "reference"), growth="N")
    state_type: ClassVar[type] = LinearState
    normalized: ClassVar[bool] = True
    eps: ClassVar[float] = 0.0
    block: int = 64
    tokenwise: ClassVar[bool] = False

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def query_features(self, q: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        """Return features of `q (B, H, N, D)`, token by token; `scale` multiplies the products, here or on the keys."""

    @abstractmethod
    def key_features(self, k: Tensor, scale: float) -> Float[Tensor, "b h n f"]:
        """Return features of `k (B, H, N, D)`, token by token, with one head for each query head."""

    def feature_macs(self, width: int) -> int:
        """Return the multiply-adds in the features of one query or key of `width` numbers; plans use it."""
        return 0

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor | None:
        """Return the log of the factor on the state before a token is written, or None.

        Per head `(H,)`, per head and feature `(H, F)`, per token `(B, H, N)`, or per token and feature `(B, H, N, F)`.
        It is at most 0; `-inf` (forget all) is allowed. `k (B, H, N, D)` has one head for each query head.
        """
        return None

    def encode_queries(self, q: Tensor, scale: float, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return features of all queries of a call; override it if they depend on the call's inputs."""
        return self.query_features(q, scale)

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return features and log decays of all keys of a call; override it if they depend on each other.

        `hidden (B, 1, N, 1)` marks keys that are masked: they are zeros here and must not influence the others.
        """
        return self.key_features(k, scale), self.log_decay(k, **inputs) if causal else None

    def carried(self, k: Tensor) -> Tensor | None:
        """Return one key `(B, H, 1, D)` that affects the encoding of later keys as all of `k` would, or None."""
        return None

    def normalize(self, out: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n dv"]:
        """Return outputs from the sums, whose last column holds the sums of the weights if `normalized`."""
        if not self.normalized:
            return out
        total = out[..., -1:]
        return torch.where(total == 0, 0.0, out[..., :-1] / torch.where(total == 0, 1.0, total + self.eps))

    def scan(self, fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
        """Return the causal output from `state` on in the chunked form; override it for a custom backward pass.

        `fq, fk (B, H, N, F)`, `v (B, H, N, E)`, `log_decay (B or 1, H, N)` or `(..., N, F)`, `state (B, H, F, E)`;
        the output is `(B, H, N, E)`.
        """
        return linear_forms.chunked(fq, fk, v, log_decay, state, self.block)

    # -- the base --------------------------------------------------------------------------------------------------

    @final
    def _attend(self, call: AttentionCall) -> Tensor:
        engine = self._engine(call)
        if call.n_queries == 0:
            return call.no_output
        if engine == "chunked" and self.tokenwise:
            return linear_spans.attend(self, call)[0]
        if engine == "chunked" and not call.causal and not call.inputs:
            fk, v, _ = self.encoded_keys(call)
            return linear_spans.read(self, call.q, linear_forms.absorb(fk, v), call.scale)
        fq, fk, v, decay = self.encoded(call)
        if engine == "reference":
            weights = linear_forms.matrix(fq, fk, call.causal, decay)
            out = causal_product(weights, v) if call.causal else weights @ v
        elif call.causal:
            out = self._causal(fq, fk, v, decay, engine)
        else:
            out = fq @ _written(fk, v, None, engine)
        return self.normalize(out).to(call.q.dtype)

    def _causal(
        self, fq: Tensor, fk: Tensor, v: Tensor, decay: Tensor | None, engine: str, state: Tensor | None = None
    ) -> Tensor:
        """Return the causal output of the last queries, from a state on."""
        earlier = fk.shape[2] - fq.shape[2]
        if not earlier:  # a slice's gradient is as large as the whole tensor, filled up with zeros
            state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3]) if state is None else state
        else:
            (old_k, fk), (old_v, v) = (x.tensor_split([earlier], 2) for x in (fk, v))
            old, decay = (None, None) if decay is None else decay.tensor_split([earlier], 2)
            state = _written(old_k, old_v, old, engine, state)
        if not fq.shape[2]:
            return fq @ state
        run = self.scan if engine == "chunked" else linear_forms.recurrent
        return run(fq, fk, v, decay, state)

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        fq, fk, _, decay = self.encoded(call)
        weights = linear_forms.matrix(fq, fk, call.causal, decay)
        if self.normalized:
            weights = self.normalize(torch.cat([weights, weights.sum(-1, keepdim=True)], -1))
        return weights.to(call.q.dtype)

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        why = "named by the caller" if call.engine != "auto" else "a state of fixed size: linear in the length"
        engine, q = self._engine(call), call.q
        b, h, nq, _ = q.shape
        nk, width, out = call.n_keys, self._width(q, call.scale), call.v.shape[-1] + self.normalized
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
        sums = key.new_zeros(sizes.batch, sizes.heads, self._width(key, 1.0), sizes.value_dim + self.normalized)
        return LinearState(sums, self.normalized, self.carried(key[:, :, :0]))

    @final
    def _step(self, call: AttentionCall, state: LinearState) -> tuple[Tensor, LinearState]:
        carried, carry = self._after(call, state)
        fq, fk, v, decay = self.encoded(carried)
        decay = None if decay is None else decay[:, :, -1:].to(v.dtype)
        sums = linear_forms.write(state.sums, fk[:, :, -1:].to(v.dtype), v[:, :, -1:], decay)
        return self.normalize(fq @ sums).to(call.q.dtype), LinearState(sums, self.normalized, carry)

    @final
    def _prefill(self, call: AttentionCall, state: LinearState | None) -> tuple[Tensor, LinearState]:
        before = None if state is None else state.sums
        if self.tokenwise:
            out, sums = linear_spans.attend(self, call, before)
            return out, LinearState(sums, self.normalized)
        carried, carry = self._after(call, state)
        fq, fk, v, decay = self.encoded(carried)
        if carried.n_keys > call.n_keys:  # the state already holds the key that represents the past
            fk, v, decay = fk[:, :, 1:], v[:, :, 1:], None if decay is None else decay[:, :, 1:]
        fk, decay = fk.to(v.dtype), None if decay is None else decay.to(v.dtype)  # the carry may be wider
        out = self.normalize(self._causal(fq, fk, v, decay, "chunked", before))
        sums = _written(fk, v, decay, "chunked", before)
        return out.to(call.q.dtype), LinearState(sums, self.normalized, carry)

    @final
    def _fixed_sizes(self, state: LinearState) -> tuple[object, ...]:
        return tuple(state.sums.shape), state.normalized, None if state.carry is None else tuple(state.carry.shape)

    def _after(self, call: AttentionCall, state: LinearState | None) -> tuple[AttentionCall, Tensor | None]:
        """Prepend the key that represents the past, if features depend on it; return the call and the key after it."""
        heads, past_key = call.q.shape[1], None if state is None else state.carry
        if past_key is None:
            wide = accumulating(call.k.dtype)
            return call, self.carried(per_query_head(call.k, heads).to(wide)) if state is None else None
        k = torch.cat([past_key, per_query_head(call.k, heads).to(past_key.dtype)], 2)
        v = F.pad(per_query_head(call.v, heads), (0, 0, 1, 0))
        return replace(call, k=k, v=v), self.carried(k)

    @final
    def encoded(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return features of queries and keys, values, and log decays of a call, with masked keys removed.

        Values have a column of ones if `normalized`.
        """
        fq = self.encode_queries(call.q.to(accumulating(call.q.dtype)), call.scale, call.inputs)
        return fq, *self.encoded_keys(call)

    @final
    def encoded_keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `encoded` without the queries' features."""
        heads, wide, mask = call.q.shape[1], accumulating(call.v.dtype), call.mask
        v = per_query_head(call.v, heads).to(wide)
        k = per_query_head(call.k, heads).to(torch.promote_types(call.k.dtype, wide))
        hidden = None if mask is None else ~masks.keys_of(mask, k.shape[0], k.shape[2])[:, None, :, None]
        if hidden is not None:
            # mask before and after the features, so that neither values nor gradients of hidden keys leak
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        fk, decay = self.encode_keys(k, call.scale, call.causal, hidden, call.inputs)
        decay = self._decay(decay, fk, hidden)
        if self.normalized:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        return fk if hidden is None else fk.masked_fill(hidden, 0.0), v, decay

    def _decay(self, decay: Tensor | None, fk: Tensor, hidden: Tensor | None) -> Tensor | None:
        """Return the log decays as `(B or 1, H, N)` or `(B or 1, H, N, F)`."""
        if decay is None:
            return None
        b, h, n, f = fk.shape
        # below this the exponential is 0 anyway, and sums of clamped numbers keep their precision
        decay = decay.to(fk.dtype).clamp_min(1.2 * math.log(torch.finfo(fk.dtype).tiny))
        if decay.shape in ((h,), (h, f)):
            return decay[None, :, None].expand(1, h, n, *decay.shape[1:])
        if decay.shape not in ((b, h, n), (b, h, n, f)):
            expected = f"(H,)=({h},), (B, H, N)={(b, h, n)}, or these with F={f}"
            raise ShapeError(f"log decays of {self.name} must be {expected}; got {tuple(decay.shape)}")
        return decay if hidden is None else decay.masked_fill(hidden[..., 0] if decay.dim() == 3 else hidden, 0.0)

    def _width(self, q: Tensor, scale: float) -> int:
        """Return the number of features of a token."""
        with torch.no_grad():
            return self.key_features(torch.zeros_like(q[:1, :, :1], dtype=accumulating(q.dtype)), scale).shape[-1]


def _written(fk: Tensor, v: Tensor, decay: Tensor | None, engine: str, state: Tensor | None = None) -> Tensor:
    """Return the state after some keys, from `state` on, in the engine's form."""
    if engine == "chunked":
        return linear_forms.absorb(fk, v, decay, state)
    state = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3]) if state is None else state
    for index in range(fk.shape[2]):
        at = slice(index, index + 1)
        state = linear_forms.write(state, fk[:, :, at], v[:, :, at], None if decay is None else decay[:, :, at])
    return state
