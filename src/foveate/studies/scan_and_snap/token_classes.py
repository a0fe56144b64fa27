"""The data of Scan and Snap: next tokens, each with a query token and a distribution over context tokens.

Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer (2023), arXiv 2305.16380.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError


class Sequences(NamedTuple):
    """Sampled sequences: the shares of context tokens `(B, L)`, and the class of each, `(B,)`."""

    shares: Tensor
    classes: Tensor


@final
@dataclass(frozen=True, eq=False)
class TokenClasses:
    """K classes of sequences. A class has one next token, one query token, and probabilities of context tokens.

    The classes are equally likely, and several may share a query token. A context token is distinct if it occurs for
    one next token only, and common if it occurs for several.

    Args:
        p: the probabilities `P(l | m, n)` of context tokens by class, `(K, L)`; rows sum to 1.
        query: the number of each class's query token, `(K,)`, counted from 0.
        vocabulary: the number M of tokens that the decoder chooses from. Its column n is the next token of class n.
    """

    p: Float[Tensor, "k l"]
    query: Int[Tensor, " k"]
    vocabulary: int

    @classmethod
    def drawn(
        cls, classes: int = 4, queries: int = 2, distinct: int = 10, common: int = 20, *,
        weights: tuple[float, float] = (0.2, 1.2), common_weight: float = 0.6, spaced: bool = False,
        vocabulary: int | None = None, generator: torch.Generator | None = None,
    ) -> TokenClasses:  # fmt: skip
        """Make classes with `distinct` tokens of their own and `common` ones that all of them have.

        Args:
            classes, queries: the numbers K of next tokens and of query tokens; neighbouring classes share one.
            distinct, common: the numbers of tokens.
            weights: the range of the distinct tokens' weights, before each class's weights are divided by their sum.
            common_weight: the weight of each common token.
            spaced: weights at equal distances, as in the authors' code (there from 0.1 to 1, and 1 for common
                tokens); False draws them uniformly.
            vocabulary: None counts the tokens that occur.
            generator: draws the weights.
        """
        for name, value in (("classes", classes), ("queries", queries), ("distinct", distinct), ("common", common)):
            validate.count(name, value, 0 if name == "common" else 1)
        if queries > classes:
            raise OptionError(f"queries={queries} must be at most classes={classes}")
        low, high = weights
        if not 0 < low <= high:
            raise OptionError(f"weights={weights} must be two numbers above 0, the smaller one first")
        occurring = classes * distinct + common + queries + classes
        vocabulary = occurring if vocabulary is None else vocabulary
        validate.count("vocabulary", vocabulary, occurring)
        if spaced:
            share = torch.linspace(0, 1, distinct, dtype=torch.float64).expand(classes, distinct)
        else:
            share = torch.rand(classes, distinct, generator=generator, dtype=torch.float64)
        own = low + (high - low) * share
        p = torch.zeros(classes, classes * distinct + common, dtype=torch.float64)
        p[:, classes * distinct :] = common_weight
        for number in range(classes):
            p[number, number * distinct : (number + 1) * distinct] = own[number]
        query = torch.arange(classes) * queries // classes
        return cls(p / p.sum(1, keepdim=True), query, vocabulary)

    @property
    def queries(self) -> int:
        """The number of query tokens."""
        return int(self.query.max()) + 1

    @property
    def distinct(self) -> Tensor:
        """True for the distinct tokens of each class, `(K, L)`."""
        return (self.p > 0) & ~self.common

    @property
    def common(self) -> Tensor:
        """True for the common tokens, `(L,)`."""
        return (self.p > 0).sum(0) > 1

    def sample(self, batch: int, context: int, generator: torch.Generator | None = None) -> Sequences:
        """Draw sequences: a class each, and `context` tokens of it."""
        classes = torch.randint(len(self.p), (batch,), generator=generator)
        tokens = torch.multinomial(self.p[classes], context, replacement=True, generator=generator)
        each = torch.full(tokens.shape, 1 / context, dtype=torch.float64)
        return Sequences(torch.zeros(batch, self.p.shape[1]).double().scatter_add_(1, tokens, each), classes)
