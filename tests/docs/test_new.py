"""`make new`: what it writes for each seam imports, is clean, is catalogued, and fails wherever it is still a stub."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from foveate.core.catalog_file import read
from foveate.core.catalog_rows import ROOMS
from foveate.core.errors import CatalogError
from tests.support.readme import ROOT
from tests.test_language import headless


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("new", ROOT / "docs" / "new.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new"] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


new = _script()
SEAMS = new.seams()
PAPER = {"TITLE": 'Attention, "Please": a Title So Long That Its Docstring Needs a Second Line for the Number and Year',
         "YEAR": "2024", "ARXIV": "2401.00001", "AUTHORS": "Ada Lovelace, Charles Babbage"}  # fmt: skip
each_seam = pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.room}-{seam.name}")


def key_of(seam: Any) -> str:
    return f"zz_new_{seam.room}_{seam.name}"


@dataclass(frozen=True)
class Copy:
    """A copy of the repository with a new system of every seam, and what the tools say about it.

    Args:
        root: the copy.
        systems: the new systems by room and seam.
        complaints: the output of ruff and mypy.
        failures: messages of the new tests by file and test; "" for a test that passed.
        found: the rows of `foveate systems --json` by key.
    """

    root: Path
    systems: dict[tuple[str, str], Any]
    complaints: str
    failures: dict[str, dict[str, str]]
    found: dict[str, dict[str, Any]]


def _copied(root: Path) -> Path:
    leave = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "src", root / "src", ignore=leave)
    shutil.copytree(ROOT / "tests" / "support", root / "tests" / "support", ignore=leave)
    for name in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    (root / "types").mkdir()
    names = "from typing import Annotated as Float, Annotated as Int\n__all__ = ['Float', 'Int']\n"
    (root / "types" / "jaxtyping.pyi").write_text(names)
    return root


def _output(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(root / "src"), "MYPYPATH": str(root / "types")}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=root, env=surroundings, capture_output=True, text=True, check=False
    )


def _failures(root: Path, files: Sequence[str]) -> dict[str, dict[str, str]]:
    _output(root, "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "--junitxml=report.xml", *files)
    found: dict[str, dict[str, str]] = {file: {} for file in files}
    for case in ElementTree.parse(root / "report.xml").iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        bad = [each.attrib["message"] for each in case if each.tag in ("failure", "error")]
        found[file][case.attrib["name"]] = " ".join(bad)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    root = _copied(tmp_path_factory.mktemp("copy"))
    systems = {}
    for seam in SEAMS:
        given = {"KEY": key_of(seam), "ROOM": seam.room, "SEAM": seam.name, **PAPER}
        systems[seam.room, seam.name] = new.scaffold(given, root)
    code, tests = ([getattr(each, name).as_posix() for each in systems.values()] for name in ("code", "tests"))
    checks = (
        ("ruff", "check", "--no-cache", *code, *tests), ("ruff", "format", "--no-cache", "--check", *code, *tests),
        # types of other packages, which take mypy half a minute, are for `make lint`
        ("mypy", "--cache-dir", os.devnull, "--no-site-packages", "--ignore-missing-imports", *code),
    )  # fmt: skip
    runs = [_output(root, *command) for command in checks]
    complaints = "".join(run.stdout + run.stderr for run in runs if run.returncode)
    listed = json.loads(_output(root, "foveate", "systems", "--json").stdout)
    return Copy(root, systems, complaints, _failures(root, tests), {row["key"]: row for row in listed})


# -- what is written ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_clean(copy: Copy) -> None:
    assert copy.complaints == ""


@each_seam
def test_a_new_system_is_found_by_the_command(copy: Copy, seam: Any) -> None:
    made, row = copy.systems[seam.room, seam.name], copy.found[key_of(seam)]
    assert (row["title"], row["year"], row["arxiv"]) == (PAPER["TITLE"], 2024, PAPER["ARXIV"])
    assert row["authors"] == ["Ada Lovelace", "Charles Babbage"]
    assert (row["room"], row["object"], row["test"]) == (seam.room, f"{made.module}:{made.name}", made.tests.as_posix())
    assert tuple(row["tags"]) == seam.tags
    assert (copy.root / made.code).with_name("__init__.py").is_file()


@each_seam
def test_every_stub_has_a_test_that_says_what_to_write(copy: Copy, seam: Any) -> None:
    made = copy.systems[seam.room, seam.name]
    code, tests = ((copy.root / path).read_text("utf-8") for path in (made.code, made.tests))
    failures = copy.failures[made.tests.as_posix()]
    assert [name for name, message in failures.items() if new.MARK not in message] == []
    stubs = re.findall(r'NotImplementedError\(\s*"(.+?)"\s*\)', code)
    assert stubs and code.count("NotImplementedError") == len(stubs)
    assert [stub for stub in stubs if not any(stub in message for message in failures.values())] == []
    functions = [node for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef)]
    assert failures.keys() == {each.name for each in functions}
    endings = [ast.unparse(each.body[-1]) for each in functions]
    assert all(end.startswith(f"pytest.fail('{new.MARK}: ") or f'fail("{new.MARK}: ' in end for end in endings), (
        "a test that only calls a hook would pass once the hook is written"
    )


@each_seam
def test_docstrings_are_marked_and_open_with_a_head(copy: Copy, seam: Any) -> None:
    made = copy.systems[seam.room, seam.name]
    tree = ast.parse((copy.root / made.code).read_text("utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    for node in (tree, cls):
        text = ast.get_docstring(node) or ""
        assert text.lower().startswith(new.MARK) and not headless(text)
    paper = " ".join((ast.get_docstring(tree) or "").split("\n\n")[1].split())
    assert paper == f"{PAPER['TITLE']} (2024), arXiv 2401.00001."


@each_seam
def test_a_worked_example_or_a_neighbour_is_named(seam: Any) -> None:
    chapters = re.findall(r"^## (.+)$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    chapter = re.match(r"CONTRIBUTING\.md, ([^;]+)", seam.see)
    assert chapter is None or chapter[1] in chapters
    paths = re.findall(r"(?:src|tests)/[\w/]+\.py", " ".join((seam.see, *seam.then)))
    assert chapter or paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    folders = [ROOT / "src/foveate" / seam.room / folder for folder in seam.folders if "$" not in folder]
    assert [folder for folder in folders if not folder.is_dir()] == []


def left(root: Path) -> set[str]:
    """Return the files that have a part which is still to be written."""
    found = set()
    for folder, kinds in (("src", ("*.py", "*.toml")), ("tests", ("*.py",))):
        for path in (path for kind in kinds for path in (root / folder).rglob(kind)):
            if new.MARK in path.read_text("utf-8").lower():
                found.add(path.relative_to(root).as_posix())
    return found


def test_parts_that_are_still_to_be_written_are_found(copy: Copy) -> None:
    made = copy.systems.values()
    files = {path.as_posix() for each in made for path in (each.code, each.tests, each.row)}
    assert left(copy.root) == files


def test_nothing_is_still_to_be_written() -> None:
    assert left(ROOT) == set(), f'grep -rni "{new.MARK}" src tests'


# -- blanks and refusals -----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A repository of which only the catalogue is there."""
    shutil.copytree(ROOT / "src/foveate/catalog", tmp_path / "src/foveate/catalog")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


