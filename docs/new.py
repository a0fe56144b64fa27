"""`make new`: the first files of a new system, from a template of its seam: class, row of the catalogue, tests.

    make new KEY=ulsam ROOM=nn SEAM=gate CLASS=ULSAM TITLE="ULSAM: ..." YEAR=2020 ARXIV=2006.15102 AUTHORS="A, B"

Every part that is still to be written says so: a hook raises `NotImplementedError`, a test fails, a blank of the row is
refused by the catalogue. `tests/docs/test_new.py` finds what is left over. A template is one file,
`docs/scaffold/<room>/<seam>.txt`; a new file there is a new seam.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from foveate.core.catalog_file import read
from foveate.core.catalog_rows import ROOMS
from foveate.core.errors import CatalogError

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "scaffold"
#: The mark of every part that nobody has written yet.
MARK = "still to write"
WORDS = ("KEY", "ROOM", "SEAM", "CLASS", "FOLDER", "TITLE", "YEAR", "ARXIV", "AUTHORS")
USAGE = 'make new KEY=my_gate ROOM=nn SEAM=gate [CLASS=] [FOLDER=] [TITLE="..."] [YEAR=] [ARXIV=] [AUTHORS="A, B"]'
#: The end of every test file.
REST = f'''
def test_its_limit() -> None:
    pytest.fail("{MARK}: the options at which it equals something known; assert that it does")


def test_wrong_options_are_refused() -> None:
    pytest.fail("{MARK}: a wrong value of each option is refused by name; without options, delete this test")


def test_the_claim(claim) -> None:
    pytest.fail("{MARK}: claim(...) with a statement of the paper, ours against a named baseline")
'''.strip()


class Refused(ValueError):
    """A request that cannot be met, in one line."""


@dataclass(frozen=True)
class Seam:
    """A kind of system, and the template of its files.

    Args:
        room, name: its room, and the name that a user types.
        also: further names.
        folders: folders of the room that such systems are in, the usual one first; "." is the room itself.
        file: the name of the class's file.
        tags: the first tags of a row.
        see: a worked example, or a neighbour to read.
        then: steps beside those that every system has.
        code, tests: templates of both files.
    """

    room: str
    name: str
    folders: tuple[str, ...]
    see: str
    code: Template
    tests: Template
    tags: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    file: str = "$key.py"
    then: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Seam:
        """Read a template: a table of facts, the code and the tests, divided by lines of `===`."""
        head, code, tests = re.split(r"^===.*\n", path.read_text("utf-8"), flags=re.MULTILINE)
        facts = {name: tuple(x) if isinstance(x, list) else x for name, x in tomllib.loads(head).items()}
        return cls(path.parent.name, path.stem, code=Template(code), tests=Template(tests), **facts)


@dataclass(frozen=True)
class System:
    """A new system: its names and the places of its files, relative to the repository."""

    seam: Seam
    key: str
    name: str
    code: Path
    tests: Path

    @property
    def module(self) -> str:
        return ".".join(self.code.with_suffix("").parts[1:])

    @property
    def row(self) -> Path:
        return Path("src/foveate/catalog", f"{self.seam.room}.toml")


def seams(folder: Path = TEMPLATES) -> list[Seam]:
    """Return all seams, by room and name."""
    return [Seam.of(path) for path in sorted(folder.glob("*/*.txt"))]


def scaffold(given: Mapping[str, str], root: Path = ROOT, templates: Path = TEMPLATES) -> System:
    """Write the files of a new system below `root`.

    Raises:
        Refused: a name that is taken or malformed, an unknown room or seam. Nothing is written then.
        CatalogError: the catalogue has a malformed row, such as one with blanks.
    """
    made = _named(given, root, seams(templates))
    values = {"key": made.key, "Name": made.name, "module": made.module, "paper": _paper(given), "rest": REST}
    row = _row(made, given)
    for path, template in ((made.code, made.seam.code), (made.tests, made.seam.tests)):
        _package(root / path.parent, path, made.key)
        (root / path).write_text(template.substitute(values), "utf-8")
    catalogue = root / made.row
    before = catalogue.read_text("utf-8") if catalogue.is_file() else ""
    catalogue.write_text(f"{before}\n{row}" if before else row, "utf-8")
    _laid_out(root, [made.code, made.tests])
    return made


# -- names -------------------------------------------------------------------------------------------------------------


def _named(given: Mapping[str, str], root: Path, known: Sequence[Seam]) -> System:
    """Check the request and choose names and places."""
    for word in ("KEY", "ROOM", "SEAM"):
        if not given.get(word):
            raise Refused(f"{word}= is missing: {USAGE}; seams: {_listed(known)}")
    seam, key = _seam(given["ROOM"], given["SEAM"], known), given["KEY"]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or iskeyword(key):
        raise Refused(f"KEY={key} must be lower-case letters, digits and underscores, and no keyword of Python")
    shelves = {path.stem: read(path) for path in sorted((root / "src/foveate/catalog").glob("*.toml"))}
    for room, shelf in shelves.items():
        for row in shelf.systems:
            if row.key == key:
                raise Refused(f"KEY={key} is taken: {room}.toml has it, {row.title} ({row.year})")
    targets = [target for shelf in shelves.values() for row in shelf.systems for target in (row.object, *row.parts)]
    targets += [f"{module}:{name}" for shelf in shelves.values() for name, module in shelf.public.items()]
    name = _class_name(given, seam, targets)
    folder = given.get("FOLDER") or seam.folders[0]
    if folder not in seam.folders:
        raise Refused(f"FOLDER={folder} must be a folder for SEAM={seam.name}: {', '.join(seam.folders)}")
    place = Path("src/foveate", seam.room, Template(f"{folder}/{seam.file}").substitute(key=key))
    made = System(seam, key, name, place, Path("tests/systems", seam.room, f"test_{key}.py"))
    for path in (made.code, made.tests, made.code.with_suffix(""), made.code.parent.with_suffix(".py")):
        if (root / path).exists():
            raise Refused(f"KEY={key}: {path} exists; choose another key")
    return made


def _seam(room: str, name: str, known: Sequence[Seam]) -> Seam:
    rooms = {seam.room: [each for each in known if each.room == seam.room] for seam in known}
    if room not in rooms:
        hint = "has no template yet" if room in ROOMS else "is unknown"
        raise Refused(f"ROOM={room} {hint}; seams by room: {_listed(known)}")
    for seam in rooms[room]:
        if name in (seam.name, *seam.also):
            return seam
    elsewhere = [each.room for each in known if name in (each.name, *each.also)]
    hint = f"is a seam of {', '.join(elsewhere)}" if elsewhere else "is unknown"
    raise Refused(f"SEAM={name} {hint}; seams of {room}: {', '.join(each.name for each in rooms[room])}")


def _class_name(given: Mapping[str, str], seam: Seam, targets: Iterable[str]) -> str:
    name = given.get("CLASS") or "".join(part.capitalize() for part in given["KEY"].split("_"))
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name) or iskeyword(name):
        raise Refused(f"CLASS={name} must be letters and digits that begin with a capital letter")
    for target in targets:
        module, _, taken = target.partition(":")
        if taken == name and module.startswith(f"foveate.{seam.room}."):
            raise Refused(f"CLASS={name} is taken: {module}; give another with CLASS=")
    if re.search(rf"\b{name}\b", seam.code.template + seam.tests.template):
        raise Refused(f"CLASS={name} stands for something else in such a file; give another with CLASS=")
    return name


def _listed(known: Sequence[Seam]) -> str:
    rooms = dict.fromkeys(seam.room for seam in known)
    return "; ".join(f"{room}: {', '.join(each.name for each in known if each.room == room)}" for room in rooms)


# -- texts -------------------------------------------------------------------------------------------------------------


def _row(made: System, given: Mapping[str, str]) -> str:
    """Return the row, with blanks where nothing was given. Whatever was given is checked by the catalogue's reader."""
    blanks = {"title": ('""', "the paper's title"), "year": ("0", "the year of first publication"),
              "arxiv": ('"?"', 'such as "2309.17453"; "" if there is none')}  # fmt: skip
    fields = {name: _value(given, name.upper()) for name in blanks}
    authors = [each.strip() for each in given.get("AUTHORS", "").split(",") if each.strip()]
    lines = {name: f"{name} = {value}" for name, value in fields.items() if value}
    for name, (blank, what) in blanks.items():
        lines.setdefault(name, f"{name} = {blank}  # {MARK}: {what}")
    listed = json.dumps(authors, ensure_ascii=False)
    lines |= {
        "key": f'key = "{made.key}"', "object": f'object = "{made.module}:{made.name}"',
        "authors": f"authors = {listed}" + ("" if authors else f"  # {MARK}: in the paper's order"),
        "test": f'test = "{made.tests.as_posix()}"',
        "tags": f"tags = {json.dumps(made.seam.tags)}  # {MARK}: more traits, first those of its neighbours",
        "taxonomy": f"taxonomy = {_TAXONOMY}  # {MARK}: see core/catalog_rows.py",
    }  # fmt: skip
    order = ("key", "title", "authors", "year", "arxiv", "object", "test", "tags", "taxonomy")
    _check(made, lines | {name: f"{name} = {value}" for name, value in _SOUND.items() if not fields[name]}, order)
    return "\n".join(["[[system]]", *(lines[name] for name in order)]) + "\n"


