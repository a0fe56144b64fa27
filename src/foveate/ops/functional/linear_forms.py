"""Three ways to compute decayed linear attention that agree: the whole matrix, chunk by chunk, token by token.

All are unnormalised: `out_i = sum_{j <= i} sum_f fq_if exp(G_if - G_jf) fk_jf v_j` with `G` the running sum of the log
decays, or, as a recurrence, `S_i = exp(g_i) S_{i-1} + fk_i v_iᵀ` and `out_i = S_iᵀ fq_i`. A token's own decay acts on
the state before its key is written. Features are `(..., N, F)`, values `(..., N, Dv)`, log decays `(..., N)` for all
features alike, `(..., N, F)` for each its own, or None.

Every factor is the exponential of a sum of log decays, which is at most 0: nothing is divided by a decay that has
underflowed, and nothing overflows.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.readable import is_clean
from foveate.ops.functional import causal

#: Tokens whose pairs are written out feature by feature, where each feature has a decay of its own.
TILE = 8
#: Tokens that are in work at a time: what is made on the way stays in the cache of a processor.
SPAN = 1024


def matrix(fq: Tensor, fk: Tensor, is_causal: bool, log_decay: Tensor | None) -> Tensor:
    """The weights `(..., Nq, Nk)` themselves: O(Nq Nk) time and memory. Decays act in the causal form only."""
    if is_causal and log_decay is not None and log_decay.dim() == fk.dim():
        if log_decay.shape[-1] > 1:
            return _matrix_by_feature(fq, fk, log_decay)
        log_decay = log_decay.squeeze(-1)
    products = fq @ fk.mT
    if not is_causal:
        return products
    past = products.shape[-1] - products.shape[-2]
    if log_decay is not None:
        fade = log_decay.cumsum(-1)
        gap = fade[..., past:, None] - fade[..., None, :]
        future = ~masks.causal(*products.shape[-2:], device=products.device)
        products = products * torch.exp(gap.masked_fill(future, masks.NEVER))
    return products.tril(past)


def _matrix_by_feature(fq: Tensor, fk: Tensor, log_decay: Tensor) -> Tensor:
    """The causal weights where every feature fades at its own rate, a few rows at a time.

    Pairs within `TILE` tokens are written out feature by feature. Keys before them have been faded to where these rows
    begin, so that what is left is one matrix product.
    """
    n_queries, n = fq.shape[-2], fk.shape[-2]
    short = -n % TILE
    fq, fk, log_decay = (
        F.pad(x, (0, 0, before, short)) for x, before in ((fq, n - n_queries), (fk, 0), (log_decay, 0))
    )
    future = ~masks.causal(TILE, TILE, device=fk.device)[..., None]
    faded, rows, clean = fk[..., :0, :], [], is_clean(fk)
    for q, k, decay in zip(*(x.split(TILE, -2) for x in (fq, fk, log_decay)), strict=True):
        fade = decay.cumsum(-2)
        gap = (fade[..., :, None, :] - fade[..., None, :, :]).masked_fill(future, masks.NEVER)
        faded_keys = torch.exp(gap) * k[..., None, :, :]
        if not clean:
            faded_keys = faded_keys.masked_fill(future, 0.0)
        inside = (faded_keys @ q[..., None]).squeeze(-1)
        row = torch.cat([(q * torch.exp(fade)) @ faded.mT, inside], -1)
        rows.append(F.pad(row, (0, fk.shape[-2] - row.shape[-1])))
        faded = torch.cat([faded * torch.exp(fade[..., -1:, :]), k * torch.exp(_until_the_end(decay))], -2)
    return torch.cat(rows, -2)[..., n - n_queries : n, :n]


def absorb(fk: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """The state `(..., F, Dv)` after all these keys have been written, from `state` or nothing on, at O(N F Dv)."""
    if log_decay is None:
        written = fk.mT @ v
        return written if state is None else state + written
    log_decay = _column(log_decay, fk)
    written = (fk * torch.exp(_until_the_end(log_decay))).mT @ v
    return written if state is None else torch.exp(log_decay.sum(-2))[..., None] * state + written


def chunked(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, block: int) -> Tensor:
    """The causal output, from `state` on: matrices inside blocks, one state between them. O(N (block + F)) memory."""
    n = fq.shape[-2]
    if not n:
        return fq @ state
    block = min(block, n)
    size = max(SPAN // block, 1) * block
    decays = repeat(None) if log_decay is None else _column(log_decay, fk).split(size, -2)
    out = []
    for q, k, values, decay in zip(*(x.split(size, -2) for x in (fq, fk, v)), decays, strict=False):
        y, state = span(q, k, values, decay, state, block)
        out.append(y)
    return torch.cat(out, -2)


def span(
    fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """The output and the last state of a few blocks, worked on all at a time, from `state` or nothing on."""
    n = fq.shape[-2]
    decay = None if log_decay is None else _blocks(_column(log_decay, fk), block)
    fq, fk, v = (_blocks(x, block) for x in (fq, fk, v))
    out = causal.product(matrix(fq, fk, True, decay), v)
    before, state = _states(absorb(fk, v, decay), decay, state)
    if decay is not None:
        fq = fq * torch.exp(decay.cumsum(-2))
    return (out + fq @ before).flatten(-3, -2)[..., :n, :], state


def _blocks(x: Tensor, block: int) -> Tensor:
    """`(..., N, F)` as `(..., blocks, block, F)`, the last one filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def _states(written: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each block and that after the last, from what each block writes, `(..., blocks, F, Dv)`."""
    state = torch.zeros_like(written[..., 0, :, :]) if state is None else state
    kept = repeat(None) if decay is None else torch.exp(decay.sum(-2))[..., None].unbind(-3)
    before = []
    for new, keep in zip(written.unbind(-3), kept, strict=False):
        before.append(state)
        state = new + (state if keep is None else keep * state)
    return torch.stack(before, -3), state


def recurrent(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The causal output, from `state` on, one token after the other."""
    if not fq.shape[-2]:
        return fq @ state
    decays = repeat(None) if log_decay is None else _column(log_decay, fk).split(1, -2)
    out = []
    for q, k, values, decay in zip(*(x.split(1, -2) for x in (fq, fk, v)), decays, strict=False):
        state = write(state, k, values, decay)
        out.append(q @ state)
    return torch.cat(out, -2)


def write(state: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """One token: fade the state, then add `fk vᵀ`."""
    kept = state if log_decay is None else torch.exp(_column(log_decay, fk)).mT * state
    return kept + fk.mT * v


def _column(log_decay: Tensor, fk: Tensor) -> Tensor:
    """Log decays as `(..., N, 1 or F)`."""
    return log_decay if log_decay.dim() == fk.dim() else log_decay[..., None]


def _until_the_end(decay: Tensor) -> Tensor:
    """The fading of each key until after the last token: the sum of the log decays `(..., N, F)` behind it.

    Summed from the end, so that rounding is least where most is left.
    """
    behind = decay[..., 1:, :].flip(-2).cumsum(-2).flip(-2)
    return F.pad(behind, (0, 0, 0, min(decay.shape[-2], 1)))
