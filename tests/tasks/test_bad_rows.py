"""Rows of every format with one bad field: the error is one line, and names the row and the field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import TaskError
from foveate.tasks.files.benchmarks.nolima import NoLiMa
from foveate.tasks.files.prompts import Prompts
from tests.corpus import benchmarks

_TALK = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
_TURN = {"input": "q", "answer": "a"}
#: A row of each format, by the name of its file.
ROWS: dict[str, dict[str, Any]] = {
    "own.jsonl": {"prompt": "a b", "answer": "c"},
    "talk.jsonl": {"messages": _TALK, "answer": "yes"},
    "talks.jsonl": {"conversations": [{"from": "human", "value": "hi"}], "answer": "yes"},
    "lm_eval.jsonl": {"doc": {"q": 1}, "arguments": [["ctx", {"until": []}]], "target": "cont"},
    "mrcr.jsonl": {"prompt": _TALK, "answer": "ABCy", "random_string_to_prepend": "ABC"},
    "scbench_kv.jsonl": {"context": "ctx", "multi_turns": [_TURN, _TURN]},
    "scbench_mf.jsonl": {"context": "[1, 2]", "multi_turns": [{**_TURN, "answer": 2}, {**_TURN, "answer": "1.5"}]},
    "scbench_choice_eng.jsonl": {"context": "ctx", "multi_turns": [{**_TURN, "answer": "A", "options": ["x", "y"]}]},
    "scbench_repoqa.jsonl": {"context": "ctx", "repo": "r", "multi_turns": [{**_TURN, "name": "f"}]},
    "ruler.jsonl": {"input": "text\nquestion", "outputs": ["1"], "answer_prefix": "Answer:"},
    "kvpress.jsonl": {"context": "c", "question": "q", "answer_prefix": "p", "answer": ["1"], "task": "vt"},
    "second.jsonl": {"question": "c\nq", "expected_answer": "x", "match_type": "all"},
    "longbench.jsonl": {"context": "c", "input": "q", "answers": ["a"], "dataset": "trec", "all_classes": ["a", "b"]},
    "choices.jsonl": {"context": "c", "question": "q", **{f"choice_{x}": x for x in "ABCD"}, "answer": "A"},
    "press.jsonl": {"context": "c", "question": "q", "answer_prefix": "p", "answers": ["a"], "task": "qasper"},
    "qa1.jsonl": {"input": "Ann went home.", "question": "Where is Ann?", "target": "home"},
    "infinite.jsonl": {"context": "c", "input": "q", "answers": ["a"]},
    "qa.jsonl": {"context": "c", "question": "q", "answers": {"text": ["a"]}},
    "do.jsonl": {"instruction": "do", "input": "x", "output": "y"},
}
#: Fields that may hold anything, or be absent.
FREE = {"doc", "task", "dataset", "repo", "options", "match_type"}
#: What Python says of values that a program did not expect.
PYTHON = ("NoneType", "object is not", "object has no", "subscriptable", "unpack", "Error")
BAD = [True, {}, float("nan"), [{}], [None], {"a": 1}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each field of a row, in objects and lists too."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield (*path, name)
        yield from places(inner, (*path, name))


def broken(row: dict[str, Any], free: set[str] = FREE) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a row's copies with one bad value each, and the names of the fields around it."""
    for path in places(row):
        names = [name for name in path if isinstance(name, str)]
        if free & set(names):
            continue
        for bad in BAD:
            copied = copy.deepcopy(row)
            holder: Any = copied
            for name in path[:-1]:
                holder = holder[name]
            holder[path[-1]] = bad
            yield names[0], copied


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_field_is_named_with_its_row(name: str, tmp_path: Path) -> None:
    file, refused = tmp_path / name, 0
    for field, row in broken(ROWS[name]):
        file.write_text(f"{json.dumps(ROWS[name])}\n{json.dumps(row)}\n")
        try:
            Prompts(file).examples()
        except TaskError as error:
            said, refused = str(error), refused + 1
            assert "\n" not in said and f"{name}' line 2" in said, said
            assert not any(word in said for word in PYTHON), said
            parts = {"multi_turns": ("turn 1", "turn 2"), "messages": ("prompt",)}.get(field, ())
            assert any(part in said for part in (field, *parts)), (row, said)
    assert refused > 5


_GOLD = {
    **benchmarks.NOLIMA, "needle": "The {1} lies by the {2}.", "character_set": [],
    "task_template": "{haystack} {question}",
    "tests": {"T1": {"input_args": ["inn", 7], "gold_answers": ["inn"]}},
}  # fmt: skip


