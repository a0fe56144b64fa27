"""Areas under ROC curves: how well a saliency map tells fixated places from others.

An area is the share of pairs of a fixation and a negative in which the fixation has the larger saliency; a pair of
equal values counts one half. That is the curve over all thresholds, joined by straight lines. An image's area is the
mean over its fixations; a pixel that was fixated twice counts twice. Any monotone change of the map leaves it as it
is.

The three measures differ in their negatives. What Do Different Evaluation Metrics Tell Us About Saliency Models?
(2016), arXiv 1604.03605, compares them. The MATLAB code of its benchmark takes thresholds at fixated values only
(AUC-Judd) or at steps of 0.1 (AUC-Borji, shuffled AUC) and breaks ties by jitter; here nothing depends on thresholds
or jitter, as in pysaliency.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.gaze.base.density import Map, fixated, pixels


def auc_judd(
    saliency: Map, fixations: Float[Tensor, "n 2"], *, negatives: Literal["all", "unfixated"] = "all"
) -> float:
    """Return AUC-Judd: the negatives are the image's pixels.

    Learning to Predict Where Humans Look (Judd et al., 2009).

    Args:
        saliency: a map `(H, W)` of any scale, or a density.
        fixations: `(N, 2)`, x and y in pixels.
        negatives: "all" pixels, as in pysaliency, or those "unfixated", as in the benchmark's MATLAB code.

    Returns:
        A number in 0..1; 0.5 for a constant map.

    Raises:
        OptionError: no fixation, one outside the image, or no pixel that was not fixated.
    """
    validate.one_of("negatives", negatives, ("all", "unfixated"))
    found, rows, columns = fixated(saliency, fixations)
    left = torch.ones_like(found, dtype=torch.bool)
    if negatives == "unfixated":
        left[rows, columns] = False
        if not left.any():
            raise OptionError('negatives="unfixated" needs a pixel without a fixation; take negatives="all"')
    return _area(found[rows, columns], found[left])


def auc_borji(
    saliency: Map, fixations: Float[Tensor, "n 2"], *, repeats: int = 100, generator: torch.Generator
) -> float:
    """Return AUC-Borji: the negatives are as many pixels as there are fixations, drawn uniformly.

    Quantitative Analysis of Human-Model Agreement in Visual Saliency Modeling (Borji et al., 2013). Its expectation is
    `auc_judd` with all pixels; the draws add noise.

    Args:
        saliency: a map `(H, W)` of any scale, or a density.
        fixations: `(N, 2)`, x and y in pixels.
        repeats: how often negatives are drawn; the result is the mean.
        generator: draws them.
    """
    validate.count("repeats", repeats, 1)
    found, rows, columns = fixated(saliency, fixations)
    drawn = torch.randint(found.numel(), (repeats, len(rows)), generator=generator)
    return sum(_area(found[rows, columns], found.flatten()[each]) for each in drawn) / repeats


def auc_shuffled(saliency: Map, fixations: Float[Tensor, "n 2"], others: Float[Tensor, "m 2"]) -> float:
    """Return shuffled AUC: the negatives are fixations on other images, so that a centre bias gains nothing.

    Visual correlates of fixation selection (Tatler et al., 2005). All of the others count, as in pysaliency; the
    benchmark's MATLAB code draws as many as there are fixations, 100 times.

    Args:
        saliency: a map `(H, W)` of any scale, or a density.
        fixations: `(N, 2)`, x and y in pixels.
        others: `(M, 2)`, fixations on other images in this image's pixels: `Fixations.elsewhere`.
    """
    found, rows, columns = fixated(saliency, fixations)
    height, width = found.shape
    other_rows, other_columns = pixels("others", others, (height, width))
    if not len(other_rows):
        raise OptionError("others must have at least one fixation of another image")
    return _area(found[rows, columns], found[other_rows, other_columns])


def _area(positives: Tensor, negatives: Tensor) -> float:
    ordered = negatives.flatten().sort().values
    below = torch.searchsorted(ordered, positives.contiguous())
    at_most = torch.searchsorted(ordered, positives.contiguous(), right=True)
    return float((below + at_most).double().mean() / (2 * len(ordered)))
