"""FlexPrefill: each head gets its own pattern, and as many keys as it takes to cover a share of its attention.

FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (2025), arXiv 2502.20766.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.readable import known
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.selective import Selective
from foveate.ops.functional import stripes
from foveate.ops.functional.stripes import Mass
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class FlexPrefill(Selective):
    """Columns and diagonals, or blocks of its own for each block of queries: each head what its prompt asks for.

    The last `block` queries attend to all keys. If averaged keys predict their attention well (distance under `tau`),
    the head is "query-aware": averaged queries choose blocks of keys by averaged keys. If not, it is "vertical-slash":
    all queries read the columns and the diagonals that hold the last queries' attention. Both take what they need to
    cover a share `gamma`, so that the number of keys follows head and prompt. O(N block) for the choice, and
    O(N² / block²) for query-aware heads. Needs no training. The wrong choice for short prompts, which are dense, and
    for what only early queries look for.

    Args:
        gamma: share of attention to cover; 1 keeps every key.
        tau: heads with a smaller distance are query-aware; 0 is for none, and 1 for all.
        min_budget: least tokens of columns, and of diagonals.
        max_budget: most tokens of each, in vertical-slash heads; None is no limit.
        block: tokens in a block. Calls of up to two blocks of queries see every key, as do those of up to `min_budget`
            keys; so decoding is dense.

    The choice follows the last queries, so that a later token changes which keys an earlier query sees. As in the
    release, the first column and the nearest diagonal count within the budget, and a query-aware head leaves out the
    block that would cross `gamma`. The release counts blocks of 128 tokens for any size of `block`, so that `gamma=1`
    does not keep everything with smaller ones; here it does. Diagonals pass through two tiles of each row, and both are
    read here; the release reads the later one alone, which can miss nearly all of a diagonal's pairs.
    """

    capabilities = replace(
        Selective.capabilities, patterns=CAUSAL_PATTERNS, streaming="own", selection_group=None,
        transforms=frozenset({"meta", "export"}),
    )  # fmt: skip

    def __init__(
        self, gamma: float = 0.9, tau: float = 0.1, min_budget: int = 512, max_budget: int | None = None,
        block: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.between("gamma", gamma, 0.0, 1.0)
        validate.between("tau", tau, 0.0, 1.0)
        validate.count("min_budget", min_budget, 1)
        validate.count("block", block, 1)
        if max_budget is not None:
            validate.count("max_budget", max_budget, 1)
            if max_budget < min_budget:
                raise OptionError(f"max_budget={max_budget} must be at least min_budget={min_budget}, or None")
        self.gamma, self.tau, self.block = gamma, tau, block
        self.min_budget, self.max_budget = min_budget, max_budget

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection | None:
        n_queries, n_keys, block = q.shape[2], k.shape[2], self.block
        if self._is_dense(n_queries, n_keys):
            return None
        q, k = stripes.finite(q), stripes.finite(k)
        mass = stripes.last_queries(q, k, block, scale)
        pooled = Mass(*(stripes.pooled(each, block) for each in mass))
        average = stripes.means(k, block).repeat_interleave(q.shape[1] // k.shape[1], 1)
        aware = self.distance(q, average, pooled.columns, scale) < self.tau
        columns, diagonals = (
            stripes.largest(summed, self._blocks(each).masked_fill(aware, -(-self.min_budget // block)), 1)
            for summed, each in zip(pooled, mass, strict=True)
        )
        tiles = stripes.tiles_of(columns, diagonals, n_queries, n_keys, block)
        if known(aware.any()) is not False:
            tiles = tiles | (self._by_query(q, average, n_keys, scale) & aware[..., None, None])
        return Blocks(tiles, (block, block), n_queries, n_keys)

    def distance(
        self, q: Tensor, average: Float[Tensor, "b h n d"], columns: Float[Tensor, "b h n"], scale: float
    ) -> Float[Tensor, "b h"]:
        """Return how far averaged keys are from predicting the last queries' attention: 0 (exactly) to 0.83.

        It is the square root of the Jensen-Shannon divergence, in nats, between the softmax of the mean of the last
        queries over the averaged keys of each block, and the true mass of the blocks.
        """
        mean = q[:, :, -self.block :].mean(2, keepdim=True)
        guess = ((mean * scale) @ average.transpose(2, 3)).softmax(-1)[:, :, 0]
        middle = (guess + columns) / 2
        one, other = (torch.xlogy(p, p) - torch.xlogy(p, middle) for p in (guess, columns))
        return ((one + other).sum(-1) / 2).clamp_min(0.0).sqrt()

    def _is_dense(self, n_queries: int, n_keys: int) -> bool:
        return n_queries <= 2 * self.block or n_keys <= -(-self.min_budget // self.block) * self.block

    def _blocks(self, mass: Float[Tensor, "b h k"]) -> Tensor:
        """Return the blocks `(B, Hq)` that a vertical-slash head takes of columns, or of diagonals."""
        count = stripes.covering(mass, self.gamma) // self.block + 1
        most = None if self.max_budget is None else -(-self.max_budget // self.block)
        return count.clamp(-(-self.min_budget // self.block), most)

    def _by_query(self, q: Tensor, average: Tensor, n_keys: int, scale: float) -> Bool[Tensor, "b h m n"]:
        """Return the tiles of the largest shares in the attention of averaged queries to averaged keys.

        Every row of tiles sums to 1; the shares of all rows are sorted together.
        """
        queries = stripes.means(q, self.block)
        last = stripes.last_own(q.shape[2], n_keys, self.block, q.device)
        future = torch.arange(average.shape[2], device=q.device) > last
        shares = ((queries * scale) @ average.transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1)
        if self.gamma >= 1:
            return ~future.expand(shares.shape)
        ranked, order = shares.flatten(2).sort(-1, descending=True)
        kept = ranked.cumsum(-1) <= self.gamma * shares.shape[2]
        return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, shares.shape[2:])

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        """Count the probe, its estimate, and, as if some head were query-aware, the attention of averaged queries."""
        (b, h, n_queries, width), n_keys = q.shape, k.shape[2]
        if self._is_dense(n_queries, n_keys):
            return 0
        rows, columns = (-(-n // self.block) for n in (n_queries, n_keys))
        return b * h * width * (self.block * n_keys + (1 + rows) * columns)

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        """See `Operator.at_budget`. Columns and diagonals take up to half of the budget each; blocks have no limit."""
        half = max(1, round(budget / 2 * length))
        return cls(min_budget=min(512, half), max_budget=half)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(gamma=0.6, tau=0.3, min_budget=2, block=2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(gamma=1.0, min_budget=2, block=2)
