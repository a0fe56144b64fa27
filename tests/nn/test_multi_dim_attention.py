"""Multi-dimensional attention: a softmax over tokens for each feature."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.channel.multi_dim_attention import MultiDimAttention
from tests.support.tensors import assert_near, gradients


def built(**options) -> MultiDimAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiDimAttention(**{"dim": 3, "hidden": 5, "query_dim": 2, **options}).double()


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x, query = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((2, 6, 3), (2, 4, 2)))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 3], mask[1, 4:] = False, False
    return x, query, mask


def test_feature_by_feature() -> None:
    layer, (x, query, mask) = built(), tensors()
    ours = layer(x, query, mask=mask)
    assert ours.shape == (2, 4, 3)
    for b in range(2):
        for i in range(4):
            real = [n for n in range(6) if mask[b, n]]
            hidden = [
                torch.tanh(layer.keys.weight @ x[b, n] + layer.keys.bias + layer.queries.weight @ query[b, i])
                for n in real
            ]
            for feature in range(3):
                logits = torch.stack([layer.read_out(h)[feature] for h in hidden])
                weights = logits.exp() / logits.exp().sum()
                expected = sum(w * x[b, n, feature] for w, n in zip(weights, real, strict=True))
                assert abs(ours[b, i, feature] - expected) < 1e-12


def test_source_to_token() -> None:
    layer, (x, _, mask) = built(query_dim=None), tensors()
    weights = layer.weights(x, mask=mask)
    assert weights.shape == (2, 1, 6, 3)
    assert_near(weights.sum(2), torch.ones(2, 1, 3, dtype=torch.float64), 1e-12)
    assert not weights[:, 0][~mask].any()
    logits = layer.read_out(torch.tanh(layer.keys(x)))
    assert_near(layer(x)[:, 0], (torch.softmax(logits, 1) * x).sum(1), 1e-12)
    assert weights[0, 0].std(-1).max() > 1e-3, "features differ"


def test_one_weight_for_all_features_is_additive_attention() -> None:
    layer, (x, query, _) = built(), tensors()
    with torch.no_grad():
        layer.read_out.weight.copy_(layer.read_out.weight[:1].expand(3, -1))
    weights = layer.weights(x, query)
    assert_near(weights, weights[..., :1].expand_as(weights), 1e-12)
    assert_near(layer(x, query), weights[..., 0] @ x, 1e-12)


def test_garbage_behind_the_mask() -> None:
    x, query, mask = tensors()
    layer, found = built(), []
    for garbage in (float("nan"), 3.0):
        out = layer(x.masked_fill(~mask[..., None], garbage), query, mask=mask)
        found.append((out, *gradients(out, list(layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-12)
    assert not layer(x, query, mask=torch.zeros_like(mask)).any()


def test_refusals() -> None:
    x, query, mask = tensors()
    for options, message in (({"dim": 0}, "dim=0"), ({"hidden": 0}, "hidden=0"), ({"query_dim": 0}, "query_dim=0")):
        with pytest.raises(OptionError, match=message):
            built(**options)
    assert MultiDimAttention(3).keys.out_features == 3
    with pytest.raises(ShapeError, match=r"x must be \(B, N, C=3\)"):
        built()(query, query)
    with pytest.raises(ShapeError, match=r"x must be \(B, N, C=3\)"):
        built()(torch.cat([x, x], -1), query)
    with pytest.raises(ShapeError, match=r"x must be \(B, N, C=3\)"):
        built()(x[0], query)
    with pytest.raises(ShapeError, match="query_dim=2; got no query"):
        built()(x)
    with pytest.raises(ShapeError, match="query_dim=None; got a query"):
        built(query_dim=None)(x, query)
    for wrong in (query[:1], query[..., :1], query[0]):
        with pytest.raises(ShapeError, match=r"query must be \(B=2, Nq, 2\)"):
            built()(x, wrong)
    for wrong in (mask[:, :2], mask.float()):
        with pytest.raises(ShapeError, match=r"mask must be bool \(B, N\)=\(2, 6\)"):
            built()(x, query, mask=wrong)
