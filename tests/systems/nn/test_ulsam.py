"""Subspace attention: the maps by hand, what a group sees, its size, and a network that loses a block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import ULSAM, cost
from tests.support.tensors import assert_near
from tests.systems.nn import digits

EPS = 1e-5  # of torch's batch norms


def made(channels: int = 12, num_splits: int = 3, *, dims: int = 2, variant: str = "release", seed: int = 0) -> ULSAM:
    """Make a gate with random parameters and running statistics, all of which have an effect."""
    random = torch.Generator().manual_seed(seed)
    gate = ULSAM(channels, num_splits, dims=dims, variant=variant).double()
    with torch.no_grad():
        for tensor in (*gate.parameters(), *gate.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64))
        for name, buffer in gate.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_()
    return gate.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(x: Tensor, norm: nn.BatchNorm2d, part: slice) -> Tensor:
    """Normalise a group's channels by their own statistics, and apply a ReLU."""
    mean, var = norm.running_mean[part], norm.running_var[part]
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    x = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    return (norm.weight[part, None, None] * x + norm.bias[part, None, None]).clamp(min=0)


def largest_around(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    return torch.stack([padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]).amax(0)


def by_hand(gate: ULSAM, x: Tensor) -> Tensor:
    """Compute the maps group by group, as the paper writes them."""
    size, maps = x.shape[1] // gate.num_splits, []
    for n in range(gate.num_splits):
        part, one = slice(n * size, (n + 1) * size), slice(n, n + 1)
        scaled = x[:, part] * gate.depthwise.weight[part, 0]
        released = gate.variant == "release"
        if released:
            scaled = normed(scaled + gate.depthwise.bias[part, None, None], gate.depthwise_norm[0], part)
        scores = (largest_around(scaled) * gate.pointwise.weight[n]).sum(1, keepdim=True)
        if released:
            scores = normed(scores + gate.pointwise.bias[n], gate.pointwise_norm[0], one)
        weights = scores.exp()
        maps.append(weights / weights.sum((2, 3), keepdim=True))
    return torch.cat(maps, 1)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("training", [False, True])
def test_by_hand(variant: str, training: bool) -> None:
    gate, x = made(variant=variant).train(training), noise(3, 12, 5, 4)
    maps = by_hand(gate, x)
    assert_near(gate.weights(x), maps, 1e-10)
    expected = torch.cat([f * a + f for f, a in zip(x.chunk(3, 1), maps.chunk(3, 1), strict=True)], 1)
    assert_near(gate(x), expected, 1e-10)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("size", [(1,), (9,), (1, 1), (5, 4), (3, 2, 5)])
def test_each_map_adds_up_to_one(variant: str, size: tuple[int, ...]) -> None:
    weights = made(dims=len(size), variant=variant).weights(noise(3, 12, *size))
    assert weights.shape == (3, 3, *size)
    assert (weights >= 0).all()
    assert_near(weights.flatten(2).sum(-1), torch.ones(3, 3), 1e-12)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("size", [(7,), (5, 4), (3, 2, 5)])
def test_without_scores_all_positions_weigh_alike(variant: str, size: tuple[int, ...]) -> None:
    gate, x = made(dims=len(size), variant=variant), noise(3, 12, *size)
    for parameter in (*gate.pointwise.parameters(), *gate.pointwise_norm.parameters()):
        nn.init.zeros_(parameter)
    assert_near(gate(x), x * (1 + 1 / x[0, 0].numel()), 1e-12)


def test_the_released_scores_are_not_negative() -> None:
    """A position whose score is below 0 weighs as one whose score is 0."""
    gate, x = made(), noise(3, 12, 6, 6)
    weights = gate.weights(x).flatten(2)
    lowest = weights.amin(-1, keepdim=True)
    assert ((weights - lowest).abs() < 1e-12).sum(-1).amax() > 5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_its_size(dims: int) -> None:
    for channels, groups in ((12, 3), (64, 4), (32, 1)):
        released, paper = ULSAM(channels, groups, dims=dims, variant="release"), ULSAM(channels, groups, dims=dims)
        x, positions = torch.zeros(2, channels, *(6, 5, 2)[:dims]), 2 * (6, 30, 60)[dims - 1]
        assert cost(released, x) == (5 * channels + 3 * groups, 2 * channels * positions)
        assert cost(paper, x) == (2 * channels, 2 * channels * positions)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.entries = max(self.entries, x.numel() if isinstance(x, Tensor) else 0)
        return out


def test_no_matrix_over_pairs_of_positions() -> None:
    gate, x = made(8, 4).float(), torch.randn(1, 8, 32, 32)
    with Largest() as seen:
        gate(x)
    assert seen.entries <= 2 * x.numel() < (32 * 32) ** 2


def test_order_inside_a_group_is_no_matter() -> None:
    gate, x = made(), noise(2, 12, 5, 4)
    order = torch.arange(12)
    order[4:8] = torch.tensor([6, 4, 7, 5])
    moved = made()
    with torch.no_grad():
        moved.depthwise.weight.copy_(gate.depthwise.weight[order])
        moved.depthwise.bias.copy_(gate.depthwise.bias[order])
        moved.pointwise.weight[1] = gate.pointwise.weight[1][order[4:8] - 4]
        norm, old = moved.depthwise_norm[0], gate.depthwise_norm[0]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(old, name)[order])
    assert_near(moved(x[:, order]), gate(x)[:, order], 1e-12)


