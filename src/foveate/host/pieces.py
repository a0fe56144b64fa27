"""Split a decoding call of several tokens, so that methods get one query at a time.

Assisted decoding and prompt lookup read a few drafted tokens at once and remove those that are rejected. Methods that
choose or drop keys would change the text if they got such a call as a whole. So they get each query by itself, with the
keys up to its own and without those that they would have dropped by then. When tokens are removed, the methods' notes
are restored as well. A method that folds dropped tokens into a summary, or refits the others, is the exception: the
drafted queries see the tokens themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.host import attention
from foveate.host.evict import as_mask
from foveate.host.method import Method, overrides
from foveate.host.site import Site

_DRAFTED = "notes before each drafted token"


def run(site: Site, methods: list[Method], native: attention.Native) -> tuple[Tensor, float]:
    """Compute a call as `attention.run` does, query by query if that makes a difference."""
    if site.cache is not None:
        _restore_notes(site)
    if site.q.shape[2] == 1 and not site.drafts:
        return attention.run(site, methods, native)
    changing = [m for m in methods if overrides(m, "fold") or overrides(m, "refit")]
    dropping = [m for m in methods if site.drafts and overrides(m, "keep") and m not in changing]
    choosing = [m for m in methods if overrides(m, "select") or overrides(m, "attend")]
    starts = _starts(site)
    one = len(starts) == 1 and not (site.drafts and site.phase == "decode")  # else drops may be due
    if one or not (dropping or any(method.at(site) for method in choosing)):
        return attention.run(site, methods, native)
    outs, read, dropped = [], 0.0, None
    for start, stop in zip(starts, [*starts[1:], site.q.shape[2]], strict=True):
        if site.drafts:
            _save_notes(site, site.seen - site.q.shape[2] + start)
        part = site.part(start, stop)
        if site.slots is not None and (start > 0 or site.phase == "decode"):  # drops follow a whole prompt
            dropped = _hide(part, dropping, dropped)
        out, density = attention.run(part, methods, native)
        outs.append(out)
        read += density * (stop - start)
    return torch.cat(outs, 2), read / site.q.shape[2]


def _starts(site: Site) -> list[int]:
    """List the first query of each part of a call. Queries that read the prompt are one part; others are one each."""
    n = site.q.shape[2]
    if site.phase == "decode":
        return list(range(n))
    return [0, *range(max(1, n - site.tentative), n)] if site.drafts else [0]


def _hide(part: Site, dropping: list[Method], dropped: Tensor | None) -> Tensor:
    """Hide from a query the keys after it, and those that methods would have dropped before it."""
    past, positions = part.seen - part.q.shape[2], part.positions
    before = part.as_of(past)
    if dropped is None:
        dropped = torch.zeros_like(positions, dtype=torch.bool)
    dropped = torch.nn.functional.pad(dropped, (0, positions.shape[2] - dropped.shape[2]))
    for method in dropping:
        keep = method.keep(before) if method.at(before) else None
        if keep is not None:
            dropped = dropped | (~as_mask(keep, before) & (positions < past))
    hidden = dropped | (positions >= part.seen)
    part.hidden_keys = hidden if not part.is_whole or bool(hidden.any()) else None
    return dropped


def _is_own(site: Site, key: Any) -> bool:
    """Return whether notes belong to this layer; those of all layers belong to the first one."""
    return key[0] != _DRAFTED and (key[1] == site.layer or (key[1] is None and site.order == 0))


def _save_notes(site: Site, past: int) -> None:
    """Save the methods' notes as they are before the token at `past`."""
    saved = site.all_notes.setdefault((_DRAFTED, site.layer), {})
    saved[str(past)] = {key: _copied(notes) for key, notes in site.all_notes.items() if _is_own(site, key)}


def _restore_notes(site: Site) -> None:
    """Restore the methods' notes from before the tokens that were removed since the last call."""
    saved = site.all_notes.pop((_DRAFTED, site.layer), {}).get(str(site.seen - site.q.shape[2]))
    if saved is not None:
        for key in [key for key in site.all_notes if _is_own(site, key)]:
            del site.all_notes[key]
        site.all_notes.update(saved)


def _copied(notes: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in notes.items()}
