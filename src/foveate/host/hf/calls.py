"""Read the arguments of attention modules, and refuse calls that methods cannot handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.cache import SlotLayer
from foveate.host.site import Site

#: Arguments of an attention module that hold another sequence.
CROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")

#: The one among them of modules that only attend to another sequence. Once that is cached, it is not given again.
_ALWAYS = "cross_attention_states"


def takes_more(module: nn.Module) -> bool:
    """Return whether this module's own arguments, and not the model's, determine its cache and layer.

    Other modules need no hooks if no method has one. Hooks would double the host's cost there.
    """
    return not module.is_causal or bool({*CROSS, "layer_idx"} & set(parameters(type(module).forward)))


def crosses_to(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Return whether a call of an attention module attends to another sequence.

    Args:
        module: the attention module.
        given: its arguments by name.
    """
    return any(given.get(name) is not None for name in CROSS) or _ALWAYS in parameters(type(module).forward)


def check_expanded(site: Site) -> None:
    """Refuse keys that the model computed from the cache, if they no longer correspond to its slots."""
    assert site.slots is not None and site.slots.store is not None
    store = site.slots.store
    positions = store.padded("positions")
    if store.codes is not None:
        raise UnsupportedModel(
            f"{type(site.module).__name__} changes keys and values after the cache, so that its tokens cannot be held "
            f"encoded; use a policy that evicts"
        )
    fits = store.is_even and site.new_k.shape[2] == site.new_v.shape[2] == positions.shape[2]
    if not fits or site.q.shape[1] % positions.shape[1]:
        raise UnsupportedModel(
            f"{type(site.module).__name__} changes keys and values after the cache, so that its heads cannot keep "
            f"different tokens; use a policy that keeps the same number for every head"
        )


def sinks(options: dict[str, Any]) -> Tensor | None:
    """Return learnt logits without a key as `(1 or B, Hq, 1 or Nq, 1)`: one for each head, or for each query too."""
    fixed, by_query = options.get("s_aux"), options.get("sinks")
    return by_query if fixed is None else fixed.view(1, -1, 1, 1)


def number_of(cache: Cache, slots: SlotLayer, likely: int) -> int:
    """Return the number of a layer in its cache. A model that runs its layers several times has one for each time."""
    if likely < len(cache.layers) and cache.layers[likely] is slots:
        return likely
    return next((number for number, layer in enumerate(cache.layers) if layer is slots), likely)


@lru_cache(maxsize=256)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a forward method's arguments."""
    return tuple(inspect.signature(forward).parameters)[1:]
