"""Recipes: what is refused, in one line and without running anything, and `compare` with recipes."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import foveate
from foveate.bench.comparison.run import compare
from foveate.bench.recipes.recipe import Recipe
from foveate.bench.recipes.values import hints_of
from foveate.core.catalog import systems
from foveate.core.catalog_rows import System
from foveate.core.errors import OptionError
from foveate.host import Method
from foveate.kv import AdaKV, DuoAttention, RecycledAttention, SnapKV
from foveate.kv.recycled_attention import Dynamic
from foveate.ops import SlidingWindow
from tests.support import host_models


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Save a recipe with a tensor."""
    gates = torch.linspace(0, 1, 6).reshape(3, 2)
    return foveate.save([DuoAttention(gates, recent=9), AdaKV(SnapKV(share=0.3))], tmp_path / "mine.json")


def changed(file: Path, change: Any) -> Path:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def refused(file: Path, **given: Any) -> str:
    with pytest.raises(OptionError) as caught:
        foveate.load(file, **given)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


def test_options_of_every_kind_come_back(tmp_path: Path) -> None:
    recycled = RecycledAttention(k=9, dynamic=Dynamic(threshold=0.5, every=3))
    window = SlidingWindow(8, sinks=2)
    path = foveate.save([recycled, window], tmp_path / "mine.json")
    one, two = foveate.load(path)
    assert one.dynamic == Dynamic(0.5, 3) and one.k == 9  # type: ignore[attr-defined]
    assert (two.operator.window, two.operator.sinks) == (8, 2)  # type: ignore[attr-defined]
    assert not path.with_suffix(".safetensors").exists()


@pytest.mark.parametrize(
    "row", [row for room in ("kv", "steer") for row in systems(room=room)], ids=lambda row: row.key
)
def test_the_types_of_options_can_be_read(row: System) -> None:
    """A type that only a type checker can read leaves a recipe without the types of all of a method's options."""
    cls = row.load()
    if isinstance(cls, type) and is_dataclass(cls):
        assert {item.name for item in fields(cls) if item.init} <= hints_of(cls).keys()


def test_a_single_method_and_none(tmp_path: Path) -> None:
    assert foveate.load(foveate.save(SnapKV(), tmp_path / "one.json"))[0].recent == 64  # type: ignore[attr-defined]
    assert foveate.load(foveate.save([], tmp_path / "none.json")) == ()


