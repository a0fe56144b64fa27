"""Merging partial softmax attentions by their running maximum and sum.

A partial result `(top, total, out)` stands for some of the keys: `top` is the largest logit, `total` the sum of
`exp(logit - top)`, `out` the values weighted by the same. Two partial results over disjoint keys merge into that of
their union; the operation is associative and commutative, which is what tiling, rings and trees of devices rely on.
Half precision is summed in float32: bfloat16 itself stops counting at 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    top: Tensor  # (..., Nq, 1)
    total: Tensor  # (..., Nq, 1)
    out: Tensor  # (..., Nq, Dv), not yet divided by `total`


def partial(logits: Tensor, values: Tensor, *, spend: bool = False) -> Partial:
    """The partial result of a tile: `logits (..., Nq, n)` with -inf for forbidden pairs, `values (..., n, Dv)`.

    `spend`: the logits are nobody else's, and their memory may be written over.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = logits.detach().amax(-1, keepdim=True)
    base = top.masked_fill(top == float("-inf"), 0.0)
    powers = (logits.sub_(base) if spend else logits - base).exp_()
    out = (powers.to(values.dtype) @ values).to(logits.dtype)
    return Partial(top, powers.sum(-1, keepdim=True), out)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial result of both sets of keys."""
    top = torch.maximum(a.top, b.top)
    finite = top.masked_fill(top == float("-inf"), 0.0)
    left, right = torch.exp(a.top - finite), torch.exp(b.top - finite)
    return Partial(top, a.total * left + b.total * right, a.out * left + b.out * right)


def finish(part: Partial) -> Tensor:
    """The attention output; rows that saw nothing are zeros."""
    return torch.where(part.total > 0, part.out / part.total.clamp_min(torch.finfo(part.total.dtype).tiny), 0.0)


def log_sum_exp(part: Partial) -> Tensor:
    """`(..., Nq)` log of the sum of exponentiated logits; -inf for rows that saw nothing."""
    return (part.top + torch.log(part.total)).squeeze(-1)
