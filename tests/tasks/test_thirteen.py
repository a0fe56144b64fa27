"""RULER's thirteen tasks: what each hides, its length in tokens, and its score."""

from __future__ import annotations

import itertools
import re
import uuid
from collections import Counter
from typing import Any

import pytest

from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.base.tokens import Tokens, largest
from foveate.tasks.parts.library import functions
from foveate.tasks.registry import THIRTEEN
from foveate.tasks.thirteen import needles
from foveate.tasks.thirteen.needles import NOISE
from foveate.tasks.thirteen.tasks import NAMES, Thirteen, task
from foveate.tasks.thirteen.words import FrequentWords

#: A word and the blank before it as one token: about as coarse as a real tokenizer.
WORDS = Tokens(lambda text: list(range(len(re.findall(r"\s*\S{1,6}", text)))), lambda ids: "")


def examples(name: str, length: int = 2048, count: int = 4, **options: Any) -> list[Example]:
    return task(name, length=length, count=count, tokens=WORDS, **options).examples()


def test_the_names_are_those_of_the_registry() -> None:
    assert NAMES == THIRTEEN and len(NAMES) == 13


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1024, 4500])
def test_prompts_fill_the_length_and_answers_score(name: str, length: int) -> None:
    made = task(name, length=length, count=3, tokens=WORDS)
    for example in made.examples():
        used = WORDS.count(example.prompt) + example.new_tokens
        assert 0.9 * length - 120 <= used <= length
        assert made.score(example, example.answer) == 1.0 and made.score(example, "nothing of it") == 0.0
        first = made.score(example, f"Well: {example.answers[0].upper()} it is")
        assert first == pytest.approx(1 if name.startswith("qa") else 1 / len(example.answers))
        assert example.spans["context"][1] <= example.spans["question"][0] < len(example.prompt)
        assert not example.prompt.endswith(" ") and example.rule == made.metric
    assert examples(name) == examples(name) != examples(name, seed=1)


@pytest.mark.parametrize("name", needles.KINDS)
def test_needles_are_hidden_as_the_kind_says(name: str) -> None:
    kind = needles.KINDS[name]
    for example in examples(name):
        context = example.prompt[slice(*example.spans["context"])]
        found = re.findall(rf"The secret {kind.value} of (\S+) is (\S+)\.(?=\s|$)", context)
        own = kind.keys * kind.values
        assert len(found) == own if kind.haystack != "needles" else len(found) > 20
        assert (NOISE in context) == (kind.haystack == "noise")
        wanted = re.findall(r"(?:\w+-\w+(?:-\w+)*)", example.prompt[example.spans["question"][0] :].split("? ")[0])
        assert len(wanted) == kind.queries and len(example.answers) == kind.queries * kind.values
        hidden = Counter((key, value) for key, value in found if key in wanted)
        assert sorted(value for _, value in hidden) == sorted(example.answers)
        for answer in example.answers:
            assert re.fullmatch(r"\d{7}", answer) if kind.value == "number" else uuid.UUID(answer).version == 4
        spans = [span for part, span in example.spans.items() if part.startswith("needle")]
        assert sorted(re.search(r"is (\S+)\.$", example.prompt[slice(*span)])[1] for span in spans) == sorted(  # type: ignore[index]
            example.answers
        )


def test_depths_of_needles_are_spread() -> None:
    found = examples("niah_single_2", count=60)
    depths = [e.spans["needle 0"][0] / e.spans["context"][1] for e in found]
    assert min(depths) < 0.15 and max(depths) > 0.85 and 0.35 < sum(depths) / 60 < 0.65


def test_a_chain_is_in_order_and_the_example_has_other_names() -> None:
    for example in examples("vt"):
        names, context = example.answers, example.prompt[slice(*example.spans["context"])]
        assert len(set(names)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
        places = [f"{context}\n".find(f"VAR {new} = VAR {old}\n") for old, new in itertools.pairwise(names)]
        assert -1 < context.find(f"VAR {names[0]} = ") < places[0] and places == sorted(places)
        shown = re.findall(r"VAR ([A-Z]{3}) =", context)
        assert len(shown) == 5 and " ".join(shown) in context
        value = re.search(r"hold the value (\d{5}):$", example.prompt)
        assert value and f"VAR {names[0]} = {value[1]}" in context


@pytest.mark.parametrize(("length", "common", "others"), [(1500, 6, 1), (4500, 30, 3)])
def test_common_words_occur_more_often(length: int, common: int, others: int) -> None:
    for example in examples("cwe", length, 2):
        body = example.prompt.rsplit("more often than others.\n", 1)[1]
        times = Counter(re.findall(r"\d+\. ([a-z]+)", body))
        assert [times[word] for word in example.answers] == [common] * 10
        assert {count for word, count in times.items() if word not in example.answers} == {others}


def test_frequencies_fall_with_the_square_of_the_rank() -> None:
    for example in examples("fwe"):
        body = re.search(r"in this text\. (.*)\n", example.prompt)
        assert body
        times = Counter(body[1].split())
        ranked = [word for word, _ in times.most_common(4)]
        assert ranked[0] == "..." and set(ranked[1:]) == set(example.answers)
        assert 3.5 < times["..."] / times[example.answers[0]] < 4.5
    with pytest.raises(OptionError, match="length=256 must be larger"):
        FrequentWords(256, 1).examples()


@pytest.mark.parametrize("hops", [1, 2])
def test_documents_hold_the_answer(hops: int) -> None:
    by_name = {function.name: function for function in functions()}
    for example in examples(f"qa_{hops}"):
        context = example.prompt[slice(*example.spans["context"])]
        asked = re.search(r"What is the description of (.*)\?\nAnswer:$", example.prompt)
        assert asked
        if hops == 1:
            function = by_name[asked[1]]
            assert function.document in context
        else:
            entry = re.search(rf"{asked[1].removeprefix('the function of i')} is about (\S+)\.\n", f"{context}\n")
            assert entry and context.count(f"{entry[1]}: ") == 1
            function = by_name[entry[1]]
            assert f"{function.name}: {function.summary}" in context
        assert example.answers == (function.summary.rstrip("."),) and context.count(example.answers[0]) >= 1


def test_all_thirteen_come_in_turn() -> None:
    made = Thirteen(length=2048, count=14, tokens=WORDS)
    found = made.examples()
    assert len(found) == 14 and [e.rule for e in found].count("ruler-any") == 2
    assert found[0] == examples("niah_single_1", count=2)[0] and found[13] == examples("niah_single_1", count=2)[1]
    assert Thirteen(length=2048).sized(WORDS).tokens is WORDS
    assert all(made.score(example, example.answer) == 1.0 for example in found)


def test_lengths_that_are_too_short_are_refused() -> None:
    with pytest.raises(OptionError, match="length=100 must be"):
        task("niah_single_1", length=100)
    with pytest.raises(OptionError, match="does not fit that many tokens"):
        task("niah_multivalue", length=300).examples()
    with pytest.raises(OptionError, match="task='niah' must be one of"):
        task("niah")
    assert isinstance(task("vt"), TokenTask)


@pytest.mark.parametrize(("size", "start"), [(0, 8), (1, 8), (2, 8), (7, 2), (8, 8), (100, 8), (1000, 2000)])
def test_the_largest_size_that_fits_is_found(size: int, start: int) -> None:
    assert largest(lambda each: each <= size, 1000, start) == size
    assert largest(lambda each: each <= size, 50, start) == min(size, 50)
