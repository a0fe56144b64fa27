"""The needle task: spans locate the fact, prompts have their length, and a seed repeats its examples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example
from foveate.tasks.text.needle import Needle


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(400, 3000), st.integers(0, 5), st.integers(3, 8), st.integers(0, 9))
def test_prompts_end_in_a_question_about_the_needle(length: int, distractors: int, digits: int, seed: int) -> None:
    task = Needle(length=length, count=3, distractors=distractors, digits=digits, seed=seed)
    for example in task.examples():
        assert len(example.prompt) == length and example.prompt.isascii()
        needle = example.prompt[slice(*example.spans["needle"])]
        assert example.prompt.count(needle) == 1
        assert needle == example.prompt[example.prompt.rindex("\n") :].replace("\n", " ") + example.answer + "."
        assert len(example.answer.strip()) == digits and example.answer.strip().isdigit()
        assert len(example.spans) == distractors + 1
    assert [e.prompt for e in task.examples()] == [e.prompt for e in task.examples()]


def test_depths_are_spread() -> None:
    depths = [e.spans["needle"][0] / 1024 for e in Needle(length=1024, count=60).examples()]
    assert min(depths) < 0.15 and max(depths) > 0.75 and 0.35 < sum(depths) / 60 < 0.6


def test_the_score_accepts_the_digits() -> None:
    task, example = Needle(), Example("p", " 123")
    assert task.score(example, " 123.\nmore") == 1.0 and task.score(example, " 124") == 0.0


@pytest.mark.parametrize(
    "bad", [{"length": 10}, {"count": 0}, {"distractors": -1}, {"digits": 0}, {"distractors": 999}]
)
def test_bad_options_are_named(bad: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        Needle(**bad)
