"""MAFormer's block: windows of fine tokens, and learned global tokens that each of them attends to.

MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition (2022), arXiv 2209.01620.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.nn.base.layer import Layer
from foveate.nn.parts.blocks import gelu_mlp
from foveate.nn.parts.grid import Size, sides, to_map, to_tokens
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.window import WindowAttention


@final
class MAFBlock(Layer):
    """A block of two streams on a grid of N tokens, with residuals, norms and MLP; it does not go into a `Block`.

        l = x + WindowAttention(norm(x));  l = l + MLP(norm(l))      fine tokens
        g = GlobalDownsampling(norm(x))                              M global tokens
        out = l + attention(norm(l), norm(g))                        each fine token reads the global ones

    Global tokens are no means of neighbours: each is a learned combination of all positions. Cost O(N M C) with M =
    N / r, and N M parameters, so that it belongs where a map has a few thousand tokens at most. With an output
    projection of zeros in the attention it is a window attention block. The wrong choice for text (it sees the future),
    and for maps whose size varies much, which are resampled to `base_grid`.

    Args:
        dim, heads: C and H.
        window: side of the windows.
        base_grid: `(H, W)` of the map that the global tokens combine, or one number for both; another map is pooled to
            this size first.
        reduction: r; the paper's best ratio of M to N is one half.
        fusion: "attention", or "gate": `out = l + w * spread(g)` with a learned number for each channel and a linear
            map along tokens back to the grid.
        mlp_ratio: hidden width of the MLP over C.
        padding: see `WindowAttention`.

    Raises:
        OptionError: an option out of range.

    The paper's text and code were out of reach; the form is that of a later paper that restates it (U-MAFT, 2026). Ours
    are the norms before the attention, the residual around it, and the whole of "gate", which the paper compares with.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True)

    def __init__(
        self, dim: int, heads: int, window: int = 7, base_grid: int | Size = (14, 14), reduction: int = 2,
        fusion: Literal["attention", "gate"] = "attention", *, mlp_ratio: float = 4.0,
        padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.one_of("fusion", fusion, ("attention", "gate"))
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.local = WindowAttention(dim, heads, window, padding=padding, relative=True)
        self.mlp = gelu_mlp(dim, mlp_ratio)
        self.down = GlobalDownsampling(dim, base_grid, reduction)
        self.global_norm = nn.LayerNorm(dim)
        self.fusion: _AttentionFusion | _GatedFusion = (
            _AttentionFusion(dim, heads) if fusion == "attention" else _GatedFusion(dim, self.down)
        )

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size, normed = inputs["size"], self.norm(x)
        local = x + self.local(normed, size=size)
        local = local + self.mlp(self.mlp_norm(local))
        return local + self.fusion(local, self.global_norm(self.down(normed, size)), size)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2, (3, 2), 2, mlp_ratio=1.0)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


@final
class GlobalDownsampling(Checked, nn.Module):
    """`R x + p`: M tokens, each a learned combination of all N positions of a map, and a learned vector.

    R is one linear map along tokens for all channels, so that equal contents in different places count differently,
    which pooling does not allow. Cost O(N M C).

    Args:
        dim: C.
        base_grid: `(H, W)` of the map, N positions, or one number for both; a map of another size is pooled to it by
            means.
        reduction: r; `M = N // r`, at least 1.

    Raises:
        OptionError: an option out of range.

    The paper (as restated, see `MAFBlock`) interpolates the positions p bilinearly, from a grid that is not stated.
    Here p is one vector for each global token.
    """

    def __init__(self, dim: int, base_grid: int | Size = (14, 14), reduction: int = 2) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("reduction", reduction, 1)
        self.base_grid = height, width = sides("base_grid", base_grid)
        self.mix = nn.Linear(height * width, max(1, height * width // reduction))
        self.places = nn.Parameter(torch.empty(self.mix.out_features, dim))
        nn.init.trunc_normal_(self.places, std=0.02)

    def forward(self, x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b m c"]:
        """Return the global tokens of a map of `(H, W)` tokens, row by row."""
        if tuple(size) != self.base_grid:
            x = to_tokens(F.adaptive_avg_pool2d(to_map(x, size), self.base_grid))
        return self.mix(x.mT).mT + self.places


@final
class _AttentionFusion(nn.Module):
    """Fine tokens attend to the global ones."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), MultiHeadAttention(dim, heads, bias=True)

    def forward(self, local: Tensor, coarse: Tensor, size: Size) -> Tensor:
        return self.attention(self.norm(local), coarse)


@final
class _GatedFusion(nn.Module):
    """Each position of the base grid combines the global tokens, and a learned number weighs each channel."""

    def __init__(self, dim: int, down: GlobalDownsampling) -> None:
        super().__init__()
        self.base_grid = down.base_grid
        self.spread = nn.Linear(down.mix.out_features, down.mix.in_features)
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, local: Tensor, coarse: Tensor, size: Size) -> Tensor:
        found = self.spread(coarse.mT).unflatten(2, self.base_grid)
        if tuple(size) != self.base_grid:
            found = F.interpolate(found, size, mode="bilinear")
        return self.weight * to_tokens(found)