def test_a_group_sees_only_its_own_channels() -> None:
    gate, x = made(variant="paper"), noise(2, 12, 5, 4)
    other = x.clone()
    other[:, 2] += noise(2, 5, 4, seed=3)
    change = (gate.weights(other) - gate.weights(x)).abs().amax((0, 2, 3))
    assert change[0] > 1e-3
    assert change[1:].max() == 0
    swapped = torch.arange(12)
    swapped[[3, 4]] = swapped[[4, 3]]
    maps = gate.weights(x[:, swapped])
    assert (maps[:, :2] - gate.weights(x)[:, :2]).abs().amax((0, 2, 3)).min() > 1e-3


def test_the_newest_batch_is_most_of_the_running_statistics() -> None:
    gate = ULSAM(4, 2, variant="release").train()
    x = torch.randn(5, 4, 6, 6)
    gate(x)
    seen = gate.depthwise(x).mean((0, 2, 3))
    assert_near(gate.depthwise_norm[0].running_mean, 0.9 * seen, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=10, num_splits=4), "num_splits=4 must divide channels=10"),
        (dict(channels=8, num_splits=0), "num_splits=0"),
        (dict(channels=8, variant="code"), "variant='code' must be one of 'paper', 'release'"),
        (dict(channels=8, dims=4), "dims=4 must be one of 1, 2, 3"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ULSAM(**options)


def test_maps_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="C=12 channels"):
        made().weights(noise(2, 9, 5, 5))
    with pytest.raises(ShapeError, match="must be a map"):
        made()(noise(2, 12, 5))


# -- a network that loses a block --------------------------------------------------------------------------------------


def separable(channels: int, stride: int = 1) -> nn.Sequential:
    """Make a block of MobileNet: a depthwise 3x3 convolution, and a 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
    )  # fmt: skip


class TinyMobileNet(nn.Module):
    """Two separable blocks, and another part in the place of a third one."""

    def __init__(self, last: nn.Module, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(separable(channels), separable(channels, 2), last)
        self.head = nn.Linear(channels, digits.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images[:, None], (16, 16), mode="bilinear")
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def networks_accuracy(last: Callable[[int], nn.Module], seeds: int = 2) -> float:
    found = []
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = TinyMobileNet(last(32))
        found.append(digits.accuracy(digits.fit(net, seed, 20)))
    return sum(found) / seeds


def test_a_gate_is_smaller_than_the_block_it_replaces() -> None:
    x = torch.empty(1, 8, 8, device="meta")
    whole, gated = (cost(TinyMobileNet(last), x) for last in (separable(32), ULSAM(32)))
    assert gated.parameters < 0.8 * whole.parameters
    assert gated.macs < 0.95 * whole.macs


@pytest.mark.slow
def test_a_gate_stands_in_for_a_block(claim) -> None:
    """The digits are easy: the net reads them as well without any third part. This holds that the gate does no harm."""
    claim(
        "in the place of a tiny MobileNet's last block, at 28 % fewer parameters, it loses at most a point: accuracy",
        ours=networks_accuracy(ULSAM), baseline=networks_accuracy(separable) - 0.01, better="higher",
        baseline_name="the whole network, less a point", seed=0,
    )  # fmt: skip


# -- a map for each group ----------------------------------------------------------------------------------------------


def objects(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw signals of 9 positions with 4 pairs of channels, and a value for each pair.

    The first channel of a pair marks three neighbours, at another place for each pair; there the second channel has the
    value, and noise elsewhere.
    """
    random = torch.Generator().manual_seed(seed)
    x, value = 2 * torch.randn(count, 4, 2, 9, generator=random), torch.randn(count, 4, generator=random)
    places = torch.randint(0, 7, (count, 4), generator=random)[..., None] + torch.arange(3)
    inside = torch.zeros(count, 4, 9).scatter(2, places, 1.0).bool()
    x[:, :, 0], x[:, :, 1] = inside.float(), torch.where(inside, value[..., None], x[:, :, 1])
    return x.flatten(1, 2), value


def unexplained(num_splits: int) -> float:
    """Train a gate and a linear head on the mean over positions to give the values; return the share left over."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = ULSAM(8, num_splits, dims=1)
        net = nn.Sequential(gate, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for step in range(200):
        x, value = objects(256, step)
        optimiser.zero_grad()
        F.mse_loss(net(x), value).backward()
        optimiser.step()
    x, value = objects(4000, 10**6)
    with torch.no_grad():
        return F.mse_loss(net(x), value).item()


def test_each_group_looks_at_its_own_place(claim) -> None:
    """By hand: a map on each object explains 4² / (4² + 6 * 2²) = 0.4 of the variance, no map 3² / (3² + 24) = 0.27."""
    claim(
        "a map for each group reads values that stand at different places for different groups: variance left over",
        ours=unexplained(4), baseline=unexplained(1), better="lower", margin=0.03,
        baseline_name="one map for all channels", seed=0,
    )  # fmt: skip
