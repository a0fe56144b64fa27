"""The work of a call on an engine, in amounts whose cost a machine is measured for."""

from __future__ import annotations

from typing import NamedTuple

#: A selection's own rule is several comparisons; a mask that it makes counts as so many elements for each of its own.
RULE = 3
#: A row of tiles that is computed by itself, in a Python loop, counts as so many planned ones.
LOOP = 12


class Work(NamedTuple):
    """Amounts of work; or the seconds that one of each costs.

    Args:
        calls: calls of the kernel, each with the small operations around it.
        products: multiply-adds of scores and of sums over values.
        copied: numbers of keys and values that are copied in rows that all heads share.
        indexed: numbers of keys and values that each head copies by an index of its own.
        masked: elements of masks that are made.
        planned: runs of queries whose keys are worked out: rows of tiles of each head that gathers, and slices of a
            selection that is new.
    """

    calls: float = 0.0
    products: float = 0.0
    copied: float = 0.0
    indexed: float = 0.0
    masked: float = 0.0
    planned: float = 0.0

    def seconds(self, rates: Work) -> float:
        """Return the predicted time, given the seconds that one of each amount costs."""
        return sum(amount * each for amount, each in zip(self, rates, strict=True))
