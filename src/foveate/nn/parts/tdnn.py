"""Blocks of time-delay networks on frames `(B, C, T)`: a convolution in time, and the SE-Res2 block made of it.

ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based Speaker Verification (2020),
arXiv 2005.07143. Parts have the names of SpeechBrain's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import known


@final
class TDNN(nn.Module):
    """`BatchNorm(relu(conv(x)))`: a convolution in time that keeps the number of frames.

    Frames are mirrored at both ends of an example, without the first and the last, so that it needs more frames than
    the convolution reaches.

    Args:
        channels, out_channels: channels in and out.
        kernel: frames that it reads, odd.
        dilation: distance between them.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        sizes = {"channels": channels, "out_channels": out_channels, "kernel": kernel, "dilation": dilation}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        if kernel % 2 == 0:
            raise OptionError(f"kernel={kernel} must be odd")
        self.reach = dilation * (kernel // 2)
        self.conv = nn.Conv1d(channels, out_channels, kernel, dilation=dilation)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b d t"]:
        """Return the frames; with `lengths`, each example is mirrored at its own end, and padding has no effect."""
        return self.norm(F.relu(self.conv(mirrored(x, self.reach, lengths))))


@final
class Res2Conv(nn.Module):
    """Channels in groups, each convolved after the result of the group before it is added.

    `y_0 = x_0`, `y_1 = K_1(x_1)`, `y_i = K_i(x_i + y_(i-1))`: later groups see more and more frames.

    Args:
        channels: C.
        scale: number of groups, a divisor of C.
        kernel, dilation: see `TDNN`.
    """

    def __init__(self, channels: int, scale: int = 8, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__()
        validate.count("channels", channels, 1)
        validate.count("scale", scale, 2)
        if channels % scale:
            raise OptionError(f"scale={scale} must divide channels={channels}")
        width = channels // scale
        self.scale = scale
        self.blocks = nn.ModuleList(TDNN(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b c t"]:
        first, second, *others = x.chunk(self.scale, 1)
        convolve, *further = cast("Iterator[TDNN]", iter(self.blocks))
        groups = [first, convolve(second, lengths)]
        for convolve, group in zip(further, others, strict=True):
            groups.append(convolve(group + groups[-1], lengths))
        return torch.cat(groups, 1)


@final
class _SqueezeExcite(nn.Module):
    """`x * sigmoid(W_2 relu(W_1 mean(x)))`: each channel is scaled by what all channels are on average over time."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        validate.count("se", hidden, 1)
        self.conv1, self.conv2 = nn.Conv1d(channels, hidden, 1), nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Float[Tensor, "b c t"], real: Bool[Tensor, "b 1 t"] | None) -> Float[Tensor, "b c t"]:
        mean = time_mean(x, real)[..., None]
        return x * torch.sigmoid(self.conv2(F.relu(self.conv1(mean))))


@final
class SERes2Block1d(nn.Module):
    """`x + SE(TDNN(Res2(TDNN(x))))`: the block of ECAPA-TDNN, frames `(B, C, T)` in and out.

    Cost O(T C²). The convolutions see a few dozen frames; through SE a channel also depends on the whole recording.

    Args:
        channels: C.
        dilation: distance between the frames that a convolution of the Res2 part reads.
        scale: number of its groups, a divisor of the channels out.
        se: hidden width of SE.
        kernel: frames that a convolution reads, odd.
        out_channels: None for C. With another number a convolution of single frames brings x to it, without activation.
    """

    def __init__(
        self, channels: int, dilation: int = 1, *, scale: int = 8, se: int = 128, kernel: int = 3,
        out_channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.channels = channels
        self.tdnn1 = TDNN(channels, out_channels)
        self.res2net_block = Res2Conv(out_channels, scale, kernel, dilation)
        self.tdnn2 = TDNN(out_channels, out_channels)
        self.se_block = _SqueezeExcite(out_channels, se)
        self.shortcut = None if out_channels == channels else nn.Conv1d(channels, out_channels, 1)
        self.least = dilation * (kernel // 2) + 1

    def forward(self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b d t"]:
        """Return the frames.

        Args:
            x: frames, more than the convolutions reach.
            lengths: number of real frames in each example, if some end early; others have no effect on these.
        """
        check_frames(x, self.channels, lengths, self.least)
        real = real_frames(lengths, x.shape[2])
        y = self.tdnn2(self.res2net_block(self.tdnn1(x), lengths))
        return self.se_block(y, real) + (x if self.shortcut is None else self.shortcut(x))


def mirrored(x: Float[Tensor, "b c t"], reach: int, lengths: Int[Tensor, " b"] | None) -> Float[Tensor, "b c u"]:
    """Add `reach` frames before and behind each example, mirrored at its first and at its last frame."""
    if reach == 0:
        return x
    if lengths is None:
        return F.pad(x, (reach, reach), mode="reflect")
    at = torch.arange(-reach, x.shape[2] + reach, device=x.device).abs()
    last = lengths[:, None] - 1
    at = torch.where(at > last, 2 * last - at, at).clamp_min(0)
    return x.gather(2, at[:, None].expand(-1, x.shape[1], -1))


def real_frames(lengths: Int[Tensor, " b"] | None, frames: int) -> Bool[Tensor, "b 1 t"] | None:
    """Return the mask of real frames; None if all are."""
    return None if lengths is None else (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, None]


def time_mean(x: Float[Tensor, "b c t"], real: Bool[Tensor, "b 1 t"] | None) -> Float[Tensor, "b c"]:
    """Return the mean over the real frames."""
    return x.mean(2) if real is None else x.masked_fill(~real, 0.0).sum(2) / real.sum(2)


def check_frames(x: Tensor, channels: int, lengths: Tensor | None, least: int = 1) -> None:
    """Refuse what are no frames `(B, C, T)`, or lengths that do not fit; each example has to have `least` frames."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != channels or x.shape[2] < least:
        raise ShapeError(f"x must be frames (B, C={channels}, T) with T >= {least}; got {shown(x)}")
    check_lengths(lengths, x.shape[0], x.shape[2], least)


def check_lengths(lengths: Tensor | None, batch: int, frames: int, least: int) -> None:
    """Refuse lengths that are not whole numbers `(B,)` in `least..T`."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ShapeError(f"lengths must be whole numbers (B,)=({batch},) of int64; got {shown(lengths)}")
    if known(((lengths < least) | (lengths > frames)).any()):
        raise OptionError(f"lengths must be in {least}..{frames}; got {int(lengths.min())}..{int(lengths.max())}")
