"""Attentive statistics pooling with a weight for each channel and frame.

ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based Speaker Verification (2020),
arXiv 2005.07143.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.masks import NEG_INF
from foveate.nn.parts.tdnn import TDNN, check_frames, real_frames

LEAST_VARIANCE = 1e-12


@final
class AttentiveStatsPool(Checked, nn.Module):
    """Mean and standard deviation over time under weights of each channel: frames `(B, C, T)` to `(B, 2C)`.

    The weights are `softmax_t(V tanh(W [h_t; mean; std] + b))`, one map for each channel, so that channels may look at
    different frames; mean and std are those of all frames, which tell a frame what the recording is like. Cost O(T C R)
    for R attention channels. The wrong choice if a vector has to say where in time something was.

    Args:
        channels: C.
        attention_channels: R, the width inside tanh.
        global_context: False leaves mean and std out of the weights' input.
        variant: "release" puts a ReLU and a BatchNorm before tanh, as SpeechBrain does. The paper leaves the activation
            open; both variants take tanh.
    """

    def __init__(
        self, channels: int, attention_channels: int = 128, *, global_context: bool = True,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("channels", channels, 1)
        validate.count("attention_channels", attention_channels, 1)
        self.channels, self.global_context = channels, global_context
        width = 3 * channels if global_context else channels
        inner = TDNN(width, attention_channels) if variant == "release" else nn.Conv1d(width, attention_channels, 1)
        self.tdnn: nn.Module = inner
        self.conv = nn.Conv1d(attention_channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b two_c"]:
        """Return the means of all channels, and behind them their standard deviations.

        Args:
            x: frames.
            lengths: number of real frames in each example, if some end early; others have no effect.
        """
        x, real = self._real(x, lengths)
        return torch.cat(statistics(x, self._weights(x, real)), 1)

    def weights(self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b c t"]:
        """Return the weights, which add up to 1 over the real frames and are 0 elsewhere."""
        return self._weights(*self._real(x, lengths))

    def _weights(self, x: Tensor, real: Tensor | None) -> Float[Tensor, "b c t"]:
        seen = self._with_context(x, real) if self.global_context else x
        scores = self.conv(torch.tanh(self.tdnn(seen)))
        return (scores if real is None else scores.masked_fill(~real, NEG_INF)).softmax(-1)

    def _with_context(self, x: Tensor, real: Tensor | None) -> Float[Tensor, "b three_c t"]:
        """Put mean and standard deviation over all real frames below each frame."""
        counted = torch.ones_like(x[:, :1]) if real is None else real.to(x.dtype)
        plain = statistics(x, counted / counted.sum(-1, keepdim=True))
        return torch.cat([x, *(each[..., None].expand_as(x) for each in plain)], 1)

    def _real(
        self, x: Float[Tensor, "b c t"], lengths: Int[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b c t"], Bool[Tensor, "b 1 t"] | None]:
        check_frames(x, self.channels, lengths)
        real = real_frames(lengths, x.shape[2])
        return (x if real is None else x.masked_fill(~real, 0.0)), real


def statistics(
    x: Float[Tensor, "b c t"], weights: Float[Tensor, "b _ t"]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Return mean and standard deviation of each channel over time, under weights that add up to 1."""
    mean = (weights * x).sum(-1)
    variance = (weights * (x - mean[..., None]).square()).sum(-1)
    return mean, variance.clamp_min(LEAST_VARIANCE).sqrt()
