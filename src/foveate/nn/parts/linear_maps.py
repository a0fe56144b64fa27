"""Linear maps that are as fast in half precision as in float32."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.precision import multiplying


@final
class Linear(nn.Linear):
    """`x Wᵀ + b`, as `nn.Linear`, computed in float32 on processors without fast half-precision products.

    There PyTorch multiplies bfloat16 and float16 many times as slowly as float32. Tokens, weights and bias are cast to
    float32 for the product, and the result is rounded once, so it is at least as exact. Weights keep their dtype. A
    single row is not cast, since its time goes into reading the weights. Everywhere else this is `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = multiplying(input.dtype, input.device)
        if wide == input.dtype or input.dtype != self.weight.dtype or input.numel() == input.shape[-1]:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(input.to(wide), self.weight.to(wide), bias).to(input.dtype)


def xavier_linear(dim: int, out_dim: int) -> nn.Linear:
    """Make a linear map with Xavier's uniform weights and a bias of zero."""
    linear = nn.Linear(dim, out_dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def start_small(module: nn.Module) -> None:
    """Draw a linear map's weights from a truncated normal of deviation 0.02, and set its biases to 0.

    Vision transformers start so: `net.apply(start_small)`. Other modules stay as they are.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
