"""Layers and gates by name: what `create` makes of a key, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError, UnknownKey
from foveate.nn import MultiHeadAttention, SqueezeExcitation, create, insert
from foveate.nn.parts.insert import gate_class
from tests.contracts.gates import GATES


def test_a_gate_by_its_key() -> None:
    gate = create("se", channels=32, reduction=4)
    assert isinstance(gate, SqueezeExcitation)
    assert (gate.channels, gate.dims, gate.excite.narrow.out_features) == (32, None, 8)
    assert create("se", channels=32, dims=3).dims == 3
    assert create("cbam", channels=32).dims == 2
    assert create("bot", channels=32, heads=8).heads == 8
    assert create("se", channels=32, options={"reduction": 4}).excite.narrow.out_features == 8


@pytest.mark.parametrize("key", [key for key in GATES if "-" not in key])
def test_every_gate_for_every_number_of_axes(key: str) -> None:
    for dims in sorted(gate_class(key).axes):
        gate, x = create(key, channels=16, dims=dims), torch.randn(2, 16, *(6, 5, 4)[:dims])
        assert type(gate) is gate_class(key)
        assert gate(x).shape == x.shape


def test_it_makes_what_insert_inserts() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    inserted = insert(net, "cbam", where="1", inputs=torch.zeros(1, 3, 8, 8), reduction=2)
    (gate,) = inserted.gates.values()
    made = create("cbam", channels=16, reduction=2)
    assert type(made) is type(gate)
    assert [p.shape for p in made.parameters()] == [p.shape for p in gate.parameters()]


def test_a_layer_by_its_key() -> None:
    layer = create("softmax", 16, 4)
    assert isinstance(layer, MultiHeadAttention)
    assert layer(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    assert create("mega", 16, 1, options={"ema_dim": 4}).dim == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("se"), "must get dim and heads for a layer; or channels"),
        (lambda: create("softmax", 16), "must get dim and heads"),
        (lambda: create("softmax", 16, 4, dims=2), "must get dim and heads"),
        (lambda: create("se", 16, 4), 'gate "se" must get channels'),
        (lambda: create("se", 16, channels=16), "channels=16 is of a gate"),
        (lambda: create("softmax", channels=16), 'system "softmax" must be a feature gate; valid keys: '),
        (lambda: create("se", channels=16, dims=4), "dims=4 must be one of 1, 2, 3"),
        (lambda: create("se", channels=0), "channels=0"),
        (lambda: create("se", channels=16, reductoin=4), 'did you mean "reduction"'),
        (lambda: create("coordinate_attention", channels=16, dims=1), "dims=1 must be one of 2, 3"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key() -> None:
    with pytest.raises(UnknownKey, match='did you mean "cbam"'):
        create("cbma", channels=8)
