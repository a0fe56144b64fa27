"""The attention call that every engine receives, and the plan that states its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.errors import ShapeError
from foveate.core.readable import has_shapes_alone, is_clean
from foveate.core.scoring import SOFTMAX, Scoring, Tile
from foveate.core.selection import Blocks, Selection


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A validated call: q, k, v and everything that decides which query attends to which key.

    Args:
        q: queries `(B, Hq, Nq, D)`.
        k: keys `(B, Hkv, Nk, D)`; `Hq` is a multiple of `Hkv`.
        v: values `(B, Hkv, Nk, Dv)`.
        scale: the factor on the dot products.
        mask: bool, True = may attend, or a float bias; broadcastable to `(B, Hq, Nq, Nk)`.
        causal: True = each query sees only the past; the last query sees the last key.
        selected: the keys that each query sees, for all query heads or for the heads of k.
        scoring: makes logits and turns them into weights.
        dropout: the share of weights that is dropped.
        chunk: queries and keys of a tile; None leaves the tiles to the engine.
        engine: the engine's name; see `foveate.core.engines`.
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

    @property
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
        """Query heads for each key/value head."""
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
        """True if the call has no query or no key. The output is then zeros, if it has any elements."""
        return self.q.numel() == 0 or self.n_keys == 0

    @property
    def is_plain(self) -> bool:
        """True if the scoring is the softmax over scaled dot products, which fused kernels compute."""
        return self.scoring is SOFTMAX

    def grouped(self, x: Tensor) -> Tensor:
        """Repeat the heads of keys or values for the query heads (a view if the head counts are equal)."""
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
        """Return the mask, causality and the selection of a tile as one mask, or None if every pair counts.

        `mine` is the caller's mask for the tile, if the engine has cut it out already.
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
        """True if some query may have to ignore some key."""
        return self.mask is not None or self.selection is not None or (self.causal and self.n_queries > 1)

    def has_garbage(self) -> bool:
        """Return True if keys or values hold NaN or inf. Hidden ones must then be masked value by value."""
        return not is_clean(self.k, self.v)

    def shows_no_garbage(self, out: Tensor) -> bool:
        """Return True if an output proves that no key or value has put NaN or inf into it."""
        sees_all = self.mask is None and self.selection is None
        witness = out[:, :, -1] if sees_all else out  # under causality alone the last query sees every key
        return is_clean(witness)


@dataclass(frozen=True)
class StateSizes:
    """The sizes that an empty state of a stream is made for.

    Args:
        batch: B.
        heads: Hq.
        kv_heads: Hkv.
        key_dim: D.
        value_dim: Dv.
        dtype: the dtype of the calls to come.
        device: the device of the calls to come.
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
        """Return the sizes of a call."""
        (b, heads, _, d), q = call.q.shape, call.q
        return cls(b, heads, call.k.shape[1], d, call.v.shape[3], q.dtype, q.device)


@dataclass(frozen=True)
class Plan:
    """The engine of a call, its cost, and the reason for the choice.

    Args:
        engine: the engine's name.
        flops: two for each multiply-add. They count the scores and the sums over values of the pairs that are computed,
            the features, reads and writes of a mechanism with a state, and the choice of keys. They leave out
            elementwise work (activations, softmax) and a dense mechanism's projections of tokens.
        bytes: least traffic: q, the output, and every key and value that is read, once each.
        why: the reason for the engine, in words.
        density: share of the visible pairs that are computed.
        seconds: the predicted time of the engine on this machine, with the backward pass if the call wants gradients,
            and without the choice of keys; None where nothing predicts it. `foveate bench calibrate` measures the
            machine, and shipped rates predict without it.
    """

    engine: str
    flops: int
    bytes: int
    why: str
    density: float = 1.0
    seconds: float | None = None

    def __str__(self) -> str:
        work = f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, density {self.density:.3g}"
        took = "" if self.seconds is None else f", about {1e3 * self.seconds:.3g} ms"
        return f"{self.engine}: {work}{took} ({self.why})"


def cost(call: AttentionCall, engine: str, why: str) -> Plan:
    """Return the `Plan` of a call on an engine."""
    (b, hq, nq, d), nk, dv = call.q.shape, call.n_keys, call.v.shape[-1]
    visible = nq * nk - (nq * (nq - 1) // 2 if call.causal else 0)
    pairs, read = float(visible), float(nk)
    selection = call.selection
    if selection is not None and not call.is_empty:
        if call.causal and isinstance(selection, Blocks):
            selection = selection.without_future
        per_query = selection.keys_read()
        pairs, read = min(nq * per_query, pairs), min(nq * per_query, read)
        if has_shapes_alone(call.q):
            why = f"{why}; nothing says how many keys are chosen, so the cost is the highest possible"
    numbers = call.q.numel() + b * hq * nq * dv + b * call.k.shape[1] * read * (d + dv)
    return Plan(
        engine=engine,
        flops=int(2 * b * hq * pairs * (call.scoring.score_macs(d) + dv)),
        bytes=int(numbers * call.q.element_size()),
        why=why,
        density=pairs / max(visible, 1),
    )
