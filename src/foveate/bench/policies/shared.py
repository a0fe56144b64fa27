"""One dense reading of a prompt, from which every policy goes on by itself.

All cache policies read a prompt that comes in one piece densely, so that one reading serves them all. The policy comes
in with the prompt's last token. For policies that evict, and for those that choose from the last query, that is what
they do by themselves, up to rounding; a policy that reads sparsely already makes its first choice one token earlier
than it would. Times are never taken this way, see `times.py`.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.parts.timing import now
from foveate.host import Method, apply


@dataclass(frozen=True)
class Reading:
    """Prompts of one length, read up to their last token.

    Args:
        ids: `(B, N)`.
        cache: of the first `N - 1` tokens.
    """

    ids: Tensor
    cache: DynamicCache


@dataclass(frozen=True)
class Continued:
    """What came after a reading.

    Args:
        ids: `(B, T)`: what the model said, or would have said.
        losses: `(B, T)` next-token losses of what was forced; None where the model spoke.
        kept: share of the full cache's slots that is stored.
        read: share of the keys that queries read, after the prompt's last token.
        bytes: of the keys and values that are stored.
        live: of all tensors that are alive beyond those from before; 0 where they were not counted.
        seconds: of each step; the first one is the prompt's last token.
    """

    ids: Tensor
    losses: Tensor | None
    kept: float
    read: float
    bytes: int
    live: int
    seconds: tuple[float, ...]


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Tensor) -> Reading:
    """Read prompts densely, all but the last token."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Reading(ids, cache)


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache of its own with the same content."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, value.clone())
    return made


@torch.inference_mode()
def go_on(
    model: PreTrainedModel,
    methods: tuple[Method, ...],
    reading: Reading,
    steps: int,
    forced: Tensor | None = None,
    weigh: bool = False,
) -> Continued:
    """Continue a copy of a reading under methods.

    Args:
        steps: tokens to say.
        forced: `(B, steps)` tokens to continue with, whatever the model says.
        weigh: whether to count the memory.
    """
    before = alive(model.device) if weigh else 0
    cache, first = copied(reading.cache), 1.0
    spoken: list[tuple[Tensor, Tensor, float]] = []
    with apply(model, *methods) as run:
        for step in _spoken(model, cache, reading.ids[:, -1:], steps, forced):
            first = first if spoken else run.stats.read
            spoken.append(step)
        said, losses, seconds = zip(*spoken, strict=True)
        return Continued(
            ids=torch.stack(said, 1),
            losses=torch.stack(losses, 1) if forced is not None else None,
            kept=run.stats.kept,
            read=_since(run.stats.read, first, steps),
            bytes=run.stats.cache_bytes,
            live=alive(model.device) - before if weigh else 0,
            seconds=seconds,
        )


def _spoken(
    model: PreTrainedModel, cache: DynamicCache, feed: Tensor, steps: int, forced: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Step by step: the tokens that come out best, the loss of those that were to come, and the seconds."""
    for step in range(steps):
        begun = now(model.device)
        logits = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        best = logits.argmax(-1)
        seconds = now(model.device) - begun
        next_ones = best if forced is None else forced[:, step]
        yield best, F.cross_entropy(logits.float(), next_ones, reduction="none"), seconds
        feed = next_ones[:, None]


def _since(read: float, first: float, steps: int) -> float:
    """The mean share that was read after the first of several steps, from the mean over all and that of the first."""
    return (read * steps - first) / (steps - 1) if steps > 1 else first


def alive(device: torch.device) -> int:
    """Bytes of every tensor that Python can reach; on CUDA the allocator's count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
