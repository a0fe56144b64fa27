"""DFFreq: attention among channels in windows, Haar bands, phases, and the detector behind them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.models.vision.dffreq import Bottleneck, DFFreqDetector
from foveate.nn.vision.dual_frequency import (
    DualFrequencyBlock,
    WindowChannelAttention,
    bands_to_squares,
    haar,
    inverse_haar,
    reflected,
    squares_to_bands,
)
from tests.support.tensors import assert_near


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: nn.Module) -> Any:
    """Move every parameter, so that each has an effect, in float64."""
    module, draw = module.double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return module


def attention(channels: int = 6, heads: int = 2, window: int = 3, **options: Any) -> WindowChannelAttention:
    torch.manual_seed(0)
    return shaken(WindowChannelAttention(channels, heads, window, **options))


def block(**options: Any) -> DualFrequencyBlock:
    torch.manual_seed(0)
    return shaken(DualFrequencyBlock(**options))


def by_hand(layer: WindowChannelAttention, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Attend window by window; return the output, and the weights of each window `(B, H, C/H, C/H)`."""
    height, width = x.shape[2:]
    conv, around = layer.qkv, layer.around
    qkv = F.conv2d(x, conv.weight, conv.bias)
    qkv = F.conv2d(qkv, around.weight, around.bias, padding=1, groups=qkv.shape[1])
    w = layer.window
    qkv = F.pad(qkv, (0, -width % w, 0, -height % w), mode="reflect")
    out, weights = torch.zeros_like(qkv[:, : x.shape[1]]), []
    for r in range(0, qkv.shape[2], w):
        for s in range(0, qkv.shape[3], w):
            cut = qkv[:, :, r : r + w, s : s + w].flatten(2)
            q, k, v = (part.unflatten(1, (layer.heads, -1)) for part in cut.chunk(3, 1))
            logits = torch.einsum("bhct,bhdt->bhcd", q, k) * layer.tau.view(1, -1, 1, 1)
            weights.append(logits.softmax(-1))
            gate = F.gelu(v @ layer.pixels.weight.mT + layer.pixels.bias)
            found = torch.einsum("bhcd,bhdt->bhct", weights[-1], v) * gate
            out[:, :, r : r + w, s : s + w] = found.flatten(1, 2).unflatten(2, (w, w))
    return F.conv2d(out[:, :, :height, :width], layer.out.weight, layer.out.bias), weights


# -- attention among channels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 9), (5, 7), (3, 3), (4, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_channels_attend_window_by_window(size: tuple[int, int], bias: bool) -> None:
    layer, x = attention(bias=bias), randn(2, 6, *size)
    expected, weights = by_hand(layer, x)
    assert_near(layer(x), expected, 1e-10)
    assert_near(layer.weights(x), torch.stack(weights, 1).flatten(0, 1), 1e-10)


def test_weights_are_of_channels_and_add_up_to_one() -> None:
    weights = attention().weights(randn(2, 6, 7, 8))
    assert weights.shape == (2 * 3 * 3, 2, 3, 3)
    assert_near(weights.sum(-1), torch.ones(18, 2, 3), 1e-12)
    assert (weights - weights.mT).abs().max() > 1e-3


def test_the_temperature_starts_at_one_over_the_root_of_the_channels() -> None:
    layer = WindowChannelAttention(16, 4)
    assert layer.tau.shape == (4, 1, 1) and layer.tau.unique().tolist() == [0.25]


@pytest.mark.parametrize(("length", "multiple"), [(5, 4), (8, 4), (3, 2), (4, 7)])
def test_sides_are_filled_up_by_reflection(length: int, multiple: int) -> None:
    x = randn(1, 2, length, 2 * multiple)
    assert torch.equal(reflected(x, multiple), F.pad(x, (0, 0, 0, -length % multiple), mode="reflect"))


