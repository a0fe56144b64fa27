"""Subsampled attention: each call reads a random part of the keys, drawn anew for every call.

The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles (2023), arXiv 2306.01705.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import engines, masks, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import safe_softmax

Mode = Literal["unbiased", "local"]


def subsampled_attention(
    q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b hkv n d"], v: Float[Tensor, "b hkv n dv"], keep: float = 0.25,
    mode: Mode = "unbiased", causal: bool = False, generator: torch.Generator | None = None, *, sigma: float = 0.5,
    mask: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
) -> Float[Tensor, "b hq n dv"]:  # fmt: skip
    """Return softmax attention to a random part of the keys. It is a network of its own, and not an estimate.

    "unbiased" draws `keep N` tokens for each sequence, all equally likely; every query sees these and itself. "local"
    shifts each token's position by up to `sigma N` either way, cuts the tokens in the new order into windows of `keep
    N`, and lets each see its window, so that near keys are likelier. All heads share the draw. The softmax is over the
    keys that are seen, without another factor. Cost and memory O(keep N² D). With `keep=1` it is full attention; with
    `sigma=0` "local" is attention inside windows, and the larger sigma is, the closer windows are to random groups.

    Args:
        q, k, v, mask, causal, scale: as for every operator, for self-attention. Masks and causality go by the tokens'
            own positions.
        keep: share of the tokens, over 0 and up to 1; at least one token.
        mode: the law of the draw.
        generator: draws; needed unless nothing is random.
        sigma: largest shift of a position, as a share of N. Only for "local".
        dropout: share of the remaining weights that is dropped.

    The authors' repository holds no code. Reconstructed are: the draw for each sequence, which all heads share (as in
    the first author's later TGT), the uniform shifts, and that a query sees itself in "unbiased".
    """
    validate.tensors(q, k, v, mask, causal)
    check_options(keep, mode, sigma)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"q and k must be of the same tokens; got Nq={q.shape[2]}, Nk={k.shape[2]}")
    if generator is None and keep < 1 and not (mode == "local" and sigma == 0):
        raise OptionError("generator must be a torch.Generator: tokens are drawn")
    n, mask = q.shape[2], masks.hide_lowest(mask)
    k, v = masks.without_hidden(k, mask), masks.without_hidden(v, mask)
    call = AttentionCall(q, k, v, validate.scale(scale, q.shape[-1]), mask, causal, dropout=dropout)
    size = max(1, round(keep * n))
    if size >= n:
        return engines.run(call)
    return _subset(call, size, generator) if mode == "unbiased" else _windows(call, size, sigma, generator)


def check_options(keep: float, mode: str, sigma: float) -> None:
    """Refuse options out of range, by name."""
    validate.between("keep", keep, 0, 1)
    if keep == 0:
        raise OptionError(f"keep={shown(keep)} must be over 0")
    validate.one_of("mode", mode, ("unbiased", "local"))
    validate.at_least("sigma", sigma, 0)


def _subset(call: AttentionCall, size: int, generator: torch.Generator | None) -> Tensor:
    """Attend to the same drawn keys with all queries, and with each to itself."""
    q, at = call.q, torch.arange(call.n_queries, device=call.q.device)
    chosen = _random(q, generator).argsort(-1)[:, :size]
    k, v = call.grouped(call.k), call.grouped(call.v)
    few_k, few_v = (x.gather(2, chosen[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    logits = torch.cat([q @ few_k.mT, (q * k).sum(-1, keepdim=True)], -1) * call.scale
    past = chosen[:, None] < at[:, None] if call.causal else chosen[:, None] != at[:, None]
    seen = masks.combine(F.pad(past, (0, 1), value=True)[:, None], _columns(call.mask, chosen, at))
    assert seen is not None
    logits = logits + seen if seen.dtype != torch.bool else logits
    weights = F.dropout(safe_softmax(logits.masked_fill(~masks.allowed(seen), masks.NEG_INF)), call.dropout)
    return weights[..., :-1] @ few_v + weights[..., -1:] * v


def _columns(mask: Tensor | None, chosen: Int[Tensor, "b m"], at: Tensor) -> Tensor | None:
    """Return a mask at the drawn keys and, in a last column, at each query's own key."""
    if mask is None:
        return None
    whole = _whole(mask, len(chosen), len(at))
    index = chosen[:, None, None].expand(*whole.shape[:3], -1)
    return torch.cat([whole.gather(3, index), whole.diagonal(dim1=2, dim2=3)[..., None]], -1)


def _windows(call: AttentionCall, size: int, sigma: float, generator: torch.Generator | None) -> Tensor:
    """Attend inside windows of tokens in a shuffled order."""
    b, h, n, _ = call.q.shape
    places = torch.arange(n, device=call.q.device).expand(b, -1)
    if sigma:
        places = places + sigma * n * (2 * _random(call.q, generator) - 1)
    order = places.argsort(dim=-1, stable=True)
    count = -(-n // size)
    slots = F.pad(order, (0, count * size - n))

    def cut(x: Tensor) -> Tensor:
        taken = x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return taken.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)

    inside = slots.unflatten(1, (count, size)).flatten(0, 1)
    real = (torch.arange(count * size, device=order.device) < n).unflatten(0, (count, size)).repeat(b, 1)
    seen = _seen(call, inside, real, count)
    few = AttentionCall(cut(call.q), cut(call.k), cut(call.v), call.scale, seen, dropout=call.dropout)
    out = engines.run(few).unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)[:, :, :n]
    return out.gather(2, order.argsort(-1)[:, None, :, None].expand(-1, h, -1, out.shape[3]))


def _seen(call: AttentionCall, inside: Int[Tensor, "w m"], real: Bool[Tensor, "w m"], count: int) -> Tensor | None:
    """Return the mask of windows, from the tokens in them and the slots that hold one."""
    rows, columns = inside[:, None, :, None], inside[:, None, None]
    past = columns <= rows if call.causal else None
    mine = None
    if call.mask is not None:
        whole = _whole(call.mask, len(inside) // count, call.n_queries)
        batch = torch.arange(len(inside), device=inside.device)[:, None, None, None] // count
        mine = whole[batch, torch.arange(whole.shape[1], device=inside.device)[:, None, None], rows, columns]
    return masks.combine(real[:, None, None], past, mine)


def _whole(mask: Tensor, batch: int, n: int) -> Float[Tensor, "b h n n"] | Bool[Tensor, "b h n n"]:
    """Return a view of a broadcastable mask with all sequences, queries and keys."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.expand(batch, -1, n, n)


def _random(q: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b n"]:
    """Return a number in 0..1 for each token of each sequence."""
    assert generator is not None
    return torch.rand(q.shape[0], q.shape[2], generator=generator, device=generator.device).to(q.device)
