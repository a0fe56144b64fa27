"""The contract of tasks: a seed, a length, a score and a description, the same for a person's own file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Task
from foveate.tasks.base.tokens import Tokens
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.registry import TASKS, named
from tests.bench.conftest import write_prompts

LENGTH, COUNT, OWN = 3000, 3, "mine.jsonl"
#: A word and the blank before it as one token. Numbers stand for words, so that text can be made again.
_WORDS: dict[str, int] = {}


def _encode(text: str) -> list[int]:
    return [_WORDS.setdefault(word, len(_WORDS)) for word in re.findall(r"\s*\S{1,6}|\s+$", text)]


def _decode(ids: object) -> str:
    words = list(_WORDS)
    return "".join(words[each] for each in ids)  # type: ignore[attr-defined]


TOKENS = Tokens(_encode, _decode)


@pytest.fixture(params=[*TASKS, OWN])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, folder: Path, seed: int = 0) -> Task:
    if name == OWN:
        return Prompts(write_prompts(folder / OWN, [f"{'word ' * 40}key {n}, which key?" for n in range(COUNT)], "7"))
    return named(name, LENGTH, COUNT, seed).sized(TOKENS)


def test_a_seed_decides_the_examples(name: str, tmp_path: Path) -> None:
    found = make(name, tmp_path).examples()
    assert len(found) == COUNT and found == make(name, tmp_path).examples()
    if name != OWN:
        assert found != make(name, tmp_path, seed=1).examples()


def test_prompts_are_texts_of_the_length(name: str, tmp_path: Path) -> None:
    """The length is in characters, or in the tokens of the prompt and of what a model may answer."""
    for example in make(name, tmp_path).examples():
        assert example.prompt and example.answer
        sizes = (len(example.prompt), TOKENS.count(example.prompt))
        assert name == OWN or (min(sizes) <= LENGTH and max(sizes) > LENGTH // 2)
        assert all(0 <= start <= stop <= len(example.prompt) for start, stop in example.spans.values())


def test_the_answer_scores_and_nothing_does_not(name: str, tmp_path: Path) -> None:
    task = make(name, tmp_path)
    if task.metric == LOSS:
        pytest.skip("a next-token loss compares no texts")
    for example in task.examples():
        assert task.score(example, example.answer) == pytest.approx(1.0)
        assert task.score(example, "") == 0.0 and task.score(example, "none of them") < 1.0


def test_it_has_a_name_and_a_description(name: str, tmp_path: Path) -> None:
    task = make(name, tmp_path)
    assert task.name
    assert name == OWN or (TASKS[name] and len(TASKS[name]) <= 80 and not TASKS[name].endswith("."))
