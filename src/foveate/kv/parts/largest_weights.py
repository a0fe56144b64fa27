"""The largest weight that any query of a call pays to each slot, over a key/value head's query heads.

The largest of many weights `exp(logit - d)` is the exponential of the largest `logit - d`, where `d` is the log of the
sum that a query's row is divided by. So the exponential is taken once for each slot, behind the maximum.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.core.masks import NEG_INF
from foveate.core.scoring import dot_product
from foveate.host.attention import soft_capped
from foveate.host.fused_statistics import has_kernel, statistics
from foveate.host.output_projection import projected_norms
from foveate.host.padding import tokens
from foveate.host.site import Site

#: The largest number of weights that are held at a time.
_TILE = 1 << 20


def can_use_kernel(site: Site) -> bool:
    """Return whether `of_whole_cache` is exact: nothing was dropped, no sequence is padded, and weights are plain."""
    plain = site.softcap is None and site.sinks is None and site.position_bias is None
    return plain and site.is_whole and not site.expanded and tokens(site) is None and has_kernel(site.q)


def of_whole_cache(site: Site, sink: int, part: slice, outputs: bool) -> Float[Tensor, "b hkv m"]:
    """Return the largest weights on the tokens of a part of the text; see `of_slots` for `outputs`.

    Queries see the first `sink` tokens, the part, and the call's own tokens up to themselves. Their sums come from the
    fused kernel.
    """
    past, heads = site.seen - site.q.shape[2], site.k.shape[1]
    q, k = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (site.q, site.k))
    before = slice(0, min(sink, part.start))
    seen = torch.cat([k[:, :, before], k[:, :, part], k[:, :, past:]], 2)
    divisors = statistics(q, seen, seen[..., :1], scale=site.scale, causal=True)[0][..., None]
    divisors = divisors + _log_norms(site, slice(None)) if outputs else divisors
    rows = torch.cat([q * site.scale, -divisors], -1)  # the divisor rides along as one more channel
    keys = torch.cat([k[:, :, part], k.new_ones(*k.shape[:2], part.stop - part.start, 1)], -1).mT[:, :, None]
    best = torch.full((*q.shape[:2], part.stop - part.start), NEG_INF, device=q.device, dtype=q.dtype)
    step = max(1, _TILE // (best.shape[0] * best.shape[1] * best.shape[2]))
    for some in rows.split(step, 2):
        found = some.unflatten(1, (heads, -1)) @ keys
        best = torch.maximum(best, found.amax(3).flatten(1, 2))
    weights = best.exp()
    if outputs:
        weights = weights * _sizes(site)[:, :, part]
    return weights.unflatten(1, (heads, -1)).amax(2).float()


def of_slots(
    site: Site, index: Int[Tensor, "b h m"], seen: Bool[Tensor, "b h m"], outputs: bool
) -> Float[Tensor, "b h m"]:
    """Return the largest weights on some slots of each head, which are all that its queries see.

    Args:
        site: the call.
        index: the slots.
        seen: which of them are seen.
        outputs: whether each weight is multiplied by the Euclidean norm of the token's value behind the output
            projection, and divided by the norm of the query's hidden state.
    """
    heads, groups = index.shape[1], site.q.shape[1] // index.shape[1]
    keys = site.k if site.k.shape[1] == heads else site.k.unflatten(1, (heads, -1)).flatten(1, 2)
    wide = index.repeat_interleave(keys.shape[1] // heads, 1)
    k = keys.gather(2, wide[..., None].expand(*wide.shape, keys.shape[-1]))
    at = site.positions.gather(2, index).masked_fill(~seen, torch.iinfo(torch.int32).max)
    at = at.repeat_interleave(groups, 1)[:, :, None]
    best = torch.full((*at.shape[:2], at.shape[3]), NEG_INF, device=at.device)
    step = max(1, _TILE // (site.q.shape[0] * site.q.shape[1] * index.shape[2]))
    for first in range(0, site.q.shape[2], step):
        rows = slice(first, min(first + step, site.q.shape[2]))
        q = site.q[:, :, rows].unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        logits = soft_capped(dot_product(q, k, site.scale).float(), site.softcap)
        logits = logits.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
        logits.masked_fill_(at > site.query_positions[rows, None], NEG_INF)
        logits.sub_(_log_divisors(site, logits, rows, outputs))
        best = torch.maximum(best, logits.amax(2))
    weights = best.exp()
    if outputs:
        weights = weights * _sizes(site).gather(2, index.repeat_interleave(groups, 1))
    return weights.unflatten(1, (heads, -1)).amax(2)


def _log_divisors(
    site: Site, logits: Float[Tensor, "b hq r m"], rows: slice, outputs: bool
) -> Float[Tensor, "b hq r 1"]:
    """Return the log of what a row's exponentials are divided by; inf for a row that counts for nothing."""
    found = logits.logsumexp(-1, keepdim=True)
    if site.sinks is not None:
        sinks = site.sinks[:, :, rows] if site.sinks.shape[2] > 1 else site.sinks
        found = torch.logaddexp(found, sinks.float().expand_as(found))
    found = found.masked_fill(found.isneginf(), torch.inf)
    if outputs:
        found = found + _log_norms(site, rows)
    if site.real_queries is not None:
        found = found.masked_fill(~site.real_queries[:, None, rows, None], torch.inf)
    return found


def _log_norms(site: Site, rows: slice) -> Float[Tensor, "b 1 r 1"]:
    return _hidden(site)[:, None, rows].float().norm(dim=-1, keepdim=True).clamp_min(1e-12).log()


def _sizes(site: Site) -> Float[Tensor, "b hq s"]:
    _hidden(site)
    return projected_norms(site, order=2)


def _hidden(site: Site) -> Tensor:
    if site.hidden is None:
        raise OptionError("KVzip+ needs the layers' hidden states, and this model's attention does not get them")
    return site.hidden
