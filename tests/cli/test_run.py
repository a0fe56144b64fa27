"""`foveate run` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import foveate
from foveate.cli import app
from foveate.kv import SnapKV


def run(*args: object):
    return CliRunner().invoke(app, ["run", *(str(arg) for arg in args)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "long.txt"
    file.write_text("The garbage collector frees objects. " * 8)
    return file


def test_the_lab_model_answers_with_a_recipe(tmp_path: Path, text: Path) -> None:
    recipe = foveate.save([SnapKV(share=0.3, recent=8)], tmp_path / "mine.json")
    found = run("--recipe", recipe, "--file", text, "--tokens", 6, "The garbage")
    assert found.exit_code == 0, found.output
    assert len(found.stdout.strip("\n")) in range(1, 30)
    assert "tokens/s; cache" in found.stderr and "% of its slots" in found.stderr
    shown = json.loads(run("--recipe", recipe, "--file", text, "--tokens", 6, "--json", "The garbage").stdout)
    assert shown["text"] == found.stdout.removesuffix("\n") and 0.3 <= shown["kept"] < 0.4
    full = json.loads(run("--file", text, "--tokens", 6, "--json", "The garbage").stdout)
    assert full["kept"] == 1.0 and full["cache_bytes"] > 2 * shown["cache_bytes"]
    keys = json.loads(run("--methods", "snapkv", "--budget", 0.5, "--file", text, "--tokens", 6, "--json", "x").stdout)
    assert 0.5 <= keys["kept"] < 0.6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recipe", "a.json", "--methods", "snapkv", "x"], "exclude each other"),
        (["--recipe", "absent.json", "x"], "cannot read recipe absent.json"),
        (["--methods", "snapvk", "x"], 'unknown method "snapvk"; did you mean "snapkv"?'),
        (["--file", "absent.txt", "x"], "file=absent.txt cannot be read"),
        (["--before-question", "x"], "before_question=True needs a text"),
        (["--chat", "x"], "needs a tokenizer with a chat template"),
        (["--tokens", "0", "x"], "tokens=0 must be"),
        (["--model", "absent/folder/x", "x"], "absent/folder/x"),
        ([" "], "prompt must not be empty"),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: str) -> None:
    found = run(*args)
    assert found.exit_code == 2
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line
