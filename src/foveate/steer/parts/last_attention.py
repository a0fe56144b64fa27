"""The attention of the last token of a prompt, from one row of weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile


def last_attention(site: Site) -> Float[Tensor, "b n"]:
    """Return the weights of each sequence's last token, averaged over heads, by position in the sequence.

    Padding and drafts of assisted decoding are not counted as last. The call must hold its keys in the order of the
    sequence, as it does while a prompt is read; keys behind a window get 0.
    """
    last, n = _last_rows(site), site.q.shape[2]
    whole = torch.zeros(site.q.shape[0], site.seen, dtype=torch.float32, device=site.q.device)
    rows = [n - 1 - site.tentative] if last is None else last.unique().tolist()
    for row in rows:
        tile = weight_tile(site, slice(row, row + 1))
        found = tile.weights[:, :, 0].mean(1)
        whole = whole.to(found.dtype)
        places = site.positions[:, 0, tile.keys].clamp(0, site.seen - 1).long()
        spread = torch.zeros_like(whole).scatter_add(1, places, found)
        whole = spread if last is None else torch.where((last == row)[:, None], spread, whole)
    return whole


def _last_rows(site: Site) -> Tensor | None:
    """Return each sequence's last query that is a token; None if it is the last one, without drafts, of all."""
    real = site.real_queries
    if real is None or site.tentative:
        return None
    return real.shape[1] - 1 - real.flip(-1).to(torch.uint8).argmax(-1)
