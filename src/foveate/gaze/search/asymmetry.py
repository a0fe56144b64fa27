"""Search asymmetry: finding A among B may be harder than finding B among A.

Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases (2021), arXiv 2106.02953.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown


def asymmetry_index(hard: float, easy: float) -> float:
    """Return (H - E) / (H + E) of the costs of two directions of a search; 0 if both are 0.

    Args:
        hard: H, the cost of the direction that is harder for people: in the paper the slope of `search_slope`, 0 if it
            is negative; or the mean number of fixations.
        easy: E, that of the other.

    Returns:
        A number in -1..1; positive if the model finds hard what people find hard.

    Raises:
        OptionError: a cost that is negative or not finite.
    """
    for name, value in (("hard", hard), ("easy", easy)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise OptionError(f"{name}={shown(value)} must be a finite cost of at least 0")
    return (hard - easy) / (hard + easy) if hard + easy else 0.0


def reaction_time(
    fixations: Float[Tensor, "*n"], per_fixation: float = 252.359, intercept: float = 376.271
) -> Float[Tensor, "*n"]:
    """Return reaction times in milliseconds, a line in the number of fixations; the defaults are the release's fit."""
    return per_fixation * fixations + intercept


def search_slope(items: Float[Tensor, " n"], times: Float[Tensor, " n"]) -> float:
    """Return the slope of the least-squares line of reaction times over the number of items in the display.

    Raises:
        ShapeError: arguments that do not have one value for each trial.
        OptionError: fewer than two different numbers of items.
    """
    if not all(isinstance(x, Tensor) and x.dim() == 1 for x in (items, times)) or items.shape != times.shape:
        raise ShapeError(f"items and times must be (n,), one for each trial; got {shown(items)}, {shown(times)}")
    centred = items.double() - items.double().mean()
    if not (centred != 0).any():
        raise OptionError("items must have at least two different numbers, or there is no slope")
    return float((centred * times.double()).sum() / torch.sum(centred**2))
