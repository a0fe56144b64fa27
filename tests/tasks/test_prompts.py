"""The user's own prompts: good files are read, bad ones are refused with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.core.errors import TaskError
from foveate.tasks.files.prompts import Prompts


def test_json_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d", "note": 1}\n')
    assert [(e.prompt, e.answer) for e in Prompts(file).examples()] == [("a", "b"), ("c", "d")]
    assert len(Prompts(file, 1).examples()) == 1 and Prompts(file).name == "mine.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no examples"),
        ("{", "line 1 is not JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "", "answer": "b"}', "prompt must be non-empty"),
        ('{"prompt": "a"}', "answer must be non-empty"),
        ('{"prompt": "a", "answer": true}', "answer must be non-empty"),
        ('{"prompt": "a", "answer": []}', "answer must be non-empty"),
        ('{"prompt": "a", "answer": [" "]}', "answer must be non-empty"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(TaskError, match=message):
        Prompts(file).examples()


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        Prompts(tmp_path / "none.jsonl").examples()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8"):
        Prompts(tmp_path / "binary.jsonl").examples()
