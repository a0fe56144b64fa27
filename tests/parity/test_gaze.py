"""Measures of gaze against pysaliency, multimatch-gaze and GazeParser, whose side is a record: see `gaze_record.py`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from foveate.gaze import (
    Fixations,
    SaliencyMap,
    Scanpath,
    Simplify,
    auc_judd,
    auc_shuffled,
    cc,
    information_gain,
    kl,
    multimatch,
    nss,
    scanmatch,
    sim,
)
from tests.parity import gaze_record as record

RECORD = json.loads(record.RECORD.read_text("utf-8"))
IMAGES = range(len(record.SIZES))


def seen() -> Fixations:
    xy, index = record.fixations()
    return Fixations(torch.tensor(xy), torch.tensor(index), torch.tensor(record.SIZES))


def scores(number: int) -> torch.Tensor:
    return torch.tensor(record.scores(record.images()[number]))


def scanpath(rows: np.ndarray) -> Scanpath:
    return Scanpath(torch.tensor(rows[:, :2]), record.SCREEN, torch.tensor(rows[:, 2]))


@pytest.mark.parametrize("number", IMAGES)
def test_maps_against_fixations(number: int) -> None:
    theirs, own, others = RECORD["saliency"], seen().of(number), seen().elsewhere(number)
    assert auc_judd(scores(number), own) == pytest.approx(theirs["auc_judd"][number], abs=1e-12)
    assert auc_shuffled(scores(number), own, others) == pytest.approx(theirs["auc_shuffled"][number], abs=1e-12)
    assert nss(scores(number), own) == pytest.approx(theirs["nss"][number], abs=1e-12)
    unfixated = auc_judd(scores(number), own, negatives="unfixated")
    assert unfixated == pytest.approx(theirs["auc_unfixated"][number], abs=1e-12)


@pytest.mark.parametrize("number", IMAGES)
def test_densities_against_fixations(number: int) -> None:
    density, own = SaliencyMap.from_scores(scores(number) + 1), seen().of(number)
    left = SaliencyMap(torch.tensor(record.baseline(record.images()[number])))
    theirs = RECORD["saliency"]
    assert information_gain(density, own) == pytest.approx(theirs["information_gain"][number], abs=1e-12)
    assert information_gain(density, own, left) == pytest.approx(theirs["information_gain_left"][number], abs=1e-12)


def test_maps_against_maps() -> None:
    one, two, theirs = scores(0), scores(1), RECORD["maps"]
    assert cc(one, two) == pytest.approx(theirs["cc"], abs=1e-12)
    assert sim(one, two) == pytest.approx(theirs["sim"], abs=1e-12)
    assert sim(one, two - 5) == pytest.approx(theirs["sim_below"], abs=1e-12)
    assert kl(one, two) == pytest.approx(theirs["kl_mit"], abs=1e-12)
    assert kl(one + 1, two + 1, eps=0) == pytest.approx(theirs["kl"], abs=1e-12)


@pytest.mark.parametrize("number", range(len(record.pairs())))
def test_multimatch(number: int) -> None:
    pytest.importorskip("scipy")
    one, other = map(scanpath, record.pairs()[number])
    theirs = RECORD["multimatch"][number]
    assert multimatch(one, other) == pytest.approx(theirs["plain"], abs=1e-12)
    for thresholds, expected in zip(record.SIMPLIFY, theirs["simple"], strict=True):
        found = multimatch(one, other, simplify=Simplify(*thresholds))
        assert all(0 <= each <= 1 for each in found)
        if expected is not None:
            assert found == pytest.approx(expected, abs=1e-12)
    assert any(each not in (theirs["plain"], None) for each in theirs["simple"])


@pytest.mark.parametrize("number", range(len(record.pairs())))
def test_scanmatch(number: int) -> None:
    one, other = map(scanpath, record.pairs()[number])
    theirs = RECORD["scanmatch"][number]
    assert scanmatch(one, other, bins=(8, 6)) == pytest.approx(theirs["grid"], abs=1e-12)
    assert scanmatch(one, other, bins=(5, 4), threshold=1.2) == pytest.approx(theirs["near"], abs=1e-12)
    assert scanmatch(one, other, bins=(8, 6), seconds=0.05) == pytest.approx(theirs["timed"], abs=1e-12)
