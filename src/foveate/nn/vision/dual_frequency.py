"""Attention among channels in windows of wavelet bands and of phases, which finds traces of generated images.

Dual Frequency Branch Framework with Reconstructed Sliding Windows Attention for AI-Generated Image Detection (2025),
arXiv 2501.15253.
"""

from __future__ import annotations

from typing import Any, Self, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.feature_gate import FeatureGate
from foveate.ops.dense.softmax import Softmax

#: Shares of the wavelet branch and of the Fourier branch in the output.
SHARES = (0.6, 0.4)


@final
class WindowChannelAttention(FeatureGate):
    """Channels attend to each other in each w x w window, and a gate mixes the window's pixels: O(N (C + w²) C).

        A = softmax(tau q kᵀ),  C/H x C/H for each window and head, since q, k and v have pixels as features
        out = W (A v * gelu(v M)),  with M over the w² pixels of the window

    Queries, keys and values come from a 1x1 and a depthwise 3x3 convolution. The weights say how channels belong
    together in a window, not which pixels do; the gate alone mixes distant pixels of a window. The wrong choice for
    many channels and small windows, where the products of pixels say little.

    Args:
        channels: C.
        heads: H, a divisor of C.
        window: w. Rows and columns beyond the last full window are filled up by reflection.
        bias: True gives the convolutions for queries, keys and values biases.

    Raises:
        OptionError: an option out of range.

    There is no residual: `DualFrequencyBlock` adds one where the paper has one.
    """

    axes = frozenset({2})

    def __init__(self, channels: int, heads: int = 1, window: int = 8, *, bias: bool = False) -> None:
        super().__init__(channels, 2)
        validate.count("heads", heads, 1)
        validate.count("window", window, 1)
        if channels % heads:
            raise OptionError(f"heads={heads} must divide channels={channels}")
        self.heads, self.window = heads, window
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.around = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.tau = nn.Parameter(torch.full((heads, 1, 1), channels**-0.5))
        self.pixels = nn.Linear(window**2, window**2)
        self.out = nn.Conv2d(channels, channels, 1)
        self.op = Softmax()

    def weights(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "windows heads d d"]:
        """Return the weights of channels for channels in each window; the windows of one map are neighbours."""
        self._check(x)
        q, k, _ = self._windows(x)
        return self.op.weights(self.tau * q, k, scale=1.0)

    def _gate(self, x: Tensor) -> Tensor:
        q, k, v = self._windows(x)
        found = self.op(self.tau * q, k, v, scale=1.0) * F.gelu(self.pixels(v))
        rows = -(-x.shape[2] // self.window)
        side = self.window
        full = rearrange(found, "(b r s) d c (i j) -> b (d c) (r i) (s j)", b=len(x), r=rows, i=side, j=side)
        return self.out(full[:, :, : x.shape[2], : x.shape[3]])

    def _windows(self, x: Tensor) -> Float[Tensor, "3 windows heads c t"]:
        qkv = reflected(self.around(self.qkv(x)), self.window)
        return rearrange(
            qkv, "b (z d c) (r i) (s j) -> z (b r s) d c (i j)", z=3, d=self.heads, i=self.window, j=self.window
        )

    @classmethod
    def for_map(cls, channels: int, dims: int, **options: Any) -> Self:
        validate.one_of("dims", dims, (2,))
        return cls(channels, **options)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls.for_map(channels, dims, heads=2, window=3, bias=True)


@final
class DualFrequencyBlock(FeatureGate):
    """`0.6 (x + wavelet term) + 0.4 s (Fourier term)`: attention among colours in two frequency domains.

    Wavelets: one level of Haar bands; windows of 2x2 pixels of all four bands, normalised over channels; what attention
    finds is added to the bands, and the inverse transform follows. Fourier: attention changes the phases, magnitudes
    stay; s is learned and starts at 0, so that this branch is silent at first. Generators leave traces between
    neighbouring pixels, which both domains show, whatever the image is of.

    Args:
        channels: C, 3 for colour images.
        dwt_window: window in the wavelet domain; 4 is one square of pixels with its four bands.
        fft_window: window in the Fourier domain.
        heads: heads of both; a divisor of C.

    Raises:
        OptionError: an option out of range.

    Rows and columns that 4 does not divide are filled up by reflection for the wavelets, and cut off again; the release
    takes even bands only. Transforms are computed in float32 or wider.
    """

    axes = frozenset({2})

    def __init__(self, channels: int = 3, dwt_window: int = 4, fft_window: int = 8, *, heads: int = 1) -> None:
        super().__init__(channels, 2)
        validate.count("dwt_window", dwt_window, 1)
        validate.count("fft_window", fft_window, 1)
        self.norm = nn.LayerNorm(channels)
        self.dwt = WindowChannelAttention(channels, heads, dwt_window)
        self.fft = WindowChannelAttention(channels, heads, fft_window)
        self.fft_scale = nn.Parameter(torch.zeros(1))

    def _gate(self, x: Tensor) -> Tensor:
        return SHARES[0] * self.by_wavelets(x) + SHARES[1] * self.fft_scale * self.by_phases(x)

    def by_wavelets(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return x plus what attention finds in its bands."""
        bands = haar(reflected(x, 4))
        squares = bands_to_squares(bands)
        normed = self.norm(squares.movedim(1, -1)).movedim(-1, 1)
        found = squares_to_bands(squares + self.dwt(normed), (bands.shape[3], bands.shape[4]))
        return inverse_haar(found)[:, :, : x.shape[2], : x.shape[3]]

    def by_phases(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return x with the phases of its Fourier transform replaced by what attention makes of them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(x.to(wide))
        # adding 0 makes -0 to 0: a real negative number would have the phase pi or -pi, by the sign of a zero
        phase = torch.complex(spectrum.real, spectrum.imag + 0.0).angle()
        changed = self.fft(phase.to(x.dtype)).to(wide)
        return torch.fft.irfft2(torch.polar(spectrum.abs(), changed), s=x.shape[2:]).to(x.dtype)

    @classmethod
    def for_map(cls, channels: int, dims: int, **options: Any) -> Self:
        validate.one_of("dims", dims, (2,))
        return cls(channels, **options)


def haar(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 4 h2 w2"]:
    """Return the four bands of one level of Haar wavelets, each half as high and wide as the map.

    The bands are the means of 2x2 squares times 2, and what changes down the rows, along the columns, and along both.
    The transform keeps the sum of squares. Sides are even.
    """
    return _hadamard(rearrange(x, "b c (h i) (w j) -> b c (i j) h w", i=2, j=2))


def inverse_haar(bands: Float[Tensor, "b c 4 h2 w2"]) -> Float[Tensor, "b c h w"]:
    """Undo `haar`."""
    return rearrange(_hadamard(bands), "b c (i j) h w -> b c (h i) (w j)", i=2, j=2)


def _hadamard(x: Float[Tensor, "b c 4 h w"]) -> Float[Tensor, "b c 4 h w"]:
    """Return half the sums and differences of four numbers, an orthogonal map that is its own inverse."""
    a, b, c, d = x.unbind(2)
    return torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 2) / 2


def bands_to_squares(bands: Float[Tensor, "b c 4 h w"]) -> Float[Tensor, "b c 4 n"]:
    """Lay out 2x2 squares of each band one after another: four columns hold the same square of all four bands."""
    return rearrange(bands, "b c s (h i) (w j) -> b c s (h w i j)", i=2, j=2)


def squares_to_bands(squares: Float[Tensor, "b c 4 n"], size: tuple[int, int]) -> Float[Tensor, "b c 4 h w"]:
    """Undo `bands_to_squares`, for bands of this size."""
    return rearrange(squares, "b c s (h w i j) -> b c s (h i) (w j)", h=size[0] // 2, i=2, j=2)


def reflected(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Fill up the sides of a map to a multiple: behind its last row or column come those before it, in reverse order.

    A map may be shorter than what is missing: the order then turns again at its first row.
    """
    for axis in (2, 3):
        length = x.shape[axis]
        if length % multiple:
            x = x.index_select(axis, _reflection(length, -(-length // multiple) * multiple, x.device))
    return x


def _reflection(length: int, longer: int, device: torch.device) -> Int[Tensor, " longer"]:
    period = max(1, 2 * (length - 1))
    places = torch.arange(longer, device=device) % period
    return torch.where(places < length, places, period - places)
