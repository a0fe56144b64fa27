"""HiP: a tree search for the important keys, one for each block of queries.

HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning (2024), arXiv 2406.09827.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.selection import Indices, Selection
from foveate.ops.base.selective import Selective
from foveate.ops.operator import CAUSAL_PATTERNS

#: Elements of keys that one round of the search may hold at a time.
SLAB = 1 << 23


@final
class HiP(Selective):
    """A search by halves finds the `keep` keys that a block of queries attends to. Causal, needs no training.

    The keys are cut into `keep / block_k` chunks. Each round halves the chunks, scores every half by one representative
    block of keys, and keeps the better ones. Cost O(N keep log(N / keep)) for the search and O(N keep) for the
    attention. It finds important keys if neighbouring keys have similar scores; the wrong choice if they do not, and
    for a single key among unrelated ones.

    Args:
        keep: keys for each block of queries; a multiple of `block_k`.
        block_q: queries that share a choice. In a causal call no query sees a later token, but the later queries of its
            block influence the block's choice (`Capabilities.selection_group`). When decoding, each query chooses
            alone.
        block_k: keys in the smallest chunk.
        rep: the block that represents a chunk: its "first" (the authors' v1.1 code) or its "middle" (the paper's text).
        sinks: first keys that are kept in addition (v1.1: 256).
        window: last keys that are kept in addition and not searched (v1.1: 1024).

    The v1.1 draft scores only every second query, and pairs in the future too; here it is all queries and only the
    past. The host decides whether to reuse a choice for several decoding steps and to keep the first layers dense.
    """

    capabilities = replace(Selective.capabilities, patterns=CAUSAL_PATTERNS, growth="N log N", streaming="own")

    def __init__(
        self,
        keep: int = 512,
        block_q: int = 32,
        block_k: int = 2,
        rep: Literal["first", "middle"] = "first",
        sinks: int = 0,
        window: int = 0,
    ) -> None:
        super().__init__()
        validate.count("block_q", block_q, 1)
        validate.count("block_k", block_k, 1)
        validate.count("keep", keep, block_k)
        validate.count("sinks", sinks)
        validate.count("window", window)
        validate.one_of("rep", rep, ("first", "middle"))
        if keep % block_k:
            raise OptionError(f"keep={keep} must be a multiple of block_k={block_k}")
        self.keep, self.block_q, self.block_k, self.rep = keep, block_q, block_k, rep
        self.sinks, self.window = sinks, window
        self._declare(selection_group=block_q)

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        n_queries, n_keys = q.shape[2], k.shape[2]
        if not n_queries:
            return Indices(torch.zeros(1, 1, 0, 1, dtype=torch.long, device=q.device), 0, n_keys)
        found = [self._choose(q, k, groups, chunks) for groups, chunks in self._slabs(q, k)]
        indices, valid = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return Indices(indices, n_queries, n_keys, valid, self._group(n_queries))

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        found, (b, h, n_queries, width) = 0, q.shape
        for groups, chunks in self._slabs(q, k):
            queries = len(groups) * self._group(n_queries)
            rounds = self._rounds(groups[-1], n_queries, k.shape[2], chunks)
            found += b * h * queries * width * rounds * 2 * chunks * self.block_k
        return found

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        return cls(keep=2 * max(1, round(budget * length / 2)))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(keep=4, block_q=2, sinks=1, window=2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(keep=length + length % 2)

    def _group(self, n_queries: int) -> int:
        """Return the queries in a group."""
        return min(self.block_q, max(n_queries, 1))

    def _slabs(self, q: Tensor, k: Tensor) -> Iterator[tuple[range, int]]:
        """Yield groups that are searched together, with the chunks that each of them starts from."""
        b, h, n_queries, width = q.shape
        n_groups = -(-n_queries // self._group(n_queries))
        chunks = min(self.keep, k.shape[2] + self.block_k - 1) // self.block_k
        step = max(1, SLAB // max(1, 2 * b * h * width * chunks * self.block_k))
        for start in range(0, n_groups, step):
            yield range(start, min(start + step, n_groups)), chunks

    def _rows(self, groups: Tensor, n_queries: int) -> Tensor:
        """Return the queries `(G, group)` of some groups; the last query fills up a short group."""
        group = self._group(n_queries)
        return (groups[:, None] * group + torch.arange(group, device=groups.device)).clamp_max(n_queries - 1)

    def _range(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return start and end of the keys that groups at `at (G, group)` search, and the end of the keys they see."""
        stop = at[:, -1:] + 1
        high = (at[:, :1] - self.window + 1).clamp_min(self.sinks).minimum(stop) if self.window else stop
        return high.clamp_max(self.sinks), high, stop

    def _rounds(self, group: int, n_queries: int, n_keys: int, chunks: int) -> int:
        """Return the halvings until the largest chunk of this group, and so of all before it, is one block."""
        first, shift = group * self._group(n_queries), n_keys - n_queries
        stop = min(first + self._group(n_queries), n_queries) + shift
        high = min(max(first + shift - self.window + 1, self.sinks), stop) if self.window else stop
        blocks = -(-(high - min(high, self.sinks)) // self.block_k)
        return math.ceil(math.log2(max(-(-blocks // chunks), 1)))

    def _choose(self, q: Tensor, k: Tensor, groups: range, chunks: int) -> tuple[Tensor, Tensor]:
        """Return indices `(B, Hq, G, n)` of the keys that some groups keep, and a mask of those that count."""
        n_queries, n_keys = q.shape[2], k.shape[2]
        rows = self._rows(torch.arange(groups.start, groups.stop, device=q.device), n_queries)
        at = rows + n_keys - n_queries
        low, high, stop = self._range(at)
        part = Part(q[:, :, rows], k, at, low, high, self.block_k)
        sinks = torch.arange(self.sinks, device=q.device).expand(len(groups), -1)
        window = high + torch.arange(self.window + rows.shape[1] - 1 if self.window else 0, device=q.device)
        found = self._search(part, chunks, self._rounds(groups[-1], n_queries, n_keys, chunks))
        index = torch.cat([x.expand(*found.shape[:3], x.shape[-1]) for x in (sinks, found, window)], -1)
        limits = ((low, self.sinks), (high, found.shape[3]), (stop, window.shape[1]))
        limit = torch.cat([end.expand(-1, n) for end, n in limits], 1)
        return index.clamp(0, n_keys - 1), (index < limit) & (index >= 0)

    def _search(self, part: Part, chunks: int, rounds: int) -> Tensor:
        """Return the keys `(B, Hq, G, chunks * block_k)` that are left when every chunk is one block; -1 for none."""
        n_blocks = -(-(part.high - part.low) // self.block_k)
        bounds = torch.arange(chunks + 1, device=n_blocks.device) * n_blocks // chunks
        start, size = (x.expand(*part.q.shape[:3], chunks) for x in (bounds[:, :-1], bounds.diff(dim=-1)))
        for _ in range(rounds):
            half = size // 2
            start = torch.stack([start, start + half], -1).flatten(-2)
            size = torch.stack([half, size - half], -1).flatten(-2)
            stands = start + size // 2 if self.rep == "middle" else start
            best = part.scores(stands, size > 0).topk(chunks).indices
            start, size = start.gather(-1, best), size.gather(-1, best)
        return part.keys(start).masked_fill((size == 0)[..., None], -1).flatten(-2)


class Part(NamedTuple):
    """Some groups of queries and the range of keys that each of them searches."""

    q: Tensor  # (B, Hq, G, group, D)
    k: Tensor  # (B, Hkv, Nk, D)
    at: Tensor  # (G, group) positions of the queries among the keys
    low: Tensor  # (G, 1) first key of the range
    high: Tensor  # (G, 1) end of the range
    block: int

    def keys(self, blocks: Tensor) -> Tensor:
        """Return positions `(..., G, n, block)` of the keys of blocks `(..., G, n)`, which count from `low`."""
        offset = torch.arange(self.block, device=blocks.device)
        return self.low[..., None] + blocks[..., None] * self.block + offset

    def scores(self, blocks: Tensor, real: Tensor) -> Tensor:
        """Return the largest `q . k` of each block over the queries of its group and the keys that these may see."""
        b, h, _, _, d = self.q.shape
        keys = self.keys(blocks).flatten(-2)
        batch = torch.arange(b, device=keys.device)[:, None, None, None]
        head = torch.arange(h, device=keys.device)[:, None, None] // (h // self.k.shape[1])
        chosen = self.k[batch, head, keys.clamp_max(self.k.shape[2] - 1)]
        wide = torch.promote_types(self.q.dtype, torch.float32)
        logits = self.q.to(wide) @ chosen.to(wide).transpose(-1, -2)
        hidden = (keys >= self.high)[..., None, :] | (keys[..., None, :] > self.at[..., None])
        best = logits.masked_fill(hidden, float("-inf")).amax(-2).unflatten(-1, (-1, self.block)).amax(-1)
        return best.masked_fill(~real, float("-inf"))
