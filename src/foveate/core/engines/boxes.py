"""Attention on a grid, a box of queries and a box of keys at a time: the gathering engine's way for neighbourhoods.

A box is a view of the grid, so that no list of keys is made. A slice for each box would return a gradient as large as
the grid, so that calls with gradients, and those with a mask of their own, gather by lists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.neighborhoods import Neighborhoods


def fits(call: AttentionCall) -> bool:
    """Return whether boxes can compute a call."""
    return call.mask is None and not call.wants_grad and not torch.compiler.is_compiling()


def attend(call: AttentionCall, selection: Neighborhoods) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    q, k, v = (x.unflatten(2, selection.grid) for x in (call.q, call.k, call.v))
    out = call.no_output.unflatten(2, selection.grid)
    biases: dict[int, Tensor] = {}
    for queries, keys, seen in selection.boxes():
        mine, theirs = _cut(queries), _cut(keys)
        here = q[mine]
        bias = None
        if seen is not None:
            if id(seen) not in biases:
                biases[id(seen)] = masks.as_bias(seen[None, None], q.dtype)
            bias = biases[id(seen)]
        rows, read, values = (x.flatten(2, -2) for x in (here, k[theirs], v[theirs]))
        y = F.scaled_dot_product_attention(rows, read, values, bias, scale=call.scale, enable_gqa=call.groups > 1)
        out[mine] = y.unflatten(2, here.shape[2:-1])
    return out.flatten(2, -2)


def _cut(ranges: tuple[range, ...]) -> tuple[slice, ...]:
    """Return the index of a box."""
    return slice(None), slice(None), *(slice(each.start, each.stop, each.step) for each in ranges)
