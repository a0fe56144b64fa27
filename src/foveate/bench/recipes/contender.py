"""Recipes in a comparison: as methods beside others, and as the files of the rows that ran."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.bench.known import FULL, is_recipe
from foveate.bench.methods import Calibrations, Contender
from foveate.bench.parts import digest
from foveate.bench.recipes.entries import entry
from foveate.bench.recipes.recipe import Recipe, identified
from foveate.bench.recipes.values import Tensors
from foveate.core.errors import OptionError
from foveate.host import Host, Method
from foveate.kv.base.policy import Policy
from foveate.ops.operator import Operator


class RecipeContender(Contender):
    """The methods of a recipe as one entry of a comparison.

    Args:
        key: the recipe's file.
        host: the model.
        recipe: the recipe; None reads the file.
    """

    def __init__(self, key: str, host: Host, recipe: Recipe | None = None) -> None:
        super().__init__(FULL, host, 1.0)
        self.key = key
        self.recipe = Recipe.read(key) if recipe is None else recipe
        try:
            self.recipe.check(host)
        except OptionError as error:
            raise OptionError(f"cannot use recipe {key}: {error}") from None
        self.title = f"recipe: {self.recipe.title}"

    def calibrate(self, calibrations: Calibrations) -> None:
        """Do nothing: a recipe has all that its methods learnt."""

    @property
    def identity(self) -> str:
        return digest.of("recipe", self.recipe.identity)

    def at(self, length: int) -> tuple[Method, ...]:
        if length not in self._methods:
            self._methods[length] = self.recipe.at(self.host, length)
        return self._methods[length]

    def options(self, lengths: Iterable[int]) -> dict[str, Any]:
        return {"methods": self.recipe.title}


def contender(key: str, host: Host, budget: float, renumber: bool = False) -> Contender:
    """Return the contender of a catalogue key, or of a recipe's file."""
    return RecipeContender(key, host) if is_recipe(key) else Contender(key, host, budget, renumber)


def recipe_of(contender: Contender, length: int | None, about: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe of a contender, which gives the same methods at every length of a prompt."""
    if isinstance(contender, RecipeContender):
        return contender.recipe
    tensors, entries = Tensors(), []
    cls: type[Any] | None = contender._class
    if cls is not None and issubclass(cls, Policy | Operator):
        raw: dict[str, Any] = {"method": contender.key, "budget": contender.budget, "options": {}}
        learnt = {name: {"tensor": tensors.add(f"0.{name}", x)} for name, x in contender._calibration.items()}
        entries.append({**raw, "learnt": learnt} if learnt else raw)
    elif cls is not None:
        entries.append(entry(cls(), "0", tensors))
    if cls is not None and contender.renumber and getattr(cls, "evicts", False):
        entries.append({"method": "renumbered", "options": {}})
    own = ("", "") if not entries else identified(contender.host.model)
    return Recipe(entries, tensors, *own, length=length, about=about or {})


def write_recipes(contenders: Iterable[Contender], folder: Path, length: int | None) -> list[Path]:
    """Write the recipe of each contender into a folder, under the name of its method and its budget, if it takes one.

    Recipes of other budgets from earlier runs stay.
    """
    written: list[Path] = []
    for each in contenders:
        name = Path(each.key).stem if is_recipe(each.key) else each.key
        name += f"-{each.budget:g}" if each.takes_budget else ""
        taken = sum(path.stem == name for path in written)
        written.append(recipe_of(each, length).write(folder / f"{name}{f'-{taken}' if taken else ''}.json"))
    return written
