"""One method on one batch of prompts: what it answers, how long it takes, what it keeps and what it holds in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.comparison.encoding import Prompt
from foveate.bench.parts import digest
from foveate.bench.parts.memory import Memory
from foveate.bench.parts.timing import now
from foveate.host import Host, Method, apply
from foveate.kv.renumbered import Renumbered

#: What a model says whose layers keep states of their own, and which no method can be put on: all that it keeps.
_WHOLE = SimpleNamespace(stats=SimpleNamespace(kept=1.0, read=1.0))
_ALIKE = 1.1  # prompts of a batch are at most this much longer than its shortest, for which its budget is set


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the left.

    Args:
        places: of the prompts in the task.
        prompts: themselves.
        forced: `(B, N)` ids to continue with whatever the model says, -1 where one's answer has ended; None lets the
            model continue with what it says itself.
        pad: the id to pad with.
    """

    places: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    forced: Tensor | None = None
    pad: int = 0

    @property
    def length(self) -> int:
        """Tokens of the shortest prompt."""
        return min(prompt.ids.shape[1] for prompt in self.prompts)

    @property
    def steps(self) -> int:
        return max(prompt.new_tokens for prompt in self.prompts) if self.forced is None else self.forced.shape[1]

    @property
    def beyond(self) -> Prompt | None:
        """A prompt that the model's context does not hold."""
        return next((prompt for prompt in self.prompts if prompt.beyond), None)

    @cached_property
    def identity(self) -> str:
        """The digest of what the model is asked."""
        forced = None if self.forced is None else self.forced.tolist()
        return digest.of([prompt.ids.tolist() for prompt in self.prompts], self.steps, forced)

    @cached_property
    def ids(self) -> Tensor:
        longest = max(prompt.ids.shape[1] for prompt in self.prompts)
        rows = [F.pad(prompt.ids, (longest - prompt.ids.shape[1], 0), value=self.pad) for prompt in self.prompts]
        return torch.cat(rows)

    def padding(self, step: int, has_positions: bool) -> dict[str, Tensor]:
        """The mask and the positions of a step; nothing where no prompt is padded."""
        if len({prompt.ids.shape[1] for prompt in self.prompts}) == 1:
            return {}
        total = self.ids.shape[1] + step
        begins = torch.tensor([[self.ids.shape[1] - prompt.ids.shape[1]] for prompt in self.prompts])
        key = torch.arange(total, device=self.ids.device)
        begins = begins.to(self.ids.device)
        found = {"attention_mask": (key >= begins).long()}
        if has_positions:
            positions = (key - begins).clamp_min(0)
            found["position_ids"] = positions[:, -1:] if step else positions
        return found


@dataclass(frozen=True)
class Said:
    """The result of a batch.

    Args:
        ids: of each prompt's answer.
        losses: mean next-token loss of each forced answer; None where nothing was forced.
        prefill_ms, decode_ms: for one prompt of the batch, and for one token of one prompt (a median over the steps).
        kept, read: shares of the full cache.
    """

    ids: list[list[int]]
    losses: list[float] | None
    prefill_ms: float
    decode_ms: float
    kept: float
    read: float


def batches(prompts: Sequence[Prompt], size: int, forced: Sequence[list[int]] | None, pad: int) -> list[Batch]:
    """Prompts in batches of at most `size`, of neighbours in length; in the task's order where each runs alone."""
    order = list(range(len(prompts)))
    if size > 1:
        order.sort(key=lambda place: prompts[place].ids.shape[1])
    groups: list[list[int]] = []
    for place in order:
        first = prompts[groups[-1][0]].ids.shape[1] if groups else 0
        fits = groups and len(groups[-1]) < size and prompts[place].ids.shape[1] <= _ALIKE * first
        if fits and bool(prompts[place].beyond) == bool(prompts[groups[-1][0]].beyond):
            groups[-1].append(place)
        else:
            groups.append([place])
    return [
        Batch(
            tuple(group),
            tuple(prompts[place] for place in group),
            None if forced is None else _rectangle([forced[place] for place in group], prompts[0].ids),
            pad,
        )
        for group in groups
    ]


