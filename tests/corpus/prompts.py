"""Files of prompts as JSON: encodings, separators, lengths, and what is no JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.corpus.cases import ROWS, Made, case, lines, on_rows

NEW_LINES = "one\u2028two\u2029three\u0085four\x0bfive\x0csix"


def _file(name: str, content: str | bytes, *more: str):
    def make(base: Path, folder: Path) -> Made:
        file = folder / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return on_rows(base, file, *more)

    return make


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
RAW = json.dumps({"prompt": NEW_LINES, "answer": "x"}, ensure_ascii=False)
RUNS = {
    "byte_order_mark": ("p.jsonl", "\ufeff" + JSONL),
    "carriage_returns": ("p.jsonl", JSONL.replace("\n", "\r\n")),
    "carriage_returns_between_fields": ("p.jsonl", JSONL.replace(', "answer"', ',\r"answer"')),
    "blank_lines": ("p.jsonl", "\n \n" + JSONL.replace("\n", "\n\n\t\n")),
    "no_last_line_feed": ("p.jsonl", JSONL.rstrip("\n")),
    "utf_16": ("p.jsonl", JSONL.encode("utf-16")),
    "upper_case_suffix": ("P.JSONL", JSONL),
    "ndjson": ("p.ndjson", JSONL),
    "packed": ("p.jsonl.gz", gzip.compress(JSONL.encode())),
    "list_of_rows": ("p.json", json.dumps(ROWS)),
    "rows_under_data": ("p.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
    "rows_of_the_viewer": ("p.json", json.dumps({"rows": [{"row_idx": 0, "row": row} for row in ROWS]})),
    "lines_named_json": ("p.json", JSONL),
    "list_named_jsonl": ("p.jsonl", json.dumps(ROWS, indent=1)),
    "two_megabytes_in_a_line": ("p.jsonl", JSONL.replace('"prompt"', f'"note": "{"x" * 2_000_000}", "prompt"')),
}  # fmt: skip
REFUSED = {
    "empty_file": ("p.jsonl", "", "holds no examples"),
    "blank_file": ("p.jsonl", "\n\n  \n", "holds no examples"),
    "empty_list": ("p.json", "[]", "holds no examples"),
    "latin_1": ("p.jsonl", '{"prompt": "caf\xe9", "answer": "b"}'.encode("latin-1"), "not UTF-8"),
    "binary": ("p.jsonl", bytes(range(128, 256)), "not UTF-8"),
    "cut_line": ("p.jsonl", JSONL + '{"prompt": "a", "ans', "line 3 is not JSON"),
    "cut_json": ("p.json", json.dumps(ROWS)[:-9], "not JSON"),
    "json_text": ("p.json", '"prompt"', "must be a list of objects"),
    "line_of_text": ("p.jsonl", '"prompt"\n', "line 1 must be an object"),
    "deep_nesting": ("p.jsonl", '{"prompt": ' + "[" * 100_000, "line 1"),
    "endless_number": ("p.jsonl", '{"prompt": "a", "answer": ' + "9" * 9_999 + "}", "line 1"),
    "empty_prompt": ("p.jsonl", '{"prompt": " ", "answer": "b"}', "line 1: prompt must be"),
    "prompt_is_a_number_list": ("p.jsonl", '{"prompt": [1, 2], "answer": "b"}', "line 1: prompt must be"),
    "prompt_is_null": ("p.jsonl", '{"prompt": null, "answer": "b"}', "line 1"),
    "no_answer": ("p.jsonl", '{"prompt": "a"}', "line 1: answer must be"),
    "answer_is_true": ("p.jsonl", '{"prompt": "a", "answer": true}', "line 1: answer must be"),
    "answers_are_blank": ("p.jsonl", '{"prompt": "a", "answers": ["", " "]}', "line 1: answers must be"),
    "unknown_fields": ("p.jsonl", '{"text": "a", "label": "b"}', "--prompt-field"),
    "unknown_suffix": ("p.txt", JSONL, "must end in one of"),
    "packed_and_cut": ("p.jsonl.gz", gzip.compress(JSONL.encode())[:-12], "cannot be read"),
    "not_packed": ("p.jsonl.gz", JSONL, "cannot be read"),
    "longer_than_the_context": ("p.jsonl", json.dumps({"prompt": "word " * 900, "answer": "b"}), "context"),
}  # fmt: skip
for _name, (_file_name, _content) in RUNS.items():
    _make = _file(_file_name, _content)
    _make.__name__ = _name
    case()(_make)
for _name, (_file_name, _content, _says) in REFUSED.items():
    _make = _file(_file_name, _content)
    _make.__name__ = _name
    case(_says)(_make)


@case(expected=["x"], prompts=[NEW_LINES])
def separators_inside_texts(base: Path, folder: Path) -> Made:
    return _file("p.jsonl", RAW + "\n")(base, folder)


@case(expected=["b\0"], prompts=["a\ufffdé\U0001f600\0z"])
def any_unicode(base: Path, folder: Path) -> Made:
    return _file("p.jsonl", r'{"prompt": "a\ud800\u00e9\ud83d\ude00\u0000z", "answer": "b\u0000"}')(base, folder)


@case(expected=["42"])
def numbers_as_answers(base: Path, folder: Path) -> Made:
    return on_rows(base, lines(folder / "p.jsonl", [{"prompt": "a", "answer": 42}]))


@case(expected=["ab"])
def several_answers(base: Path, folder: Path) -> Made:
    return on_rows(base, lines(folder / "p.jsonl", [{"prompt": "a", "answers": ["ab", "c d"]}]))


@case("cannot be read: No such file")
def prompts_missing(base: Path, folder: Path) -> Made:
    return on_rows(base, folder / "none.jsonl")


@case("is no task")
def task_of_five_thousand_letters(base: Path, folder: Path) -> Made:
    return on_rows(base, Path("t" * 5000))


@case("is no task")
def unknown_task(base: Path, folder: Path) -> Made:
    return on_rows(base, Path("poetry"))


@case("must contain dataset_info.json or dataset_dict.json; valid files in it: b.csv, p.jsonl")
def folder_of_files(base: Path, folder: Path) -> Made:
    lines(folder / "p.jsonl", ROWS)
    (folder / "b.csv").write_text("prompt,answer\n")
    return on_rows(base, folder)


@case(
    "examples",
)
def no_examples_wanted(base: Path, folder: Path) -> Made:
    return on_rows(base, lines(folder / "p.jsonl", ROWS), "--examples", "0")
