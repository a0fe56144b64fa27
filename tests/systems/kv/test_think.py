"""ThinK: which channels are stored, that bytes really fall, and that queries say which channels matter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import KIVI, RandomKeep, ThinK
from tests.conftest import ClaimFixture
from tests.support.host_models import feed, model, tokens

N = 40


class Watch(Method):
    """Notes queries and keys of the first layer's first call."""

    def __init__(self) -> None:
        self.q: Tensor | None = None
        self.k = torch.empty(0)

    def read(self, site: Any, out: Tensor) -> None:
        if site.order == 0 and self.q is None:
            self.q, self.k = site.q.clone(), site.k.clone()


@torch.no_grad()
def test_the_channels_with_the_best_scores_are_stored() -> None:
    """mean(q^2) of the last queries, over the heads of a group, times mean(k^2) of all keys."""
    llama, ids, watch, cache = model("llama"), tokens(2, N), Watch(), DynamicCache()
    with apply(llama, watch, ThinK(kept=0.5, window=7, residual=4, group=4)):
        llama(ids, past_key_values=cache)
        chunk = cache.layers[0].store.codes.chunks[0]
    assert watch.q is not None
    queries = watch.q[:, :, -7:].square().mean(2).unflatten(1, (2, 2)).mean(2)
    scores = queries * watch.k.square().mean(2)
    best = scores.topk(4, -1).indices.sort(-1).values
    assert torch.equal(chunk.k["channels"].long(), best)
    index = best[:, :, None].expand(-1, -1, 36, -1)
    torch.testing.assert_close(chunk.k["x"], watch.k[:, :, :36].gather(3, index))
    assert chunk.k["x"].shape == (2, 2, 36, 4) and chunk.v["x"].shape == (2, 2, 36, 8)


@torch.no_grad()
def test_attention_is_that_of_keys_whose_other_channels_are_zero() -> None:
    """Later tokens too: their keys lose the same channels when they leave the residual."""
    llama, ids, more, cache = model("llama"), tokens(2, N), tokens(2, 9, seed=1), DynamicCache()
    with apply(llama, ThinK(kept=0.5, residual=4, group=4)):
        llama(ids, past_key_values=cache)
        chosen = cache.layers[1].store.codes.chunks[0].k["channels"]
        for step in range(8):
            llama(more[:, step : step + 1], past_key_values=cache)
        (chunk,) = cache.layers[1].store.codes.chunks
        assert torch.equal(chunk.k["channels"], chosen) and chunk.length == 44
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            assert int((layer.keys[:, :, :44] == 0).sum()) == 2 * 2 * 44 * 4 and bool(
                (layer.keys[:, :, 44:] != 0).all()
            )
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        got = llama(more[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(got, llama(more[:, 8:], past_key_values=plain).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bytes_by_hand() -> None:
    llama = model("llama")
    whole, table = 2 * 8 * 4, 5 * 2
    for policy, size in (
        (ThinK(kept=0.6, residual=4, group=4), (5 + 8) * 4 + 4),
        (ThinK(kept=0.6, base=KIVI(bits=4, residual=4, group=4)), 3 + 5 * 4 / 4 + 4 + 4 + 4),
    ):
        with apply(llama, policy) as run:
            llama(tokens(1, N), past_key_values=DynamicCache())
        assert run.stats.cache_bytes == 3 * 2 * (36 * size + 4 * whole + table)
    both = ThinK(kept=1.0, base=KIVI(bits=4, residual=4, group=4))
    kept = []
    for policy in (both, KIVI(bits=4, residual=4, group=4)):
        with apply(llama, policy) as run:
            llama(tokens(1, N), past_key_values=DynamicCache())
        kept.append(run.stats.cache_bytes)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("share", [0.3, 0.7])
@torch.no_grad()
def test_it_scores_what_an_eviction_left(share: float) -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, RandomKeep(share=share), ThinK(kept=0.5, residual=2, group=2)):
        llama(tokens(2, N), past_key_values=cache)
        store = cache.layers[0].store
        assert store.codes.length + store.groups[0].length == round(share * N)


@dataclass(eq=False)
class _ByKeys(Method):
    """ThinK without its queries: the channels in which keys are largest."""

    policy: ThinK

    def encode(self, site: Any) -> Any:
        found = self.policy.coding(site.order, site)
        assert found is not None
        if site.slots.store.codes is None:
            best = site.k.square().mean(2).argsort(dim=-1, descending=True, stable=True)
            found.tables["channels"] = best[..., : found.tables["channels"].shape[2]].sort(-1).values.to(torch.int16)
        return found


def test_queries_say_which_channels_matter(claim: ClaimFixture) -> None:
    """On a model whose largest key channels meet small queries: their norm alone keeps what adds little to a logit."""
    llama, ids = copy.deepcopy(model("llama")), tokens(8, 64)
    loss, policy, mask = {}, ThinK(kept=0.5, residual=0, group=16), torch.ones(8, 64, dtype=torch.bool)
    with torch.no_grad():
        for layer in llama.model.layers:
            for projection, factor in ((layer.self_attn.k_proj, 3.0), (layer.self_attn.q_proj, 0.1)):
                projection.weight.view(-1, 8, 32)[:, [1, 3, 5, 7]] *= factor  # two pairs that rotate together
        full = feed(llama, ids, mask, [48, *[1] * 16]).log_softmax(-1)
        for name, method in (("both", policy), ("keys", _ByKeys(policy))):
            with apply(llama, method):
                got = feed(llama, ids, mask, [48, *[1] * 16]).log_softmax(-1)
            loss[name] = float((full.exp() * (full - got)).sum(-1).mean())
    claim(
        "half of the key channels, chosen by queries and keys, predict what the full cache does where the largest "
        "channels of keys fail (KL from it, nats)",
        ours=loss["both"], baseline=0.5 * loss["keys"], better="lower",
        baseline_name="the channels of largest norm, less half", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kept": 1.5}, "kept=1.5"),
        ({"window": 0}, "window=0"),
        ({"base": 3}, "base must be a policy that quantises"),
        ({"base": ThinK()}, "base must be a policy that quantises"),
        ({"residual": -1}, "residual=-1"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ThinK(**options)
