"""A short causal depthwise convolution over tokens, which shows a layer the tokens just before."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate


class ShortConv(nn.Module):
    """`y_t = sum_j w_j x_{t - K + 1 + j} + b` per channel, `(B, N, C) -> (B, N, C)`, zeros before the first token.

    Args:
        dim: C.
        kernel: K, the tokens that it sees, the newest included.
        bias: True adds b.
    """

    def __init__(self, dim: int, kernel: int = 4, *, bias: bool = True) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("kernel", kernel, 1)
        self.kernel = kernel
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.conv(F.pad(x.mT, (self.kernel - 1, 0))).mT

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "b past c"]:
        return torch.zeros(batch, self.kernel - 1, self.conv.in_channels, dtype=dtype, device=device)

    def step(self, x: Float[Tensor, "b 1 c"], state: Tensor) -> tuple[Float[Tensor, "b 1 c"], Tensor]:
        """Process the next token; the state holds the last K - 1."""
        seen = torch.cat([state, x], 1)
        return self.conv(seen.mT).mT, seen[:, 1:]

    @torch.no_grad()
    def identity_(self) -> None:
        """Set the weights so that every token passes unchanged."""
        self.conv.weight.zero_()
        self.conv.weight[..., -1] = 1.0
        if self.conv.bias is not None:
            self.conv.bias.zero_()
