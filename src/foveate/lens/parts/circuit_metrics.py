"""Measures of how well scores of heads find a known circuit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import ShapeError, shown


class CircuitMetrics(NamedTuple):
    """Agreement of scores with a circuit: the area under the ROC, and the rest at the threshold with the best F1.

    `release_f1` is what the paper's code calls F1: the harmonic mean of recall and of the share of others left out.
    """

    auc: float
    precision: float
    recall: float
    f1: float
    release_f1: float


def circuit_metrics(scores: Float[Tensor, "..."], circuit: Bool[Tensor, "..."]) -> CircuitMetrics:
    """Compare scores of heads with the heads of a known circuit."""
    truth, flat = circuit.flatten(), scores.flatten().double()
    if circuit.dtype != torch.bool or circuit.shape != scores.shape or bool(truth.all()) or not bool(truth.any()):
        raise ShapeError(f"circuit must be bool like scores, with heads in it and out of it; got {shown(circuit)}")
    gap = flat[truth][:, None] - flat[~truth]
    auc = float(((gap > 0) + 0.5 * (gap == 0)).mean())
    best = CircuitMetrics(auc, 0.0, 0.0, 0.0, 0.0)
    for threshold in flat.unique():
        chosen = flat >= threshold
        hits = int((chosen & truth).sum())
        precision, recall = hits / int(chosen.sum()), hits / int(truth.sum())
        left_out = 1.0 - int((chosen & ~truth).sum()) / int((~truth).sum())
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        if f1 > best.f1:
            best = CircuitMetrics(auc, precision, recall, f1, 2 * recall * left_out / max(recall + left_out, 1e-12))
    return best