def _rectangle(rows: list[list[int]], like: Tensor) -> Tensor:
    longest = max(map(len, rows))
    return like.new_tensor([row + [-1] * (longest - len(row)) for row in rows])


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    methods: tuple[Method, ...],
    batch: Batch,
    steps: int | None = None,
    look: Callable[[int], None] | None = None,
) -> Said:
    """Greedy answers of a batch, or the losses of those that are forced.

    Args:
        steps: another number of tokens than the batch's own.
        look: called after the prompt and after each token, while everything is as the model left it.
    """
    cache, feed, said, seconds, losses = DynamicCache(config=model.config), batch.ids, [], [], []
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    with _applied(model, methods) as run:
        for step in range(steps or batch.steps):
            padding = batch.padding(step, has_positions)
            begun = now(model.device)
            for piece, given in _pieces(feed, padding, _longest(methods, batch)):
                logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1, **given).logits[:, -1]
            best = logits.argmax(-1)
            said.append(best.tolist())
            seconds.append(now(model.device) - begun)
            if batch.forced is not None:
                best = batch.forced[:, step]
                losses.append(F.cross_entropy(logits.float(), best, ignore_index=-1, reduction="none"))
                best = best.clamp_min(0)
            feed = best[:, None]
            del logits, padding, piece, given
            if look is not None:
                look(step)
    each = len(batch.prompts)
    later = seconds[1:] or [float("nan")]
    return Said(
        [list(row) for row in zip(*said, strict=True)], _mean_losses(losses, batch.forced),
        1e3 * seconds[0] / each, 1e3 * median(later) / each, run.stats.kept, run.stats.read,
    )  # fmt: skip


def _longest(methods: tuple[Method, ...], batch: Batch) -> int | None:
    """Tokens of a prompt that are read at once; None for all. One that the model's context does not hold is read in
    pieces where positions are renumbered: half of the context is for what is kept.
    """
    prompt = batch.beyond
    if prompt is None or prompt.context is None or not any(isinstance(method, Renumbered) for method in methods):
        return None
    return max(1, prompt.context // 2 - prompt.new_tokens)


def _pieces(
    feed: Tensor, padding: dict[str, Tensor], longest: int | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A call's tokens, or pieces of at most `longest`, with their part of the mask and of the positions."""
    n = feed.shape[1]
    if longest is None or n <= longest:
        yield feed, padding
        return
    for start in range(0, n, longest):
        end = min(n, start + longest)
        cut = {"attention_mask": slice(0, end), "position_ids": slice(start, end)}
        yield feed[:, start:end], {name: x[:, cut[name]] for name, x in padding.items()}


def memory(model: PreTrainedModel, methods: tuple[Method, ...], batch: Batch) -> list[float]:
    """Megabytes of tensors beyond the weights: alive after the prompt, alive after the answer, and most at any time."""
    last, marks, _ = batch.steps - 1, {}, batch.ids  # the prompt itself is made before anything is counted
    with Memory(model.device) as counted:

        def look(step: int) -> None:
            if step in (0, last):
                marks[step] = counted.now

        answer(model, methods, batch, look=look)
        return [marks[0] / 1e6, marks[last] / 1e6, counted.peak / 1e6]


def _mean_losses(losses: list[Tensor], forced: Tensor | None) -> list[float] | None:
    if forced is None:
        return None
    counted = (forced[:, : len(losses)] >= 0).sum(1).clamp_min(1)
    return (torch.stack(losses, 1).sum(1) / counted).tolist()


def _applied(model: PreTrainedModel, methods: tuple[Method, ...]) -> AbstractContextManager[Any]:
    if not methods and not Host(model).attention_modules():
        return nullcontext(_WHOLE)
    return apply(model, *methods)
