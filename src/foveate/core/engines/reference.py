"""The reference engine: the whole matrix, in the caller's dtype. O(Nq Nk) memory; any scoring, any selection."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.readable import is_clean, known


def refuses(call: AttentionCall) -> str | None:
    return None


def weights(
    call: AttentionCall, rows: slice = slice(None), cols: slice = slice(None), mine: Tensor | None = None
) -> Tensor:
    """Return attention weights `(B, Hq, nq, nk)` of some rows, over a leading part of the keys with every visible one.

    `mine`: see `AttentionCall.tile_mask`.
    """
    keys, hidden = _finite(call.grouped(call.k[:, :, cols]))
    at, mask = call.tile(rows, cols), call.tile_mask(rows, cols, mine)
    logits = call.scoring.logits(call.q[:, :, rows], keys, call.scale, at)
    if hidden is not None:
        logits = logits.masked_fill(hidden.any(-1)[..., None, :], float("nan"))
    if mask is not None:
        if mask.dtype != torch.bool:
            logits = logits + mask
        logits = torch.where(masks.allowed(mask), logits, masks.NEG_INF)
    return call.scoring.normalize(logits, at)


def attend(
    call: AttentionCall, rows: slice = slice(None), cols: slice = slice(None), mine: Tensor | None = None
) -> Tensor:
    """Return the output `(B, Hq, nq, Dv)` of some rows."""
    w = weights(call, rows, cols, mine)
    if call.dropout:
        w = torch.nn.functional.dropout(w, call.dropout)
    return apply_weights(w, call.grouped(call.v[:, :, cols]))


def apply_weights(w: Tensor, values: Tensor) -> Tensor:
    """Return `w @ values`, where a weight of zero takes nothing, not even from NaN or inf."""
    values, hidden = _finite(values)
    out = w.to(values.dtype) @ values
    if hidden is None:
        return out
    poison = torch.where(hidden, float("nan"), 0.0).to(out.dtype)
    columns = hidden.flatten(0, 1).any(0).any(-1).nonzero().squeeze(-1)
    taken = torch.where(w[..., columns, None] != 0, poison[:, :, None, columns], 0.0)
    return out + taken.sum(-2)


def _finite(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `x` with zeros for NaN and inf, and a mask of these (None if there are none)."""
    if is_clean(x):
        return x, None
    bad = ~torch.isfinite(x)
    return x.masked_fill(bad, 0.0), bad if known(bad.any()) else None
