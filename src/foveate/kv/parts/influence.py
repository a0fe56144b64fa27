"""Influence of attention entries on a loss: what removing an entry would cost, to first order, without the matrix.

MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024), arXiv 2406.14909, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Host, Method, apply
from foveate.host.fused_statistics import grouped
from foveate.host.hf.layout import layout
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.host.weight_tiles import WeightTile, tiles

_NEAR_ONE = 1e-6  # a weight nearer to 1 leaves nothing for other keys


def own_answers(host: Host, ids: Int[Tensor, "b n"], answers: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the tokens with each answer replaced by what the model itself generates there, greedily and in order."""
    own = ids.clone()
    for row, real in enumerate(answers):
        places = real.nonzero()[:, 0].tolist()
        for begin in [at for at in places if at - 1 not in places and at > 0]:
            end = next(at for at in range(begin, real.shape[0] + 1) if at == real.shape[0] or not real[at])
            given = own[row : row + 1, :begin].to(host.model.device)
            made = host.model.generate(
                given, attention_mask=torch.ones_like(given), min_new_tokens=end - begin, max_new_tokens=end - begin,
                do_sample=False,
            )  # fmt: skip
            own[row, begin:end] = made[0, begin:].to(own.device)
    return own


def span_influence(
    host: Host, data: Iterable[tuple[Tensor, Tensor]], *, items: int = 8, sink: int = 64, own: bool = True,
    progress: Progress | None = None,
) -> dict[int, Float[Tensor, "l hkv n"]]:  # fmt: skip
    """Return what removing all keys at a distance costs, `(layers, kv_heads, N)`, for each length N of the data.

    Entry d of a head is the sum of the influence of its weights on keys d tokens back, over all queries; keys among
    the first `sink` tokens are left out, since no span removes them. A span that hides distances of S and more costs
    `found[N][..., S:].sum(-1)`. Items of a length are averaged. Memory: queries, keys, values and outputs of one item,
    and one tile of weights at a time; the whole matrix is never made.

    Args:
        host: a decoder.
        data: `(ids (B, N), answers (B, N) bool)`; the loss covers the answers.
        items: number of items that are read.
        sink: first tokens that every span sees.
        own: whether the model's own greedy answers replace those of the data, as in the paper.
        progress: called as `progress(step, steps, note)`.
    """
    validate.count("items", items, 1)
    validate.count("sink", sink)
    if host.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(host.model).__name__} reads its answers behind an encoder")
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for step, (ids, answers) in enumerate(islice(data, items)):
        with torch.inference_mode(False):
            ids = own_answers(host, ids, answers) if own else ids
            found = _of_item(host, ids.clone(), answers.clone(), sink)
        length = ids.shape[1]
        sums[length] = found if length not in sums else sums[length] + found
        counts[length] = counts.get(length, 0) + 1
        if progress is not None:
            progress(step + 1, items, f"influence of attention at {length} tokens")
    if not sums:
        raise OptionError("data must hold at least one item (ids, answers); got none")
    return {length: total / counts[length] for length, total in sorted(sums.items())}


def answer_loss(host: Host, ids: Int[Tensor, "b n"], answers: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Return the mean cross entropy of the answers' tokens."""
    ids = ids.to(host.model.device)
    chosen = answers[:, 1:].to(ids.device)
    logits = host.model(input_ids=ids, use_cache=False).logits[:, :-1][chosen]
    return F.cross_entropy(logits.float(), ids[:, 1:][chosen])


def _of_item(host: Host, ids: Tensor, answers: Tensor, sink: int) -> Float[Tensor, "l hkv n"]:
    found, taps = layout(host), Taps()
    with torch.enable_grad(), apply(host.model, taps, on="decoder"):
        loss = answer_loss(host, ids, answers)
        gradients = taps.gradients(loss)
    out = torch.zeros(len(found), found.kv_heads, ids.shape[1])
    for row, layer in enumerate(found.layers):
        if layer.layer in taps.sites:
            by_distance = _by_distance(taps.sites.pop(layer.layer), gradients.pop(layer.layer), sink)
            out[row, : layer.kv_heads] = by_distance.unflatten(0, (layer.kv_heads, -1)).sum(1).cpu()
    return out


class Taps(Method):
    """A method that adds nothing to each head's output, so that the loss has a gradient there, and holds the calls."""

    def __init__(self) -> None:
        self.sites: dict[int, Site] = {}
        self._zeros: dict[int, Tensor] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        zeros = self._zeros[site.layer] = torch.zeros_like(out, requires_grad=True)
        self.sites[site.layer] = site
        return out + zeros

    def gradients(self, loss: Tensor) -> dict[int, Float[Tensor, "b hq n dv"]]:
        """Return the gradient of the loss at each layer's outputs; parameters get none."""
        found = torch.autograd.grad(loss, list(self._zeros.values()), allow_unused=True)
        pairs = zip(self._zeros, found, strict=True)
        return {layer: self._zeros[layer].detach() if one is None else one for layer, one in pairs}


def influences(site: Site, gradient: Float[Tensor, "b hq n dv"]) -> Iterator[tuple[slice, WeightTile, Tensor]]:
    """Yield `(rows, tile, E)`: the first-order change of the loss from removing each entry of some rows.

    With weights A and their gradient G, the entry (i, j) goes and the others of its row grow to sum to 1:
    `E = -A_ij (G_ij - Σ_n A_in G_in) / (1 - A_ij)`. For the only key of a row it is `-A G`.
    """
    start = 0
    v = grouped(site.v.detach(), site.q.shape[1]).double()
    for tile in tiles(site):
        rows = slice(start, start + tile.weights.shape[2])
        start = rows.stop
        weights = tile.weights.double()
        slopes = gradient[:, :, rows].double() @ v[:, :, tile.keys].transpose(2, 3)
        each = weights * slopes
        others = (each.sum(-1, keepdim=True) - each) / (1 - weights).clamp_min(_NEAR_ONE)
        yield rows, tile, -weights * (slopes - others)


@torch.no_grad()
def _by_distance(site: Site, gradient: Tensor, sink: int) -> Float[Tensor, "hq n"]:
    """Sum the influences of all keys after the sinks by their distance from the query."""
    n = site.q.shape[2]
    out = torch.zeros(site.q.shape[1], n, dtype=torch.float64, device=site.q.device)
    for rows, tile, influence in influences(site, gradient):
        query = torch.arange(rows.start, rows.stop, device=out.device)[:, None]
        key = torch.arange(tile.keys.start, tile.keys.stop, device=out.device)
        real = (key >= sink) & (key <= query)
        index = (query - key).clamp_min(0).flatten()
        out.index_add_(1, index, (influence * real).sum(0).flatten(1))
    return out
