"""Slots: where a compressed layer keeps its tokens, each with its position, as many per head as it needs.

Heads that hold equally many slots share one tensor, so that a layer whose heads keep 1,000, 1,000, 68 and 68 tokens
really stores two tensors of those lengths. A position counts from the start of the sequence, padding included. `EMPTY`
marks an unused slot, which the next token takes: a layer that drops one token at each step neither moves nor grows.
A group's `summary` are slots that stand for dropped ones: their position is `SUMMARY`, every later query sees them,
and the log of their `count` is added to their logits.
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
    """Keys and values of some heads, with their positions `(B, h, S)` and how many tokens each stands for."""

    k: Float[Tensor, "b h s d"]
    v: Float[Tensor, "b h s dv"]
    positions: Int[Tensor, "b h s"]
    count: Float[Tensor, "b h s"] | None = None

    def take(self, index: Int[Tensor, "b h n"], real: Bool[Tensor, "b h n"]) -> Slots:
        """Some slots of each head; a slot that is not `real` is empty."""
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


#: `fold(dropped, summary so far) -> new summary`, for the heads of a group.
Fold = Callable[[Slots, Slots | None], Slots | None]


def tensors(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    return slots.k, slots.v, slots.positions


def narrow(slots: Slots, start: int, end: int) -> Slots:
    """Some slots that lie side by side, as views."""
    return Slots(slots.k[:, :, start:end], slots.v[:, :, start:end], slots.positions[:, :, start:end])


def grown(x: Tensor, room: int) -> Tensor:
    """A copy with `room` more slots, which are not to be read before they are written."""
    out = x.new_empty(*x.shape[:2], x.shape[2] + room, *x.shape[3:])
    out[:, :, : x.shape[2]] = x
    return out


def packed(slots: Slots, keep: Tensor) -> Slots:
    """The kept slots of each head in order, padded to the longest head with empty ones."""
    size = int(keep.sum(-1).max()) if keep.numel() else 0
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
    return slots.take(order, keep.gather(2, order))
