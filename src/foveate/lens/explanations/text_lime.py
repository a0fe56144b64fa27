"""LIME for texts: the words of a text that a classifier's score depends on, by a linear fit to masked copies.

"Why Should I Trust You?": Explaining the Predictions of Any Classifier (2016), arXiv 1602.04938; the sampling, the
weights and the ridge are those of the authors' text explainer, with a mask token in place of removed words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.linear_systems import solve_positive

#: `score(ids (S, T))` returns a number for each text, `(S,)`.
Score = Callable[[Tensor], Tensor]


@torch.no_grad()
def text_lime(
    score: Score, ids: Int[Tensor, " t"], unknown: int, *, kept: Iterable[int] = (), samples: int = 5000,
    width: float = 0.25, ridge: float = 1.0, batch: int = 256, generator: torch.Generator | None = None,
) -> Float[Tensor, " t"]:  # fmt: skip
    """Return the weight of each token's word in a linear model of the score around one text.

    Each copy of the text masks a random number of its words, uniform from one to all, and each word at all of its
    places. Copies count by how much of the text they keep; a weighted ridge regression on the presence of words gives
    the weights. Tokens of one word get the word's weight. Tokens that are never masked get 0. Costs `samples` calls.

    Args:
        score: the classifier's score of the class that is explained, for a batch of texts; logits, mostly.
        ids: the text.
        unknown: the token that takes a masked word's place.
        kept: tokens that are never masked, such as those that begin and end a text.
        samples: number of copies; the first is the text itself.
        width: of the weights `exp(-(1 - sqrt(share kept))² / (2 width²))`; small looks at nearly whole copies only.
        ridge: the penalty of the squared weights; the intercept is free.
        batch: number of copies in a call of `score`.
        generator: draws the copies.
    """
    validate.count("samples", samples, 2)
    validate.count("batch", batch, 1)
    validate.at_least("ridge", ridge, 0.0)
    if isinstance(width, bool) or not isinstance(width, int | float) or not width > 0:
        raise OptionError(f"width={shown(width)} must be above 0")
    free = maskable(ids, {unknown, *kept})
    words, place = torch.unique(ids[free], return_inverse=True)
    present = _presence(samples, len(words), generator).to(ids.device)
    scores = []
    for rows in present.split(batch):
        texts = ids.repeat(len(rows), 1)
        texts[:, free] = torch.where(rows[:, place], texts[:, free], unknown)
        scores.append(score(texts).double())
    made = torch.cat(scores)
    if made.shape != (samples,):
        raise ShapeError(f"score must return a number for each text; got {tuple(made.shape)} for {samples}")
    share = present.double().mean(1)
    weights = torch.exp(-(1.0 - share.sqrt()).square() / (2.0 * width**2))
    return spread(_ridge(present.double(), made, weights, ridge)[place], free)


def maskable(ids: Int[Tensor, " t"], kept: set[int]) -> Bool[Tensor, " t"]:
    """Return the tokens of a text that may be masked; refuse a text that has none."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 1:
        raise ShapeError(f"ids must be the token ids (T,) of one text; got {shown(ids)}")
    free = ~torch.isin(ids, torch.tensor(sorted(kept), device=ids.device))
    if not bool(free.any()):
        raise ShapeError(f"ids must have a token that may be masked; all {len(ids)} are kept or unknown")
    return free


def spread(values: Float[Tensor, " k"], free: Bool[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return values of the tokens that may be masked as values of all tokens; the others get 0."""
    whole = values.new_zeros(len(free))
    whole[free] = values
    return whole


def _presence(samples: int, words: int, generator: torch.Generator | None) -> Bool[Tensor, "s w"]:
    """Draw the words that each copy keeps."""
    counts = torch.randint(1, words + 1, (samples - 1, 1), generator=generator)
    ranks = torch.rand(samples - 1, words, generator=generator).argsort(1).argsort(1)
    return torch.cat([torch.ones(1, words, dtype=torch.bool), ranks >= counts])


def _ridge(x: Float[Tensor, "s w"], y: Float[Tensor, " s"], weights: Float[Tensor, " s"], ridge: float) -> Tensor:
    """Return the coefficients of a weighted ridge regression with a free intercept."""
    share = (weights / weights.sum())[:, None]
    x, y = x - (share * x).sum(0), y[:, None] - (share * y[:, None]).sum(0)
    covariance = x.mT @ (weights[:, None] * x) + ridge * torch.eye(x.shape[1]).to(x)
    return solve_positive(covariance, x.mT @ (weights[:, None] * y))[:, 0]
