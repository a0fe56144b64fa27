"""Logits from queries and keys of a few bits: SALE chooses keys by them.

Keys often share a large offset, and so do queries, and it would take most of a few bits. So both lose their mean over
the sequence first. That of the keys adds one number to a query's whole row, which a softmax ignores; that of the
queries adds one number for each key, which is added exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LowBit(NamedTuple):
    """Factors of the estimated logits: `queries @ keys^T`.

    Args:
        queries: `(B, Hq, Nq, D + 1)`; the last channel is 1.
        keys: `(B, Hq, Nk, D + 1)`; the last channel is the product of the key with the mean query.
    """

    queries: Float[Tensor, "b h q e"]
    keys: Float[Tensor, "b h k e"]


def rounded(x: Float[Tensor, "... d"], bits: int) -> Float[Tensor, "... d"]:
    """Round each row to whole numbers of so many bits, of both signs, times a scale of its own; a float holds them."""
    most = 2 ** (bits - 1) - 1
    step = (x.abs().amax(-1, keepdim=True) / most).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / step).round() * step


def low_bit(q: Float[Tensor, "b hq q d"], smooth: Float[Tensor, "b hkv k d"], bits: int) -> LowBit:
    """Return the factors of the logits of scaled queries and of keys whose mean is 0, from `bits` bits each."""
    centre = q.mean(2, keepdim=True)
    groups = q.shape[1] // smooth.shape[1]
    exact = (smooth[:, :, None] @ centre.unflatten(1, (-1, groups)).transpose(3, 4)).flatten(1, 2)
    keys = rounded(smooth, bits).repeat_interleave(groups, 1)
    queries = rounded(q - centre, bits)
    return LowBit(torch.cat([queries, torch.ones_like(queries[..., :1])], -1), torch.cat([keys, exact], -1))
