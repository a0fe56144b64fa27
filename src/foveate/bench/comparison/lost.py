"""The slots that the full cache looks up on examples that a method breaks, and whether the method had dropped them.

The full cache's own answer is read again, and the rows of its queries say which distant slots each head attended to.
The method then reads the same prompt and goes on with the same answer, so that both runs ask with the same tokens. A
slot counts as dropped if the same head of the method's run does not see it at the same token: it was evicted, or not
selected. Examples that the method solves are read too, a few, since only the difference between both says something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.bench.comparison.encoding import IN_SENTENCES, Prompt
from foveate.bench.comparison.evaluation import Evaluation
from foveate.bench.comparison.method_run import MethodRun
from foveate.bench.comparison.rows import LookedUp, Row
from foveate.bench.known import FULL
from foveate.bench.parts import digest
from foveate.bench.parts.journal import Journal
from foveate.host import Method, apply
from foveate.host.lookups import LookUpReader, LookUps, VisibilityReader

SINK, NEAR = 4, 32  # tokens at the prompt's start and end whose slots are no look-ups
SOLVED = 4  # solved examples that are read for each method
_HEADS, _SLOTS, _AROUND = 12, 3, 4  # heads and slots that are named, and tokens shown on each side of a slot
_LONGEST = 32  # tokens of an answer whose queries are read
_FORMAT = "lost/1"


class Losses:
    """Finds what methods lost, and records it.

    Args:
        model: a decoder.
        environment: the digest of the model and of all else that is common to all answers.
        journal: holds known results, and receives new ones.
        evaluation: the prompts and their score.
        say: receives the progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        environment: str,
        journal: Journal,
        evaluation: Evaluation,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.environment, self.journal = model, environment, journal
        self.evaluation, self.say = evaluation, say

    def add(self, rows: Sequence[Row], runs: Sequence[MethodRun]) -> list[Row]:
        """Return the rows with what each method lost."""
        base = next((index for index, run in enumerate(runs) if run.contender.key == FULL), None)
        if base is None or not rows[base].answers:
            return list(rows)
        wanted = [
            {} if index == base else examples_of(row, rows[base]) for index, row in enumerate(rows)
        ]  # fmt: skip
        found: list[list[LookedUp]] = [[] for _ in rows]
        for example in sorted({example for each in wanted for example in each}):
            answer = self._answer(runs[base], example)
            source: list[LookUps] = []  # read once, if any method needs it
            for index, run in enumerate(runs):
                if example in wanted[index] and answer.numel():
                    self.say(f"what was lost: {run.label}, example {example + 1}")
                    found[index].append(self._known(run, example, answer, wanted[index][example], source))
        return [replace(row, lost=lost) for row, lost in zip(rows, found, strict=True)]

    def _answer(self, base: MethodRun, example: int) -> Tensor:
        """Return the ids `(1, M)` of the full cache's own answer, up to its end."""
        prompt, ids = self.evaluation.prompts[example], list(base.records[example]["ids"])
        end = next((at for at, token in enumerate(ids) if token in self.evaluation.stops), len(ids))
        expected = 0 if prompt.answer_ids is None else prompt.answer_ids.shape[1]
        most = _LONGEST if self.evaluation.metric in IN_SENTENCES or not expected else min(_LONGEST, expected)
        return prompt.ids.new_tensor([ids[: min(end, most)]])

    def _known(self, run: MethodRun, example: int, answer: Tensor, solved: bool, source: list[LookUps]) -> LookedUp:
        prompt = self.evaluation.prompts[example]
        key = digest.of(
            self.environment, run.contender.identity, prompt.ids.tolist(), answer.tolist(), _FORMAT, SINK, NEAR
        )
        known = self.journal.get(key)
        if known is None:
            if not source:
                source.append(looked_up(self.model, prompt.ids, answer))
            seen = visible(self.model, run.contender.at(prompt.ids.shape[1]), prompt.ids, answer, source[0])
            known = self._summary(source[0], seen, prompt, answer.shape[1])
            self.journal.add({key: known})
        numbers = {name: math.nan if known[name] is None else known[name] for name in ("mass", "dropped")}
        return LookedUp(example=example, solved=int(solved), **{**known, **numbers})

    def _summary(self, lookups: LookUps, seen: Tensor, prompt: Prompt, steps: int) -> dict[str, Any]:
        """Return the mass per query, the share that was dropped, and the slots and heads with the most mass."""
        known, text = seen >= 0, self.evaluation.tokenizer.decode
        mass, gone = lookups.mass.double() / steps, seen == 0

        def share(where: Tensor) -> float | None:
            counted = mass[where & known].sum()
            return float(mass[where & gone].sum() / counted) if counted > 0 else None

        heads: dict[str, list[float | None]] = {}
        for layer, head in _largest(torch.stack([lookups.layer, lookups.head], 1), mass, _HEADS):
            own = (lookups.layer == layer) & (lookups.head == head)
            heads[f"{layer}.{head}"] = [float(mass[own].sum()), share(own)]
        slots, ids = [], prompt.ids[0].tolist()
        for (slot,) in _largest(lookups.slot[:, None], mass, _SLOTS):
            slots.append(f"{slot}: {text(ids[max(0, slot - _AROUND) : slot + _AROUND + 1])}")
        return {
            "mass": float(mass.sum()), "dropped": share(torch.ones_like(known)), "slots": slots, "heads": heads,
        }  # fmt: skip


def examples_of(row: Row, base: Row) -> dict[int, bool]:
    """Return the examples to read: all that the full cache solves and the method does not, and some that both solve."""
    if len(row.answers) != len(base.answers):
        return {}
    solved = [
        (index, own.score >= full.score - 1e-9)
        for index, (own, full) in enumerate(zip(row.answers, base.answers, strict=True))
        if full.score >= 1 - 1e-9 and not own.error
    ]
    kept = [index for index, both in solved if both][:SOLVED]
    return {index: both for index, both in solved if not both or index in kept}


@torch.inference_mode()
def looked_up(model: PreTrainedModel, ids: Tensor, answer: Tensor) -> LookUps:
    """Return the distant slots that the queries of an answer attend to, with the full cache.

    Args:
        model: a decoder.
        ids: `(1, N)`, the prompt.
        answer: `(1, M)`. Its first token's query is the prompt's last token.
    """
    reader = LookUpReader(answer.shape[1], SINK, ids.shape[1] - NEAR)
    whole = torch.cat([ids, answer[:, :-1]], 1)
    with apply(model, reader):
        model(whole, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return reader.found()


@torch.inference_mode()
def visible(
    model: PreTrainedModel, methods: tuple[Method, ...], ids: Tensor, answer: Tensor, lookups: LookUps
) -> Tensor:
    """Return for each look-up whether methods let the same head see its slot: 1, 0, or -1 if that is unknown."""
    reader, cache = VisibilityReader(lookups, ids.shape[1]), DynamicCache(config=model.config)
    with apply(model, *methods, reader):
        for piece in (ids, *answer[:, :-1].split(1, 1)):
            if piece.shape[1]:
                model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return reader.seen


def _largest(groups: Tensor, mass: Tensor, count: int) -> list[list[int]]:
    """Return the groups `(n, columns)` with the largest sums of mass."""
    if not len(groups):
        return []
    unique, inverse = groups.unique(dim=0, return_inverse=True)
    sums = mass.new_zeros(len(unique)).index_add(0, inverse, mass)
    return unique[sums.argsort(descending=True, stable=True)[:count]].tolist()
