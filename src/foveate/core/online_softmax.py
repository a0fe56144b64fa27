"""Merge partial softmax attentions by their running maximum and sum.

A partial result `(top, total, out)` covers some of the keys: `top` is the largest logit, `total` the sum of
`exp(logit - top)`, `out` the values weighted by the same. Two partial results over disjoint keys merge into that of
their union. The merge is associative and commutative; tiling, rings and trees of devices rely on this. Half precision
is summed in float32, since bfloat16 itself stops counting at 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    top: Tensor  # (..., Nq, 1)
    total: Tensor  # (..., Nq, 1)
    out: Tensor  # (..., Nq, Dv), not yet divided by `total`


def partial(logits: Tensor, values: Tensor, *, inplace: bool = False) -> Partial:
    """Return the partial result of a tile: `logits (..., Nq, n)` with -inf for forbidden pairs, `values (..., n, Dv)`.

    `inplace`: overwrite the memory of the logits, which nobody else uses.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = logits.detach().amax(-1, keepdim=True)
    base = top.masked_fill(top == float("-inf"), 0.0)
    powers = (logits.sub_(base) if inplace else logits - base).exp_()
    out = (powers.to(values.dtype) @ values).to(logits.dtype)
    return Partial(top, powers.sum(-1, keepdim=True), out)


def merge(a: Partial, b: Partial) -> Partial:
    """Return the partial result of both sets of keys."""
    top = torch.maximum(a.top, b.top)
    finite = top.masked_fill(top == float("-inf"), 0.0)
    left, right = torch.exp(a.top - finite), torch.exp(b.top - finite)
    return Partial(top, a.total * left + b.total * right, a.out * left + b.out * right)


def finish(part: Partial) -> Tensor:
    """Return the attention output; rows that saw nothing are zeros."""
    return torch.where(part.total > 0, part.out / part.total.clamp_min(torch.finfo(part.total.dtype).tiny), 0.0)


def log_sum_exp(part: Partial) -> Tensor:
    """Return `(..., Nq)`, the log of the sum of exponentiated logits; -inf for rows that saw nothing."""
    return (part.top + torch.log(part.total)).squeeze(-1)
