"""Rows of known benchmarks: the prompt and its parts, the accepted answers, and the score."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example
from foveate.tasks.files import records, rows
from foveate.tasks.files.prompts import Prompts
from tests.corpus.cases import lines


def build(row: Any, prompt: str | None = None, answer: str | None = None) -> tuple[Example, str]:
    (example,), metric = rows.examples(row, "line 1", prompt, answer)
    return example, example.rule or metric


def test_parts_keep_their_places() -> None:
    row = {"context": "Keys.", "question": " Which?", "answer_prefix": " It is", "answer": ["1", "2"]}
    example, _ = build(row)
    parts = {name: example.prompt[start:end] for name, (start, end) in example.spans.items()}
    assert parts == {"context": "Keys.", "question": " Which?", "prefix": " It is"}
    assert example.prompt == "".join(parts.values()) and example.answers == ("1", "2")


@pytest.mark.parametrize(
    ("row", "metric"),
    [
        ({"prompt": "a", "answer": "b"}, "begins"),
        ({"input": "a", "outputs": ["b", "c"], "answer_prefix": " The two are"}, "ruler-all"),
        ({"input": "a", "outputs": ["b", "c"], "answer_prefix": " Answer:"}, "ruler-any"),
        ({"context": "a", "question": "b", "answer_prefix": "c", "answer": ["d"], "task": "niah_1"}, "ruler-all"),
        ({"context": "a", "question": "b", "answer_prefix": "c", "answer": ["d"], "task": "qa_1"}, "ruler-any"),
        ({"context": "a", "question": "b", "answer_prefix": "c", "answer": ["d"], "task": "own"}, "contains"),
        ({"context": "a", "input": "b", "answers": ["c"]}, "contains"),
        ({"input": "a", "question": "b", "target": "c"}, "contains"),
    ],
)
def test_the_score_fits_the_format(row: dict[str, Any], metric: str, tmp_path: Path) -> None:
    assert build(row)[1] == metric
    assert Prompts(lines(tmp_path / "p.jsonl", [row])).metric == metric


def test_a_ruler_row_asks_for_all_of_its_answers(tmp_path: Path) -> None:
    row = {"input": "Two keys?", "outputs": ["12", "345"], "answer_prefix": " They are"}
    task = Prompts(lines(tmp_path / "p.jsonl", [row]))
    (example,) = task.examples()
    assert [task.score(example, output) for output in (" 12 and 345.", " 12", " 123456")] == [1.0, 0.5, 1.0]


def test_one_of_several_answers_is_enough(tmp_path: Path) -> None:
    task = Prompts(lines(tmp_path / "p.jsonl", [{"context": "a", "input": "b", "answers": ["Ann", "Anna B."]}]))
    (example,) = task.examples()
    assert [task.score(example, output) for output in (" It was Anna B.", " Ann!", " Annabel")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("target", "arguments", "answer"),
    [
        ("['a', 'b']", [["ctx", {"until": []}]], ("a", "b")),
        ("2", {"gen_args_0": {"arg_0": "ctx", "arg_1": {"until": []}}}, ("2",)),
        (1, [["ctx", " x"], ["ctx", " y"]], (" y",)),
        ("", {"gen_args_0": {"arg_0": "ctx", "arg_1": " word"}}, (" word",)),
        ("1", "[['ctx', ' x'], ['ctx', ' y']]", (" y",)),
    ],
)
def test_lm_eval_samples_give_prompt_and_answers(target: Any, arguments: Any, answer: tuple[str, ...]) -> None:
    example, _ = build({"doc": {"q": 1}, "target": target, "arguments": arguments})
    assert (example.prompt, example.answers) == ("ctx", answer)


@pytest.mark.parametrize("arguments", [[["text alone"]], [], 3, None])
def test_lm_eval_samples_without_a_request_are_refused(arguments: Any) -> None:
    with pytest.raises(TaskError, match="line 1: arguments must (be|hold)"):
        build({"doc": {}, "target": "x", "arguments": arguments})


def test_named_fields_take_precedence_over_the_format() -> None:
    row = {"prompt": "a", "answer": "b", "other": {"text": ["c", "d"]}, "doc.q": "dotted"}
    assert build(row, "other.text.1", "other")[0] == Example("d", "c", {"context": (0, 1)}, ("c", "d"))
    assert build(row, "doc.q")[0].prompt == "dotted"
    assert build(row, None, "other.text.0")[0].answers == ("c",)
    assert build({"q": '{"deep": [1, 2]}', "answer": 3.5}, "q.deep.1")[0].answers == ("3.5",)
    with pytest.raises(TaskError, match=r"line 1 has no field 'other\.text\.7'; it has prompt, answer, other"):
        build(row, "other.text.7")
    with pytest.raises(TaskError, match="must be text; got dict"):
        build(row, "other")


def test_a_template_keeps_its_text() -> None:
    row = {"a": "1", "b": {"c": 2}, "answer": "x"}
    assert build(row, "{a} + {b.c} = ")[0].prompt == "1 + 2 = "
    assert build(row, r"{a}\n{b.c}")[0].prompt == "1\n2"
    assert build({**row, "a": r"\n"}, r"{a}\n{b.c}")[0].prompt == "\\n\n2"


def test_equal_and_empty_answers_are_dropped() -> None:
    assert build({"prompt": "a", "answers": ["x", "", "y", "x"]})[0].answers == ("x", "y")


@pytest.mark.parametrize(("name", "kind"), [("a.JSONL", ".jsonl"), ("a.b.csv.gz", ".csv"), ("a", ""), ("a.gz", "")])
def test_the_suffix_gives_the_file_type(name: str, kind: str) -> None:
    assert records.kind(Path(name)) == kind


def test_the_csv_limit_is_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text('prompt,answer\n"' + "x" * 200_000 + '",b\n')
    assert len(Prompts(tmp_path / "a.csv").examples()[0].prompt) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(("file", "package"), [("p.parquet", "pyarrow"), ("set", "datasets")])
def test_readers_name_a_missing_package(
    file: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    if file == "set":
        (tmp_path / file).mkdir()
        (tmp_path / file / "dataset_info.json").write_text("{}")
    else:
        (tmp_path / file).write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TaskError, match=r"pip install 'foveate\[data\]'"):
        Prompts(tmp_path / file).examples()


def test_rows_after_the_count_are_not_read(tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}])
    with file.open("a") as more:
        more.write("not JSON\n")
    assert len(Prompts(file, 1).examples()) == 1
    with pytest.raises(TaskError, match="line 2 is not JSON"):
        Prompts(file).examples()