#: The commonest place in the survey, which somebody has to compare with the paper.
_TAXONOMY = '{ sequences = "self", levels = "single", positions = "soft", representations = "single" }'
#: Values that the catalogue takes, in place of blanks while the rest of a row is checked.
_SOUND = {"title": '"Title"', "year": "2000", "arxiv": '""'}


def _check(made: System, lines: Mapping[str, str], order: Sequence[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, made.row.name)
        path.write_text("\n".join(["[[system]]", *(lines[name] for name in order)]), "utf-8")
        try:
            read(path)
        except CatalogError as error:
            raise Refused(str(error).rpartition('"): ')[2]) from None


def _value(given: Mapping[str, str], word: str) -> str:
    """Return a given word as TOML; "" without it. An empty ARXIV says that there is none."""
    if word not in given or not (given[word] or word == "ARXIV"):
        return ""
    if word == "TITLE" and ("\\" in given[word] or '"""' in given[word] or "\n" in given[word]):
        raise Refused("TITLE must be one line without backslashes and triple quotes")
    return given[word] if word == "YEAR" and given[word].isdecimal() else json.dumps(given[word], ensure_ascii=False)


def _paper(given: Mapping[str, str]) -> str:
    """Return the line of a docstring that names the paper."""
    if not given.get("TITLE") or not given.get("YEAR") or "ARXIV" not in given:
        return f"{MARK.capitalize()}: the paper's title, year and arXiv number."
    text = f"{given['TITLE']} ({given['YEAR']})" + (f", arXiv {given['ARXIV']}." if given["ARXIV"] else ".")
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# -- files -------------------------------------------------------------------------------------------------------------


def _package(folder: Path, path: Path, key: str) -> None:
    """Make a folder; one of the package gets its `__init__.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    if path.parts[0] == "src" and not (folder / "__init__.py").exists():
        (folder / "__init__.py").write_text(f'"""The parts of {key}."""\n', "utf-8")


def _laid_out(root: Path, paths: Sequence[Path]) -> None:
    """Sort the imports and wrap the lines, both of which depend on the names."""
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.is_file():
        for command in (["check", "--select", "I", "--fix"], ["format"]):
            subprocess.run([ruff, *command, "--quiet", *paths], cwd=root, check=True)


def _report(made: System) -> str:
    steps = [Template(step).substitute(key=made.key, Name=made.name) for step in made.seam.then]
    return "\n".join([
        f"{made.code}: the class {made.name}", f"{made.row}: its row", f"{made.tests}: its tests",
        f'every part that is {MARK} says so: grep -rni "{MARK}" src tests', f"see {made.seam.see}", *steps,
    ])  # fmt: skip


def main(words: Sequence[str], root: Path = ROOT) -> int:
    """Read words such as KEY=ulsam, write the files and say what comes next."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        if astray := [word for word in words if word.partition("=")[0] not in WORDS or "=" not in word]:
            raise Refused(f"{astray[0]} is none of {', '.join(f'{word}=' for word in WORDS)}")
        print(_report(scaffold(given, root)))
    except (Refused, CatalogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
