"""What every method of a comparison is asked, and how its answers become a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import nan
from typing import Any

from transformers import PreTrainedModel

from foveate.bench.comparison.encoding import Prompt
from foveate.bench.comparison.lanes import Lane
from foveate.bench.comparison.measure import batches
from foveate.bench.comparison.results import Answer, Row
from foveate.bench.parts import digest
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example


class Question:
    """Prompts in batches, and the rule that scores what is said to them.

    Args:
        prompts: in the order of the task.
        metric: name of the rule.
        rule: scores an answer; not used for the loss.
        forced: ids of the answers whose loss is measured; None lets the models answer.
        size: prompts in a batch, at most.
        pad: the id to pad with.
        stops: ids that end an answer.
        tokenizer: turns ids into text.
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
    ) -> None:
        self.prompts, self.metric, self.rule, self.tokenizer, self.stops = prompts, metric, rule, tokenizer, stops
        self.batches = batches(prompts, size, forced, pad)
        # what memory is measured on: the longest prompt that the full cache can read, alone
        place = max(range(len(prompts)), key=lambda i: (not prompts[i].beyond, prompts[i].ids.shape[1]))
        (self.heaviest,) = batches([prompts[place]], 1, None if forced is None else [forced[place]], pad)

    @cached_property
    def identity(self) -> str:
        """The digest of the prompts, of what is accepted as an answer, and of how that is scored."""
        return digest.of(self.metric, [[x.identity for x in self.batches], [p.example.answers for p in self.prompts]])

    def row(self, lane: Lane) -> Row:
        """What a method said, as its line of the table."""
        contender = lane.contender
        if not lane.records:
            return Row.failed(contender.key, contender.title, lane.given_up or next(iter(lane.errors.values()), ""))
        answers = [self._answer(lane, place) for place in range(len(self.prompts))]
        lengths = [batch.length for batch in self.batches if batch.places[0] in lane.records]
        error = ""
        if lost := [answer.error for answer in answers if answer.error]:
            error = f"{len(lost)} of {len(answers)} prompts: {lost[0]}"
        options, megabytes = contender.options(lengths), lane.megabytes or [nan] * 3
        return Row.summing(contender.key, contender.title, options, answers, megabytes, error)

    def _answer(self, lane: Lane, place: int) -> Answer:
        prompt = self.prompts[place]
        example, tokens = prompt.example, prompt.ids.shape[1]
        record = lane.records.get(place)
        if record is None:  # no answer is a wrong one, but it has no loss
            score = nan if self.metric == LOSS else 0.0
            return Answer(example.prompt, example.answer, "", score, tokens, error=lane.errors.get(place, "not run"))
        output = self._text(record["ids"])
        score = _number(record["loss"]) if self.metric == LOSS else self.rule(example, output)
        names = ("cache_kept", "keys_read", "prefill_ms", "decode_ms", "base_prefill_ms", "base_decode_ms")
        return Answer(
            example.prompt, example.answer, output, score, tokens, **{name: _number(record[name]) for name in names}
        )

    def _text(self, ids: Sequence[int]) -> str:
        """The answer up to where the model ended it."""
        end = next((at for at, token in enumerate(ids) if token in self.stops), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)


def ends(tokenizer: Any, model: PreTrainedModel) -> tuple[int, frozenset[int]]:
    """The id to pad with, and the ids at which a model ends its answer."""
    named = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    stops = {token for ids in named for token in (ids if isinstance(ids, list | tuple) else [ids]) if token is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    return pad, frozenset(stops)


def _number(value: float | None) -> float:
    return nan if value is None else float(value)
