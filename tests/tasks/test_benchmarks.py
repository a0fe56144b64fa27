"""Files of published benchmarks: each is recognised by its fields, divided, and scored by its own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.bench.comparison.task_choice import choose_task
from foveate.core.errors import OptionError, TaskError
from foveate.tasks.base.task import Example
from foveate.tasks.files.benchmarks import babilong, longbench, ruler
from foveate.tasks.files.benchmarks.nolima import NoLiMa
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.rules.registry import RULES, SEVERAL
from tests.corpus import benchmarks as files
from tests.corpus.cases import lines

Row = dict[str, Any]


def read(tmp_path: Path, name: str, *rows: Row, **options: Any) -> tuple[Prompts, list[Example]]:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    task = Prompts(lines(tmp_path / name, list(rows)), **options)
    return task, task.examples()


def part(example: Example, name: str) -> str:
    return example.prompt[slice(*example.spans[name])]


@pytest.mark.parametrize(("path", "row", "rule", "tokens"), [
    ("niah_single_1/validation.jsonl", files.RULER_1, "ruler-all", 128),
    ("qa_2/validation.jsonl", files.RULER_1, "ruler-any", 32),
    ("save/vt.jsonl", files.RULER_1, "ruler-all", 30),
    ("p.jsonl", files.RULER_1, "ruler-all", 0),
    ("p.jsonl", {**files.RULER_1, "answer_prefix": " Answer:"}, "ruler-any", 32),
    ("p.jsonl", files.RULER_KVPRESS[0], "ruler-all", 128), ("p.jsonl", files.RULER_KVPRESS[1], "ruler-any", 32),
    ("p.jsonl", {**files.RULER_KVPRESS[0], "task": "kv_retrieval", "max_new_tokens": None}, "", 0),
    ("ruler2/mk_niah_easy/test.jsonl", files.RULER_2, "ruler2-soft", 0),
    ("ruler2/mk_niah_hard/test.jsonl", files.RULER_2_LETTER, "ruler2-choice", 1024),
    ("p.jsonl", {**files.RULER_2_LETTER, "eval_type": "multichoice"}, "ruler2-choice", 1024),
    ("p.jsonl", files.LONGBENCH, "longbench-qa", 32), ("p.jsonl", files.LONGBENCH_CLASSES, "longbench-classes", 64),
    ("p.jsonl", {**files.LONGBENCH, "dataset": "gov_report_e", "input": ""}, "longbench-rouge", 512),
    ("p.jsonl", {**files.LONGBENCH, "dataset": "own"}, "", 0),
    ("p.jsonl", files.LONGBENCH_CODE, "longbench-code", 64), ("p.jsonl", files.LONGBENCH_KVPRESS, "longbench-qa", 148),
    ("p.jsonl", files.LONGBENCH_2, "longbench2-choice", 128),
    ("scbench_kv.jsonl", files.SCBENCH_KV, "scbench-part", 150), ("p.jsonl", files.SCBENCH_KV, "scbench-part", 150),
    ("scbench_vt.jsonl", files.SCBENCH_VT, "scbench-share", 30), ("p.jsonl", files.SCBENCH_VT, "scbench-share", 30),
    ("p.jsonl", files.SCBENCH_CHOICE, "scbench-choice", 40),
    ("scbench_qa_chn.jsonl", files.SCBENCH_KV, "scbench-characters", 40),
    ("scbench_repoqa.jsonl", files.SCBENCH_REPO, "scbench-repository", 1024),
    ("p.jsonl", files.MRCR, "mrcr", 0), ("qa3.jsonl", files.BABILONG, "babilong", 20),
    ("p.jsonl", files.BABILONG, "babilong", 20), ("p.jsonl", {**files.BABILONG, "target": "nobody"}, "", 0),
])  # fmt: skip
def test_a_file_is_recognised_by_its_fields_and_its_path(
    path: str, row: Row, rule: str, tokens: int, tmp_path: Path
) -> None:
    task, (example, *_) = read(tmp_path, path, row)
    assert (example.rule, example.new_tokens) == (rule, tokens)
    if rule:
        assert task.metric == rule and rule in RULES
        best = {"ruler2-choice": r"\boxed{C}", "longbench2-choice": "B) a"}.get(rule, example.answers[0])
        assert task.score(example, best) == pytest.approx(
            1 / len(example.answers) if "all" in rule or "share" in rule else 1
        )
        assert task.score(example, "?") == 0.0


@pytest.mark.parametrize("row", [
    files.RULER_1, *files.RULER_KVPRESS, files.RULER_2, files.LONGBENCH, files.LONGBENCH_CODE, files.LONGBENCH_KVPRESS,
    files.LONGBENCH_2, files.SCBENCH_KV, files.SCBENCH_VT, files.SCBENCH_CHOICE, files.MRCR, files.BABILONG,
])  # fmt: skip
def test_every_prompt_is_divided_into_context_and_question(row: Row, tmp_path: Path) -> None:
    _, examples = read(tmp_path, "p.jsonl", row)
    for example in examples:
        assert part(example, "context") and part(example, "question")
        assert example.spans["context"][1] <= example.spans["question"][0]
        assert part(example, "context") in example.prompt.split(part(example, "question"))[0]


def test_a_sub_task_of_ruler_2_has_its_match(tmp_path: Path) -> None:
    for path, match in (("mv_niah_medium", "2steps"), ("qa_hard", "part"), ("mv_niah_hard", "all")):
        _, (example,) = read(tmp_path, f"{path}/test.jsonl", files.RULER_2)
        assert example.facts == {"match": match, "groups": [path]}
    _, (example,) = read(tmp_path, "mv_niah_medium/test.jsonl", {**files.RULER_2, "match_type": "all"})
    assert example.facts["match"] == "all"


def test_repeated_references_of_a_benchmark_stay(tmp_path: Path) -> None:
    _, (example,) = read(tmp_path, "p.jsonl", {**files.RULER_1, "outputs": ["1", "1", "2"]})
    assert example.answers == ("1", "1", "2")


def test_files_of_several_tasks_have_several_rules(tmp_path: Path) -> None:
    task, examples = read(tmp_path, "p.jsonl", *files.RULER_KVPRESS)
    assert task.metric == SEVERAL
    assert [task.score(example, "456 by ann") for example in examples] == [0.5, 1.0]


def test_sets_of_longbench_keep_their_worked_examples(tmp_path: Path) -> None:
    _, (example,) = read(tmp_path, "p.jsonl", files.LONGBENCH_CLASSES)
    assert example.prompt == f"{files.LONGBENCH_CLASSES['context']}\n{files.LONGBENCH_CLASSES['input']}"
    assert example.facts["classes"] == ["Length", "Person", "Other length"]
    assert set(longbench.SETS) >= set(longbench._SHOTS)
    assert all(f"longbench-{rule}" in RULES for rule, _ in longbench.SETS.values() if not rule.startswith("retrieval_"))


def test_later_turns_hold_the_right_answers_of_earlier_ones(tmp_path: Path) -> None:
    _, (first, second) = read(tmp_path, "scbench_vt.jsonl", files.SCBENCH_VT)
    context = files.SCBENCH_VT["input"]
    assert first.prompt == f"{context}\n\nWhich variables are 1?\n\nAnswer:"
    assert second.prompt == f"{first.prompt} A, B\n\nAnd 2?\n\nAnswer:"
    assert part(first, "context") == part(second, "context") == context
    _, apart = read(tmp_path, "scbench_vt.jsonl", files.SCBENCH_VT, turns="multi-request")
    assert apart[1].prompt == f"{context}\n\nAnd 2?\n\nAnswer:"
    with pytest.raises(OptionError, match="turns='both' must be one of"):
        Prompts(tmp_path / "scbench_vt.jsonl", turns="both")


def test_the_count_cuts_a_row_of_several_questions(tmp_path: Path) -> None:
    assert len(read(tmp_path, "p.jsonl", files.SCBENCH_KV, files.SCBENCH_KV)[1]) == 4
    assert len(read(tmp_path, "p.jsonl", files.SCBENCH_KV, files.SCBENCH_KV, count=3)[1]) == 3


def test_sets_of_two_sub_tasks_take_the_rule_of_each_question(tmp_path: Path) -> None:
    turns = [
        {"input": "Sum it up.", "answer": "all", "task": "scbench_summary"},
        {"input": "The key?", "answer": "12", "task": "scbench_passkey"},
    ]
    row = {**files.SCBENCH_KV, "multi_turns": turns}
    _, examples = read(tmp_path, "scbench_summary_with_needles.jsonl", row)
    assert [(e.rule, e.new_tokens) for e in examples] == [("scbench-summary", 800), ("scbench-passkey", 15)]
    row = {**row, "multi_turns": [{**turns[0], "task": "other"}]}
    with pytest.raises(TaskError, match="must have the task summary or passkey; got 'other'"):
        read(tmp_path, "scbench_summary_with_needles.jsonl", row)


def test_functions_compete_with_all_of_their_repository(tmp_path: Path) -> None:
    task, (add, show) = read(tmp_path, "scbench_repoqa.jsonl", files.SCBENCH_REPO)
    assert add.facts["functions"] == show.facts["functions"] == {"add": add.answers[0], "show": show.answers[0]}
    assert task.score(add, add.answers[0]) == 1.0 and task.score(add, show.answers[0]) == 0.0


def test_examples_are_grouped_as_the_benchmark_reports_them(tmp_path: Path) -> None:
    def groups(name: str, row: Row) -> list[list[str]]:
        return [example.facts["groups"] for example in read(tmp_path, name, row)[1]]

    assert groups("p.jsonl", files.LONGBENCH_2) == [["easy", "short"]]
    assert groups("p.jsonl", {**files.LONGBENCH, "dataset": "hotpotqa_e", "length": 4000}) == [["hotpotqa", "4-8k"]]
    assert groups("p.jsonl", files.RULER_KVPRESS[0]) == [["niah_multivalue"]]
    assert groups("vt/validation.jsonl", files.RULER_1) == [["vt"]] and groups("p.jsonl", files.RULER_1) == [[]]
    assert groups("scbench_kv.jsonl", files.SCBENCH_KV) == [["turn 1", "part"], ["turn 2", "part"]]
    assert groups("qa3.jsonl", files.BABILONG) == [["qa3"]]


def test_math_find_compares_the_first_number(tmp_path: Path) -> None:
    """Of SCBench's set mf: 5 new tokens; the release takes numbers, and of a list the first."""
    answers = (97, 4.5, "12", [3])
    turns = [{"input": f"Number {n} is", "answer": answer} for n, answer in enumerate(answers)]
    task, examples = read(tmp_path, "scbench_mf.jsonl", {"context": "[3, 97, 12]", "multi_turns": turns})
    assert task.metric == "scbench-number" and {e.new_tokens for e in examples} == {5}
    assert [e.answers for e in examples] == [("97",), ("4.5",), ("12",), ("3",)]
    assert [e.facts["groups"] for e in examples] == [[f"turn {n}", "number"] for n in (1, 2, 3, 4)]
    assert examples[1].prompt == "[3, 97, 12]\n\nNumber 0 is 97\n\nNumber 1 is"
    said = (" 97.2, or 1", " 4.5", " 12", " no. 3"), (" 1 or 97", " 4", " a dozen", "")
    assert [task.score(e, each) for e, each in zip(examples, said[0], strict=True)] == [1.0] * 4
    assert [task.score(e, each) for e, each in zip(examples, said[1], strict=True)] == [0.0] * 4


