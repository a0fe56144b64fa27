"""CBAM: both factors by hand, one strong position that names a channel, and positions that count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import CBAM, SqueezeExcitation, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, normed, refused, stirred


def perceptron(gate: CBAM, s: Tensor) -> Tensor:
    first, second = gate.channel.narrow, gate.channel.widen
    hidden = first.weight @ s + (0 if first.bias is None else first.bias)
    return second.weight @ hidden.clamp(min=0) + (0 if second.bias is None else second.bias)


def by_hand(gate: CBAM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the factors of one image's channels, those of its positions, and the output."""
    mean, largest = x.flatten(1).mean(1), torch.stack([channel.max() for channel in x])
    channels = torch.sigmoid(perceptron(gate, mean) + perceptron(gate, largest))
    y = torch.stack([w * channel for w, channel in zip(channels, x, strict=True)])
    maps, kernel = torch.stack([y.max(0).values, y.sum(0) / len(y)]), gate.spatial.conv.weight[0]
    reach, score = kernel.shape[-1] // 2, torch.zeros_like(maps[0])
    padded = F.pad(maps, [reach] * 4)
    for i in range(score.shape[0]):
        for j in range(score.shape[1]):
            score[i, j] = (padded[:, i : i + 2 * reach + 1, j : j + 2 * reach + 1] * kernel).sum()
    if not isinstance(gate.spatial.norm, nn.Identity):
        score = normed(score[None, None], gate.spatial.norm)[0, 0]
    positions = torch.sigmoid(score)
    return channels, positions, y * positions


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_by_hand(norm: bool, bias: bool) -> None:
    gate, x = stirred(CBAM(6, hidden=4, kernel=3, bias=bias, norm=norm)), noise(3, 6, 5, 4)
    channels, positions = gate.weights(x)
    for i in range(3):
        wanted = by_hand(gate, x[i])
        for found, expected in zip((channels[i], positions[i, 0], gate(x)[i]), wanted, strict=True):
            assert_near(found, expected, 1e-12)


def test_limits() -> None:
    """Factors that are all 1/2, and a map of ones with two equal pools."""
    gate, x = stirred(CBAM(8, 4)), noise(2, 8, 5, 3)
    for parameter in (*gate.channel.widen.parameters(), gate.spatial.norm.weight, gate.spatial.norm.bias):
        nn.init.zeros_(parameter)
    assert_near(gate(x), 0.25 * x, 1e-12)
    nn.init.constant_(gate.spatial.norm.bias, 50.0)
    nn.init.constant_(gate.channel.widen.bias, 25.0)
    assert_near(gate(x), x, 1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_its_size(dims: int) -> None:
    x, positions = torch.zeros(2, 32, *(6, 5, 2)[:dims]), (6, 30, 60)[dims - 1]
    found = cost(CBAM(32, 8, dims=dims), x)
    assert found.parameters == 2 * 32 * 4 + 4 + 32 + 2 * 7**dims + 2
    assert found.macs == 2 * (2 * 2 * 32 * 4 + positions * 2 * 7**dims)
    assert cost(CBAM(32, 8, dims=dims, bias=False, norm=False), x).parameters == 2 * 32 * 4 + 2 * 7**dims


def test_refusals() -> None:
    assert "kernel=4 must be odd" in refused(lambda: CBAM(8, kernel=4))
    assert "reduction=0" in refused(lambda: CBAM(8, 0))
    assert "hidden=0" in refused(lambda: CBAM(8, hidden=0))


# -- strong positions --------------------------------------------------------------------------------------------------


def spots(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps with four channels of values and four of noise, of which one has a single strong position."""
    values = torch.randn(count, 4, 1, generator=random).expand(-1, -1, 49)
    which, place = (torch.randint(0, most, (count,), generator=random) for most in (4, 49))
    names = torch.randn(count, 4, 49, generator=random)
    names[torch.arange(count), which, place] = 6.0
    return (torch.cat([values, names], 1).unflatten(2, (7, 7)),), values[torch.arange(count), which, :1]


def windows(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps whose value stands in a window of 3 x 3 that another channel marks, with noise elsewhere."""
    inside = torch.zeros(count, 7, 7, dtype=torch.bool)
    corner = torch.randint(0, 5, (2, count), generator=random)
    for i in range(3):
        for j in range(3):
            inside[torch.arange(count), corner[0] + i, corner[1] + j] = True
    value = torch.randn(count, 1, generator=random)
    first = torch.where(inside, value[..., None], torch.randn(count, 7, 7, generator=random))
    return (torch.stack([first, 4.0 * inside], 1),), value


def left_over(make: Callable[[], nn.Module], draw: gated.Draw, channels: int) -> float:
    return gated.unexplained(lambda: gated.MeanOverPositions(make(), channels, 1), draw)


def test_a_maximum_sees_one_strong_position(claim) -> None:
    claim(
        "maxima beside means read the channel that a single strong position names: variance left over",
        ours=left_over(lambda: CBAM(8, 1, kernel=3), spots, 8),
        baseline=left_over(lambda: SqueezeExcitation(8, 1), spots, 8), better="lower", margin=0.2,
        baseline_name="squeeze and excitation of the same width, which sees means", seed=0,
    )  # fmt: skip


def test_positions_count(claim) -> None:
    class Open(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x[:, :1], 50.0)

    def without_map() -> CBAM:
        gate = CBAM(2, 1)
        gate.spatial = Open()
        return gate

    claim(
        "the second factor reads a value at marked positions: variance left over",
        ours=left_over(lambda: CBAM(2, 1), windows, 2), baseline=left_over(without_map, windows, 2), better="lower",
        margin=0.2, baseline_name="the factor of channels alone", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    """Twice as many steps as for other gates: the map's batch norm takes 1 % of each batch into its statistics."""
    ours = gated.digits_accuracy("cbam", reduction=4, kernel=3, epochs=12)
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=ours, baseline=gated.digits_accuracy(None, epochs=12) - 0.01, better="higher",
        baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