class Own(Method):
    """A user's method."""


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([Own()], "Own is not in the catalogue"),
        (["snapkv"], "methods must be Method and Operator objects; got str"),
        (SnapKV, "methods must be Method and Operator objects; got type"),
        (None, "methods must be Method and Operator objects; got NoneType"),
        ([RecycledAttention(group_reduce="max", pool=3), torch.nn.Linear(2, 2)], "got Linear"),
    ],
)
def test_what_cannot_be_saved(methods: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        foveate.save(methods, tmp_path / "mine.json")
    assert not list(tmp_path.iterdir())


def test_a_function_as_an_option_is_refused(tmp_path: Path) -> None:
    method = SnapKV()
    method.layers = len  # type: ignore[assignment]
    with pytest.raises(OptionError, match=r"0\.layers: a recipe cannot hold a builtin_function_or_method"):
        foveate.save([method], tmp_path / "mine.json")


def test_an_option_that_a_constructor_would_not_give_is_refused(tmp_path: Path) -> None:
    method = AdaKV(SnapKV(share=0.3))
    method.share = 0.5
    with pytest.raises(OptionError, match="AdaKV.share was changed to 0.5 after it was made"):
        foveate.save([method], tmp_path / "mine.json")


def test_a_recipe_needs_its_suffix(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must end in .json"):
        foveate.save([], tmp_path / "mine.txt")


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = host_models.model("llama")
    path = foveate.save([SnapKV()], tmp_path / "mine.json", model=model)
    assert len(foveate.load(path, model=model)) == 1
    other = LlamaForCausalLM(model.config)
    assert "it belongs to another model: a LlamaForCausalLM with digest" in refused(path, model=other)


def test_missing_and_other_tensors(file: Path) -> None:
    tensors = file.with_suffix(".safetensors")
    save_file({"0.gates": torch.zeros(3, 2)}, tensors)
    assert "holds other tensors than the recipe was written with" in refused(file)
    tensors.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a program
    assert "is not a safetensors file" in refused(file)
    tensors.unlink()
    assert "its tensors are missing" in refused(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format="foveate.recipe/2"), "which is newer"),
        (lambda c: c.update(format="pickle"), '"format" must be "foveate.recipe/1"'),
        (lambda c: c.pop("methods"), '"methods" is missing or not valid'),
        (lambda c: c.update(methods={}), '"methods" is missing or not valid'),
        (lambda c: c.update(methods=["snapkv"]), 'method 0 must be an object with a "method"'),
        (lambda c: c["methods"][1].update(method="snapvk"), 'unknown method "snapvk"; did you mean "snapkv"?'),
        (lambda c: c["methods"][1].update(method="os:system"), 'unknown method "os:system"'),
        (lambda c: c["methods"][1].update(method="__import__"), "unknown method"),
        (lambda c: c["methods"][1].update(reduce=["os.system", "true"]), "1 has an unknown part 'reduce'"),
        (lambda c: c["methods"][1].update(options=[]), "1.options must be an object"),
        (lambda c: c["methods"][1]["options"].update(safegard=1), "no option 'safegard'; did you mean 'safeguard'?"),
        (lambda c: c["methods"][1]["options"].update(__class__="x"), "no option '__class__'"),
        (lambda c: c["methods"][1]["options"].update(safeguard="much"), "safeguard='much' must be a number"),
        (lambda c: c["methods"][1]["options"].update(safeguard=7), "safeguard=7 must be in 0.0..1.0"),
        (lambda c: c["methods"][1]["options"].update(base={"method": "sink_recent"}), "base must be a policy"),
        (lambda c: c["methods"][1]["options"].update(base={"pickle": "x"}), "is no value of an option"),
        (lambda c: c["methods"][1]["options"].update(base={"record": {"share": 1}}), "options that are not known"),
        (lambda c: c["methods"][0]["options"].update(gates={"tensor": "9.gates"}), "the file of tensors has no"),
        (lambda c: c["methods"][0]["options"].update(gates={"tensor": ["0"]}), "the file of tensors has no"),
        (lambda c: c["methods"][0]["options"].update(gates={"dtype": "load"}), "is no value of an option"),
        (lambda c: c["methods"][0]["options"].update(gates=7), "gates must be a tensor"),
        (lambda c: c["methods"][0].pop("options"), "gates"),
        (lambda c: c["methods"][0].update(budget=0.5), "it has a budget, which needs a model"),
        (lambda c: c["methods"][0].update(budget=5), "budget=5 must be in 0.0..1.0"),
        (lambda c: c["tensors"].update(file="../mine.safetensors"), "must be the name of a .safetensors file"),
        (lambda c: c["tensors"].update(file="/etc/passwd"), "must be the name of a .safetensors file"),
        (lambda c: c["tensors"].update(file="mine.pkl"), "must be the name of a .safetensors file"),
        (lambda c: c.update(model="mine"), '"model" is missing or not valid'),
        (lambda c: c.update(length=-1), '"length" is missing or not valid'),
        (lambda c: c.update(methods=[{"method": "hip", "options": {"keep": "all"}}]), "keep='all'"),
        (lambda c: c.update(methods=[{"method": "softmax", "options": {"args": 1}}]), "no option 'args'"),
        (lambda c: c.update(methods=[{"method": "hip", "parameters": {"w": {"tensor": "0.gates"}}}]), "do not fit"),
        (lambda c: c.update(methods=[{"method": "hip", "layers": ["one"]}]), "layers='one'"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_not_valid(file: Path, change: Any, words: str) -> None:
    assert words in refused(changed(file, change))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{'method': __import__('os')}", "not valid JSON"),
        ('{"format": "foveate.recipe/1", "x": NaN}', "NaN is no JSON"),
        ('{"format": "a", "format": "b"}', "two parts of one name"),
        ('{"format": "foveate.recipe/1", "x": ' + '{"x":' * 90 + "1" + "}" * 91, "inside each other"),
        ("1" * 5000, "not valid JSON"),
        ("[]", '"format" must be'),
    ],
)  # fmt: skip
def test_broken_and_hostile_json(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    assert words in refused(file)


def test_a_file_that_is_no_text_or_too_large_or_missing(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    assert "No such file" in refused(file)
    file.write_bytes(b"\x80\x04\xff\xfe")
    assert "cannot read recipe" in refused(file)
    file.write_bytes(b" " * (17 * 2**20))
    assert "too large" in refused(file)


def test_a_byte_order_mark_of_an_editor_is_read_over(tmp_path: Path) -> None:
    file = foveate.save(SnapKV(share=0.5), tmp_path / "mine.json")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert foveate.load(file)[0].share == 0.5  # type: ignore[attr-defined]


def test_a_newer_version_is_named(file: Path) -> None:
    changed(file, lambda c: (c.update(foveate="99.1"), c["methods"][1]["options"].update(shiny=1)))
    assert "no option 'shiny' (Foveate 99.1 wrote it, and this is " in refused(file)
    changed(file, lambda c: c.update(methods=[{"method": "later"}]))
    assert 'unknown method "later"' in refused(file)


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_writes_a_recipe_of_each_row_and_runs_it(decoder: Path, prompts: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(decoder), "task": str(prompts), "budget": 0.4}
    keys = ["snapkv", "duo_attention", "sliding_window", "packed"]
    first = compare(**given, methods=keys, out=tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "one" / "recipes").glob("*.json"))
    names = ["snapkv-0.4", "duo_attention-0.4", "sliding_window-0.4", "packed"]
    assert files == sorted(f"{name}.json" for name in ["full", *names])
    recipes = [str(tmp_path / "one" / "recipes" / f"{name}.json") for name in names]
    second = compare(**given, methods=recipes, out=tmp_path / "two")
    assert [row.method for row in second.rows] == ["full", *recipes]
    for one, two in zip(first.rows, second.rows, strict=True):
        assert [a.output for a in one.answers] == [a.output for a in two.answers]
        assert (one.cache_kept, one.keys_read) == (two.cache_kept, two.keys_read)
    assert second.rows[1].title == "recipe: snapkv"
    again = Recipe.read(tmp_path / "two" / "recipes" / "duo_attention-0.4.json")
    assert again.identity == Recipe.read(recipes[1]).identity


def test_compare_refuses_recipes_that_it_cannot_use(decoder: Path, prompts: Path, tmp_path: Path, file: Path) -> None:
    given: dict[str, Any] = {"model": str(decoder), "task": str(prompts), "out": tmp_path / "out"}
    with pytest.raises(OptionError, match="cannot read recipe .*absent.json: No such file"):
        compare(**given, methods=[str(tmp_path / "absent.json")])
    other = foveate.save([SnapKV()], tmp_path / "other.json", model=host_models.model("llama"))
    with pytest.raises(OptionError, match="cannot use recipe .*other.json: it belongs to another model"):
        compare(**given, methods=[str(other)])
    assert not (tmp_path / "out" / "results.json").exists()


def test_rows_of_several_budgets_have_a_recipe_each(decoder: Path, prompts: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(decoder), "task": str(prompts)}
    first = compare(**given, methods=["snapkv"], budgets=[0.5, 0.25], out=tmp_path / "one")
    compare(**given, methods=["snapkv"], budget=0.75, out=tmp_path / "one")
    folder = tmp_path / "one" / "recipes"
    names = [f"snapkv-{budget}.json" for budget in (0.25, 0.5, 0.75)]  # those of the first run stay
    assert sorted(path.name for path in folder.iterdir()) == ["full.json", *names]
    recipes = [str(folder / f"snapkv-{budget}.json") for budget in (0.25, 0.5)]
    second = compare(**given, methods=recipes, budgets=[0.5, 0.25], out=tmp_path / "two")
    assert [row.cache_kept for row in second.rows] == [row.cache_kept for row in first.rows]
