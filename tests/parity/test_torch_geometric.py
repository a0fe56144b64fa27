"""Graph attention and windows against PyTorch Geometric, whose side is a record: see `torch_geometric_record.py`."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.core import graph_window_mask
from foveate.nn import GraphAttention
from tests.parity import torch_geometric_record as record
from tests.support.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text("utf-8"))


@pytest.mark.parametrize("name", ["mean", "concat"])
def test_graph_attention_is_gat_conv(name: str) -> None:
    given, expected = record.leaves(name == "concat"), RECORD[name]
    layer = GraphAttention(record.DIM, record.OUT, record.HEADS, concat=name == "concat").double()
    layer.load_state_dict({"lin_src.weight": given["lin"], **{n: given[n] for n in ("att_src", "att_dst", "bias")}})
    x = given["x"].requires_grad_()
    edges, weights = layer.weights(x, record.graph())
    assert edges.tolist() == expected["edges"]
    assert_near(weights, torch.tensor(expected["weights"], dtype=torch.float64), 1e-12)
    out = layer(x, record.graph())
    assert_near(out, torch.tensor(expected["out"], dtype=torch.float64), 1e-12)
    (out * given["direction"]).sum().backward()
    found = {
        "x": x,
        "lin": layer.lin_src.weight,
        "att_src": layer.att_src,
        "att_dst": layer.att_dst,
        "bias": layer.bias,
    }
    assert found.keys() == expected["gradients"].keys()
    for leaf, parameter in found.items():
        assert parameter is not None and parameter.grad is not None
        assert_near(parameter.grad, torch.tensor(expected["gradients"][leaf], dtype=torch.float64), 1e-12, leaf)


@pytest.mark.parametrize("k", record.HOPS)
def test_windows_are_k_hop_subgraphs(k: int) -> None:
    seen = graph_window_mask(torch.arange(record.NODES), record.graph(), k, bidirectional=True)
    assert [row.nonzero()[:, 0].tolist() for row in seen] == RECORD["neighbourhoods"][str(k)]
