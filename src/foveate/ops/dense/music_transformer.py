"""Music Transformer's relative attention: a learned vector for each distance, added to the keys.

Music Transformer (2018), arXiv 1809.04281.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.core.scoring import Tile, dot_product
from foveate.core.selection import Blocks, Selection
from foveate.ops.base.scored import Scored
from foveate.ops.functional import relative_position
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class MusicTransformer(Scored):
    """`softmax(q_i . (k_j + e_{i-j}) · scale) v`: a query's score of a key may depend on their distance.

    Cost O(N² D) time, twice the products of softmax attention and no fused kernel; O(N) memory in chunks, and O(L D)
    for the vectors, while the direct form needs O(N² D). Causal only. With `block` the time is O(N block D) on the
    chunked engine, which runs long calls. All distances past the table look alike: the wrong choice for exact positions
    in inputs much longer than `max_len`.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        max_len: distances in the table, from 0, the query's own position, to `max_len - 1`.
        block: tokens in a block, which sees itself and the block before; None sees the whole past.
        form: "skew" (the paper's: a pad and a reshape) or "gather" (a vector for each pair, the reference form).
        shared: True for one table for all heads; by default each has its own.
        time, pitch: for tokens that lie on a grid: a further vector for each difference of the inputs of that name,
            int `(B, Nk)`, in `-(span - 1) .. span - 1`. The option is the span; larger differences are clipped. A call
            without the input omits the term. Such an operator does not stream.
        variant: the vector of distances past the table: its last one in "paper", zeros in "release".

    Tables start as in the release, normally distributed with variance `1 / head_dim`. The release has no grid terms.
    They are reconstructed from the paper's text: a table per head, a learned vector for each signed difference
    `place_i - place_j`, clipped.
    """

    capabilities = replace(Scored.capabilities, patterns=CAUSAL_PATTERNS)

    def __init__(
        self,
        heads: int,
        head_dim: int,
        max_len: int = 2048,
        *,
        block: int | None = None,
        form: Literal["skew", "gather"] = "skew",
        shared: bool = False,
        time: int | None = None,
        pitch: int | None = None,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "head_dim": head_dim, "max_len": max_len, "block": block, "time": time, "pitch": pitch}
        for name, value in sizes.items():
            if value is not None or name in ("heads", "head_dim", "max_len"):
                validate.count(name, value, 1)
        validate.one_of("form", form, ("skew", "gather"))
        validate.one_of("variant", variant, ("paper", "release"))
        validate.one_of("shared", shared, (True, False))
        self.heads, self.block, self.form, self.variant = heads, block, form, variant
        self.table = self._table(1 if shared else heads, max_len, head_dim)  # the last row is distance 0
        spans = {"time": time, "pitch": pitch}
        self.grid = nn.ParameterDict(
            {name: self._table(heads, 2 * span - 1, head_dim) for name, span in spans.items() if span is not None}
        )
        if block is not None:
            self._declare(growth="N")
        if self.grid:
            self._declare(inputs=frozenset(self.grid), streaming=None)

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **grid: Tensor) -> Float[Tensor, "b h q k"]:
        heads, width = self.heads, self.table.shape[-1]
        if (q.shape[1], q.shape[3]) != (heads, width):
            raise ShapeError(f"built for {heads} heads of width {width}; got H={q.shape[1]}, D={q.shape[3]}")
        logits, q = dot_product(q, k, scale), q * scale
        if self.form == "skew":
            logits = logits + relative_position.skewed(
                q, self.embeddings(relative_position.distances(at)).to(q), len(at.cols)
            )
        else:
            logits = logits + relative_position.gathered(q, self.embeddings(at.rows[:, None] - at.cols).to(q))
        for name, places in grid.items():
            difference = places[:, at.rows, None] - places[:, None, at.cols]
            logits = logits + _by_difference(q, self.grid[name].to(q), difference)
        return logits

    def score_macs(self, width: int) -> int:
        return width * (2 + len(self.grid))

    def embeddings(self, distance: Int[Tensor, "..."]) -> Float[Tensor, "h ... d"]:
        """Return the table's vectors for some distances; those of the future, which is masked, are arbitrary."""
        last = self.table.shape[1] - 1
        found = self.table[:, (last - distance).clamp(0, last)]
        return found if self.variant == "paper" else found * (distance <= last)[..., None]

    def select(self, n_queries: int, n_keys: int, device: torch.device) -> Selection | None:
        return None if self.block is None else with_previous_block(n_queries, n_keys, self.block, device)

    def context(self, q: Tensor, k: Tensor, mask: Tensor | None, **inputs: Tensor) -> dict[str, Tensor]:
        for name, places in inputs.items():
            if places.is_floating_point() or places.shape != (k.shape[0], k.shape[2]):
                expected = f"int (B, Nk)={(k.shape[0], k.shape[2])}"
                raise ShapeError(f"{name} must be {expected}; got {places.dtype} {tuple(places.shape)}")
        return inputs

    @staticmethod
    def _table(heads: int, rows: int, width: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(heads, rows, width) * width**-0.5)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, max(1, length // 4), block=max(1, length // 3))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        op = cls(heads, head_dim, length)
        nn.init.zeros_(op.table)
        return op


def with_previous_block(n_queries: int, n_keys: int, size: int, device: torch.device) -> Blocks:
    """Select the keys of a query's own block of `size` tokens and of the block before; causality hides the future."""
    shift = n_keys - n_queries
    first = (torch.arange(-(-n_queries // size), device=device)[:, None] * size + shift) // size
    last = (first * size + size - 1 + shift % size) // size
    block = torch.arange(-(-n_keys // size), device=device)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        behind = (q + shift) // size - k // size
        return (behind == 0) | (behind == 1)

    touched = (block >= first - 1) & (block <= last)
    return Blocks(touched[None, None], (size, size), n_queries, n_keys, rule)


def _by_difference(
    q: Float[Tensor, "b h n d"], table: Float[Tensor, "h w d"], difference: Int[Tensor, "b n k"]
) -> Float[Tensor, "b h n k"]:
    """Return `q_i . e` of the difference i - j for all pairs: one product per row of the table, then a gather."""
    reach = table.shape[1] // 2
    index = (difference.clamp(-reach, reach) + reach)[:, None].expand(-1, q.shape[1], -1, -1)
    return (q @ table.transpose(-1, -2)).gather(-1, index)
