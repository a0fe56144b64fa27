"""Co-attention: both sides over one matrix of affinities."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.fusion.co_attention import CoAttention
from tests.support.tensors import assert_near, gradients


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
    assert_near(ours[0], torch.softmax(c, 2) @ b, 1e-12)
    assert_near(ours[1], torch.softmax(c, 1).mT @ a, 1e-12)
    from_b, from_a = layer(a, b, mask=mask, other_mask=other)
    for i in range(2):
        n, m = mask[i].nonzero().flatten(), other[i].nonzero().flatten()
        alone = layer(a[i : i + 1, n], b[i : i + 1, m])
        assert_near(from_b[i, n], alone[0][0], 1e-12)
        assert_near(from_a[i, m], alone[1][0], 1e-12)
    assert not from_b[~mask].any()
    assert not from_a[~other].any()


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_one_vector_a_side(pool: str) -> None:
    a, b, mask, other = sides()
    layer = built(pool=pool)
    c = affinities(layer, a, b)
    pooled = [c.amax(dim) if pool == "max" else c.mean(dim) for dim in (2, 1)]
    ours = layer(a, b)
    assert_near(ours[0], torch.einsum("bn,bnc->bc", torch.softmax(pooled[0], -1), a), 1e-12)
    assert_near(ours[1], torch.einsum("bn,bnc->bc", torch.softmax(pooled[1], -1), b), 1e-12)
    masked = layer(a, b, mask=mask, other_mask=other)
    for i in range(2):
        alone = layer(a[i : i + 1, mask[i]], b[i : i + 1, other[i]])
        assert_near(masked[0][i], alone[0][0], 1e-12)
        assert_near(masked[1][i], alone[1][0], 1e-12)
    nobody = layer(a, b, mask=torch.zeros_like(mask), other_mask=other)
    assert not nobody[0].any()
    assert not nobody[1].any()


@pytest.mark.parametrize("pool", [None, "max", "mean"])
def test_garbage_behind_a_mask(pool: str | None) -> None:
    a, b, mask, other = sides()
    layer, found = built(pool=pool), []
    for garbage in (float("nan"), 3.0):
        x, y = a.masked_fill(~mask[..., None], garbage), b.masked_fill(~other[..., None], garbage)
        out = torch.cat([o.flatten() for o in layer(x, y, mask=mask, other_mask=other)])
        found.append((out, *gradients(out, [layer.weight])))
    for one, other_one in zip(*found, strict=True):
        assert_near(one, other_one, 1e-12)


def test_it_learns_which_side_matches() -> None:
    """Affinities depend on both sides: swapping the sides swaps the answers."""
    a, b, *_ = sides()
    layer, swapped = built(), CoAttention(4, 3).double()
    with torch.no_grad():
        swapped.weight.copy_(layer.weight.mT)
    for one, other in zip(layer(a, b), reversed(swapped(b, a)), strict=True):
        assert_near(one, other, 1e-12)


def test_it_starts_as_linear_layers_do() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = CoAttention(64).weight
    assert weight.shape == (64, 64)
    assert weight.abs().max() <= 1 / 8
    assert 0.9 < weight.std().item() * 8 * math.sqrt(3) < 1.1


def test_refusals() -> None:
    a, b, mask, other = sides()
    for options, message in (
        ({"dim": 0}, "dim=0"),
        ({"dim": 3, "other_dim": 0}, "other_dim=0"),
        ({"dim": 3, "pool": "sum"}, "pool='sum'"),
        ({"dim": 3, "activation": "relu"}, "activation='relu'"),
    ):
        with pytest.raises(OptionError, match=message):
            CoAttention(**options)
    with pytest.raises(ShapeError, match=r"tokens must be \(B, N, 3\)"):
        built()(b, b)
    with pytest.raises(ShapeError, match=r"tokens must be \(B, N, 4\)"):
        built()(a, b[0])
    with pytest.raises(ShapeError, match=r"other_mask must be bool \(B, N\)=\(2, 6\)"):
        built()(a, b, other_mask=mask)
    with pytest.raises(ShapeError, match=r"mask must be bool \(B, N\)=\(2, 5\)"):
        built()(a, b, mask=mask.float())
