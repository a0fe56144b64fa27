"""Gaussian adaptive attention: the gate by hand, padding, and signals that no linear map can classify."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import MultiHeadAttention
from foveate.nn.channel.gaam import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from tests.support.tensors import assert_near, gradients

PAD = -7.0


def made(*args, seed: int = 0, offset: float = 0.4, **options) -> GaussianAdaptiveAttention:
    """Make a gate with random offsets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = GaussianAdaptiveAttention(*args, **options).double()
        nn.init.normal_(gate.offsets, std=offset)
    return gate


def noise(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def by_hand(gate: GaussianAdaptiveAttention, row: list[float]) -> list[float]:
    """Compute the weights of one row along the axis, entry by entry, as a product of densities."""
    release, pad, out = gate.variant == "release", gate.padding_value, []
    size = len(row) // gate.heads
    for h in range(gate.heads):
        chunk = row[h * size : (h + 1) * size] if h < gate.heads - 1 else row[h * size :]
        counted = [0.0 if v == pad else v for v in chunk] if release else [v for v in chunk if v != pad]
        mean = sum(counted) / max(len(counted), 1)
        spread = math.sqrt(sum((v - mean) ** 2 for v in counted) / max(len(counted) - 1, 1) + 1e-8)
        density = []
        for v in chunk:
            product = 1.0
            for delta, c in zip(gate.offsets[h].tolist(), gate.spreads[h].tolist(), strict=True):
                z = (v - mean - delta) / spread
                product *= math.exp(-(z**2) / (2 * c**2)) / math.sqrt(2 * math.pi * c**2)
            density.append(product if release or v != pad else 0.0)
        total = max(sum(density), 1e-8) if release else sum(density)
        out += [d / total if total else 0.0 for d in density]
    return out


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads,gaussians", [(1, 1), (3, 2), (4, 5)])
def test_weights_by_hand(variant: str, padded: bool, heads: int, gaussians: int) -> None:
    gate = made(heads, gaussians, padding_value=PAD if padded else None, variant=variant)
    x = noise(2, 3, 14)
    x[0, :, 12:] = PAD
    x[1, 1, 0] = PAD
    weights = gate.weights(x)
    for b in range(2):
        for t in range(3):
            assert_near(weights[b, t], torch.tensor(by_hand(gate, x[b, t].tolist())).double(), 1e-6)
    expected = x * weights
    assert_near(gate(x), torch.where(x == PAD, x, expected) if padded else expected, 1e-12)


@pytest.mark.parametrize("axis", [1, -1, 0, 2])
def test_weights_add_up_to_one_in_each_chunk(axis: int) -> None:
    gate, x = made(3, 2, axis), noise(8, 7, 11)
    weights = gate.weights(x)
    assert weights.shape == gate(x).shape == x.shape
    assert (weights >= 0).all()
    rows, size = weights.movedim(axis, -1), x.shape[axis] // 3
    for chunk in (rows[..., :size], rows[..., size : 2 * size], rows[..., 2 * size :]):
        assert_near(chunk.sum(-1), torch.ones(chunk.shape[:-1]).double(), 1e-12)


def test_one_standard_gaussian() -> None:
    gate, x = made(1, 1, offset=0.0), noise(5, 9)
    nn.init.ones_(gate.spreads)
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    assert_near(gate(x), x * torch.softmax(-(z**2) / 2, -1), 1e-8)


def test_wide_gaussians_weigh_alike() -> None:
    gate, x = made(2, 5), noise(5, 12)
    nn.init.constant_(gate.spreads, 1e6)
    assert_near(gate(x), x / 6, 1e-8)
    released = made(2, 5, variant="release")
    nn.init.constant_(released.spreads, 1e6)
    assert released(x).abs().max() < 1e-15, "the floor under densities that are all tiny"


def test_narrow_gaussians_stay_finite() -> None:
    gate, x = made(1, 3).float(), noise(5, 9).float().requires_grad_()
    nn.init.constant_(gate.spreads, 1e-3)
    out = gate(x)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(out, [x, gate.offsets, gate.spreads]))
    assert_near(gate.weights(x).sum(-1), torch.ones(5), 1e-5)


def test_nothing_passes_between_tokens() -> None:
    gate, x = made(), noise(2, 6, 16)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert_near(gate(x[:, order]), gate(x)[:, order], 1e-12)
    along = made(2, axis=1)
    assert (along(x[:, order]) - along(x)[:, order]).abs().max() > 1e-3


def test_padding_has_no_effect() -> None:
    gate, x = made(1, 2, 1, PAD), noise(2, 9, 4)
    padded = x.clone()
    padded[:, 6:] = PAD
    assert_near(gate(padded)[:, :6], gate(x[:, :6]), 1e-12)
    assert (gate(padded)[:, 6:] == PAD).all()
    released = made(1, 2, 1, PAD, variant="release")
    assert (released(padded)[:, :6] - released(x[:, :6])).abs().max() > 1e-3
    assert (released(padded)[:, 6:] == PAD).all()
    empty = torch.full((2, 9, 4), PAD).double().requires_grad_()
    assert_near(gate(empty), empty, 0)
    assert gate.weights(empty).eq(0).all()
    assert all(g.isfinite().all() for g in gradients(gate(empty), [empty, gate.offsets, gate.spreads]))


