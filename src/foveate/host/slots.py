"""Where a compressed layer keeps its tokens: slots that know their position, with as many per head as it needs.

Heads that hold equally many slots share one tensor, so that a layer whose heads keep 1,000, 1,000, 68 and 68 tokens
really stores two tensors of those lengths. A slot's position counts from the start of the sequence, padding included;
`EMPTY` marks an unused one. A group's `summary` are slots that stand for dropped ones: their position is `SUMMARY`,
every later query sees them, and the log of their `count` is added to their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMPTY, SUMMARY = -1, -2


@dataclass(frozen=True, eq=False)
class Slots:
    """Keys and values of some heads, with their positions `(B, h, S)` and how many tokens each stands for."""

    k: Float[Tensor, "b h s d"]
    v: Float[Tensor, "b h s dv"]
    positions: Int[Tensor, "b h s"]
    count: Float[Tensor, "b h s"] | None = None

    def append(self, k: Tensor, v: Tensor, first: int) -> Slots:
        new = torch.arange(first, first + k.shape[2], device=k.device).expand(*k.shape[:3])
        return replace(
            self,
            k=torch.cat([self.k, k], 2),
            v=torch.cat([self.v, v], 2),
            positions=torch.cat([self.positions, new], 2),
        )

    def take(self, index: Int[Tensor, "b h n"], real: Bool[Tensor, "b h n"]) -> Slots:
        """Some slots of each head; where not `real` the slot is empty."""
        return Slots(
            self.k.gather(2, index[..., None].expand(*index.shape, self.k.shape[-1])),
            self.v.gather(2, index[..., None].expand(*index.shape, self.v.shape[-1])),
            self.positions.gather(2, index).masked_fill(~real, EMPTY),
        )

    def batch(self, index: Tensor) -> Slots:
        count = None if self.count is None else self.count[index]
        return Slots(self.k[index], self.v[index], self.positions[index], count)

    def heads(self, index: Tensor) -> Slots:
        count = None if self.count is None else self.count[:, index]
        return Slots(self.k[:, index], self.v[:, index], self.positions[:, index], count)


@dataclass(frozen=True, eq=False)
class Group:
    """Key/value heads that hold equally many slots."""

    heads: Int[Tensor, " h"]
    slots: Slots
    has_empty: bool = False
    summary: Slots | None = None

    @property
    def stored(self) -> int:
        """Slots in memory, over batch and heads, those of the summary included."""
        extra = 0 if self.summary is None else self.summary.positions.numel()
        return self.slots.positions.numel() + extra

    def all(self) -> Slots:
        """The summary and then the slots, as attention sees them."""
        if self.summary is None:
            return self.slots
        summary, slots = self.summary, self.slots
        ones = torch.ones(slots.positions.shape, dtype=torch.float32, device=slots.k.device)
        count = ones[..., :0] if summary.count is None else summary.count
        return Slots(
            torch.cat([summary.k, slots.k], 2),
            torch.cat([summary.v, slots.v], 2),
            torch.cat([torch.full_like(summary.positions, SUMMARY), slots.positions], 2),
            torch.cat([count.float(), ones], 2),
        )

    def batch(self, index: Tensor) -> Group:
        summary = None if self.summary is None else self.summary.batch(index)
        return replace(self, slots=self.slots.batch(index), summary=summary)


@dataclass(frozen=True, eq=False)
class Store:
    """All the slots of a layer, as groups of heads."""

    groups: tuple[Group, ...]
    n_heads: int

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> Self:
        """An empty store for tensors like these."""
        none = torch.empty(*k.shape[:2], 0, dtype=torch.long, device=k.device)
        heads = torch.arange(k.shape[1], device=k.device)
        return cls((Group(heads, Slots(k[:, :, :0], v[:, :, :0], none)),), k.shape[1])

    def append(self, k: Tensor, v: Tensor, first: int) -> Store:
        return replace(
            self,
            groups=tuple(replace(g, slots=g.slots.append(k[:, g.heads], v[:, g.heads], first)) for g in self.groups),
        )

    @property
    def stored(self) -> int:
        return sum(group.stored for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in memory."""
        tensors = [x for g in self.groups for s in (g.slots, g.summary) if s is not None for x in (s.k, s.v)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def is_whole(self, seen: int) -> bool:
        """Whether nothing was ever dropped: one group, every position once."""
        (first, *others) = self.groups
        return not others and first.slots.positions.shape[2] == seen and first.summary is None and not first.has_empty

    def padded(self, what: str) -> Tensor:
        """`"positions"`, `"k"`, `"v"` or `"count"` of all heads in order (summaries first), padded to the longest
        head.
        """
        fill = {"positions": EMPTY, "count": 1}.get(what, 0)
        parts = [_of(group.all(), what) for group in self.groups]
        if len(parts) == 1:
            return parts[0]
        batch, _, _, *width = parts[0].shape
        longest = max(part.shape[2] for part in parts)
        out = parts[0].new_full((batch, self.n_heads, longest, *width), fill)
        for group, part in zip(self.groups, parts, strict=True):
            out[:, group.heads, : part.shape[2]] = part
        return out

    @property
    def has_summary(self) -> bool:
        return any(group.summary is not None for group in self.groups)

    def evict(self, keep: Bool[Tensor, "b h s"], fold: Fold | None = None) -> Store:
        """Drop slots; `keep` lies beside `padded("positions")`. Summaries stay; `fold` may add what is dropped to
        them.
        """
        parts = []
        for group in self.groups:
            skip = 0 if group.summary is None else group.summary.positions.shape[2]
            size = group.slots.positions.shape[2]
            parts += _split(group, keep[:, group.heads, skip : skip + size], fold)
        return replace(self, groups=tuple(parts))

    def batch(self, index: Tensor) -> Store:
        return replace(self, groups=tuple(group.batch(index) for group in self.groups))


#: `fold(dropped, summary so far) -> new summary`, for the heads of a group.
Fold = Callable[[Slots, Slots | None], Slots | None]


def _of(slots: Slots, what: str) -> Tensor:
    if what == "count" and slots.count is None:
        return torch.ones(slots.positions.shape, dtype=torch.float32, device=slots.k.device)
    return getattr(slots, what)


def _split(group: Group, keep: Bool[Tensor, "b h s"], fold: Fold | None) -> list[Group]:
    """A group after some of its slots are dropped, regrouped by how many are left."""
    filled = group.slots.positions >= 0
    keep = keep & filled
    counts = keep.sum(-1)
    if bool((keep == filled).all()):
        return [group]
    left, parts = counts.amax(0), []
    for size in left.unique().tolist():
        mine = (left == size).nonzero().squeeze(-1)
        slots, kept = group.slots.heads(mine), keep[:, mine]
        summary = None if group.summary is None else group.summary.heads(mine)
        if fold is not None and bool((filled[:, mine] & ~kept).any()):
            summary = fold(_packed(slots, filled[:, mine] & ~kept), summary)
        parts.append(Group(group.heads[mine], _packed(slots, kept), bool((counts[:, mine] < size).any()), summary))
    return parts


def _packed(slots: Slots, keep: Tensor) -> Slots:
    """The kept slots of each head in order, padded to the longest head with empty ones."""
    size = int(keep.sum(-1).max())
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
    return slots.take(order, keep.gather(2, order))
