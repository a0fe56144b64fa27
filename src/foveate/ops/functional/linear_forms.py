"""Three equivalent ways to compute decayed linear attention: the whole matrix, chunk by chunk, token by token.

All are unnormalized: `out_i = sum_{j <= i} sum_f fq_if exp(G_if - G_jf) fk_jf v_j` with `G` the running sum of the log
decays, or, as a recurrence, `S_i = exp(g_i) S_{i-1} + fk_i v_iᵀ` and `out_i = S_iᵀ fq_i`. A token's own decay acts on
the state before its key is written. Features are `(..., N, F)`, values `(..., N, Dv)`, log decays `(..., N)` if all
features share them, `(..., N, F)` if not, or None.

Every factor is the exponential of a sum of log decays, which is at most 0. So nothing overflows, and no decay that has
underflowed is a divisor.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.readable import is_clean
from foveate.ops.functional.causal import causal_product

#: Tokens whose pairs are computed feature by feature, if each feature has its own decay.
TILE = 8
#: Tokens that are processed at a time, so that intermediate results stay in the processor's cache.
SPAN = 1024


def matrix(fq: Tensor, fk: Tensor, is_causal: bool, log_decay: Tensor | None) -> Tensor:
    """Return the weights `(..., Nq, Nk)`, in O(Nq Nk) time and memory. Decays act in the causal form only."""
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
        products = products * torch.exp(gap.masked_fill(future, masks.NEG_INF))
    return products.tril(past)


def _matrix_by_feature(fq: Tensor, fk: Tensor, log_decay: Tensor) -> Tensor:
    """Return the causal weights for a decay per feature, computed a few rows at a time.

    Pairs within `TILE` tokens are computed feature by feature. Earlier keys are decayed up to the first of these rows,
    so that the rest is one matrix product.
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
        gap = (fade[..., :, None, :] - fade[..., None, :, :]).masked_fill(future, masks.NEG_INF)
        faded_keys = torch.exp(gap) * k[..., None, :, :]
        if not clean:
            faded_keys = faded_keys.masked_fill(future, 0.0)
        inside = (faded_keys @ q[..., None]).squeeze(-1)
        row = torch.cat([(q * torch.exp(fade)) @ faded.mT, inside], -1)
        rows.append(F.pad(row, (0, fk.shape[-2] - row.shape[-1])))
        faded = torch.cat([faded * torch.exp(fade[..., -1:, :]), k * torch.exp(_until_the_end(decay))], -2)
    return torch.cat(rows, -2)[..., n - n_queries : n, :n]


def absorb(fk: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """Return the state `(..., F, Dv)` after all keys, from `state` or zeros on, in O(N F Dv)."""
    if log_decay is None:
        written = fk.mT @ v
        return written if state is None else state + written
    log_decay = _column(log_decay, fk)
    written = (fk * torch.exp(_until_the_end(log_decay))).mT @ v
    return written if state is None else torch.exp(log_decay.sum(-2))[..., None] * state + written


def chunked(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, block: int) -> Tensor:
    """Return the causal output from `state` on: matrices inside blocks, one state between. O(N (block + F)) memory."""
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
    """Return the output and the last state of a few blocks, computed together, from `state` or zeros on."""
    n = fq.shape[-2]
    decay = None if log_decay is None else _blocks(_column(log_decay, fk), block)
    fq, fk, v = (_blocks(x, block) for x in (fq, fk, v))
    out = causal_product(matrix(fq, fk, True, decay), v)
    before, state = _states(absorb(fk, v, decay), decay, state)
    if decay is not None:
        fq = fq * torch.exp(decay.cumsum(-2))
    return (out + fq @ before).flatten(-3, -2)[..., :n, :], state


def _blocks(x: Tensor, block: int) -> Tensor:
    """Reshape `(..., N, F)` to `(..., blocks, block, F)`; zeros fill up the last block."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def _states(written: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before each block and after the last, from the blocks' own sums `(..., blocks, F, Dv)`."""
    state = torch.zeros_like(written[..., 0, :, :]) if state is None else state
    kept = repeat(None) if decay is None else torch.exp(decay.sum(-2))[..., None].unbind(-3)
    before = []
    for new, keep in zip(written.unbind(-3), kept, strict=False):
        before.append(state)
        state = new + (state if keep is None else keep * state)
    return torch.stack(before, -3), state


def recurrent(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """Return the causal output from `state` on, one token after the other."""
    if not fq.shape[-2]:
        return fq @ state
    decays = repeat(None) if log_decay is None else _column(log_decay, fk).split(1, -2)
    out = []
    for q, k, values, decay in zip(*(x.split(1, -2) for x in (fq, fk, v)), decays, strict=False):
        state = write(state, k, values, decay)
        out.append(q @ state)
    return torch.cat(out, -2)


def write(state: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Write one token: decay the state, then add `fk vᵀ`."""
    kept = state if log_decay is None else torch.exp(_column(log_decay, fk)).mT * state
    return kept + fk.mT * v


def _column(log_decay: Tensor, fk: Tensor) -> Tensor:
    """Reshape log decays to `(..., N, 1 or F)`."""
    return log_decay if log_decay.dim() == fk.dim() else log_decay[..., None]


def _until_the_end(decay: Tensor) -> Tensor:
    """Return the log decay of each key up to the last token: the sum of the later log decays `(..., N, F)`.

    The sum runs from the end, so that rounding is least for the keys that have decayed least.
    """
    behind = decay[..., 1:, :].flip(-2).cumsum(-2).flip(-2)
    return F.pad(behind, (0, 0, 0, min(decay.shape[-2], 1)))
