"""One key for each finished chunk of tokens and each query head, made from the chunk's own attention, as text comes in.

The notes of a layer hold the keys of finished chunks and the queries of the chunk that is being filled.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.host.site import Site
from foveate.kv.parts.own_places import Places
from foveate.kv.renumbered import Rotation


def chunk_keys(
    q: Float[Tensor, "b hq c w d"],
    k: Float[Tensor, "b hkv c w d"],
    v: Float[Tensor, "b hkv c w d"],
    local: Float[Tensor, "b hkv c w d"],
    scale: float,
) -> Float[Tensor, "b hq c d"]:
    """Return the key of each chunk.

    The chunk attends to itself in both directions; the mean of the outputs is a query over the chunk's keys, and the
    result is the mean of these keys by its weights.

    Args:
        q, k, v: of each chunk. Queries and keys have their rotary embedding, at any positions in sequence.
        local: the keys, rotated as if the chunk began at position 0.
        scale: of the logits.
    """
    b, hq, c, hkv = *q.shape[:3], k.shape[1]
    own_q, own_k, own_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    inside = F.scaled_dot_product_attention(own_q, own_k, own_v, scale=scale, enable_gqa=hq != hkv)
    value = inside.mean(2).unflatten(0, (b, c)).transpose(1, 2).unflatten(1, (hkv, -1))
    logits = (value[..., None, :] @ local[:, :, None].mT) * scale
    keys = logits.softmax(-1) @ local[:, :, None]
    return keys[..., 0, :].flatten(1, 2)


def add_chunks(
    notes: dict[str, Any], site: Site, places: Places, width: int, rotation: Rotation | None
) -> Float[Tensor, "b hq c d"]:
    """Add the chunks that the call finishes, and return the keys of all chunks.

    In a padded batch, chunks that a sequence has not finished hold numbers without a meaning.

    Raises:
        OptionError: the queries of the unfinished chunk were not seen.
    """
    _check_notes(notes, places, width)
    first, full = places.before // width, places.count // width
    new = places.total - places.past
    old = notes.get("queries", site.q[:, :, :0])
    if not places.is_padded:
        old = old[:, :, : places.past % width]  # the cache may have been cropped since
    every = torch.cat([F.pad(old, (0, 0, 0, width - old.shape[2])) if places.is_padded else old, site.q], 2)
    table = notes.get("chunks", site.q[:, :, :0])
    if not places.is_padded:
        begun, done = places.past // width, places.total // width
        if done > begun:
            span = slice(begun * width, done * width)
            made = _made(site, every[:, :, : span.stop - span.start], site.k[:, :, span], site.v[:, :, span],
                         places.before[:, None] * 0 + begun, width, rotation)  # fmt: skip
            table = torch.cat([table[:, :, :begun], made], 2)
        notes["queries"] = every[:, :, (done - begun) * width :].clone()
    else:
        most = (new + width - 1) // width
        if new >= width or bool((full > first).any()):  # the host waits for the device here
            number = first[:, None] + torch.arange(most, device=first.device)
            table = _scattered(table, _of_rows(site, every, places, number, width, rotation), number, places, width)
        own = (full * width)[:, None] + torch.arange(width, device=full.device)
        notes["queries"] = _queries(every, places, own, width)
    notes["chunks"], notes["length"] = table, places.total
    return table


def _check_notes(notes: dict[str, Any], places: Places, width: int) -> None:
    length = notes.get("length", 0)
    if places.past > length or (places.past < length and places.past // width < length // width):
        raise OptionError(
            f"longheads needs the queries of the text that a cache holds: apply it before the first token, and crop a "
            f"cache only within its last {width} tokens' chunk; {places.past} tokens were read, and it saw {length}"
        )


def _made(
    site: Site, q: Tensor, k: Tensor, v: Tensor, number: Tensor, width: int, rotation: Rotation | None
) -> Float[Tensor, "b hq c d"]:
    """Return the keys of chunks from their tokens in a row; `number (B, 1 or C)` is the number of the first or each."""
    count = k.shape[2] // width
    number = number if number.shape[1] == count else number + torch.arange(count, device=k.device)
    local = k
    if rotation is not None:
        by = (number * width).repeat_interleave(width, 1)[:, None].expand(-1, k.shape[1], -1)
        local = rotation(k, -by)
    q, k, v, local = (x.unflatten(2, (count, width)) for x in (q, k, v, local))
    return chunk_keys(q, k, v, local, site.scale)


def _of_rows(
    site: Site, every: Tensor, places: Places, number: Tensor, width: int, rotation: Rotation | None
) -> Float[Tensor, "b hq c d"]:
    """Return the keys of each sequence's own chunks."""
    own = (number[..., None] * width + torch.arange(width, device=number.device)).flatten(1)
    index = places.at(own)[:, None, :, None]
    k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (site.k, site.v))
    return _made(site, _queries(every, places, own, width), k, v, number, width, rotation)


def _queries(every: Tensor, places: Places, own: Tensor, width: int) -> Float[Tensor, "b hq n d"]:
    """Return queries by their numbers in their own sequence, of the unfinished chunk and the call's."""
    first = (places.before // width * width)[:, None]
    index = torch.where(own < places.before[:, None], own - first, width + places.at(own) - places.past)
    index = index.clamp(0, every.shape[2] - 1)[:, None, :, None]
    return every.gather(2, index.expand(-1, every.shape[1], -1, every.shape[3]))


def _scattered(table: Tensor, made: Tensor, number: Tensor, places: Places, width: int) -> Float[Tensor, "b hq c d"]:
    """Write each sequence's new chunks into the table of all, which is copied."""
    room = places.total // width + made.shape[2] + 1
    table = F.pad(table, (0, 0, 0, max(0, room - table.shape[2])))
    index = number[:, None, :, None].expand_as(made)
    return table.scatter(2, index, made)[:, :, : places.total // width]
