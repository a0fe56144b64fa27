"""Selections state which keys each query sees; every sparse engine reads them.

A `Selection` is either `Blocks` (tiles of queries and keys, with an optional rule inside a tile) or `Indices` (a list
of keys per group of neighbouring queries). Both convert to a dense mask and to gathered keys; `Blocks` also converts to
FlexAttention's `BlockMask`. Causality and the caller's mask are not part of a selection: engines apply them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core import masks
from foveate.core.errors import ShapeError
from foveate.core.readable import has_shapes_alone

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: `rule(b, h, query, key) -> bool`, elementwise over index tensors: FlexAttention's `mask_mod`.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Selection(ABC):
    """The keys that each of `n_queries` queries sees among `n_keys`."""

    n_queries: int
    n_keys: int

    @abstractmethod
    def dense(self, rows: slice = slice(None)) -> Bool[Tensor, "b h q k"]:
        """Return the selection as a mask `(B or 1, H or 1, Nq, Nk)`, or some rows of it. All rows cost O(N²)."""

    @abstractmethod
    def for_heads(self, heads: int) -> Selection:
        """Return the selection for `heads` query heads; a group of query heads shares its key/value head's choice."""

    @abstractmethod
    def keys_read(self) -> float:
        """Return the mean number of keys that a query sees (before causality and masks).

        A selection of shapes alone returns the largest number that its sizes allow.
        """

    def density(self, causal: bool = False) -> float:
        """Return the share of (query, key) pairs that are seen: of all, or with `causal` of those not in the future."""
        seen = self.dense()
        if causal:
            visible = masks.causal(self.n_queries, self.n_keys, device=seen.device)
            return ((seen & visible).sum() / (visible.sum() * seen.shape[0] * seen.shape[1])).item()
        return seen.double().mean().item()


