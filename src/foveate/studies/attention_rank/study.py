"""The study of On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153: rank against the number of heads.

The other modules of this package have the task, the model, the random heads and the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.studies.attention_rank.nearest_point import NearestPointTask
from foveate.studies.attention_rank.random_heads import RandomHeads, draw_vectors, error_curve
from foveate.studies.attention_rank.rank_attention import RankAttention
from foveate.studies.attention_rank.rank_curve import mean_error, rank_curve
from foveate.studies.base.fits import slope
from foveate.studies.base.report import Curve, Finding, Plot
from foveate.studies.base.study import Study


@final
@dataclass(frozen=True)
class AttentionRank(Study):
    """A function that one head of full rank computes needs very many heads of low rank.

    On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153. The lower bounds of the paper hold for all
    heads. Here random heads of rank 1 with the best output weights are the witness, and trained layers. The paper's
    target with biases, its layers in depth and its long contexts are not part of the study.

    Args:
        draws: sets of points on which layers are measured.
        dims: the dimensions of the random heads.
        heads: the largest number of random heads.
        repeats: the draws of random heads that a curve is the mean of.
        levels: the errors for which heads are counted, descending.
        steps: the number of training steps for each rank.
    """

    draws: int = 1000
    dims: tuple[int, ...] = (2, 4, 6, 8, 12, 16)
    heads: int = 1024
    repeats: int = 8
    levels: tuple[float, ...] = (0.48, 0.42, 0.35, 0.3)
    steps: int = 800

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("heads", 64), ("repeats", 1), ("steps", 1)):
            validate.count(name, getattr(self, name), least)

    def measure(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        yield from self._full_rank(generator)
        yield from self._random_heads(generator)
        yield from self._curse(generator)
        yield from self._plane(generator)
        yield from self._trained(generator)

    @classmethod
    def example(cls) -> Self:
        return cls(draws=200, dims=(2, 4, 8), heads=128, repeats=2, levels=(0.48, 0.42), steps=20)

    def _full_rank(self, generator: torch.Generator) -> Iterator[Finding]:
        tasks = [NearestPointTask(16, n, queries=4) for n in (2, 8, 64)]
        hard, soft = RankAttention.full_rank(16).double(), RankAttention.full_rank(16, temperature=1e-3).double()
        yield Finding(
            "One head of full rank finds the nearest point exactly, among any number of points.",
            "squared error of the head Q = K = VO = I among 2, 8 and 64 points: 0",
            max(mean_error(hard, task, self.draws, generator) for task in tasks), 0.0, "equal", 1e-12, "squared error",
        )  # fmt: skip
        yield Finding(
            "With a softmax the same head comes as near as wanted, at a low temperature.",
            "squared error among 8 points at a temperature of 0.001: near 0",
            mean_error(soft, tasks[1], self.draws, generator), 0.01, "lower", unit="squared error",
        )  # fmt: skip

    def _random_heads(self, generator: torch.Generator) -> Iterator[Finding]:
        heads = RandomHeads.drawn(8, 64, generator)
        yield Finding(
            "Heads of rank 1 need very many heads in high dimension, with two points already.",
            "squared error of 64 random heads in 8 dimensions, with the best weights: not far below the 0.5 of "
            "answering the mean of the points",
            heads.error, 0.35, "higher", unit="squared error",
        )  # fmt: skip
        seen = mean_error(heads.module(), NearestPointTask(8, 2, queries=1), 20 * self.draws, generator)
        yield Finding(
            "The error of weighted heads follows from how often they agree with each other and with the target.",
            "error of the layer on drawn points, less 1 - 2 a.b + aᵀ C a with the arcsine kernel C: 0",
            seen - heads.error, 0.0, "equal", 0.03, "squared error",
        )  # fmt: skip

    def _curse(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        curves = {dim: self._curve(dim, generator) for dim in self.dims}
        counts = {level: _heads_needed(curves, level) for level in self.levels}
        exponents = [slope(list(count), list(count.values())) for count in counts.values()]
        yield Finding(
            "The number of heads for an error is a power of the dimension, and the power grows as the error falls.",
            f"exponent for an error of {self.levels[-1]:g}, less that for {self.levels[0]:g}: above 0",
            exponents[-1] - exponents[0], 0.4, "higher", unit="exponent",
        )  # fmt: skip
        shown = [2**power for power in range(self.heads.bit_length())]
        lines = [Curve(f"d = {dim}", shown, [curve[n - 1].item() for n in shown]) for dim, curve in curves.items()]
        yield Plot("Random heads of rank 1 with the best weights", "heads", "squared error", lines, log_x=True)
        lines = [Curve(f"error {level:g}", list(count), list(count.values())) for level, count in counts.items()]
        yield Plot("Heads that an error needs", "dimension", "heads", lines, log_x=True, log_y=True)

    def _curve(self, dim: int, generator: torch.Generator) -> Tensor:
        """Return the least error for each number of heads, mean over draws."""
        drawn = [error_curve(*draw_vectors(dim, self.heads, generator)) for _ in range(self.repeats)]
        return torch.stack(drawn).mean(0)

    def _plane(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        numbers, task = (1, 2, 4, 8, 16), NearestPointTask(2, 2, queries=1)
        found = [mean_error(RankAttention.spaced(n), task, 20 * self.draws, generator) for n in numbers]
        predicted = [1 / 6 + 1 / (3 * n**2) for n in numbers]
        yield Finding(
            "In two dimensions a few heads of rank 1 at equal angles do well.",
            "squared error of the mean of H heads with q = k: 1/6 + 1/(3 H²); largest deviation 0",
            max(abs(a - b) for a, b in zip(found, predicted, strict=True)), 0.03, "lower", unit="squared error",
        )  # fmt: skip
        yield Finding(
            "In two dimensions there is no curse: few random heads with the best weights do well too.",
            f"squared error of 16 random heads, mean of {self.repeats} draws: below a fifth",
            fmean(RandomHeads.drawn(2, 16, generator).error for _ in range(self.repeats)), 0.2, "lower",
            unit="squared error",
        )  # fmt: skip
        curve = Curve("heads at equal angles, q = k", numbers, found, predicted)
        yield Plot("Two points in the plane", "heads", "squared error", [curve], log_x=True)

    def _trained(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        found = rank_curve(NearestPointTask(8, 4), (1, 2, 4, 8), 8, steps=self.steps, batch=128, generator=generator)
        yield Finding(
            "Trained layers show it too: at equal rank times heads, the error falls with the rank.",
            "squared error of one head of rank 8, over that of 8 heads of rank 1, with 4 points in 8 dimensions: < 1",
            found[-1].error / found[0].error, 0.8, "lower", unit="ratio",
        )  # fmt: skip
        curve = Curve("rank times heads = 8", [each.rank for each in found], [each.error for each in found])
        yield Plot("Trained attention in 8 dimensions", "rank of each head", "squared error", [curve], log_x=True)


def _heads_needed(curves: dict[int, Tensor], level: float) -> dict[int, int]:
    """Return the smallest number of heads with an error of at most `level`, by dimension above 2, if there is one."""
    reached = {dim: (curve <= level).nonzero() for dim, curve in curves.items() if dim > 2}
    return {dim: int(where[0]) + 1 for dim, where in reached.items() if len(where)}
