"""BaseConv: the gated convolution to which every gated-convolution model reduces.

Zoology: Measuring and Improving Recall in Efficient Language Models (2023), arXiv 2312.04927.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import ShapeError
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts.short_conv import ShortConv


@final
class BaseConv(StreamingLayer):
    """`(x W + b) * (h conv x + b')`: h is a causal filter per channel, fixed after training.

    O(N) with a short filter, O(N log N) with a long one. The filter does not depend on the input: to recall K pairs it
    needs a width that grows with K, unlike attention. The wrong choice for recall.

    Args:
        dim: C.
        kernel: taps of a short filter, the token's own included.
        length: the longest sequence, for a filter of that length (`kernel` then has no effect); None for a short one.

    Raises:
        ShapeError: more tokens than `length`.
    """

    capabilities = replace(
        Layer.capabilities, patterns=frozenset({"causal self"}), masks=frozenset({"keys"}), growth="N"
    )

    def __init__(self, dim: int, kernel: int = 3, *, length: int | None = None) -> None:
        super().__init__(dim)
        validate.count("kernel", kernel, 1)
        self.gate = nn.Linear(dim, dim)
        self.length = length
        if length is None:
            self.conv = ShortConv(dim, kernel)
            self._declare(streaming="exact")
        else:
            validate.count("length", length, 1)
            self._declare(growth="N log N")
            self.filter = nn.Parameter(torch.randn(dim, length) * length**-0.5)
            self.bias = nn.Parameter(torch.zeros(dim))

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        if mask is not None:
            x = x.masked_fill(~masks.keys_of(mask, x.shape[0], x.shape[1])[..., None], 0.0)
        return self.gate(x) * (self.conv(x) if self.length is None else self._long(x))

    def _long(self, x: Tensor) -> Tensor:
        """Apply the whole filter as a product of spectra, padded so that the convolution does not wrap around."""
        n = x.shape[1]
        if self.length is None or n > self.length:
            raise ShapeError(f"the filter has length={self.length} taps; got N={n}")
        wide = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft(x.to(wide), 2 * n, 1) * torch.fft.rfft(self.filter[:, :n].mT.to(wide), 2 * n, 0)
        return torch.fft.irfft(spectrum, 2 * n, 1)[:, :n].to(x.dtype) + self.bias

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.conv.init_state(batch, dtype, device)

    def _step(self, x: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        mixed, state = self.conv.step(x, state)
        return self.gate(x) * mixed, state
