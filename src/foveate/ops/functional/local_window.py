"""Positions among the real keys, predicted centres of queries, and windows around these centres."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from foveate.core import masks


def places(
    mask: Tensor | None, batch: int, n_keys: int, device: torch.device
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b 1"]]:
    """Return each key's position among those that a mask of kind "keys" allows, from 0 on, and their number.

    So padding on either side moves nothing. A hidden key has the position of the real one before it.
    """
    if mask is None:
        seen = torch.ones(batch, n_keys, dtype=torch.int64, device=device)
    else:
        seen = masks.keys_of(mask, batch, n_keys).long()
    return seen.cumsum(-1) - 1, seen.sum(-1, keepdim=True)


def predicted(
    q: Float[Tensor, "b h q d"], w: Float[Tensor, "h d e"], v: Float[Tensor, "h e"], count: Tensor
) -> Float[Tensor, "b h q 1"]:
    """Predict each query's centre, `count sigmoid(v . tanh(q w))`, between 0 and the number of keys.

    It is float32 at least, since rounding would move the sharp edges of a window around it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.tanh(q.to(wide) @ w.to(wide))
    return count * torch.sigmoid(hidden @ v.to(wide)[..., None])


def cut(
    logits: Float[Tensor, "... q k"], place: Tensor, centre: Real[Tensor, "... q 1"], window: float
) -> Float[Tensor, "... q k"]:
    """Set logits of keys more than `window` positions from the centre to -inf."""
    return logits.masked_fill((place - centre).abs() > window, masks.NEG_INF)


def log_bell(
    place: Real[Tensor, "*#q k"], centre: Real[Tensor, "*#q 1"], width: Tensor | float
) -> Float[Tensor, "*q k"]:
    """Return the logarithm of a Gaussian of height 1: `-(place - centre)² / (2 width²)`."""
    return -((place - centre) ** 2) / (2 * width**2)
