"""The study of Scan and Snap (2023), arXiv 2305.16380: which tokens gain attention, in which order, and when it stops.

`foveate.studies.scan_and_snap.simulator` has the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch

from foveate.core import validate
from foveate.lens.parts.rank_correlation import rank_correlation
from foveate.studies.base.fits import slope
from foveate.studies.base.report import Curve, Finding, Plot
from foveate.studies.base.study import Study
from foveate.studies.scan_and_snap.dynamics import Dynamics
from foveate.studies.scan_and_snap.simulator import ScanAndSnap
from foveate.studies.scan_and_snap.token_classes import TokenClasses

_SHOWN = 60  # points of a curve over time


@final
@dataclass(frozen=True)
class ScanAndSnapStudy(Study):
    """Attention scans the context for distinct tokens, then keeps the combination that it has found.

    Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer (2023), arXiv
    2305.16380. The data are the paper's synthetic ones, with sequences of infinite length and exact expectations.

    Args:
        classes, queries, distinct, common: the data; see `TokenClasses.drawn`.
        steps: the number of steps of each training.
        rates: the decoder's learning rates, with the attention's fixed, for the time of the snap.
        many: numbers of classes for the time of the snap.
        ratios: the attention's learning rates beside a decoder's of 1, for the entropy.
    """

    classes: int = 4
    queries: int = 2
    distinct: int = 10
    common: int = 20
    steps: int = 2000
    rates: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    many: tuple[int, ...] = (2, 4, 8, 16)
    ratios: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        for name, least in (("classes", 1), ("queries", 1), ("distinct", 2), ("common", 1), ("steps", 8)):
            validate.count(name, getattr(self, name), least)

    def measure(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        data = self._data(self.classes, generator)
        seen = ScanAndSnap(data).run(1.0, 1.0, self.steps)
        yield from _scan(seen)
        yield from _order(seen)
        yield from _growth(ScanAndSnap(data).run(1.0, 0.01, self.steps))
        yield _freezing(seen)
        yield from self._snap_over_rates(data)
        yield from self._snap_over_classes(generator)
        yield from self._sparsity(data)
        yield _without_length(ScanAndSnap(data, normalize=False).run(1.0, 1.0, self.steps))

    @classmethod
    def example(cls) -> Self:
        return cls(steps=200, rates=(0.5, 1.0), many=(2, 4), ratios=(0.01, 1.0))

    def _data(self, classes: int, generator: torch.Generator) -> TokenClasses:
        queries = max(1, classes * self.queries // self.classes)
        return TokenClasses.drawn(classes, queries, self.distinct, self.common, generator=generator)

    def _snap_over_rates(self, data: TokenClasses) -> Iterator[Finding | Plot]:
        times = [_snap(data, rate) for rate in self.rates]
        yield Finding(
            "Attention stops growing after a time of the order of K ln M over the decoder's learning rate.",
            "the snap's step is in inverse proportion to the decoder's rate, at a fixed rate of attention: exponent -1",
            slope(self.rates, times), -1.0, "equal", 0.1, "exponent",
        )  # fmt: skip
        scale = len(data.p) * math.log(data.vocabulary)
        predicted = _through(times, [scale / rate for rate in self.rates])
        curve = Curve(f"K = {len(data.p)}, M = {data.vocabulary}", self.rates, times, predicted)
        yield Plot("When attention snaps", "learning rate of the decoder", "step of the snap", [curve], True, True)

    def _snap_over_classes(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        data = [self._data(number, generator) for number in self.many]
        scales = [len(each.p) * math.log(each.vocabulary) for each in data]
        times = [_snap(each, 0.5) for each in data]
        yield Finding(
            "The time grows with the number K of next tokens and the vocabulary M as K ln M.",
            "the snap's step is in proportion to K ln M: exponent 1",
            slope(scales, times), 1.0, "equal", 0.2, "exponent",
        )  # fmt: skip
        curve = Curve("learning rate 0.5", scales, times, _through(times, scales))
        yield Plot("The snap and the number of next tokens", "K ln M", "step of the snap", [curve], True, True)

    def _sparsity(self, data: TokenClasses) -> Iterator[Finding | Plot]:
        found = [ScanAndSnap(data).run(1.0, ratio, self.steps).entropy()[-1].item() for ratio in self.ratios]
        yield Finding(
            "The faster attention learns beside the decoder, the sparser it is in the end.",
            f"entropy of the token composition at a ratio of {self.ratios[-1]:g}, less that at {self.ratios[0]:g}: "
            "below 0",
            found[-1] - found[0], -0.08, "lower", unit="nats",
        )  # fmt: skip
        curve = Curve("after training", self.ratios, found)
        labels = "learning rate of attention, that of the decoder 1", "entropy of the token composition, nats"
        yield Plot("How sparse attention becomes", *labels, [curve], log_x=True)


def _scan(seen: Dynamics) -> Iterator[Finding | Plot]:
    distinct, common = seen.distinct_mass(), seen.common_mass()
    yield Finding(
        "Attention moves from common tokens to distinct ones.",
        "the share of attention on distinct tokens at the end, over that at the start: above 1",
        (distinct[-1] / distinct[0]).item(), 1.3, "higher", unit="ratio",
    )  # fmt: skip
    rising, falling = (seen.distinct_scores() > 0).double(), (seen.common_scores() < 0).double()
    yield Finding(
        "The score of every distinct token rises and that of every common token falls.",
        "share of scores with this sign: 1",
        torch.cat([rising, falling.flatten()]).mean().item(), 1.0, "higher", unit="share of scores",
    )  # fmt: skip
    steps = _steps(len(distinct))
    masses = {"distinct tokens": distinct, "common tokens": common}
    curves = [Curve(name, steps, mass[steps].tolist()) for name, mass in masses.items()]
    yield Plot("Where attention goes", "step", "share of attention", curves)


def _order(seen: Dynamics) -> Iterator[Finding]:
    chosen = [(seen.data.p[number, own], number, own) for number, own in enumerate(seen.data.distinct)]
    ranks = [rank_correlation(torch.stack([p, seen.z[-1][seen.data.query[number], own]])) for p, number, own in chosen]
    yield Finding(
        "Among the distinct tokens of a next token, attention grows in the order of co-occurrence.",
        "rank correlation of P(l | m, n) and the final score, the least of all classes: 1",
        min(each[0, 1].item() for each in ranks), 0.99, "higher", unit="rank correlation",
    )  # fmt: skip


def _growth(slow: Dynamics) -> Iterator[Finding | Plot]:
    """Compare scores with their law of growth, where the decoder is much faster."""
    own, predicted, found = slow.data.distinct, slow.predicted_scores(), slow.distinct_scores()
    yield Finding(
        "With a decoder that is much faster, a distinct token's score grows as the square of its share of attention.",
        "scores are -1/2 ln(1 - 2 P² B), with one B for each class: largest deviation, over the largest score, 0",
        ((predicted[own] - found).abs().max() / found.max()).item(), 0.02, "lower", unit="of the largest score",
    )  # fmt: skip
    curves = []
    for number, tokens in enumerate(own):
        z, p = slow.z[-1][slow.data.query[number], tokens], slow.data.p[number, tokens]
        order = p.argsort()
        lists = [values[order].tolist() for values in (p, z, predicted[number, tokens])]
        curves.append(Curve(f"next token {number}", *lists))
    yield Plot("Scores of distinct tokens, attention's learning rate 0.01", "P(l | m, n)", "final score", curves)


def _freezing(seen: Dynamics) -> Finding:
    largest, quarter = seen.z.flatten(1).amax(1), (len(seen.z) - 1) // 4
    first, last = largest[quarter] - largest[0], largest[-1] - largest[-1 - quarter]
    return Finding(
        "No token takes all: growth turns from fast to that of a logarithm, and attention stays nearly as it is.",
        "growth of the largest score in the first quarter of the steps, over that in the last: far above 1",
        (first / last).item(), 5.0, "higher", unit="ratio",
    )  # fmt: skip


def _without_length(seen: Dynamics) -> Finding:
    rising, falling = (seen.distinct_scores() > 0).double(), (seen.common_scores() < 0).double()
    return Finding(
        "Without the division by the length of the attended sum, attention does not tell these tokens apart.",
        "share of scores with the sign above: clearly below 1",
        torch.cat([rising, falling.flatten()]).mean().item(), 0.9, "lower", unit="share of scores",
    )  # fmt: skip


def _snap(data: TokenClasses, rate: float) -> int:
    """Return the step of the snap, in a training that lasts well beyond it, with a decoder that is much faster."""
    steps = math.ceil(6 * len(data.p) * math.log(data.vocabulary) / rate)
    found = ScanAndSnap(data).run(rate, 0.01, steps).snap_time()
    assert found is not None
    return found


def _through(values: Sequence[float], shape: Sequence[float]) -> list[float]:
    """Scale a predicted shape so that it has the values' geometric mean."""
    log = [math.log(value / each) for value, each in zip(values, shape, strict=True)]
    return [math.exp(sum(log) / len(log)) * each for each in shape]


def _steps(count: int) -> list[int]:
    """Return about sixty steps, more of them at the start."""
    return sorted({round((count - 1) * (number / _SHOWN) ** 3) for number in range(_SHOWN + 1)})
