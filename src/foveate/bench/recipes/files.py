"""Save methods as a recipe, and load them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from foveate.bench.recipes.recipe import Recipe
from foveate.core.errors import OptionError
from foveate.host import Host, Method
from foveate.host.hf.model import host
from foveate.ops.operator import Operator


def save(
    methods: Method | Operator | Sequence[Method | Operator], path: str | os.PathLike, model: object | None = None
) -> Path:
    """Save methods with all of their options as a JSON file: `foveate.save([SnapKV(share=0.2)], "mine.json")`.

    Tensors, such as heads that a policy chose, go into a safetensors file beside it.

    Args:
        methods: methods and operators of the catalogue, in the order in which `foveate.apply` gets them.
        path: the file; its name ends in `.json`.
        model: the model that they are for. The file then names the digest of its weights, and `load` refuses any other
            model. None if they fit any model.

    Returns:
        The path.

    Raises:
        OptionError: a method is not in the catalogue, or has an option that a file cannot hold, such as a function.
    """
    some = list(methods) if isinstance(methods, Sequence) else [methods]  # what is no method is refused below
    return Recipe.of(some, model).write(path)


def load(path: str | os.PathLike, model: object | None = None, length: int | None = None) -> tuple[Method, ...]:
    """Load methods from a recipe: `foveate.apply(model, *foveate.load("mine.json", model))`.

    The file is data: nothing in it is executed, and only systems of the catalogue are made.

    Args:
        path: a file of `save`, `foveate compare` or `foveate tune`.
        model: the model that they will be applied to; recipes of other models are refused. Recipes with a budget, which
            `compare` and `tune` write, need it.
        length: the tokens of the prompt, of which a budget is a share; None takes those of the prompts that the recipe
            was measured on.

    Raises:
        OptionError: the recipe is not valid, or of another model; the message is one line.
    """
    found = Recipe.read(path)
    target: Host | None = None if model is None else host(model)
    try:
        if target is not None:
            found.check(target)
        return found.at(target, length)
    except OptionError as error:
        raise OptionError(f"cannot use recipe {path}: {error}") from None
