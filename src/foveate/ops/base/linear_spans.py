"""The chunked form of linear operators, where a token's features hang on that token alone: a span of tokens at a time.

Features are wider than the tokens they are made of, often several times. So they are made where they are used, and
what is made on the way still lies in the cache of a processor when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.ops.functional import linear_forms as forms
from foveate.ops.functional.heads import accumulating

#: Rows of features, of all heads and sequences, in a span on a CPU: one or two megabytes, which stay in its cache.
#: A GPU would rather have few large products.
ROWS = 2048
#: One span: keys and values `(B, Hkv, n, ·)`, and which of them are there, `(B, 1, 1, n)` or None.
Keys = tuple[Tensor, Tensor, Tensor | None]


class Encoder(Protocol):
    """What is asked of a linear operator; see `foveate.ops.Linear`."""

    block: int

    def encode_queries(self, q: Tensor, scale: float, inputs: Mapping[str, Tensor]) -> Tensor: ...
    def encoded_keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def normalise(self, out: Tensor) -> Tensor: ...


def attend(op: Encoder, call: AttentionCall, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output `(B, Hq, Nq, Dv)` of a call, and the state `(B, Hq, F, E)` after all of its keys.

    Args:
        op: the operator.
        call: without `inputs`.
        state: the state before the first key; None for nothing.
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
        state = forms.absorb(*encoded(keys), state)
    if not one_by_one:
        assert state is not None
        return read(op, q, state, call.scale), state
    out = []
    for part, keys in zip(q.split(size, 2), _spans(own, size), strict=True):
        fq = op.encode_queries(part.to(accumulating(q.dtype)), call.scale, {})
        y, state = forms.span(fq, *encoded(keys), state, min(op.block, n))
        out.append(op.normalise(y).to(q.dtype))
    assert state is not None
    return torch.cat(out, 2), state


def read(op: Encoder, q: Tensor, state: Tensor, scale: float) -> Tensor:
    """Read one state `(B, Hq, F, E)` with all queries `(B, Hq, Nq, D)`; their call brings no inputs."""
    wide, out = accumulating(q.dtype), []
    for part in q.split(_size(q, op.block), 2):
        fq = op.encode_queries(part.to(wide), scale, {})
        out.append(op.normalise(fq @ state).to(q.dtype))
    return torch.cat(out, 2)


def _size(q: Tensor, block: int) -> int:
    """Tokens in a span, a multiple of `block`."""
    rows = max(q.shape[0] * q.shape[1], 1)
    tokens = min(forms.SPAN, ROWS // rows) if q.device.type == "cpu" else forms.SPAN
    return max(tokens // block, 1) * block


def _cut(call: AttentionCall, past: int) -> tuple[Keys, Keys]:
    """The first `past` keys, and the others."""
    k, v, mask = call.k, call.v, call.mask
    seen = None if mask is None else masks.keys_of(mask, k.shape[0], k.shape[2])[:, None, None]
    if not past:  # a cut would give back a gradient as large as the whole, filled up with zeros
        return (k[:, :, :0], v[:, :, :0], None), (k, v, seen)
    (old_k, k), (old_v, v) = (x.tensor_split([past], 2) for x in (k, v))
    old_seen, seen = (None, None) if seen is None else seen.tensor_split([past], 3)
    return (old_k, old_v, old_seen), (k, v, seen)


def _spans(keys: Keys, size: int) -> Iterable[Keys]:
    """Cut keys into spans; at least one, which may be empty: its features still tell how large the state is."""
    k, v, seen = keys
    parts = k.split(size, 2)
    return zip(parts, v.split(size, 2), [None] * len(parts) if seen is None else seen.split(size, 3), strict=True)
