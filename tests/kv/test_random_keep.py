"""The draws of random eviction: even, and independent of position, head, layer and seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.kv import RandomKeep


def scores(seed: int, layer: int = 0, n: int = 4000) -> Tensor:
    positions = torch.arange(n, dtype=torch.int32).expand(1, 2, n)
    site: Any = SimpleNamespace(
        step={}, seen=n, real=None, q=torch.zeros(1, 2, 1, 1), positions=positions, layer=layer
    )  # fmt: skip
    return RandomKeep(seed=seed).score(site)[0]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_draws_are_even_and_independent(seed: int) -> None:
    drawn = torch.stack([*scores(seed), *scores(seed, layer=1), *scores(seed + 1)]).double()
    assert drawn.min() >= 0 and drawn.max() <= 1
    counts = torch.stack([row.histc(10, 0, 1) for row in drawn])
    assert (counts - 400).abs().max() < 5 * 400**0.5
    assert drawn.corrcoef().fill_diagonal_(0).abs().max() < 0.08
    assert torch.stack([drawn[:, 1:].flatten(), drawn[:, :-1].flatten()]).corrcoef()[0, 1].abs() < 0.03


def test_a_seed_gives_the_same_draws_in_every_release() -> None:
    """Recorded results depend on them; the hash by hand, in Python's integers."""
    expected = []
    for position in range(50):
        mixed = (position * 2654435761 + 40503 + 3 * 2246822519 + 5 * 3266489917) % 2**32
        mixed = (mixed >> 15 ^ mixed) * 2246822519 % 2**32
        mixed = (mixed >> 13 ^ mixed) * 3266489917 % 2**32
        expected.append((mixed >> 16 ^ mixed) / 2**32)
    torch.testing.assert_close(scores(5, layer=3, n=50)[1], torch.tensor(expected))