@dataclass(frozen=True, eq=False)
class Blocks(Selection):
    """Tiles: query block i sees key block j where `blocks[b, h, i, j]`.

    Args:
        blocks: bool `(B or 1, H or 1, ceil(Nq / size[0]), ceil(Nk / size[1]))`; H counts query or key/value heads.
        size: queries and keys in a tile.
        n_queries, n_keys: lengths; the last tiles may be ragged.
        rule: the pairs inside a chosen tile that count (None: all). Query indices count from 0 at the first query.
        whole: the tiles in which `rule` holds everywhere and need not be evaluated; same shape as `blocks`.
    """

    blocks: Bool[Tensor, "b h i j"]
    size: tuple[int, int]
    n_queries: int
    n_keys: int
    rule: Rule | None = None
    whole: Bool[Tensor, "b h i j"] | None = None

    def __post_init__(self) -> None:
        expected = (-(-self.n_queries // self.size[0]), -(-self.n_keys // self.size[1]))
        if self.blocks.dim() != 4 or tuple(self.blocks.shape[2:]) != expected:
            raise ShapeError(f"blocks must be (B, H, {expected[0]}, {expected[1]}); got {tuple(self.blocks.shape)}")

    def dense(self, rows: slice = slice(None)) -> Bool[Tensor, "b h q k"]:
        query = torch.arange(self.n_queries, device=self.blocks.device)[rows]
        tiles = self.blocks[:, :, query // self.size[0]]
        seen = tiles.repeat_interleave(self.size[1], 3)[..., : self.n_keys]
        if self.rule is None:
            return seen
        b, h, _, k = (torch.arange(n, device=seen.device) for n in seen.shape)
        return seen & self.rule(b[:, None, None, None], h[:, None, None], query[:, None], k)

    def for_heads(self, heads: int) -> Blocks:
        groups = _groups(self.blocks.shape[1], heads)
        if groups == 1:
            return self
        whole = None if self.whole is None else self.whole.repeat_interleave(groups, 1)
        rule = None if self.rule is None else _shared(self.rule, groups)
        return replace(self, blocks=self.blocks.repeat_interleave(groups, 1), whole=whole, rule=rule)

    def keys_read(self) -> float:
        if has_shapes_alone(self.blocks):
            return float(self.n_keys)
        tall, wide = (
            (length - torch.arange(count, device=self.blocks.device) * size).clamp_max(size).double()
            for length, count, size in zip((self.n_queries, self.n_keys), self.blocks.shape[2:], self.size, strict=True)
        )
        rows = (self.blocks.double() @ wide).mean((0, 1))
        return (rows @ tall).item() / max(self.n_queries, 1)

    def causal(self) -> Blocks:
        """Return this selection without future keys (the last query sees the last key)."""
        shift, (tall, wide) = self.n_keys - self.n_queries, self.size
        first = torch.arange(self.blocks.shape[2], device=self.blocks.device)[:, None] * tall + shift
        last = (first + tall - 1).clamp_max(self.n_keys - 1)
        key = torch.arange(self.blocks.shape[3], device=self.blocks.device) * wide
        whole = self.blocks if self.whole is None and self.rule is None else self.whole
        past = key + wide - 1 <= first
        return replace(
            self,
            blocks=self.blocks & (key <= last),
            rule=_not_future(shift) if self.rule is None else _both(self.rule, shift),
            whole=None if whole is None else whole & past,
        )

    @property
    def comes_again(self) -> bool:
        """True if later calls have this very object, as those of static selections do; see `readable.remembered`."""
        return "_comes_again" in self.__dict__

    @property
    def without_future(self) -> Blocks:
        """`causal()`, cached since static selections are used again and again."""
        if torch.compiler.is_compiling():
            return self.causal()
        twin = self.__dict__.get("_without_future")
        if twin is None:
            twin = self.__dict__["_without_future"] = self.causal()
        return twin

    def seen(self, rows: slice, key: Int[Tensor, " n"]) -> Bool[Tensor, "b h q n"] | None:
        """Return which of some keys the queries of some block rows see, or None if they see all of them.

        A ragged last block row counts in full.
        """
        column = key // self.size[1]
        chosen = self.blocks[:, :, rows][..., column]
        whole = self.whole if self.whole is not None or self.rule is not None else self.blocks
        if bool(chosen.all()) and whole is not None and bool(whole[:, :, rows][..., column].all()):
            return None
        seen = chosen.repeat_interleave(self.size[0], 2)
        if self.rule is None:
            return seen
        b, h = (torch.arange(n, device=key.device) for n in seen.shape[:2])
        query = torch.arange(seen.shape[2], device=key.device) + (rows.start or 0) * self.size[0]
        return seen & self.rule(b[:, None, None, None], h[:, None, None], query[:, None], key)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's form of this selection, cached since it costs a sort of the tiles."""
        from torch.nn.attention.flex_attention import BlockMask

        whole = self.whole if self.whole is not None else (self.blocks if self.rule is None else None)
        partial = self.blocks if whole is None else self.blocks & ~whole
        count, index = _compressed(partial)
        full_count, full_index = (None, None) if whole is None else _compressed(self.blocks & whole)
        lengths = (self.n_queries, self.n_keys)
        return BlockMask.from_kv_blocks(
            count, index, full_count, full_index, BLOCK_SIZE=self.size, mask_mod=self.rule, seq_lengths=lengths
        )

    def gathered(self, rows: slice) -> tuple[Int[Tensor, "b h i n"], Bool[Tensor, "b h i q n"]]:
        """Return the keys to gather for some block rows, and which query of the block sees which of them.

        The result is `(indices (B, H, R, n), seen (B, H, R, size[0], n))`; rows with fewer keys are padded with unseen
        ones.
        """
        tiles = self.blocks[:, :, rows]
        chosen = max(int(tiles.sum(-1).max()), 1)
        order = (~tiles).to(torch.uint8).argsort(dim=-1, stable=True)[..., :chosen]
        real = tiles.gather(-1, order)
        offset = torch.arange(self.size[1], device=tiles.device)
        key = (order[..., None] * self.size[1] + offset).flatten(-2)
        seen = (real[..., None].expand(*real.shape, self.size[1]).flatten(-2) & (key < self.n_keys))[..., None, :]
        if self.rule is not None:
            b, h = torch.arange(key.shape[0], device=key.device), torch.arange(key.shape[1], device=key.device)
            i = torch.arange(self.blocks.shape[2], device=key.device)[rows] * self.size[0]
            query = i[:, None] + torch.arange(self.size[0], device=key.device)
            seen = seen & self.rule(
                b[:, None, None, None, None], h[:, None, None, None], query[..., None], key[..., None, :]
            )
        return key.clamp_max(self.n_keys - 1), seen.expand(*key.shape[:3], self.size[0], key.shape[-1])


@dataclass(frozen=True, eq=False)
class Indices(Selection):
    """A list of keys for each group of `group` neighbouring queries.

    Args:
        indices: int `(B or 1, H or 1, ceil(Nq / group), n)`, each in `0..Nk-1`; no key twice among a row's valid ones.
        valid: bool of the same shape: False pads a short list.
        group: queries that share a list.
        n_queries, n_keys: lengths.
        own: the selection by key/value head that this one, by query head, repeats; engines gather by it only once.
        counted: the mean number of valid keys of a row, for short lists that are padded with keys which the query might
            see anyway. Then nobody has to count them, or to check that none of the others holds NaN.
    """

    indices: Int[Tensor, "b h g n"]
    n_queries: int
    n_keys: int
    valid: Bool[Tensor, "b h g n"] | None = None
    group: int = 1
    own: Indices | None = None
    counted: float | None = None

    def __post_init__(self) -> None:
        expected = -(-self.n_queries // self.group)
        if self.indices.dim() != 4 or self.indices.shape[2] != expected:
            raise ShapeError(f"indices must be (B, H, {expected}, n); got {tuple(self.indices.shape)}")
        if self.valid is not None and self.valid.shape != self.indices.shape:
            raise ShapeError(f"valid must be like indices {tuple(self.indices.shape)}; got {tuple(self.valid.shape)}")

    @property
    def real(self) -> Bool[Tensor, "b h g n"]:
        return self.valid if self.valid is not None else torch.ones_like(self.indices, dtype=torch.bool)

    def dense(self, rows: slice = slice(None)) -> Bool[Tensor, "b h q k"]:
        group = torch.arange(self.n_queries, device=self.indices.device)[rows] // self.group
        places = range(self.n_queries)[rows]
        some = slice(places[0] // self.group, places[-1] // self.group + 1) if places else slice(0)
        index = self.indices.masked_fill(~self.real, self.n_keys)[:, :, some]
        seen = index.new_zeros(*index.shape[:3], self.n_keys + 1, dtype=torch.bool).scatter_(3, index, True)
        return seen[:, :, group - some.start if group.numel() else group, : self.n_keys]

    def for_heads(self, heads: int) -> Indices:
        groups = _groups(self.indices.shape[1], heads)
        if groups == 1:
            return self
        valid = None if self.valid is None else self.valid.repeat_interleave(groups, 1)
        return replace(self, indices=self.indices.repeat_interleave(groups, 1), valid=valid, own=self)

    def keys_read(self) -> float:
        if self.counted is not None:
            return self.counted
        if self.valid is None or has_shapes_alone(self.valid):
            return float(self.indices.shape[-1])
        return self.real.double().sum(-1).mean().item()

    def gathered(self, rows: slice) -> tuple[Int[Tensor, "b h i n"], Bool[Tensor, "b h i q n"]]:
        """Return the keys to gather for some groups, and which of them count; see `Blocks.gathered`."""
        index, real = self.indices[:, :, rows], self.real[:, :, rows]
        return index, real[..., None, :].expand(*real.shape[:3], self.group, real.shape[-1])


def _compressed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen tiles in each block row, and all column numbers with the chosen ones first."""
    order = (~blocks).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32).contiguous(), order.contiguous()


def _groups(own: int, heads: int) -> int:
    """Return the query heads for each head of a selection; 1 if the selection is for all heads at once."""
    if heads % own:
        raise ShapeError(f"a selection for {own} heads does not fit {heads} query heads")
    return 1 if own == 1 else heads // own


# Rules are cached, a few at a time: a compiled kernel is reused only if the rule is the same object.


@lru_cache(maxsize=64)
def _not_future(shift: int) -> Rule:
    """Return causality as a rule."""
    return lambda b, h, q, k: k <= q + shift


@lru_cache(maxsize=64)
def _both(rule: Rule, shift: int) -> Rule:
    return lambda b, h, q, k: rule(b, h, q, k) & (k <= q + shift)


@lru_cache(maxsize=64)
def _shared(rule: Rule, groups: int) -> Rule:
    """Turn a rule over key/value heads into one over query heads."""
    return lambda b, h, q, k: rule(b, h // groups, q, k)
