"""The oracle: textbook softmax attention in float64, without optimisation.

Tests compare every engine, and every operator at its exact limit, with it. It shares no code with them on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weights(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax weights `(B, Hq, Nq, Nk)` in float64; a query that may see nothing has a row of zeros."""
    b, hq, nq, d = q.shape
    hkv, nk = k.shape[1], k.shape[2]
    k = k.double()[:, torch.arange(hq) // (hq // hkv)]
    logits = torch.zeros(b, hq, nq, nk, dtype=torch.float64, device=q.device)
    allowed = torch.ones(b, hq, nq, nk, dtype=torch.bool, device=q.device)
    if causal:
        i = torch.arange(nq, device=q.device)[:, None] + nk - nq
        allowed = allowed & (torch.arange(nk, device=q.device)[None, :] <= i)
    if mask is not None:
        mask = mask.expand(b, hq, nq, nk)
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != float("-inf"))
        if mask.dtype != torch.bool:
            logits = logits + mask.double()
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k) * (d**-0.5 if scale is None else scale)
    logits = torch.where(allowed, logits + torch.nan_to_num(scores), float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    powers = torch.where(allowed, torch.exp(logits - top), 0.0)
    total = powers.sum(-1, keepdim=True)
    return torch.where(total > 0, powers / total.clamp_min(1e-300), 0.0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return softmax attention `(B, Hq, Nq, Dv)` in float64. Keys of weight zero contribute nothing, not even NaN."""
    w = weights(q, k, mask=mask, causal=causal, scale=scale)
    group = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    return torch.einsum("bhij,bhjd->bhid", w, torch.nan_to_num(v.double(), posinf=0.0, neginf=0.0)[:, group])
