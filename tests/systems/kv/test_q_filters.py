"""Q-Filters: the filters by a singular value decomposition, and what they are good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.host import apply
from foveate.host.hf.model import host
from foveate.kv import QFilters
from tests.conftest import ClaimFixture
from tests.support.host_models import tokens
from tests.systems.kv.test_score_policies import best, kept
from tests.systems.kv.test_triattention import N, data, directed, seen


def test_a_filter_is_the_first_right_singular_vector_on_the_side_of_the_queries() -> None:
    llama = directed()
    found, sites = QFilters.calibrate(host(llama), data())["filters"], [seen(ids, llama) for ids, _ in data()]
    for layer, site in enumerate(sites[0]):
        for head in range(site.k.shape[1]):
            group = []
            for query in range(head * site.groups, (head + 1) * site.groups):
                q = torch.cat([each[layer].q[0, query] for each in sites]).double()
                main = torch.linalg.svd(q, full_matrices=False).Vh[0]
                group.append(main * (q @ main).mean().sign())
            torch.testing.assert_close(found[layer, head].double(), torch.stack(group).mean(0), atol=1e-5, rtol=1e-4)


def test_the_score_is_the_keys_part_along_the_filter() -> None:
    llama, ids = directed(), tokens(1, N)
    policy = QFilters(share=0.4, **QFilters.calibrate(host(llama), data()))
    chosen = kept(llama, ids, policy)
    for layer, site in enumerate(seen(ids, llama)):
        assert chosen[layer] == best(torch.einsum("hsd,hd->hs", site.k[0], policy.filters[layer]), 16)


def test_filters_of_another_model_are_refused() -> None:
    with pytest.raises(OptionError, match="QFilters needs filters="), apply(directed(), QFilters()):
        pass
    with pytest.raises(ShapeError, match="filters must begin with"):
        apply(directed(), QFilters(filters=torch.zeros(1, 2, 8))).__enter__()


def test_keys_along_the_filter_get_the_attention_of_later_queries(claim: ClaimFixture) -> None:
    llama, mass = directed(), {"filters": 0.0, "others": 0.0}
    policy = QFilters(share=0.3, **QFilters.calibrate(host(llama), data()))
    for seed in range(6):
        ids = tokens(1, 2 * N, seed)
        for name, each in (("filters", policy), ("others", replace(policy, filters=policy.filters.roll(1, 0)))):
            chosen = kept(llama, ids[:, :N], each)
            for layer, site in enumerate(seen(ids, llama)):
                k = site.k[0].repeat_interleave(site.groups, 0)
                weights = (site.q[0, :, N:] @ k[:, :N].mT * site.scale).softmax(-1).mean(1)
                for head, row in enumerate(weights):
                    share = float(row[chosen[layer][head // site.groups]].sum())
                    mass[name] += share / (weights.shape[0] * 6 * len(chosen))
    claim(
        "share of later queries' attention that falls on the kept tokens",
        ours=mass["filters"], baseline=mass["others"], better="higher", margin=0.05,
        baseline_name="the filters of other layers", seed=0,
    )  # fmt: skip
