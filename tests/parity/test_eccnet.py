"""eccNET against its release in TensorFlow, whose side is a record: see `eccnet_record.py`."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.gaze import EccentricityPool2d, VisualSearcher, vgg16_features
from tests.parity import eccnet_record as record
from tests.support.tensors import assert_near

SLOW = pytest.mark.slow
RECORD = json.loads(record.RECORD.read_text("utf-8"))


@cache
def network() -> torch.nn.Sequential:
    state = {}
    names = [name for name in vgg16_features(1).state_dict() if name.endswith("weight")]
    for name, (kernel, bias) in zip(names, record.weights(), strict=True):
        state[name] = torch.tensor(kernel).permute(3, 2, 0, 1)
        state[name.replace("weight", "bias")] = torch.tensor(bias)
    return vgg16_features(state=state)


def preprocessed(image: np.ndarray) -> Tensor:
    """Blue first, less the means, as Keras does."""
    return torch.tensor(image[..., ::-1].astype(np.float32) - np.array(record.MEANS, np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("number", range(len(record.POOLS)))
def test_pools(number: int) -> None:
    side, deg2px, slope, kind = record.POOLS[number]
    pool = EccentricityPool2d(slope=slope, deg2px=deg2px, kind=kind)
    found = pool(torch.tensor(record.pool_input(side)).permute(2, 0, 1)[None])
    expected = torch.tensor(RECORD["pools"][number]).view(*found.shape[2:], 2).permute(2, 0, 1)
    assert_near(found[0], expected, 1e-5)
    assert pool.windows(*found.shape[2:]).unique().numel() > 1


@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)]
)
def test_searches(number: int) -> None:
    """The same fixations, and the same first map where the release has not multiplied it by zero."""
    case, theirs = record.cases()[number], RECORD["searches"][number]
    ours = VisualSearcher(
        network(), ior=record.IOR, max_fix=record.STEPS + 1, margin=record.MARGIN,
        background=[case.background - mean for mean in record.MEANS], erase=case.objects is not None,
    )  # fmt: skip
    objects = None if case.objects is None else torch.tensor(case.objects)
    found = ours(preprocessed(case.target), preprocessed(case.image), goal=torch.tensor(case.goal), objects=objects)
    assert found.fixations.tolist() == theirs["fixations"]
    expected = torch.tensor(theirs["map"])
    assert (expected > 0).sum() > 20
    mine = found.maps[0][4::8, 4::8]
    assert_near(mine[expected > 0], expected[expected > 0], 1e-3)
