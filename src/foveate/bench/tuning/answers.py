"""One answer under methods, from a prompt that is read as a whole, or from its beginning that settings share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.parts.cache_copy import can_copy, copy_cache
from foveate.bench.parts.timing import now
from foveate.host import Method, apply
from foveate.host.hf.cache import SlotLayer

#: The tokens at the end of a prompt that settings read themselves: policies that score by the last queries need them.
TAIL = 128


@dataclass(frozen=True)
class Answered:
    """An answer and its cost.

    Args:
        ids: the likeliest tokens, also if others were forced.
        losses: the next-token loss of each forced token.
        bytes: bytes of the cache at the end.
        seconds: of each later token.
        positions: the tokens that each layer's heads kept after the prompt; empty if none were dropped.
    """

    ids: list[int]
    losses: list[float]
    bytes: int
    seconds: list[float]
    positions: list[Tensor]


@torch.inference_mode()
def beginning(model: PreTrainedModel, ids: Tensor) -> DynamicCache | None:
    """Read a prompt densely up to its tail; None if it is short, or if the cache cannot be copied."""
    if ids.shape[1] <= 2 * TAIL:
        return None
    cache = DynamicCache(config=model.config)
    model(ids[:, :-TAIL], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache if can_copy(cache) else None


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    methods: tuple[Method, ...],
    ids: Tensor,
    steps: int,
    forced: list[int] | None = None,
    begun: DynamicCache | None = None,
) -> Answered:
    """Answer a prompt greedily, or with forced tokens.

    Args:
        ids: `(1, N)`.
        steps: the number of tokens.
        forced: tokens to continue with instead of the model's own.
        begun: the result of `beginning`, which stays as it is.
    """
    cache = DynamicCache(config=model.config) if begun is None else copy_cache(begun)
    feed, best, losses, seconds, positions = ids if begun is None else ids[:, -TAIL:], [], [], [], list[Tensor]()
    with apply(model, *methods) as run:
        for step in range(steps):
            start = now(model.device)
            logits = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            best.append(int(logits.argmax()))
            seconds.append(now(model.device) - start)
            if step == 0:
                positions = _kept(cache)
            following = best[-1] if forced is None else forced[step]
            if forced is not None:
                losses.append(float(F.cross_entropy(logits.float(), logits.new_tensor(following, dtype=torch.long))))
            feed = ids.new_tensor([[following]])
        return Answered(best, losses, run.stats.cache_bytes, seconds[1:], positions)


def _kept(cache: DynamicCache) -> list[Tensor]:
    """Return the positions that the heads of each layer hold, in order."""
    stores = [layer.store for layer in cache.layers if isinstance(layer, SlotLayer) and layer.store is not None]
    return [store.padded("positions").sort(-1).values.clone() for store in stores]


def equal(one: Answered, two: Answered) -> bool:
    """Return whether two answers come from the same tokens in the cache."""
    pairs = zip(one.positions, two.positions, strict=False)
    return len(one.positions) == len(two.positions) and all(torch.equal(a, b) for a, b in pairs)
