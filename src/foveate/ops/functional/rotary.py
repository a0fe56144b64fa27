"""Rotary positions: pairs of channels rotated by angles that grow with the position.

A dot product of two rotated vectors depends only on the difference of their positions. Two layouts of pairs are in use,
and weights trained with one are wrong in the other: "half" pairs channel c with c + D/2 (Hugging Face's Llama and
GPT-NeoX), "interleaved" pairs 2c with 2c + 1 (RoFormer, Meta's Llama, GPT-J; they read pairs as complex numbers).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

Layout = Literal["half", "interleaved"]


def rotary_frequencies(
    dim: int, base: float = 10000.0, device: torch.device | str | None = None
) -> Float[Tensor, " c"]:
    """Return the angle per position of each of `dim // 2` pairs: `base ** (-2c / dim)`, in float64."""
    validate.count("dim", dim, 2)
    if dim % 2:
        raise OptionError(f"dim={dim} must be even, since channels rotate in pairs")
    if isinstance(base, bool) or not base > 0:
        raise OptionError(f"base={shown(base)} must be positive")
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotary_angles(positions: Tensor, dim: int, base: float = 10000.0) -> Float[Tensor, "*n c"]:
    """Return angles `(..., N, dim // 2)` of positions `(..., N)`, whole or real, in radians and float64.

    They broadcast against `x (B, H, N, D)` in `rotate`: positions that differ by batch item come as `(B, 1, N)`.
    """
    return positions.to(torch.float64)[..., None] * rotary_frequencies(dim, base, positions.device)


def rotate(x: Tensor, angles: Tensor, layout: Layout = "half") -> Tensor:
    """Rotate pairs of channels of `x (..., N, D)` by `angles (..., N, C)`, in the dtype of `x`.

    If 2C < D, the first 2C channels rotate and the others stay (partial rotary). `-angles` rotates back.
    """
    validate.one_of("layout", layout, ("half", "interleaved"))
    width = 2 * angles.shape[-1]
    if width > x.shape[-1]:
        raise ShapeError(f"angles must rotate at most D={x.shape[-1]} channels; got {width}")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    pairs = (2, -1) if layout == "half" else (-1, 2)
    a, b = x[..., :width].to(wide).unflatten(-1, pairs).unbind(-2 if layout == "half" else -1)
    both = torch.stack([a * cos - b * sin, a * sin + b * cos], -2 if layout == "half" else -1)
    rotated = both.flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], -1)
