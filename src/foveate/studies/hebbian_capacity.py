"""The capacity of a Hebbian memory, and the propagation of its errors through layers.

The theory is that of Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289;
`foveate.studies.pavlovian_attention` separates the paper's part from reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError


@dataclass(frozen=True)
class Retrieval:
    """The retrieval of each key's own value: `signal + interference`, both `(..., N, Dv)`."""

    signal: Tensor
    interference: Tensor

    @property
    def snr(self) -> Float[Tensor, "*b n"]:
        """The energy ratio of signal and interference for each item; inf without interference."""
        return self.signal.square().sum(-1) / self.interference.square().sum(-1)

    @property
    def overall(self) -> Float[Tensor, "*b"]:
        """The energy ratio over all items together: d_k / (N - 1) for random unit keys."""
        return self.signal.square().sum((-2, -1)) / self.interference.square().sum((-2, -1))

    @property
    def error(self) -> Float[Tensor, "*b n"]:
        """The ratio of the norms of interference and signal."""
        return self.snr.rsqrt()


def retrieval_snr(k: Float[Tensor, "*b n d"], v: Float[Tensor, "*b n dv"]) -> Retrieval:
    """Return signal `v_j |k_j|²` and interference `sum_{i != j} v_i (k_i . k_j)` of a Hebbian memory; O(N D Dv)."""
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"k and v must share all but their width; got k {tuple(k.shape)}, v {tuple(v.shape)}")
    signal = v * k.square().sum(-1, keepdim=True)
    return Retrieval(signal, k @ (k.mT @ v) - signal)


@dataclass(frozen=True)
class Capacity:
    """Mean relative retrieval errors for several numbers of associations."""

    lengths: tuple[int, ...]
    errors: tuple[float, ...]
    largest: int  # the largest tried number with an error below eps; 0 if there is none


def capacity_curve(
    d_k: int, lengths: Sequence[int], eps: float = 0.5, *, case: Literal["average", "worst"] = "average",
    trials: int = 20, generator: torch.Generator | None = None,
) -> Capacity:  # fmt: skip
    """Measure the error as a function of the number of associations.

    Args:
        d_k: the width of the keys.
        lengths: numbers of associations to try.
        eps: the limit of the error.
        case: "average": random unit keys and values, `trials` times. Interference adds up as a random walk, `error² =
            (N - 1) / d_k`, and the capacity grows as d_k. "worst": keys whose overlaps have the typical size of random
            ones, `1 / sqrt(d_k)`, but all the same sign, and values in one direction. Interference adds up linearly,
            `error = (N - 1) / sqrt(d_k)`, and the capacity grows as `sqrt(d_k)`. Such keys exist up to N = d_k - 1.
        trials: the number of random draws.
        generator: draws keys and values.
    """
    validate.count("d_k", d_k, 2)
    validate.count("trials", trials, 1)
    validate.at_least("eps", eps, 0)
    validate.one_of("case", case, ("average", "worst"))
    most = max(lengths, default=0)
    if not lengths or min(lengths) < 1 or (case == "worst" and most >= d_k):
        raise OptionError(f"lengths={list(lengths)} must each be at least 1, and with case='worst' below d_k={d_k}")
    errors = [_mean_error(d_k, n, case, trials, generator) for n in lengths]
    return Capacity(
        tuple(lengths), tuple(errors), max((n for n, e in zip(lengths, errors, strict=True) if e < eps), default=0)
    )


def _mean_error(d_k: int, n: int, case: str, trials: int, generator: torch.Generator | None) -> float:
    if case == "average":
        k, v = (F.normalize(torch.randn(trials, n, d_k, generator=generator).double(), dim=-1) for _ in range(2))
    else:
        overlap, basis = d_k**-0.5, torch.eye(d_k, dtype=torch.float64)
        k = math.sqrt(overlap) * basis[:1] + math.sqrt(1 - overlap) * basis[1 : n + 1]
        v = basis[:1].expand(n, -1)
    return retrieval_snr(k, v).error.mean().item()


@dataclass(frozen=True)
class Propagation:
    """The accumulated error of a network.

    Args:
        error: the error after each layer, `(L,)`: noise over signal, or the probability of failure.
        depth: the first layer, counted from 1, after which noise exceeds the signal, or the probability of failure
            exceeds 0.5; None if there is none.
    """

    error: Tensor
    depth: int | None


def error_propagation(
    layers: int, heads: int, eps: float, *, combine: Literal["average", "vote"] = "average", gain: float = 1.0
) -> Propagation:
    """Compute the reliability of layers whose heads retrieve the same value redundantly, each with error eps.

    Args:
        layers, heads: the number of layers, and of heads in each.
        eps: with "average", noise over signal of one head; with "vote", its probability of failure, in 0..1.
        combine: "average": the heads' noises are independent, so that squared errors `eps² / heads` add up over layers.
            "vote": a layer fails unless more than half of its heads are right, and one failed layer fails the network.
        gain: with "average", the factor by which a layer amplifies incoming noise relative to the signal; 1 for a
            residual stream that passes both unchanged.
    """
    validate.count("layers", layers, 1)
    validate.count("heads", heads, 1)
    validate.one_of("combine", combine, ("average", "vote"))
    validate.at_least("gain", gain, 0)
    depth = torch.arange(layers, dtype=torch.float64)
    if combine == "average":
        validate.at_least("eps", eps, 0)
        error = eps * torch.sqrt((gain ** (2 * depth)).cumsum(0) / heads)
    else:
        validate.between("eps", eps, 0, 1)
        fails = sum(
            math.comb(heads, wrong) * eps**wrong * (1 - eps) ** (heads - wrong)
            for wrong in range((heads + 1) // 2, heads + 1)
        )
        error = 1 - (1 - fails) ** (depth + 1)
    lost = (error > (1.0 if combine == "average" else 0.5)).nonzero()
    return Propagation(error, int(lost[0]) + 1 if lost.numel() else None)
