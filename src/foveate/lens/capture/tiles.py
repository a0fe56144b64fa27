"""Measures of a call, from fused statistics if they are exact there, else from its weights, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.host.fused_statistics import Statistics
from foveate.host.site import Site
from foveate.host.weight_tiles import tiles
from foveate.lens.measures import Entropy, KeyTokens, Measure, ReceivedMass
from foveate.lens.position_measures import MeanDistance


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measures of one call by name, the queries whose rows count, and the number of them that see each key.

    `applies` and `askers` are those of single measures, if they differ; see `Measure`.
    """

    values: dict[str, Tensor]
    counted: Bool[Tensor, "b h nq"]
    visible: Float[Tensor, "b h nk"]
    applies: dict[str, Tensor] = field(default_factory=dict)
    askers: dict[str, Tensor] = field(default_factory=dict)


def measure_call(
    site: Site, measures: Sequence[Measure], tokens: KeyTokens, out: Tensor | None = None,
    holder: nn.Module | None = None,
) -> Measurements:  # fmt: skip
    """Compute all measures of a call, from fused statistics if they are exact there, else from weights.

    Args:
        site: the call.
        measures: the measures; those of outputs need `out`, and `holder`, the module that has the output projection.
        tokens: the tokens of the keys.
        out: the heads' outputs.
    """
    weighed = [m for m in measures if not m.reads_output]
    found = _weighed(site, weighed, tokens)
    for measure in measures:
        if measure.reads_output:
            assert out is not None and holder is not None
            found.values[measure.name] = torch.where(found.counted, measure.from_output(out, holder), 0.0)
    causal = site.is_causal or site.q.shape[2] == 1
    for measure in measures:
        if measure.over == "queries":
            _note(found.applies, measure.name, measure.applies(tokens, causal))
        else:
            _note(found.askers, measure.name, measure.askers(found.counted, tokens, site.seen))
    return found


def _note(noted: dict[str, Tensor], name: str, value: Tensor | None) -> None:
    if value is not None:
        noted[name] = value


def _weighed(site: Site, measures: Sequence[Measure], tokens: KeyTokens) -> Measurements:
    """Compute the measures of weights."""
    call = Statistics.of(site)
    if call is None:
        return from_tiles(site, measures, tokens)
    # what needs more of a call goes first: the log-sum-exp, which all need, comes with it
    order = sorted(measures, key=lambda m: not isinstance(m, Entropy | MeanDistance | ReceivedMass))
    values = {m.name: value for m in order if (value := m.fused(call, tokens)) is not None}
    others = [m for m in measures if m.name not in values]
    if others:
        values |= from_tiles(site, others, tokens).values
    return Measurements(values, call.counted, call.visible)


def from_tiles(site: Site, measures: Sequence[Measure], tokens: KeyTokens) -> Measurements:
    """Compute measures of a call's weights from the weights, a few rows at a time."""
    b, h, size = *site.q.shape[:2], site.k.shape[2]
    dtype = torch.promote_types(site.q.dtype, torch.float32)
    visible, counted = site.q.new_zeros(b, h, size, dtype=dtype), []
    rows: dict[str, list[Tensor]] = {m.name: [] for m in measures if m.over == "queries"}
    keys = {m.name: torch.zeros_like(visible) for m in measures if m.over == "keys"}
    for tile in tiles(site):
        visible[..., tile.keys] += tile.visible()
        counted.append(tile.weights.sum(-1) > 0)
        for measure in measures:
            value = measure.from_weights(tile.weights, tokens.narrow(tile.keys, tile.rows))
            if measure.over == "queries":
                rows[measure.name].append(value)
            else:
                keys[measure.name][..., tile.keys] += value
    return Measurements(
        keys | {name: torch.cat(parts, 2) for name, parts in rows.items()}, torch.cat(counted, 2), visible
    )
