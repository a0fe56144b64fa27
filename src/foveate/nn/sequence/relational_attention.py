"""Relational attention: a token reads its relations to other tokens; it is one half of dual attention.

Disentangling and Integrating Relational and Sensory Information in Transformer Architectures (2024), arXiv 2405.16727.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.parts import positions
from foveate.nn.parts.heads import Rates, merge, split, width
from foveate.nn.parts.positions import Position
from foveate.nn.parts.symbols import RelativeSymbols, Symbols
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.streaming import Streaming
from foveate.ops.calls import sized
from foveate.ops.functional.heads import per_query_head
from foveate.ops.operator import Operator

ACTIVATIONS = {
    "identity": lambda x: x, "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@final
class RelationalAttention(nn.Module):
    """`sum_j a_ij (W_r r_ij + W_s s_j)`: a token reads its relations to others and their symbols, not their content.

    `a` are attention weights. `r_ij` in R^r holds inner products of relation queries of i with relation keys of j,
    which all heads share; the symbol `s_j` identifies j. Cost: if relations are plain inner products and symbols belong
    to tokens, the sum over j comes before the product with i, and the layer is one call of the operator on values of
    width `D + H D`, in O(N) memory. Otherwise weights and relations are materialised, O(N² (H + r)), which needs a
    dense or sparse operator.

    Args:
        dim: C.
        heads: H.
        relations: r; None for H. It divides `H D`: each relation compares `H D / r` channels.
        symmetric: True uses relation queries as relation keys too, so that r_ij = r_ji.
        rel_act: activation of relations: "identity", "relu", "sigmoid", "tanh", "silu", "gelu".
        total_heads: heads of the layer that contains this one; the width of a head is `C / total_heads`. None for H.
        kv_heads: heads of attention's keys and of symbols' values; None for H.
        op: an operator or its key.
        position: a position scheme that rotates attention's queries and keys (not those of relations), or None.

    Raises:
        OptionError: an option out of range.

    The release offers a softmax of relations over j. This class refuses it, since it reads what the causal mask hides
    and makes r_ij differ from r_ji.
    """

    def __init__(
        self, dim: int, heads: int, relations: int | None = None, symmetric: bool = False, rel_act: str = "identity",
        total_heads: int | None = None, *, kv_heads: int | None = None, op: str | Operator = "softmax",
        position: Position | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.head_dim = width(dim, heads if total_heads is None else total_heads, None)
        self.relations, self.inner = heads if relations is None else relations, heads * self.head_dim
        self._check(rel_act, position)
        self.op = sized(op, heads, self.head_dim, self.head_dim + self.inner)
        self.position, self.rel_act = position, rel_act
        self.rates = Rates(dim, heads, self.op)
        self.q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.rel_q = nn.Linear(dim, self.inner, bias=False)
        self.rel_k = self.rel_q if symmetric else nn.Linear(dim, self.inner, bias=False)
        self.from_relations = nn.Parameter(torch.empty(heads, self.head_dim, self.relations))
        nn.init.kaiming_uniform_(self.from_relations, a=math.sqrt(5))
        self.from_symbols = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.inner, self.inner, bias=False)

    def _check(self, rel_act: str, position: Position | None) -> None:
        validate.count("relations", self.relations, 1)
        validate.count("kv_heads", self.kv_heads, 1)
        if self.heads % self.kv_heads:
            raise OptionError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.inner % self.relations:
            raise OptionError(f"relations={self.relations} must divide H D = {self.inner}")
        if rel_act == "softmax":
            raise OptionError('rel_act="softmax" is refused: it would read hidden keys, and make r_ij differ from r_ji')
        validate.one_of("rel_act", rel_act, tuple(ACTIVATIONS))
        positions.check(position, self.heads)
        if position is not None and position.biased:
            raise OptionError(f"position={type(position).__name__} adds a bias; relational heads need a rotation")

    def at_once(self, symbols: Tensor | Symbols | RelativeSymbols | None) -> bool:
        """Return True if a call with such symbols is one call of the operator."""
        return self.rel_act == "identity" and not isinstance(symbols, RelativeSymbols)

    # -- a call --------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Float[Tensor, "b n c"], symbols: Tensor | RelativeSymbols, source: Tensor | None = None, *,
        mask: Tensor | None = None, causal: bool = False,
    ) -> Float[Tensor, "b n hd"]:  # fmt: skip
        """Relate tokens x to the source, or to each other; symbols `(B, M, C)` belong to the source."""
        source = x if source is None else source
        q, k = self._queries(x, 0), self._keys(source, 0)
        if self.at_once(symbols):
            out = self.op(q, k, self._values(source, symbols), mask=mask, causal=causal, **self.rates(x, source))
            return self._output(x, *out.split([self.head_dim, self.inner], -1))
        weights = self.op.weights(q, k, mask=mask, causal=causal)
        source = _visible(source, mask)
        if isinstance(symbols, Tensor):
            symbols = self.from_symbols(_visible(symbols, mask))
        return self._weighed(x, weights, self.rel_k(source), symbols)

    def compare(self, x: Float[Tensor, "b n c"], source: Float[Tensor, "b m c"]) -> Float[Tensor, "b r n m"]:
        """Return r_ij, one map for each relation."""
        return self._compare(self.rel_q(x), self.rel_k(source))

    def _compare(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = split(q, self.relations), split(k, self.relations)
        return ACTIVATIONS[self.rel_act]((q * q.shape[-1] ** -0.5) @ k.mT)

    def _queries(self, x: Tensor, start: int) -> Tensor:
        return self._rotated(split(self.q(x), self.heads), start)

    def _keys(self, source: Tensor, start: int) -> Tensor:
        return self._rotated(split(self.k(source), self.kv_heads), start)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        if self.position is None:
            return x
        return self.position.rotate(x, torch.arange(start, start + x.shape[2], device=x.device))

    def _values(self, source: Tensor, symbols: Tensor | RelativeSymbols) -> Float[Tensor, "b hkv m width"]:
        """Return symbols as values, joined with the relation keys, which all heads share."""
        assert isinstance(symbols, Tensor)
        relation = self.rel_k(source)[:, None].expand(-1, self.kv_heads, -1, -1)
        return torch.cat([split(self.from_symbols(symbols), self.kv_heads), relation], -1)

    def _output(self, x: Tensor, symbolic: Float[Tensor, "b h n d"], read: Float[Tensor, "b h n hd"]) -> Tensor:
        """Return the output from attended symbols and from relation queries times attended relation keys."""
        q = split(self.rel_q(x), self.relations)
        related = torch.einsum("b r n p, b h n r p -> b h n r", q, read.unflatten(-1, (self.relations, -1)))
        return self._joined(symbolic, related * q.shape[-1] ** -0.5)

    def _weighed(self, x: Tensor, weights: Tensor, keys: Tensor, symbols: Tensor | RelativeSymbols) -> Tensor:
        """Return the output from weights, relation keys `(B, M, H D)` and projected symbols `(B, M, Hkv D)`."""
        related = torch.einsum("b h n m, b r n m -> b h n r", weights, self._compare(self.rel_q(x), keys))
        if isinstance(symbols, RelativeSymbols):
            library = split(self.from_symbols(symbols.library)[None], self.kv_heads)
            return self._joined(symbols.read(weights) @ per_query_head(library, self.heads), related)
        return self._joined(weights @ per_query_head(split(symbols, self.kv_heads), self.heads), related)

    def _joined(self, symbolic: Tensor, related: Float[Tensor, "b h n r"]) -> Tensor:
        return self.out(merge(symbolic + torch.einsum("b h n r, h d r -> b h n d", related, self.from_relations)))

    # -- a stream ------------------------------------------------------------------------------------------------------

    @property
    def _streaming_op(self) -> Streaming:
        assert isinstance(self.op, Streaming)  # without `at_once`, `DualAttention` declares that it does not stream
        return self.op

    def init_state(
        self, symbols: Symbols | RelativeSymbols | None, batch: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        if self.at_once(symbols):
            sizes = batch, self.heads, self.kv_heads, self.head_dim, self.head_dim + self.inner
            return self._streaming_op.init_state(*sizes, dtype=dtype, device=device)
        keys = self.kv_heads * self.head_dim
        width = 0 if isinstance(symbols, RelativeSymbols) else keys
        return KVState.empty(batch, 1, keys, self.inner + width, dtype, device)

    def step(self, x: Tensor, symbols: Tensor | RelativeSymbols, state: Any, seen: int) -> tuple[Tensor, Any]:
        q, k = self._queries(x, seen), self._keys(x, seen)
        if self.at_once(symbols):
            out, state = self._streaming_op.step(q, k, self._values(x, symbols), state, **self.rates(x))
            return self._output(x, *out.split([self.head_dim, self.inner], -1)), state
        own = self.from_symbols(symbols) if isinstance(symbols, Tensor) else self.rel_k(x)[..., :0]
        state = state.append(merge(k)[:, None], torch.cat([self.rel_k(x), own], -1)[:, None])
        weights = self.op.weights(q, split(state.k[:, 0], self.kv_heads), causal=True)
        keys, projected = state.v[:, 0].split([self.inner, own.shape[-1]], -1)
        return self._weighed(x, weights, keys, projected if isinstance(symbols, Tensor) else symbols), state


def _visible(x: Float[Tensor, "b m c"], mask: Tensor | None) -> Float[Tensor, "b m c"]:
    """Zero tokens that no query sees, which may hold NaN."""
    return masks.without_hidden(x[:, None], mask)[:, 0]
