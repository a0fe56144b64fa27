"""The rules that score an answer: each accepts whole answers, and no part of a word or number."""

from __future__ import annotations

import builtins

import pytest

from foveate.core.errors import OptionError, TaskError, UnknownKey
from foveate.tasks.base import scores
from foveate.tasks.base.task import Example
from foveate.tasks.text.needle import Needle

RULES = sorted(scores.SCORES)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("answer", ["12", " 47111", "Paris", "naïve", "東京", "two words", "-3.5"])
def test_every_rule_accepts_the_answer_itself(rule: str, answer: str) -> None:
    if rule != "first-number" or scores.number(answer) is not None:
        assert scores.SCORES[rule](answer, (answer,)) == 1.0
        assert scores.SCORES[rule](f"\n {answer} \n", (answer,)) == 1.0
        assert scores.SCORES[rule](answer, ("99999 no", answer)) >= 0.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("output, answer", [
    ("123456", "12"), ("12th", "12"), ("12.5", "12"), ("12,000", "12"), ("912", "12"), ("0.12", "12"), ("-12", "12"),
    ("Parisian", "Paris"), ("x12", "12"), ("12_000", "12"), ("", "12"), ("cafés", "café"), ("cafe\u0301s", "café"),
])  # fmt: skip
def test_a_part_of_a_word_or_number_does_not_match(rule: str, output: str, answer: str) -> None:
    assert scores.SCORES[rule](output, (answer,)) == 0.0 or (rule, output) in {
        ("first-number", "x12"), ("first-number", "12th"), ("rouge", "12.5"), ("rouge", "12,000"), ("rouge", "0.12"),
        ("rouge", "-12"), ("first-number", "12_000"),
    }  # fmt: skip


@pytest.mark.parametrize("rule, output, answers, score", [
    ("begins", "47111. The next", ("47111",), 1), ("begins", "It is 47111", ("47111",), 0),
    ("begins", "東京です", ("東京",), 1), ("begins", "paris", ("Paris",), 0), ("begins", "U.S. law", ("U.S.",), 1),
    ("exact", "Paris\nQuestion: next", ("Paris",), 1), ("exact", "Paris, France", ("Paris",), 0),
    ("exact", "a\nb", ("a\nb",), 1), ("exact", "a\nb", ("c", "a"), 1),
    ("contains", "The capital is PARIS.", ("Lyon", "Paris"), 1), ("contains", "首都は東京です", ("東京",), 1),
    ("contains", "123 and then 12", ("12",), 1), ("contains", "(12)", ("12",), 1),
    ("contains", "it is 5-12", ("12",), 1),
    ("contains", "anything", ("",), 0),
    ("contains-all", "7 and 9", ("7", "8", "9"), 2 / 3), ("contains-all", "17", ("7",), 0),
    ("first-number", "That is 1,234.0 of 5", ("1234",), 1), ("first-number", "5 then 7", ("7",), 0),
    ("first-number", "= −3", ("-3",), 1), ("first-number", "none", ("3",), 0), ("first-number", "1e3", ("1000",), 1),
    ("rouge", "the cat sat", ("the cat sat down", "dogs"), 6 / 7), ("rouge", "東京", ("東京都",), 4 / 5),
    ("rouge", "", ("x",), 0),
])  # fmt: skip
def test_each_rule_by_example(rule: str, output: str, answers: tuple[str, ...], score: float) -> None:
    assert scores.SCORES[rule](output, answers) == pytest.approx(score)


def test_a_task_scores_by_its_metric_over_every_accepted_answer() -> None:
    example = Example("p", "12", accepted=("12", "twelve"))
    assert Example("p", "12").answers == ("12",)
    assert [Needle().score(example, output) for output in (" 12.", "twelve", "120", "twelves")] == [1, 1, 0, 0]


def test_scores_are_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    scores.check("loss", [("a",)])
    scores.check("first-number", [("a 1", "b"), ("2",)])
    with pytest.raises(UnknownKey, match='unknown score "exat"; did you mean "exact"'):
        scores.check("exat", [])
    with pytest.raises(TaskError, match="example 2 has 'none'"):
        scores.check("first-number", [("1",), ("none",)])
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r'pip install "foveate\[scores\]"'):
        scores.check("rouge", [])
