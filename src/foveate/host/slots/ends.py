"""Ends: the first and the last tokens of a sequence, kept by number, so that nothing has to be asked of the device.

Most policies that evict keep some heads whole and, of the others, sinks and a recent window. Said as a mask, this costs
some twenty small operations for each layer and token, and a wait for the device. Said in numbers, the host knows by
itself which slot the next token may take.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Self

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """A method keeps the first `sink` and the last `recent` tokens of sequences without padding.

    Args:
        sink: first tokens that stay.
        recent: last tokens that stay.
        full: key/value heads that keep everything.
    """

    sink: int
    recent: int
    full: frozenset[int] = frozenset()

    def mask(self, positions: Int[Tensor, "b hkv s"], seen: int) -> Bool[Tensor, "b hkv s"]:
        """The same, said of each slot after `seen` tokens."""
        kept = (positions >= 0) & ((positions < self.sink) | (positions >= seen - self.recent))
        if self.full:
            kept[:, list(self.full)] = True
        return kept


class Ledger:
    """The host's own record of which slot holds which token in a group of heads, so that it need not ask the device.

    It can be kept where all rows hold the same tokens in the same slots: any of the first `sink`, and after them one
    unbroken run.

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
        """The ledger of some slots; None where none can be kept. The one time that the device is asked."""
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
        """Take out the oldest tokens of the run, and return the slots that they leave."""
        gone = [self.slots.popleft() for _ in range(count)]
        self.oldest += count
        self.free += gone
        return gone

    def fill(self, count: int) -> list[int]:
        """Put tokens into empty slots, and return those."""
        taken, self.free = self.free[:count], self.free[count:]
        self.slots += taken
        return taken

    def extend(self, first: int, last: int) -> None:
        """Put tokens into new slots at the end."""
        self.slots += range(first, last)

    def copy(self) -> Ledger:
        return Ledger(self.sink, self.oldest, self.slots.copy(), list(self.free))
