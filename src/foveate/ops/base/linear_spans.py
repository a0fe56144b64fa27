"""The chunked form of linear operators whose features depend on one token alone: a span of tokens at a time.

Features are often several times wider than tokens. So each span's features are made just before they are used, and they
are still in the processor's cache when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.ops.functional import linear_forms
from foveate.ops.functional.heads import accumulating

#: Rows of features, over all heads and sequences, in a span on a CPU: one or two megabytes, which stay in its cache.
#: A GPU is faster with few large products.
ROWS = 2048
#: One span: keys and values `(B, Hkv, n, ·)`, and a mask of the real ones, `(B, 1, 1, n)` or None.
Keys = tuple[Tensor, Tensor, Tensor | None]


class Encoder(Protocol):
    """The part of a linear operator that this form needs; see `foveate.ops.Linear`."""

    block: int

    def encode_queries(self, q: Tensor, scale: float, inputs: Mapping[str, Tensor]) -> Tensor: ...
    def encoded_keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def normalize(self, out: Tensor) -> Tensor: ...


def attend(op: Encoder, call: AttentionCall, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output `(B, Hq, Nq, Dv)` of a call, and the state `(B, Hq, F, E)` after all of its keys.

    Args:
        op: the operator.
        call: without `inputs`.
        state: the state before the first key; None for an empty one.
    """
    q, n = call.q, call.n_queries
    size = _size(q, op.block)
    past = call.n_keys - n if call.causal else call.n_keys  # keys that every query sees
    old, own = _cut(call, past)
    one_by_one = call.causal and n > 0

    def encoded(keys: Keys) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, seen = keys
        return op.encoded_keys(replace(call, k=k, v=v, mask=seen))

    for keys in _spans(old, size) if past or not one_by_one else ():
        state = linear_forms.absorb(*encoded(keys), state)
    if not one_by_one:
        assert state is not None
        return read(op, q, state, call.scale), state
    out = []
    for part, keys in zip(q.split(size, 2), _spans(own, size), strict=True):
        fq = op.encode_queries(part.to(accumulating(q.dtype)), call.scale, {})
        y, state = linear_forms.span(fq, *encoded(keys), state, min(op.block, n))
        out.append(op.normalize(y).to(q.dtype))
    assert state is not None
    return torch.cat(out, 2), state


def read(op: Encoder, q: Tensor, state: Tensor, scale: float) -> Tensor:
    """Read one state `(B, Hq, F, E)` with all queries `(B, Hq, Nq, D)` of a call without inputs."""
    wide, out = accumulating(q.dtype), []
    for part in q.split(_size(q, op.block), 2):
        fq = op.encode_queries(part.to(wide), scale, {})
        out.append(op.normalize(fq @ state).to(q.dtype))
    return torch.cat(out, 2)


def _size(q: Tensor, block: int) -> int:
    """Return the tokens in a span, a multiple of `block`."""
    rows = max(q.shape[0] * q.shape[1], 1)
    tokens = min(linear_forms.SPAN, ROWS // rows) if q.device.type == "cpu" else linear_forms.SPAN
    return max(tokens // block, 1) * block


def _cut(call: AttentionCall, past: int) -> tuple[Keys, Keys]:
    """Split off the first `past` keys."""
    k, v, mask = call.k, call.v, call.mask
    seen = None if mask is None else masks.keys_of(mask, k.shape[0], k.shape[2])[:, None, None]
    if not past:  # a slice's gradient is as large as the whole tensor, filled up with zeros
        return (k[:, :, :0], v[:, :, :0], None), (k, v, seen)
    (old_k, k), (old_v, v) = (x.tensor_split([past], 2) for x in (k, v))
    old_seen, seen = (None, None) if seen is None else seen.tensor_split([past], 3)
    return (old_k, old_v, old_seen), (k, v, seen)


def _spans(keys: Keys, size: int) -> Iterable[Keys]:
    """Cut keys into spans, at least one; an empty one still gives the size of the state."""
    k, v, seen = keys
    parts = k.split(size, 2)
    return zip(parts, v.split(size, 2), [None] * len(parts) if seen is None else seen.split(size, 3), strict=True)
