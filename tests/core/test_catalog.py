"""The catalogue's reader: the rows of a good file, and the error of each malformed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.core import catalog
from foveate.core.catalog import System, Taxonomy, system, systems
from foveate.core.catalog_file import read
from foveate.core.catalog_rows import Shelf
from foveate.core.errors import CatalogError, UnknownKey

GOOD = {
    "key": '"sigmoid"',
    "title": '"A title: with “quotes”"',
    "authors": '["Ada Lovelace", "Charles Babbage"]',
    "year": "2024",
    "arxiv": '"2405.12345"',
    "object": '"foveate.ops.dense.sigmoid:Sigmoid"',
    "test": '"tests/systems/ops/test_sigmoid.py"',
    "tags": '["dense", "scored"]',
    "taxonomy": '{sequences=["self", "distinctive"], levels="single", positions="soft", representations="single"}',
}


def _places(**changes: str) -> str:
    places = {"sequences": '"self"', "levels": '"single"', "positions": '"soft"', "representations": '"single"'}
    return "{ " + ", ".join(f"{name} = {value}" for name, value in {**places, **changes}.items()) + " }"


def row(**changes: str | None) -> str:
    values = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    return "[[system]]\n" + "\n".join(f"{name} = {value}" for name, value in values.items()) + "\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "ops.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def test_a_good_row(write) -> None:
    (found,) = read(write(row(example='"""foveate.attend(q, k, v)"""'))).systems
    assert found == System(
        key="sigmoid",
        title="A title: with “quotes”",
        authors=("Ada Lovelace", "Charles Babbage"),
        year=2024,
        arxiv="2405.12345",
        room="ops",
        object="foveate.ops.dense.sigmoid:Sigmoid",
        test="tests/systems/ops/test_sigmoid.py",
        tags=("dense", "scored"),
        taxonomy=Taxonomy(("self", "distinctive"), ("single",), ("soft",), ("single",)),
        example="foveate.attend(q, k, v)",
    )
    assert found.url == "https://arxiv.org/abs/2405.12345"


@pytest.mark.parametrize("arxiv", ["", "0706.1234", "cs/0601001", "math.CO/0601001"])
def test_arxiv_numbers_of_every_age(write, arxiv: str) -> None:
    (found,) = read(write(row(arxiv=f'"{arxiv}"'))).systems
    assert found.url == (f"https://arxiv.org/abs/{arxiv}" if arxiv else "")


def test_an_empty_catalogue_is_valid(write) -> None:
    assert read(write("# nothing yet\n")) == Shelf()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None, "tags": None}, r'row 1 \("sigmoid"\): missing title, tags'),
        ({"key": None}, "row 1: missing key"),
        ({"exampel": '"x"'}, 'unknown field "exampel"; did you mean "example"'),
        ({"key": '"Bad Key"'}, "key='Bad Key' must be"),
        ({"key": "3"}, "key=3 must be a string"),
        ({"title": '"  "'}, "title='  ' must be"),
        ({"year": '"2024"'}, "year='2024' must be a year"),
        ({"year": "true"}, "year=True must be a year"),
        ({"year": "24"}, "year=24 must be a year"),
        ({"arxiv": '"https://arxiv.org/abs/2405.12345"'}, "arxiv="),
        ({"taxonomy": '"self"'}, "taxonomy='self' must be a table of sequences, levels, positions, representations"),
        ({"taxonomy": '{ levels = "single" }'}, "taxonomy: missing sequences, positions, representations"),
        ({"taxonomy": _places(positions='"sof"')}, "taxonomy: positions='sof' must be of soft, hard, local"),
        ({"taxonomy": _places(levels="[]")}, r"taxonomy: levels=\[\] must be of single, multi"),
        ({"taxonomy": _places(level='"multi"')}, 'taxonomy: unknown category "level"; did you mean "levels"'),
        ({"room": '"ops"'}, 'unknown field "room"'),
        ({"object": '"foveate.kv.duo:Duo"'}, 'does not live in room "ops"'),
        ({"parts": '["foveate.ops.dense.sigmoid.Sigmoid"]'}, "parts="),
        ({"authors": '"Ada Lovelace"'}, "must be a list of non-empty strings"),
        ({"object": '"foveate.ops.dense.sigmoid.Sigmoid"'}, "object="),
        ({"object": '"os:system"'}, "object="),
        ({"test": '"../outside.py"'}, "test="),
        ({"tags": '"dense"'}, "tags='dense' must be a list"),
        ({"tags": '["dense", 3]'}, "must be a list of non-empty strings"),
    ],
)
def test_a_malformed_row_is_named(write, changes: dict, message: str) -> None:
    with pytest.raises(CatalogError, match=message) as caught:
        read(write(row(**changes)))
    assert "ops.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[system]\n", "ops.toml"),
        ("[[sytem]]\nkey = 'a'\n", "got sytem"),
        ("[system]\nkey = 'a'\n", "expected only"),
        ("system = [1]\n", "got 1"),
        (row() + row(), 'key "sigmoid" is in rows 1 and 2'),
    ],
)
def test_a_malformed_file(write, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        read(write(text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No such file"):
        read(tmp_path / "nn.toml")
    (tmp_path / "kv.toml").write_bytes(b'[[system]]\nkey = "\xe9"\n')
    with pytest.raises(CatalogError, match=r"kv\.toml"):
        read(tmp_path / "kv.toml")


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ('"foveate.kv.base.policy" = ["Policy"]', "'foveate.kv.base.policy' must be a module of ops"),
        ('"foveate.ops.operator" = "Operator"', "with a list of its names"),
        ('"foveate.ops.a" = ["A"]\n"foveate.ops.b" = ["A"]', "A is in foveate.ops.a and in foveate.ops.b"),
    ],
)
def test_malformed_public_names(write, public: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        read(write(f"[public]\n{public}\n"))


def test_a_file_without_a_room_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cellar.toml").write_text("")
    with pytest.raises(CatalogError, match='cellar.toml: unknown room "cellar"'):
        read(tmp_path / "cellar.toml")


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a catalogue in another folder from the text of each room."""

    def at(**rooms: str) -> None:
        for room, text in rooms.items():
            (tmp_path / f"{room}.toml").write_text(text, "utf-8")
        monkeypatch.setattr(catalog, "FOLDER", tmp_path)
        catalog.shelf.cache_clear()
        catalog._by_key.cache_clear()

    yield at
    catalog.shelf.cache_clear()
    catalog._by_key.cache_clear()


