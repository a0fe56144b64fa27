"""The tokens that a joint picture draws, some of all texts, and which of them attend to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@final
@dataclass(frozen=True, eq=False)
class Points:
    """Tokens of several texts, in order.

    Args:
        tokens: their texts.
        text: the number of the text of each.
        place: the place of each in its text.
    """

    tokens: Sequence[str]
    text: Int[Tensor, " n"]
    place: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], most: int, generator: torch.Generator | None) -> Self:
        """Choose at most `most` tokens, by `generator` or in even steps."""
        text = torch.cat([torch.full((len(tokens),), number) for number, tokens in enumerate(texts)])
        place = torch.cat([torch.arange(len(tokens)) for tokens in texts])
        total = len(text)
        if total <= most:
            chosen = torch.arange(total)
        elif generator is None:
            chosen = torch.arange(most) * total // most
        else:
            chosen = torch.randperm(total, generator=generator)[:most].sort().values
        text, place = text[chosen], place[chosen]
        named = [texts[number][at] for number, at in zip(text.tolist(), place.tolist(), strict=True)]
        return cls(named, text, place)

    def inside(self, text: int) -> Int[Tensor, " m"]:
        """Return the places of a text's chosen tokens."""
        return self.place[self.text == text]


@final
@dataclass(frozen=True, eq=False)
class Strongest:
    """The strongest keys of each query among the points of its own text, and their weights.

    Args:
        keys: numbers of points; -1 where a text has fewer.
        weights: their weights.
    """

    keys: Int[Tensor, "n s"]
    weights: Float[Tensor, "n s"]

    @classmethod
    def of(
        cls, maps: Sequence[Float[Tensor, "n m"]], queries: Points, keys: Points, count: int
    ) -> Self:  # fmt: skip
        """Read them from a head's map of each text."""
        found, sizes, before = [], [], 0
        for text, weights in enumerate(maps):
            rows, columns = queries.inside(text), keys.inside(text)
            best = weights[rows][:, columns].topk(min(count, len(columns)), dim=-1)
            room = (0, count - best.values.shape[1])
            found.append(F.pad(best.indices + before, room, value=-1))
            sizes.append(F.pad(best.values, room))
            before += len(columns)
        return cls(torch.cat(found), torch.cat(sizes))
