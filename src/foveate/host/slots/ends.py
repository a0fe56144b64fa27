"""Ends: the first and the last tokens of a sequence, given as numbers, so that the host never waits for the device.

Most evicting policies keep some heads whole and, of the others, sinks and a recent window. As a mask, this costs about
twenty small operations for each layer and token, and a wait for the device. As numbers, the host can compute which slot
the next token takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """A method keeps the first `sink` and the last `recent` tokens of sequences without padding.

    Args:
        sink: first tokens that stay.
        recent: last tokens that stay.
        full: key/value heads that keep everything.
        by_head: the last tokens that stay of each key/value head, in place of `recent`; None if all keep `recent`.
    """

    sink: int
    recent: int
    full: frozenset[int] = frozenset()
    by_head: tuple[int, ...] | None = None

    def of(self, heads: Iterable[int]) -> Ends | None:
        """Return the ends of some heads, which keep equally many last tokens; None if they do not."""
        if self.by_head is None:
            return self
        recent = {self.by_head[head] for head in heads}
        return Ends(self.sink, recent.pop()) if len(recent) == 1 else None

    def mask(self, positions: Int[Tensor, "b hkv s"], seen: int) -> Bool[Tensor, "b hkv s"]:
        """Return the mask of the slots that stay after `seen` tokens."""
        recent: int | Tensor = self.recent
        if self.by_head is not None:
            recent = torch.tensor(self.by_head, device=positions.device)[:, None]
        kept = (positions >= 0) & ((positions < self.sink) | (positions >= seen - recent))
        if self.full:
            kept[:, list(self.full)] = True
        return kept


class AtEnd:
    """A method chooses when the whole pass has ended, by `Method.keep_all`."""


#: What `Method.keep` returns to choose later.
AT_END = AtEnd()


class Ledger:
    """The host's own record of the slot of each token in a group of heads, so that the device need not be asked.

    It requires that all rows hold the same tokens in the same slots: any of the first `sink`, then a run without gaps.

    Attributes:
        sink: tokens before the run.
        oldest: the position of the run's first token.
        slots: the slots of the run, in the order of their positions.
        free: the empty slots.
    """

    def __init__(self, sink: int, oldest: int, slots: deque[int], free: list[int]) -> None:
        self.sink, self.oldest, self.slots, self.free = sink, oldest, slots, free

    @classmethod
    def read(cls, positions: Int[Tensor, "b h s"], sink: int) -> Self | None:
        """Read the ledger of some slots; None if they do not fit one. This waits for the device, once."""
        row = positions[:1, :1]
        if not positions.numel() or not bool((positions == row).all()):
            return None
        numbers = row.flatten().tolist()
        slot = {position: index for index, position in enumerate(numbers) if position >= sink}
        if not slot or max(slot) - min(slot) + 1 != len(slot):
            return None
        run = deque(slot[position] for position in range(min(slot), max(slot) + 1))
        return cls(sink, min(slot), run, [index for index, position in enumerate(numbers) if position < 0])

    def drop(self, count: int) -> list[int]:
        """Remove the oldest tokens of the run, and return the slots that become empty."""
        emptied = [self.slots.popleft() for _ in range(count)]
        self.oldest += count
        self.free += emptied
        return emptied

    def fill(self, count: int) -> list[int]:
        """Put tokens into empty slots, and return these slots."""
        taken, self.free = self.free[:count], self.free[count:]
        self.slots += taken
        return taken

    def extend(self, first: int, last: int) -> None:
        """Put tokens into new slots at the end."""
        self.slots += range(first, last)

    def copy(self) -> Ledger:
        return Ledger(self.sink, self.oldest, self.slots.copy(), list(self.free))
