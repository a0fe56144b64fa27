"""The non-local block: each kind of pairs by hand, windows, the identity at the start, and distant partners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.nn import NonLocal, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, refused, stirred

KINDS = ["embedded", "gaussian", "dot", "concatenation"]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x if isinstance(layer, nn.Identity) else layer.weight @ x + layer.bias


def share(gate: NonLocal, x: Tensor, i: int) -> Tensor:
    """Return f(x_i, x_j) / C for all j, for one example `(C, N)`."""
    theta, n = linear(gate.theta, x[:, i]), x.shape[1]
    phi = [linear(gate.phi, x[:, j]) for j in range(n)]
    if gate.kind == "concatenation":
        return torch.stack([(gate.pair.weight[0] @ torch.cat([theta, p])).clamp(min=0) for p in phi]) / n
    products = torch.stack([gate.scale * theta @ p for p in phi])
    return products / n if gate.kind == "dot" else products.exp() / products.exp().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1,), (7,), (3, 4), (2, 3, 2)])
def test_by_hand(kind: str, size: tuple[int, ...]) -> None:
    gate, x = stirred(NonLocal(6, kind=kind, scale=0.7)), noise(2, 6, *size)
    weights, out = gate.weights(x), gate(x).flatten(2)
    norm = gate.norm
    for b, example in enumerate(x.flatten(2)):
        for i in range(example.shape[1]):
            shares = share(gate, example, i)
            assert_near(weights[b, i], shares, 1e-12)
            y = sum(shares[j] * linear(gate.g, example[:, j]) for j in range(example.shape[1]))
            z = (linear(gate.out, y) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
            assert_near(out[b, :, i], example[:, i] + z, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_keys_and_values(kind: str) -> None:
    """Largest values of windows of 2 x 2, smaller ones at the end; a clip's frames stay apart."""
    gate, x = stirred(NonLocal(6, kind=kind, subsample=True, norm=False)), noise(2, 6, 4, 5)
    assert gate.weights(x).shape == (2, 20, 6)
    g = torch.einsum("dc,bchw->bdhw", gate.g.weight, x) + gate.g.bias[:, None, None]
    pooled = torch.stack(
        [g[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], 1
    )  # fmt: skip
    y = gate.weights(x) @ pooled
    expected = x.flatten(2) + torch.einsum("cd,bnd->bcn", gate.out.weight, y) + gate.out.bias[:, None]
    assert_near(gate(x).flatten(2), expected, 1e-12)
    assert gate.weights(noise(1, 6, 3, 4, 2)).shape == (1, 24, 3 * 2)
    phi = torch.einsum("dc,bchw->bdhw", gate.phi.weight, x) + gate.phi.bias[:, None, None] if kind == "dot" else None
    if phi is not None:
        windows = torch.stack([phi[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], 1)
        assert_near(gate.weights(x), gate.theta(x.flatten(2).mT) @ windows.mT / 6, 1e-12)


@pytest.mark.parametrize("norm", [True, False])
def test_it_begins_as_the_identity(norm: bool) -> None:
    gate, x = NonLocal(8, norm=norm).double(), noise(2, 8, 5, 3)
    for mode in (True, False):
        assert_near(gate.train(mode)(x), x, 0)
    gate.train()(x).sum().backward()
    last = gate.norm.bias if norm else gate.out.bias
    assert last.grad.abs().min() > 0


def test_its_size() -> None:
    x, n = torch.zeros(2, 16, 6, 5), 30
    assert cost(NonLocal(16), x) == (4 * 16 * 8 + 3 * 8 + 16 + 32, 2 * n * (4 * 16 * 8 + 2 * n * 8))
    assert cost(NonLocal(16, kind="gaussian"), x).parameters == 2 * 16 * 8 + 8 + 16 + 32
    assert cost(NonLocal(16, kind="concatenation", norm=False), x).parameters == 4 * 16 * 8 + 3 * 8 + 16 + 16
    fewer = cost(NonLocal(16, subsample=True), x)
    assert fewer.macs == 2 * n * (4 * 16 * 8 + 2 * 9 * 8)


def test_refusals() -> None:
    assert "kind='mean' must be one of" in refused(lambda: NonLocal(8, kind="mean"))
    assert "scale=nan must be a finite number" in refused(lambda: NonLocal(8, scale=float("nan")))
    assert "reduction=0" in refused(lambda: NonLocal(8, 0))


# -- partners far away -------------------------------------------------------------------------------------------------


def partners(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw 8 pairs of positions with equal names, of which one has a value; every position has to give its pair's."""
    order = torch.rand(count, 16, generator=random).argsort(-1)
    value = torch.randn(count, 8, generator=random)
    names = torch.eye(8).repeat(2, 1).expand(count, -1, -1)
    shown = torch.cat([value, torch.zeros_like(value)], 1)[..., None]
    has = torch.cat([torch.ones_like(value), torch.zeros_like(value)], 1)[..., None]
    x = torch.cat([names, shown, has], 2)
    every = torch.arange(count)[:, None]
    return (x[every, order].mT,), value.repeat(1, 2)[every, order][..., None]


class Neighbours(nn.Module):
    """A convolution of width 3 in the place of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(10, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def left_over(make, seed: int = 0) -> float:
    return gated.unexplained(lambda: gated.EachPosition(make(), 10, 1), partners, steps=500)


def test_distant_positions_meet(claim) -> None:
    """By hand: the values at hand explain half of the variance."""
    claim(
        "every position gives the value of its partner, which may stand anywhere: variance left over",
        ours=left_over(lambda: NonLocal(10, 1, scale=10**-0.5)), baseline=left_over(Neighbours), better="lower",
        margin=0.3, baseline_name="a convolution over three neighbours in its place", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with blocks behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("non_local"), baseline=gated.digits_accuracy(None) - 0.01, better="higher",
        baseline_name="the CNN without blocks, less a point", seed=0,
    )  # fmt: skip
