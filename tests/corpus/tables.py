"""Tables of prompts, fields by name, and the rows of known benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas

from tests.corpus.cases import ROWS, Made, case, lines, on_rows

PROMPTS, ANSWERS = [row["prompt"] for row in ROWS], [row["answer"] for row in ROWS]


@case(prompts=PROMPTS)
def csv_file(base: Path, folder: Path) -> Made:
    pandas.DataFrame(ROWS).to_csv(folder / "p.csv")
    return on_rows(base, folder / "p.csv")


@case(prompts=['one,\n"two"'], expected=["3"])
def csv_with_quotes(base: Path, folder: Path) -> Made:
    (folder / "p.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"one,\n""two""",3\r\n')
    return on_rows(base, folder / "p.csv")


@case()
def csv_with_semicolons(base: Path, folder: Path) -> Made:
    pandas.DataFrame(ROWS).to_csv(folder / "p.csv", sep=";")
    return on_rows(base, folder / "p.csv")


@case()
def csv_with_a_long_field(base: Path, folder: Path) -> Made:
    pandas.DataFrame([{**row, "note": "x" * 300_000} for row in ROWS]).to_csv(folder / "p.csv")
    return on_rows(base, folder / "p.csv")


@case(expected=["ab"])
def csv_with_lists(base: Path, folder: Path) -> Made:
    pandas.DataFrame([{"prompt": "a", "answers": ["ab", "c"]}]).to_csv(folder / "p.csv")
    return on_rows(base, folder / "p.csv")


@case("line 3 has 3 fields; the header has 2")
def csv_ragged(base: Path, folder: Path) -> Made:
    (folder / "p.csv").write_text("prompt,answer\na,b\nc,d,e\n")
    return on_rows(base, folder / "p.csv")


@case("is not CSV: unexpected end of data")
def csv_with_an_open_quote(base: Path, folder: Path) -> Made:
    (folder / "p.csv").write_text('prompt,answer\n"a,b\n')
    return on_rows(base, folder / "p.csv")


@case("holds no examples")
def csv_header_alone(base: Path, folder: Path) -> Made:
    (folder / "p.csv").write_text("prompt,answer\n")
    return on_rows(base, folder / "p.csv")


@case()
def tsv_file(base: Path, folder: Path) -> Made:
    pandas.DataFrame(ROWS).to_csv(folder / "p.tsv", sep="\t")
    return on_rows(base, folder / "p.tsv")


@case(prompts=PROMPTS)
def parquet_file(base: Path, folder: Path) -> Made:
    pandas.DataFrame(ROWS).to_parquet(folder / "p.parquet")
    return on_rows(base, folder / "p.parquet")


@case("not a valid Parquet file")
def parquet_cut(base: Path, folder: Path) -> Made:
    pandas.DataFrame(ROWS).to_parquet(folder / "p.parquet")
    (folder / "p.parquet").write_bytes((folder / "p.parquet").read_bytes()[:-40])
    return on_rows(base, folder / "p.parquet")


@case(prompts=PROMPTS)
def dataset(base: Path, folder: Path) -> Made:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set")
    return on_rows(base, folder / "set")


@case(prompts=PROMPTS)
def dataset_of_one_split(base: Path, folder: Path) -> Made:
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "set")
    return on_rows(base, folder / "set")


@case("several splits; name one of set/train, set/test")
def dataset_of_several_splits(base: Path, folder: Path) -> Made:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "set")
    return on_rows(base, folder / "set")


@case("dataset that cannot be read")
def dataset_broken(base: Path, folder: Path) -> Made:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set")
    next((folder / "set").glob("*.arrow")).unlink()
    return on_rows(base, folder / "set")


def _rows(base: Path, folder: Path, row: dict, *more: str) -> Made:
    return on_rows(base, lines(folder / "p.jsonl", [row]), *more)


NESTED = {"doc": {"q": "why", "options": ["x", "y"]}, "text": "because", "gold": ["1", "2"]}


@case(prompts=["why"], expected=["1"])
def fields_by_name(base: Path, folder: Path) -> Made:
    return _rows(base, folder, NESTED, "--prompt-field", "doc.q", "--answer-field", "gold")


