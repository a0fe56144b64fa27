"""Attention between words, from attention between their pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import ShapeError


def to_words(
    attention: Float[Tensor, "... t t"],
    words: Sequence[int | None],
    reduction: Literal["first", "mean", "max"] = "first",
) -> Float[Tensor, "... w w"]:
    """Return the attention between words; rows keep their sum.

    The attention to a word is the sum over its pieces. The attention from it is that of its first piece, the mean over
    its pieces, or the largest over its pieces, normalised again.

    Args:
        attention: weights between tokens.
        words: the word of each token, as a fast tokenizer's `word_ids()` gives it. Neighbours with the same number are
            one word; a token with None, such as `[CLS]`, is a word of its own.
        reduction: how the rows of a word become one.
    """
    validate.one_of("reduction", reduction, ("first", "mean", "max"))
    t = attention.shape[-1]
    if attention.ndim < 2 or attention.shape[-2] != t or len(words) != t:
        raise ShapeError(f"attention must be (..., T, T) with T={len(words)} words; got {tuple(attention.shape)}")
    begins = [at == 0 or word is None or word != words[at - 1] for at, word in enumerate(words)]
    word = torch.tensor(begins, device=attention.device).cumsum(0) - 1
    count = int(word[-1]) + 1 if t else 0
    columns = attention.new_zeros(*attention.shape[:-1], count).index_add(-1, word, attention)
    if reduction == "first":
        return columns[..., torch.tensor(begins, device=attention.device), :]
    if reduction == "mean":
        sums = columns.new_zeros(*columns.shape[:-2], count, count).index_add(-2, word, columns)
        return sums / torch.bincount(word, minlength=count)[:, None]
    largest = torch.stack([columns[..., word == number, :].amax(-2) for number in range(count)], -2)
    return largest / largest.sum(-1, keepdim=True)
