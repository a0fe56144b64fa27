"""Multi-query associative recall: keys and values first, then keys again, each to be answered with its value.

Zoology: Measuring and Improving Recall in Efficient Language Models (2023), arXiv 2312.04927.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.training_task import IGNORED, Drill


@dataclass(frozen=True)
class MQAR(Drill):
    """`k_1 v_1 ... k_D v_D`, then `(length - 2 D) / 2` cells of two tokens; each key comes back once, in one of them.

    The label at a returning key is its value. Which cells the keys take is drawn without replacement with
    `p(g) ~ g ** (power - 1)` for g = 1, 2, ...: a small power makes most of them come back soon and some late, as words
    in text do; 1 is uniform. The standard probe of how much a state can hold: D pairs have to fit into it.

    Args:
        vocabulary: tokens; keys are 1 .. V/2 - 1, values V/2 .. V - 1, 0 is filler.
        length: N, even, at least 4 D.
        pairs: D.
        power: the exponent a of the gaps.
        random_non_queries: whether free slots hold random tokens and not 0. A random token may be a key by chance: it
            is then not asked for, as in the published generator.

    Raises:
        OptionError: sizes that do not fit each other.
    """

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_non_queries: bool = True
    name = "mqar"

    def __post_init__(self) -> None:
        validate.count("vocabulary", self.vocabulary, 4)
        validate.count("pairs", self.pairs, 1)
        validate.count("length", self.length, 4)
        if self.length % 2 or self.length < 4 * self.pairs:
            raise OptionError(f"length={self.length} must be even and at least 4 * pairs = {4 * self.pairs}")
        if self.pairs > self.vocabulary // 2 - 1:
            raise OptionError(f"pairs={self.pairs} must be under vocabulary / 2 = {self.vocabulary // 2}: keys differ")
        if isinstance(self.power, bool) or not self.power > 0:
            raise OptionError(f"power={self.power!r} must be above 0")

    def sample(self, count: int, generator: torch.Generator, *, heldout: bool = False) -> tuple[Tensor, Tensor]:
        half, told = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _distinct(count, half - 1, self.pairs, generator)
        values = half + _distinct(count, self.vocabulary - half, self.pairs, generator)
        cells = (self.length - told) // 2
        chance = torch.arange(1, cells + 1, dtype=torch.float64) ** (self.power - 1)
        gaps = torch.multinomial(chance.expand(count, cells), self.pairs, generator=generator)

        tokens = torch.zeros(count, self.length, dtype=torch.long)
        tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
        at = told + 2 * gaps
        tokens.scatter_(1, at, keys)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, at, values)
        if self.random_non_queries:
            noise = torch.randint(self.vocabulary, tokens.shape, generator=generator)
            tokens = torch.where(tokens == 0, noise, tokens)
        return tokens, labels


def _distinct(count: int, choices: int, size: int, generator: torch.Generator) -> Tensor:
    """`(count, size)` numbers under `choices`, different from each other in each row."""
    return torch.rand(count, choices, generator=generator).argsort(-1)[:, :size]


def ar_hits(tokens: Tensor) -> Tensor:
    """Positions `(B, N)` whose last two tokens stand next to each other earlier on: recall could have said the second.

    The slices of a language model's perplexity by this mask show how much of it is recall.
    """
    pairs = torch.stack([tokens[:, :-1], tokens[:, 1:]], -1)
    same = (pairs[:, :, None] == pairs[:, None]).all(-1)
    earlier = torch.ones(same.shape[1:], dtype=torch.bool, device=tokens.device).tril(-1)
    hits = torch.zeros_like(tokens, dtype=torch.bool)
    hits[:, 1:] = (same & earlier).any(-1)
    return hits
