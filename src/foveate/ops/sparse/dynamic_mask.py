"""Dynamic mask attention: each query sees the keys in its past that are most important, whoever asks.

Trainable Dynamic Mask Sparse Attention (2025), arXiv 2508.02124. `foveate.nn.DynamicMaskAttention` learns importances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.core.selection import Blocks, Indices, Selection
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.selective import Selective

#: Queries of a round of the selection: it holds `ROUND * (keep + ROUND)` numbers per head.
ROUND = 128


@final
class ImportantKeys(Selective):
    """Each query sees the `keep` keys of largest importance; with `causal`, of those in its past.

    The last channel of a key is its importance; it also enters the dot product (see `with_importance`). Each key/value
    head chooses for its queries, and of equally important keys the later ones are kept. Cost O(N keep D) and O(N keep)
    for the choice. A key that has left the choice never returns, so that a stream holds `keep` tokens. The wrong choice
    if it depends on the query which keys matter. A call of no more than `keep` keys is full attention. Masks hide keys
    after the choice, but keys that no query sees are not chosen.

    Args:
        keep: keys that each query sees.
    """

    capabilities = replace(Selective.capabilities, growth="N")

    def __init__(self, keep: int = 2048) -> None:
        super().__init__()
        validate.count("keep", keep, 1)
        self.keep = keep

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        n_queries, n_keys = q.shape[2], k.shape[2]
        if n_keys <= self.keep or not n_queries:
            some = torch.ones(1, 1, min(n_queries, 1), min(n_keys, 1), dtype=torch.bool, device=q.device)
            return Blocks(some, (max(n_queries, 1), max(n_keys, 1)), n_queries, n_keys)
        rank = _ranks(k)
        if not causal:
            best = rank.topk(self.keep).indices[:, :, None]
            return Indices(best, n_queries, n_keys, group=n_queries)
        found = list(self._rounds(rank, n_keys - n_queries))
        index, valid = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return Indices(index, n_queries, n_keys, valid)

    def _rounds(self, rank: Int[Tensor, "b h n"], first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys `(B, Hkv, queries, keep)` of some queries, from position `first` on, and which of them count.

        A round compares the best keys so far and the keys of its own queries.
        """
        held = rank[..., :first].topk(min(self.keep, first)).indices
        for start in range(first, rank.shape[-1], ROUND):
            at = torch.arange(start, min(start + ROUND, rank.shape[-1]), device=rank.device)
            places = torch.cat([held, at.expand(*rank.shape[:2], -1)], -1)
            mine, few = rank.gather(-1, places), min(self.keep, places.shape[-1])
            rows = mine[..., None, :].where(places[..., None, :] <= at[:, None], -1)
            best = rows.topk(few)
            index = places[..., None, :].expand(rows.shape).gather(-1, best.indices)
            yield F.pad(index, (0, self.keep - few)), F.pad(best.values >= 0, (0, self.keep - few))
            held = places.gather(-1, mine.topk(few).indices)

    def trim_state(self, state: KVState) -> KVState:
        if state.k.shape[2] <= self.keep:
            return state
        best = _ranks(state.k).topk(self.keep).indices.sort().values[..., None]
        return KVState(*(x.gather(2, best.expand(-1, -1, -1, x.shape[3])) for x in (state.k, state.v)))

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        return cls(max(1, round(budget * length)))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(max(1, length // 4))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(max(1, length))


def dynamic_mask_attention(
    q: Float[Tensor, "b hq nq d"], k: Float[Tensor, "b hkv nk d"], v: Float[Tensor, "b hkv nk dv"],
    bias: Float[Tensor, "b hkv nk"], keep: int = 2048, causal: bool = True, *, mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b hq nq dv"]:  # fmt: skip
    """Return `softmax(q kᵀ · scale + bias) v` over the `keep` keys of largest bias that each query may see.

    Args:
        q, k, v, mask, causal, scale: as for every operator.
        bias: a number for each key of each key/value head, as `DynamicMaskAttention.importance` gives it.
        keep: keys that each query sees.
    """
    validate.tensors(q, k, v, mask, causal)
    if not isinstance(bias, Tensor) or bias.shape != k.shape[:3]:
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ShapeError(f"bias must be (B, Hkv, Nk)={tuple(k.shape[:3])}; got {got}")
    scale = validate.scale(scale, q.shape[-1])
    asks, keys = with_importance(q, k, bias, scale)
    out = ImportantKeys(keep)(asks, keys, v, mask=mask, causal=causal, scale=scale)
    assert isinstance(out, Tensor)
    return out


def with_importance(
    q: Float[Tensor, "b hq nq d"], k: Float[Tensor, "b hkv nk d"], importance: Float[Tensor, "b hkv nk"], scale: float
) -> tuple[Float[Tensor, "b hq nq e"], Float[Tensor, "b hkv nk e"]]:
    """Return q and k with one more channel each, so that `scale * q k` has the importance of the key added."""
    return F.pad(q, (0, 1), value=1 / scale), torch.cat([k, importance[..., None].to(k.dtype)], -1)


def _ranks(k: Float[Tensor, "b h n d"]) -> Int[Tensor, "b h n"]:
    """Return each key's place in the order of importance, from 0: of equal keys the later one is more important.

    A key of zeros, which stands for a hidden one, comes before all others.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    importance = k[..., -1].to(wide).masked_fill((k == 0).all(-1), -torch.inf)
    return importance.argsort(dim=-1, stable=True).argsort(-1)
