"""One method on one task: what it answers, how long it takes and what it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.encoding import Prompt
from foveate.bench.memory import peak_bytes
from foveate.bench.methods import Candidate
from foveate.bench.results import Answer, Row
from foveate.host import Host, apply
from foveate.tasks.base import Task

#: What a model says whose layers keep states of their own, and which no method can be put on: all that it keeps.
_WHOLE = SimpleNamespace(stats=SimpleNamespace(kept=1.0, read=1.0))


@torch.inference_mode()
def measure(
    candidate: Candidate,
    task: Task,
    batch: list[Prompt],
    model: PreTrainedModel,
    tokenizer: Any,
    tick: Callable[[], None],
) -> Row:
    """Run every prompt under the candidate's methods, greedily."""
    answers, prefill, decode, kept, read = [], [], [], [], []
    _answer(candidate, batch[0], model)  # the first call of anything is slow
    for prompt in batch:
        ids, seconds, run = _answer(candidate, prompt, model)
        output = tokenizer.decode(ids, skip_special_tokens=True)
        answers.append(Answer(prompt.example.prompt, prompt.example.answer, output, task.score(prompt.example, output)))
        prefill.append(seconds[0])
        decode += seconds[1:]
        kept.append(run.stats.kept)
        read.append(run.stats.read)
        tick()
    longest = max(batch, key=lambda prompt: prompt.ids.shape[1])
    return Row(
        method=candidate.key, title=candidate.title, options=candidate.options,
        score=fmean(answer.score for answer in answers), cache_kept=fmean(kept), keys_read=fmean(read),
        prefill_ms=1e3 * median(prefill), decode_ms=1e3 * median(decode),
        peak_mb=peak_bytes(lambda: _answer(candidate, longest, model), model.device) / 1e6, answers=answers,
    )  # fmt: skip


def _answer(candidate: Candidate, prompt: Prompt, model: PreTrainedModel) -> tuple[list[int], list[float], Any]:
    """Greedy tokens, the seconds of the prefill and of each step, and the run with its statistics."""
    cache, ids, out, seconds = DynamicCache(config=model.config), prompt.ids, [], []
    bare = not candidate.methods and not Host(model).attention_modules()
    with nullcontext(_WHOLE) if bare else apply(model, *candidate.methods) as run:
        for _ in range(prompt.new_tokens):
            begun = _now(model)
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            seconds.append(_now(model) - begun)
            out.append(token)
            ids = prompt.ids.new_tensor([[token]])
    return out, seconds, run


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
