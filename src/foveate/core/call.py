"""One attention call, as every engine receives it, and what an engine says of its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.errors import ShapeError
from foveate.core.readable import is_clean
from foveate.core.scoring import SOFTMAX, Scoring, Tile
from foveate.core.selection import Blocks, Selection


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """q, k, v and everything that decides who attends to whom. Already validated.

    Args:
        q: queries `(B, Hq, Nq, D)`.
        k: keys `(B, Hkv, Nk, D)`; `Hq` is a multiple of `Hkv`.
        v: values `(B, Hkv, Nk, Dv)`.
        scale: the factor on the dot products.
        mask: bool, True = may attend, or a float bias; broadcastable to `(B, Hq, Nq, Nk)`.
        causal: only the past; the last query sees the last key.
        selected: the keys that each query sees, for all query heads or for the heads of k.
        scoring: how logits are made and become weights.
        dropout: the share of weights that is dropped.
        chunk: queries and keys of a tile, where the call is to be computed in such chunks.
        engine: who computes; see `foveate.core.engines`.
        inputs: further per-token inputs of a mechanism (gates, rates, poses), by name.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    selected: Selection | None = None
    scoring: Scoring = field(default=SOFTMAX)
    dropout: float = 0.0
    chunk: tuple[int, int] | None = None
    engine: str = "auto"
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.selected is None:
            return
        made, needed = (self.selected.n_queries, self.selected.n_keys), (self.n_queries, self.n_keys)
        if made != needed:
            raise ShapeError(f"selection is for (Nq, Nk)={made}; the call has {needed}")

    @cached_property
    def selection(self) -> Selection | None:
        """The selection for all query heads."""
        return None if self.selected is None else self.selected.for_heads(self.q.shape[1])

    @property
    def n_queries(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    @property
    def groups(self) -> int:
        """Query heads to each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def no_output(self) -> Tensor:
        """Zeros in the shape of the output `(B, Hq, Nq, Dv)`."""
        return self.q.new_zeros(*self.q.shape[:3], self.v.shape[3])

    @property
    def traffic(self) -> int:
        """Bytes of q, k, v and the output, once each."""
        b, h, nq, _ = self.q.shape
        numbers = self.q.numel() + self.k.numel() + self.v.numel() + b * h * nq * self.v.shape[3]
        return numbers * self.q.element_size()

    @property
    def is_empty(self) -> bool:
        """Whether there is no query, or no key to attend to: the output is then zeros, if it has any elements."""
        return self.q.numel() == 0 or self.n_keys == 0

    @property
    def is_plain(self) -> bool:
        """Whether this is softmax over scaled dot products, which fused kernels compute."""
        return self.scoring is SOFTMAX

    def grouped(self, x: Tensor) -> Tensor:
        """Keys or values with one head to each query head (a view where the heads are equal in number)."""
        if self.groups == 1:
            return x
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.groups, n, d).reshape(b, h * self.groups, n, d)

    def tile(self, rows: slice = slice(None), cols: slice = slice(None)) -> Tile:
        device = self.q.device
        query = torch.arange(self.n_queries, device=device)[rows] + (self.n_keys - self.n_queries)
        key, mine = torch.arange(self.n_keys, device=device)[cols], self.q[:, :, rows]
        first = rows.indices(self.n_queries)[0] + self.n_keys - self.n_queries, cols.indices(self.n_keys)[0]
        return Tile(query, key, self.n_keys, self.n_queries, self.causal, mine, first)

    def tile_mask(
        self, rows: slice = slice(None), cols: slice = slice(None), mine: Tensor | None = None
    ) -> Tensor | None:
        """Mask, causality and selection together, for a tile; None where every pair counts.

        `mine` takes the place of the caller's mask for the tile, where that has been cut out already.
        """
        if mine is None:
            mine = masks.columns_of(masks.rows_of(self.mask, rows), cols)
        future = (
            masks.causal(self.n_queries, self.n_keys, rows=rows, device=self.q.device)[:, cols] if self.causal else None
        )
        chosen = self.selection.dense(rows)[..., cols] if self.selection is not None else None
        return masks.combine(mine, future, chosen)

    @property
    def wants_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.mask)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    @property
    def hides_keys(self) -> bool:
        """Whether there may be a key that some query may not see."""
        return self.mask is not None or self.selection is not None or (self.causal and self.n_queries > 1)

    def has_garbage(self) -> bool:
        """Whether keys or values hold NaN or inf: those that are hidden must then be masked value by value."""
        return not is_clean(self.k, self.v)

    def shows_no_garbage(self, out: Tensor) -> bool:
        """Whether an output proves that no key or value has put NaN or inf into it."""
        sees_all = self.mask is None and self.selection is None
        witness = out[:, :, -1] if sees_all else out  # under causality alone the last query sees every key
        return is_clean(witness)


@dataclass(frozen=True)
class StateSizes:
    """The sizes of a stream, which its empty state is made for.

    Args:
        batch: B.
        heads: Hq.
        kv_heads: Hkv.
        key_dim: D.
        value_dim: Dv.
        dtype: of the calls to come.
        device: of the calls to come.
    """

    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, call: AttentionCall) -> StateSizes:
        """The sizes of a call."""
        (b, heads, _, d), q = call.q.shape, call.q
        return cls(b, heads, call.k.shape[1], d, call.v.shape[3], q.dtype, q.device)


@dataclass(frozen=True)
class Plan:
    """What a call will cost, and why it is computed as it is.

    Args:
        engine: who computes.
        flops: multiply-adds counted as two: for the pairs that are computed, their scores and the sums over values; for
            a mechanism with a state, a token's features, reads and writes; and what it takes to choose keys. What is
            done to single numbers (activations, softmax) does not count, nor how a dense mechanism projects a token.
        bytes: least traffic: q, the output, and the keys and values that are read at all, once each.
        why: the reason for the engine, in words.
        density: share of the visible pairs that are computed.
    """

    engine: str
    flops: int
    bytes: int
    why: str
    density: float = 1.0

    def __str__(self) -> str:
        work = f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, density {self.density:.3g}"
        return f"{self.engine}: {work} ({self.why})"


def cost(call: AttentionCall, engine: str, why: str) -> Plan:
    """The `Plan` of a call on an engine."""
    (b, hq, nq, d), nk, dv = call.q.shape, call.n_keys, call.v.shape[-1]
    visible = nq * nk - (nq * (nq - 1) // 2 if call.causal else 0)
    pairs, read = float(visible), float(nk)
    selection = call.selection
    if selection is not None and not call.is_empty:
        if call.causal and isinstance(selection, Blocks):
            selection = selection.without_future
        per_query = selection.keys_read()
        pairs, read = min(nq * per_query, pairs), min(nq * per_query, read)
    numbers = call.q.numel() + b * hq * nq * dv + b * call.k.shape[1] * read * (d + dv)
    return Plan(
        engine=engine,
        flops=int(2 * b * hq * pairs * (call.scoring.score_macs(d) + dv)),
        bytes=int(numbers * call.q.element_size()),
        why=why,
        density=pairs / max(visible, 1),
    )
