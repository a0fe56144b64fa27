"""Where a key stands among the real ones, and a bell-shaped window over such places."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import masks


def places(
    mask: Tensor | None, batch: int, n_keys: int, device: torch.device
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b 1"]]:
    """Each key's place among those that a mask of kind "keys" lets through, from 0 on, and how many these are.

    Padding on either side therefore moves nothing. The place of a hidden key is that of the real one before it.
    """
    if mask is None:
        seen = torch.ones(batch, n_keys, dtype=torch.int64, device=device)
    else:
        seen = masks.keys_of(mask, batch, n_keys).long()
    return seen.cumsum(-1) - 1, seen.sum(-1, keepdim=True)


def log_bell(
    place: Float[Tensor, "... k"], centre: Float[Tensor, "... 1"], width: Tensor | float
) -> Float[Tensor, "... k"]:
    """The logarithm of a Gaussian of height 1: `-(place - centre)² / (2 width²)`."""
    return -((place - centre) ** 2) / (2 * width**2)
