"""Whole attention maps of a model, for analyses of short texts: O(N²) memory for every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import UnsupportedModel
from foveate.host.entry import apply
from foveate.host.site import Site
from foveate.host.weight_tiles import weight_tile
from foveate.lens.parts.inputs import by_name
from foveate.lens.parts.stack import ByLayer, Part, covering


@torch.no_grad()
def attention_maps(
    model: object, inputs: Tensor | Mapping[str, Any], *, part: Part = "auto", **more: Any
) -> Float[Tensor, "b l h n s"]:
    """Run a model once and return the weights of all its heads; rows of padding are zero.

    Use `foveate.look` for long texts: its measures need no maps.

    Args:
        model: a model that reads a whole text at once.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        part: see `foveate.lens.Lens`; "cross" gives rows of the decoder's tokens over those of the encoder.
    """
    record = _Maps(part)
    with apply(model, record, on=covering(part)) as run:
        run.host.model(**by_name(run.host.model, inputs), **more)
    if not record.found:
        raise UnsupportedModel(f"part={part!r}: {type(run.host.model).__name__} made no such call")
    maps = [record.found[layer] for layer in sorted(record.found)]
    if len({each.shape for each in maps}) > 1:
        raise UnsupportedModel(
            f"{type(run.host.model).__name__} has layers of different sizes, whose maps are not one tensor: use "
            f"foveate.look(..., keep_maps=...)"
        )
    return torch.stack(maps, 1)


@final
class _Maps(ByLayer[Tensor]):
    """Record the maps of all layers of a part."""

    def record(self, site: Site) -> Float[Tensor, "b h n s"]:
        return whole_map(site)


def whole_map(site: Site) -> Float[Tensor, "b h n s"]:
    """Return all weights of a call; refuse self-attention that is not over a whole text."""
    name = type(site.module).__name__
    if site.replaced:
        raise UnsupportedModel(f"{name} has no weights: another method replaced the attention of layer {site.layer}")
    if not site.crosses and site.q.shape[2] != site.k.shape[2]:
        raise UnsupportedModel(f"{name} attends from {site.q.shape[2]} tokens to {site.k.shape[2]}; maps need one text")
    tile = weight_tile(site, slice(0, site.q.shape[2]))
    whole = tile.weights.new_zeros(*tile.weights.shape[:3], site.k.shape[2])
    whole[..., tile.keys] = tile.weights
    return whole
