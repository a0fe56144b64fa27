"""Rows that wait for the token after them: its copies are known one call later, and the last row is kept until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile
from foveate.lens.capture.record import Record, by_position
from foveate.lens.measures import KeyTokens, Measure


def ids_so_far(site: Site, notes: dict[str, Any], names: Sequence[str]) -> Int[Tensor, "b n"]:
    """Return the tokens of the sequence up to this call's, which the notes of earlier calls have; -1 where unknown.

    Args:
        site: the call.
        notes: those of the layer and the sequence.
        names: the measures that need the tokens, for the message.
    """
    if site.ids is None:
        raise OptionError(
            f"{', '.join(names)}: tokens are compared, whose ids are unknown here; give input_ids to a model of one "
            f"stack, or leave these measures out"
        )
    past, held = site.seen - site.q.shape[2], notes.get("ids")
    if held is None or held.shape[0] != site.ids.shape[0]:
        held = site.ids[:, :0]
    before = held[:, :past]
    unknown = before.new_full((before.shape[0], past - before.shape[1]), -1)
    notes["ids"] = torch.cat([unknown, before, site.ids], 1)
    return notes["ids"]


def settle(site: Site, notes: dict[str, Any], record: Record, measures: Sequence[Measure], tokens: KeyTokens) -> None:
    """Complete the last row of the call before this one, and keep the last row of this one.

    Call it before the record gets this call.
    """
    waiting = [measure for measure in measures if measure.looks_ahead]
    if not waiting or site.cache is None:
        return
    past, row = site.seen - site.q.shape[2], notes.get("row")
    if row is not None and row.shape[-1] == past and record.counted:
        places = torch.arange(past, device=row.device)
        then = KeyTokens(places.expand(row.shape[0], 1, past), tokens.real, places[-1:], tokens.ids)
        for measure in waiting:
            value, applies = measure.from_weights(row[:, :, None], then), measure.applies(then, causal=True)
            record.complete(measure.name, value, applies)
    last = slice(site.q.shape[2] - 1, site.q.shape[2])
    tile = weight_tile(site, last)
    notes["row"] = by_position(tile.weights[:, :, 0], tokens.narrow(tile.keys), site.seen)
