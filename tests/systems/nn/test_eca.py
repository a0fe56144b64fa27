"""Efficient channel attention: the convolution by hand, its width, and pairs of neighbouring channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.nn import EfficientChannelAttention, SqueezeExcitation, cost
from foveate.nn.channel.eca import adaptive_kernel
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, refused, stirred


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
@pytest.mark.parametrize("size", [(1,), (7,), (5, 4), (3, 2, 4)])
def test_by_hand(kernel: int, size: tuple[int, ...]) -> None:
    gate, x = stirred(EfficientChannelAttention(6, kernel)), noise(3, 6, *size)
    taps = gate.conv.weight[0, 0]
    for example, out, weights in zip(x, gate(x), gate.weights(x), strict=True):
        mean = [channel.mean() for channel in example]
        for c in range(6):
            score = sum(
                taps[t] * mean[c + t - kernel // 2] for t in range(kernel) if 0 <= c + t - kernel // 2 < 6
            )  # fmt: skip
            factor = 1 / (1 + (-score).exp())
            assert_near(weights[c], factor, 1e-12)
            assert_near(out[c], factor * example[c], 1e-12)


def test_its_width_follows_the_channels() -> None:
    """|log2(C) / 2 + 1 / 2| and the odd number that the release makes of it."""
    expected = {1: 1, 2: 1, 7: 1, 8: 3, 64: 3, 127: 3, 128: 5, 256: 5, 512: 5, 2048: 7}
    assert {channels: adaptive_kernel(channels) for channels in expected} == expected
    for channels, width in expected.items():
        assert cost(EfficientChannelAttention(channels), torch.zeros(1, channels, 2)).parameters == width


def test_without_weights_everything_is_halved() -> None:
    gate, x = EfficientChannelAttention(8).double(), noise(2, 8, 5, 3)
    nn.init.zeros_(gate.conv.weight)
    assert_near(gate(x), 0.5 * x, 0)


def test_a_channel_sees_only_its_neighbours() -> None:
    gate, x = stirred(EfficientChannelAttention(9, 3)), noise(2, 9, 5)
    other = x.clone()
    other[:, 4] += 1
    change = (gate.weights(other) - gate.weights(x)).abs().amax(0)
    assert change[3:6].min() > 1e-3
    assert change[:3].max() == change[6:].max() == 0


def test_refusals() -> None:
    assert "kernel=4 must be odd" in refused(lambda: EfficientChannelAttention(8, 4))
    assert "kernel=0" in refused(lambda: EfficientChannelAttention(8, 0))


# -- pairs of neighbours -----------------------------------------------------------------------------------------------


def pairs(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw 8 pairs of channels, a value and a sign; the targets are the values whose sign is positive."""
    values = torch.randn(count, 8, 1, 1, generator=random)
    signs = torch.randint(0, 2, (count, 8, 1, 1), generator=random) * 2.0 - 1
    x = torch.cat([values, signs], 2).flatten(1, 2).expand(-1, -1, 9)
    x = x + 0.3 * torch.randn(count, 16, 9, generator=random)
    return (x,), (values * (signs > 0)).flatten(1)


def left_over(make: Callable[[], nn.Module]) -> float:
    return gated.unexplained(lambda: gated.MeanOverPositions(make(), 16, 8), pairs)


def test_neighbours_decide(claim) -> None:
    """By hand: half of each value explains half of the variance."""
    claim(
        "3 weights read 8 values that their neighbouring channels let through: variance left over",
        ours=left_over(lambda: EfficientChannelAttention(16)), baseline=left_over(lambda: SqueezeExcitation(16, 16)),
        better="lower", margin=0.2, baseline_name="squeeze and excitation, reduction 16, with 49 weights", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("eca"), baseline=gated.digits_accuracy(None) - 0.01, better="higher",
        baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
