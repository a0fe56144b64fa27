"""PyTorch's fused kernel, `scaled_dot_product_attention`, with Foveate's conventions around it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines.work import Work
from foveate.core.readable import known

#: Most queries for which a group's queries go to the kernel as one head's. With one bf16 query, grouped heads are ten
#: times slower on a CPU, where the kernel reads the keys again for every query head.
FEW = 16


def refuses(call: AttentionCall) -> str | None:
    if not call.is_plain:
        return "fused computes softmax over dot products only"
    if call.selection is not None:
        return "fused attends to every key and would waste the selection"
    return None


def work(call: AttentionCall) -> Work:
    """Return the work of a call."""
    (b, hq, nq, d), nk, dv = call.q.shape, call.n_keys, call.v.shape[3]
    hidden = nq * (nq - 1) // 2 if call.causal and call.mask is None and nq == nk else 0
    is_masked = call.mask is not None or (call.causal and nq not in (1, nk))
    return Work(calls=1, products=b * hq * (nq * nk - hidden) * (d + dv), masked=nq * nk if is_masked else 0)


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    mask, is_causal = call.mask, call.causal
    packs = 1 < call.groups and call.n_queries <= FEW
    if is_causal and (packs or mask is not None or call.n_queries != call.n_keys):
        # the kernel aligns causality top-left; a single query needs none, and other calls get a mask
        mask = masks.full(mask, call.n_queries > 1, call.n_queries, call.n_keys, call.q.device)
        is_causal = False
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)  # the kernel wants two dimensions or more
        mask = mask if mask.dtype == torch.bool else mask.to(call.q.dtype)
    out = kernel(call.q, call.k, call.v, call.scale, mask, call.dropout, is_causal)
    if mask is None:
        return out
    seen = masks.allowed(mask).any(-1, keepdim=True)
    return torch.where(seen, out, 0.0) if not known(seen.all()) else out


def kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """Call the kernel for queries that each see some key. `mask` is the full mask, in four dimensions."""
    groups, n = q.shape[1] // k.shape[1], q.shape[2]
    if groups == 1 or n > FEW or is_causal:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=groups > 1)
    # join the queries of a group as those of one head
    b, heads = k.shape[:2]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.unflatten(1, (heads, groups)).expand(-1, -1, -1, n, -1).flatten(2, 3)
    elif mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q.reshape(b, heads, groups * n, -1), k, v, mask, dropout, scale=scale)
    return out.reshape(b, heads * groups, n, -1)
