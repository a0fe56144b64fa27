"""The study of Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289.

It measures the capacity of a head as a memory, and how its errors add up over layers. `hebbian_capacity.py` has the
theory, of which only the paper's abstract was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self, final

import torch
from torch.nn import functional as F

from foveate.core import validate
from foveate.studies.base.fits import slope
from foveate.studies.base.report import Curve, Finding, Plot
from foveate.studies.base.study import Study
from foveate.studies.hebbian_capacity import capacity_curve, error_propagation, retrieval_snr

_LIMIT = 0.5  # the error up to which a number of associations is within capacity


@final
@dataclass(frozen=True)
class PavlovianAttention(Study):
    """A head stores O(sqrt(d_k)) associations without error and O(d_k) on average; depth needs redundant heads.

    Understanding Transformers through the Lens of Pavlovian Conditioning (2025), arXiv 2508.08289. Only the paper's
    abstract was read; the measures are a reconstruction.

    Args:
        widths: the widths d_k of keys for the average capacity.
        worst_widths: those for the worst case.
        trials: the number of draws for each error.
        depth: the number of layers through which errors add up.
        redundancy: the numbers of heads in a layer that retrieve the same value.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    worst_widths: tuple[int, ...] = (64, 128, 256, 512)
    trials: int = 16
    depth: int = 12
    redundancy: tuple[int, ...] = (1, 4, 16)

    def __post_init__(self) -> None:
        validate.count("trials", self.trials, 1)
        validate.count("depth", self.depth, 1)

    def measure(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        yield from self._average(generator)
        yield from self._worst()
        yield from self._layers(generator)

    @classmethod
    def example(cls) -> Self:
        return cls(widths=(32, 64), worst_widths=(64, 256), trials=4, depth=4, redundancy=(1, 4))

    def _average(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        lengths = {d: sorted({max(2, round(d * share / 20)) for share in range(1, 11)}) for d in self.widths}
        found = {d: self._errors(d, lengths[d], "average", generator) for d in self.widths}
        predicted = {d: [math.sqrt((n - 1) / d) for n in lengths[d]] for d in self.widths}
        off = [abs(a / b - 1) for d in self.widths for a, b in zip(found[d], predicted[d], strict=True)]
        capacity = [_capacity(lengths[d], found[d]) for d in self.widths]
        yield Finding(
            "On average a head stores a number of associations in proportion to the width of its keys.",
            "exponent of the number of interfering ones within an error of 0.5, over the width: 1",
            slope(self.widths, capacity), 1.0, "equal", 0.15, "exponent",
        )  # fmt: skip
        yield Finding(
            "The errors of random associations add up as a random walk.",
            "error of N associations: sqrt((N - 1) / d_k); mean relative deviation 0",
            sum(off) / len(off), 0.1, "lower", unit="relative deviation",
        )  # fmt: skip
        curves = [Curve(f"d_k = {d}", lengths[d], found[d], predicted[d]) for d in self.widths]
        yield Plot("Random keys", "associations", "relative error", curves, True, True)

    def _worst(self) -> Iterator[Finding | Plot]:
        lengths = {d: list(range(2, 2 * math.isqrt(d))) for d in self.worst_widths}
        found = {d: self._errors(d, lengths[d], "worst", None) for d in self.worst_widths}
        capacity = [_capacity(lengths[d], found[d]) for d in self.worst_widths]
        yield Finding(
            "Where all overlaps of keys have one sign, a head stores a number in proportion to the root of the width.",
            "exponent of the number of interfering ones within an error of 0.5, over the width: 0.5",
            slope(self.worst_widths, capacity), 0.5, "equal", 0.1, "exponent",
        )  # fmt: skip
        predicted = {d: [(n - 1) / math.sqrt(d) for n in lengths[d]] for d in self.worst_widths}
        curves = [Curve(f"d_k = {d}", lengths[d], found[d], predicted[d]) for d in self.worst_widths]
        yield Plot("Keys whose overlaps all have one sign", "associations", "relative error", curves, True, True)

    def _layers(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        layers = list(range(1, self.depth + 1))
        found = {heads: self._accumulated(heads, generator) for heads in self.redundancy}
        predicted = {heads: error_propagation(self.depth, heads, _LIMIT).error.tolist() for heads in self.redundancy}
        off = [abs(found[heads][-1] / predicted[heads][-1] - 1) for heads in self.redundancy]
        yield Finding(
            "Errors add up over layers, and heads that retrieve the same value make up for depth.",
            "error after L layers of H heads: error of a head times sqrt(L / H); largest relative deviation 0",
            max(off), 0.15, "lower", unit="relative deviation",
        )  # fmt: skip
        curves = [Curve(f"{n} head{'s' * (n > 1)}", layers, found[n], predicted[n]) for n in self.redundancy]
        yield Plot("Error over layers", "layers", "noise over signal", curves)

    def _errors(
        self, d_k: int, lengths: list[int], case: Literal["average", "worst"], generator: torch.Generator | None
    ) -> list[float]:
        return list(capacity_curve(d_k, lengths, _LIMIT, case=case, trials=self.trials, generator=generator).errors)

    def _accumulated(self, heads: int, generator: torch.Generator) -> list[float]:
        """Return noise over signal after each layer, for a value that each head retrieves from a memory of its own."""
        d, n = 64, 17  # an error of sqrt(16 / 64) for each head
        noise, errors = torch.zeros(self.trials, d, dtype=torch.float64), []
        for _ in range(self.depth):
            k, v = F.normalize(torch.randn(2, self.trials, heads, n, d, generator=generator).double(), dim=-1)
            noise = noise + retrieval_snr(k, v).interference[:, :, 0].mean(1)  # the signal has length 1 and stays
            errors.append(noise.square().sum(-1).mean().sqrt().item())
        return errors


def _capacity(lengths: list[int], errors: list[float]) -> float:
    """Return the number of interfering associations at which the error crosses the limit, between those tried."""
    for (n, below), (m, above) in pairwise(zip(lengths, errors, strict=True)):
        if below < _LIMIT <= above:
            return n - 1 + (m - n) * (_LIMIT - below) / (above - below)
    return math.nan
