"""The attention that the end of a prompt pays to each of its documents, from a few rows of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, shown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import TILE, weight_tile
from foveate.steer.parts.document_prompt import check_spans
from foveate.steer.parts.head_table import Heads, head_table

#: Chosen layers: "all", "shallow" (the first quarter), or their numbers.
Layers = Literal["all", "shallow"] | Iterable[int]


@torch.no_grad()
def document_attention(
    model: object,
    ids: Int[Tensor, "1 n"],
    spans: Sequence[tuple[int, int]],
    layers: Layers = "all",
    heads: Heads = None,
    normalise: Literal["none", "length"] = "none",
    *,
    query: Literal["last", "question"] = "last",
    chunk: int | None = None,
) -> Float[Tensor, " documents"]:
    """Return the attention that each document receives from the end of a prompt, on the CPU.

    A document's attention is the sum of the weights on its tokens, averaged over the heads of a layer, then over the
    layers. The scores of "none" add up to at most 1; the rest falls on the other tokens, mostly on a sink. Cost: one
    pass over the prompt with the model's own kernel, and a few rows of weights in each layer; a whole matrix is never
    made. Weights are those that the model uses: its windows, soft caps and learnt sinks count, and so do the edits of
    methods that are applied around the call.

    Args:
        model: a decoder.
        ids: the prompt, one sequence without padding.
        spans: `(start, end)` of each document.
        layers: the layers to average over.
        heads: the heads to average over, as in `ActCalibration`; None is all.
        normalise: "length" divides a document's attention by its number of tokens.
        query: "last" reads the row of the last token, which produces the first token of the answer; "question" averages
            the rows of all tokens after the last document.
        chunk: tokens to read at once; None reads the prompt in one call.
    """
    validate.one_of("normalise", normalise, ("none", "length"))
    validate.one_of("query", query, ("last", "question"))
    check_spans(ids, spans)
    found = host(model)
    if found.decoder is None or found.model.config.is_encoder_decoder:
        raise UnsupportedModel(f"document_attention needs a decoder; {type(found.model).__name__} is not one")
    table, n = head_table(heads, found) & _layer_table(layers, found)[:, None], ids.shape[1]
    reader = _SpanReader(spans, table, 1 if query == "last" else n - spans[-1][1])
    _read(found, ids.to(found.model.device), reader, chunk)
    scores = reader.mean()
    return scores if normalise == "none" else scores / torch.tensor([end - start for start, end in spans])


class _SpanReader(Method):
    """Adds up the weights of the last queries of one prompt over spans of its tokens."""

    def __init__(self, spans: Sequence[tuple[int, int]], table: Tensor, queries: int) -> None:
        self.spans, self.table, self.queries = spans, table, queries
        self.layers: list[Tensor] = []

    def at(self, site: Site) -> bool:
        return site.is_causal and bool(self.table[site.layer].any())

    def read(self, site: Site, out: Tensor) -> None:
        if site.replaced:
            raise UnsupportedModel(
                f"another method replaced the attention of layer {site.layer}, so that its weights are unknown"
            )
        n, count = site.q.shape[2], len(self.spans)
        own = torch.full((site.seen,), count, device=site.q.device)
        for number, (start, end) in enumerate(self.spans):
            own[start:end] = number
        places = site.positions[0].repeat_interleave(site.q.shape[1] // site.positions.shape[1], 0).to(own.device)
        document = own[places.clamp_min(0).long()].masked_fill(places < 0, count)
        total = torch.zeros(site.q.shape[1], count + 1, device=own.device)
        step = max(1, TILE // max(1, site.q.shape[1] * site.k.shape[2]))
        for start in range(n - self.queries, n, step):
            tile = weight_tile(site, slice(start, min(start + step, n)))
            total.scatter_add_(1, document[:, tile.keys], tile.weights[0].sum(1).to(total.dtype))
        chosen = self.table[site.layer, : total.shape[0]].to(total.device)
        self.layers.append((total[chosen, :count].mean(0) / self.queries).cpu())

    def mean(self) -> Float[Tensor, " documents"]:
        if not self.layers:
            raise OptionError("layers, heads: none of the chosen layers attends to the prompt")
        return torch.stack(self.layers).mean(0)


def _read(found: Host, ids: Tensor, reader: _SpanReader, chunk: int | None) -> None:
    """Read the prompt in pieces; the reader is on for the last one, which holds all of its queries."""
    first = 0
    if chunk is not None:
        validate.count("chunk", chunk, 1)
        first = (ids.shape[1] - reader.queries) // chunk * chunk
    cache = DynamicCache(config=found.config)
    for piece in ids[:, :first].split(chunk or 1, 1) if first else ():
        found.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    with apply(found.model, reader):
        found.model(ids[:, first:], past_key_values=cache, use_cache=True, logits_to_keep=1)


def checked_layers(layers: Layers) -> Layers:
    """Return chosen layers in a form that can be read more than once, and refuse what is no choice of layers."""
    if isinstance(layers, str):
        validate.one_of("layers", layers, ("all", "shallow"))
        return layers
    if not isinstance(layers, Iterable):
        raise OptionError(f"layers={shown(layers)} must be 'all', 'shallow' or numbers of layers")
    return tuple(layers)


def _layer_table(layers: Layers, found: Host) -> Tensor:
    """Convert chosen layers to a bool table `(layers,)`."""
    table, layers = torch.zeros(found.layers, dtype=torch.bool), checked_layers(layers)
    if isinstance(layers, str):
        table[: found.layers if layers == "all" else -(-found.layers // 4)] = True
        return table
    for layer in layers:
        if layer not in range(found.layers):
            raise OptionError(f"layers: {layer} must be in 0..{found.layers - 1} for this model")
        table[layer] = True
    return table
