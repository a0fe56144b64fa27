"""Attention to tiles, one block row of one head at a time: the gathering engine's way where heads choose on their own.

Slabs of rows give every head as many keys as the head with the most. Here each row copies the tiles that its own head
chose, so that the pairs computed are those of the chosen tiles. A Python loop over heads and rows is cheap for the long
calls of a CPU. Calls with gradients, with a mask or a rule of their own, and calls on other devices take slabs.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines.work import LOOP, Work
from foveate.core.selection import Blocks

#: Least queries of a call, and of a block row, that repay the loop.
TALL = 16


def fits(call: AttentionCall) -> bool:
    """Return whether the loop can compute a call, and whether its heads choose on their own."""
    chosen = call.selected
    if not isinstance(chosen, Blocks) or chosen.rule is not None or min(chosen.size[0], call.n_queries) < TALL:
        return False
    plain = call.mask is None and not call.wants_grad and not torch.compiler.is_compiling()
    return plain and call.q.device.type == "cpu" and chosen.blocks.shape[0] * chosen.blocks.shape[1] > 1


def work(call: AttentionCall) -> Work:
    """Return the work of a call that fits."""
    chosen = call.selection
    assert isinstance(chosen, Blocks)
    blocks = (chosen.without_future if call.causal else chosen).blocks
    (b, hq, _, d), dv = call.q.shape, call.v.shape[3]
    repeated = b * hq / max(1, blocks.shape[:2].numel())
    numbers = int(blocks.sum()) * repeated * chosen.size[1] * (d + dv)
    return Work(products=numbers * chosen.size[0], copied=numbers, planned=LOOP * b * hq * blocks.shape[2])


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    chosen = call.selection
    assert isinstance(chosen, Blocks)
    blocks = (chosen.causal() if call.causal else chosen).blocks
    b, heads = call.q.shape[:2]
    wide = torch.promote_types(call.q.dtype, torch.float32)
    keys, values = (_tiled(x, chosen.size[1]) for x in (call.k, call.v))
    out = call.no_output
    for item in range(b):
        for head in range(heads):
            at = item, head // call.groups
            of = blocks[item if blocks.shape[0] > 1 else 0, head if blocks.shape[1] > 1 else 0]
            one = Head(call.q[item, head].to(wide) * call.scale, keys[at], values[at])
            one.attend(_Rows.of(of, chosen, call.causal), out[item, head])
    return out


class _Rows(NamedTuple):
    """The block rows of one head.

    Args:
        columns: the chosen tiles of each row, in order.
        size, n_queries, n_keys: as in `Blocks`.
        causal: as in `AttentionCall`.
    """

    columns: tuple[Tensor, ...]
    size: tuple[int, int]
    n_queries: int
    n_keys: int
    causal: bool

    @classmethod
    def of(cls, blocks: Tensor, chosen: Blocks, causal: bool) -> Self:
        columns = blocks.nonzero()[:, 1].split(blocks.sum(-1).tolist())
        return cls(columns, chosen.size, chosen.n_queries, chosen.n_keys, causal)

    def hidden(self, row: int, tiles: Tensor) -> Tensor:
        """Return which keys `(queries, n)` of some tiles a row's queries do not see: the future, and the padding."""
        key = (tiles[:, None] * self.size[1] + torch.arange(self.size[1])).flatten()
        if not self.causal:
            return (key >= self.n_keys).expand(self.queries(row), -1)
        first = row * self.size[0] + self.n_keys - self.n_queries
        return key > torch.arange(first, first + self.queries(row))[:, None]

    def queries(self, row: int) -> int:
        return min(self.size[0], self.n_queries - row * self.size[0])

    @property
    def ragged(self) -> int:
        """The most tiles at the end of a row that hold a key which some query does not see."""
        return (self.size[0] - 2) // self.size[1] + 2 if self.causal else 1


class Head(NamedTuple):
    """One head: scaled queries `(Nq, D)`, keys `(tiles, wide, D)` and values `(tiles, wide, Dv)`."""

    q: Tensor
    k: Tensor
    v: Tensor

    def attend(self, rows: _Rows, out: Tensor) -> None:
        """Write the output `(Nq, Dv)`; a row without tiles keeps what is there."""
        for row, columns in enumerate(rows.columns):
            if len(columns):
                first = row * rows.size[0]
                queries = slice(first, first + rows.queries(row))
                last = columns[-rows.ragged :]
                out[queries] = self.row(queries, columns, rows.hidden(row, last))

    def row(self, queries: slice, columns: Tensor, hidden: Tensor) -> Tensor:
        """Return the output of some queries on some tiles; `hidden` is for the keys of the last of these."""
        keys, values = (x.index_select(0, columns).flatten(0, 1).to(self.q.dtype) for x in (self.k, self.v))
        weights = self.q[queries] @ keys.T
        part = weights[:, -hidden.shape[1] :]
        part.masked_fill_(hidden, masks.NEG_INF)
        weights = torch.softmax(weights, -1)
        if hidden.shape[1] == len(keys):  # some query may see none of them
            weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        return weights @ values


def _tiled(x: Tensor, wide: int) -> Tensor:
    """Cut keys or values `(B, H, N, D)` into tiles `(B, H, tiles, wide, D)`; zeros fill up the last one."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % wide)).unflatten(2, (-1, wide))
