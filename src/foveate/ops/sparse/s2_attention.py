"""S2-Attention: each head keeps another shard of the context, and together they keep all of it.

Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (2024), arXiv 2407.17678.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.readable import remembered
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.selective import Selective
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class S2Attention(Selective):
    """A head sees the last `local_blocks` blocks and every `stride`-th block before, at an offset of its own. Causal.

    Cost O(N (local_blocks · block + N / stride) D). A block that a head skips is never needed by that head again, so
    that its cache may drop it. A model has to be trained with it; the wrong choice for one that was not.

    Args:
        block: tokens in a block.
        local_blocks: nearest blocks that every head sees, the query's own included.
        stride: of the blocks further back, one in so many.
        shards: different offsets, each shared by neighbouring heads; one to each key/value head where None. Offsets are
            counted with this one number; the release mixes query and key/value heads, and then leaves gaps.
    """

    capabilities = replace(Selective.capabilities, patterns=CAUSAL_PATTERNS)

    def __init__(self, block: int = 64, local_blocks: int = 16, stride: int = 8, shards: int | None = None) -> None:
        super().__init__()
        for name, value in (("block", block), ("local_blocks", local_blocks), ("stride", stride), ("shards", shards)):
            validate.count(name, 1 if value is None else value, 1)
        self.block, self.local_blocks, self.stride, self.shards = block, local_blocks, stride, shards

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        heads, shards = q.shape[1], self.shards or k.shape[1]
        if heads % shards:
            raise OptionError(f"shards={shards} must divide the number of heads, Hq={heads}")
        layout = (self.block, self.local_blocks, self.stride, shards)
        return _selection(q.shape[2], k.shape[2], heads, layout, q.device)

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
    """Which key blocks j the query blocks i, from `first` on, of each shard see."""
    shard, i, j = torch.arange(shards)[:, None, None], torch.arange(first, n_blocks)[:, None], torch.arange(n_blocks)
    kept = (j + shard * max(1, stride // shards)) % stride == 0
    return (j <= i) & ((i - j < local_blocks) | kept)


def is_kv_efficient(mask: Bool[Tensor, "h i j"]) -> bool:
    """Whether no head comes back to a key block that it has once skipped, so that its cache may drop what it skips."""
    past = torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    return not bool((mask[:, 1:] & ~mask[:, :-1] & past[:-1]).any())


@remembered
def _selection(
    n_queries: int, n_keys: int, heads: int, layout: tuple[int, int, int, int], device: torch.device
) -> Blocks:
    """Tiles of queries count from the first query, blocks of the mask from the first key: a tile may lie in two."""
    block, local_blocks, stride, shards = layout
    n_blocks, size = -(-n_keys // block), (block, block)
    skipped, shift = divmod(n_keys - n_queries, block)
    mask = s2_mask(shards, n_blocks, local_blocks, stride, skipped).repeat_interleave(heads // shards, 0).to(device)
    if shift == 0:
        return Blocks(mask[None], size, n_queries, n_keys)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[h, ((q + shift) // block).clamp_max(mask.shape[1] - 1), k // block]

    tile = torch.arange(-(-n_queries // block), device=device)
    begins, ends = mask[:, tile], mask[:, (tile + 1).clamp_max(mask.shape[1] - 1)]
    return Blocks((begins | ends)[None], size, n_queries, n_keys, rule, (begins & ends)[None])
