"""`foveate cite`: BibTeX on stdout, and nothing else there."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

from foveate.cli import app
from foveate.core.cite import cite


def run(*args: str):
    return CliRunner().invoke(app, ["cite", *args])


def test_entries_of_several_keys() -> None:
    result = run("hip", "sink_recent", "sliding_window")
    assert result.exit_code == 0
    assert result.stdout == cite("hip", "sink_recent")
    assert result.stdout.count("@misc") == 2


def test_a_wrong_key_is_one_line() -> None:
    result = run("hip", "hedgehgo")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == 'error: unknown system "hedgehgo"; did you mean "hedgehog"?\n'


def test_a_key_is_needed() -> None:
    assert run().exit_code == 2


def test_it_answers_without_torch() -> None:
    code = (
        "import sys\nfrom foveate.cli import main\n"
        "try: main(['cite', 'hip'])\n"
        "except SystemExit as done: sys.exit(done.code or bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
