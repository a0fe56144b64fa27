"""Sparse attention by gathering: copy the chosen keys of a few block rows together, and attend to those alone.

Cost and memory grow with the number of chosen keys. The engine processes block rows in slabs of bounded size, or those
of one head at a time where heads choose on their own (`tiles`). It needs no compiler and has a backward pass on every
device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines import boxes, fused, tiles
from foveate.core.engines.work import RULE, Work
from foveate.core.neighborhoods import Neighborhoods
from foveate.core.readable import known
from foveate.core.selection import Blocks, Indices

#: Elements of gathered keys that one slab may hold: small enough for a cache, large enough to amortise the calls.
SLAB = 1 << 22
#: The same for tiles of a grid: many queries share their keys, so that small slabs cost no time, and hold less memory.
TILE_SLAB = 1 << 18


def refuses(call: AttentionCall) -> str | None:
    if not call.is_plain:
        return "gather computes softmax over dot products only"
    if call.selection is None:
        return "gather needs a selection"
    if call.dropout:
        return "gather does not drop weights"
    return None


def work(call: AttentionCall) -> Work | None:
    """Return the work of a call; None for the cells of a grid, which come in boxes."""
    selection = call.selection
    if not isinstance(selection, Blocks | Indices):
        return None
    if tiles.fits(call):
        return tiles.work(call)
    has_rule = isinstance(selection, Blocks) and selection.rule is not None
    if call.causal and isinstance(selection, Blocks):
        selection = selection.without_future
    (b, hq, _, d), dv, tall = call.q.shape, call.v.shape[3], _tall(selection)
    slabs = list(_slabs(call, selection))
    if isinstance(selection, Blocks):
        widths, chosen = selection.blocks.sum(-1).amax((0, 1)).tolist(), selection.blocks
        read = selection.size[1] * sum((s.stop - s.start) * max(1, *widths[s]) for s in slabs)
    else:
        chosen = selection.indices
        read = chosen.shape[2] * chosen.shape[3]
    numbers, is_shared = b * hq * read * (d + dv), chosen.shape[:2] == (1, 1)
    return Work(
        calls=len(slabs),
        products=tall * numbers,
        copied=numbers if is_shared else 0,
        indexed=0 if is_shared else numbers,
        masked=chosen.shape[:2].numel() * read * tall * (RULE if has_rule else 1),
        planned=b * hq * chosen.shape[2],
    )


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    selection = call.selection
    assert isinstance(selection, Blocks | Indices | Neighborhoods)
    if isinstance(selection, Neighborhoods):
        return boxes.attend(call, selection) if boxes.fits(call) else _in_tiles(call, selection)
    if isinstance(selection, Indices) and _is_one_list(call, selection.own or selection):
        return _one_list(call, selection.own or selection)
    if tiles.fits(call):
        return tiles.attend(call)
    if call.causal and isinstance(selection, Blocks):
        selection = selection.causal()
    out = [_slab(call, call.q, selection, rows) for rows in _slabs(call, selection)]
    return torch.cat(out, 2)[:, :, : call.n_queries]


def _in_tiles(call: AttentionCall, selection: Neighborhoods) -> Tensor:
    """Compute the tiles of a grid, with the queries in their order."""
    q = call.q[:, :, selection.order.clamp_min(0)]
    out = torch.cat([_slab(call, q, selection, rows) for rows in _slabs(call, selection)], 2)
    return out[:, :, selection.places]


def _is_one_list(call: AttentionCall, chosen: Indices) -> bool:
    """Return True if all queries share one list of keys for each key/value head, as in decoding."""
    heads, rows = chosen.indices.shape[1:3]
    plain = call.mask is None or call.mask.dim() < 4 or call.mask.shape[1] == 1
    return plain and rows == 1 and heads in (1, call.k.shape[1]) and call.n_queries <= fused.FEW


def _one_list(call: AttentionCall, chosen: Indices) -> Tensor:
    """Copy each key/value head's keys once, and attend to them with all its query heads."""
    index, seen = chosen.gathered(slice(None))
    b, heads = call.k.shape[:2]
    rows, mask = index[:, :, 0].expand(b, heads, -1), None
    if chosen.valid is not None or call.mask is not None or (call.causal and call.n_queries > 1):
        mask = _mask(call, index, seen[..., : call.n_queries, :], 0)[:, :, 0]
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(call.groups, 1)
    k, v = taken(rows, call.k, call.v)
    return fused.attend(AttentionCall(call.q, k, v, call.scale, mask))


