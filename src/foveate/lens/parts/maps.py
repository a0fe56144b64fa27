"""Whole attention maps of a model, for analyses of short texts: O(N²) memory for every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.model import host
from foveate.lens.lens import look


def attention_maps(model: object, inputs: Tensor | Mapping[str, Any], **more: Any) -> Float[Tensor, "b l h n n"]:
    """Run a model once and return the weights of all its heads; rows of padding are zero.

    Use `foveate.look` for long texts: its measures need no maps.

    Args:
        model: any transformers model that `foveate.look` takes.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
    """
    at = host(model)
    every = {(layer, head): slice(None) for layer in range(at.layers) for head in range(at.heads)}
    seen = look(model, inputs, measures=(), keep_maps=every, **more)
    for layer, reason in seen.lens.unseen.items():
        raise UnsupportedModel(f"layer {layer} of {type(at.model).__name__} has no weights: {reason}")
    layers = [torch.stack([seen.map(layer, head) for head in range(at.heads)], 1) for layer in range(at.layers)]
    return torch.stack(layers, 1)
