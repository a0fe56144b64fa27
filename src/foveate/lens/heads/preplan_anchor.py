"""Preplan-and-anchor rhythm: two measures of a response's tokens, read from attention, and credit that follows them.

Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization (2025),
arXiv 2510.13554. Heads that look nearby show where a phrase begins: there their windowed distance (WAAD) peaks. Heads
that look far show which tokens later ones return to: their future influence (FAI) is high. Reinforcement learning then
gives such tokens more of a response's advantage.

    rhythm = preplan_anchor(model, ids, response)                      # one pass; response (B, N) marks the answer
    advantages = rhythm_credit(advantages, rhythm.waad, rhythm.fai, response, kind="coupled")

There is no release. The definitions are the paper's. It leaves open how shares are rounded, which ends a range
includes, the influence of a token without later ones, both thresholds of the coupled credit and what a peak is: these
are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host import Method, apply, host
from foveate.host.hf.layout import decoder_inputs, layout
from foveate.host.site import Site
from foveate.host.weight_tiles import tiles
from foveate.lens.circuits.interventions import Head
from foveate.lens.parts.gaps import mass_from_later, windowed_distance
from foveate.lens.parts.rhythm_credit import Rounding, share_of


@final
@dataclass(frozen=True, eq=False)
class Rhythm:
    """The measures of a response's tokens; they are 0 outside the response.

    Args:
        waad: each token's windowed average attention distance, averaged over the local heads.
        fai: each token's future attention influence, averaged over the global heads.
        distance: the mean distance of each head of `heads`.
        heads: the heads of the probed layers.
        local_heads, global_heads: those of the smallest and of the largest mean distance.
    """

    waad: Float[Tensor, "b n"]
    fai: Float[Tensor, "b n"]
    distance: Float[Tensor, " h"]
    heads: tuple[Head, ...]
    local_heads: tuple[Head, ...]
    global_heads: tuple[Head, ...]


def preplan_anchor(
    model: object, ids: Int[Tensor, "b n"], response: Bool[Tensor, "b n"], *,
    attention_mask: Int[Tensor, "b n"] | None = None, layers: Iterable[int] | None = None, fraction: float = 0.3,
    rounding: Rounding = "floor", window: int | None = 10, low: int = 10, high: int | None = 100,
    closed: bool = True, empty: float = 0.0,
) -> Rhythm:  # fmt: skip
    """Read prompts with their responses once, and measure the rhythm of the responses.

    Weights are computed a few rows at a time, all heads together: memory is O(heads · N), and no head's whole matrix is
    ever held. Both measures are linear in the weights, so that they are computed for each head and averaged over a set
    of heads afterwards.

    Args:
        model: a decoder.
        ids: prompts and responses, padded on any side.
        response: True for the tokens of the responses.
        attention_mask: 0 for padding; None if there is none.
        layers: the layers to read; None is `middle_layers`.
        fraction, rounding: see `split_heads`; the mean distance is over all responses given.
        window: see `waad`.
        low, high, closed, empty: see `fai`. The paper's first version takes 50 as `high`.
    """
    _check_range(window, low, high)
    if ids.ndim != 2 or response.shape != ids.shape or response.dtype != torch.bool:
        raise ShapeError(f"response must be bool like ids (B, N)={tuple(ids.shape)}; got {shown(response)}")
    if not bool(response.any()):
        raise OptionError("response marks no token")
    found = host(model)
    attending = [each.layer for each in layout(found).layers]
    chosen = tuple(layers) if layers is not None else tuple(attending[i] for i in middle_layers(len(attending)))
    if not chosen or not set(chosen) <= set(attending):
        raise OptionError(f"layers={chosen} must be some of this model's attending layers {attending}")
    probe = _RhythmProbe(set(chosen), response, window, low, math.inf if high is None else high, closed)
    inputs = decoder_inputs(found, ids)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(inputs["input_ids"].device)
    assert found.decoder is not None  # else it has no layout
    with torch.no_grad(), apply(found.model, probe, on="decoder"):
        found.decoder(**inputs, use_cache=False)
    return probe.rhythm(fraction, rounding, empty)


def middle_layers(layers: int, count: int = 5) -> list[int]:
    """Return evenly spaced layers of a model's middle third, ends included: `count` of them, or all if it has fewer."""
    validate.count("layers", layers, 1)
    validate.count("count", count, 1)
    first, last = layers // 3, 2 * layers // 3
    return sorted({min(layers - 1, round(place)) for place in torch.linspace(first, last, count).tolist()})


