"""Split a decoding call of several tokens, so that methods get one query at a time.

Assisted decoding and prompt lookup read a few drafted tokens at once and remove those that are rejected. Methods that
choose or drop keys would change the text if they got such a call as a whole. So they get each query by itself, with the
keys up to its own and without those that they dropped before it. A drop after a drafted token is only recorded: it
becomes real once the token is accepted, or is forgotten with it, together with the methods' notes on it. A method that
folds dropped tokens into a summary, or refits the others, is the exception: the drafted queries see the tokens
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.host import attention
from foveate.host.evict import as_mask, changes, gone_at, mark
from foveate.host.method import Method, overrides
from foveate.host.site import Drops, Site
from foveate.host.slots.ends import AT_END, Ends
from foveate.host.slots.slots import EMPTY

_DRAFTED = "after each drafted token"

#: Return the methods that may drop tokens after a call.
Droppers = Callable[[Site], list[Method]]

#: True at the positions of the tokens that each head dropped.
Gone = Bool[Tensor, "b hkv n"]


@dataclass(frozen=True)
class _State:
    """The state after some number of tokens: the methods' notes, and the tokens that are dropped but still stored."""

    notes: dict[Any, dict[str, Any]]
    gone: Gone | None


def run(site: Site, methods: list[Method], native: attention.Native, droppers: Droppers) -> tuple[Tensor, float]:
    """Compute a call as `attention.run` does, query by query if that makes a difference."""
    gone = _resumed(site) if site.cache is not None else None
    if not site.drafts and site.q.shape[2] == 1:
        return attention.run(site, methods, native)
    starts = _starts(site)
    choosing = [method for method in methods if overrides(method, "select") or overrides(method, "attend")]
    records = site.drafts and site.slots is not None and any(_records(method) for method in droppers(site))
    if not records and (len(starts) == 1 or not any(method.at(site) for method in choosing)):
        return attention.run(site, methods, native)
    outs, read, settled = [], 0.0, site.seen - site.tentative
    for start, stop in zip(starts, [*starts[1:], site.q.shape[2]], strict=True):
        part = site.part(start, stop)
        part.reads_prompt = site.reads_prompt and start == 0
        if site.drafts:
            part.tentative = 0  # what a rejected draft changes is restored
            if start == 0:
                _record(site, part.seen - part.q.shape[2], gone)
        if start > 0 or gone is not None or site.phase == "decode":
            _hide(part, gone)
        out, density = attention.run(part, methods, native)
        outs.append(out)
        read += density * (stop - start)
        if records:
            drops = _dropped(part, [method for method in droppers(part) if _records(method)], gone)
            gone = drops.gone
            if part.seen <= settled:
                site.drops = drops
        if site.drafts:
            _record(site, part.seen, gone)
    return torch.cat(outs, 2), read / site.q.shape[2]


def _records(method: Method) -> bool:
    """Return whether a method drops tokens, and changes nothing else."""
    return overrides(method, "keep") and not changes(method)


def _starts(site: Site) -> list[int]:
    """List the first query of each part of a call. Queries that read the prompt are one part; others are one each."""
    n = site.q.shape[2]
    if site.phase == "decode":
        return list(range(n))
    return [0, *range(max(1, n - site.tentative), n)] if site.drafts else [0]


def _hide(part: Site, gone: Gone | None) -> None:
    """Hide from a query the keys after it, and those that were dropped before it."""
    positions = part.positions
    hidden = positions >= part.seen
    if gone is not None:
        hidden = hidden | gone_at(gone, positions)
    if part.slots is not None and (not part.is_whole or bool(hidden.any())):
        part.hidden_keys = hidden
        part.__dict__["positions"] = positions.masked_fill(hidden, EMPTY)


def _dropped(part: Site, dropping: list[Method], gone: Gone | None) -> Drops:
    """Return the tokens that are dropped after a query, those of earlier queries included."""
    kept = [(method, method.keep(part)) for method in dropping if method.at(part)]
    for _, keep in kept:
        if isinstance(keep, Tensor | Ends):
            gone = mark(gone, part, ~as_mask(keep, part))
    return Drops(gone, tuple(method for method, keep in kept if keep is AT_END))


# -- what is known after each number of tokens -------------------------------------------------------------------------


def _is_own(site: Site, key: Any) -> bool:
    """Return whether notes belong to this layer; those of all layers belong to the first one."""
    return key[0] != _DRAFTED and (key[1] == site.layer or (key[1] is None and site.order == 0))


def _record(site: Site, seen: int, gone: Gone | None) -> None:
    """Record the state after `seen` tokens."""
    notes = {key: _copied(notes) for key, notes in site.all_notes.items() if _is_own(site, key)}
    site.all_notes.setdefault((_DRAFTED, site.layer), {})[str(seen)] = _State(notes, gone)


def _resumed(site: Site) -> Gone | None:
    """Restore the state after what is left of the last call; return the tokens that are dropped but still stored."""
    known = site.all_notes.pop((_DRAFTED, site.layer), {})
    state = known.get(str(site.seen - site.q.shape[2]))
    if state is None:
        return None
    for key in [key for key in site.all_notes if _is_own(site, key)]:
        del site.all_notes[key]
    site.all_notes.update(state.notes)
    return state.gone


def _copied(notes: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in notes.items()}
