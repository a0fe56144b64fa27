"""Several tokens in one decoding call: methods meet them one after another, as if each had come alone.

Assisted decoding and prompt lookup read a few drafted tokens at once and take back those that turn out wrong. Methods
that choose keys, or drop them, would give another text than without drafts if they saw such a call as a whole. So each
query goes to them by itself, with the keys up to its own, without what the methods would have dropped by then; and what
they remember goes back along with the tokens that are taken back. A method that folds what it drops into a summary is
the exception: the drafted queries see the tokens themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.host import attention
from foveate.host.evict import shown
from foveate.host.method import Method, overrides
from foveate.host.site import Site

_DRAFTED = "memories before each drafted token"


def run(site: Site, methods: list[Method], native: attention.Native) -> tuple[Tensor, float]:
    """`attention.run`, query by query where that makes a difference."""
    if site.cache is not None:
        _rewind(site)
    if site.q.shape[2] == 1 and not site.drafts:
        return attention.run(site, methods, native)
    dropping = [m for m in methods if site.drafts and overrides(m, "keep") and not overrides(m, "fold")]
    choosing = [m for m in methods if overrides(m, "select") or overrides(m, "attend")]
    starts = _starts(site)
    one = len(starts) == 1 and not (site.drafts and site.phase == "decode")  # drops of the last drafts may be due
    if one or not (dropping or any(method.at(site) for method in choosing)):
        return attention.run(site, methods, native)
    outs, read, gone = [], 0.0, None
    for start, stop in zip(starts, [*starts[1:], site.q.shape[2]], strict=True):
        if site.drafts:
            _remember(site, site.seen - site.q.shape[2] + start)
        part = site.part(start, stop)
        if site.slots is not None and (start > 0 or site.phase == "decode"):  # a prompt is read before any is dropped
            gone = _hide(part, dropping, gone)
        out, density = attention.run(part, methods, native)
        outs.append(out)
        read += density * (stop - start)
    return torch.cat(outs, 2), read / site.q.shape[2]


def _starts(site: Site) -> list[int]:
    """List where the parts of a call begin: at each query that decodes; those that read the prompt are one part."""
    n = site.q.shape[2]
    if site.phase == "decode":
        return list(range(n))
    return [0, *range(max(1, n - site.tentative), n)] if site.drafts else [0]


def _hide(part: Site, dropping: list[Method], gone: Tensor | None) -> Tensor:
    """Hide from a query the keys that come after it, and those that methods would have dropped before it."""
    past, positions = part.seen - part.q.shape[2], part.positions
    before = part.as_of(past)
    if gone is None:
        gone = torch.zeros_like(positions, dtype=torch.bool)
    gone = torch.nn.functional.pad(gone, (0, positions.shape[2] - gone.shape[2]))
    for method in dropping:
        keep = method.keep(before) if method.at(before) else None
        if keep is not None:
            gone = gone | (~shown(keep, before) & (positions < past))
    hidden = gone | (positions >= part.seen)
    part.hidden_keys = hidden if not part.is_whole or bool(hidden.any()) else None
    return gone


def _own(site: Site, key: Any) -> bool:
    """Whether a memory goes along with this layer: its own, or, at the first layer, that of all layers."""
    return key[0] != _DRAFTED and (key[1] == site.layer or (key[1] is None and site.order == 0))


def _remember(site: Site, past: int) -> None:
    """Note what methods remember before the token at `past`."""
    saved = site.memories.setdefault((_DRAFTED, site.layer), {})
    saved[str(past)] = {key: _copied(memory) for key, memory in site.memories.items() if _own(site, key)}


def _rewind(site: Site) -> None:
    """Go back to what methods remembered before the tokens that were taken back since the last call."""
    saved = site.memories.pop((_DRAFTED, site.layer), {}).get(str(site.seen - site.q.shape[2]))
    if saved is not None:
        for key in [key for key in site.memories if _own(site, key)]:
            del site.memories[key]
        site.memories.update(saved)


def _copied(memory: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in memory.items()}
