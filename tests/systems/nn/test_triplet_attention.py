"""Triplet attention: the branches by hand, and channels that count in some columns and not in others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import CBAM, TripletAttention, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, normed, refused, stirred


def scores(branch: nn.Module, largest: Tensor, mean: Tensor) -> Tensor:
    """Return the weights of a branch from its two pooled images, by loops over the kernel."""
    kernel, (height, width) = branch.conv.weight[0], largest.shape
    reach, out = kernel.shape[-1] // 2, torch.zeros_like(largest)
    for pooled, taps in zip((largest, mean), kernel, strict=True):
        padded = F.pad(pooled, [reach] * 4)
        for i in range(kernel.shape[1]):
            for j in range(kernel.shape[2]):
                out = out + taps[i, j] * padded[i : i + height, j : j + width]
    return torch.sigmoid(normed(out[None, None], branch.norm)[0, 0])


@pytest.mark.parametrize("spatial", [True, False])
def test_by_hand(spatial: bool) -> None:
    """The branch of a pooled axis has that axis in the place of the channels: images are (W, C)ᵀ and (H, C)."""
    gate, x = stirred(TripletAttention(4, 3, spatial=spatial)), noise(2, 4, 5, 6)
    found, branches = gate.weights(x), list(gate.branches)
    for b, example in enumerate(x):
        total, maps = torch.zeros_like(example), []
        if spatial:
            maps.append(scores(branches[0], example.amax(0), example.mean(0))[None])
        channels_columns = scores(branches[-2], example.amax(1), example.mean(1))
        maps.append(channels_columns[:, None])
        rows_channels = scores(branches[-1], example.amax(2).T, example.mean(2).T)
        maps.append(rows_channels.T[:, :, None])
        for weights, expected in zip(found, maps, strict=True):
            assert_near(weights[b], expected, 1e-12)
            total = total + expected * example
        assert_near(gate(x)[b], total / len(maps), 1e-12)


def test_limits() -> None:
    for dims, size in ((1, (7,)), (2, (5, 4)), (3, (3, 2, 4))):
        gate, x = stirred(TripletAttention(6, 3, dims=dims)), noise(2, 6, *size)
        for branch in gate.branches:
            nn.init.zeros_(branch.norm.weight)
            nn.init.zeros_(branch.norm.bias)
        assert_near(gate(x), 0.5 * x, 1e-12)
        for branch in gate.branches:
            nn.init.constant_(branch.norm.bias, 50.0)
        assert_near(gate(x), x, 1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_its_size(dims: int) -> None:
    x = torch.zeros(2, 8, *(6, 5, 3)[:dims])
    for spatial, branches in ((True, dims + 1), (False, dims)):
        found = cost(TripletAttention(8, spatial=spatial, dims=dims), x)
        assert found.parameters == branches * (2 * 7**dims + 2)
    images = sum(x[0].numel() // side for side in x.shape[1:])
    assert cost(TripletAttention(8, dims=dims), x).macs == 2 * images * 2 * 7**dims


def test_a_channel_acts_on_its_neighbours_in_the_same_columns() -> None:
    gate, x = stirred(TripletAttention(8, 3, spatial=False)), noise(1, 8, 5, 9)
    other = x.clone()
    other[:, 4, :, 4] += 1
    change = (gate.weights(other)[0] - gate.weights(x)[0])[0, :, 0].abs()
    assert change[3:6, 3:6].min() > 1e-4
    change[3:6, 3:6] = 0
    assert change.max() == 0


def test_refusals() -> None:
    assert "kernel=4 must be odd" in refused(lambda: TripletAttention(8, 4))
    assert "spatial=1" in refused(lambda: TripletAttention(8, spatial=1))


# -- channels and columns ----------------------------------------------------------------------------------------------


def columns(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw four pairs of channels, a value and a sign for each column; targets are means over positive columns."""
    values = torch.randn(count, 4, 1, 1, 6, generator=random)
    signs = torch.randint(0, 2, values.shape, generator=random) * 2.0 - 1
    x = torch.cat([values, signs], 2).flatten(1, 2).expand(-1, -1, 5, -1)
    return (x + 0.3 * torch.randn(x.shape, generator=random),), (values * (signs > 0)).mean(-1).flatten(1)


def left_over(make: Callable[[], nn.Module]) -> float:
    return gated.unexplained(lambda: gated.MeanOverPositions(make(), 8, 4), columns, lr=0.1)


def test_channels_interact_with_columns(claim) -> None:
    """By hand: half of each value explains half of the variance."""
    ours = left_over(lambda: TripletAttention(8, 3))
    claim(
        "channels that count in some columns only are read, with 60 weights: variance left over",
        ours=ours, baseline=left_over(lambda: CBAM(8, 1, kernel=3)), better="lower", margin=0.1,
        baseline_name="CBAM, whose factors are of channels and of positions, with 156 weights", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("triplet_attention", kernel=3), baseline=gated.digits_accuracy(None) - 0.01,
        better="higher", baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
