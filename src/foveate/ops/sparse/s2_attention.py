"""S2-Attention: each head keeps another shard of the context, and together they keep all of it.

Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (2024), arXiv 2407.17678.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError
from foveate.core.readable import remembered
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.selective import Selective
from foveate.ops.operator import CAUSAL_PATTERNS


@final
@dataclass(frozen=True)
class S2State(KVState):
    """The keys and values that some query head of each key/value head still needs.

    Args:
        k, v: as in `KVState`; a head that needs fewer tokens than another has zeros in its empty slots.
        places: each slot's position in the sequence, on the CPU; -1 for an empty slot.
        seen: tokens so far.
    """

    places: Int[Tensor, "hkv n"]
    seen: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Self:
        return cls(k, v, torch.arange(k.shape[2], device="cpu").expand(k.shape[1], -1), k.shape[2])

    def append(self, k: Tensor, v: Tensor) -> S2State:
        joined, last = super().append(k, v), self.seen + k.shape[2]
        new = torch.arange(self.seen, last, device="cpu").expand(k.shape[1], -1)
        return S2State(joined.k, joined.v, torch.cat([self.places, new], 1), last)

    def only(self, kept: Bool[Tensor, "hkv n"]) -> S2State:
        """Return the state with some slots of each head, in order; their numbers may differ by head."""
        count = int(kept.sum(-1).max())
        order = kept.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
        held = kept.gather(1, order)
        at, there = order.to(self.k.device)[None, :, :, None], held.to(self.k.device)[None, :, :, None]
        k, v = (x.gather(2, at.expand(len(x), -1, -1, x.shape[3])).where(there, 0.0) for x in (self.k, self.v))
        return replace(self, k=k, v=v, places=self.places.gather(1, order).where(held, -1))


@final
class S2Attention(Selective):
    """A head sees the last `local_blocks` blocks and every `stride`-th block before, at its own offset. Causal.

    Cost O(N (local_blocks · block + N / stride) D). A block that a head skips is never needed by that head again, so
    that a stream drops it: a key/value head holds about `local_blocks · block + N / stride` tokens. A model has to be
    trained with it; the wrong choice for one that was not.

    Args:
        block: tokens in a block.
        local_blocks: nearest blocks that every head sees, the query's own included.
        stride: one block in `stride` is seen further back.
        shards: different offsets, each shared by neighbouring heads; None for one per key/value head. Offsets count
            with this one number; the release mixes query and key/value heads, which leaves gaps.
        dense_heads: number of last key/value heads that see the whole past, for all of their queries, as in the
            release.
    """

    capabilities = replace(Selective.capabilities, patterns=CAUSAL_PATTERNS)
    state_type: ClassVar[type[KVState]] = S2State

    def __init__(
        self, block: int = 64, local_blocks: int = 16, stride: int = 8, shards: int | None = None, dense_heads: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("block", block), ("local_blocks", local_blocks), ("stride", stride), ("shards", shards)):
            validate.count(name, 1 if value is None else value, 1)
        validate.count("dense_heads", dense_heads, 0)
        self.block, self.local_blocks, self.stride, self.shards = block, local_blocks, stride, shards
        self.dense_heads = dense_heads

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        heads, kv_heads = q.shape[1], k.shape[1]
        shards = self._shards(heads, kv_heads)
        layout = (self.block, self.local_blocks, self.stride, shards, self.dense_heads * heads // kv_heads)
        return _selection(q.shape[2], k.shape[2], heads, layout, q.device)

    def _shards(self, heads: int, kv_heads: int) -> int:
        """Return the number of different offsets among so many heads."""
        shards = self.shards or kv_heads
        if heads % shards:
            raise OptionError(f"shards={shards} must divide the number of heads, Hq={heads}")
        if self.dense_heads > kv_heads:
            raise OptionError(f"dense_heads={self.dense_heads} must be at most Hkv={kv_heads}")
        return shards

    # -- a stream ------------------------------------------------------------------------------------------------------

    def trim_state(self, state: KVState) -> KVState:
        assert isinstance(state, S2State)
        kv_heads = state.k.shape[1]
        heads = math.lcm(kv_heads, self.shards or kv_heads)  # enough for any number of query heads
        needed = self._needed(state, heads).unflatten(0, (kv_heads, -1)).any(1)
        return state if bool(needed.all()) else state.only(needed)

    def _resumed(self, call: AttentionCall, state: S2State) -> AttentionCall:
        needed = self._needed(state, call.q.shape[1])
        mask = None if bool(needed.all()) else needed[None, :, None].to(call.q.device)
        return replace(call, k=state.k, v=state.v, mask=mask)

    def _needed(self, state: S2State, heads: int) -> Bool[Tensor, "h n"]:
        """Return the slots that each of so many query heads reads at the last position."""
        kv_heads = state.places.shape[0]
        shards, groups = self._shards(heads, kv_heads), heads // kv_heads
        shard = torch.arange(heads, device="cpu")[:, None] // (heads // shards)
        places = state.places.repeat_interleave(groups, 0)
        key_block, query_block = places // self.block, (state.seen - 1) // self.block
        read = _sees(shard, query_block, key_block, shards, self.local_blocks, self.stride)
        read[heads - self.dense_heads * groups :] = True
        return read & (places >= 0)

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        local = max(1, round(budget / 2 * length / 64))
        return cls(local_blocks=local, stride=max(1, round(2 / budget - 1)))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=2, local_blocks=1, stride=2, shards=1 if heads % 2 else 2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=4, local_blocks=1, stride=1)


def s2_mask(
    shards: int, n_blocks: int, local_blocks: int = 16, stride: int = 8, first: int = 0
) -> Bool[Tensor, "h i j"]:
    """Return the key blocks j that the query blocks i of each shard see, from `first` on."""
    shard, i, j = torch.arange(shards)[:, None, None], torch.arange(first, n_blocks)[:, None], torch.arange(n_blocks)
    return (j <= i) & _sees(shard, i, j, shards, local_blocks, stride)


def _sees(
    shard: Tensor, i: Tensor | int, j: Tensor, shards: int, local_blocks: int, stride: int
) -> Bool[Tensor, "..."]:
    """Return True if query block i of a shard sees key block j, which is not later."""
    return (i - j < local_blocks) | ((j + shard * max(1, stride // shards)) % stride == 0)


def is_kv_efficient(mask: Bool[Tensor, "h i j"]) -> bool:
    """Return True if no head reads a key block again that it has skipped, so that its cache may drop skipped blocks."""
    if mask.dim() != 3:
        raise ShapeError(f"mask must be (H, query blocks, key blocks); got {tuple(mask.shape)}")
    past = torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    return not bool((mask[:, 1:] & ~mask[:, :-1] & past[:-1]).any())


@remembered
def _selection(
    n_queries: int, n_keys: int, heads: int, layout: tuple[int, int, int, int, int], device: torch.device
) -> Blocks:
    """Make the selection; tiles count from the first query and mask blocks from the first key, so they may overlap."""
    block, local_blocks, stride, shards, dense = layout
    n_blocks, size = -(-n_keys // block), (block, block)
    skipped, shift = divmod(n_keys - n_queries, block)
    mask = s2_mask(shards, n_blocks, local_blocks, stride, skipped).repeat_interleave(heads // shards, 0)
    mask = torch.cat([mask[: heads - dense], s2_mask(1, n_blocks, n_blocks, 1, skipped).expand(dense, -1, -1)])
    mask = mask.to(device)
    if shift == 0:
        return Blocks(mask[None], size, n_queries, n_keys)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[h, ((q + shift) // block).clamp_max(mask.shape[1] - 1), k // block]

    tile = torch.arange(-(-n_queries // block), device=device)
    begins, ends = mask[:, tile], mask[:, (tile + 1).clamp_max(mask.shape[1] - 1)]
    return Blocks((begins | ends)[None], size, n_queries, n_keys, rule, (begins & ends)[None])