@pytest.mark.parametrize("answer", ["v1", "", "7 apples", "nan", True, [7, "x"], [], "1e3"])
def test_a_number_is_required_where_the_rule_compares_numbers(answer: Any, tmp_path: Path) -> None:
    row = {"context": "c", "multi_turns": [{"input": "q", "answer": answer}]}
    with pytest.raises(TaskError, match="an answer of mf must be a number; got "):
        read(tmp_path, "scbench_mf.jsonl", row)


def test_a_conversation_of_mrcr_ends_in_its_question(tmp_path: Path) -> None:
    _, (example,) = read(tmp_path, "p.jsonl", files.MRCR)
    assert [message["role"] for message in example.messages] == ["user", "assistant", "user"]
    assert part(example, "question") == "Put Xy12 before the first poem about rain."
    assert example.facts == {"prefix": "Xy12"}


@pytest.mark.parametrize(("target", "task"), [("office", "qa1"), ("Bill", "qa5"), ("e,n", "qa19"), ("zzz", None)])
def test_a_target_of_babilong_tells_its_task(target: str, task: str | None) -> None:
    (item,) = babilong.items({**files.BABILONG, "target": target}, "p.jsonl")
    assert item.facts.get("task") == task


def test_an_input_is_divided_at_its_last_paragraph() -> None:
    assert ruler.divided("a\nb\nc") == ("a\nb", "\nc")
    assert ruler.divided("a\nb\n") == ("a", "\nb\n") and ruler.divided("ab") == ("ab", "")


