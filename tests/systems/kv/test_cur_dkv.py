"""CurDKV: the score by hand, and what it keeps of the values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import CurDKV, RandomKeep
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.systems.kv.test_kvzip import Watch
from tests.systems.kv.test_score_policies import best, kept

N = 40


def shares(x: Tensor, window: int | None) -> Tensor:
    square = x.square().sum(-1)
    if window is None:
        return square
    return torch.cat([part / part.sum(-1, keepdim=True) for part in square.split(window, -1)], -1)


@pytest.mark.parametrize("kind", ["product", "key", "value", "mean"])
@pytest.mark.parametrize("window", [16, None])
@pytest.mark.parametrize("projection", [None, 5])
def test_the_score_is_the_papers(kind: str, window: int | None, projection: int | None) -> None:
    llama, ids, watch = model("llama"), tokens(1, N), Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    found = kept(llama, ids, CurDKV(share=0.4, kind=kind, window=window, projection=projection, seed=3))
    for layer, site in enumerate(watch.sites):
        both = [site.k[0], site.v[0]]
        if projection is not None:
            draw = torch.randn(8, projection, generator=torch.Generator().manual_seed(3)) / math.sqrt(projection)
            both = [x @ draw for x in both]
        k, v = (shares(x, window) for x in both)
        score = {"product": k * v, "key": k, "value": v, "mean": (k + v) / 2}[kind]
        assert found[layer] == best(score, 16, range(4))


def test_bad_options() -> None:
    for name, value in (("kind", "both"), ("window", 0), ("projection", 0), ("seed", -1)):
        with pytest.raises(OptionError, match=f"{name}="):
            CurDKV(**{name: value})


def test_large_values_and_keys_stay(claim: ClaimFixture) -> None:
    llama, mass = model("llama"), {CurDKV: 0.0, RandomKeep: 0.0}
    for seed in range(6):
        ids, watch = tokens(1, N, seed), Watch()
        with torch.no_grad(), apply(llama, watch):
            llama(ids)
        for policy in mass:
            for layer, heads in enumerate(kept(llama, ids, policy(share=0.4))):
                for head, places in enumerate(heads):
                    both = (x[0, head].square().sum(-1) for x in (watch.sites[layer].k, watch.sites[layer].v))
                    leverage = next(both) * next(both)
                    mass[policy] += float(leverage[places].sum() / leverage.sum()) / 36
    claim(
        "share of the products of keys' and values' squared lengths that is kept",
        ours=mass[CurDKV], baseline=mass[RandomKeep], better="higher", margin=0.1,
        baseline_name="random tokens", seed=0,
    )  # fmt: skip
