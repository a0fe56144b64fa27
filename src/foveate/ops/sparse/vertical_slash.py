"""Vertical-slash: a fixed number of columns and diagonals, chosen by the attention of the last queries of a prompt.

MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024), arXiv 2407.02490.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self, final

from torch import Tensor

from foveate.core import validate
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.selective import Selective
from foveate.ops.functional import stripes
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class VerticalSlash(Selective):
    """Queries see the same keys (columns) and the same distances (diagonals), each head its own. Needs no training.

    The last `probe` queries attend to all keys. Their mass, summed by key and by distance, ranks columns and diagonals,
    and the largest are read for all queries: O(N probe) for the choice, O(N (vertical + slash)) for the attention. The
    wrong choice for a head whose important keys change from query to query, and for what only early queries look for.

    Args:
        vertical: budget of columns in tokens, the sinks included.
        slash: budget of diagonals in tokens, the recent ones included.
        probe: last queries whose attention is computed. A call with no more queries sees every key; so decoding is
            dense.
        block: tokens in a block. Budgets are rounded up to blocks.
        sinks: first columns that are always read.
        recent: nearest diagonals that are always read.

    The choice follows the last queries, so that a later token changes which keys an earlier query sees. The release
    reads single columns, and its search gives each head budgets of its own, or another pattern; here columns and
    diagonals are chosen in blocks, so that whole tiles are read, and budgets are equal. The release's defaults are kept
    (1000 and 6096 for every head that its search has no result for).
    """

    capabilities = replace(
        Selective.capabilities, patterns=CAUSAL_PATTERNS, streaming="own", selection_group=None,
        transforms=frozenset({"meta", "export"}), growth="N",
    )  # fmt: skip

    def __init__(
        self, vertical: int = 1000, slash: int = 6096, probe: int = 64, block: int = 64, sinks: int = 30,
        recent: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("vertical", vertical), ("slash", slash), ("probe", probe), ("block", block)):
            validate.count(name, value, 1)
        validate.count("sinks", sinks)
        validate.count("recent", recent, 1)
        self.vertical, self.slash, self.probe, self.block = vertical, slash, probe, block
        self.sinks, self.recent = sinks, recent

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection | None:
        n_queries, n_keys, block = q.shape[2], k.shape[2], self.block
        if n_queries <= self.probe:
            return None
        mass = stripes.last_queries(stripes.finite(q), stripes.finite(k), self.probe, scale)
        columns = self._largest(mass.columns, self.vertical, self.sinks)
        diagonals = self._largest(mass.diagonals, self.slash, self.recent)
        tiles = stripes.tiles_of(columns, diagonals, n_queries, n_keys, block)
        return Blocks(tiles, (block, block), n_queries, n_keys)

    def _largest(self, mass: Tensor, budget: int, forced: int) -> Tensor:
        """Return the blocks `(B, Hq, n)` with the largest mass; a budget and what is forced are in tokens."""
        blocks = (math.ceil(tokens / self.block) for tokens in (budget, forced))
        return stripes.largest(stripes.pooled(mass, self.block), *blocks)

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        b, h, n_queries, width = q.shape
        return 0 if n_queries <= self.probe else b * h * self.probe * k.shape[2] * width

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        half = max(1, round(budget / 2 * length))
        return cls(half, half)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(vertical=4, slash=4, probe=3, block=2, sinks=1, recent=1)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(vertical=2, slash=length, probe=3, block=2)
