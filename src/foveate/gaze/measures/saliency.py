"""Measures of saliency maps against fixations (NSS, information gain) and against other maps (CC, SIM, KL).

What Do Different Evaluation Metrics Tell Us About Saliency Models? (2016), arXiv 1604.03605.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.gaze.base.density import Map, SaliencyMap, as_density, fixated, values

#: Added to densities by the MIT/Tuebingen benchmark.
MIT_EPS = 2.2204e-16


def nss(saliency: Map, fixations: Float[Tensor, "n 2"]) -> float:
    """Return the normalised scanpath saliency, mean over fixations of (S(x) - mean S) / std S.

    The standard deviation is that of all pixels, divided by their number (pysaliency); MATLAB's benchmark divides by
    one less. A pixel that was fixated twice counts twice. A constant map has 0.

    Components of bottom-up gaze allocation in natural images (Peters et al., 2005).

    Args:
        saliency: a map `(H, W)` of any scale, or a density.
        fixations: `(N, 2)`, x and y in pixels.
    """
    found, rows, columns = fixated(saliency, fixations)
    return float(_standard(found)[rows, columns].mean())


def cc(saliency: Map, other: Map) -> float:
    """Return Pearson's correlation of two maps over their pixels; 0 if one of them is constant."""
    one, two = _pair("saliency", saliency, "other", other)
    return float((_standard(one) * _standard(two)).mean())


def sim(saliency: Map, other: Map) -> float:
    """Return the similarity, sum of min(P, Q): the overlap of the two maps as densities.

    A map with negative values is raised to 0 first (pysaliency); MATLAB's benchmark stretches every map to 0..1 before
    it makes a density of it, which gives another number where a map's least value is over 0.
    """
    one, two = _pair("saliency", saliency, "other", other)
    return float(torch.minimum(as_density(one), as_density(two)).sum())


def kl(saliency: Map, empirical: Map, *, eps: float = MIT_EPS) -> float:
    """Return the Kullback-Leibler divergence of a model's density P from the empirical one Q, in nats.

        sum Q log(eps + Q / (P + eps))

    This is the form of the MIT/Tuebingen benchmark. With `eps=0` it is the divergence itself, sum Q log(Q / P) over the
    pixels with Q > 0, which is infinite if P is 0 at one of them.

    Args:
        saliency: the model's map `(H, W)`, or its density P.
        empirical: the people's map, or its density Q: `Fixations.density`.
        eps: added where the formula says.
    """
    validate.at_least("eps", eps, 0)
    p, q = (as_density(each) for each in _pair("saliency", saliency, "empirical", empirical))
    return float(torch.where(q > 0, q * torch.log(eps + q / (p + eps)), 0).sum())


def information_gain(
    saliency: SaliencyMap, fixations: Float[Tensor, "n 2"], baseline: SaliencyMap | None = None, *, eps: float = 0.0
) -> float:
    """Return the information gain over a baseline, mean over fixations of log2(P(x) / B(x)), bits per fixation.

    Information-theoretic model comparison unifies saliency metrics (Kuemmerer et al., 2015).

    Args:
        saliency: the model's density P.
        fixations: `(N, 2)`, x and y in pixels.
        baseline: the baseline's density B, the centre bias in most papers; uniform by default.
        eps: added to both densities; 0, as in pysaliency, gives -inf for a fixation where P is 0.

    Raises:
        OptionError: a map that is no `SaliencyMap`, since the gain needs probabilities; no fixation; or a fixation
            where B is 0, with `eps=0`.
    """
    validate.at_least("eps", eps, 0)
    if not isinstance(saliency, SaliencyMap) or not isinstance(baseline, SaliencyMap | None):
        raise OptionError(
            "information_gain needs densities: SaliencyMap.from_scores or .from_logits makes one of a map"
        )
    found, rows, columns = fixated(saliency, fixations)
    base = values("baseline", baseline or SaliencyMap.uniform(saliency.size))
    _same_size("saliency", found, "baseline", base)
    own, other = found[rows, columns] + eps, base[rows, columns] + eps
    if not (other > 0).all():
        raise OptionError("baseline must be over 0 at every fixation; a small eps makes it so")
    return float((own.log() - other.log()).mean() / math.log(2))


def _standard(x: Tensor) -> Tensor:
    """Return a map with mean 0 and standard deviation 1; zeros if it is constant."""
    if x.max() == x.min():  # rounding of the mean would leave it a spread
        return torch.zeros_like(x)
    centred = x - x.mean()
    return centred / centred.square().mean().sqrt()


def _pair(name: str, one: Map, other_name: str, other: Map) -> tuple[Tensor, Tensor]:
    found = values(name, one), values(other_name, other)
    _same_size(name, found[0], other_name, found[1])
    return found


def _same_size(name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ShapeError(f"{name} {tuple(one.shape)} and {other_name} {tuple(other.shape)} must be of one size (H, W)")
