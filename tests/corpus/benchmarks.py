"""Small files in the forms that published benchmarks have. Every text in them is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas

from tests.corpus.cases import Made, case, lines, on_rows

Row = dict[str, Any]
BOOK = "\n".join(f"Line {number} tells of a walk along the river and of nothing else." for number in range(400))

RULER_1: Row = {
    "index": 7, "input": "Remember the numbers.\nThe number of a-b is 123.\nWhich number has a-b?", "outputs": ["123"],
    "length": 60, "length_w_model_temp": 60, "answer_prefix": " The number of a-b is", "token_position_answer": 11,
}  # fmt: skip
RULER_KVPRESS: list[Row] = [
    {
        "context": "The number of a-b is 123.\n", "question": "Which numbers has a-b?\n", "answer_prefix": "They are",
        "answer": ["123", "456"], "task": "niah_multivalue", "max_new_tokens": 128,
    },
    {
        "context": "Ann wrote it.\n", "question": "Who wrote it?\n", "answer_prefix": "Answer:",
        "answer": ["Ann", "Anna B."], "task": "qa_1", "max_new_tokens": 32,
    },
]  # fmt: skip
RULER_2: Row = {
    "index": 0, "question": "Question 1: How far?\n\nCopy Question 1.", "expected_answer": ["How far is it?"],
    "length": 30,
}  # fmt: skip
RULER_2_LETTER: Row = {"index": 0, "question": "Question 1: Which?\n\nSolve Question 1.", "expected_answer": "C"}
LONGBENCH: Row = {
    "input": "Who?", "context": "long text", "answers": ["Ann", "Anna"], "length": 2, "dataset": "hotpotqa",
    "language": "en", "all_classes": None, "_id": "1",
}  # fmt: skip
LONGBENCH_CLASSES: Row = {
    "input": "Question: How long is it?\nType:", "context": "Question: Who?\nType: Person", "answers": ["Length"],
    "length": 9, "dataset": "trec", "language": "en", "all_classes": ["Length", "Person", "Other length"], "_id": "2",
}  # fmt: skip
LONGBENCH_CODE: Row = {
    "input": "    return", "context": "def f(x):\n", "answers": [" x"], "length": 4, "dataset": "repobench-p",
    "language": "python", "all_classes": None, "_id": "3",
}  # fmt: skip
LONGBENCH_KVPRESS: Row = {
    "context": "Read this.\n\nlong text\n\n", "question": "Question: Who?\n", "answer_prefix": "Answer:",
    "answers": ["Ann"], "all_classes": None, "task": "narrativeqa", "max_new_tokens": 148,
}  # fmt: skip
LONGBENCH_2: Row = {
    "_id": "1", "domain": "law", "sub_domain": "contract", "difficulty": "easy", "length": "short",
    "question": "Which?",
    **{f"choice_{letter}": letter.lower() for letter in "ABCD"}, "answer": "B", "context": "text",
}  # fmt: skip
SCBENCH_KV: Row = {
    "id": 0, "context": '{"k1": "v1", "k2": "v2"}',
    "multi_turns": [{"input": "Key k1:", "answer": "v1"}, {"input": "Key k2:", "answer": "v2"}],
}  # fmt: skip
SCBENCH_VT: Row = {
    "id": 0, "input": "VAR A = 1\nVAR B = VAR A",
    "multi_turns": [{"input": "Which variables are 1?", "answer": ["A", "B"]}, {"input": "And 2?", "answer": ["C"]}],
}  # fmt: skip
SCBENCH_CHOICE: Row = {
    "id": 0, "context": "A red fox sat on a hill.",
    "multi_turns": [{"input": "Who sat?", "options": ["a cat", "a fox", "a dog", "nobody"], "answer": "a fox"}],
}  # fmt: skip
SCBENCH_REPO: Row = {
    "id": 0, "repo": "made/up", "lang": "python", "context": "def add(a, b):\n    return a + b\n",
    "multi_turns": [
        {"input": "The function that adds.", "answer": "def add(a, b):\n    return a + b", "name": "add"},
        {"input": "The function that prints.", "answer": "def show(x):\n    print(x)", "name": "show"},
    ],
}  # fmt: skip
MRCR: Row = {
    "prompt": json.dumps([
        {"role": "user", "content": "write a poem about rain"}, {"role": "assistant", "content": "Rain, rain."},
        {"role": "user", "content": "Put Xy12 before the first poem about rain."},
    ]),
    "answer": "Xy12Rain, rain.", "random_string_to_prepend": "Xy12", "n_needles": 2, "desired_msg_index": 1,
    "total_messages": 3, "n_chars": 90,
}  # fmt: skip
BABILONG: Row = {"input": "Mary went to the office.", "question": "Where is Mary? ", "target": "office"}
NOLIMA: Row = {
    "id": "0401", "system_prompt": "", "reasoning_type": "world", "character_set": ["Yuki", "Stuart", "Veronica"],
    "needle": "Actually, {CHAR} lives next to the {1}.", "questions": {"onehop": "Which character has been to {2}?"},
    "tests": {"T1": {"input_args": ["Semper Opera", "Dresden"]}},
}  # fmt: skip


def nolima(folder: Path, rows: list[Row] | None = None, books: int = 2) -> Path:
    """Write a needle set and its books, with NoLiMa's folders."""
    (folder / "needlesets").mkdir()
    (folder / "haystack" / "rand_shuffle").mkdir(parents=True)
    for number in range(books):
        (folder / "haystack" / "rand_shuffle" / f"rand_book_{number + 1}.txt").write_text(BOOK)
    file = folder / "needlesets" / "needle_set.json"
    file.write_text(json.dumps([NOLIMA] if rows is None else rows))
    return file


