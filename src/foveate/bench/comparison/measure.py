"""Run one method on one batch of prompts, and measure its answers, times, kept cache and memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import nan
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.comparison.encoding import Prompt
from foveate.bench.parts import digest
from foveate.bench.parts.cache_copy import copy_cache, without_first
from foveate.bench.parts.memory import Memory
from foveate.bench.parts.timing import now
from foveate.host import Host, Method, apply
from foveate.kv.renumbered import Renumbered

#: The statistics of a model without attention, to which no method applies: it keeps and reads everything.
_NO_METHOD = SimpleNamespace(stats=SimpleNamespace(kept=1.0, read=1.0))
_CHECKED = 16  # tokens between two looks at whether all answers have ended
_LENGTH_RATIO = 1.1  # the largest ratio of lengths in a batch, whose budget is set for the shortest prompt


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the left.

    Args:
        indices: the prompts' indices in the task.
        prompts: the prompts.
        forced: `(B, N)` ids with which each prompt continues, -1 after its end; None lets the model generate.
        pad: the padding id.
    """

    indices: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    forced: Tensor | None = None
    pad: int = 0

    @property
    def length(self) -> int:
        """The tokens of the shortest prompt."""
        return min(prompt.ids.shape[1] for prompt in self.prompts)

    @property
    def steps(self) -> int:
        return max(prompt.new_tokens for prompt in self.prompts) if self.forced is None else self.forced.shape[1]

    @property
    def too_long(self) -> Prompt | None:
        """A prompt that exceeds the model's context, or None."""
        return next((prompt for prompt in self.prompts if prompt.excess), None)

    @cached_property
    def identity(self) -> str:
        """The digest of the model's input."""
        forced = None if self.forced is None else self.forced.tolist()
        return digest.of([prompt.ids.tolist() for prompt in self.prompts], self.steps, forced)

    @cached_property
    def ids(self) -> Tensor:
        longest = max(prompt.ids.shape[1] for prompt in self.prompts)
        rows = [F.pad(prompt.ids, (longest - prompt.ids.shape[1], 0), value=self.pad) for prompt in self.prompts]
        return torch.cat(rows)

    def padding(self, step: int, has_positions: bool, begun: bool = False) -> dict[str, Tensor]:
        """Return the mask and the positions of a step; nothing if no prompt is padded.

        With `begun`, all but the prompts' last tokens were read before the first step.
        """
        if len({prompt.ids.shape[1] for prompt in self.prompts}) == 1:
            return {}
        total = self.ids.shape[1] + step
        starts = torch.tensor([[self.ids.shape[1] - prompt.ids.shape[1]] for prompt in self.prompts])
        key = torch.arange(total, device=self.ids.device)
        starts = starts.to(self.ids.device)
        found = {"attention_mask": (key >= starts).long()}
        if has_positions:
            positions = (key - starts).clamp_min(0)
            found["position_ids"] = positions[:, -1:] if step or begun else positions
        return found


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch.

    Args:
        ids: the ids of each prompt's answer.
        losses: the mean next-token loss of each forced answer; None if nothing was forced.
        prefill_ms, decode_ms: the time per prompt, and per token of one prompt (a median over the steps). The first is
            NaN if the prompts were read before.
        kept, read: shares of the full cache.
    """

    ids: list[list[int]]
    losses: list[float] | None
    prefill_ms: float
    decode_ms: float
    kept: float
    read: float


def batches(prompts: Sequence[Prompt], size: int, forced: Sequence[list[int]] | None, pad: int) -> list[Batch]:
    """Group prompts of similar length into batches of at most `size`; with size 1 the task's order stays."""
    order = list(range(len(prompts)))
    if size > 1:
        order.sort(key=lambda index: prompts[index].ids.shape[1])
    groups: list[list[int]] = []
    for index in order:
        first = prompts[groups[-1][0]].ids.shape[1] if groups else 0
        fits = groups and len(groups[-1]) < size and prompts[index].ids.shape[1] <= _LENGTH_RATIO * first
        if fits and bool(prompts[index].excess) == bool(prompts[groups[-1][0]].excess):
            groups[-1].append(index)
        else:
            groups.append([index])
    return [
        Batch(
            tuple(group),
            tuple(prompts[index] for index in group),
            None if forced is None else _padded([forced[index] for index in group], prompts[0].ids),
            pad,
        )
        for group in groups
    ]


def _padded(rows: list[list[int]], like: Tensor) -> Tensor:
    longest = max(map(len, rows))
    return like.new_tensor([row + [-1] * (longest - len(row)) for row in rows])