def test_a_map_shorter_than_what_is_missing_turns_back() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    assert reflected(x, 8)[0, 0, :, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflected(torch.ones(1, 1, 1, 1), 8).shape == (1, 1, 8, 8)


# -- bands -------------------------------------------------------------------------------------------------------------


def test_bands_of_simple_images() -> None:
    """Their order is that of the release: means, change down the rows, along the columns, along both."""
    row, column = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    for place, image in enumerate((torch.ones(2, 2), row, column, row * column)):
        expected = torch.zeros(4)
        expected[place] = 2.0
        assert torch.equal(haar(image[None, None])[0, 0, :, 0, 0], expected)


def test_bands_are_the_products_of_haar_filters() -> None:
    x = randn(2, 3, 8, 6)
    low, high = torch.tensor([1.0, 1.0]).double() / math.sqrt(2), torch.tensor([1.0, -1.0]).double() / math.sqrt(2)
    filters = [(low, low), (high, low), (low, high), (high, high)]  # down the rows, along the columns
    for place, (down, along) in enumerate(filters):
        kernel = (down[:, None] * along)[None, None].expand(3, 1, 2, 2)
        assert_near(haar(x)[:, :, place], F.conv2d(x, kernel, stride=2, groups=3), 1e-12)


def test_the_transform_is_undone_and_keeps_squares() -> None:
    x = randn(2, 3, 8, 12)
    assert_near(inverse_haar(haar(x)), x, 1e-12)
    assert_near(haar(x).square().sum(), x.square().sum(), 1e-12)


def test_a_window_holds_one_square_of_all_bands() -> None:
    """The places of a 4 x 4 window are the four pixels (columns) of the same square in the four bands (rows)."""
    codes = torch.arange(4 * 4 * 6.0).view(1, 1, 4, 4, 6)
    squares = bands_to_squares(codes)
    assert squares.shape == (1, 1, 4, 24)
    windows = F.unfold(squares, 4, stride=4)[0].mT.view(-1, 4, 4)
    for number, window in enumerate(windows):
        r, s = divmod(number, 3)
        expected = codes[0, 0, :, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].flatten(1)
        assert torch.equal(window, expected)
    assert torch.equal(squares_to_bands(squares, (4, 6)), codes)


# -- the block ---------------------------------------------------------------------------------------------------------


def without_output(net: DualFrequencyBlock) -> DualFrequencyBlock:
    for part in (net.dwt, net.fft):
        nn.init.zeros_(part.out.weight)
        nn.init.zeros_(part.out.bias)
    return net


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1), (2, 5)])
def test_without_output_the_wavelets_give_x_back(size: tuple[int, int]) -> None:
    net, x = without_output(block()), randn(2, 3, *size)
    assert_near(net.by_wavelets(x), x, 1e-12)
    nn.init.zeros_(net.fft_scale)
    assert_near(net(x), 0.6 * x, 1e-12)


def test_a_new_block_is_the_wavelet_branch_alone() -> None:
    torch.manual_seed(0)
    net, x = DualFrequencyBlock().double(), randn(2, 3, 8, 8)
    assert_near(net(x), 0.6 * net.by_wavelets(x), 1e-12)
    assert (net.by_wavelets(x) - x).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(net(x).square().sum(), net.fft_scale)
    assert grad.abs() > 1e-3, "the silent branch learns to speak"


def test_the_wavelet_branch_by_hand() -> None:
    net, x = block(), randn(2, 3, 8, 12)
    bands = haar(x)
    laid = torch.stack(
        [bands[:, :, :, r : r + 2, s : s + 2].flatten(3) for r in range(0, 4, 2) for s in range(0, 6, 2)], 3
    ).flatten(3)
    normed = F.layer_norm(laid.permute(0, 2, 3, 1), (3,), net.norm.weight, net.norm.bias).permute(0, 3, 1, 2)
    laid = (laid + by_hand(net.dwt, normed)[0]).unflatten(3, (2, 3, 2, 2))
    expected = torch.zeros_like(bands)
    for r in range(2):
        for s in range(3):
            expected[:, :, :, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2] = laid[:, :, :, r, s]
    assert_near(net.by_wavelets(x), inverse_haar(expected), 1e-10)


