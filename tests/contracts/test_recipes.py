"""The contract of recipes: what is saved loads again, and the model then gives the same output."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.bench import known
from foveate.bench.methods import Contender
from foveate.bench.recipes.contender import RecipeContender, recipe_of
from foveate.bench.recipes.files import load, save
from foveate.core.catalog import system, systems
from foveate.host import Method, apply
from foveate.kv import AdaKV, ChunkKV, CriticalKV, KNorm, Renumbered, SinkRecent, SnapKV
from tests.contracts.methods import METHODS
from tests.contracts.policies import CASES, POLICIES, VOCAB, here, learnt, policy, subject

LENGTH, NEW = 48, 4


def outputs(methods: tuple[Method, ...]) -> Tensor:
    """Return the logits of a prompt's last token and of some more."""
    draw, model = torch.Generator().manual_seed(3), subject("llama")
    ids = torch.randint(2, VOCAB, (2, LENGTH + NEW), generator=draw)
    cache, pieces = DynamicCache(config=model.config), ids.split([LENGTH, *[1] * NEW], 1)
    with torch.no_grad(), apply(model, *methods):
        return torch.stack([model(piece, past_key_values=cache).logits[:, -1] for piece in pieces])


def check_round_trip(methods: tuple[Method, ...], file: Path) -> None:
    expected = outputs(methods)
    save(methods, file, subject("llama"))
    loaded = load(file, subject("llama"))
    assert [type(each) for each in loaded] == [type(each) for each in methods]
    assert torch.equal(outputs(loaded), expected)
    save(loaded, again := file.with_name("again.json"), subject("llama"))
    assert again.read_text().replace("again.", "recipe.") == file.read_text()


@pytest.mark.parametrize(("key", "variant"), CASES, ids=[f"{key}-{name}" if name else key for key, name in CASES])
def test_every_policy(key: str, variant: str, tmp_path: Path) -> None:
    check_round_trip((policy(key, 0.4, LENGTH, variant),), tmp_path / "recipe.json")


@pytest.mark.parametrize("key", [row.key for row in systems(room="steer")])
def test_every_steering_method(key: str, tmp_path: Path) -> None:
    cls = system(key).load()
    if is_dataclass(cls) and issubclass(cls, Method):
        check_round_trip((METHODS[key]() if key in METHODS else cls(),), tmp_path / "recipe.json")


@pytest.mark.parametrize("key", known.readers())
def test_every_operator_that_reads_a_prompt(key: str, tmp_path: Path) -> None:
    (swap,) = Contender(key, here(), 0.4).at(LENGTH)
    with torch.no_grad():
        for parameter in swap.operator.parameters():  # type: ignore[attr-defined]
            parameter += 0.01  # what a constructor would give is not what was saved
    check_round_trip((replace(swap, layers=(0, 2)),), tmp_path / "recipe.json")  # type: ignore[type-var]


@pytest.mark.parametrize(
    "methods",
    [
        (AdaKV(SnapKV(share=0.3, recent=8, pooling="max"), safeguard=0.1, variant="kvpress"),),
        (CriticalKV(AdaKV(SnapKV(share=0.3, recent=8, layers=(0, 2)))),),
        (ChunkKV(KNorm(share=0.4), chunk=5),),
        (SinkRecent(2, 10), Renumbered()),
        (SnapKV(share=0.2, recent=4, layers=(0,)), SnapKV(share=0.6, recent=4, layers=(1, 2))),
    ],
    ids=["adakv", "critical-adakv", "chunkkv", "renumbered", "layers"],
)
def test_wrappers_and_compositions(methods: tuple[Method, ...], tmp_path: Path) -> None:
    check_round_trip(methods, tmp_path / "recipe.json")


@pytest.mark.parametrize("key", [known.FULL, known.PACKED, "act_calibration", "hip", *dict(CASES)])
@pytest.mark.parametrize("renumber", [False, True])
def test_the_recipe_of_a_row_gives_its_methods_at_every_length(key: str, renumber: bool, tmp_path: Path) -> None:
    least = POLICIES[key].least(here(), LENGTH) if key in POLICIES else 0.0
    one = Contender(key, here(), max(0.4, least), renumber)
    one.calibrate(lambda cls, name: learnt(name, "llama"))
    if renumber and not any(method.evicts for method in one.at(LENGTH)):
        return
    file = recipe_of(one, LENGTH).write(tmp_path / "recipe.json")
    other = RecipeContender(str(file), here())
    for length in (LENGTH, 2 * LENGTH):
        assert [type(x) for x in one.at(length)] == [type(x) for x in other.at(length)]
        assert torch.equal(outputs(one.at(length)), outputs(other.at(length)))
    assert torch.equal(outputs(load(file, subject("llama"))), outputs(one.at(LENGTH)))