@torch.inference_mode()
def read_batch(model: PreTrainedModel, batch: Batch) -> DynamicCache:
    """Read a batch's prompts densely up to their last token, for methods that can share that; see `known.SHARING`."""
    cache, padding = DynamicCache(config=model.config), batch.padding(0, _has_positions(model))
    cut = {name: x[:, :-1] for name, x in padding.items()}
    model(batch.ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1, **cut)
    return cache


@torch.inference_mode()
def run_batch(
    model: PreTrainedModel,
    methods: tuple[Method, ...],
    batch: Batch,
    steps: int | None = None,
    after_step: Callable[[int], None] | None = None,
    shared: DynamicCache | None = None,
    is_finished: Callable[[list[list[int]]], bool] | None = None,
) -> BatchResult:
    """Answer a batch greedily, or measure the losses of forced answers.

    Args:
        steps: the number of tokens, if it is not the batch's own.
        after_step: called after the prompt and after each token, before anything is released.
        shared: the result of `read_batch`, which stays as it is; None lets the methods read the prompts.
        is_finished: called now and then with the ids so far; True ends the answers early.
    """
    cache = DynamicCache(config=model.config) if shared is None else copy_cache(shared)
    feed, tokens, seconds, losses = batch.ids if shared is None else batch.ids[:, -1:], [], [], []
    has_positions = _has_positions(model)
    with _applied(model, methods) as run:
        first = 1.0
        for step in range(steps or batch.steps):
            padding = batch.padding(step, has_positions, begun=shared is not None)
            start = now(model.device)
            for piece, extra in _pieces(feed, padding, _piece_length(methods, batch)):
                logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra).logits[:, -1]
            best = logits.argmax(-1)
            tokens.append(best.tolist())
            seconds.append(now(model.device) - start)
            if batch.forced is not None:
                best = batch.forced[:, step]
                losses.append(F.cross_entropy(logits.float(), best, ignore_index=-1, reduction="none"))
                best = best.clamp_min(0)
            feed = best[:, None]
            first = run.stats.read if not step else first
            del logits, padding, piece, extra
            if after_step is not None:
                after_step(step)
            looks = is_finished is not None and batch.forced is None and step % _CHECKED == _CHECKED - 1
            if looks and is_finished([list(row) for row in zip(*tokens, strict=True)]):  # type: ignore[misc]
                break
    each = len(batch.prompts)
    later = seconds[1:] or [nan]
    prefill = 1e3 * seconds[0] / each if shared is None else nan
    read = run.stats.read if shared is None else without_first(run.stats.read, first, len(seconds))
    return BatchResult(
        [list(row) for row in zip(*tokens, strict=True)], _mean_losses(losses, batch.forced),
        prefill, 1e3 * median(later) / each, run.stats.kept, read,
    )  # fmt: skip


def _has_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _piece_length(methods: tuple[Method, ...], batch: Batch) -> int | None:
    """Return how many tokens of a prompt to read at once; None for all.

    With renumbered positions, a prompt past the model's context is read in pieces, and half of the context is left to
    the kept tokens.
    """
    prompt = batch.too_long
    if prompt is None or prompt.context is None or not any(isinstance(method, Renumbered) for method in methods):
        return None
    return max(1, prompt.context // 2 - prompt.new_tokens)


def _pieces(
    feed: Tensor, padding: dict[str, Tensor], longest: int | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield a call's tokens in pieces of at most `longest`, with their part of the mask and of the positions."""
    n = feed.shape[1]
    if longest is None or n <= longest:
        yield feed, padding
        return
    for start in range(0, n, longest):
        end = min(n, start + longest)
        cut = {"attention_mask": slice(0, end), "position_ids": slice(start, end)}
        yield feed[:, start:end], {name: x[:, cut[name]] for name, x in padding.items()}


def memory_use(model: PreTrainedModel, methods: tuple[Method, ...], batch: Batch) -> list[float]:
    """Return megabytes beyond the weights: live after the prompt, live after the answer, and the peak."""
    last, marks, _ = batch.steps - 1, {}, batch.ids  # `batch.ids` is created before counting starts
    with Memory(model.device) as counted:

        def after_step(step: int) -> None:
            if step in (0, last):
                marks[step] = counted.now

        run_batch(model, methods, batch, after_step=after_step)
        return [marks[0] / 1e6, marks[last] / 1e6, counted.peak / 1e6]


def _mean_losses(losses: list[Tensor], forced: Tensor | None) -> list[float] | None:
    if forced is None:
        return None
    counted = (forced[:, : len(losses)] >= 0).sum(1).clamp_min(1)
    return (torch.stack(losses, 1).sum(1) / counted).tolist()


def _applied(model: PreTrainedModel, methods: tuple[Method, ...]) -> AbstractContextManager[Any]:
    if not methods and not Host(model).attention_modules():
        return nullcontext(_NO_METHOD)
    return apply(model, *methods)
