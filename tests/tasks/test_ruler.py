"""The RULER-like tasks: spans locate the facts, a seed repeats its examples, and answers get their score."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from foveate.core.errors import OptionError, UnknownKey
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example
from foveate.tasks.parts import corpus
from foveate.tasks.registry import TASKS, named
from foveate.tasks.text.continuation import Continuation
from foveate.tasks.text.counting import Counting
from foveate.tasks.text.retrieval import Retrieval
from foveate.tasks.text.ruler import KINDS, Ruler, kind
from foveate.tasks.text.tracing import Tracing


def examples(name: str, length: int = 3000, count: int = 12, seed: int = 0) -> list[Example]:
    return kind(name, length, count, seed).examples()


@pytest.mark.parametrize("name", KINDS)
def test_every_task_scores_its_own_answers(name: str) -> None:
    task = kind(name, 3000, 5)
    assert task.name == name
    for example in task.examples():
        assert 2900 < len(example.prompt) <= 3000 and example.prompt.isascii()
        assert not example.prompt.endswith(" ") and example.answer.startswith(" ")
        assert task.score(example, example.answer + ".\n\nAnd more.") == 1.0
        assert task.score(example, " nothing of it") == 0.0
        assert task.score(example, f" {example.answers[0]} it is") == pytest.approx(1 / len(example.answers))
    assert examples(name) == examples(name) != examples(name, seed=1)


@pytest.mark.parametrize(
    ("name", "facts", "owners", "queries"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 8, 8, 1),
        ("niah_multivalue", 6, 2, 1),
        ("niah_multiquery", 6, 6, 3),
    ],
)
def test_needles_are_in_the_text(name: str, facts: int, owners: int, queries: int) -> None:
    for example in examples(name):
        text, question = example.prompt.rsplit("\n", 1)
        shown, text = text.split(".\n\n", 1) if len(example.answers) > 1 else ("", text)
        found = re.findall(r" A pass key of (\w+) is (\d{5})\.", text)
        assert len(found) == facts and len({owner for owner, _ in found}) == owners
        wanted = re.sub("The pass keys? of | (is|are)$", "", question).replace(" and ", ", ").split(", ")
        assert len(wanted) == queries
        assert not {owner for owner, _ in found} & set(re.findall(r"of (\w+) is", shown))
        assert all(shown.count(digits) == 2 for digits in re.findall(r"is (\d{5})", shown))
        assert list(example.answers) == [digits for name in wanted for owner, digits in found if owner == name]
        assert re.findall(r"\d+", example.answer) == list(example.answers)
        for span, digits in zip(example.spans.values(), example.answers, strict=True):
            assert example.prompt[slice(*span)].endswith(f" is {digits}.")


def test_depths_are_spread() -> None:
    depths = [e.spans["needle 0"][0] / 3000 for e in examples("niah_multikey", count=60)]
    assert min(depths) < 0.15 and max(depths) > 0.75 and 0.35 < sum(depths) / 60 < 0.6


def test_the_answer_follows_the_chain() -> None:
    for example in examples("variable_tracking"):
        shown, text = example.prompt.split("\n\n", 1)
        value = re.findall(r"value (\d{5}) are$", text)[0]
        holds = re.findall(rf" VAR (\w+) = {value}\.", text)
        for new, old in re.findall(r" VAR (\w+) = VAR (\w+)\.", text):
            holds += [new] if old in holds else []
        assert holds == list(example.answers) and len(holds) == 3
        assert not set(holds) & set(re.findall(r"\b[A-Z]{3}\b", shown))


def test_the_common_words_are_the_most_common() -> None:
    for example in examples("common_words"):
        words = Counter(re.findall(r"[a-z]+", example.prompt.split("List: ")[2].rsplit("\n", 1)[0]))
        best = words.most_common(4)
        assert {word for word, _ in best[:3]} == set(example.answers)
        assert best[2][1] >= 10 * best[3][1] or best[3][1] <= 2


def test_ruler_takes_all_tasks_in_turn() -> None:
    found = Ruler(length=2000, count=13).examples()
    assert len(found) == 13
    for index, name in enumerate(KINDS):
        assert found[index::6] == examples(name, 2000, 3)[: len(found[index::6])]


def test_ruler_may_have_a_single_example() -> None:
    assert len(Ruler(1500, 1).examples()) == 1
    with pytest.raises(OptionError, match="count=0"):
        Ruler(1500, 0)


def test_continuations_are_adjacent_stretches_of_held_out_text() -> None:
    task = Continuation(length=5000, count=4, horizon=300, seed=2)
    found = task.examples()
    assert task.metric == LOSS
    assert all(len(e.prompt) == 5000 and len(e.answer) == 300 for e in found)
    whole = "".join(e.prompt + e.answer for e in found)
    assert whole in corpus.text("heldout")
    assert Continuation(length=5000, count=4, horizon=300, seed=3).examples() != found


@pytest.mark.parametrize("name", TASKS)
def test_names_create_tasks(name: str) -> None:
    length = 8000 if name in ("ranking", "ruler/cwe", "ruler/all", "docs_questions") else 1500
    task = named(name, length, 2, seed=1)
    assert task.name == ("loss_1500" if name.startswith("loss") else name) and len(task.examples()) == 2
    assert named(name).examples()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retrieval(length=100), "length=100"),
        (lambda: Retrieval(keys=0), "keys=0"),
        (lambda: Retrieval(keys=2, queries=3), "queries=3"),
        (lambda: Retrieval(length=600, keys=20), "20 facts leave no room for text"),
        (lambda: Tracing(length=1000), "length=1000"),
        (lambda: Tracing(hops=9), "hops=9"),
        (lambda: Counting(common=0), "common=0"),
        (lambda: Counting(count=0), "count=0"),
        (lambda: Continuation(length=10**6), "count=2 examples of length=1000000"),
        (lambda: kind("vt", 1000, 1), "task='vt'"),
    ],
)
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value).replace('"vt"', "'vt'")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownKey, match="niah_multikey"):
        named("niah_multikeys")
