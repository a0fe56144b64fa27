"""The family of test-time learners: the state is the weights of a small learner, and a call trains it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.errors import DivergedError, ShapeError, UnsupportedPattern
from foveate.core.readable import is_clean
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional.fast_weights import Layer, Outer, Path, Shares, Weights, shares, shares_at_the_end, still
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.operator import CAUSAL_PATTERNS, Capabilities, Gate

#: The weights that answer a query: those after its token's write, or those at the start of its chunk.
Reads = Literal["token", "chunk"]

#: The rates of a masked token: nothing decays, moves or is written.
_ABSENT = {"alpha": 0.0, "eta": 1.0, "theta": 0.0, "write": 0.0}


@dataclass(frozen=True)
class MemoryState:
    """The state of a learner in a stream.

    Args:
        memory: the sums that decay and are written, one `(B, H, out, in)` for each layer.
        momentum: the running sum of past gradients, of the same shapes.
        anchor: the weights at the start of the current chunk, where its gradients are taken.
        place: tokens of that chunk so far.
    """

    memory: Weights
    momentum: Weights
    anchor: Weights
    place: int


class Memory(Streaming):
    """A learner that trains on each key and value, and answers each query. Causal only; no weights over keys.

    For each token, with `u` the gradient of the inner objective at the weights `W`:

        `S <- eta S - theta u`,  `M <- (1 - alpha) M + S`,  `W = link(M)`,  `out = read(W, q)`

    alpha forgets, eta is the momentum, theta the step. Each is a number given to the constructor, or a tensor
    `(B, H, Nk)` given to a call, with H = Hq or Hkv. Gradients of a whole chunk are taken at its first weights: exact
    for `chunk=1`, otherwise an approximation that runs in parallel. A masked token counts for the length of a chunk and
    has no other effect; before the first unmasked token the answer is 0. The steps of similar keys in a chunk add up:
    with unit keys, `theta * slope * chunk / D` has to stay well under 1.

    With `reads="chunk"` the weights at the start of a chunk answer all of its queries: cheaper, but its tokens do not
    see the chunk's own writes, not even those of their own keys and values. The writes are the same.

    A step on a large token may overshoot, and the next one more, until the weights are infinite. `max_grad_norm` bounds
    the norm of a token's gradient in each layer, so that all stays finite. Without it, a call or a `step` whose inputs
    are finite and whose answers are NaN or inf raises `DivergedError`. The check waits for the device once per call.

    Engines: "chunked" (the default), "recurrent" (token by token). They agree up to rounding for every chunk size.

    Subclasses define `initial`, `read` and `surprise`. If the weights are not the memory itself, they also define
    `link` and set `linked`: the weights are then materialised for each token, which costs `chunk` times the memory.
    """

    capabilities = Capabilities(
        patterns=CAUSAL_PATTERNS, masks=frozenset({"keys"}), has_weights=False, default_scale=1.0,
        inputs=frozenset({"alpha", "eta", "theta"}),
        # little forgetting, since -4 loses nine tenths, and recall with them, after 128 tokens; some momentum; and a
        # short step, since the steps of a chunk add up: from -5 on, repetitive text can make two layers diverge
        gates={"alpha": Gate("sigmoid", -6.0), "eta": Gate("sigmoid", -2.0), "theta": Gate("sigmoid", -6.0)},
        engines=("chunked", "recurrent"), growth="N",
    )  # fmt: skip
    state_type: ClassVar[type] = MemoryState
    linked: bool = False

    def __init__(
        self, *, alpha: float, eta: float, theta: float, chunk: int, unit: bool, reads: Reads = "token",
        max_grad_norm: float | None = None, **more: float,
    ) -> None:  # fmt: skip
        """Set the options. `unit`: True scales queries and keys to length 1 first. `more`: further rates, by name."""
        super().__init__()
        validate.between("alpha", alpha, 0, 1)
        validate.between("eta", eta, 0, 1)
        validate.at_least("theta", theta, 0)
        validate.count("chunk", chunk, 1)
        validate.one_of("reads", reads, ("token", "chunk"))
        if max_grad_norm is not None:
            validate.at_least("max_grad_norm", max_grad_norm, 0)
        self.rates = {"alpha": alpha, "eta": eta, "theta": theta, **more}
        self.chunk, self.unit, self.reads, self.max_grad_norm = chunk, unit, reads, max_grad_norm

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def initial(self, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Weights:
        """Return the first memory, `(heads, out, in)` for each layer, in dtype and device of `like`."""

    @abstractmethod
    def read(self, layers: Sequence[Layer], q: Tensor) -> Tensor:
        """Return the learner's answers `(B, H, C, Dv)` to `q (B, H, C, D)`."""

    @abstractmethod
    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        """Return each layer's gradients of the inner objective for each token of `k, v (B, H, C, ·)`, at `weights`."""

    def link(self, memory: Tensor) -> Tensor:
        """Return the weights `(..., out, in)` of a memory of that shape."""
        return memory

    # -- the base ------------------------------------------------------------------------------------------------------

    @final
    def _attend(self, call: AttentionCall) -> Tensor:
        engine = self._engine(call)
        return self._run(call, engine)[0] if call.n_queries else call.no_output

    @final
    def _prefill(self, call: AttentionCall, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
        return self._run(call, "recurrent" if state is not None and state.place else "chunked", state)

    @final
    def go_on(
        self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState, *, mask: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, MemoryState]:
        """Process tokens from a state, as `prefill` does, with a mask of the tokens."""
        return self._prefill(self._call(q, k, v, mask, True, None, "auto", inputs), state)

    @final
    def recall(self, q: Tensor, state: MemoryState) -> Tensor:
        """Answer `q (B, H, N, D)` from this state, without writing."""
        wide = q.to(state.memory[0].dtype)
        wide = F.normalize(wide, dim=-1) if self.unit else wide
        return self.read([still(self.link(memory)) for memory in state.memory], wide).to(q.dtype)

    def _run(self, call: AttentionCall, engine: str, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Return the output and the state after the last token, continued from `state` (None: the start)."""
        run = self._chunks if engine == "chunked" else self._tokens
        n_queries, n_keys, mask = call.n_queries, call.n_keys, call.mask
        hidden = None if mask is None else ~masks.keys_of(mask, call.k.shape[0], n_keys)[:, None]
        rates = self._rates(call, hidden)
        q, k, v = self._prepared(call, hidden)
        fresh = state is None
        state = self._begin(q.shape[0], q.shape[1], k.shape[3], v.shape[3], q) if state is None else state
        if not n_keys:
            return call.no_output, state
        out, state = run(F.pad(q, (0, 0, n_keys - n_queries, 0)), k, v, rates, state)
        self._check_finite(out, q, k, v, *rates.values())
        if fresh and hidden is not None:
            # before the first visible token the answer is 0, not that of the first weights
            out = out.masked_fill(hidden.cummin(-1).values[..., None], 0.0)
        return out[:, :, n_keys - n_queries :].to(call.q.dtype), state

    def _chunks(
        self, q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor], state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        n, size = k.shape[2], min(self.chunk, k.shape[2])
        count = -(-n // size)
        q, k, v = (F.pad(x, (0, 0, 0, count * size - n)).unflatten(2, (count, size)) for x in (q, k, v))
        rates = {
            name: F.pad(rate, (0, count * size - n), value=_ABSENT.get(name, 1.0)).unflatten(2, (count, size))
            for name, rate in rates.items()
        }
        parts, out = shares(rates) if self.reads == "token" else shares_at_the_end(rates), []
        memory, momentum = state.memory, state.momentum
        # cut once, since each slice would return a gradient as large as the whole tensor
        qs, ks, vs = q.unbind(2), k.unbind(2), v.unbind(2)
        shared = list(map(Shares, parts.memory.unbind(2), parts.momentum.unbind(2)))
        rates_of = {name: rate.unbind(2) for name, rate in rates.items()}
        for t, part in enumerate(shared):
            here = {name: rate[t] for name, rate in rates_of.items()}
            anchor = tuple(map(self.link, memory))
            gradients = self._bounded(self.surprise(anchor, ks[t], vs[t], here))
            paths = [Path(*each, part) for each in zip(memory, momentum, gradients, strict=True)]
            out.append(self.read(self._met(anchor, paths), qs[t]))
            memory, momentum = zip(*(path.end() for path in paths), strict=True)
        place = n % self.chunk
        state = MemoryState(memory, momentum, anchor if place else tuple(map(self.link, memory)), place)
        return torch.cat(out, 2)[:, :, :n], state

    def _met(self, anchor: Weights, paths: Sequence[Path]) -> list[Layer]:
        """Return the layers that answer the queries of a chunk."""
        if self.reads == "chunk":
            return list(map(still, anchor))
        return [still(self.link(path.written_out())) if self.linked else path for path in paths]

    def _tokens(
        self, q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor], state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        out = []
        for t in range(k.shape[2]):
            at = slice(t, t + 1)
            here = {name: rate[:, :, at] for name, rate in rates.items()}
            y, state = self._token(q[:, :, at], k[:, :, at], v[:, :, at], here, state)
            out.append(y)
        return torch.cat(out, 2), state

    def _token(
        self, q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor], state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        """Apply the definition: write one token, then read; "chunk" reads the weights at the start of the chunk."""
        gradients = self._bounded(self.surprise(state.anchor, k, v, rates))
        alpha, eta, theta, write = (rates[name][..., None] for name in ("alpha", "eta", "theta", "write"))
        moved = zip(state.momentum, gradients, strict=True)
        momentum = tuple(eta * s - theta * (u.left.mT @ u.right) for s, u in moved)
        memory = tuple((1 - alpha) * m + write * s for m, s in zip(state.memory, momentum, strict=True))
        weights = tuple(map(self.link, memory))
        out = self.read(list(map(still, state.anchor if self.reads == "chunk" else weights)), q)
        place = (state.place + 1) % self.chunk
        return out, MemoryState(memory, momentum, state.anchor if place else weights, place)

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        raise UnsupportedPattern(f"{self.name} has no matrix of weights over keys")

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        why = (
            "named by the caller"
            if call.engine != "auto"
            else f"gradients of {self.chunk} tokens at a time, as matrix products"
        )
        engine, (b, h, nq, d), nk = self._engine(call), call.q.shape, call.n_keys
        inside = self.chunk if engine == "chunked" else 0
        flops = 0
        for matrix in self.initial(h, d, call.v.shape[3], call.q.new_zeros((), dtype=accumulating(call.q.dtype))):
            _, wide, tall = matrix.shape
            learn = 6 * wide * tall  # the forward and the backward product, and the sum into the memory
            look = 2 * wide * tall
            if self.reads == "token":  # the memory, its momentum, and the chunk's own writes
                look += 2 * wide * tall + 2 * inside * (wide * tall if self.linked else wide + tall)
            flops += b * h * (nk * learn + nq * look)
        return Plan(engine=engine, flops=flops, bytes=call.traffic, why=why)

    @final
    def _init_state(self, sizes: StateSizes) -> MemoryState:
        like = torch.zeros((), dtype=accumulating(sizes.dtype), device=sizes.device)
        return self._begin(sizes.batch, sizes.heads, sizes.key_dim, sizes.value_dim, like)

    @final
    def _step(self, call: AttentionCall, state: MemoryState) -> tuple[Tensor, MemoryState]:
        prepared, rates = self._prepared(call, None), self._rates(call, None)
        out, state = self._token(*prepared, rates, state)
        self._check_finite(out, *prepared, *rates.values())
        return out.to(call.q.dtype), state

    @final
    def _fixed_sizes(self, state: MemoryState) -> tuple[object, ...]:
        return tuple(tuple(memory.shape) for memory in state.memory)

    def _bounded(self, gradients: tuple[Outer, ...]) -> tuple[Outer, ...]:
        """Scale gradients down to norms of at most `max_grad_norm`, for each token and layer."""
        most = self.max_grad_norm
        if most is None:
            return gradients
        tiny = torch.finfo(gradients[0].left.dtype).tiny
        # the norm of an outer product is the product of the norms
        lengths = [_length(u.left) * _length(u.right) for u in gradients]
        shares = [most / length.clamp_min(max(most, tiny)) for length in lengths]
        return tuple(Outer(u.left * share, u.right) for u, share in zip(gradients, shares, strict=True))

    def _check_finite(self, out: Tensor, *given: Tensor) -> None:
        """Raise if answers are not finite although all inputs are."""
        if is_clean(out) or bool(out.isfinite().all()) or not all(bool(x.isfinite().all()) for x in given):
            return
        remedy = "a smaller theta" if self.max_grad_norm is not None else "max_grad_norm=1.0, or a smaller theta"
        raise DivergedError(
            f"{self.name}'s memory diverged: its steps grew until its weights were not finite; {remedy}, inputs of "
            f"unit size, or a smaller chunk (now {self.chunk}) keep it bounded"
        )

    def _begin(self, batch: int, heads: int, key_dim: int, value_dim: int, like: Tensor) -> MemoryState:
        memory = tuple(m.expand(batch, *m.shape) for m in self.initial(heads, key_dim, value_dim, like))
        return MemoryState(memory, tuple(map(torch.zeros_like, memory)), tuple(map(self.link, memory)), 0)

    def _prepared(self, call: AttentionCall, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        wide, heads = accumulating(call.q.dtype), call.q.shape[1]
        q, k, v = call.q.to(wide), per_query_head(call.k, heads).to(wide), per_query_head(call.v, heads).to(wide)
        if hidden is not None:
            k, v = k.masked_fill(hidden[..., None], 0.0), v.masked_fill(hidden[..., None], 0.0)
        if self.unit:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q if call.scale == 1.0 else q * call.scale, k, v

    def _rates(self, call: AttentionCall, hidden: Tensor | None) -> dict[str, Tensor]:
        """Return all rates as `(B, H, Nk)`; those of masked tokens have no effect."""
        (b, h, _, _), (hkv, n), wide = call.q.shape, call.k.shape[1:3], accumulating(call.q.dtype)
        rates = {
            name: call.q.new_full((b, h, n), value, dtype=wide) for name, value in {**self.rates, "write": 1.0}.items()
        }
        for name, given in call.inputs.items():
            if not isinstance(given, Tensor) or given.shape not in ((b, h, n), (b, hkv, n)):
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ShapeError(f"{name} must be a tensor (B, H, Nk)={(b, h, n)}; got {got}")
            rates[name] = per_query_head(given, h).to(wide)
        if hidden is None:
            return rates
        return {name: rate.masked_fill(hidden, _ABSENT.get(name, 1.0)) for name, rate in rates.items()}


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
