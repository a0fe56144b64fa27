"""Squeeze and excitation: the factors by hand, its size and limits, and a channel that says which others count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import ShapeError
from foveate.nn import SqueezeExcitation, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, refused, stirred


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1,), (7,), (5, 4), (3, 2, 4)])
def test_by_hand(bias: bool, size: tuple[int, ...]) -> None:
    gate, x = stirred(SqueezeExcitation(6, hidden=4, bias=bias)), noise(3, 6, *size)
    first, second = gate.excite.narrow, gate.excite.widen
    for example, out, weights in zip(x, gate(x), gate.weights(x), strict=True):
        mean = torch.stack([channel.sum() / channel.numel() for channel in example])
        hidden = first.weight @ mean + (first.bias if bias else 0)
        score = second.weight @ hidden.clamp(min=0) + (second.bias if bias else 0)
        factors = 1 / (1 + (-score).exp())
        assert_near(weights, factors, 1e-12)
        assert_near(out, torch.stack([f * channel for f, channel in zip(factors, example, strict=True)]), 1e-12)


def test_without_scores_everything_is_halved() -> None:
    gate, x = stirred(SqueezeExcitation(8)), noise(2, 8, 5, 3)
    for parameter in gate.excite.widen.parameters():
        nn.init.zeros_(parameter)
    assert_near(gate(x), 0.5 * x, 0)
    nn.init.constant_(gate.excite.widen.bias, 50.0)
    assert_near(gate(x), x, 1e-12)


@pytest.mark.parametrize(("options", "width"), [({}, 4), ({"reduction": 200}, 1), ({"hidden": 7}, 7)])
def test_its_size(options: dict, width: int) -> None:
    x = torch.zeros(2, 64, 6, 5)
    assert cost(SqueezeExcitation(64, **options), x) == (2 * 64 * width + width + 64, 2 * 2 * 64 * width)
    assert cost(SqueezeExcitation(64, bias=False, **options), x).parameters == 2 * 64 * width


def test_positions_have_no_meaning() -> None:
    gate, x = stirred(SqueezeExcitation(6, 2)), noise(2, 6, 5, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert_near(gate(x.flatten(2)[..., order]), gate(x).flatten(2)[..., order], 1e-12)
    assert_near(gate(x.flatten(2)), gate(x).flatten(2), 1e-12)  # one object for any number of axes


def test_refusals() -> None:
    assert "reduction=0" in refused(lambda: SqueezeExcitation(8, 0))
    assert "hidden=0" in refused(lambda: SqueezeExcitation(8, hidden=0))
    with pytest.raises(ShapeError, match="C=8 channels"):
        SqueezeExcitation(8).weights(torch.zeros(2, 7, 3))


# -- which channel counts ----------------------------------------------------------------------------------------------


def chosen(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps with four channels of values, and four of which one is larger: it says which value is the target."""
    values = torch.randn(count, 4, 1, generator=random).expand(-1, -1, 9)
    which = torch.randint(0, 4, (count,), generator=random)
    names = nn.functional.one_hot(which, 4).float()[..., None].expand(-1, -1, 9)
    x = torch.cat([values, names], 1) + 0.3 * torch.randn(count, 8, 9, generator=random)
    return (x,), values[torch.arange(count), which, :1]


def left_over(gate: nn.Module) -> float:
    return gated.unexplained(lambda: gated.MeanOverPositions(gate, 8, 1), chosen)


def test_the_map_decides_which_channels_count(claim) -> None:
    """By hand: without a gate the mean of the values explains a quarter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = SqueezeExcitation(8, reduction=1)
    claim(
        "channels scaled by the whole map give the value that the map names among four: variance left over",
        ours=left_over(gate), baseline=left_over(nn.Identity()), better="lower", margin=0.5,
        baseline_name="the same head without a gate", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("se", reduction=4), baseline=gated.digits_accuracy(None) - 0.01, better="higher",
        baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
