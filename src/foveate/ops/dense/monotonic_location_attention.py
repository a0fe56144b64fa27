"""Monotonic location attention: a decoder whose attention moves over its source step by step.

Monotonic Location Attention for Length Generalization (2023), arXiv 2305.20019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.call import AttentionCall, Plan, cost
from foveate.core.errors import ShapeError
from foveate.core.scoring import safe_softmax
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.functional.local_window import log_bell, places
from foveate.ops.operator import Capabilities, Operator

#: The least width of the bell, in source tokens, and the sharpness of the stairs, as in the release.
NARROWEST, SHARPNESS = 0.27, 20.0


def softstair(x: Tensor) -> Tensor:
    """Return a smooth staircase: nearly whole numbers with a gradient."""
    return torch.floor(x) + torch.sigmoid(SHARPNESS * (x - torch.floor(x) - 0.5))


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "onestep": lambda x: torch.sigmoid(5 * x),
    "relu": torch.relu,
    "softstair": softstair,
    "free": lambda x: x,
}


@final
class MonotonicLocationAttention(Operator):
    """A query takes a step from the previous query's position and attends to a Gaussian window there.

    On positions scaled to [0, 1], `mu_t = a_{t-1} + step_t / (S - 1)`, weights are a Gaussian about mu_t, over their
    sum, and `a_t` is their expected position; keys have no effect. Training on short sources generalises to long ones.
    Cost O(Nq Nk) in Nq sequential steps: the wrong choice if the output does not keep the source's order, or inside a
    Transformer that processes all queries at once. Queries see the whole source, so it defines no causal call.

    Args:
        head_dim, heads: D and Hq of the calls to come.
        step: the range of a step: "onestep" `sigmoid(5 rho)`, forward by at most one token (the paper's OneStepAttn);
            "relu", forward by any distance (RMonoAttn); "controlled_relu", a learned mean of these two (MonoAttn);
            "softstair", nearly whole steps, and "free", `rho` itself, both backward or forward.
        mix: True adds softmax attention over the keys, on the call's scale, mixed by a gate of the query.
        past: the start of a step in a mixture: "mixed", the expected position under all weights, or "location" (the
            paper's PR), that under the bell alone.

    S is the number of real keys and positions count these, so calls have to mask padding, on either side. Weights start
    as in the release: Xavier uniform, biases as in `nn.Linear`. There the gate reads all heads' queries, here each head
    reads its own. The older location attention in the paper (leaky clamp, gates) is not implemented.
    """

    capabilities = Capabilities(
        patterns=frozenset({"self", "cross"}), masks=frozenset({"keys"}), engines=("recurrent",), streaming=None
    )

    def __init__(
        self,
        head_dim: int,
        heads: int = 1,
        *,
        step: Literal["onestep", "relu", "controlled_relu", "softstair", "free"] = "onestep",
        mix: bool = False,
        past: Literal["mixed", "location"] = "mixed",
    ) -> None:
        super().__init__()
        validate.count("head_dim", head_dim, 1)
        validate.count("heads", heads, 1)
        validate.one_of("step", step, (*STEPS, "controlled_relu"))
        validate.one_of("mix", mix, (True, False))
        validate.one_of("past", past, ("mixed", "location"))
        self.heads, self.head_dim, self.step_kind, self.past = heads, head_dim, step, past
        self._declare(reads_keys=mix)
        self.position = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.position_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.w_sigma = nn.Parameter(torch.empty(heads, head_dim, 1))
        self.w_rho = nn.Parameter(torch.empty(heads, head_dim, 1))
        self.w_gate = nn.Parameter(torch.empty(heads, head_dim, 1)) if mix else None
        self.gate_bias = nn.Parameter(torch.empty(heads)) if mix else None
        self.step_bias = nn.Parameter(torch.tensor(20.0)) if step == "controlled_relu" else None
        for weight in (self.position, self.w_sigma, self.w_rho, self.w_gate):
            for head in () if weight is None else weight:
                nn.init.xavier_uniform_(head)
        for bias in (self.position_bias, self.gate_bias):
            if bias is not None:
                nn.init.uniform_(bias, -(head_dim**-0.5), head_dim**-0.5)

    def walk(
        self,
        q: Float[Tensor, "b hq nq d"],
        k: Float[Tensor, "b hkv nk d"],
        v: Float[Tensor, "b hkv nk dv"],
        past: Float[Tensor, "b hq 1"] | None = None,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Tensor, "b hq nq dv"], Float[Tensor, "b hq 1"]]:
        """Make a call from the position `past` (None: the start); return its output and the last position."""
        call = self._call(q, k, v, mask, False, scale)
        if past is not None and past.shape != (*q.shape[:2], 1):
            raise ShapeError(f"past must be (B, Hq, 1)={(*q.shape[:2], 1)}; got {tuple(past.shape)}")
        return self._walk(call, past)

    def _walk(self, call: AttentionCall, past: Tensor | None) -> tuple[Tensor, Tensor]:
        q = call.q
        source, wide = _Source.of(q, call.k, call.v, call.mask), accumulating(q.dtype)
        past, out = q.new_zeros(*q.shape[:2], 1, dtype=wide) if past is None else past.to(wide), []
        for intent in self._intents(q.to(wide), source, call.scale):
            weights, past = self._look(intent, source, past)
            out.append((weights[:, :, None] @ source.v)[:, :, 0])
        return (torch.stack(out, 2).to(q.dtype) if out else call.no_output), past

    def _intents(self, q: Float[Tensor, "b h n d"], source: _Source, scale: float) -> Iterator[_Intent]:
        """Return each query's own numbers, which do not depend on its position."""
        if q.shape[1::2] != (self.heads, self.head_dim):
            raise ShapeError(
                f"built for {self.heads} heads of width {self.head_dim}; got H={q.shape[1]}, D={q.shape[3]}"
            )
        position = q @ self.position.to(q) + self.position_bias.to(q)[:, None]
        step = self.steps_of(position @ self.w_rho.to(q)) * source.unit
        width = (torch.relu(position @ self.w_sigma.to(q)) + NARROWEST) / source.real.clamp_min(1)
        gate = None
        if self.w_gate is not None and self.gate_bias is not None:
            gate = torch.sigmoid(q @ self.w_gate.to(q) + self.gate_bias.to(q)[:, None, None])
        for t in range(q.shape[2]):
            content = None
            if gate is not None:
                logits = (scale * q[:, :, None, t] @ source.k.mT)[:, :, 0]
                content = safe_softmax(logits.masked_fill(~source.seen, masks.NEG_INF))
            yield _Intent(step[:, :, t], width[:, :, t], None if gate is None else gate[:, :, t], content)

    def steps_of(self, rho: Tensor) -> Tensor:
        """Return the step of each query in tokens."""
        if self.step_bias is None:
            return STEPS[self.step_kind](rho)
        share = torch.sigmoid(self.step_bias.to(rho))
        return share * STEPS["relu"](rho) + (1 - share) * STEPS["onestep"](rho)

    def _look(self, intent: _Intent, source: _Source, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights `(B, H, Nk)` of one query and their expected position."""
        logits = log_bell(source.at, past + intent.step, intent.width)
        weights = bell = safe_softmax(logits.masked_fill(~source.seen, masks.NEG_INF))
        if intent.gate is not None and intent.content is not None:
            weights = intent.gate * bell + (1 - intent.gate) * intent.content
        start = bell if self.past == "location" else weights
        return weights, (start * source.at).sum(-1, keepdim=True)

    # -- the operator--------------------------------------------------------------------------------------------------

    def _attend(self, call: AttentionCall) -> Tensor:
        self._engine(call)
        if call.n_queries == 0:
            return call.no_output
        return self._walk(call, None)[0]

    def _weights(self, call: AttentionCall) -> Tensor:
        k = call.k
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return self._walk(replace(call, v=one_hot), None)[0]

    def _plan(self, call: AttentionCall) -> Plan:
        return cost(call, self._engine(call), "a query starts where the last one looked")

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        op = cls(head_dim, heads, step="controlled_relu", mix=True)
        assert op.step_bias is not None  # learned by "controlled_relu"
        nn.init.zeros_(op.step_bias)
        return op

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        op = cls(head_dim, heads, mix=True)
        assert op.w_gate is not None and op.gate_bias is not None  # learned with `mix`
        nn.init.zeros_(op.w_gate)
        nn.init.constant_(op.gate_bias, -1e4)
        return op


class _Intent(NamedTuple):
    """The numbers of one query: its step, the width of its bell, the bell's share, and the content logits."""

    step: Float[Tensor, "b h 1"]
    width: Float[Tensor, "b h 1"]
    gate: Float[Tensor, "b h 1"] | None
    content: Float[Tensor, "b h k"] | None


class _Source(NamedTuple):
    """The real keys, their values and their positions, with one head for each query head."""

    k: Float[Tensor, "b h k d"]
    v: Float[Tensor, "b h k dv"]
    seen: Bool[Tensor, "b 1 k"]
    at: Float[Tensor, "b 1 k"]  # 0 at the first real key and 1 at the last
    unit: Float[Tensor, "b 1 1 1"]  # from one key to the next
    real: Int[Tensor, "b 1 1 1"]  # the number of real keys

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> _Source:
        wide, (batch, n_keys) = accumulating(q.dtype), k.shape[::2]
        k, v = (per_query_head(masks.without_hidden(x, mask), q.shape[1]).to(wide) for x in (k, v))
        place, count = places(mask, batch, n_keys, k.device)
        seen = torch.ones_like(place, dtype=torch.bool) if mask is None else masks.keys_of(mask, batch, n_keys)
        unit = 1 / (count - 1).clamp_min(1).to(wide)
        return cls(k, v, seen[:, None], (place * unit)[:, None], unit[..., None, None], count[..., None, None])
