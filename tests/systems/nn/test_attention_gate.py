"""The attention gate: weights by hand on both grids, signals of any size, and a region that a coarse map points to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import AttentionGate, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, normed, refused, stirred


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to an image `(B, C, H, W)`, and the batch norm behind it if there is one."""
    layer, norm = layer if isinstance(layer, nn.Sequential) else (layer, None)
    out = torch.einsum("dc,bchw->bdhw", layer.weight[:, :, 0, 0], x)
    out = out if layer.bias is None else out + layer.bias[:, None, None]
    return out if norm is None else normed(out, norm)


def lines(x: Tensor, n: int) -> Tensor:
    """Interpolate the last axis linearly to n places, corner to corner."""
    at = torch.arange(n, dtype=torch.float64) * ((x.shape[-1] - 1) / max(1, n - 1))
    low = at.floor().long().clamp(max=max(0, x.shape[-1] - 2))
    high = (low + 1).clamp(max=x.shape[-1] - 1)
    return x[..., low] + (at - low) * (x[..., high] - x[..., low])


def resized(x: Tensor, height: int, width: int) -> Tensor:
    return lines(lines(x, width).mT, height).mT


@pytest.mark.parametrize("norm", [True, False])
def test_by_hand_on_one_grid(norm: bool) -> None:
    gate = stirred(AttentionGate(6, 3, 4, stride=1, norm=norm))
    x, signal = noise(2, 6, 5, 4), noise(2, 3, 5, 4, seed=2)
    hidden = (conv(gate.of_x, x) + conv(gate.of_signal, signal)).clamp(min=0)
    weights = 1 / (1 + (-conv(gate.psi, hidden)).exp())
    assert_near(gate.weights(x, signal), weights, 1e-12)
    assert_near(gate(x, signal), weights * x, 1e-12)


@pytest.mark.parametrize("size", [(6, 4), (5, 4), (1, 7)])
@pytest.mark.parametrize("coarse", [(3, 2), (1, 1), (4, 5)])
def test_by_hand_on_the_coarser_grid(size: tuple[int, int], coarse: tuple[int, int]) -> None:
    """Windows of 2 x 2 of x, with zeros behind its end; the signal is brought to them, and the weights back to x."""
    gate, x, signal = stirred(AttentionGate(6, 3, 4)), noise(2, 6, *size), noise(2, 3, *coarse, seed=2)
    few = [-(-side // 2) for side in size]
    whole = torch.zeros(2, 6, 2 * few[0], 2 * few[1], dtype=torch.float64)
    whole[:, :, : size[0], : size[1]] = x
    small = torch.zeros(2, 4, *few, dtype=torch.float64)
    for i in range(few[0]):
        for j in range(few[1]):
            window = whole[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            small[:, :, i, j] = torch.einsum("dcij,bcij->bd", gate.of_x.weight, window)
    guided = (small + resized(conv(gate.of_signal, signal), *few)).clamp(min=0)
    weights = resized(torch.sigmoid(conv(gate.psi, guided)), *size)
    assert_near(gate.weights(x, signal), weights, 1e-12)
    assert_near(gate(x, signal), weights * x, 1e-12)


def test_limits() -> None:
    gate, x, signal = stirred(AttentionGate(6, 3)), noise(2, 6, 5, 4), noise(2, 3, 2, 2)
    nn.init.zeros_(gate.psi.weight)
    nn.init.zeros_(gate.psi.bias)
    assert_near(gate(x, signal), 0.5 * x, 1e-12)
    nn.init.constant_(gate.psi.bias, 50.0)
    assert_near(gate(x, signal), x, 1e-12)


def test_without_a_signal_x_is_its_own() -> None:
    gate, x = stirred(AttentionGate(6)), noise(2, 6, 5, 4)
    assert_near(gate(x), gate(x, x), 0)
    assert (gate(x) - gate(x, noise(2, 6, 5, 4, seed=3))).abs().max() > 1e-3


def test_its_size() -> None:
    x, signal = torch.zeros(2, 8, 6, 4, 2), torch.zeros(2, 16, 3, 2, 1)
    gate = AttentionGate(8, 16, dims=3)
    assert cost(gate, x, signal) == (8 * 4 * 8 + 16 * 4 + 4 + 4 + 1, 2 * 6 * (8 * 4 * 8 + 16 * 4 + 4))
    assert AttentionGate(1).of_x.out_channels == 1
    assert cost(AttentionGate(8, 16, stride=1, norm=True), torch.zeros(1, 8, 2, 2), torch.zeros(1, 16, 2, 2))[0] == (
        8 * 4 + 16 * 4 + 4 + 4 + 1 + 2 * (4 + 4 + 1)
    )


def test_channels_last_stays_with_a_signal() -> None:
    gate, x, signal = stirred(AttentionGate(6, 3)), noise(2, 6, 5, 4), noise(2, 3, 2, 2)
    out = gate(x.contiguous(memory_format=torch.channels_last), signal)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out, gate(x, signal), 1e-12)


def test_gradients_reach_the_signal() -> None:
    gate, x, signal = stirred(AttentionGate(4, 3)), noise(1, 4, 3, 3), noise(1, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(gate, (x.requires_grad_(), signal))


def test_refusals() -> None:
    assert "stride=0" in refused(lambda: AttentionGate(8, stride=0))
    assert "signal_channels=0" in refused(lambda: AttentionGate(8, 0))
    assert "hidden=0" in refused(lambda: AttentionGate(8, hidden=0))
    gate, x = AttentionGate(8, 3), torch.zeros(2, 8, 4, 4)
    with pytest.raises(OptionError, match="signal must be a map of 3 channels"):
        gate(x)
    for signal in (torch.zeros(2, 8, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4), "signal"):
        with pytest.raises(ShapeError, match=r"signal must be \(B=2, 3, \*space\)"):
            gate(x, signal)
    with pytest.raises(ShapeError, match="signal must have at least one position"):
        gate(x, torch.zeros(2, 3, 0, 4))
    with pytest.raises(ShapeError, match="C=8 channels"):
        gate(torch.zeros(2, 7, 4, 4), torch.zeros(2, 3, 4, 4))


# -- a region that a coarse map points to ------------------------------------------------------------------------------


def regions(count: int, random: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Draw images with a value in each quadrant, and a coarse map that points to one; its value is the target."""
    values = torch.randn(count, 2, 2, generator=random)
    which = torch.randint(0, 4, (count,), generator=random)
    signal = torch.nn.functional.one_hot(which, 4).float().view(count, 1, 2, 2)
    x = values.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    x = torch.cat([x, torch.zeros_like(x)], 1) + 0.3 * torch.randn(count, 2, 8, 8, generator=random)
    noisy = signal + 0.2 * torch.randn(signal.shape, generator=random)
    return (x, noisy), values.flatten(1)[torch.arange(count), which][:, None]


class Blind(nn.Module):
    """A gate that does not see its signal."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        return self.gate(x, torch.zeros_like(signal))


def test_the_signal_points(claim) -> None:
    """By hand: the mean over the image explains a quarter."""

    def left_over(wrap) -> float:
        make = lambda: gated.MeanOverPositions(wrap(AttentionGate(2, 1, 4)), 2, 1)  # noqa: E731
        return gated.unexplained(make, regions)

    claim(
        "a gate reads the value of the quadrant to which a coarse map points: variance left over",
        ours=left_over(lambda gate: gate), baseline=left_over(Blind), better="lower", margin=0.4,
        baseline_name="the same gate without the signal", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("attention_gate"), baseline=gated.digits_accuracy(None) - 0.01, better="higher",
        baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