GATE = {"KEY": "zz_new", "ROOM": "nn", "SEAM": "gate"}


@pytest.mark.parametrize("blank", ["TITLE", "YEAR", "ARXIV"])
def test_the_catalogue_refuses_a_blank(bare: Path, blank: str) -> None:
    made = new.scaffold(GATE | {word: text for word, text in PAPER.items() if word != blank}, bare)
    with pytest.raises(CatalogError, match=rf'nn\.toml, row \d+ \("zz_new"\): {blank.lower()}='):
        read(bare / made.row)
    row = (bare / made.row).read_text("utf-8").split("[[system]]")[-1]
    assert re.search(rf"^{blank.lower()} = .*  # {new.MARK}: ", row, re.MULTILINE)
    assert f"\n{new.MARK.capitalize()}: the paper's title, " in (bare / made.code).read_text("utf-8")


def test_a_paper_may_have_no_number(bare: Path) -> None:
    made = new.scaffold(GATE | PAPER | {"ARXIV": "", "CLASS": "ZZTop", "FOLDER": "channel"}, bare)
    row = next(row for row in read(bare / made.row).systems if row.key == "zz_new")
    assert (row.arxiv, row.object) == ("", "foveate.nn.channel.zz_new:ZZTop")
    assert "(2024).\n" in (bare / made.code).read_text("utf-8")