def split_heads(
    distance: Float[Tensor, " h"], fraction: float = 0.3, rounding: Rounding = "floor"
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """Return the local heads, of the smallest mean distance, and the global heads, of the largest.

    Args:
        distance: for each head the mean over response tokens of the mean distance of what they attend to.
        fraction: the share of all heads in each set, up to a half.
        rounding: rounds their number, which is at least 1.
    """
    validate.between("fraction", fraction, 0.0, 0.5)
    if len(distance) < 2:
        raise ShapeError(f"distance must be that of two heads at least; got {len(distance)}")
    order = distance.argsort(stable=True)
    count = min(share_of(fraction, len(order), rounding), len(order) // 2)
    return order[:count], order[-count:]


def waad(weights: Float[Tensor, "... r n"], window: int | None = 10, first: int = 0) -> Float[Tensor, "... r"]:
    """Return the windowed average attention distance of each row: distances count up to `window`, None for no limit.

    Args:
        weights: rows of attention; row i is that of token `first + i`.
    """
    return windowed_distance(weights, _gaps(first, weights.shape[-2], slice(0, weights.shape[-1]), weights), window)


def fai(
    weights: Float[Tensor, "... n n"], low: int = 10, high: int | None = 100,
    response: Bool[Tensor, "... n"] | None = None, *, closed: bool = True, empty: float = 0.0,
) -> Float[Tensor, "... n"]:  # fmt: skip
    """Return each token's future attention influence: the mean weight it gets from tokens `low` to `high` later.

    Args:
        weights: causal attention of one head, or averaged over heads.
        low, high: the range of distances; `high=None` is up to the end.
        response: the tokens whose attention counts; None for all.
        closed: whether the range includes `high`.
        empty: the influence of a token that no token of the range follows.
    """
    _check_range(None, low, high)
    asks = weights.new_ones(weights.shape[-1], dtype=torch.bool) if response is None else response
    span = (low, math.inf if high is None else high, closed)
    gaps = _gaps(0, weights.shape[-2], slice(0, weights.shape[-1]), weights)
    return _mean(mass_from_later(weights, gaps, asks, *span), _askers(asks, *span), empty)


@final
class _RhythmProbe(Method):
    """A method that sums, for each head, distances over its row and influence over its columns."""

    def __init__(
        self, layers: set[int], response: Tensor, window: int | None, low: int, high: float, closed: bool
    ) -> None:
        self.layers, self.response, self.window, self.span = layers, response, window, (low, high, closed)
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, site: Site) -> bool:
        return site.layer in self.layers and site.is_causal

    def read(self, site: Site, out: Tensor) -> None:
        response, (batch, heads, n) = self.response.to(site.q.device), site.q.shape[:3]
        rows: list[tuple[Tensor, ...]] = []
        influence = torch.zeros(batch, heads, n, device=site.q.device)
        start = 0
        for tile in tiles(site):
            stop = start + tile.weights.shape[2]
            gaps = _gaps(start, stop - start, tile.keys, tile.weights)
            rows.append(tuple(windowed_distance(tile.weights, gaps, limit) for limit in (None, self.window)))
            influence[..., tile.keys] += mass_from_later(tile.weights, gaps, response[:, None, start:stop], *self.span)
            start = stop
        whole, windowed = (torch.cat(parts, 2) for parts in zip(*rows, strict=True))
        total = (whole.double() * response[:, None]).sum((0, 2)) / response.sum()
        self.found[site.layer] = total, windowed, influence

    def rhythm(self, fraction: float, rounding: Rounding, empty: float) -> Rhythm:
        """Split the heads, and average both measures over their set of heads."""
        layers = sorted(self.found)
        heads = [(layer, head) for layer in layers for head in range(len(self.found[layer][0]))]
        parts = zip(*(self.found[layer] for layer in layers), strict=True)
        distance, windowed, influence = (torch.cat([x.cpu() for x in part], min(1, part[0].ndim - 1)) for part in parts)
        near, far = split_heads(distance, fraction, rounding)
        response = self.response.cpu()
        fai = _mean(influence[:, far].mean(1), _askers(response, *self.span), empty)
        return Rhythm(
            windowed[:, near].mean(1) * response, fai * response, distance, tuple(heads),
            tuple(heads[i] for i in sorted(near.tolist())), tuple(heads[i] for i in sorted(far.tolist())),
        )  # fmt: skip


def _gaps(first: int, rows: int, keys: slice, like: Tensor) -> Int[Tensor, "r k"]:
    """Return how far before each row's token each key is; 0 for later keys, which causal rows do not see."""
    ends = torch.arange(first, first + rows, device=like.device)
    return (ends[:, None] - torch.arange(keys.start, keys.stop, device=like.device)).clamp_min(0)


def _askers(asks: Bool[Tensor, "... n"], low: int, high: float, closed: bool) -> Int[Tensor, "... n"]:
    """Return the number of tokens that count in each token's range."""
    n = asks.shape[-1]
    before = torch.cat([torch.zeros_like(asks[..., :1], dtype=torch.long), asks.cumsum(-1)], -1)
    places = torch.arange(n, device=asks.device)
    last = n if math.isinf(high) else int(high) + int(closed)
    return before[..., (places + last).clamp_max(n)] - before[..., (places + low).clamp_max(n)]


def _mean(total: Tensor, count: Tensor, empty: float) -> Tensor:
    return torch.where(count > 0, total / count.clamp_min(1), empty)


def _check_range(window: int | None, low: int, high: int | None) -> None:
    if window is not None:
        validate.count("window", window, 1)
    validate.count("low", low)
    if high is not None:
        validate.count("high", high, low)
