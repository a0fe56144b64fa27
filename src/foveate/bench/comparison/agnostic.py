"""Answer questions about contexts that a method compressed before it knew them: the query-agnostic score.

Each context is read and compressed once, and every question about it continues from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from foveate.bench.comparison.encoding import Prompt
from foveate.bench.parts import digest
from foveate.host import Method, apply
from foveate.host.context import Context
from foveate.host.hf.adoption import end_prompt
from foveate.host.hf.marks import Mark


@dataclass(frozen=True)
class SharedContext:
    """Prompts that begin with the same context.

    Args:
        ids: `(1, N)`, the context.
        indices: the prompts' indices in the task.
        questions: the ids `(1, M)` of each prompt after the context.
        steps: how many tokens to generate for each.
        forced: the ids of each answer whose loss is measured; None lets the model answer.
    """

    ids: Tensor
    indices: tuple[int, ...]
    questions: tuple[Tensor, ...]
    steps: tuple[int, ...]
    forced: tuple[list[int], ...] | None = None

    def identity(self, at: int) -> str:
        """Return the digest of the model's input for one question."""
        forced = None if self.forced is None else self.forced[at]
        return digest.of("query-agnostic", self.ids.tolist(), self.questions[at].tolist(), self.steps[at], forced)


def shared_contexts(prompts: Sequence[Prompt], forced: Sequence[list[int]] | None) -> list[SharedContext]:
    """Group the prompts that have a context and fit into the model's by their contexts, in the order of the task."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if 0 < prompt.context_tokens < prompt.ids.shape[1] and not prompt.excess:
            groups.setdefault(tuple(prompt.ids[0, : prompt.context_tokens].tolist()), []).append(index)
    found = []
    for key, indices in groups.items():
        chosen = [prompts[index] for index in indices]
        found.append(
            SharedContext(
                chosen[0].ids[:, : len(key)],
                tuple(indices),
                tuple(prompt.ids[:, len(key) :] for prompt in chosen),
                tuple(prompt.new_tokens for prompt in chosen),
                None if forced is None else tuple(forced[index] for index in indices),
            )
        )
    return found


@torch.no_grad()
def answer(model: PreTrainedModel, methods: tuple[Method, ...], shared: SharedContext) -> list[dict[str, Any]]:
    """Read the context under the methods, then answer its questions; return the journal's records.

    A record has the answer's ids, the mean loss of a forced answer, and the share of the context's cache that is kept.
    """
    with Context(model, *methods) as context:
        context.read(shared.ids)
        mark, kept, found = Mark(context.cache), context.kept, []
        for at, question in enumerate(shared.questions):
            forced = None if shared.forced is None else shared.forced[at]
            steps = shared.steps[at] if forced is None else len(forced)
            end_prompt(mark.cache, None, mark.seen)
            with apply(model, *methods, evict="after prompt"):
                try:
                    ids, loss = _decoded(model, mark.cache, question, steps, forced)
                finally:
                    mark.rewind()
            found.append({"ids": ids, "loss": loss, "cache_kept": kept})
    return found


def _decoded(
    model: PreTrainedModel, cache: Any, feed: Tensor, steps: int, forced: list[int] | None
) -> tuple[list[int], float | None]:
    """Decode greedily after a question; or measure the mean loss of a forced answer."""
    ids, losses = [], []
    for step in range(steps):
        logits = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        best = logits.argmax(-1)
        ids.append(int(best))
        if forced is not None:
            best = best.new_tensor([forced[step]])
            losses.append(float(F.cross_entropy(logits.float(), best)))
        feed = best[:, None]
    return ids, sum(losses) / len(losses) if losses else None
