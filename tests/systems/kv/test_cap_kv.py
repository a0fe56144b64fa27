"""CapKV: the score by hand, and the capacity that it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import CapKV, ExpectedAttention
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.systems.kv.test_kvzip import Watch
from tests.systems.kv.test_score_policies import best, kept
from tests.systems.kv.test_triattention import angles, complex_pairs

N, SINK, FUTURE = 40, 3, 20


def weights_of(site: Any, tau: float) -> Tensor:
    """The relevance of the tokens after the sinks to each query head, `(Hq, N - SINK)`."""
    turn = torch.arange(N, N + FUTURE)[:, None] * angles()
    average = torch.polar(torch.ones_like(turn), turn).mean(0)
    q = complex_pairs(site.q[0].double(), torch.arange(N)[:, None] * angles())[:, SINK:].mean(1) * average
    anchor = torch.cat([q.real, q.imag], -1)
    k = site.k[0, :, SINK:].double().repeat_interleave(site.groups, 0)
    cosine = F.cosine_similarity(anchor[:, None], k, dim=-1)
    return (tau * (cosine - cosine.amax(-1, keepdim=True))).exp()


def test_the_score_is_the_papers() -> None:
    llama, ids, watch = model("llama"), tokens(1, N), Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    found = kept(llama, ids, CapKV(share=0.4, sink=SINK, future=FUTURE, tau=3.0))
    for layer, site in enumerate(watch.sites):
        weights, scores = weights_of(site, 3.0), torch.zeros(site.q.shape[1], N, dtype=torch.float64)
        for head in range(site.q.shape[1]):
            v = site.v[0, head // site.groups, SINK:].double()
            a = torch.eye(v.shape[1], dtype=torch.float64)
            for token in range(N - SINK):
                a += (weights[head, token] + 1e-6) * torch.outer(v[token], v[token])
            inverse = torch.linalg.inv(a)
            for token in range(N - SINK):
                scores[head, SINK + token] = weights[head, token] * (v[token] @ inverse @ v[token])
        assert found[layer] == best(scores.unflatten(0, (-1, site.groups)).mean(1), 16, range(SINK))


def test_bad_options() -> None:
    for name, value in (("tau", -1.0), ("future", 0), ("epsilon", -1.0)):
        with pytest.raises(OptionError, match=f"{name}="):
            CapKV(**{name: value})


def test_it_keeps_more_capacity(claim: ClaimFixture) -> None:
    """The capacity of kept tokens is `log det(I + sum w v v')`."""
    llama, capacity = model("llama"), {CapKV: 0.0, ExpectedAttention: 0.0}
    for seed in range(6):
        ids, watch = tokens(1, N, seed), Watch()
        with torch.no_grad(), apply(llama, watch):
            llama(ids)
        for policy in capacity:
            options = {"values": False} if policy is ExpectedAttention else {}
            for layer, heads in enumerate(kept(llama, ids, policy(share=0.3, sink=SINK, future=FUTURE, **options))):
                site = watch.sites[layer]
                weights = weights_of(site, 5.0).unflatten(0, (-1, site.groups)).mean(1)
                for head, places in enumerate(heads):
                    held = [place - SINK for place in places if place >= SINK]
                    v, w = site.v[0, head, SINK:].double()[held], weights[head, held]
                    whole = torch.eye(v.shape[1], dtype=torch.float64) + (v * w[:, None]).mT @ v
                    capacity[policy] += float(torch.logdet(whole)) / 36
    claim(
        "capacity of the kept values, log det(I + sum w v v')",
        ours=capacity[CapKV], baseline=capacity[ExpectedAttention], better="higher", margin=0.1,
        baseline_name="expected attention without values", seed=0,
    )  # fmt: skip
