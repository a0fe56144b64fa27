"""Measures of small maps by hand, their options, and the tokens that they count."""

from __future__ import annotations

import pytest
import torch

from foveate.core.errors import OptionError, UnknownKey
from foveate.lens.measures import Entropy, KeyTokens, ReceivedMass, SinkMass
from foveate.lens.position_measures import AtOffset, MeanDistance, WindowMass
from foveate.lens.registry import named
from tests.support.tensors import assert_near


def test_measures_match_their_definitions() -> None:
    w = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])[None, None]
    log = torch.log
    expected = torch.tensor([0.0, log(torch.tensor(2.0)), -0.4 * log(torch.tensor(0.2)) - 0.6 * log(torch.tensor(0.6))])
    assert_near(Entropy().from_weights(w)[0, 0], expected, 1e-6)
    assert_near(SinkMass().from_weights(w)[0, 0], torch.tensor([1.0, 0.5, 0.2]), 1e-6)
    assert_near(SinkMass(first=2).from_weights(w)[0, 0], torch.tensor([1.0, 1.0, 0.4]), 1e-6)
    assert_near(SinkMass(positions=(2,)).from_weights(w)[0, 0], torch.tensor([0.0, 0.0, 0.6]), 1e-6)
    total, visible = ReceivedMass().from_weights(w), torch.tensor([[[3.0, 2.0, 1.0]]])
    assert_near(total[0, 0], torch.tensor([1.7, 0.7, 0.6]), 1e-6)
    assert_near(ReceivedMass(per_row=True).finish(total, visible)[0, 0], torch.tensor([1.7 / 3, 0.35, 0.6]), 1e-6)
    assert_near(ReceivedMass().reduce(total, visible), torch.tensor([[1.7 / 3]]), 1e-6)


def test_reductions_leave_out_uncounted_values() -> None:
    values, count = torch.tensor([[[9.0, 1.0, 3.0]]]), torch.tensor([[[False, True, True]]])
    assert Entropy().reduce(values, count).item() == 2.0
    assert Entropy().reduce(values, torch.zeros_like(count)).isnan().all()


def test_first_tokens_are_the_first_real_ones() -> None:
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    tokens = KeyTokens(torch.arange(4).expand(2, 1, 4), real)
    assert tokens.first(1)[:, 0].tolist() == [[False, False, True, False], [True, False, False, False]]
    evicted = KeyTokens(torch.tensor([[[-1, 3, 2]], [[0, -2, 3]]]), real)
    assert evicted.first(1)[:, 0].tolist() == [[False, False, True], [True, False, False]]


def test_names_and_options_are_checked() -> None:
    assert named("entropy") == Entropy() and named(SinkMass(first=4)).first == 4
    with pytest.raises(UnknownKey, match='unknown measure "entorpy"; did you mean "entropy"?'):
        named("entorpy")
    with pytest.raises(OptionError, match="first=0 must be at least 1"):
        SinkMass(first=0)
    with pytest.raises(OptionError, match="positions"):
        SinkMass(positions=(-1,))


def test_measures_of_position_match_their_definitions() -> None:
    w = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[None, None]
    assert_near(MeanDistance().from_weights(w)[0, 0], torch.tensor([0.0, 0.5, 0.7]), 1e-6)
    assert_near(AtOffset(1).from_weights(w)[0, 0], torch.tensor([0.0, 0.5, 0.3]), 1e-6)
    assert_near(AtOffset(0).from_weights(w)[0, 0], torch.tensor([1.0, 0.5, 0.5]), 1e-6)
    assert_near(WindowMass(1).from_weights(w)[0, 0], torch.tensor([1.0, 1.0, 0.8]), 1e-6)
    assert_near(MeanDistance().from_weights(w[:, :, 2:])[0, 0], torch.tensor([0.7]), 1e-6)
    both = torch.tensor([[0.5, 0.2, 0.3]])[None, None].expand(1, 1, 3, 3)
    assert_near(MeanDistance().from_weights(both)[0, 0], torch.tensor([0.8, 0.8, 1.2]), 1e-6)
    assert [m.name for m in (AtOffset(0), AtOffset(1), AtOffset(-1), WindowMass(3))] == [
        "own_token", "previous_token", "offset_-1", "within_3",
    ]  # fmt: skip
