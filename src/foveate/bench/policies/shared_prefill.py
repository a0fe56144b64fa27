"""One dense prefill of a prompt, after which policies decode on their own copies of the cache.

Policies that need no query of the prompt but its last share the prefill (`foveate.bench.known.SHARING`). Such a policy
is applied at the prompt's last token. Those that need a window of last queries are applied to the last 128 tokens
(`SHARING_ALL_BUT_LAST`). For policies that evict, and for those that select by the last query, this equals their own
prefill up to rounding; a policy that reads sparsely makes its first selection one token early. Policies that score
tokens by all of the prompt's queries read the prompt themselves. Prefill times are never measured this
way, see `times.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.known import LAST
from foveate.bench.parts.cache_copy import copy_cache, without_first
from foveate.bench.parts.timing import now
from foveate.host import Method, apply


@dataclass(frozen=True)
class Prefilled:
    """Prompts of equal length, read up to their last token.

    Args:
        ids: `(B, N)`.
        cache: the cache of the first `N - 1` tokens.
        earlier: the cache of the tokens before the last `LAST`; empty if there are none.
    """

    ids: Tensor
    cache: DynamicCache
    earlier: DynamicCache

    def copy(self, own: int) -> tuple[DynamicCache, Tensor]:
        """Return a cache to decode on, and the tokens that are left to read: `own`, or all if there are fewer."""
        return copy_cache(self.cache if own == 1 else self.earlier), self.ids[:, -own:]


@dataclass(frozen=True)
class Decoded:
    """The tokens decoded after a prefill, and their cost.

    Args:
        ids: `(B, T)`: the likeliest tokens, also if others were forced.
        losses: `(B, T)` next-token losses of forced tokens; None if the model generated.
        kept: the stored share of the full cache's slots.
        read: the share of the keys that queries read, after the prompt's last token.
        bytes: the bytes of the stored keys and values.
        live: the bytes of all live tensors beyond those from before; 0 if not counted.
        seconds: the time of each step; the first step is the prompt's last token, or the prompt of a method that reads
            it alone.
    """

    ids: Tensor
    losses: Tensor | None
    kept: float
    read: float
    bytes: int
    live: int
    seconds: tuple[float, ...]


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: Tensor) -> Prefilled:
    """Read prompts densely, up to the last token."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > LAST:
        model(ids[:, :-LAST], past_key_values=cache, use_cache=True, logits_to_keep=1)
    earlier = copy_cache(cache)
    model(ids[:, -LAST:-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefilled(ids, cache, earlier)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    methods: tuple[Method, ...],
    prefilled: Prefilled,
    steps: int,
    forced: Tensor | None = None,
    count_memory: bool = False,
    own: int | None = 1,
) -> Decoded:
    """Decode from a copy of a prefill, under methods.

    Args:
        steps: the number of tokens.
        forced: `(B, steps)` tokens to continue with instead of the model's own.
        count_memory: True counts the live memory.
        own: how many of the prompts' last tokens the methods read themselves, in the first step: 1, `LAST`, or None for
            the whole prompts.
    """
    before = live_bytes(model.device) if count_memory else 0
    cache, feed = (DynamicCache(config=model.config), prefilled.ids) if own is None else prefilled.copy(own)
    first = 1.0
    steps_done: list[tuple[Tensor, Tensor, float]] = []
    with apply(model, *methods) as run:
        for step in _decode_steps(model, cache, feed, steps, forced):
            first = first if steps_done else run.stats.read
            steps_done.append(step)
        tokens, losses, seconds = zip(*steps_done, strict=True)
        return Decoded(
            ids=torch.stack(tokens, 1),
            losses=torch.stack(losses, 1) if forced is not None else None,
            kept=run.stats.kept,
            read=run.stats.read if own != 1 else without_first(run.stats.read, first, steps),
            bytes=run.stats.cache_bytes,
            live=live_bytes(model.device) - before if count_memory else 0,
            seconds=seconds,
        )


def _decode_steps(
    model: PreTrainedModel, cache: DynamicCache, feed: Tensor, steps: int, forced: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield each step's likeliest tokens, the loss of the next tokens, and the seconds."""
    for step in range(steps):
        start = now(model.device)
        logits = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        best = logits.argmax(-1)
        seconds = now(model.device) - start
        following = best if forced is None else forced[:, step]
        yield best, F.cross_entropy(logits.float(), following, reduction="none"), seconds
        feed = following[:, None]


def live_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors that Python can reach; on CUDA, the allocator's count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and not item.is_meta and not isinstance(item, FakeTensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
