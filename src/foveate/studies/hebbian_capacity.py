"""How many associations a Hebbian memory holds, and how far its errors carry.

The theory of Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289; see
`foveate.studies.pavlovian_attention` for what is the paper's and what is reconstructed.
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
    """What comes back where each key asks for its own value: `signal + interference`, `(..., N, Dv)` both."""

    signal: Tensor
    interference: Tensor

    @property
    def snr(self) -> Float[Tensor, "*b n"]:
        """Of each item: the energy of the signal over that of the interference; inf without any."""
        return self.signal.square().sum(-1) / self.interference.square().sum(-1)

    @property
    def overall(self) -> Float[Tensor, "*b"]:
        """The same of all items together: for random unit keys d_k / (N - 1)."""
        return self.signal.square().sum((-2, -1)) / self.interference.square().sum((-2, -1))

    @property
    def error(self) -> Float[Tensor, "*b n"]:
        """The length of the interference over that of the signal."""
        return self.snr.rsqrt()


def retrieval_snr(k: Float[Tensor, "*b n d"], v: Float[Tensor, "*b n dv"]) -> Retrieval:
    """Signal `v_j |k_j|²` and interference `sum_{i != j} v_i (k_i . k_j)` of a Hebbian memory; O(N D Dv)."""
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"k and v must share all but their width; got k {tuple(k.shape)}, v {tuple(v.shape)}")
    signal = v * k.square().sum(-1, keepdim=True)
    return Retrieval(signal, k @ (k.mT @ v) - signal)


@dataclass(frozen=True)
class Capacity:
    """Mean relative errors of retrieval for numbers of associations."""

    lengths: tuple[int, ...]
    errors: tuple[float, ...]
    largest: int  # the most associations, of those tried, with an error below eps; 0 if there are none


def capacity_curve(
    d_k: int, lengths: Sequence[int], eps: float = 0.5, *, case: Literal["average", "worst"] = "average",
    trials: int = 20, generator: torch.Generator | None = None,
) -> Capacity:  # fmt: skip
    """How the error grows with the number of associations.

    Args:
        d_k: width of the keys.
        lengths: numbers of associations to try.
        eps: the error that is too much.
        case: "average": random unit keys and values, `trials` times: interference adds up like a random walk, `error² =
            (N - 1) / d_k`, and what fits grows like d_k. "worst": keys that overlap by `1 / sqrt(d_k)`, which is what
            random ones do, but all with the same sign, and values in one direction: it adds up in full, `error = (N -
            1) / sqrt(d_k)`, and what fits grows like `sqrt(d_k)`. Such keys exist up to N = d_k - 1.
    """
    validate.count("d_k", d_k, 2)
    validate.count("trials", trials, 1)
    validate.at_least("eps", eps, 0)
    validate.one_of("case", case, ("average", "worst"))
    most = max(lengths, default=0)
    if not lengths or min(lengths) < 1 or (case == "worst" and most >= d_k):
        raise OptionError(f"lengths={list(lengths)} must be at least 1, and for the worst case less than d_k={d_k}")
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
    """How errors pile up along a network.

    Args:
        error: after each layer, `(L,)`: noise over signal, or the probability of having failed.
        depth: the first layer, counted from 1, after which noise exceeds the signal, or failure is more likely than
            not; None where all L are passed.
    """

    error: Tensor
    depth: int | None


def error_propagation(
    layers: int, heads: int, eps: float, *, combine: Literal["average", "vote"] = "average", gain: float = 1.0
) -> Propagation:
    """Reliability of `layers` layers in which `heads` heads retrieve the same, each with error eps.

    Args:
        eps: noise over signal of one head for "average"; its probability of failing, in 0..1, for "vote".
        combine: "average": heads' noises are independent, so a layer adds `eps / sqrt(heads)`, in squares. "vote": a
            layer fails unless more than half of its heads are right, and one failed layer fails the network.
        gain: by how much a layer amplifies noise that reaches it against the signal, for "average"; 1 in a residual
            stream that hands both on as they are.
    """
    validate.count("layers", layers, 1)
    validate.count("heads", heads, 1)
    validate.one_of("combine", combine, ("average", "vote"))
    validate.at_least("gain", gain, 0)
    place = torch.arange(layers, dtype=torch.float64)
    if combine == "average":
        validate.at_least("eps", eps, 0)
        error = eps * torch.sqrt((gain ** (2 * place)).cumsum(0) / heads)
    else:
        validate.between("eps", eps, 0, 1)
        fails = sum(
            math.comb(heads, wrong) * eps**wrong * (1 - eps) ** (heads - wrong)
            for wrong in range((heads + 1) // 2, heads + 1)
        )
        error = 1 - (1 - fails) ** (place + 1)
    lost = (error > (1.0 if combine == "average" else 0.5)).nonzero()
    return Propagation(error, int(lost[0]) + 1 if lost.numel() else None)
