"""SALE: logits of 4 bits find the tiles that hold a key which matters next to the sink and the local window.

SALE : Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (2025), arXiv 2505.24179.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.selective import Selective
from foveate.ops.functional.low_bit import LowBit, low_bit
from foveate.ops.functional.stripes import finite
from foveate.ops.operator import CAUSAL_PATTERNS

#: Queries that are handled together, and estimated logits that may be held at a time.
ROWS, SLAB = 256, 1 << 21
#: A level that no logit reaches; its negative is one that all reach.
NEVER = 1e30


@final
class SALE(Selective):
    """A tile of keys is kept if one of its logits, estimated from 4 bits, is large next to the nearest keys. Causal.

    Each query computes exactly how much it attends to the first tile of keys and to the last `local` keys. A key
    matters if its estimated `exp(logit)` is more than `threshold` of that sum; a tile of `block_q` queries and
    `block_k` keys is kept if one pair in it matters. It looks at every pair, and so finds single keys that averages
    hide. Needs no training; `foveate.kv.sale_calibrate` finds thresholds for a model's heads. O(N² D) for the choice,
    which is cheap only with hardware for 4-bit products. There is none here: the numbers are rounded and stay floats,
    and on a CPU choosing takes most of the time of dense attention. So the wrong choice for speed.

    Args:
        threshold: one number, or one for each query head `(Hq,)`; 0 keeps everything.
        block_q: queries in a tile.
        block_k: keys in a tile.
        local: last keys that are always kept, at least; their tiles are kept whole. The release rounds up to segments.
        bits: bits of a rounded number, its sign included.
        dense: calls of up to so many keys see every key. So do calls with fewer queries than a tile, as when decoding.

    The rounding takes means over all tokens of a call, so that a later token may change which keys an earlier query
    sees. A row's rounding has a scale of its own (the release's mode 2).
    """

    threshold: Tensor | float
    capabilities = replace(
        Selective.capabilities, patterns=CAUSAL_PATTERNS, streaming="own", selection_group=None,
        transforms=frozenset({"meta", "export"}),
    )  # fmt: skip

    def __init__(
        self, threshold: float | Tensor = 0.004, block_q: int = 64, block_k: int = 32, local: int = 128, bits: int = 4,
        dense: int = 1024,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("block_q", block_q), ("block_k", block_k), ("local", local)):
            validate.count(name, value, 1)
        validate.count("dense", dense)
        validate.count("bits", bits, 2)
        validate.between("bits", bits, 2, 16)
        if isinstance(threshold, Tensor):
            if threshold.dim() != 1 or not bool((threshold >= 0).all()):
                raise OptionError(f"threshold={shown(threshold)} must be (Hq,), and no number below 0")
            self.register_buffer("threshold", threshold.detach().clone())
        else:
            validate.between("threshold", threshold, 0.0, float("inf"))
            self.threshold = float(threshold)
        self.block_q, self.block_k, self.local, self.bits, self.dense = block_q, block_k, local, bits, dense

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection | None:
        log_threshold = self._log_threshold(q)
        n_queries, n_keys = q.shape[2], k.shape[2]
        if self._is_dense(n_queries, n_keys):
            return None
        q, k = finite(q) * scale, finite(k)
        smooth = k - k.mean(2, keepdim=True)
        factors = low_bit(q, smooth, self.bits)
        kept = []
        for rows in self._bands(n_queries, n_keys, q.device):
            level = rows.near_sum(q, smooth) + log_threshold
            far = rows.above(factors, level.clamp(-NEVER, NEVER))
            kept.append(rows.always | (far & rows.far))
        return Blocks(torch.cat(kept, 2), (self.block_q, self.block_k), n_queries, n_keys)

    def _is_dense(self, n_queries: int, n_keys: int) -> bool:
        return n_queries < self.block_q or n_keys <= self.dense

    def _log_threshold(self, q: Tensor) -> Tensor:
        """Return the log of each head's threshold, `(1 or Hq, 1)`."""
        if isinstance(self.threshold, Tensor) and len(self.threshold) != q.shape[1]:
            raise ShapeError(
                f"threshold must have one number for each query head, (Hq,)=({q.shape[1]},); "
                f"got {tuple(self.threshold.shape)}"
            )
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.as_tensor(self.threshold, dtype=wide, device=q.device).log().reshape(-1, 1)

    def _bands(self, n_queries: int, n_keys: int, device: torch.device) -> Iterator[Band]:
        step = max(1, ROWS // self.block_q) * self.block_q
        for start in range(0, n_queries, step):
            stop = min(start + step, n_queries)
            yield Band(start, stop, n_queries, n_keys, self.block_q, self.block_k, self.local, device)

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        (b, h, n_queries, width), n_keys = q.shape, k.shape[2]
        if self._is_dense(n_queries, n_keys):
            return 0
        found = n_keys * width  # the keys times the mean query
        for band in self._bands(n_queries, n_keys, q.device):
            found += (band.stop - band.start) * band.near_count * width
            found += band.padded * band.far_count * (width + 2)
        return b * h * found

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(threshold=0.8, block_q=2, block_k=2, local=2, dense=1)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(threshold=0.0, block_q=2, block_k=2, local=2, dense=1)


class Band(NamedTuple):
    """Some block rows of queries, from one query on and up to another.

    Args:
        start, stop: the queries, counted from the first; `start` begins a block row.
        n_queries, n_keys: of the call.
        tall, wide: queries and keys in a tile.
        local: last keys that are always kept.
        device: of the call.
    """

    start: int
    stop: int
    n_queries: int
    n_keys: int
    tall: int
    wide: int
    local: int
    device: torch.device

    @property
    def first(self) -> int:
        """The position of the first query among the keys."""
        return self.start + self.n_keys - self.n_queries

    @property
    def padded(self) -> int:
        """The queries with those that fill up the last block row."""
        return -(-(self.stop - self.start) // self.tall) * self.tall

    @property
    def near_start(self) -> int:
        """The first key of the first local tile of the band."""
        return max(0, self.first - self.local + 1) // self.wide * self.wide

    @property
    def near_count(self) -> int:
        """The keys for which the band computes exact logits."""
        return min(self.wide, self.near_start) + self.first + self.stop - self.start - self.near_start

    @property
    def far_count(self) -> int:
        """The keys for which the band estimates logits: those from the second tile to the last row's local ones."""
        last = self.first + self.padded - self.tall
        return max(0, max(0, last - self.local + 1) // self.wide * self.wide - self.wide)

    @property
    def local_tiles(self) -> tuple[Tensor, Tensor]:
        """The first and the last local tile of each block row, `(rows, 1)`."""
        at = torch.arange(self.first, self.first + self.padded, self.tall, device=self.device)[:, None]
        last = (at + self.tall - 1).clamp_max(self.n_keys - 1)
        return (at - self.local + 1).clamp_min(0) // self.wide, last // self.wide

    @property
    def tiles(self) -> Tensor:
        return torch.arange(-(-self.n_keys // self.wide), device=self.device)

    @property
    def always(self) -> Bool[Tensor, "i j"]:
        """The tiles that are always kept: the first one, and the local ones."""
        low, high = self.local_tiles
        return (self.tiles == 0) | ((self.tiles >= low) & (self.tiles <= high))

    @property
    def far(self) -> Bool[Tensor, "i j"]:
        """The tiles that are kept where a logit is large."""
        return self.tiles < self.local_tiles[0]

    def near_sum(self, q: Tensor, k: Tensor) -> Float[Tensor, "b h r"]:
        """Return the log of the sum of exponentials of the exact logits over the tiles that are always kept."""
        queries, groups = q[:, :, self.start : self.stop], q.shape[1] // k.shape[1]
        end = self.first + self.stop - self.start
        ends = (0, min(self.wide, self.near_start)), (self.near_start, end)
        place = torch.cat([torch.arange(*each, device=self.device) for each in ends])
        logits = queries.unflatten(1, (-1, groups)).flatten(2, 3) @ k[:, :, place].transpose(2, 3)
        tile = self.always[:, place // self.wide].repeat_interleave(self.tall, 0)[: self.stop - self.start]
        seen = tile & (place <= torch.arange(self.first, end, device=self.device)[:, None])
        return logits.unflatten(2, (groups, -1)).masked_fill(~seen, masks.NEG_INF).logsumexp(-1).flatten(1, 2)

    def above(self, factors: LowBit, level: Float[Tensor, "b h r"]) -> Bool[Tensor, "b h i j"]:
        """Return the tiles with an estimated logit above its query's level; tiles outside of the far ones are False.

        The level rides along as one more channel, so that a tile only has to be searched for a number above 0.
        """
        rows = torch.cat([factors.queries[:, :, self.start : self.stop], -level[..., None]], -1)
        rows = F.pad(rows, (0, 0, 0, self.padded - rows.shape[2]))  # zeros are above no level
        end = self.wide + self.far_count
        step = max(1, SLAB // max(1, rows.shape[:3].numel()) // self.wide) * self.wide
        found = [torch.zeros(*rows.shape[:2], self.padded // self.tall, 1, dtype=torch.bool, device=rows.device)]
        for start in range(self.wide, end, step):
            keys = F.pad(factors.keys[:, :, start : min(start + step, end)], (0, 1), value=1.0)
            best = (rows @ keys.transpose(2, 3)).unflatten(2, (-1, self.tall)).amax(3)
            found.append((best > 0).unflatten(-1, (-1, self.wide)).any(-1))
        some = torch.cat(found, -1)
        return F.pad(some, (0, len(self.tiles) - some.shape[-1]))
