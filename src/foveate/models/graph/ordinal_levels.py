"""Ordered levels of truthfulness as bits, and the scores of predicted levels.

Leveraging Graph Structures to Detect Hallucinations in Large Language Models (2024), arXiv 2407.04485.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown


def ordinal_bits(levels: Int[Tensor, "*n"], count: int = 4) -> Float[Tensor, "*n bits"]:
    """Return levels 0..count-1 in `count - 1` bits: as many ones as the level says, then zeros."""
    validate.count("count", count, 2)
    _check_levels("levels", levels, count)
    return (torch.arange(count - 1, device=levels.device) < levels[..., None]).float()


def ordinal_levels(logits: Float[Tensor, "*n bits"]) -> Int[Tensor, "*n"]:
    """Return the level of each row of logits: the place of the last bit whose logit is above 0, counted from 1.

    As in the release, bits below it may be 0: (0, 1, 1) is level 3. Bits themselves, 0 or 1, are logits too.
    """
    place = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    return torch.where(logits > 0, place, 0).amax(-1)


class LevelScores(NamedTuple):
    """Scores of predicted levels.

    accuracy: share of right levels.
    recall, precision: means over the levels that occur among labels or predictions; 0 for one without a denominator.
    auprc: mean over levels of the area under the precision-recall curve of the predicted level alone.
    binary_recall: of the examples with the highest level, the share that is not called level 0. NaN without any.
    agreement: share of predictions at most one level off.
    """

    accuracy: float
    recall: float
    precision: float
    auprc: float
    binary_recall: float
    agreement: float


def level_scores(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], count: int = 4) -> LevelScores:
    """Return the paper's scores of predicted levels 0..count-1.

    As in the release, the precision-recall curve comes from the predicted level, not from probabilities: a level's area
    is `recall * precision + (1 - recall) * prevalence`.
    """
    validate.count("count", count, 2)
    _check_levels("predicted", predicted, count)
    _check_levels("labels", labels, count)
    if predicted.shape != labels.shape or predicted.dim() != 1 or not len(labels):
        raise ShapeError(f"predicted and labels must be (N,), N > 0; got {shown(predicted)} and {shown(labels)}")
    level = torch.arange(count, device=labels.device)
    given, called = labels[:, None] == level, predicted[:, None] == level
    hits, true, named = ((x.double()).sum(0) for x in (given & called, given, called))
    recall, precision = hits / true.clamp_min(1), hits / named.clamp_min(1)
    seen, prevalence = (true + named) > 0, true / len(labels)
    auprc = recall * precision + (1 - recall) * prevalence
    return LevelScores(
        float((predicted == labels).double().mean()), float(recall[seen].mean()), float(precision[seen].mean()),
        float(auprc.mean()), float((predicted[labels == count - 1] > 0).double().mean()),
        float(((predicted - labels).abs() <= 1).double().mean()),
    )  # fmt: skip


def _check_levels(name: str, levels: Tensor, count: int) -> None:
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.dtype == torch.bool:
        raise ShapeError(f"{name} must be whole numbers, a tensor of int64; got {shown(levels)}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < count:
        raise OptionError(f"{name} must be in 0..{count - 1}; got {int(levels.min())}..{int(levels.max())}")