def taken(index: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return rows `index (B, H, n)` of tensors `(B, H, N, D)`.

    Rows that are contiguous in memory are copied whole, which is much faster than indexing.
    """
    b, h, _ = index.shape
    found: dict[tuple[int, ...], Tensor] = {}
    out = []
    for x in tensors:
        d, steps = x.shape[3], x.stride()[:3]
        if (torch.is_grad_enabled() and x.requires_grad) or x.stride(3) != 1 or any(step % d for step in steps):
            batch, head = torch.arange(b, device=x.device)[:, None, None], torch.arange(h, device=x.device)[:, None]
            out.append(x[batch, head, index])
            continue
        steps = tuple(step // d for step in steps)
        if steps not in found:
            found[steps] = _rows(index, *steps)
        last = sum(step * (size - 1) for step, size in zip(steps, x.shape, strict=False))
        out.append(x.as_strided((last + 1, d), (d, 1)).index_select(0, found[steps]).view(b, h, -1, d))
    return out


def _rows(index: Tensor, batch: int, head: int, row: int) -> Tensor:
    """Turn token numbers into rows of memory, given the distances in rows between sequences, heads and tokens."""
    b, h, _ = index.shape
    index = index if row == 1 else index * row
    if h > 1:
        index = index + (torch.arange(h, device=index.device) * head)[:, None]
    if b > 1:
        index = index + (torch.arange(b, device=index.device) * batch)[:, None, None]
    return index.flatten()


def _slabs(call: AttentionCall, selection: Blocks | Indices | Neighborhoods) -> Iterator[slice]:
    room = SLAB
    if isinstance(selection, Neighborhoods):
        n_rows, widest, room = selection.n_rows, selection.widest, TILE_SLAB
    elif isinstance(selection, Blocks):
        n_rows, widest = selection.blocks.shape[2], int(selection.blocks.sum(-1).max()) * selection.size[1]
    else:
        n_rows, widest = selection.indices.shape[2], selection.indices.shape[3]
    b, hq, _, d = call.q.shape
    step = max(1, room // max(1, b * hq * widest * d))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _slab(call: AttentionCall, q: Tensor, selection: Blocks | Indices | Neighborhoods, rows: slice) -> Tensor:
    """Compute some block rows, side by side in the batch: `(B, Hq, queries, Dv)`. `q` has the order of the rows."""
    b, nq = q.shape[0], q.shape[2]
    tall = _tall(selection)
    index, seen = selection.gathered(rows)
    count, first, last = index.shape[2], rows.start * tall, min(rows.stop * tall, nq)
    if count == 1:
        tall = last - first  # a single query, when decoding
    queries = F.pad(q[:, :, first:last], (0, 0, 0, count * tall - (last - first)))
    queries = queries.unflatten(2, (count, tall)).transpose(1, 2).flatten(0, 1)
    k, v = _take(call, call.k, index), _take(call, call.v, index)
    bias = _mask(call, index, seen[..., :tall, :], first).transpose(1, 2)  # one for all heads where that is so
    bias = bias.expand(b, *bias.shape[1:]).flatten(0, 1)
    out = F.scaled_dot_product_attention(queries, k, v, bias, scale=call.scale)
    sees = masks.allowed(bias).any(-1, keepdim=True)
    if not known(sees.all()):
        out = torch.where(sees, out, 0.0)
    return out.unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)


def _tall(selection: Blocks | Indices | Neighborhoods) -> int:
    """Return the queries of a row."""
    if isinstance(selection, Neighborhoods):
        return selection.tall
    return selection.size[0] if isinstance(selection, Blocks) else selection.group


def _take(call: AttentionCall, x: Tensor, index: Tensor) -> Tensor:
    """Gather `x (B, Hkv, Nk, D)` at `index (B or 1, Hq or 1, R, n)` into `(B * R, Hq, n, D)`."""
    b, hq = call.q.shape[:2]
    if index.shape[:2] == (1, 1):
        taken = call.grouped(x.index_select(2, index[0, 0].flatten()))
        return taken.unflatten(2, index.shape[2:]).transpose(1, 2).flatten(0, 1)
    batch = torch.arange(b, device=x.device)[:, None, None, None]
    head = torch.arange(hq, device=x.device)[:, None] // call.groups
    return x[batch, head, index.transpose(1, 2).expand(b, -1, hq, -1)].flatten(0, 1)


def _mask(call: AttentionCall, index: Tensor, seen: Tensor, first: int) -> Tensor:
    """Combine selection, causality and the caller's mask on the gathered keys: `(B or 1, Hq or 1, R, tall, n)`."""
    shift, (count, tall) = call.n_keys - call.n_queries, seen.shape[2:4]
    query = torch.arange(first, first + count * tall, device=index.device).reshape(count, tall, 1)
    index = index[..., None, :]
    if call.causal and isinstance(call.selection, Indices):
        seen = seen & (index <= query + shift)
    if call.mask is None:
        return seen
    if isinstance(call.selection, Neighborhoods):
        query = call.selection.order[query]
    mask = call.mask.reshape((1,) * (4 - call.mask.dim()) + call.mask.shape)
    batch, head = (torch.arange(n, device=index.device) for n in mask.shape[:2])
    key = index if mask.shape[3] > 1 else torch.zeros_like(index)
    mine = mask[batch[:, None, None, None, None], head[:, None, None, None], query.clamp_max(mask.shape[2] - 1), key]
    both = masks.combine(mine, seen)
    assert both is not None  # there are two
    return both
