"""Split the cache by head: some key/value heads keep everything, the others keep sinks and a recent window."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import ShapeError, UnsupportedModel
from foveate.host import AttendingLayer, Ends, Host, Layout
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.site import Site


def far_layers(found: Layout) -> tuple[AttendingLayer, ...]:
    """Return the layers that see furthest: those without a window or, if all have one, those with the widest."""
    if any(layer.window is None for layer in found.layers):
        return tuple(layer for layer in found.layers if layer.window is None)
    widest = max(layer.window or 0 for layer in found.layers)
    return tuple(layer for layer in found.layers if layer.window == widest)


def far_numbers(host: Host) -> frozenset[int]:
    """Return the numbers in the cache of the layers that see furthest."""
    return frozenset(layer.layer for layer in far_layers(layout(host)))


def check_reach(name: str, reads: int, host: Host) -> None:
    """Refuse a policy that reads as many tokens as the widest window of a model holds: it would change nothing."""
    window = far_layers(layout(host))[0].window
    if window is not None and reads >= window:
        raise UnsupportedModel(
            f"{name} reads {reads} tokens, but no layer of {type(host.model).__name__} sees more than {window}: "
            f"it would change nothing"
        )


class HeadTable:
    """A table of heads `(layers, kv_heads)` that sites read by their layer, on their device."""

    def __init__(self, heads: Bool[Tensor, "l hkv"], found: Layout) -> None:
        self._rows = {layer.layer: row[: layer.kv_heads] for layer, row in zip(found.layers, heads, strict=True)}
        self._all = {number: bool(row.all()) for number, row in self._rows.items()}
        self._numbers = {number: frozenset(row.nonzero()[:, 0].tolist()) for number, row in self._rows.items()}
        self._placed: dict[tuple[int, torch.device], Tensor] = {}

    def holds_all(self, site: Site) -> bool:
        """Return whether every head of this layer is in the table; true also for a layer without a row."""
        return self._all.get(site.layer, True)

    def numbers(self, site: Site) -> frozenset[int]:
        """Return the heads of this layer that are in the table."""
        return self._numbers[site.layer]

    def of(self, site: Site) -> Bool[Tensor, " hkv"]:
        key = (site.layer, site.q.device)
        if key not in self._placed:
            self._placed[key] = self._rows[site.layer].to(site.q.device)
        return self._placed[key]


def keep_ends(
    site: Site, sink: int, recent: int | Tensor, full: frozenset[int] = frozenset()
) -> Ends | Bool[Tensor, "b hkv s"]:
    """Keep all tokens of the `full` heads, and the first `sink` and last `recent` tokens of the others.

    `recent` is a number, or one for each sequence. The result is a mask if sequences are padded, else `Ends`.
    """
    found = tokens(site)
    if found is None:
        assert not isinstance(recent, Tensor)
        return Ends(sink, recent, full)
    recent = recent[:, None, None] if isinstance(recent, Tensor) else recent
    own = found.own(site.positions)
    kept = (own >= 0) & ((own < sink) | (own >= found.count[:, None, None] - recent))
    kept[:, sorted(full)] = True
    return kept


def own_lengths(site: Site) -> int | Tensor:
    """Return the number of tokens so far; one number for each sequence `(B,)` if some are padded."""
    found = tokens(site)
    return site.seen if found is None else found.count


def split_at_budget(budget: float, host: Host, length: int) -> tuple[Bool[Tensor, "l hkv"], int, int]:
    """Split a budget by head: `(heads that may be full, number of full heads, tokens of the others)`.

    The window of the others is a sixteenth of the prompt, so that most of the budget pays for full heads, which
    retrieval needs. The rest of the budget, if no further full head fits, lengthens the window. Heads of layers with a
    window of their own cannot see further and are never full.
    """
    found = layout(host)
    far = torch.tensor([layer.window is None or layer.window > length for layer in found.layers])
    may, heads = found.table & far[:, None], int(found.table.sum())
    window = max(8, length // 16)
    share = min(1.0, window / length)
    full = int(max(0.0, (budget - share) / (1 - share)) * heads + 1e-6) if share < 1 else heads
    full = min(full, int(may.sum()))
    rest = (budget * heads - full) * length / max(1, heads - full)
    return may, full, min(length, max(1, round(rest)))


def top(scores: Float[Tensor, "l h"], count: int) -> Bool[Tensor, "l h"]:
    """Return the `count` heads with the largest scores over all layers."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return chosen.view_as(scores)


def per_kv_head(scores: Float[Tensor, "l hq"], found: Layout) -> Float[Tensor, "l hkv"]:
    """Convert scores of query heads to scores of key/value heads: each gets the best score of its group."""
    out = scores.new_full((len(found), found.kv_heads), float("-inf"))
    for row, layer in enumerate(found.layers):
        out[row, : layer.kv_heads] = scores[row, : layer.heads].unflatten(0, (layer.kv_heads, -1)).amax(-1)
    return out


def check_heads(name: str, heads: Tensor, host: Host) -> None:
    """Refuse a table of heads that is not `(layers, kv_heads)`, and models whose heads share a cache."""
    found, model = layout(host), type(host.model).__name__
    if found.expands:
        raise UnsupportedModel(
            f"{name}: the heads of {model} share one latent in the cache, so that they cannot keep different tokens; "
            f"use a policy that keeps the same for every head, such as sink_recent"
        )
    expected = (len(found), found.kv_heads)
    if tuple(heads.shape) != expected:
        raise ShapeError(f"{name} must be (layers, kv_heads)={expected} for this model; got {tuple(heads.shape)}")
