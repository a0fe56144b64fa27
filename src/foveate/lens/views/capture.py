"""Capture of maps, queries and keys of a pretrained model for an `AttentionView`, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile
from foveate.lens.views.attention_view import AttentionView
from foveate.lens.views.labels import Labels, labels
from foveate.lens.views.stack import Products, Stack

#: The most bytes of all captured maps together.
MOST = 4 << 30


@torch.no_grad()
def attention_view(
    model: object, inputs: Tensor | Mapping[str, Any], *, tokenizer: Any = None, tokens: Sequence[str] | None = None,
    decoder_tokens: Sequence[str] | None = None, item: int = 0, layers: Iterable[int] | None = None,
    boundary: int | None = None, generate: int = 0, prompt: int | None = None, neurons: bool = True, **more: Any,
) -> AttentionView:  # fmt: skip
    """Run a model once over one text or image, and return a view of the attention of all its heads.

    It holds every map, O(N²) for each head: `foveate.look(..., keep_maps=...).view(...)` serves long texts. A decoder
    or an encoder gives one part; an encoder-decoder gives "encoder", "decoder" and "cross". Of a model that reads
    images and text, the language model is shown. Padding is left out.

    Args:
        model: any transformers model that `foveate.apply` takes.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        tokenizer: gives the texts of the tokens.
        tokens: the texts of the tokens, instead of a tokenizer; without both, tokens are numbers, and patches have
            their row and column.
        decoder_tokens: the texts of an encoder-decoder's decoder tokens.
        item: the item of a batch.
        layers: the layers to show; None is all.
        boundary: the place of the first token of the second segment; None finds it from `token_type_ids`.
        generate: the most tokens to generate first, greedily; they are read like the others, and underlined.
        prompt: the number of tokens that were read, if the others were generated before.
        neurons: whether queries and keys are kept, for the neuron view.

    Raises:
        OptionError: the maps would not fit into memory, or a layer has none.
    """
    here = host(model)
    given = _one_item(here, inputs, more, item)
    if generate:
        prompt, given = _generated(here, given, generate)
    record = _Capture(here, None if layers is None else set(layers), neurons)
    with apply(here.model, record, on="all" if here.config.is_encoder_decoder else "auto"):
        here.model(**given)
    if not record.maps:
        raise OptionError(f"layers={sorted(record.layers or ())} must be some of the model's layers; none of them ran")
    named = labels(here, given, tokenizer, tokens, decoder_tokens)
    stacks = {part: record.stack(part, named, boundary, prompt) for part in record.parts()}
    return AttentionView.of(stacks, type(here.model).__name__)


@final
class _Capture(Method):
    """Record weights, queries and keys of the first item of a batch, by part of the model."""

    def __init__(self, here: Host, layers: set[int] | None, neurons: bool) -> None:
        self.layers, self.neurons = layers, neurons
        self.pair = bool(here.config.is_encoder_decoder)
        encoder = here.model.get_encoder() if self.pair else None
        self.encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
        self.count: dict[str, int] = {}
        self.maps: dict[str, dict[tuple[int, int], Tensor]] = {}
        self.products: dict[str, dict[int, Products]] = {}
        self.bytes = 0

    def read(self, site: Site, out: Tensor) -> None:
        part, layer = self._place(site)
        if self.layers is not None and layer not in self.layers:
            return
        if site.replaced:
            raise UnsupportedModel(f"layer {layer} has no weights: another method replaced its attention")
        n, m = site.q.shape[2], site.k.shape[2]
        self.bytes += 4 * site.q.shape[1] * n * m
        if self.bytes > MOST:
            raise OptionError(
                f"maps of {site.q.shape[1]} heads over {n:,} × {m:,} tokens do not fit into {MOST >> 30} GiB: give "
                f"layers=, or foveate.look(..., keep_maps=...).view()"
            )
        tile = weight_tile(site, slice(0, n))
        whole = torch.zeros(site.q.shape[1], n, m)
        whole[..., tile.keys] = tile.weights[0].float().cpu()
        self.maps.setdefault(part, {}).update({(layer, head): each for head, each in enumerate(whole)})
        if self.neurons:
            self.products.setdefault(part, {})[layer] = _products(site)

    def _place(self, site: Site) -> tuple[str, int]:
        """Return the part of the model that a call belongs to, and the number of its layer."""
        part = ""
        if self.pair:
            causal = bool(getattr(site.module, "is_causal", False))
            part = "encoder" if site.module in self.encoder else "decoder" if causal else "cross"
        at = self.count.get(part, 0)  # some models share a module between layers, so that the calls are counted
        self.count[part] = at + 1
        return part, at

    def parts(self) -> list[str]:
        return [part for part in ("", "encoder", "decoder", "cross") if part in self.maps]

    def stack(self, part: str, named: Labels, boundary: int | None, prompt: int | None) -> Stack:
        """Return a part's maps over its tokens that are no padding."""
        maps, products = self.maps[part], self.products.get(part, {})
        n, m = next(iter(maps.values())).shape
        rows, keys = named.side(part, "queries", n), named.side(part, "keys", m)
        if not bool(rows.real.all() and keys.real.all()):
            kept = rows.real.nonzero().flatten(), keys.real.nonzero().flatten()
            maps = {at: weights[kept[0]][:, kept[1]] for at, weights in maps.items()}
            products = {layer: each.only(*kept) for layer, each in products.items()}
        own = part != "cross"
        found = boundary if boundary is not None else named.boundary
        return Stack(
            maps, rows.texts, keys.texts, list(range(len(rows.texts))) if own else None,
            found if own and part in ("", "encoder") else None, products,
            named.grid if part == "" else None, named.image if part == "" else None,
            prompt if part in ("", "decoder") else None,
        )  # fmt: skip


