"""InLine attention: injective linear attention, and a local residual with kernels predicted from the image.

Bridging the Divide: Reconsidering Softmax and Linear Attention (2024), arXiv 2412.06590.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size, dynamic_conv
from foveate.ops.linear.inline import FeatureMap, InLine

KERNEL = 3


@final
class InLineAttention(Layer):
    """`(InLine(q, k, v) + conv(v)) W_o` on a grid: attention to all tokens at O(N C²), and a 3x3 neighbourhood.

    `foveate.ops.InLine` is the first part alone. The second part compensates for linear attention's weak focus on the
    neighbourhood: a depthwise 3x3 convolution of the values, with kernels predicted from the mean token. It replaces
    softmax attention in training from scratch, with windows up to the whole image. The wrong choice for weights trained
    with a softmax, and for text: both parts see the future.

    Args:
        dim: C.
        heads: H.
        phi: the feature map of queries and keys; see `InLine`.
        local: False removes the local residual.
        class_token: True for a token before the grid's. It takes part in the attention and in the mean token, not in
            the convolution.
        bias: True gives queries, keys and values biases (the release: Swin yes, DeiT no).

    Raises:
        OptionError: `heads` does not divide `dim`, or an unknown `phi`.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(
        self, dim: int, heads: int, *, phi: FeatureMap = "identity", local: bool = True, class_token: bool = False,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.prefix = int(class_token)
        self._declare(prefix=self.prefix)
        self.op = InLine(phi)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.local = LocalKernels(dim, heads) if local else None

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size: Size = inputs["size"]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.op(q, k, v).transpose(1, 2).flatten(2)
        if self.local is not None:
            pixels = v.transpose(1, 2).flatten(2)[:, self.prefix :]
            local = dynamic_conv(pixels, self.local(x.mean(1)), size)
            out = out + F.pad(local, (0, 0, self.prefix, 0))
        return self.out(out)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, phi="leaky_relu")

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


@final
class LocalKernels(nn.Module):
    """A 3x3 kernel for each channel, from one token: two linear maps, separate for each head, with a GELU between.

    Args:
        dim: C.
        heads: H, a divisor of C.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.hidden = nn.Conv1d(dim, dim, 1, groups=heads)
        self.kernels = nn.Conv1d(dim, dim * KERNEL**2, 1, groups=heads)

    def forward(self, token: Float[Tensor, "b c"]) -> Float[Tensor, "b c 3 3"]:
        kernels = self.kernels(F.gelu(self.hidden(token[..., None])))
        return kernels.reshape(*token.shape, KERNEL, KERNEL)


def injectivity_probe(
    attend: Callable[[Tensor, Tensor], Tensor],
    q_pairs: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]],
    k: Float[Tensor, "b h m d"],
    tolerance: float = 1e-6,
) -> float:
    """Return the share of pairs of different queries with the same row of weights: 0 if attention is injective.

    Args:
        attend: a function from queries and keys to weights `(B, H, N, M)`, such as an operator's `weights`.
        q_pairs: two tensors of queries, compared position by position; equal queries do not count.
        k: the keys.
        tolerance: rows are the same if their entries differ by at most this times the largest entry.
    """
    validate.at_least("tolerance", tolerance, 0)
    one, other = q_pairs
    if one.shape != other.shape:
        raise ShapeError(f"q_pairs must be two tensors of one shape; got {tuple(one.shape)}, {tuple(other.shape)}")
    differ = (one != other).any(-1)
    if not bool(differ.any()):
        raise OptionError("q_pairs must hold at least one pair of different queries; got equal tensors")
    rows, others = attend(one, k), attend(other, k)
    gap = (rows - others).abs().amax(-1)
    same = gap <= tolerance * torch.maximum(rows.abs(), others.abs()).amax(-1)
    return (same & differ).sum().item() / differ.sum().item()
