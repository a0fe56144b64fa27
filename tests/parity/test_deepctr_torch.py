"""AutoInt's layer against DeepCTR-Torch, whose side is a record: see `deepctr_torch_record.py`."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.nn import InteractingLayer
from tests.parity import deepctr_torch_record as record
from tests.support.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text("utf-8"))
OURS = dict(zip(record.NAMES, ("q", "k", "v", "residual"), strict=True))


@pytest.mark.parametrize("case", record.CASES)
def test_the_interacting_layer(case: str) -> None:
    given, expected = record.leaves(), RECORD[case]
    layer = InteractingLayer(record.DIM, record.HEADS, record.DIM // record.HEADS, residual=case == "paper").double()
    names = {name: ours for name, ours in OURS.items() if name in expected["gradients"]}
    layer.load_state_dict({f"{ours}.weight": given[name].mT for name, ours in names.items()})
    x = given["x"].requires_grad_()
    out = layer(x)
    assert_near(out, torch.tensor(expected["out"], dtype=torch.float64), 1e-12)
    (out * given["direction"]).sum().backward()
    found = {name: getattr(layer, ours).weight.grad.mT for name, ours in names.items()} | {"x": x.grad}
    assert found.keys() == expected["gradients"].keys()
    for name, grad in found.items():
        assert_near(grad, torch.tensor(expected["gradients"][name], dtype=torch.float64), 1e-11, name)
