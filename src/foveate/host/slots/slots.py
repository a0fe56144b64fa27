"""Slots: the storage of a compressed layer. Each slot holds a token and its position; heads have as many as they need.

Heads that hold equally many slots share one tensor. So a layer whose heads keep 1,000, 1,000, 68 and 68 tokens stores
two tensors of those lengths. Positions count from the start of the sequence, padding included. `EMPTY` marks an unused
slot, which the next token takes: if a layer drops one token at each step, its buffer neither moves nor grows.

A slot has a `weight`, whose log is added to its logit: it counts as that many tokens. A token that a method refitted
keeps its position, with another weight and another value. A group's `summary` consists of slots that stand for many
dropped tokens: their position is `SUMMARY`, and every later query sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMPTY, SUMMARY = -1, -2


@dataclass(frozen=True, eq=False)
class Slots:
    """Keys and values of some heads, with the positions and the weights of their slots.

    A weight is any positive number; its log is added to the slot's logit. None stands for weights of 1.
    """

    k: Float[Tensor, "b h s d"]
    v: Float[Tensor, "b h s dv"]
    positions: Int[Tensor, "b h s"]
    weight: Float[Tensor, "b h s"] | None = None

    def take(self, index: Int[Tensor, "b h n"], real: Bool[Tensor, "b h n"]) -> Slots:
        """Gather some slots of each head; a slot that is not `real` becomes empty."""
        return Slots(
            self.k.gather(2, index[..., None].expand(*index.shape, self.k.shape[-1])),
            self.v.gather(2, index[..., None].expand(*index.shape, self.v.shape[-1])),
            self.positions.gather(2, index).masked_fill(~real, EMPTY),
            None if self.weight is None else self.weight.gather(2, index).masked_fill(~real, 1.0),
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """Change each tensor in the same way."""
        weight = None if self.weight is None else change(self.weight)
        return Slots(change(self.k), change(self.v), change(self.positions), weight)

    def batch(self, index: Tensor) -> Slots:
        return self.each(lambda x: x[index])

    def heads(self, index: Tensor) -> Slots:
        return self if index.numel() == self.k.shape[1] else self.each(lambda x: x[:, index])

    def weighted(self) -> Slots:
        """Return the slots with a weight each, which is 1 where they had none."""
        if self.weight is not None:
            return self
        return replace(self, weight=torch.ones(self.positions.shape, device=self.positions.device))


#: `fold(dropped, previous summary, heads) -> new summary`, for the heads of a group, whose numbers are `heads (h,)`.
Fold = Callable[[Slots, Slots | None, Tensor], Slots | None]

#: `refit(kept, dropped, heads) -> the kept slots with other values and weights`, for the heads of a group.
Refit = Callable[[Slots, Slots, Tensor], Slots]


def joined(parts: list[Slots]) -> Slots:
    """Return slots one after another."""
    if any(part.weight is not None for part in parts):
        parts = [part.weighted() for part in parts]
    k, v, positions = (torch.cat(x, 2) for x in zip(*((p.k, p.v, p.positions) for p in parts), strict=True))
    weights = [part.weight for part in parts if part.weight is not None]
    return Slots(k, v, positions, torch.cat(weights, 2) if weights else None)


def narrow(slots: Slots, start: int, end: int) -> Slots:
    """Return a range of slots, as views."""
    return slots.each(lambda x: x[:, :, start:end])


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
