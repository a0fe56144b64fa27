"""Position schemes by hand: rotations, biases, and the heads that they fit."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError
from foveate.nn.parts.positions import Alibi, Position, RelativeBias, Rotary, check
from tests.support.tensors import assert_near, qkv


def test_the_base_scheme_is_the_identity() -> None:
    class Nowhere(Position):
        pass

    q, _, _ = qkv(4)
    assert Nowhere().rotate(q, torch.arange(4)) is q
    assert Nowhere().bias(torch.arange(4), torch.arange(5)) is None
    assert not Nowhere.biased


@pytest.mark.parametrize("base", [10_000.0, 100.0])
def test_rotary_scores_depend_on_distances_alone(base: float) -> None:
    q, k, _ = qkv(1, heads=2, kv_heads=2, width=6)
    position = Rotary(base)

    def score(query: int, key: int) -> torch.Tensor:
        return (position.rotate(q, torch.tensor([query])) * position.rotate(k, torch.tensor([key]))).sum(-1)

    assert_near(score(7, 3), score(14, 10), 1e-12)
    assert_near(score(4, 4), (q * k).sum(-1), 1e-12)
    assert (score(7, 3) - score(3, 7)).abs().min() > 1e-3
    rotated = position.rotate(q, torch.tensor([1]))
    assert_near(rotated.norm(dim=-1), q.norm(dim=-1), 1e-12)
    # the last pair of channels rotates slowest: by base ** (-4 / 6)
    slow = torch.acos((rotated * q)[..., [2, 5]].sum(-1) / q[..., [2, 5]].square().sum(-1))
    assert_near(slow, torch.full_like(slow, base ** (-4 / 6)), 1e-6)


def test_rotary_pairs_channels_in_either_layout() -> None:
    """Permuted channels, rotated in the other layout, are the permuted result."""
    x, at = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.arange(3, 8)
    order = [0, 3, 1, 4, 2, 5]  # puts channels of a pair next to each other
    assert_near(Rotary(layout="interleaved").rotate(x[..., order], at), Rotary().rotate(x, at)[..., order], 1e-12)
    assert (Rotary(layout="interleaved").rotate(x, at) - Rotary().rotate(x, at)).abs().max() > 1e-2
    first = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())
    angles = at[:, None] * 10_000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    rotated = torch.view_as_real(first * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    assert_near(Rotary(layout="interleaved").rotate(x, at), rotated, 1e-12)
    with pytest.raises(OptionError, match="layout='pairs' must be one of 'half', 'interleaved'"):
        Rotary(layout="pairs")


def test_alibi_falls_with_the_distance_at_each_heads_rate() -> None:
    bias = Alibi(2).bias(torch.tensor([5, 2]), torch.arange(4))
    slopes = 2.0**-4, 2.0**-8
    for head, slope in enumerate(slopes):
        assert bias[head].tolist() == [[-slope * abs(i - j) for j in range(4)] for i in (5, 2)]
    assert Alibi.biased
    assert not Alibi(2).state_dict()


def test_a_relative_bias_is_read_by_distance_and_far_ones_are_alike() -> None:
    position = RelativeBias(2, reach=2)
    assert position.table.shape == (2, 5)
    assert not position.table.any()
    with torch.no_grad():
        position.table.copy_(torch.arange(10.0).reshape(2, 5))
    # columns: two or more before the query, one before, the query's own position, one after, two or more after
    expected = [[2.0, 3.0, 4.0, 4.0], [0.0, 1.0, 2.0, 3.0]]
    found = position.bias(torch.tensor([0, 2]), torch.arange(4))
    assert found[0].tolist() == expected
    assert found[1].tolist() == [[5 + x for x in row] for row in expected]
    assert RelativeBias.biased
    assert RelativeBias(1).reach == 128


def test_refusals() -> None:
    for given, heads, message in (
        ("rotary", 2, "position='rotary' must be a foveate.nn.Position"),
        (Alibi(2), 3, "position is for 2 heads; the layer has heads=3"),
        (Alibi(4), 3, "position is for 4 heads; the layer has heads=3"),
        (RelativeBias(2), 1, "position is for 2 heads; the layer has heads=1"),
    ):
        with pytest.raises(OptionError, match=message):
            check(given, heads)
    for fits in (None, Rotary(), Alibi(3), RelativeBias(3)):
        check(fits, 3)
    for make in (lambda: Rotary(0.5), lambda: Alibi(0), lambda: RelativeBias(0), lambda: RelativeBias(1, 0)):
        with pytest.raises(OptionError):
            make()
