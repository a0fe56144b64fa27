"""L2ViT's blocks: linear global attention with local concentration, and local window attention.

The Linear Attention Resurrection in Vision Transformer (2025), arXiv 2501.16182.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.blocks import gelu_mlp
from foveate.nn.parts.grid import DepthwiseConv, Size, local_mass
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.window import WindowAttention
from foveate.ops.linear.relu_linear import ReLULinear


class _Block(Layer):
    """The common part of both blocks, which see all tokens of a grid."""

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.position = DepthwiseConv(dim, 3)
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = gelu_mlp(dim, mlp_ratio)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


@final
class LinearGlobalBlock(_Block):
    """A block with linear attention over the whole image at O(N C²), with residuals, norms and MLP.

        x += conv3x3(x);  x += ReLULinear(norm(x));  x += LocalConcentration(norm(x));  x += MLP(norm(x))

    Linear attention spreads widely; the convolutions of the third step restore the peak around each token. The block is
    for training from scratch, in alternation with `LocalWindowBlock`. In training mode the third step normalizes over
    the batch. The wrong choice for text, since it sees the future.

    Args:
        dim, heads: C and H.
        clamp: the least divisor of linear attention; see `foveate.ops.ReLULinear`.
        kernel: side of the concentration's two kernels, odd; None removes it.
        mlp_ratio: hidden width of the MLP over C.

    The release's stochastic depth is left out.
    """

    def __init__(
        self, dim: int, heads: int, *, clamp: float = 100.0, kernel: int | None = 7, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__(dim, heads, mlp_ratio)
        self.attention = MultiHeadAttention(dim, heads, op=ReLULinear(heads, dim // heads, clamp), bias=True)
        self.concentration = LocalConcentration(dim, kernel) if kernel is not None else None
        self.concentration_norm = nn.LayerNorm(dim) if kernel is not None else None

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size: Size = inputs["size"]
        x = x + self.position(x, size)
        x = x + self.attention(self.norm(x))
        if self.concentration is not None and self.concentration_norm is not None:
            x = x + self.concentration(self.concentration_norm(x), size)
        return x + self.mlp(self.mlp_norm(x))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, clamp=2.0, kernel=3, mlp_ratio=2.0)


@final
class LocalWindowBlock(_Block):
    """A block with softmax attention inside windows that do not shift.

        x += conv3x3(x);  x += WindowAttention(norm(x));  x += conv3x3(x);  x += MLP(norm(x))

    Args:
        dim, heads: C and H.
        window: side of the windows; 7 suits images of 224, 12 those of 384.
        mlp_ratio: hidden width of the MLP over C.
        padding: "seen" attends to the zeros that fill up the last windows, as in the release; "hidden" masks them.
    """

    def __init__(
        self, dim: int, heads: int, window: int | Size = 7, *, mlp_ratio: float = 4.0,
        padding: Literal["seen", "hidden"] = "seen",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, mlp_ratio)
        self.attention = WindowAttention(dim, heads, window, padding=padding)
        self.second_position = DepthwiseConv(dim, 3)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size: Size = inputs["size"]
        x = x + self.position(x, size)
        x = x + self.attention(self.norm(x), size=size)
        x = x + self.second_position(x, size)
        return x + self.mlp(self.mlp_norm(x))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, (2, 3), mlp_ratio=2.0)


@final
class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, batch norm, depthwise convolution: the local peak that linear attention lacks.

    Args:
        dim: C.
        kernel: side of both kernels, odd.
    """

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        self.first, self.second = DepthwiseConv(dim, kernel), DepthwiseConv(dim, kernel)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b n c"]:
        return self.second(self.norm(F.gelu(self.first(x, size)).mT).mT, size)


class Concentration(NamedTuple):
    """Concentration of attention, as means over queries: the share within reach, and the entropy in nats."""

    mass: float
    entropy: float


def concentration(weights: Float[Tensor, "*b n n"], size: Size, reach: int = 3) -> Concentration:
    """Return the concentration of weights over a grid, by absolute values; rows need not sum to 1.

    Args:
        weights: an operator's `weights`, or a layer's `influence`.
        size: `(H, W)`.
        reach: rows and columns in each direction that count as local; 3 for the 7x7 tokens of a concentration's kernel.
    """
    rows = weights.detach().abs()
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    entropy = torch.special.entr(rows).sum(-1)
    mass = local_mass(rows.reshape(1, -1, *rows.shape[-2:]), size, reach)
    return Concentration(mass.mean().item(), entropy.mean().item())


def influence(mix: Callable[[Tensor], Tensor], x: Float[Tensor, "1 n c"]) -> Float[Tensor, "n n"]:
    """Return the norm of the derivative of each output of `mix` by each token of x, `(N, N)`.

    It replaces weights if a layer has none, or if more than attention mixes tokens. It takes N C backward passes, so it
    serves inspection, not training.
    """
    derivative = torch.autograd.functional.jacobian(mix, x)
    return derivative.squeeze(3).squeeze(0).permute(0, 2, 1, 3).flatten(2).norm(dim=-1)
