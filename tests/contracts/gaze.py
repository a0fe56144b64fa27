"""The models of saliency and of visual search, of the catalogue and of no row, for the contract."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.gaze import CenterBias, GazeModel, RandomSearcher, Searcher

T = TypeVar("T")


def catalogued(base: type[T]) -> dict[str, type[T]]:
    """Return the classes of the catalogue's rows and parts that have this base class."""
    found: dict[str, type[T]] = {}
    for row in systems():
        for place in (row.object, *row.parts):
            module, _, name = place.partition(":")
            if not module.startswith("foveate.gaze."):
                continue
            cls = getattr(import_module(module), name)
            if isinstance(cls, type) and issubclass(cls, base):
                found[row.key if place == row.object else f"{row.key}-{name}"] = cls
    return found


#: With baselines, which no row is about.
MODELS: dict[str, type[GazeModel]] = {**catalogued(GazeModel), "center_bias": CenterBias}
SEARCHERS: dict[str, type[Searcher]] = {**catalogued(Searcher), "random": RandomSearcher}

#: (H, W) of images: odd, wide and high.
SIZES = ((32, 32), (33, 47), (64, 21))


def model(key: str) -> GazeModel:
    """Make a model's example with the same parameters each time, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[key].example().eval()


def searcher(key: str) -> Searcher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SEARCHERS[key].example()


def image(size: tuple[int, int], seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(channels, *size, generator=torch.Generator().manual_seed(seed))


def grid_of_objects(size: tuple[int, int], across: int = 3) -> Tensor:
    """Make masks of `across` by `across` objects with gaps between them, `(N, H, W)`."""
    height, width = size[0] // across, size[1] // across
    masks = torch.zeros(across * across, *size, dtype=torch.bool)
    for number in range(across * across):
        top, left = number // across * height, number % across * width
        masks[number, top + 1 : top + height - 1, left + 1 : left + width - 1] = True
    return masks