@case(prompts=["because\nQ: why y"], expected=["2"])
def fields_in_a_text(base: Path, folder: Path) -> Made:
    more = ("--prompt-field", "{text}\nQ: {doc.q} {doc.options.1}", "--answer-field", "gold.1")
    return _rows(base, folder, NESTED, *more)


@case("has no field 'doc.z'")
def field_that_is_not_there(base: Path, folder: Path) -> Made:
    return _rows(base, folder, NESTED, "--prompt-field", "doc.z", "--answer-field", "gold")


@case("goes with a file of prompts as the task")
def fields_of_no_file(base: Path, folder: Path) -> Made:
    return ["--model", str(base), "--task", "needle", "--prompt-field", "a"]


@case(prompts=["long text\n\nWho?\n\nAnswer:"], expected=["Ann"])
def longbench(base: Path, folder: Path) -> Made:
    row = {
        "input": "Who?", "context": "long text", "answers": ["Ann", "Anna"], "length": 2, "dataset": "hotpotqa",
        "language": "en", "all_classes": None, "_id": "1",
    }  # fmt: skip
    return _rows(base, folder, row)


@case(prompts=["def f(x):\n    return"], expected=[" x"])
def longbench_code(base: Path, folder: Path) -> Made:
    row = {"input": "    return", "context": "def f(x):\n", "answers": [" x"], "dataset": "repobench-p"}
    return _rows(base, folder, row)


@case(prompts=["Some keys. What is it? It is"], expected=["123"])
def ruler(base: Path, folder: Path) -> Made:
    row = {
        "index": 0,
        "input": "Some keys. What is it?",
        "outputs": ["123", "456"],
        "length": 9,
        "answer_prefix": " It is",
    }
    return _rows(base, folder, row)


@case(prompts=["Some keys. What is it? It is"], expected=["123"])
def ruler_with_the_prefix_in_the_input(base: Path, folder: Path) -> Made:
    row = {"index": 0, "input": "Some keys. What is it? It is", "outputs": ["123"], "answer_prefix": " It is"}
    return _rows(base, folder, row)


@case(prompts=["Keys.\nWhich?\nIt is"], expected=["123"])
def ruler_of_kvpress(base: Path, folder: Path) -> Made:
    row = {"context": "Keys.\n", "question": "Which?\n", "answer_prefix": "It is", "answer": ["123"], "task": "niah"}
    return _rows(base, folder, row)


@case(prompts=["Mary went home.\n\nWhere is Mary?\n\nAnswer:"], expected=["home"])
def babilong(base: Path, folder: Path) -> Made:
    return _rows(base, folder, {"input": "Mary went home.", "question": "Where is Mary?", "target": "home"})


@case(prompts=["Q: 1+1?\nA:"], expected=["2"])
def lm_eval_generation(base: Path, folder: Path) -> Made:
    arguments = {"gen_args_0": {"arg_0": "Q: 1+1?\nA:", "arg_1": {"until": ["\n"]}}}
    row = {"doc_id": 0, "doc": {"q": "1+1"}, "target": "2", "arguments": arguments, "resps": [["3"]]}
    return _rows(base, folder, row)


@case(prompts=["The sky is"], expected=[" blue"])
def lm_eval_choices(base: Path, folder: Path) -> Made:
    each = {f"gen_args_{i}": {"arg_0": "The sky is", "arg_1": f" {x}"} for i, x in enumerate(("red", "blue"))}
    return _rows(base, folder, {"doc_id": 0, "doc": {"goal": "sky"}, "target": "1", "arguments": each})


@case(prompts=["text\n\nWho?\n\nAnswer:"], expected=["Ann"])
def squad(base: Path, folder: Path) -> Made:
    row = {"id": "1", "context": "text", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}}
    return _rows(base, folder, row)


@case("line 2")
def second_row_of_another_kind(base: Path, folder: Path) -> Made:
    (folder / "p.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"q": 1}))
    return on_rows(base, folder / "p.jsonl")
