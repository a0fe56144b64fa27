"""Slots: the storage of a compressed layer. Each slot holds a token and its position; heads have as many as they need.

Heads that hold equally many slots share one tensor. So a layer whose heads keep 1,000, 1,000, 68 and 68 tokens stores
two tensors of those lengths. Positions count from the start of the sequence, padding included. `EMPTY` marks an unused
slot, which the next token takes: if a layer drops one token at each step, its buffer neither moves nor grows. A group's
`summary` consists of slots that represent dropped tokens: their position is `SUMMARY`, every later query sees them, and
the log of their `count` is added to their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMPTY, SUMMARY = -1, -2


@dataclass(frozen=True, eq=False)
class Slots:
    """Keys and values of some heads, with their positions `(B, h, S)` and the number of tokens of each slot."""

    k: Float[Tensor, "b h s d"]
    v: Float[Tensor, "b h s dv"]
    positions: Int[Tensor, "b h s"]
    count: Float[Tensor, "b h s"] | None = None

    def take(self, index: Int[Tensor, "b h n"], real: Bool[Tensor, "b h n"]) -> Slots:
        """Gather some slots of each head; a slot that is not `real` becomes empty."""
        return Slots(
            self.k.gather(2, index[..., None].expand(*index.shape, self.k.shape[-1])),
            self.v.gather(2, index[..., None].expand(*index.shape, self.v.shape[-1])),
            self.positions.gather(2, index).masked_fill(~real, EMPTY),
        )

    def batch(self, index: Tensor) -> Slots:
        count = None if self.count is None else self.count[index]
        return Slots(self.k[index], self.v[index], self.positions[index], count)

    def heads(self, index: Tensor) -> Slots:
        if index.numel() == self.k.shape[1]:
            return self
        count = None if self.count is None else self.count[:, index]
        return Slots(self.k[:, index], self.v[:, index], self.positions[:, index], count)


#: `fold(dropped, previous summary) -> new summary`, for the heads of a group.
Fold = Callable[[Slots, Slots | None], Slots | None]


def tensors(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    return slots.k, slots.v, slots.positions


def narrow(slots: Slots, start: int, end: int) -> Slots:
    """Return a range of slots, as views."""
    return Slots(slots.k[:, :, start:end], slots.v[:, :, start:end], slots.positions[:, :, start:end])


def grown(x: Tensor, room: int) -> Tensor:
    """Return a copy with `room` more slots, which must be written before they are read."""
    out = x.new_empty(*x.shape[:2], x.shape[2] + room, *x.shape[3:])
    out[:, :, : x.shape[2]] = x
    return out


def packed(slots: Slots, keep: Tensor, size: int | None = None) -> Slots:
    """Return the kept slots of each head in order, padded with empty slots to the longest head.

    `size` is the number of slots of the longest head. If it is None, the host waits for the device to count them.
    """
    if size is None:
        size = int(keep.sum(-1).max()) if keep.numel() else 0
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
    return slots.take(order, keep.gather(2, order))
