"""Multi-query associative recall: key-value pairs, then the keys again, each to be answered with its value.

Zoology: Measuring and Improving Recall in Efficient Language Models (2023), arXiv 2312.04927.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.training_task import IGNORED, TrainingTask


@dataclass(frozen=True)
class MQAR(TrainingTask):
    """`k_1 v_1 ... k_D v_D`, then `(length - 2 D) / 2` slots of two tokens; each key recurs once, in one of them.

    The label at a recurring key is its value. The keys' slots are drawn without replacement with `p(g) ~ g ** (power -
    1)` for g = 1, 2, ...: with a small power most keys recur soon and some late, as words in text do; 1 is uniform.
    This is the standard test of a state's capacity: D pairs have to fit into it.

    Args:
        vocabulary: V tokens; keys are 1 .. V/2 - 1, values V/2 .. V - 1, 0 is padding.
        length: N, even, at least 4 D.
        pairs: D.
        power: the exponent a of the gaps.
        random_non_queries: True fills free slots with random tokens, False with 0. A random token may be a key by
            chance; it has no label then, as in the published generator.

    Raises:
        OptionError: if the sizes are inconsistent.
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
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _distinct(count, half - 1, self.pairs, generator)
        values = half + _distinct(count, self.vocabulary - half, self.pairs, generator)
        slots = (self.length - context) // 2
        chance = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        gaps = torch.multinomial(chance.expand(count, slots), self.pairs, generator=generator)

        tokens = torch.zeros(count, self.length, dtype=torch.long)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        at = context + 2 * gaps
        tokens.scatter_(1, at, keys)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, at, values)
        if self.random_non_queries:
            noise = torch.randint(self.vocabulary, tokens.shape, generator=generator)
            tokens = torch.where(tokens == 0, noise, tokens)
        return tokens, labels


def _distinct(count: int, choices: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw `(count, size)` numbers below `choices`, distinct within each row."""
    return torch.rand(count, choices, generator=generator).argsort(-1)[:, :size]


def ar_hits(tokens: Tensor) -> Tensor:
    """Mark the positions `(B, N)` whose bigram occurred before, so that recall could predict the token.

    A language model's perplexity on and off this mask shows how much of it is due to recall.
    """
    pairs = torch.stack([tokens[:, :-1], tokens[:, 1:]], -1)
    same = (pairs[:, :, None] == pairs[:, None]).all(-1)
    earlier = torch.ones(same.shape[1:], dtype=torch.bool, device=tokens.device).tril(-1)
    hits = torch.zeros_like(tokens, dtype=torch.bool)
    hits[:, 1:] = (same & earlier).any(-1)
    return hits
