"""What wrappers take from their base, and which bases they refuse; a policy of one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedModel
from foveate.host import Site, apply
from foveate.kv import (
    H2O,
    AdaKV,
    AttentionMatching,
    CapKV,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    Finch,
    KNorm,
    KVzip,
    PyramidKV,
    RocketKV,
    ScorePolicy,
    SnapKV,
)
from tests.contracts.policies import subject
from tests.support.host_models import tokens


def held(policy: ScorePolicy, steps: int = 0) -> list[list[list[int]]]:
    """The positions that each head of each layer holds."""
    model, cache, ids = subject("llama"), DynamicCache(), tokens(1, 60 + steps)
    with torch.no_grad(), apply(model, policy):
        for piece in ids.split([60, *[1] * steps], 1):
            model(piece, past_key_values=cache)
        rows = [layer.store.padded("positions")[0].sort(-1).values for layer in cache.layers]
    return [[[place for place in head if place >= 0] for head in row.tolist()] for row in rows]


@pytest.mark.parametrize("wrapper", [AdaKV, CriticalKV, ChunkKV])
@pytest.mark.parametrize(
    "base",
    [KVzip(instruct=False), Finch(renumbered=True), AttentionMatching(), RocketKV()],
    ids=lambda x: type(x).__name__,
)
def test_bases_that_do_more_than_score_are_refused(wrapper: type, base: ScorePolicy) -> None:
    with pytest.raises(OptionError, match="base must be a policy that only scores") as caught:
        wrapper(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [ExpectedAttention(share=0.3), CapKV(share=0.3)], ids=lambda x: type(x).__name__)
def test_a_base_gathers_its_statistics_under_a_wrapper(base: Any) -> None:
    """With every head at its equal budget, a wrapper keeps what the base keeps."""
    assert held(AdaKV(base, variant="kvpress", safeguard=1.0)) == held(base)


def test_uneven_heads_forget_nothing_that_they_need() -> None:
    wrapped = held(AdaKV(H2O(share=0.25, newest=0.1), variant="kvpress", safeguard=0.0), 60)
    assert wrapped == held(H2O(share=0.25, newest=0.1, heads="adaptive", safeguard=0.0), 60)


def test_a_threshold_takes_the_place_of_the_share() -> None:
    found = [held(H2O(share=share, threshold=0.8, every=1), 60) for share in (0.05, 0.9)]
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", [H2O(share=0.4), SnapKV(share=0.4, every=4)], ids=lambda x: type(x).__name__)
def test_a_deep_copy_of_a_cache_goes_on_with_its_notes(policy: ScorePolicy) -> None:
    model, cache, ids = subject("llama"), DynamicCache(), tokens(1, 60)
    with torch.no_grad(), apply(model, policy):
        model(ids[:, :40], past_key_values=cache)
        other = copy.deepcopy(cache)
        for step in range(40, 60):
            own, copied = (model(ids[:, step : step + 1], past_key_values=each).logits for each in (cache, other))
            assert torch.equal(own, copied)
    assert not any(name.startswith("_foveate") for name in vars(cache))


def test_layers_of_different_length_stay_with_foveate() -> None:
    model, cache, ids = subject("llama"), DynamicCache(), tokens(1, 60)
    with torch.no_grad():
        with apply(model, PyramidKV(share=0.3, recent=4, even=0.2)):
            model(ids[:, :40], past_key_values=cache)
        with pytest.raises(UnsupportedModel) as caught:
            model(ids[:, 40:52], past_key_values=cache)
        assert "\n" not in str(caught.value)
        with apply(model):
            model(ids[:, 40:52], past_key_values=cache)


@pytest.mark.parametrize(
    ("score", "error"),
    [
        (lambda site: torch.zeros(3), ShapeError),
        (lambda site: site.k.norm(dim=-1)[:, :1], ShapeError),
        (lambda site: None, ShapeError),
    ],
)
def test_a_score_of_ones_own_that_is_none_is_refused_in_one_line(score: Any, error: type[FoveateError]) -> None:
    class Own(ScorePolicy):
        def score(self, site: Site) -> Tensor:
            return score(site)

    with pytest.raises(error, match="Own.score") as caught:
        held(Own(share=0.5))
    assert "\n" not in str(caught.value)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(OptionError, match=r"layers=\(7,\): 7 is not among"):
        held(KNorm(layers=(7,)))