def test_a_template_keeps_the_rule(tmp_path: Path) -> None:
    task, (example,) = read(tmp_path, "p.jsonl", files.LONGBENCH, prompt_field="Text: {context} Q: {input} A:")
    assert example.prompt == "Text: long text Q: Who? A:" and example.rule == "longbench-qa"


def test_nolima_hides_a_needle_between_two_lines(tmp_path: Path) -> None:
    task = choose_task(str(files.nolima(tmp_path)), 200, 500, 0, None)
    assert isinstance(task, NoLiMa)
    examples = task.examples()
    assert len(examples) == 2 * 26  # two books, one question, all depths
    depths = []
    for example in examples:
        name = example.answers[0]
        needle = f" Actually, {name} lives next to the Semper Opera.\n"
        assert name in files.NOLIMA["character_set"] and example.prompt.count(needle) == 1
        assert example.prompt.endswith("Question: Which character has been to Dresden?\n\nAnswer:")
        assert 500 < example.spans["context"][1] < 500 + len(needle) + 60
        depths.append(example.spans["needle"][0])
        assert task.score(example, f"It is {name}.") == 1.0 and task.score(example, name.lower()) == 0.0
    assert depths[:26] == sorted(depths[:26]) and depths[25] - depths[0] > 400
    names = np.random.RandomState(42 + 401).choice(files.NOLIMA["character_set"], 26)
    assert [example.answers[0] for example in examples[:26]] == list(names)


