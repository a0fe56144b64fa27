"""Attention maps of images: the patches among the tokens, and their places."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import ShapeError, shown


def check_maps(attn: Tensor) -> None:
    """Refuse what is no weights `(B, layers, heads, N, N)` of at least one image."""
    if not isinstance(attn, Tensor) or attn.dim() != 5 or attn.shape[3] != attn.shape[4] or not len(attn):
        raise ShapeError(f"attn must be weights (B, layers, heads, N, N) of at least one image; got {shown(attn)}")


def checked_grid(attn: Tensor, grid: tuple[int, int] | None, prefix: int) -> tuple[int, int]:
    """Return the rows and columns of patches of maps `(B, L, H, N, N)` whose first `prefix` tokens are no patches.

    `grid=None` is a square. Refuses maps of another size.
    """
    check_maps(attn)
    patches = attn.shape[4] - prefix
    rows, columns = (round(max(patches, 0) ** 0.5),) * 2 if grid is None else grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ShapeError(
            f"grid={grid} must be (rows, columns) of the {patches} patches that {attn.shape[4]} tokens hold behind "
            f"{prefix} others (prefix)"
        )
    return rows, columns


def patch_attention(attn: Float[Tensor, "b l h n n"], prefix: int) -> Float[Tensor, "b l h p p"]:
    """Return the weights from patches to patches, each row divided by its sum; rows without any stay zero."""
    inner = attn[..., prefix:, prefix:].to(torch.promote_types(attn.dtype, torch.float32))
    total = inner.sum(-1, keepdim=True)
    return inner / total.masked_fill(total == 0, 1.0)


def patch_places(grid: tuple[int, int]) -> Float[Tensor, "p 2"]:
    """Return each patch's row and column, row by row."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).float()
