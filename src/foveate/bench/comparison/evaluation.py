"""The prompts and the score of a comparison, and the rows that a method's answers give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import nan
from typing import Any

from transformers import PreTrainedModel

from foveate.bench.comparison.agnostic import shared_contexts
from foveate.bench.comparison.encoding import Prompt
from foveate.bench.comparison.measure import Batch, batches
from foveate.bench.comparison.method_run import MethodRun
from foveate.bench.comparison.results import Answer, Row
from foveate.bench.known import FULL
from foveate.bench.parts import digest
from foveate.core.errors import TaskError
from foveate.host.hf.words import end_tokens
from foveate.tasks.base import scores
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example, Task
from foveate.tasks.rules import registry


class Evaluation:
    """Prompts in batches, and the rule that scores the answers.

    Args:
        prompts: the prompts in the order of the task.
        metric: the name of the rule.
        rule: scores an answer; unused for the loss.
        forced: ids of the answers whose loss is measured; None lets the model answer.
        size: the largest number of prompts in a batch.
        pad: the padding id.
        stops: ids that end an answer.
        tokenizer: turns ids into text.
        agnostic: True lets methods also answer without knowing the question while they compress the context.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        metric: str,
        rule: Callable[[Example, str], float],
        forced: list[list[int]] | None,
        size: int,
        pad: int,
        stops: frozenset[int],
        tokenizer: Any,
        agnostic: bool = False,
    ) -> None:
        self.prompts, self.metric, self.rule, self.tokenizer, self.stops = prompts, metric, rule, tokenizer, stops
        self.batches = batches(prompts, size, forced, pad)
        self.contexts = shared_contexts(prompts, forced) if agnostic else []
        self.agnostic_indices = {index for shared in self.contexts for index in shared.indices}
        # memory is measured on the longest prompt that the full cache can read, alone
        index = max(range(len(prompts)), key=lambda i: (not prompts[i].excess, prompts[i].ids.shape[1]))
        (self.memory_batch,) = batches([prompts[index]], 1, None if forced is None else [forced[index]], pad)

    @cached_property
    def identity(self) -> str:
        """The digest of the prompts, the accepted answers and the score."""
        examples = [prompt.example for prompt in self.prompts]
        rules = [[e.rule, e.facts, e.stop] for e in examples if e.rule or e.stop]
        return digest.of(self.metric, [[x.identity for x in self.batches], [e.answers for e in examples], rules])

    def row(self, run: MethodRun) -> Row:
        """Summarise a method's answers as a row of the table."""
        contender = run.contender
        budget = contender.budget if contender.takes_budget else nan
        if not run.records:
            reason = run.given_up or next(iter(run.errors.values()), "")
            return Row.failed(contender.key, contender.title, reason, budget=budget)
        answers = [self._answer(run, index) for index in range(len(self.prompts))]
        lengths = [batch.length for batch in self.batches if batch.indices[0] in run.records]
        error = run.agnostic_error and f"query-agnostic: {run.agnostic_error}"
        if failed := [answer.error for answer in answers if answer.error]:
            error = f"{len(failed)} of {len(answers)} prompts: {failed[0]}"
        options, megabytes = contender.options(lengths), run.megabytes or [nan] * 3
        return Row.summing(contender.key, contender.title, options, answers, megabytes, error, budget)

    def _answer(self, run: MethodRun, index: int) -> Answer:
        prompt = self.prompts[index]
        example, tokens = prompt.example, prompt.ids.shape[1]
        record = run.records.get(index)
        if record is None:  # a missing answer counts as wrong, but has no loss
            score = nan if self.metric == LOSS else 0.0
            return Answer(example.prompt, example.answer, "", score, tokens, error=run.errors.get(index, "not run"))
        output = self._output(example, record["ids"])
        score = _number(record["loss"]) if self.metric == LOSS else self.rule(example, output)
        agnostic_output, agnostic_score = self._agnostic(run, index, output, score)
        return Answer(
            example.prompt, example.answer, output, score, tokens,
            cache_kept=_number(record["cache_kept"]),
            keys_read=_number(record["keys_read"]),
            prefill_ms=_number(record["prefill_ms"]),
            decode_ms=_number(record["decode_ms"]),
            base_prefill_ms=_number(record["base_prefill_ms"]),
            base_decode_ms=_number(record["base_decode_ms"]),
            answer_tokens=self._length(example, record["ids"]),
            agnostic_output=agnostic_output, agnostic_score=agnostic_score,
            groups=", ".join(example.facts.get("groups", ())),
        )  # fmt: skip

    def _agnostic(self, run: MethodRun, index: int, output: str, score: float) -> tuple[str, float]:
        """Return the query-agnostic output and score. The full cache drops nothing, so that its two scores are one."""
        if index not in self.agnostic_indices:
            return "", nan
        if run.contender.key == FULL:
            return output, score
        record = run.agnostic.get(index)
        if record is None:
            return "", nan
        output = self._output(self.prompts[index].example, record["ids"])
        if self.metric == LOSS:
            return output, _number(record["loss"])
        return output, self.rule(self.prompts[index].example, output)

    def _output(self, example: Example, ids: Sequence[int]) -> str:
        """Decode an answer up to its first stop id, or the first of the example's stop texts."""
        return cut(self._text(ids), example.stop)

    def _length(self, example: Example, ids: Sequence[int]) -> float:
        """Return how many of the ids an answer has, up to the stop text; NaN for examples without one."""
        if not example.stop:
            return nan
        whole = len(self._text(ids))
        if len(cut(self._text(ids), example.stop)) == whole:
            return float(self._end(ids))
        return float(next(n for n in range(len(ids) + 1) if any(stop in self._text(ids[:n]) for stop in example.stop)))

    def _end(self, ids: Sequence[int]) -> int:
        return next((at for at, token in enumerate(ids) if token in self.stops), len(ids))

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids[: self._end(ids)], skip_special_tokens=True)

    def is_finished(self, batch: Batch, rows: Sequence[Sequence[int]]) -> bool:
        """Return True if every answer of a batch has reached its end, so that further tokens do not count."""
        return all(
            self._end(ids) < len(ids)
            or (prompt.example.stop and any(s in self._text(ids) for s in prompt.example.stop))
            for prompt, ids in zip(batch.prompts, rows, strict=True)
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """Cut a text before the first of the stop texts."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def evaluation_of(
    task: Task,
    score: str | None,
    encoded: list[Prompt],
    tokenizer: Any,
    model: PreTrainedModel,
    size: int,
    agnostic: bool = False,
) -> Evaluation:
    """Combine the encoded prompts of a task with the score, which is the task's own if None."""
    metric = score or task.metric
    if score is None:
        registry.check(prompt.example.rule for prompt in encoded if prompt.example.rule)
    if score is not None or metric in (LOSS, *scores.SCORES):
        scores.check(metric, (prompt.example.answers for prompt in encoded))
    forced = None
    if metric == LOSS:
        forced = [[] if prompt.answer_ids is None else prompt.answer_ids[0].tolist() for prompt in encoded]
        if not all(forced):
            raise TaskError(f"example {forced.index([]) + 1} of {task.name} has an empty answer, which has no loss")
    given = None if score is None else scores.SCORES.get(metric)
    rule = task.score if given is None else lambda example, output: given(output, example.answers)
    return Evaluation(encoded, metric, rule, forced, size, *_special_ids(tokenizer, model), tokenizer, agnostic)


def _special_ids(tokenizer: Any, model: PreTrainedModel) -> tuple[int, frozenset[int]]:
    """Return the padding id, and the ids that end an answer."""
    stops = end_tokens(model) | ({tokenizer.eos_token_id} - {None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    return pad, stops


def _number(value: float | None) -> float:
    return nan if value is None else float(value)