def test_gradients() -> None:
    gate, x = made(2, 3), noise(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(gate, x)
    padded = noise(1, 8)
    padded[0, 5] = gate.padding_value = PAD
    (grad,) = torch.autograd.grad(gate(padded.requires_grad_())[0, 5], padded)
    assert grad[0].tolist() == [0.0] * 5 + [1.0] + [0.0] * 2
    for parameter in gate.parameters():
        (grad,) = torch.autograd.grad(gate(x).square().sum(), parameter)
        assert grad.abs().min() > 0


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_block_by_hand(variant: str) -> None:
    block = GaussianBlock(2, 1, 3, 1, PAD, variant=variant).double()
    assert len(list(block.parameters())) == 4
    assert sum(p.numel() for p in block.parameters()) == 2 * 3 * 2
    x = noise(2, 9, 4)
    x[1, 5:] = PAD
    once = x + block.layers[0](x)
    twice = once + block.layers[1](once)
    out = block(x)
    if variant == "release":
        assert_near(out, twice, 1e-12)
        assert_near(out[1, 5:] / PAD, block.layers[1](once)[1, 5:] / PAD + 2, 1e-12)
    else:
        assert (out[1, 5:] == PAD).all()
        assert_near(out[0], twice[0], 1e-12)
        assert_near(out[1, :5], block(x[1:, :5])[0], 1e-12)


def test_initial_values() -> None:
    torch.manual_seed(0)
    gate = GaussianAdaptiveAttention(50, 40)
    assert gate.offsets.eq(0).all()
    logs = gate.spreads.log()
    assert abs(logs.mean()) < 0.1
    assert abs(logs.std() - 1) < 0.1


def test_importance() -> None:
    weights = torch.tensor([[[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]]])
    assert_near(importance_factor(weights), torch.tensor([0.0, 1.0, 1.0]), 1e-6)
    assert_near(importance_factor(torch.tensor([[1.0, 2.0], [2.0, 5.0]]), 0), torch.tensor([0.0, 1.0]), 1e-6)
    assert_near(importance_factor(torch.tensor([[1.0, 3.0, 5.0]])), torch.tensor([0.0, 0.5, 1.0]), 1e-6)
    assert importance_factor(torch.full((3, 4), 0.25)).eq(0).all()


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(heads=0), "heads=0"),
        (dict(gaussians=0), "gaussians=0"),
        (dict(axis=1.0), "axis=1.0"),
        (dict(axis=True), "axis=True"),
        (dict(variant="pip"), "variant='pip'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GaussianAdaptiveAttention(**options)


def test_bad_calls() -> None:
    with pytest.raises(OptionError, match="layers=0"):
        GaussianBlock(layers=0)
    for gate, x in ((made(4), noise(2, 7)), (made(1, 1, 2), noise(2, 7)), (made(1, 1, -3), noise(2, 7))):
        with pytest.raises(ShapeError, match="at least 2 entries"):
            gate(x)
    assert made(4)(noise(2, 8)).shape == (2, 8)


# -- non-stationary signals --------------------------------------------------------------------------------------------


def unsteady(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw 32 normal features; 8, by class, have three times the spread; each sample has a gain and an offset."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(77 + c))[:8] for c in range(4)])
    label = torch.randint(4, (count,), generator=random)
    spread = torch.ones(count, 32).scatter(1, chosen[label], 3.0)
    x = 3 + spread * torch.randn(count, 32, generator=random)
    gain, offset = torch.randn(2, count, 1, generator=random)
    return x * (0.5 * gain).exp() + 3 * offset, label


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x[:, None])[:, 0]


def accuracy(body: nn.Module, seed: int) -> float:
    net = nn.Sequential(body, nn.Linear(32, 4))
    (x, label), random = unsteady(2000, 100 + seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(400):
        chosen = torch.randint(2000, (128,), generator=random)
        optimiser.zero_grad()
        F.cross_entropy(net(x[chosen]), label[chosen]).backward()
        optimiser.step()
    x, label = unsteady(2000, 200 + seed)
    with torch.no_grad():
        return (net(x).argmax(-1) == label).float().mean().item()


@pytest.mark.slow
def test_the_gate_reads_spreads(claim) -> None:
    """The gate reads spreads. For a class in the features' means, or over many tokens, attention does as well."""
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ours += accuracy(GaussianBlock(3, 4, 5), seed) / 3
            theirs += accuracy(Residual(MultiHeadAttention(32, 4)), seed) / 3
    claim(
        "the gate reads a class from the spread of features under random gain and offset: accuracy of a linear head",
        ours=ours, baseline=theirs, better="higher", margin=0.03,
        baseline_name="self-attention over the same features as one token", seed=0,
    )  # fmt: skip