def test_without_authors_the_row_is_valid_and_marked(bare: Path) -> None:
    before = (bare / "src/foveate/catalog/nn.toml").read_text("utf-8")
    made = new.scaffold(GATE | {word: text for word, text in PAPER.items() if word != "AUTHORS"}, bare)
    assert next(row for row in read(bare / made.row).systems if row.key == "zz_new").authors == ()
    after = (bare / made.row).read_text("utf-8")
    assert after.startswith(before) and f"authors = []  # {new.MARK}" in after[len(before) :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"KEY": ""}, r"KEY= is missing: make new KEY=.*; seams: gaze: gaze_model, searcher; kv: policy"),
        ({"SEAM": ""}, "SEAM= is missing"),
        ({"KEY": "ulsam"}, r"KEY=ulsam is taken: nn\.toml has it, ULSAM: .* \(2020\)"),
        ({"KEY": "hip"}, r"KEY=hip is taken: ops\.toml"),
        ({"KEY": "9lives"}, "KEY=9lives must be lower-case letters, digits and underscores"),
        ({"KEY": "New-Gate"}, "KEY=New-Gate must be lower-case"),
        ({"KEY": "lambda"}, "KEY=lambda must be .* no keyword of Python"),
        ({"KEY": "../up"}, "KEY=../up must be"),
        ({"ROOM": "cellar"}, "ROOM=cellar is unknown; seams by room: .*nn: fusion, gate, layer, pool, seq2seq"),
        ({"ROOM": "dist"}, "ROOM=dist has no template yet; seams by room"),
        ({"SEAM": "gaet"}, "SEAM=gaet is unknown; seams of nn: fusion, gate, layer, pool, seq2seq"),
        ({"SEAM": "policy"}, "SEAM=policy is a seam of kv; seams of nn: fusion, gate"),
        ({"CLASS": "lower"}, "CLASS=lower must be letters and digits that begin with a capital letter"),
        ({"CLASS": "ULSAM"}, r"CLASS=ULSAM is taken: foveate\.nn\.vision\.ulsam"),
        ({"CLASS": "Layer"}, r"CLASS=Layer is taken: foveate\.nn\.base\.layer"),
        ({"KEY": "tensor"}, "CLASS=Tensor stands for something else"),
        ({"FOLDER": "base"}, "FOLDER=base must be a folder for SEAM=gate: vision, channel"),
        ({"YEAR": "24"}, "^year=24 must be a year$"),
        ({"YEAR": "soon"}, "^year='soon' must be a year$"),
        ({"ARXIV": "https://arxiv.org/abs/2401.00001"}, "^arxiv='https"),
        ({"TITLE": " "}, "^title=' ' must be"),
        ({"TITLE": "one\ntwo"}, "TITLE must be one line"),
        ({"TITLE": r"\alpha"}, "TITLE must be one line without backslashes"),
    ],
)
def test_refusals_write_nothing(bare: Path, changes: dict[str, str], message: str) -> None:
    before = {path: path.read_bytes() for path in bare.rglob("*") if path.is_file()}
    with pytest.raises(new.Refused, match=message) as caught:
        new.scaffold(GATE | changes, bare)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in bare.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("seam", "there"),
    [
        ({}, "src/foveate/nn/vision/zz_new.py"),
        ({}, "tests/systems/nn/test_zz_new.py"),
        ({"ROOM": "kv", "SEAM": "policy"}, "src/foveate/kv/zz_new/__init__.py"),
        ({"ROOM": "studies", "SEAM": "study"}, "src/foveate/studies/zz_new.py"),
    ],
)
def test_a_file_is_never_written_over(bare: Path, seam: dict[str, str], there: str) -> None:
    (bare / there).parent.mkdir(parents=True)
    (bare / there).write_text("mine")
    with pytest.raises(new.Refused, match=r"KEY=zz_new: \S+ exists; choose another key"):
        new.scaffold(GATE | seam, bare)
    assert (bare / there).read_text() == "mine"
    assert "zz_new" not in (bare / "src/foveate/catalog/nn.toml").read_text("utf-8")


def test_a_key_is_not_given_twice(bare: Path) -> None:
    new.scaffold(GATE | PAPER, bare)
    with pytest.raises(new.Refused, match="KEY=zz_new is taken"):
        new.scaffold(GATE | PAPER | {"ROOM": "kv", "SEAM": "policy"}, bare)


# -- templates and the command -----------------------------------------------------------------------------------------


def test_a_template_is_all_that_a_new_seam_needs(bare: Path, tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    for place, like in (("gaze/searcher", "lens/measure"), ("steer/diffusion_method", "steer/method")):
        (templates / place).parent.mkdir(parents=True)
        shutil.copy(new.TEMPLATES / f"{like}.txt", templates / f"{place}.txt")
    for room, seam in (("gaze", "searcher"), ("steer", "diffusion_method")):
        made = new.scaffold(PAPER | {"KEY": f"zz_{seam}", "ROOM": room, "SEAM": seam}, bare, templates)
        assert made.code.parts[:3] == ("src", "foveate", room)
        assert f"zz_{seam}" in {row.key for row in read(bare / made.row).systems}
    with pytest.raises(new.Refused, match="seams by room: gaze: searcher; steer: diffusion_method"):
        new.scaffold(GATE, bare, templates)


def test_names_of_seams_are_clear() -> None:
    for room in {seam.room for seam in SEAMS}:
        names = [name for seam in SEAMS if seam.room == room for name in (seam.name, *seam.also)]
        assert room in ROOMS and len(names) == len(set(names))


def test_the_command_says_what_it_wrote_and_what_comes_next(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["KEY=zz_new", "ROOM=steer", "SEAM=method", "TITLE=a=b", "YEAR=2024", "ARXIV="]
    assert new.main(words, bare) == 0
    said = capsys.readouterr().out
    assert "src/foveate/steer/text/zz_new.py: the class ZzNew" in said
    assert "CONTRIBUTING.md, A method that steers" in said
    assert "METHODS of tests/contracts/methods.py" in said
    assert 'title = "a=b"' in (bare / "src/foveate/catalog/steer.toml").read_text("utf-8")
    assert new.main(words, bare) == 2
    assert capsys.readouterr().err.startswith("error: KEY=zz_new is taken")
    assert new.main(["KEY=a", "SAEM=gate"], bare) == 2
    assert "SAEM=gate is none of KEY=, ROOM=, SEAM=" in capsys.readouterr().err


def test_make_hands_on_every_word() -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").split("\nnew:")[1].split("\n\n")[0]
    assert tuple(re.search(r"foreach word,([A-Z ]+),", recipe)[1].split()) == new.WORDS  # type: ignore[index]
