"""The attention that each slot of a call receives is the column sum of the weights that the call used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.engines.fused import FEW
from foveate.host import Method, Site, apply
from foveate.host.fused_statistics import Statistics
from foveate.host.received import received_mass
from foveate.kv import SinkRecent
from tests.support.host_models import model, padded, tokens
from tests.support.tensors import assert_near

N = 2 * FEW + 8


class Both(Method):
    """Notes the mass that the host finds beside the kernel, and in a second block the weights."""

    def __init__(self, weights: bool) -> None:
        self.found: list[Tensor] = []
        self.fused: list[bool] = []
        self.weights = weights

    def read(self, site: Any, out: Tensor) -> None:
        if not self.weights:
            self.fused.append(site.q.shape[2] > FEW and Statistics.of(site) is not None)
            self.found.append(received_mass(site))
            return
        real = site.real_queries
        weights = site.weights if real is None else site.weights * real[:, None, :, None]
        self.found.append(weights.sum(-2))


class Matrix(Both):
    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        return weights


def masses(name: str, side: str, method: Both, evict: bool) -> list[Tensor]:
    ids, mask = padded(tokens(2, N), side)
    others = [SinkRecent(sink=2, recent=20)] if evict else []
    cache = DynamicCache(config=model(name).config)
    with torch.no_grad(), apply(model(name), *others, method):
        for start, stop in ((0, FEW + 4), (FEW + 4, N - 1), (N - 1, N)):
            model(name)(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    return method.found


@pytest.mark.parametrize("evict", [False, True], ids=["whole", "evicted"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_it_is_the_column_sum(name: str, side: str, evict: bool) -> None:
    quick, slow = Both(weights=False), Matrix(weights=True)
    for got, expected in zip(masses(name, side, quick, evict), masses(name, side, slow, evict), strict=True):
        assert_near(got, expected, 1e-4)
    assert any(quick.fused) == (name == "llama")  # windows and soft caps have no fused statistics


def test_hidden_keys_receive_nothing() -> None:
    """Keys that a draft does not see, since a method would have dropped them by then."""
    found: list[tuple[Tensor, Tensor]] = []

    class Hides(Method):
        def read(self, site: Any, out: Tensor) -> None:
            site.hidden_keys = site.positions % 3 == 1
            found.append((received_mass(site), site.hidden_keys))

    with torch.no_grad(), apply(model("llama"), Hides()):
        model("llama")(tokens(1, N), past_key_values=DynamicCache())
    for mass, hidden in found:
        hidden = hidden.repeat_interleave(mass.shape[1] // hidden.shape[1], 1)
        assert bool((mass[hidden] == 0).all()) and bool((mass[~hidden] > 0).all())
        assert_near(mass.sum(-1), torch.full_like(mass[..., 0], N), 1e-4)
