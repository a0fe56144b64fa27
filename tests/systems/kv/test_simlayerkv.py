"""SimLayerKV: the mass that makes a layer lazy, by hand; what it keeps; and that lazy layers need no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Context, Method, apply
from foveate.host.hf.model import host
from foveate.kv import SimLayerKV, SinkRecent
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import model, tokens
from tests.systems.kv.test_score_policies import kept

N = 60


class Weights(Method):
    """Notes every layer's weights."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def edit_weights(self, site: Any, weights: torch.Tensor) -> torch.Tensor:
        self.found.append(weights[0])
        return weights


@pytest.mark.parametrize("queries", [1, 5])
def test_a_layer_is_lazy_by_its_last_queries(queries: int) -> None:
    ids, watch = tokens(1, N), Weights()
    with torch.no_grad(), apply(model("llama"), watch):
        model("llama")(ids)
    masses = []
    for weights in watch.found:
        rows = range(N - queries, N)
        parts = [weights[:, row, :3].sum(-1) + weights[:, row, row - 19 : row + 1].sum(-1) for row in rows]
        masses.append(float(torch.stack(parts).mean()))
    assert len({round(mass, 3) for mass in masses}) == 3
    low, middle, high = sorted(masses)
    for threshold, lazy in (((low + middle) / 2, 2), ((middle + high) / 2, 1), (high + 0.01, 0)):
        made = kept(model("llama"), ids, SimLayerKV(threshold=min(1.0, threshold), sink=3, recent=20, queries=queries))
        ends = [0, 1, 2, *range(N - 20, N)]
        expected = [ends if mass > threshold else list(range(N)) for mass in masses]
        assert [layer[0] for layer in made] == expected and sum(one == ends for one in expected) == lazy
        assert all(layer[0] == layer[1] for layer in made)


@torch.no_grad()
def test_the_limits_are_the_full_cache_and_sinks_with_a_window() -> None:
    llama = model("llama")

    def logits(*methods: Method, size: int = N, steps: int = 12) -> torch.Tensor:
        cache = DynamicCache()
        with apply(llama, *methods):
            out = [llama(tokens(2, size), past_key_values=cache).logits[:, -1:]]
            out += [llama(tokens(2, 1, seed), past_key_values=cache).logits for seed in range(steps)]
        return torch.cat(out, 1)

    assert torch.equal(logits(SimLayerKV(threshold=1.0, recent=8)), logits())
    lazy = SimLayerKV(threshold=0.0, sink=3, recent=20)
    assert torch.equal(logits(lazy), logits(SinkRecent(3, 20))) and not torch.equal(logits(lazy), logits())
    short = logits(lazy, size=16), logits(size=16)
    assert torch.equal(*short), "28 tokens, and 46 are needed after a short prompt"
    early, plain = logits(lazy, size=12, steps=40)[:, [33, 34, 40]], logits(size=12, steps=40)[:, [33, 34, 40]]
    assert torch.equal(early[:, :2], plain[:, :2]) and not torch.equal(early[:, 2], plain[:, 2])


def test_at_most_so_many_layers_keep_everything() -> None:
    for most in (0, 1, 2):
        made = kept(model("llama"), tokens(1, N), SimLayerKV(threshold=0.99999, sink=3, recent=8, most=most))
        assert [len(layer[0]) == N for layer in made] == [number < most for number in range(3)]


def test_a_layer_that_has_dropped_stays_lazy() -> None:
    """In pieces, too, and where a text is read before its question."""
    llama = model("llama")
    with torch.no_grad(), apply(llama, SimLayerKV(threshold=0.0, sink=3, recent=20)):
        cache = DynamicCache()
        for piece in tokens(1, N).split(25, 1):
            llama(piece, past_key_values=cache)
        assert [layer.store.stored for layer in cache.layers] == [2 * 23] * 3
    context = Context(llama, SimLayerKV(threshold=0.0, sink=3, recent=20))
    context.read(tokens(1, N))
    assert context.kept == 23 / N


def test_lazy_layers_need_only_ends(claim: ClaimFixture) -> None:
    """Of three layers the middle one retrieves; at the same memory a window in all of them loses what it needs."""
    lm = induction_lm(layers=3, matching=[(1, 0)])
    ids, answers = recall(8, length=256, answer=4, away=120)
    policy = SimLayerKV(threshold=0.9, sink=4, recent=28)
    made = kept(lm, ids[:1], policy)
    assert [len(layer[0]) for layer in made] == [32, 256, 32]
    size = sum(len(layer[0]) for layer in made) // 3
    found = []
    for method in (policy, SinkRecent(4, size - 4)):
        with apply(lm, method):
            found.append(accuracy(lm, ids, answers))
    assert accuracy(lm, ids, answers) == 1.0
    claim(
        "layers that only look at sinks and recent tokens need no others: share of values found",
        ours=found[0], baseline=found[1], better="higher", margin=0.5,
        baseline_name="sinks and a window in every layer, same memory", seed=0,
    )  # fmt: skip


def test_a_budget_is_shared_out_by_what_calibration_saw() -> None:
    lm = induction_lm(layers=3, matching=[(1, 0)])
    learnt = SimLayerKV.calibrate(host(lm), ((ids[None], ids[None] > 0) for ids in recall(4, 256, 4, 120)[0]))
    assert learnt["mass"].argmin() == 1 and learnt["mass"].shape == (3,)
    policy = SimLayerKV.at_budget(0.6, host(lm), 256, **learnt)
    assert policy.most == 1 and learnt["mass"][1] < policy.threshold < learnt["mass"][[0, 2]].min()
    ids, _ = recall(1, 256, 4, 120)
    sizes = [len(layer[0]) for layer in kept(lm, ids, policy)]
    assert sizes[1] == 256 and sizes[0] == sizes[2] < 256 and sum(sizes) <= 0.6 * 3 * 256 + 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"sink": -1}, "sink=-1"),
        ({"recent": 0}, "recent=0"),
        ({"queries": 0}, "queries=0"),
        ({"most": -1}, "most=-1"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        SimLayerKV(**options)
