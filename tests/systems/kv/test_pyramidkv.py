"""PyramidKV: the layers' budgets by hand, SnapKV as its limit, windows, and what the pyramid is good for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import PyramidKV, SnapKV
from tests.conftest import ClaimFixture
from tests.contracts.policies import here, subject
from tests.support.host_models import tokens

N = 200


@torch.no_grad()
def kept(policy: Method, name: str = "deep") -> list[Tensor]:
    """The positions that each layer's heads keep of `N` tokens."""
    cache = DynamicCache(config=subject(name).config)
    with apply(subject(name), policy):
        subject(name)(tokens(1, N), past_key_values=cache)
        return [layer.store.padded("positions")[0].sort(-1).values for layer in cache.layers]


def sizes(policy: Method, name: str = "deep") -> list[int]:
    return [int(layer.ge(0).sum(-1).max()) for layer in kept(policy, name)]


@pytest.mark.parametrize(("budget", "beta"), [(0.25, 20.0), (0.4, 2.0), (0.3, 5.0)])
def test_budgets_are_the_papers(budget: float, beta: float) -> None:
    """The window in each layer, and the rest from its largest part in the first layer down to its smallest."""
    policy = replace(PyramidKV.at_budget(budget, here("deep"), N), beta=beta)
    window, rest = policy.recent, budget * N - policy.recent
    least = rest / beta
    most = 2 * rest - least
    if most > N - window:
        most, least = N - window, 2 * rest - (N - window)
    expected = [window + most - layer * (most - least) / 19 for layer in range(20)]
    got = sizes(policy)
    assert all(abs(a - b) <= 0.5 + 1e-6 for a, b in zip(got, expected, strict=True))
    assert abs(sum(got) - budget * N * 20) <= 10 and got == sorted(got, reverse=True)


def test_the_window_may_count_within_the_pyramid() -> None:
    """As in kvpress: from twice the mean, less a `beta`-th of it, down to a `beta`-th."""
    got = sizes(PyramidKV(share=0.25, recent=2, beta=10.0))
    assert (got[0], got[-1]) == (95, 5) and abs(sum(got) - 1000) <= 10


def test_no_layer_has_more_than_all_tokens() -> None:
    got = sizes(PyramidKV(share=0.7, recent=8))
    assert (got[0], got[-1]) == (N, 80) and abs(sum(got) - 0.7 * N * 20) <= 10


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"even": 1.0}])
def test_without_a_pyramid_it_is_snapkv(options: dict[str, Any]) -> None:
    same = dict(share=0.3, recent=9, pool=7, pooling="max", group="max")
    for mine, theirs in zip(kept(PyramidKV(**same, **options)), kept(SnapKV(**same)), strict=True):
        assert torch.equal(mine, theirs)


def test_layers_that_are_not_in_the_pyramid() -> None:
    """A layer with a window keeps its share of its window; layers that are left alone do not count."""
    plain, got = sizes(SnapKV(share=0.2, recent=4), "windowed"), sizes(PyramidKV(share=0.2, recent=4), "windowed")
    assert got[0] == plain[0] and got[1] > got[2] == 40 > got[3] and got[1] + got[3] == 80
    some = sizes(PyramidKV(share=0.2, recent=4, layers=(1, 5, 9)))
    assert some[0] == N and some[1] > some[5] == 40 > some[9] and some[1] + some[9] == 80


@torch.no_grad()
def test_lower_layers_are_worth_more(claim: ClaimFixture) -> None:
    """KL from the full cache over 20 tokens after 200 of the prompt."""
    llama, off = subject("deep"), {}
    ids = tokens(6, N + 20, seed=1)
    expected = llama(ids).logits[:, N:].log_softmax(-1)
    for policy in (PyramidKV(share=0.2, recent=8), SnapKV(share=0.2, recent=8)):
        cache = DynamicCache()
        with apply(llama, policy):
            llama(ids[:, :N], past_key_values=cache)
            got = torch.cat([llama(one, past_key_values=cache).logits for one in ids[:, N:].split(1, 1)], 1)
        kl = F.kl_div(got.log_softmax(-1), expected, log_target=True, reduction="none")
        off[type(policy).__name__] = float(kl.sum(-1).mean())
    claim(
        "of one budget, more for the lower layers and less for the upper ones is better than the same for all: KL from "
        "the full cache, nats",
        ours=off["PyramidKV"], baseline=off["SnapKV"], better="lower", margin=0.05,
        baseline_name="SnapKV, at the same share", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"), [({"beta": 0.5}, "beta=0.5"), ({"even": 2.0}, "even=2"), ({"pool": 0}, "pool=0")]
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        PyramidKV(**options)
