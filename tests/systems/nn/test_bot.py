"""The attention of bottleneck transformers: logits by hand, tables for smaller maps, and values at an offset."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import ShapeError
from foveate.nn import BottleneckAttention, cost
from tests.support.tensors import assert_near
from tests.systems.nn import digits, gated
from tests.systems.nn.gated import noise, refused, stirred


def by_hand(gate: BottleneckAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights `(H, N, N)` and the output `(C, N)` of one map `(C, *space)`, by loops over pairs."""
    places = list(product(*(range(side) for side in x.shape[1:])))
    projected = gate.qkv.weight @ x.flatten(1)
    projected = projected if gate.qkv.bias is None else projected + gate.qkv.bias[:, None]
    q, k, v = (part.unflatten(0, (gate.heads, -1)) for part in projected.chunk(3))
    logits = torch.zeros(gate.heads, len(places), len(places), dtype=x.dtype)
    for h in range(gate.heads):
        for (i, at), (j, to) in product(enumerate(places), repeat=2):
            key = k[h, :, j]
            for table, largest, a, b in zip(gate.tables, gate.size, at, to, strict=False):
                key = key + table[b - a + largest - 1]
            logits[h, i, j] = q[h, :, i] @ key / q.shape[1] ** 0.5
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return weights, torch.cat([v[h] @ weights[h].T for h in range(gate.heads)])


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"relative": False}])
@pytest.mark.parametrize("size", [(1,), (6,), (3, 2), (4, 4), (2, 3, 2)])
def test_by_hand(options: dict, size: tuple[int, ...]) -> None:
    gate, x = stirred(BottleneckAttention(6, 2, size=6, dims=len(size), **options)), noise(2, 6, *size)
    for weights, out, example in zip(gate.weights(x), gate(x), x, strict=True):
        expected = by_hand(gate, example)
        assert_near(weights, expected[0], 1e-12)
        assert_near(out.flatten(1), expected[1], 1e-12)


def test_axes_have_their_own_sizes() -> None:
    gate, x = stirred(BottleneckAttention(6, 3, size=(5, 2))), noise(1, 6, 4, 2)
    assert [len(table) for table in gate.tables] == [9, 3]
    assert_near(gate(x)[0].flatten(1), by_hand(gate, x[0])[1], 1e-12)
    with pytest.raises(ShapeError, match=r"at most size=\(5, 2\) along its axes; got \(1, 6, 4, 3\)"):
        gate(noise(1, 6, 4, 3))
    with pytest.raises(ShapeError, match="at most size"):
        gate.weights(noise(1, 6, 6, 2))


def test_without_relative_positions_order_is_no_matter_and_any_size_works() -> None:
    plain, relative, x = (
        stirred(BottleneckAttention(6, 2, size=4, relative=False)), stirred(BottleneckAttention(6, 2, size=4)),
        noise(2, 6, 4, 3),
    )  # fmt: skip
    assert_near(plain(x.flip(2)), plain(x).flip(2), 1e-12)
    assert (relative(x.flip(2)) - relative(x).flip(2)).abs().max() > 1e-3
    assert plain(noise(1, 6, 9, 20)).shape == (1, 6, 9, 20)
    with torch.no_grad():
        for table in relative.tables:
            table.zero_()
    assert_near(relative(x), plain(x), 1e-12)


def test_shifts_of_the_content_shift_relative_weights() -> None:
    """A query's logits for two keys differ by the offset alone, wherever the query stands."""
    gate = stirred(BottleneckAttention(6, 2, size=8))
    x = noise(1, 6, 1, 1).expand(-1, -1, 5, 5)
    weights = gate.weights(x)[0].log().unflatten(-1, (5, 5)).unflatten(1, (5, 5))
    first = weights[:, 1, 1, 1, 2] - weights[:, 1, 1, 2, 0]
    second = weights[:, 2, 3, 2, 4] - weights[:, 2, 3, 3, 2]
    assert_near(first, second, 1e-12)


def test_its_size() -> None:
    x, n = torch.zeros(2, 16, 6, 5), 30
    found = cost(BottleneckAttention(16, 4, size=(6, 5)), x)
    assert found.parameters == 3 * 16 * 16 + (11 + 9) * 4
    assert found.macs == 2 * n * (3 * 16 * 16 + 2 * n * 16 + (6 + 5) * 16)
    assert cost(BottleneckAttention(16, 4, relative=False, bias=True), x).parameters == 3 * 16 * 16 + 48


def test_refusals() -> None:
    assert "heads=3 must divide channels=8" in refused(lambda: BottleneckAttention(8, 3))
    assert "heads=0" in refused(lambda: BottleneckAttention(8, 0))
    assert "size=0" in refused(lambda: BottleneckAttention(8, size=0))
    assert "size=2.5" in refused(lambda: BottleneckAttention(8, size=2.5))
    assert "size=(3, 4, 5) must be a whole number, or 2 of them" in refused(
        lambda: BottleneckAttention(8, size=(3, 4, 5))
    )
    assert "size=" in refused(lambda: BottleneckAttention(8, size="14"))


# -- values at an offset -----------------------------------------------------------------------------------------------


def shifted(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw images; the target is the value one row up and two columns to the left, where there is one."""
    x = torch.randn(count, 1, 6, 6, generator=random)
    return (torch.cat([x, torch.ones_like(x), torch.zeros_like(x).expand(-1, 6, -1, -1)], 1),), x[:, 0, :-1, :-2]


class Inside(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.head = gate, nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(x))[:, 0, 1:, 2:]


def test_relative_positions_find_an_offset(claim) -> None:
    def left_over(**options) -> float:
        make = lambda: Inside(BottleneckAttention(8, 1, size=6, **options))  # noqa: E731
        return gated.unexplained(make, shifted, steps=400, lr=0.05)

    claim(
        "each pixel gives the value one row up and two columns to the left: variance left over",
        ours=left_over(), baseline=left_over(relative=False), better="lower", margin=0.5,
        baseline_name="the same attention without relative positions", seed=0,
    )  # fmt: skip


class Bottleneck(nn.Module):
    """A residual block around a 3x3 convolution, or around attention in its place."""

    def __init__(self, attends: bool, channels: int = 32, width: int = 16) -> None:
        super().__init__()
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        middle = BottleneckAttention(width, 4, size=8) if attends else convolution
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), middle, nn.BatchNorm2d(width),
            nn.ReLU(), nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def digits_accuracy(*attends: bool, seeds: int = 2) -> float:
    """Train a network with one block for each argument; return the mean accuracy."""
    found = []
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Unflatten(1, (1, digits.PIXELS)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
                *(Bottleneck(each) for each in attends), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(32, digits.CLASSES),
            )  # fmt: skip
        found.append(digits.accuracy(digits.fit(net, seed, 8, lr=0.01)))
    return sum(found) / seeds


@pytest.mark.slow
def test_attention_in_the_last_block_reads_digits(claim) -> None:
    """Convolutions do as well here; with attention in both blocks the network reads two points fewer."""
    ours = digits_accuracy(False, True)
    claim(
        "with attention in its last block a network reads digits as with a convolution, less a point: accuracy",
        ours=ours, baseline=digits_accuracy(False, False) - 0.01, better="higher",
        baseline_name="a 3x3 convolution in its place, less a point", seed=0,
    )  # fmt: skip
    claim(
        "this block of attention improves on the network without it: accuracy, 2 seeds",
        ours=ours, baseline=digits_accuracy(False), better="higher", margin=0.003,
        baseline_name="the network without its last block", seed=0,
    )  # fmt: skip
