"""The tokens of a model's tokenizer, so that a task can make prompts of a given length in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """A way to turn text into tokens and back.

    Args:
        encode: turns text into ids, without special tokens.
        decode: turns ids into text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]

    def count(self, text: str) -> int:
        """Return the number of a text's tokens."""
        return len(self.encode(text))


def _characters(text: str) -> list[int]:
    return [ord(char) for char in text]


def _text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


#: Each character as one token; the lab model reads ASCII so.
CHARACTERS = Tokens(_characters, _text)


def largest(fits: Callable[[int], bool], limit: int, start: int = 8) -> int:
    """Return the largest size up to `limit` that fits, or 0. It is right if a size fits where a larger one does."""
    if not fits(1):
        return 0
    low, high = 1, min(max(2, start), limit)
    while fits(high):
        if high == limit:
            return limit
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
