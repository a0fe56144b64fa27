"""A cache that several methods start from, each with its own copy."""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def can_copy(cache: DynamicCache) -> bool:
    """Return whether a copy of the cache shares nothing with it: all its layers store keys and values as tensors."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """Copy a cache with its tensors."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, value.clone())
    return found


def without_first(read: float, first: float, steps: int) -> float:
    """Return the mean share read after the first step, from the mean over all steps and the first step's share."""
    return (read * steps - first) / (steps - 1) if steps > 1 else first