@pytest.mark.parametrize("row", [benchmarks.NOLIMA, _GOLD], ids=["drawn names", "gold answers"])
def test_a_bad_field_of_a_needle_is_named_with_its_row(row: dict[str, Any], tmp_path: Path) -> None:
    file, refused = benchmarks.nolima(tmp_path), 0
    for field, bad in broken(row, {"id", "system_prompt", "reasoning_type"}):
        file.write_text(json.dumps([row, bad]))
        try:
            NoLiMa(file, 500, 2).examples()
        except TaskError as error:
            said, refused = str(error), refused + 1
            assert "\n" not in said and f"{file.name}' item 2" in said, said
            assert not any(word in said for word in PYTHON), said
            assert field in said or (field == "task_template" and "template must hold" in said), (bad, said)
    assert refused > 20


def test_a_needle_has_the_answers_that_it_needs(tmp_path: Path) -> None:
    """A drawn name has to come from somewhere; a needle without one needs gold answers."""
    file = benchmarks.nolima(tmp_path)
    for changes, field in (
        ({"character_set": []}, "character_set"),
        ({"character_set": [], "tests": {"T1": {"input_args": ["a", "b"], "gold_answers": ["a"]}}}, "character_set"),
        ({"needle": "It is {1}."}, "gold_answers"),
        ({"needle": "It is {1}.", "tests": {"T1": {"input_args": ["a"], "gold_answers": ""}}}, "gold_answers"),
    ):
        file.write_text(json.dumps([{**benchmarks.NOLIMA, **changes}]))
        with pytest.raises(TaskError, match=f"item 1: tests: T1 must have {field} for its needle"):
            NoLiMa(file, 500, 2).examples()
    for field, changes in (
        ("needle", {"needle": True}),
        ("questions: onehop", {"questions": {"onehop": ["a", "b"]}}),
        ("tests: T1: input_args", {"tests": {"T1": {"input_args": [None]}}}),
        ("character_set", {"character_set": ["Yuki", float("nan")]}),
        ("task_template", {"task_template": ["{haystack} {question}"]}),
    ):
        file.write_text(json.dumps([{**benchmarks.NOLIMA, **changes}]))
        with pytest.raises(TaskError, match=f"item 1: {field} must be text; got "):
            NoLiMa(file, 500, 2).examples()
    for none in ({"questions": {}}, {"tests": {}}):
        file.write_text(json.dumps([{**benchmarks.NOLIMA, **none}]))
        with pytest.raises(TaskError, match="holds no questions"):
            NoLiMa(file, 500, 2).examples()


@pytest.mark.parametrize("value", [None, ["a"], float("nan")])
def test_a_named_field_that_is_no_text_is_named_with_its_row(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"passage": value, "gold": "x"}) + "\n")
    for prompt in ("passage", "Read {passage} now"):
        with pytest.raises(TaskError, match="line 1: passage must be text"):
            Prompts(file, prompt_field=prompt, answer_field="gold").examples()


def test_functions_of_a_repository_need_names(tmp_path: Path) -> None:
    """The rule compares functions by their names: two without one would count as the same function."""
    file = tmp_path / "scbench_repoqa.jsonl"
    file.write_text(json.dumps({"context": "c", "repo": "r", "multi_turns": [_TURN, _TURN]}) + "\n")
    with pytest.raises(TaskError, match="line 1: turn 1: name must be text"):
        Prompts(file).examples()


def test_text_in_place_of_a_list_is_not_read_by_its_characters(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for row in (
        {"doc": {}, "arguments": ["ctx"], "target": "x"},
        {**ROWS["longbench.jsonl"], "all_classes": "abc"},
        {"context": "c", "multi_turns": [{**_TURN, "options": "AB"}]},
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(TaskError, match="line 1: .*(arguments|all_classes|options) must be a list"):
            Prompts(file).examples()


def test_later_turns_are_valid_unicode(tmp_path: Path) -> None:
    """A lone surrogate, which JSON allows, must not reach the tokenizer in any part of a prompt."""
    file = tmp_path / "scbench_kv.jsonl"
    file.write_text(
        '{"context": "c", "multi_turns": [{"input": "q", "answer": "\\ud800"}, {"input": "r", "answer": "b"}]}\n'
    )
    for example in Prompts(file).examples():
        assert example.prompt.encode("utf-8").decode("utf-8") == example.prompt
    file.write_text('{"messages": [{"role": "\\ud800", "content": "x"}], "answer": "b"}\n')
    assert Prompts(file).examples()[0].prompt.encode("utf-8")