def _products(site: Site) -> Products:
    """Return the first item's queries and keys, and what the model adds to their products."""
    mask, bias = site.mask, None
    if mask is not None and mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min / 2
        bias = mask[0].masked_fill(mask[0] < least, 0.0).float().cpu()
        bias = bias.expand(bias.shape[0], site.q.shape[2], site.k.shape[2]).clone()
    sinks = None
    if site.sinks is not None:
        if site.sinks.shape[2] > 1:
            raise UnsupportedModel(f"{type(site.module).__name__} has a sink for each query; give neurons=False")
        sinks = site.sinks[0].flatten().float().cpu()
    return Products(site.q[0].float().cpu(), site.k[0].float().cpu().clone(), site.scale, bias, site.softcap, sinks)


def _one_item(here: Host, inputs: Tensor | Mapping[str, Any], more: dict[str, Any], item: int) -> dict[str, Any]:
    """Return the inputs of one item of a batch, as a batch of one."""
    name = here.model.main_input_name
    given = {**({name: inputs} if isinstance(inputs, Tensor) else dict(inputs)), **more}
    first = given.get(name, given.get("inputs_embeds"))
    if not isinstance(first, Tensor) or not first.numel():
        raise OptionError(f"inputs must hold {name} of at least one token; got {', '.join(given) or 'nothing'}")
    size = len(first)
    validate.count("item", item)
    if item >= size:
        raise OptionError(f"item={item} must be in 0..{size - 1}, the items of the batch")
    return {
        each: value[item : item + 1] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for each, value in given.items()
    }


def _generated(here: Host, given: dict[str, Any], count: int) -> tuple[int, dict[str, Any]]:
    """Generate greedily; return the number of tokens before that, and the inputs with the new tokens."""
    validate.count("generate", count)
    if not here.model.can_generate():
        raise UnsupportedModel(f"{type(here.model).__name__} generates no text; give generate=0")
    found = here.model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=count)
    if here.config.is_encoder_decoder:
        start = given.get("decoder_input_ids")
        return 1 if start is None else start.shape[1], {**given, "decoder_input_ids": found}
    ids = given["input_ids"]
    new = found.shape[1] - ids.shape[1]
    longer = {**given, "input_ids": found}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in given:
            longer[name] = torch.cat([given[name], given[name].new_full((1, new), fill)], 1)
    real: Bool[Tensor, " n"] = given.get("attention_mask", torch.ones_like(ids))[0].bool()
    return int(real.sum()), longer
