"""Tasks on the standard library: their answers are in the text, their lengths hold, and their scores move."""

from __future__ import annotations

import random
import re
from statistics import fmean

import pytest

from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.library.completion import Completion
from foveate.tasks.library.loss import LongText
from foveate.tasks.library.questions import LibraryQuestions
from foveate.tasks.library.ranking import Ranking
from foveate.tasks.library.traces import Traces
from foveate.tasks.parts.library import functions, sources
from foveate.tasks.registry import named
from tests.tasks.test_thirteen import WORDS

EACH = pytest.mark.parametrize(
    "task",
    [
        LibraryQuestions(2000, 4, tokens=WORDS), LibraryQuestions(2000, 4, tokens=WORDS, questions=2),
        Ranking(2000, 4, tokens=WORDS), Completion(2000, 4, tokens=WORDS), Traces(2000, 4, tokens=WORDS),
    ],
    ids=lambda task: task.name,
)  # fmt: skip


def context(example: Example) -> str:
    return example.prompt[slice(*example.spans["context"])]


def test_the_library_is_read() -> None:
    found = functions()
    assert len(found) > 500 and len({f.name for f in found}) == len({f.summary for f in found}) == len(found)
    wrap = next(f for f in found if f.name == "textwrap.wrap")
    assert wrap.parameters[:2] == ("text", "width") and wrap.signature.startswith("text, width=70")
    assert all(name.isascii() and source.isascii() for name, source in sources()) and "json.decoder" in dict(sources())
    assert not [name for name, _ in sources() if "test" in name.split(".")]


@EACH
def test_prompts_fill_the_length_and_answers_score(task: TokenTask) -> None:
    found = task.examples()
    assert len(found) == 4 and found == task.examples() != type(task)(2000, 4, seed=1, tokens=WORDS).examples()
    for example in found:
        used = WORDS.count(example.prompt) + example.new_tokens
        assert used <= 2000 and (used > 1500 or task.name == "code_completion")
        assert task.score(example, example.answer) == pytest.approx(1.0)
        assert task.score(example, "") == 0.0
        assert example.spans["context"][1] == example.spans["question"][0]


def test_answers_are_in_the_documentation() -> None:
    kinds = set()
    for example in LibraryQuestions(2000, 12, tokens=WORDS).examples():
        assert example.answers[0] in context(example) and example.answer == f" {example.answers[0]}"
        assert all(answer in example.answers[0] for answer in example.answers) and example.stop == ("\n",)
        kinds.add(re.search(r"Question: (\w+ \w+)", example.prompt)[1])  # type: ignore[index]
    assert kinds == {"Which function", "What is"}
    assert LibraryQuestions(2000, 1, tokens=WORDS).name == "docs_qa"


def test_several_questions_share_their_context() -> None:
    found = named("docs_questions", 3000, 10).sized(WORDS).examples()
    assert [context(e) == context(found[0]) for e in found] == [True] * 5 + [False] * 5
    assert len({e.prompt for e in found}) == 10


def test_the_best_ranking_is_known() -> None:
    task = Ranking(3000, 30, tokens=WORDS)
    draw = random.Random(0)
    shuffled = []
    for example in task.examples():
        grades = example.facts["grades"]
        assert sorted(grades.values(), reverse=True)[:5] == [2, 1, 1, 1, 0]
        best = next(name for name, grade in grades.items() if grade == 2)
        query = re.search(r"\nQuery: (.*) \((.*)\)\nRanking:$", example.prompt)
        assert query and f"[{best}] {query[2]}: " in example.prompt
        order = draw.sample(list(grades), len(grades))
        shuffled.append(task.score(example, " > ".join(order)))
        assert task.score(example, best) > task.score(example, " > ".join(name for name in order if name != best))
    assert 0.03 < fmean(shuffled) < 0.3


def test_the_next_line_needs_code_far_above() -> None:
    task = Completion(3000, 6, tokens=WORDS)
    for example in task.examples():
        question = example.prompt[slice(*example.spans["question"])]
        longest = max(re.findall(r"[A-Za-z_]\w{7,}", example.answer), key=len)
        assert question.count("\n") == 12 and longest not in question
        assert any(f"{example.prompt}{example.answer}\n" in f"{source}\n" for _, source in sources())
        assert 0 < task.score(example, example.answer[:-4]) < 1


def test_losses_have_a_context_of_so_many_tokens() -> None:
    characters = LongText(1024, 3, 64)
    assert characters.metric == LOSS and characters.name == "loss_1k" and LongText(1000).name == "loss_1000"
    found = characters.examples()
    assert [(len(e.prompt), len(e.answer)) for e in found] == [(1024, 64)] * 3 and len({e.prompt for e in found}) == 3
    assert named("loss_8k").length == 8192 and named("loss_4k").length == 4096  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="must fit the text's"):
        LongText(10**6, 3).examples()


def test_a_trace_computes_its_program() -> None:
    task = Traces(2000, 6, tokens=WORDS)
    for example in task.examples():
        program = example.prompt.rsplit("Program:\n", 1)[1].split("\nTrace:")[0]
        values: dict[str, int] = {}
        for line in program.split("\n"):
            exec(line, {}, values)
        assert all(0 < value <= 60 for value in values.values())
        assert example.answers == (str(list(values.values())[-1]),)
        written = dict(re.findall(r"^(\w+) = .*?(\d+)$", example.answer, re.MULTILINE))
        assert written == {name: str(value) for name, value in values.items()} and len(values) > 30
        assert example.stop == ("\n\n",) and example.new_tokens > WORDS.count(example.answer)
        assert task.score(example, example.answer + "Program:\na = 1\nResult: 99") == 0.0  # what `stop` cuts off
        assert task.score(example, f"Result: {example.answers[0]}9") == 0.0
