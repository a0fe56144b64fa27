"""Co-attention: both sides over one matrix of affinities. tests/contracts/test_fusions.py has masks and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.fusion.co_attention import CoAttention
from tests.support.tensors import assert_near


def sides() -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((2, 5, 3), (2, 6, 4)))
    mask, other = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:], other[0, 2], other[1, 4:] = False, False, False
    return a, b, mask, other


def built(**options) -> CoAttention:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CoAttention(3, 4, **options).double()


def affinities(layer: CoAttention, a, b) -> torch.Tensor:
    c = torch.einsum("bnc,ce,bme->bnm", a, layer.weight, b)
    return torch.tanh(c) if layer.activation else c


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_rows_and_columns(activation: str | None) -> None:
    a, b, mask, other = sides()
    layer = built(activation=activation)
    c = affinities(layer, a, b)
    ours = layer(a, b)
    assert_near(ours["a"], torch.softmax(c, 2) @ b, 1e-12)
    assert_near(ours["b"], torch.softmax(c, 1).mT @ a, 1e-12)
    read = layer(a, b, masks={"a": mask, "b": other})
    for i in range(2):
        n, m = mask[i].nonzero().flatten(), other[i].nonzero().flatten()
        alone = layer(a[i : i + 1, n], b[i : i + 1, m])
        assert_near(read["a"][i, n], alone["a"][0], 1e-12)
        assert_near(read["b"][i, m], alone["b"][0], 1e-12)
    assert not read["a"][~mask].any()
    assert not read["b"][~other].any()


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_one_vector_a_side(pool: str) -> None:
    a, b, mask, other = sides()
    layer = built(pool=pool)
    c = affinities(layer, a, b)
    pooled = [c.amax(dim) if pool == "max" else c.mean(dim) for dim in (2, 1)]
    ours = layer(a, b)
    assert_near(ours["a"], torch.einsum("bn,bnc->bc", torch.softmax(pooled[0], -1), a), 1e-12)
    assert_near(ours["b"], torch.einsum("bn,bnc->bc", torch.softmax(pooled[1], -1), b), 1e-12)
    masked = layer(a, b, masks={"a": mask, "b": other})
    for i in range(2):
        alone = layer(a[i : i + 1, mask[i]], b[i : i + 1, other[i]])
        assert_near(masked["a"][i], alone["a"][0], 1e-12)
        assert_near(masked["b"][i], alone["b"][0], 1e-12)
    nobody = layer(a, b, masks={"a": torch.zeros_like(mask), "b": other})
    assert not nobody["a"].any()
    assert not nobody["b"].any()


@pytest.mark.parametrize("pool", [None, "max", "mean"])
def test_an_example_without_a_side_gets_zeros(pool: str | None) -> None:
    a, b, *_ = sides()
    out = built(pool=pool)(a, b, present={"b": torch.tensor([True, False])})
    assert out["a"][0].any()
    assert not out["a"][1].any()
    assert not out["b"][1].any()


def test_it_learns_which_side_matches() -> None:
    """Affinities depend on both sides: swapping the sides swaps the answers."""
    a, b, *_ = sides()
    layer, swapped = built(), CoAttention(4, 3).double()
    with torch.no_grad():
        swapped.weight.copy_(layer.weight.mT)
    one, other = layer(a, b), swapped(b, a)
    assert_near(one["a"], other["b"], 1e-12)
    assert_near(one["b"], other["a"], 1e-12)


def test_it_starts_as_linear_layers_do() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = CoAttention(64).weight
    assert weight.shape == (64, 64)
    assert weight.abs().max() <= 1 / 8
    assert 0.9 < weight.std().item() * 8 * math.sqrt(3) < 1.1


def test_refusals() -> None:
    a, b, mask, _ = sides()
    for options, message in (
        ({"dim": 0}, "dim=0"),
        ({"dim": 3, "other_dim": 0}, "other_dim=0"),
        ({"dim": 3, "pool": "sum"}, "pool='sum'"),
        ({"dim": 3, "activation": "relu"}, "activation='relu'"),
    ):
        with pytest.raises(OptionError, match=message):
            CoAttention(**options)
    with pytest.raises(ShapeError, match=r"a must be real numbers \(B, N, 3\)"):
        built()(b, b)
    with pytest.raises(ShapeError, match=r"b must be real numbers \(B, M, 4\)"):
        built()(a, b[0])
    with pytest.raises(ShapeError, match=r"masks\['b'\] must be bool \(B, M\)=\(2, 6\)"):
        built()(a, b, masks={"b": mask})
