"""Where a key stands among the real ones, where a query looks, and windows around such places."""

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


def predicted(
    q: Float[Tensor, "b h q d"], w: Float[Tensor, "h d e"], v: Float[Tensor, "h e"], count: Tensor
) -> Float[Tensor, "b h q 1"]:
    """Where each query looks, by its own word: `count sigmoid(v . tanh(q w))`, between 0 and how many keys there are.

    In float32 at least: a window around it has sharp edges, which rounding would move to and fro.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.tanh(q.to(wide) @ w.to(wide))
    return count * torch.sigmoid(hidden @ v.to(wide)[..., None])


def cut(
    logits: Float[Tensor, "... q k"], place: Tensor, centre: Float[Tensor, "... q 1"], window: float
) -> Float[Tensor, "... q k"]:
    """-inf for keys more than `window` places from the centre."""
    return logits.masked_fill((place - centre).abs() > window, masks.NEVER)


def log_bell(
    place: Float[Tensor, "... k"], centre: Float[Tensor, "... 1"], width: Tensor | float
) -> Float[Tensor, "... k"]:
    """The logarithm of a Gaussian of height 1: `-(place - centre)² / (2 width²)`."""
    return -((place - centre) ** 2) / (2 * width**2)
