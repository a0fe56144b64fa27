"""Policies that rank slots by a score: what the base class makes of it, and random eviction, the floor of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import TOVA, KeyDiff, KNorm, RandomKeep, ScorePolicy, SnapKV
from tests.support.host_models import model, tokens

N = 40
POLICIES = [SnapKV(recent=6, pool=3), KNorm(), KeyDiff(), TOVA(), RandomKeep()]
EACH = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)


def kept(llama: PreTrainedModel, ids: Tensor, *policies: Method) -> list[list[list[int]]]:
    """The positions that each layer and head of the first sequence keeps, after the prompt."""
    cache = DynamicCache()
    with torch.no_grad(), apply(llama, *policies):
        llama(ids, past_key_values=cache)
        layers = [layer.store.padded("positions")[0] for layer in cache.layers]
    return [[sorted(p for p in head.tolist() if p >= 0) for head in layer] for layer in layers]


class Watch(Method):
    """Notes keys and the attention weights of the first layer."""

    def __init__(self) -> None:
        self.k, self.weights = torch.empty(0), torch.empty(0)

    def edit_weights(self, site: Any, weights: Tensor) -> Tensor:
        if site.order == 0:
            self.k, self.weights = site.k.clone(), weights.clone()
        return weights


def seen(llama: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's keys `(1, Hkv, N, D)`, and its weights grouped by key/value head `(1, Hkv, G, N, N)`."""
    watch = Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    return watch.k, watch.weights.unflatten(1, (watch.k.shape[1], -1))


def best(scores: Tensor, count: int, always: Any = ()) -> list[list[int]]:
    """The positions of the `count` best scores of each head, those that stay in any case first."""
    forced = scores.clone()
    forced[:, list(always)] = torch.inf
    return [sorted(row.sort(descending=True, stable=True).indices[:count].tolist()) for row in forced]


@EACH
def test_sinks_and_the_newest_tokens_stay_and_the_share_is_kept(policy: ScorePolicy) -> None:
    wide = replace(policy, share=0.4, sink=3, recent=7)
    for layer in kept(model("llama"), tokens(1, N), wide):
        for head in layer:
            assert len(head) == 16 and {0, 1, 2, *range(N - 7, N)} <= set(head)


@pytest.mark.parametrize("policy", [p for p in POLICIES if not isinstance(p, TOVA)], ids=lambda p: type(p).__name__)
def test_an_adaptive_budget_is_the_layers(policy: ScorePolicy) -> None:
    """The heads of a layer keep as much together, some more and some less, each at least its safeguard."""
    adaptive = replace(policy, share=0.4, heads="adaptive", safeguard=0.5)
    sizes = [[len(head) for head in layer] for layer in kept(model("llama"), tokens(1, N), adaptive)]
    assert all(sum(layer) == 16 * len(layer) and min(layer) >= 8 for layer in sizes)
    assert any(len(set(layer)) > 1 for layer in sizes)


def test_an_adaptive_budget_keeps_the_best_scores_of_the_layer() -> None:
    llama, ids = model("llama"), tokens(1, N)
    k, _ = seen(llama, ids)
    scores = -k[0].norm(dim=-1)
    chosen = scores.flatten().sort(descending=True, stable=True).indices[: 16 * k.shape[1]]
    expected = [sorted((chosen[chosen // N == head] % N).tolist()) for head in range(k.shape[1])]
    assert kept(llama, ids, KNorm(share=0.4, heads="adaptive", safeguard=0.0))[0] == expected


@torch.no_grad()
def test_it_compresses_again_while_decoding_where_asked() -> None:
    llama, sizes = model("llama"), {}
    for every in (None, 1, 5):
        cache = DynamicCache()
        with apply(llama, KNorm(share=0.25, every=every)):
            llama(tokens(1, N), past_key_values=cache)
            for _ in range(20):
                llama(tokens(1, 1), past_key_values=cache)
            sizes[every] = cache.layers[0].store.padded("positions").ge(0).sum(-1).max().item()
    assert sizes == {None: 10 + 20, 1: 15, 5: 15}


def test_layers_are_left_alone_where_asked() -> None:
    layers = kept_sizes(KNorm(share=0.25, layers=(1,)))
    assert layers[0] == N and layers[1] == N // 4


def kept_sizes(policy: ScorePolicy) -> list[int]:
    cache = DynamicCache()
    with torch.no_grad(), apply(model("llama"), policy):
        model("llama")(tokens(1, N), past_key_values=cache)
        return [int(layer.store.padded("positions").ge(0).sum(-1).max()) for layer in cache.layers]


def test_a_random_score_is_uniform_and_independent() -> None:
    llama, ids = model("llama"), tokens(1, 400)
    one, two = (kept(llama, ids, RandomKeep(share=0.5, sink=0, seed=seed)) for seed in (0, 1))
    for layer in one:
        for head in layer:
            assert abs(sum(head) / len(head) - 199.5) < 25
    assert one != two and one[0][0] != one[0][1] and one[0] != one[1]
    assert kept(llama, ids, RandomKeep(share=0.5, sink=0)) == one


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 1.5}, "share=1.5"),
        ({"sink": -1}, "sink=-1"),
        ({"heads": "best"}, "heads='best'"),
        ({"safeguard": 2}, "safeguard=2"),
        ({"every": 0}, "every=0"),
        ({"layers": 3}, "layers=3"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        KNorm(**options)
