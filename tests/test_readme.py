"""README.md does what it says: every command and snippet, typed line by line in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.bench.comparison.results import Comparison
from foveate.cli import app
from tests.support.readme import LONG, ROOT, SHORT, Piece, pieces, shortened

README = (ROOT / "README.md").read_text("utf-8")
PIECES = pieces(README)


def made_by(target: str) -> list[str]:
    """The `foveate` command that a target of the Makefile ends with, once everything is installed."""
    printed = subprocess.run(["make", "-n", "-C", ROOT, target], capture_output=True, text=True, check=True).stdout
    command = shlex.split([line for line in printed.splitlines() if "foveate" in line][-1])
    assert command[0].endswith("/foveate")
    return command[1:]


def arguments(piece: Piece) -> list[str] | None:
    """Those of the `foveate` command that a line comes to; None for a line that is another program's."""
    words = shlex.split(piece.text)
    if words[0] == "make":
        return made_by(words[1])
    return words[1:] if words[0] == "foveate" else None


def test_it_is_read_on_one_page() -> None:
    assert len(README.splitlines()) <= 150
    kinds = [piece.kind for piece in PIECES]
    assert kinds.count("python") >= 2 and kinds.count("shell") >= 6


def test_its_lines_are_of_known_programs() -> None:
    known = {"git", "cd", "make", "foveate", "printf", "pip"}
    assert {shlex.split(piece.text)[0] for piece in PIECES if piece.kind == "shell"} <= known


def test_every_line_in_order_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With few steps and examples: that one line's files do not disturb the next one's."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for piece in PIECES:
        if piece.kind == "python":  # what a session prints is looked at below
            exec(compile(piece.text, "README.md", "exec"), names)
        elif piece.text.startswith("printf"):
            subprocess.run(piece.text, shell=True, check=True)
        elif (given := arguments(piece)) is not None:
            result = CliRunner().invoke(app, shortened(given, SHORT))
            assert result.exit_code == 0, f"{piece.text}: {result.output} {result.exception!r}"
            if given[0] == "run":
                assert result.stdout.strip() and "tokens" in result.stderr
            else:
                assert "report" in result.stdout or "network" in result.stdout
    (full,) = [row for row in Comparison.load(tmp_path / "my-prompts" / "results.json").rows if row.method == "full"]
    assert full.score == 1.0, "the lab model answers the prompt that README writes"
    printed = capsys.readouterr().out
    assert "of the cache" in printed
    assert "GFLOP" in printed


@pytest.mark.slow
def test_a_bare_clone(tmp_path: Path) -> None:
    """In a clone without anything else, in processes of their own, with the sizes that README's lines have."""
    clone = tmp_path / "foveate"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", clone], check=True)
    where = {**os.environ, "PYTHONPATH": str(clone / "src")}
    for piece in pieces((clone / "README.md").read_text("utf-8")):
        if piece.kind == "python":
            command: list[str] = [sys.executable, "-c", _with_those_before(clone, piece)]
        elif piece.text.startswith("printf"):
            command = ["sh", "-c", piece.text]
        elif (given := arguments(piece)) is not None:
            command = [sys.executable, "-m", "foveate", *shortened(given, LONG)]
        else:
            continue
        done = subprocess.run(command, cwd=clone, env=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{piece.text}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def _with_those_before(clone: Path, last: Piece) -> str:
    """A snippet after all that stand above it: the reader's session goes on."""
    snippets = [piece for piece in pieces((clone / "README.md").read_text("utf-8")) if piece.kind == "python"]
    return "\n".join(piece.text for piece in snippets[: snippets.index(last) + 1])


@pytest.mark.parametrize("file", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))])
def test_what_it_links_to_is_there(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    missing = [link for link in links if not ((ROOT / file).parent / link).exists()]
    assert not missing
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), target
