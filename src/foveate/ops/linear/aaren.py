"""Aaren: softmax attention as a recurrence, with one query for every prefix.

Attention as an RNN (2024), arXiv 2405.13956.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import masks, online_softmax, validate
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.errors import OptionError
from foveate.core.online_softmax import Partial
from foveate.core.readable import known
from foveate.core.scoring import safe_softmax
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional.causal import causal_product
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.operator import CAUSAL_PATTERNS

Form = Literal["scan", "recurrent", "reference"]

#: Merges the `(top, total, out)` of two sets of keys: the associative operation of the scan.
combine = online_softmax.merge


@dataclass(frozen=True)
class AarenState:
    """The state of a stream: 2 + Dv numbers per head for a past of any length, and the query.

    Args:
        part: the softmax so far: largest score and sum of exponentials `(B, H, 1, 1)`, weighted values `(B, H, 1, Dv)`.
        query: `(B, H, 1, D)`, None before the first token.
    """

    part: Partial
    query: Tensor | None = None


@final
class Aaren(Streaming):
    """`out_t = softmax(scale q . k_{<= t}) v_{<= t}` with one q for all t: exact softmax attention, as an RNN.

    O(N D) time in all and a constant state, since a new token changes no score of an old one. The price is that no
    token has its own query; it only extends the prefix. The wrong choice if a token must look up something of its own;
    layers have to be stacked. Causal only.

    The paper's query is learned, and belongs to a layer (`foveate.nn.AarenLayer`). Here it is q, `(B, Hq, Nq, D)` as
    for any operator, with the same row for every token (`query.expand` copies nothing).

    Args:
        query: "same": all rows of q have to be equal; a call in which they differ raises. "first": the first row serves
            all tokens; later rows have no effect. A stream uses its first token's query.

    Engines: "scan" (a parallel scan, the default), "recurrent" (a token loop), "reference" (the whole matrix).

    Raises:
        OptionError: an unknown `query`, or rows of q that differ.
    """

    capabilities = replace(
        Streaming.capabilities,
        patterns=CAUSAL_PATTERNS,
        masks=frozenset({"keys"}),
        engines=("scan", "recurrent", "reference"),
        growth="N",
    )
    state_type: ClassVar[type] = AarenState

    def __init__(self, query: Literal["same", "first"] = "same") -> None:
        super().__init__()
        validate.one_of("query", query, ("same", "first"))
        self.query = query

    def _attend(self, call: AttentionCall) -> Tensor:
        engine = cast(Form, self._engine(call))  # it declares no other engines than the forms
        if call.n_queries == 0:
            return call.no_output
        out = prefix_attention(*self._scored(call), engine)
        return out[:, :, call.n_keys - call.n_queries :].to(call.q.dtype)

    def _weights(self, call: AttentionCall) -> Tensor:
        scores, _ = self._scored(call)
        return _matrix(scores)[:, :, call.n_keys - call.n_queries :].to(call.q.dtype)

    def _plan(self, call: AttentionCall) -> Plan:
        why = "named by the caller" if call.engine != "auto" else "one query for all: linear in the length"
        engine, (b, h, _, d), (nk, dv) = self._engine(call), call.q.shape, call.v.shape[2:]
        merges = {"scan": math.ceil(math.log2(BLOCK)) + 1, "recurrent": 1, "reference": nk / 2}[engine]
        flops = b * h * nk * (2 * d + int(merges * 4 * (dv + 1)))
        return Plan(engine=engine, flops=flops, bytes=call.traffic, why=why)

    def _init_state(self, sizes: StateSizes) -> AarenState:
        zero = torch.zeros(sizes.batch, sizes.heads, 1, 1, dtype=accumulating(sizes.dtype), device=sizes.device)
        return AarenState(Partial(zero + masks.NEG_INF, zero, zero.expand(-1, -1, -1, sizes.value_dim)))

    def _step(self, call: AttentionCall, state: AarenState) -> tuple[Tensor, AarenState]:
        query = call.q if state.query is None else self._query(torch.cat([state.query, call.q], 2))
        scores, values = self._scored(replace(call, q=query))
        part = combine(state.part, online_softmax.partial(scores[..., None], values))
        return online_softmax.finish(part).to(call.q.dtype), AarenState(part, query)

    def _prefill(self, call: AttentionCall, state: AarenState | None) -> tuple[Tensor, AarenState]:
        if state is not None:
            return super()._prefill(call, state)
        out = self._attend(call)
        if call.n_queries == 0:
            return out, self._init_state(StateSizes.of(call))
        scores, values = self._scored(call)
        return out, AarenState(online_softmax.partial(scores[:, :, None], values), self._query(call.q))

    def _fixed_sizes(self, state: AarenState) -> tuple[object, ...]:
        return (tuple(state.part.out.shape),)

    def _query(self, q: Tensor) -> Float[Tensor, "b h 1 d"]:
        if self.query == "same" and known((q == q[:, :, :1]).all()) is False:
            raise OptionError('q must be the same in every row, as Aaren has one query; or use query="first"')
        return q[:, :, :1]

    def _scored(self, call: AttentionCall) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n dv"]]:
        """Return scores of all keys, -inf for masked ones, and values."""
        wide, heads, mask, scale = accumulating(call.q.dtype), call.q.shape[1], call.mask, call.scale
        q = self._query(call.q).to(wide)
        k, v = per_query_head(call.k, heads).to(wide), per_query_head(call.v, heads).to(wide)
        if mask is None:
            return (q * scale @ k.mT)[:, :, 0], v
        hidden = ~masks.keys_of(mask, k.shape[0], k.shape[2])[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        return (q * scale @ k.mT)[:, :, 0].masked_fill(hidden[..., 0], masks.NEG_INF), v

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls("first")


#: Tokens that are scanned at a time; a second scan runs over the blocks' totals.
BLOCK = 32


def prefix_attention(
    scores: Float[Tensor, "b h n"], values: Float[Tensor, "b h n d"], form: Form = "scan"
) -> Float[Tensor, "b h n d"]:
    """Return the softmax attention of every prefix: `out_t = softmax(scores_{<= t}) values_{<= t}`.

    Args:
        scores: one for each token: finite, or -inf to hide the token. A prefix of only -inf gives zeros.
        values: the vectors that the weights average.
        form: "scan" computes all prefixes at once in O(log N) passes; "recurrent" goes token by token; "reference"
            makes the whole matrix, O(N²). They agree up to rounding.
    """
    validate.one_of("form", form, ("scan", "recurrent", "reference"))
    if form == "reference":
        return causal_product(_matrix(scores), values)
    leaves = online_softmax.partial(scores[..., None, None], values[..., None, :])  # one key each: (B, H, N, 1, ·)
    run = _scanned if form == "scan" else _folded
    return online_softmax.finish(run(leaves)).squeeze(-2)


def _matrix(scores: Tensor) -> Float[Tensor, "b h n n"]:
    n = scores.shape[-1]
    seen = masks.causal(n, n, device=scores.device)
    return safe_softmax(scores[..., None, :].masked_fill(~seen, masks.NEG_INF))


def _folded(parts: Partial) -> Partial:
    """Return prefixes along axis 2, one after the other."""
    done = [_at(parts, slice(0, 1))]
    for t in range(1, parts.top.shape[2]):
        done.append(combine(done[-1], _at(parts, slice(t, t + 1))))
    return Partial(*(torch.cat(each, 2) for each in zip(*done, strict=True)))


def _scanned(parts: Partial) -> Partial:
    """Return prefixes along axis 2 by doubling, first inside blocks and then over the blocks' totals."""
    n = parts.top.shape[2]
    if n <= BLOCK:
        return _doubled(parts, 2)
    empty = Partial(*(torch.zeros_like(each[:, :, :1]) for each in parts))
    empty = empty._replace(top=torch.full_like(empty.top, masks.NEG_INF))
    short = -n % BLOCK
    filled = (torch.cat([x, e.expand(-1, -1, short, -1, -1)], 2) for x, e in zip(parts, empty, strict=True))
    inside = _doubled(Partial(*(x.unflatten(2, (-1, BLOCK)) for x in filled)), 3)
    before = _scanned(Partial(*(x[:, :, :-1, -1] for x in inside)))
    before = Partial(*(torch.cat([e, x], 2)[:, :, :, None] for e, x in zip(empty, before, strict=True)))
    return Partial(*(x.flatten(2, 3)[:, :, :n] for x in combine(before, inside)))


def _doubled(parts: Partial, axis: int) -> Partial:
    """Return prefixes along an axis; each pass reaches twice as far back (Hillis and Steele)."""
    reach, n = 1, parts.top.shape[axis]
    while reach < n:
        older = combine(
            Partial(*(x.narrow(axis, 0, n - reach) for x in parts)),
            Partial(*(x.narrow(axis, reach, n - reach) for x in parts)),
        )
        parts = Partial(*(torch.cat([x.narrow(axis, 0, reach), y], axis) for x, y in zip(parts, older, strict=True)))
        reach *= 2
    return parts


def _at(parts: Partial, rows: slice) -> Partial:
    return Partial(*(x[:, :, rows] for x in parts))