@pytest.mark.parametrize("size", [(16, 14), (9, 15), (16, 17)])
def test_the_fourier_branch_by_hand(size: tuple[int, int]) -> None:
    net, x = block(), randn(2, 3, *size)
    spectrum = torch.fft.fft2(x)[..., : size[1] // 2 + 1]
    phase, _ = by_hand(net.fft, torch.atan2(spectrum.imag.where(spectrum.imag.abs() > 1e-9, 0.0), spectrum.real))
    changed = spectrum.abs() * (phase.cos() + 1j * phase.sin())
    expected = torch.fft.irfft2(changed, s=size)
    assert_near(net.by_phases(x), expected, 1e-9)
    assert_near(net(x), 0.6 * net.by_wavelets(x) + 0.4 * net.fft_scale * expected, 1e-9)


class Earlier(nn.Module):
    """Phases less a ramp down the rows, which shifts an image."""

    def forward(self, phase: Tensor) -> Tensor:
        return phase - 2 * math.pi * torch.fft.fftfreq(phase.shape[2], dtype=phase.dtype)[:, None]


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_phases_as_they_are_give_x_back(size: tuple[int, int]) -> None:
    net, x = block(), randn(2, 3, *size)
    net.fft = nn.Identity()
    assert_near(net.by_phases(x), x, 1e-12)


def test_phases_less_a_ramp_shift_the_image() -> None:
    net, x = block(), randn(2, 3, 5, 7)
    net.fft = Earlier()
    assert_near(net.by_phases(x), x.roll(1, 2), 1e-12)


def test_the_sign_of_a_zero_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real negative number of the spectrum has the phase pi, however its imaginary zero came about."""
    net, x, outs = block(), randn(2, 3, 8, 8), []
    real = torch.fft.rfft2(x).real
    for zero in (0.0, -0.0):
        spectrum = torch.complex(real, torch.full_like(real, zero))
        monkeypatch.setattr(torch.fft, "rfft2", lambda x, found=spectrum: found)
        outs.append(net.by_phases(x))
    assert_near(outs[0], outs[1], 1e-12)


def test_a_flat_image_has_finite_gradients() -> None:
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(block()(x).square().sum(), x)
    assert grad.isfinite().all()


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="heads=4 must divide channels=6"):
        WindowChannelAttention(6, 4)
    with pytest.raises(OptionError, match="window=0"):
        WindowChannelAttention(6, 2, 0)
    with pytest.raises(OptionError, match="fft_window=0"):
        DualFrequencyBlock(fft_window=0)
    with pytest.raises(OptionError, match="depths=\\(\\) must hold"):
        DFFreqDetector(depths=())
    with pytest.raises(ShapeError, match=r"images must be \(B, 3, H, W\)"):
        DFFreqDetector.example()(torch.zeros(1, 1, 8, 8))


# -- the detector ------------------------------------------------------------------------------------------------------


def norm(part: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, part.running_mean, part.running_var, part.weight, part.bias)


def bottleneck(part: Bottleneck, x: Tensor, stride: int) -> Tensor:
    y = norm(part.bn1, F.conv2d(x, part.conv1.weight)).relu()
    y = norm(part.bn2, F.conv2d(y, part.conv2.weight, stride=stride, padding=1)).relu()
    y = norm(part.bn3, F.conv2d(y, part.conv3.weight))
    if isinstance(part.shortcut, nn.Sequential):
        x = norm(part.shortcut[1], F.conv2d(x, part.shortcut[0].weight, stride=stride))
    return (x + y).relu()


def test_the_detector_by_hand() -> None:
    torch.manual_seed(0)
    net, x = shaken(DFFreqDetector.example()), randn(2, 3, 16, 12)
    y = F.conv2d(net.frequency(x), net.conv1.weight, stride=2, padding=1)
    y = F.max_pool2d(norm(net.bn1, y).relu(), 3, 2, 1)
    y = bottleneck(net.stages[0][1], bottleneck(net.stages[0][0], y, 1), 1)
    y = bottleneck(net.stages[1][0], y, 2)
    assert_near(net(x), y.mean((2, 3)) @ net.head.weight.mT + net.head.bias, 1e-10)


def test_it_has_the_first_half_of_a_resnet_50() -> None:
    """Counted from the sizes of the blocks that the paper names; behind the stem come 512 channels."""
    with torch.device("meta"):
        net = DFFreqDetector()
    stages = [sum(p.numel() for p in stage.parameters()) for stage in net.stages]
    assert stages == [215_808, 1_219_584]  # those of the stages of every ResNet-50
    assert net.conv1.weight.shape == (64, 3, 3, 3) and net.head.weight.shape == (1, 512)


# -- what the paper claims ---------------------------------------------------------------------------------------------

SIDE = 32


def images(upsampler: str, batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noise images and labels: half of them were upsampled, the others blurred to about the same spectrum."""
    half = batch // 2
    small = torch.randn(half, 3, SIDE // 2, SIDE // 2, generator=random)
    options = {} if upsampler == "nearest" else {"align_corners": False}
    fake = F.interpolate(small, scale_factor=2.0, mode=upsampler, **options)
    # the transform of a fake, with the magnitudes that it has, and the phases of other noise
    noise = torch.fft.rfft2(torch.randn(half, 3, SIDE, SIDE, generator=random))
    real = torch.fft.irfft2(torch.fft.rfft2(fake).abs() * noise / noise.abs(), s=(SIDE, SIDE))
    x = torch.cat([fake, real])
    return x + 0.6 * torch.randn(x.shape, generator=random), torch.arange(batch) < half


@cache
def accuracy(frequency: bool, seed: int, steps: int = 60) -> float:
    """Train on images of one upsampler; return the accuracy on those of another one."""
    torch.manual_seed(seed)
    net, random = DFFreqDetector(depths=(1,), width=8), torch.Generator().manual_seed(seed)
    if not frequency:
        net.frequency = nn.Identity()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(steps):
        x, fake = images("bilinear", 16, random)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(net(x)[:, 0], fake.float()).backward()
        optimiser.step()
    with torch.no_grad():
        x, fake = images("nearest", 400, torch.Generator().manual_seed(99))
        return ((net.eval()(x)[:, 0] > 0) == fake).float().mean().item()


@pytest.mark.slow
def test_the_block_finds_traces_of_another_generator(claim) -> None:
    """After 60 steps; after 300 both networks are right about every image.

    The other way round, trained on "nearest", both call all images of "bilinear" real: the traces that they learn are
    those that only the first upsampler leaves.
    """
    ours, plain = (sum(accuracy(frequency, seed) for seed in range(5)) / 5 for frequency in (True, False))
    assert ours > 0.9
    claim(
        "a detector trained on images of one upsampler knows those of another: accuracy, 5 seeds, 60 steps",
        ours=ours, baseline=plain, better="higher", margin=0.01,
        baseline_name="the same network without the frequency block", seed=0,
    )  # fmt: skip
