"""`foveate tune` at the command line."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from foveate.bench.tuning.results import Trial, Tuning
from foveate.bench.tuning.space import BUDGETS
from foveate.cli import app, tune as command
from foveate.core.errors import Interrupted, OptionError

TRIED = [
    Trial("snapkv at 0.5", 0.5, 0.0, 32, "holds"),
    Trial("snapkv at 0.1", 0.1, 0.4, 9, "loses too much"),
    Trial("razor_attention", float("nan"), float("nan"), 0, "cannot run: left out"),
    Trial("snapkv at 0.5", 0.5, 0.0, 150, "passed", held_out=True),
]
FOUND = Tuning(
    "lab lm", "needle", "begins", 0.98, 0.95, "snapkv at 0.5", "out/recipe.json", 0.5, 1.0, 1.0, 0.0, 0.0198, True, 32,
    150, 900, ["a note"], TRIED,
)  # fmt: skip


class Fake:
    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.given: dict[str, Any] = {}

    def __call__(self, *, progress: Any, **given: Any) -> Tuning:
        self.given = given
        progress.start(2)
        progress.advance("[red]policies")
        if self.raises is not None:
            raise self.raises
        return FOUND


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake, module = Fake(), ModuleType("foveate.bench.tuning.run")
    module.tune = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foveate.bench.tuning.run", module)
    return fake


def run(*args: object):
    return CliRunner().invoke(app, ["tune", *(str(arg) for arg in args)])


def test_the_table_the_claim_and_the_files(tune: Fake, tmp_path: Path) -> None:
    found = run("--keep", 0.9, "--methods", "snapkv, knorm", "--budgets", "0.1,0.5", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    text = " ".join(found.stdout.split())
    assert "snapkv at 0.5 50.0% 0.0000 150 passed (held out)" in text and "loses too much" not in text
    assert "At 95% confidence it loses at most 2.0 % of the score" in text and "a note" in text
    assert "recipe out/recipe.json" in text and "4 settings were tried" in text
    assert tune.given["keep"] == 0.9 and tune.given["methods"] == ["snapkv", "knorm"]
    assert tune.given["budgets"] == (0.1, 0.5) and tune.given["held_out"] is None
    assert run().exit_code == 0 and tune.given["budgets"] == BUDGETS and tune.given["search"] == 16


def test_a_result_prints_as_the_command_does(tune: Fake, tmp_path: Path) -> None:
    printed = [line.rstrip() for line in run("--out", tmp_path).stdout.splitlines()]
    lines = str(FOUND).splitlines()
    assert printed[: len(lines)] == lines and lines[-1] == "a note" and "Trial(" not in str(FOUND)
    page = replace(FOUND, notes=["<b>a note"])._repr_html_()
    assert page.startswith("<pre") and "&lt;b&gt;a note" in page and "4 settings were tried" in page


def test_if_nothing_held_the_table_says_what_lost_least(tune: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FOUND", replace(FOUND, setting="full cache", tried=TRIED[1:3]))
    text = " ".join(run().stdout.split())
    assert "snapkv at 0.1 10.0% 0.4000 9 loses too much" in text and "2 settings were tried" in text
    assert "in the search, so that none was tested on held-out examples: use the full cache." in text
    monkeypatch.setattr(sys.modules[__name__], "FOUND", replace(FOUND, tried=TRIED[:1]))
    assert "1 setting was tried" in " ".join(run().stdout.split())


def test_json(tune: Fake) -> None:
    found = json.loads(run("--json").stdout)
    assert found["setting"] == "snapkv at 0.5" and found["tried"][2]["share"] is None


def test_interrupts_and_errors(tune: Fake, tmp_path: Path) -> None:
    tune.raises = Interrupted(7, 7)
    found = run("--out", tmp_path)
    assert found.exit_code == 1 and f"interrupted: 7 answers are kept in {tmp_path}" in found.stderr
    tune.raises = KeyboardInterrupt()
    assert "before any of the answers was finished" in run().stderr
    tune.raises = OptionError("keep=2 must be in 0..1")
    found = run()
    assert (found.exit_code, found.stderr.strip().splitlines()[-1]) == (2, "error: keep=2 must be in 0..1")
    found = run("--budgets", "many")
    assert found.exit_code == 2 and "budgets='many' must be numbers" in found.stderr
    assert run("--methods", ",").exit_code == 2


def test_the_defaults_are_those_of_the_function() -> None:
    import inspect

    from foveate.bench.tuning import run as module

    wanted, given = inspect.signature(module.tune).parameters, inspect.signature(command.command).parameters
    for name, parameter in wanted.items():
        if name not in ("progress", "budgets"):
            assert given[name].default == parameter.default, name
    assert re.search(r"nine of 0\.03 to 0\.7", command.Budgets.__metadata__[0].help or "") and len(BUDGETS) == 9
