"""The methods that a command applies: those of a recipe, or of keys at a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.bench import known
from foveate.bench.calibration import CalibrationStore
from foveate.bench.recipes.contender import contender
from foveate.core.errors import OptionError
from foveate.host import Host, Method
from foveate.tasks.text.passkeys import Passkeys

#: Receives what policies learn about models that are no folder of the user's.
FOLDER = Path.home() / ".cache" / "foveate" / "learnt"


def chosen(
    recipe: str | None,
    keys: list[str] | None,
    budget: float,
    host: Host,
    tokenizer: Any,
    length: int,
    source: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Method, ...]:
    """Return the methods for a prompt of `length` tokens; none without a recipe and keys.

    Args:
        recipe: the file of a recipe.
        keys: keys of the catalogue; `check` has accepted them.
        budget: the share of the cache that each may use.
        host, tokenizer: the model and its tokenizer.
        length: the tokens of the prompt.
        source: the model's folder, which may hold what policies learnt.
        note: called with messages about the progress.
    """
    folders = [path for path in (source, FOLDER) if path is not None]
    store = CalibrationStore(host, lambda: passkeys(tokenizer, length), folders, note)
    found: list[Method] = []
    for key in [recipe] if recipe is not None else keys or []:
        one = contender(key, host, budget)
        one.calibrate(store)
        found += one.at(length)
    return tuple(found)


def check(recipe: str | None, keys: list[str] | None, budget: float) -> None:
    """Refuse a wrong choice before a model is loaded."""
    if recipe is not None and keys is not None:
        raise OptionError("recipe= and methods= exclude each other; a recipe names its methods")
    if recipe is not None and not known.is_recipe(recipe):
        raise OptionError(f"recipe={recipe} must be a .json file, as recipes are")
    known.check([recipe] if recipe is not None else keys or [])
    if not 0 < budget <= 1:
        raise OptionError(f"budget={budget} must be above 0 and at most 1, a share of the full cache")


def passkeys(tokenizer: Any, length: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw texts with pass keys, about half as long as a prompt of `length` tokens, on which policies calibrate."""
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return iter(Passkeys(encode, length=max(64, length // 2), count=3, words=6, begin=begin, seed=seed))
