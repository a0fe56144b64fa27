"""Let a model read tokens after its cache, for a measurement, and remove them again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.hybrid import STATE


def read_and_remove(
    decoder: nn.Module,
    cache: Cache,
    past: Bool[Tensor, "b p"],
    ids: Int[Tensor, "b n"],
    real: Bool[Tensor, "b n"],
) -> None:
    """Call a decoder on more tokens, and restore its cache.

    Args:
        decoder: the decoder.
        cache: its cache, from which no later token has been dropped.
        past: the tokens of the cache that count; the others are padding, or will be removed.
        ids: the tokens.
        real: which of them count.
    """
    given: dict[str, Any] = {}
    whole = torch.cat([past, real], 1)
    if not bool(whole.all()):
        given["attention_mask"] = whole.long()
        given["position_ids"] = (whole.long().cumsum(1) - 1).clamp_min(0)[:, past.shape[1] :]
    states = [_state(layer) for layer in cache.layers]
    lengths = [layer.seen if isinstance(layer, SlotLayer) else None for layer in cache.layers]
    try:
        with torch.no_grad():
            decoder(input_ids=ids, past_key_values=cache, use_cache=True, **given)
    except TypeError as error:
        raise UnsupportedModel(f"{type(decoder).__name__} cannot read padded text a second time: {error}") from None
    finally:
        for layer, state, length in zip(cache.layers, states, lengths, strict=False):
            vars(layer).update(state)
            if isinstance(layer, SlotLayer) and length is not None and layer.seen > length:
                SlotLayer.crop(layer, length - layer.seen)


def _state(layer: object) -> dict[str, Any]:
    """Return a copy of the state that a convolution or linear attention keeps; empty for other layers."""
    return {name: copy.deepcopy(value) for name, value in vars(layer).items() if name in STATE}
