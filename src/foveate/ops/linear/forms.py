"""Three ways to compute decayed linear attention that agree: the whole matrix, chunk by chunk, token by token.

All are unnormalised: `out_i = sum_{j <= i} exp(G_i - G_j) (fq_i . fk_j) v_j` with `G` the running sum of the log
decays, or, as a recurrence, `S_i = exp(g_i) S_{i-1} + fk_i v_iᵀ` and `out_i = S_iᵀ fq_i`. A token's own decay acts on
the state before its key is written. Features are `(..., N, F)`, values `(..., N, Dv)`, log decays `(..., N)` or None.

Every factor is the exponential of a sum of log decays, which is at most 0: nothing is divided by a decay that has
underflowed, and nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks


def matrix(fq: Tensor, fk: Tensor, causal: bool, log_decay: Tensor | None) -> Tensor:
    """The weights `(..., Nq, Nk)` themselves: O(Nq Nk) time and memory. Decays act in the causal form only."""
    products = fq @ fk.mT
    if not causal:
        return products
    n_queries, n_keys = products.shape[-2:]
    future = ~masks.causal(n_queries, n_keys, device=products.device)
    if log_decay is not None:
        fade = log_decay.cumsum(-1)
        gap = fade[..., n_keys - n_queries :, None] - fade[..., None, :]
        products = products * torch.exp(gap.masked_fill(future, masks.NEVER))
    return products.masked_fill(future, 0.0)


def absorb(fk: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """The state `(..., F, Dv)` after all these keys have been written, at O(N F Dv)."""
    if log_decay is None:
        written = fk.mT @ v
        return written if state is None else state + written
    fade = log_decay.cumsum(-1)
    last = fade[..., -1:] if fade.shape[-1] else fade.new_zeros(*fade.shape[:-1], 1)
    written = (fk * torch.exp(last - fade)[..., None]).mT @ v
    return written if state is None else torch.exp(last)[..., None] * state + written


def chunked(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, block: int) -> Tensor:
    """The causal output, from `state` on: matrices inside blocks, one state between them. O(N (block + F)) memory."""
    n = fq.shape[-2]
    block = max(1, min(block, n))
    count = max(1, -(-n // block))
    fq, fk, v = (F.pad(x, (0, 0, 0, count * block - n)).unflatten(-2, (count, block)) for x in (fq, fk, v))
    if log_decay is not None:
        log_decay = F.pad(log_decay, (0, count * block - n)).unflatten(-1, (count, block))
    out = matrix(fq, fk, True, log_decay) @ v
    if log_decay is not None:
        fq = fq * torch.exp(log_decay.cumsum(-1))[..., None]
    out = out + fq @ _states(absorb(fk, v, log_decay), log_decay, state)
    return out.flatten(-3, -2)[..., :n, :]


def _states(written: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The state before each block, from what each block writes: both `(..., blocks, F, Dv)`."""
    fade = None if log_decay is None else torch.exp(log_decay.sum(-1))[..., None, None]
    before = []
    for index in range(written.shape[-3]):
        before.append(state)
        kept = state if fade is None else fade[..., index, :, :] * state
        state = kept + written[..., index, :, :]
    return torch.stack(before, -3)


def recurrent(fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The causal output, from `state` on, one token after the other."""
    out = []
    for index in range(fq.shape[-2]):
        at = slice(index, index + 1)
        state = write(state, fk[..., at, :], v[..., at, :], None if log_decay is None else log_decay[..., at])
        out.append(fq[..., at, :] @ state)
    return torch.cat(out, -2) if out else fq @ state


def write(state: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """One token: fade the state, then add `fk vᵀ`."""
    kept = state if log_decay is None else torch.exp(log_decay)[..., None] * state
    return kept + fk.mT * v