def _rows(base: Path, folder: Path, name: str, row: Row, *more: str) -> Made:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return on_rows(base, lines(folder / name, [row]), *more)


@case(prompts=[RULER_1["input"] + RULER_1["answer_prefix"]], expected=["123"])
def ruler_1(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "niah_single_1/validation.jsonl", RULER_1)


@case(
    prompts=["".join(row[part] for part in ("context", "question", "answer_prefix")) for row in RULER_KVPRESS],
    expected=["123", "Ann"],
)
def ruler_parquet(base: Path, folder: Path) -> Made:
    pandas.DataFrame(RULER_KVPRESS).to_parquet(folder / "test.parquet")
    return on_rows(base, folder / "test.parquet")


@case(prompts=[RULER_2["question"]], expected=["How far is it?"])
def ruler_2(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "mk_niah_easy/test.jsonl", RULER_2)


@case('match_type="some" must be all, part or 2steps')
def ruler_2_of_another_match(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "p.jsonl", {**RULER_2, "match_type": "some"})


@case(prompts=["text\n\nWhich?\n(A) a\n(B) b\n(C) c\n(D) d\n\nThe correct answer is ("], expected=["B"])
def longbench_2(base: Path, folder: Path) -> Made:
    (folder / "data.json").write_text(json.dumps([LONGBENCH_2]))
    return on_rows(base, folder / "data.json")


@case(
    prompts=[
        '{"k1": "v1", "k2": "v2"}\n\nKey k1:',
        '{"k1": "v1", "k2": "v2"}\n\nKey k1: v1\n\nKey k2:',
    ],
    expected=["v1", "v2"],
)
def scbench_in_turns(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "scbench_kv.jsonl", SCBENCH_KV)


@case(prompts=['{"k1": "v1", "k2": "v2"}\n\nKey k1:', '{"k1": "v1", "k2": "v2"}\n\nKey k2:'], expected=["v1", "v2"])
def scbench_in_requests(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "scbench_kv.jsonl", SCBENCH_KV, "--turns", "multi-request")


@case("turns='both' must be one of")
def scbench_in_another_mode(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "scbench_kv.jsonl", SCBENCH_KV, "--turns", "both")


@case("go with one")
def scbench_with_a_field(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "scbench_kv.jsonl", SCBENCH_KV, "--answer-field", "id")


@case("chat template")
def mrcr_without_a_template(base: Path, folder: Path) -> Made:
    return _rows(base, folder, "p.jsonl", MRCR)


@case(expected=[" Veronica"])
def nolima_needle_set(base: Path, folder: Path) -> Made:
    return on_rows(base, nolima(folder), "--examples", "1", "--length", "300")


@case("needs NoLiMa's books")
def nolima_without_books(base: Path, folder: Path) -> Made:
    return on_rows(base, nolima(folder, books=0))


@case("distractors, which are not supported")
def nolima_with_distractors(base: Path, folder: Path) -> Made:
    return on_rows(base, nolima(folder, [{**NOLIMA, "distractors": {"onehop": "x"}}]))
