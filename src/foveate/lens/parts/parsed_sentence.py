"""Sentences with the attention of a model between their words, and the gold head of each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError


@final
@dataclass(frozen=True, eq=False)
class ParsedSentence:
    """A sentence's attention between words, with its dependency tree.

    Args:
        attention: weights between words, `(L, H, W + 2, W + 2)`: the first and the last are special tokens; see
            `to_words`.
        heads: the head of each word: 0 for the root, 1 for the first word.
        relations: the relation between each word and its head.
        vectors: a word vector for each word, which some probes need.
    """

    attention: Float[Tensor, "l h t t"]
    heads: Sequence[int]
    relations: Sequence[str]
    vectors: Float[Tensor, "w d"] | None = None

    def __post_init__(self) -> None:
        n = len(self.heads)
        if self.attention.ndim != 4 or tuple(self.attention.shape[-2:]) != (n + 2, n + 2):
            raise ShapeError(
                f"attention must be (L, H, {n + 2}, {n + 2}) for {n} words between two special tokens; got "
                f"{tuple(self.attention.shape)}"
            )
        if len(self.relations) != n:
            raise ShapeError(f"heads and relations must have one length; got {n} and {len(self.relations)}")
        if not all(0 <= head <= n for head in self.heads):
            raise OptionError(f"heads={list(self.heads)} must be in 0..{n}")
        if self.vectors is not None and (self.vectors.ndim != 2 or len(self.vectors) != n):
            raise ShapeError(f"vectors must be ({n}, D); got {tuple(self.vectors.shape)}")