def test_nolima_asks_each_question_of_each_test(tmp_path: Path) -> None:
    """Kinds of questions, and tests with answers of their own, numbers among their words, and the set's template."""
    rows: list[Row] = [
        {**files.NOLIMA, "questions": {"onehop": "Who saw {2}?", "twohop": "Who saw {1}, or {2}?"}},
        {
            "id": "x", "needle": "The {1} opens at {2}.", "questions": {"kind": "What opens at {2}?"},
            "task_template": "Book: {haystack} Asked: {question} Said:", "character_set": ["Yuki"],
            "tests": {"A": {"input_args": ["inn", 7], "gold_answers": ["inn", "the inn"]},
                      "B": {"input_args": ["bar", 9.5], "gold_answers": ["bar"]}},
        },
    ]  # fmt: skip
    task = NoLiMa(files.nolima(tmp_path, rows, books=1), 500, 4 * 26)
    examples = task.examples()
    groups = {e.facts["groups"][0]: e for e in examples}
    assert len(examples) == 4 * 26 and list(groups) == ["0401 T1 onehop", "0401 T1 twohop", "x A kind", "x B kind"]
    assert groups["0401 T1 twohop"].prompt.endswith("Who saw Semper Opera, or Dresden?\n\nAnswer:")
    first, second = groups["x A kind"], groups["x B kind"]
    assert first.answers == ("inn", "the inn") and part(first, "needle") == "The inn opens at 7."
    assert second.prompt.startswith("Book: ") and second.prompt.endswith(" Asked: What opens at 9.5? Said:")
    assert task.score(first, "It is the inn.") == task.score(second, "bar") == 1.0 and task.score(second, "inn") == 0.0
    names = np.random.RandomState(42 + 401).choice(files.NOLIMA["character_set"], 26)
    for kind in ("onehop", "twohop"):  # both kinds have the same names
        drawn = [e.answers[0] for e in examples if e.facts["groups"] == [f"0401 T1 {kind}"]]
        assert drawn == list(names)


def test_nolima_draws_from_all_depths_and_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    file = files.nolima(tmp_path)
    few = NoLiMa(file, 500, 5).examples()
    assert len(few) == 5 and NoLiMa(file, 500, 5).examples() == few != NoLiMa(file, 500, 5, seed=1).examples()
    with pytest.raises(TaskError, match="needs a longer book"):
        NoLiMa(file, 10**6).examples()
    with pytest.raises(TaskError, match="must hold {haystack} and {question}"):
        NoLiMa(file, 500, template="{haystack}").examples()
    file.write_text(json.dumps([{"needle": "a", "questions": {}}]))
    with pytest.raises(TaskError, match="must have needle, questions, tests"):
        NoLiMa(file).examples()
