"""KVzap: the fit against KVzip+, thresholds, and what the fit is good for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError, ShapeError
from foveate.host import Site, apply
from foveate.host.hf.model import host
from foveate.kv import KVzap, KVzip
from foveate.kv.parts import slot_notes
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.systems.kv.test_kvzip import Watch, scores
from tests.systems.kv.test_score_policies import kept

N = 40


def data() -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(8):
        yield tokens(1, N, seed + 10), torch.zeros(1, N, dtype=torch.bool)


def fitted(**options: object) -> KVzap:
    return KVzap(**{"recent": 4, "sink": 2, **KVzap.calibrate(host(model("llama")), data()), **options})


def test_the_fit_is_a_ridge_regression_on_the_scores_of_kvzip_plus() -> None:
    llama, x, y = model("llama"), [], []
    for ids, _ in data():
        watch = Watch()
        with torch.no_grad(), apply(llama, watch):
            llama(ids)
        x.append(watch.sites[1].hidden[0])
        y.append(scores(llama, ids, ids, range(N), 4, True)[1].mT.log())
    x, y = torch.cat(x).double(), torch.cat(y).double()
    off, mean = x - x.mean(0), y.mean(0)
    weight = torch.linalg.solve(off.mT @ off + torch.eye(x.shape[1]), off.mT @ (y - mean)).mT
    made = fitted()
    torch.testing.assert_close(made.weight[1].double(), weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(made.bias[1].double(), mean - weight @ x.mean(0), atol=1e-3, rtol=1e-3)


def test_a_threshold_keeps_what_scores_above_it_and_the_newest() -> None:
    llama, ids, made, watch = model("llama"), tokens(1, N), fitted(), Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    found = [site.hidden[0] @ made.weight[row].mT + made.bias[row] for row, site in enumerate(watch.sites)]
    middle, sizes = float(torch.stack(found).median()), set()
    for layer, heads in enumerate(kept(llama, ids, replace(made, threshold=middle))):
        for head, positions in enumerate(heads):
            above = (found[layer][:, head] >= middle).nonzero()[:, 0].tolist()
            assert positions == sorted({0, 1, *above, *range(N - 4, N)})
            sizes.add(len(positions))
    assert min(sizes) < max(sizes) and min(sizes) < N


@torch.no_grad()
def test_decoded_tokens_are_dropped_when_they_leave_the_window() -> None:
    llama, made, cache = model("llama"), fitted(threshold=100.0), DynamicCache()
    with apply(llama, made):
        llama(tokens(1, N), past_key_values=cache)
        for step in range(20):
            llama(tokens(1, 1, step), past_key_values=cache)
            held = cache.layers[0].store.padded("positions")
            assert sorted(held[0, 0][held[0, 0] >= 0].tolist()) == [0, 1, *range(N + step - 3, N + step + 1)]


@torch.no_grad()
def test_a_score_stays_with_its_token() -> None:
    """After drops and new tokens, each stored token has the number that its own hidden state gave."""
    llama, made, first = model("llama"), fitted(threshold=-2.0), {}

    class Check(Watch):
        def read(self, site: Site, out: Tensor) -> None:
            if site.layer == 1:
                found = slot_notes.find(site.notes(made), site)
                for place, number in zip(site.positions[0, 0].tolist(), found[0, 0].tolist(), strict=True):
                    assert place < 0 or first.setdefault(place, number) == number

    cache = DynamicCache()
    with apply(llama, made, Check()):
        llama(tokens(1, N), past_key_values=cache)
        for step in range(12):
            llama(tokens(1, 1, step), past_key_values=cache)
    assert len(first) == N + 12 and len(set(first.values())) > N


def test_maps_of_another_model_are_refused() -> None:
    with pytest.raises(OptionError, match="KVzap needs weight= and bias="), apply(model("llama"), KVzap()):
        pass
    with pytest.raises(OptionError, match="every=3 goes with a threshold"):
        KVzap(heads="equal", every=3)
    with pytest.raises(ShapeError, match="weight and bias must be"):
        apply(model("llama"), KVzap(weight=torch.zeros(1, 2, 3), bias=torch.zeros(1, 2))).__enter__()


def test_it_keeps_what_kvzip_plus_keeps(claim: ClaimFixture) -> None:
    """On new texts, with no second reading."""
    llama, shared = model("llama"), {"fitted": 0.0, "shuffled": 0.0}
    made = fitted(share=0.4, recent=0)
    order = torch.randperm(made.weight.shape[2], generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        ids = tokens(1, N, seed)
        right = kept(llama, ids, KVzip(share=0.4, sink=2, plus=True, instruct=False))
        for name, policy in (("fitted", made), ("shuffled", replace(made, weight=made.weight[:, :, order]))):
            found = kept(llama, ids, policy)
            pairs = [(set(a), set(b)) for x, y in zip(found, right, strict=True) for a, b in zip(x, y, strict=True)]
            shared[name] += sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs) / 6
    claim(
        "share of KVzip+'s tokens that a linear map of hidden states keeps too",
        ours=shared["fitted"], baseline=shared["shuffled"], better="higher", margin=0.1,
        baseline_name="the same map with its inputs shuffled", seed=0,
    )  # fmt: skip
