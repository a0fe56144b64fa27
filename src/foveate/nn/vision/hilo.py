"""HiLo attention: some heads attend inside small windows, the others to the means of these windows.

Fast Vision Transformers with HiLo Attention (2022), arXiv 2205.13213.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts import released as released_parameters
from foveate.nn.parts.subsampled import GlobalSubsampledAttention
from foveate.nn.parts.window import WindowAttention

#: How names of the release's layer become ours.
_NAMES = (
    (r"\bh_(qkv|proj)\b", r"high.attention.\1"), (r"\bl_(q|kv|proj)\b", r"low.attention.\1"), (r"\.proj\.", ".out."),
)  # fmt: skip
_PARTS = ((r"\bqkv\b", ("q", "k", "v")), (r"\bkv\b", ("k", "v")))


@final
class HiLoAttention(Layer):
    """`concat(Hi-Fi(x), Lo-Fi(x))` on the channels, for N tokens on a grid.

        Hi-Fi: (1 - alpha) H heads attend inside windows of s x s tokens
        Lo-Fi: alpha H heads attend to the means of all windows

    Windows carry high frequencies, their means low ones. Each group has its own four projections; no projection mixes
    the groups, which the network's MLP does. Cost `2 s² N C_high + 2 N² C_low / s²` multiply-adds besides projections,
    for widths `C_high + C_low = C`. With `window=1` all heads are Lo-Fi: multi-head attention. With `alpha=0` it is
    window attention, with `alpha=1` attention to averages. It has no positions: the paper's networks put a depthwise
    3x3 convolution into the MLP. The wrong choice for text (it sees the future), or for grids of very many tokens.

    Args:
        dim, heads: C and H; H divides C.
        window: s, side of the windows.
        alpha: share of Lo-Fi heads, rounded down to whole heads. The paper's networks have 0.9, the class of the
            release 0.5.
        bias: True gives queries, keys and values biases. Output projections always have one.
        padding: if s does not divide a side, zeros fill the last windows up. "hidden" neither attends to them nor
            counts them in means; "seen" does both, as the release's networks for detection.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True)

    def __init__(
        self, dim: int, heads: int = 8, window: int = 2, alpha: float = 0.5, *, bias: bool = False,
        padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("window", window, 1)
        validate.between("alpha", alpha, 0, 1)
        validate.one_of("padding", padding, ("hidden", "seen"))
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        width = dim // heads
        # 0.29 * 100 is 28.999... in floating point
        self.low_heads = heads if window == 1 else math.floor(alpha * heads + 1e-9)
        self.high_heads = heads - self.low_heads

        def widths(heads: int) -> dict[str, Any]:
            return {"head_dim": width, "out_dim": heads * width, "bias": bias, "out_bias": True, "padding": padding}

        self.high = self.low = None
        if self.high_heads:
            self.high = WindowAttention(dim, self.high_heads, window, **widths(self.high_heads))
        if self.low_heads:
            self.low = GlobalSubsampledAttention(
                dim, self.low_heads, window, reduce="mean", **widths(self.low_heads)
            )  # fmt: skip
        else:
            self._declare(growth="N")

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return torch.cat([part(x, size=inputs["size"]) for part in (self.high, self.low) if part is not None], -1)

    def load_released(self, released: Mapping[str, Tensor]) -> None:
        """Load the state dict of the release's layer, `HiLo` in ziplab/LITv2, with the same options.

        Raises:
            OptionError: parameters that this layer lacks, or has alone, or has in another shape.
        """
        released_parameters.load(self, released_parameters.renamed(released, _NAMES, _PARTS))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2, bias=True)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}
