"""An output ends at a stop text: its score, its length in tokens, and the end of generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from foveate.bench.comparison.encoding import Prompt, prompts
from foveate.bench.comparison.evaluation import Evaluation, cut, evaluation_of
from foveate.bench.comparison.measure import run_batch
from foveate.bench.comparison.method_run import MethodRun
from foveate.bench.comparison.results import Answer, Row
from foveate.bench.loading import load
from foveate.bench.methods import Contender
from foveate.core.errors import UnknownKey
from foveate.host.hf.model import Host
from foveate.report import table
from foveate.tasks.base.task import Example, Task
from tests.bench.test_results import make_comparison, make_row

RECORD = {"loss": None, "cache_kept": 1.0, "keys_read": 1.0, "prefill_ms": 1.0, "decode_ms": 1.0,
          "base_prefill_ms": 1.0, "base_decode_ms": 1.0}  # fmt: skip


@dataclass(frozen=True)
class Ending(Task):
    """One prompt whose answer ends at a blank line."""

    rule: str = "trace"
    name = "ending"
    metric: ClassVar[str] = "trace"

    def examples(self) -> list[Example]:
        return [Example("Go on:", "Result: 7\n\n", accepted=("7",), rule=self.rule, stop=("\n\n",), new_tokens=40)]


def made(decoder: Path, task: Task) -> tuple[Evaluation, list[Prompt], object]:
    model, tokenizer, _ = load(str(decoder))
    encoded = prompts(task, tokenizer, model)
    return evaluation_of(task, None, encoded, tokenizer, model, 1), encoded, model


def answered(evaluation: Evaluation, model: object, text: str) -> tuple[float, float, str]:
    run = MethodRun(Contender("full", Host(model), 1.0))  # type: ignore[arg-type]
    run.records[0] = {**RECORD, "ids": evaluation.tokenizer(text, add_special_tokens=False).input_ids}
    row = evaluation.row(run)
    return row.score, row.answer_tokens, row.answers[0].output


def test_text_after_the_end_counts_for_nothing(decoder: Path) -> None:
    evaluation, (prompt,), model = made(decoder, Ending())
    assert prompt.new_tokens == 40
    assert answered(evaluation, model, "a\nResult: 7\n\nResult: 9") == (1.0, 13, "a\nResult: 7")
    assert answered(evaluation, model, "a\nResult: 7 and Result: 9") == (0.0, 25, "a\nResult: 7 and Result: 9")


def test_generation_ends_when_every_answer_has(decoder: Path) -> None:
    evaluation, _, model = made(decoder, Ending())
    (batch,) = evaluation.batches
    looks: list[int] = []

    def is_finished(rows: list[list[int]]) -> bool:
        looks.append(len(rows[0]))
        return len(looks) == 2

    with torch.no_grad():
        assert len(run_batch(model, (), batch, is_finished=is_finished).ids[0]) == 32  # type: ignore[arg-type]
    assert looks == [16, 32]
    ids = evaluation.tokenizer("Result: 7\n\n more", add_special_tokens=False).input_ids
    assert evaluation.is_finished(batch, [ids]) and not evaluation.is_finished(batch, [ids[:9]])
    assert evaluation.is_finished(batch, [[*ids[:3], evaluation.tokenizer.eos_token_id]])


def test_the_first_of_several_stops_cuts() -> None:
    assert cut("a\nb\n\nc", ("\n\n", "\n")) == "a" and cut("ab", ("\n",)) == "ab" and cut("ab", ()) == "ab"


def test_an_unknown_rule_is_refused_before_anything_runs(decoder: Path) -> None:
    with pytest.raises(UnknownKey, match='unknown rule "traec"'):
        made(decoder, Ending("traec"))


def test_the_length_of_answers_is_a_column_where_it_is_known() -> None:
    plain, traced = make_comparison(make_row()), make_comparison(make_row(answer_tokens=123.4))
    heads = [table.markdown(each).splitlines()[0].split(" | ") for each in (plain, traced)]
    assert "answer" not in heads[0] and "answer" in heads[1] and "123\N{NO-BREAK SPACE}tokens" in table.markdown(traced)
    answers = [Answer("p", "e", "o", 1.0, answer_tokens=value) for value in (10.0, 20.0, math.nan)]
    assert Row.summing("full", "full cache", {}, answers, [1, 1, 1]).answer_tokens == 15.0
