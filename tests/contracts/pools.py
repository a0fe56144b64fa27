"""The pools of the catalogue, rows and parts of rows, and those that belong to no row, for the contract."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.nn.base.pool import Pool
from foveate.nn.pool.cross_attention import CrossAttentionPool
from foveate.nn.pool.mean import MeanPool

DIM, BATCH, LENGTH = 16, 3, 12


def catalogued() -> dict[str, type[Pool]]:
    """Return the pools of the catalogue: a row's own under its key, a part's under the row's key and its name."""
    found: dict[str, type[Pool]] = {}
    for row in systems():
        for place in (row.object, *row.parts):
            module, _, name = place.partition(":")
            if not module.startswith("foveate.nn."):
                continue
            cls = getattr(import_module(module), name)
            if isinstance(cls, type) and issubclass(cls, Pool):
                found[row.key if place == row.object else f"{row.key}-{name}"] = cls
    return found


#: Baselines, which no row of the catalogue is about.
EXTRA: dict[str, type[Pool]] = {"mean": MeanPool, "cross_attention": CrossAttentionPool}
POOLS = catalogued() | EXTRA

EVERY = pytest.mark.parametrize("key", POOLS)


def example(key: str, dim: int = DIM) -> Pool:
    """Make the pool's example in float64, with the same parameters each time, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return POOLS[key].example(dim).double().eval()


def tokens(length: int = LENGTH, *, batch: int = BATCH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real(*lengths: int, length: int = LENGTH) -> Tensor:
    """Make a mask whose real tokens come first; 0 leaves an example none."""
    return torch.arange(length) < torch.tensor(lengths)[:, None]