DUO = row(key='"duo"', object='"foveate.kv.duo:Duo"', tags='["policy"]', parts='["foveate.kv.duo:train"]')


def test_filters(catalogue) -> None:
    catalogue(ops=row(), kv=DUO)
    assert [found.key for found in systems()] == ["sigmoid", "duo"]
    assert [found.key for found in systems(room="kv")] == ["duo"]
    assert [found.key for found in systems(tag="scored")] == ["sigmoid"]
    assert systems(room="kv", tag="scored") == []
    assert system("duo").room == "kv"
    with pytest.raises(UnknownKey, match='unknown system "duoo"; did you mean "duo"'):
        system("duoo")
    with pytest.raises(UnknownKey, match="unknown room"):
        systems(room="cellar")


def test_a_key_names_one_system(catalogue) -> None:
    catalogue(ops=row(), kv=row(object='"foveate.kv.sigmoid:Sigmoid"'))
    with pytest.raises(CatalogError, match=r'key "sigmoid" is in ops.toml and in kv.toml'):
        systems()


def test_public_names(catalogue) -> None:
    shared = '[public]\n"foveate.ops.operator" = ["Operator"]\n"foveate.ops.functional.rotary" = ["rotate"]\n'
    catalogue(ops=shared + row(parts='["foveate.kv.sigmoid:SigmoidCache"]'), kv=DUO)
    assert catalog.public_names("ops") == {
        "Operator": "foveate.ops.operator", "Sigmoid": "foveate.ops.dense.sigmoid",
    }  # fmt: skip
    assert catalog.public_names("ops.functional") == {"rotate": "foveate.ops.functional.rotary"}
    assert list(catalog.public_names("kv")) == ["Duo", "SigmoidCache", "train"]
    assert catalog.module_of("kv", "train") == "foveate.kv.duo"
    assert catalog.module_of("kv", "SigmoidCache") == "foveate.kv.sigmoid", "a part of another room's system"
    assert catalog.module_of("kv", "Sigmoid") is None


def test_a_look_up_reads_the_files_once(catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(ops=row(), kv=DUO)
    reads: list[Path] = []
    monkeypatch.setattr(catalog, "read", lambda path: (reads.append(path), read(path))[1])
    assert catalog.module_of("kv", "Duo") == "foveate.kv.duo"
    assert [path.name for path in reads] == ["kv.toml"], "of one room where its own file has the name"
    for _ in range(3):
        assert system("duo") and systems(room="ops")
    assert sorted(path.name for path in reads) == ["kv.toml", "ops.toml"]


def test_load() -> None:
    def at(target: str) -> System:
        return System("x", "t", (), 2024, "", "ops", target, "tests/x.py", (), Taxonomy())

    assert at("foveate.core.catalog_rows:System").load() is System
    with pytest.raises(CatalogError, match=r'system "x": module foveate\.core\.catalog_rows has no Sytem'):
        at("foveate.core.catalog_rows:Sytem").load()
    with pytest.raises(CatalogError, match=r"no module foveate\.core\.nowhere"):
        at("foveate.core.nowhere:Thing").load()


def test_a_missing_dependency_is_no_catalogue_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_module.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        System("x", "t", (), 2024, "", "ops", "needy_module:Thing", "tests/x.py", (), Taxonomy()).load()


def test_the_shipped_catalogue() -> None:
    root = Path(__file__).parents[2]
    for found in systems():
        assert (root / found.test).is_file(), f"{found.key}: {found.test} is missing"
        assert callable(found.load()), found.key
        assert found.authors, f"{found.key}: nobody is named as its author"
