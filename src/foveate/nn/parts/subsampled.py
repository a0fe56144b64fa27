"""Global attention of every token of a grid to a smaller version of the grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size, filled, to_map, to_tokens
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.ops.operator import Operator


@final
class GlobalSubsampledAttention(Layer):
    """Queries of all N tokens attend to `N / r²` keys, each of which sums up r x r tokens: O(N² C / r²).

    This is Twins' global sub-sampled attention (GSA), and PVT's spatial reduction attention. Every token sees the whole
    grid, coarsely. With `ratio=1` it is multi-head attention. The wrong choice where `N / r²` keys are still too many.

    Args:
        dim, heads: C and H.
        ratio: r, side of the squares of tokens that become one key.
        reduce: "conv" makes keys and values from a convolution with kernel and stride r and a LayerNorm; "mean" from
            the squares' means, without parameters.
        op: an operator or its key; see `MultiHeadAttention`.
        bias, head_dim, out_dim, out_bias: see `MultiHeadAttention`.
        padding: what becomes of the last rows and columns if r does not divide a side. "hidden" and "seen" fill the
            last squares up with zeros; a mean leaves these zeros out ("hidden") or counts them ("seen"), a convolution
            does the same with both. "dropped" makes no key of such squares, as the releases do.

    Raises:
        ShapeError: `padding="dropped"`, and a side below r.

    Twins: Revisiting the Design of Spatial Attention in Vision Transformers (2021), arXiv 2104.13840; Pyramid Vision
    Transformer (2021), arXiv 2102.12122.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True)

    def __init__(
        self, dim: int, heads: int, ratio: int = 1, *, reduce: Literal["conv", "mean"] = "conv",
        op: str | Operator = "softmax", bias: bool = True, padding: Literal["hidden", "seen", "dropped"] = "hidden",
        head_dim: int | None = None, out_dim: int | None = None, out_bias: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("ratio", ratio, 1)
        validate.one_of("reduce", reduce, ("conv", "mean"))
        validate.one_of("padding", padding, ("hidden", "seen", "dropped"))
        self.ratio, self.padding = ratio, padding
        self.attention = MultiHeadAttention(
            dim, heads, head_dim=head_dim, op=op, bias=bias, out_dim=out_dim, out_bias=out_bias
        )
        learned = reduce == "conv" and ratio > 1
        self.conv = nn.Conv2d(dim, dim, ratio, stride=ratio) if learned else None
        self.norm = nn.LayerNorm(dim) if learned else None

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self.attention(x, self.subsampled(x, inputs["size"]))

    def subsampled(self, x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b m c"]:
        """Return the tokens that keys and values are made from, row by row of the smaller grid."""
        if self.ratio == 1:
            return x
        image = to_map(x, size)
        if self.padding == "dropped" and min(size) < self.ratio:
            raise ShapeError(f'size={shown(size)} must be at least ratio={self.ratio}, unless padding="hidden"')
        if self.conv is not None and self.norm is not None:
            image = image if self.padding == "dropped" else filled(image, self.ratio)
            return self.norm(to_tokens(self.conv(image)))
        image = filled(image, self.ratio) if self.padding == "seen" else image
        # the last window of a mean with `ceil_mode` holds, and counts, only what is left of the image
        return to_tokens(F.avg_pool2d(image, self.ratio, ceil_mode=self.padding == "hidden"))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}
