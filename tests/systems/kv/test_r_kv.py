"""R-KV: the score by hand, fixed sizes while decoding, and what redundancy is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import RKV, r_kv as module
from tests.conftest import ClaimFixture
from tests.support.constructed import induction_lm
from tests.support.host_models import model, tokens
from tests.systems.kv.test_kvzip import Watch
from tests.systems.kv.test_score_policies import best, kept

N, RECENT = 40, 6


def score(site: Any, recent: int, mix: float, alike: float, pool: int) -> Tensor:
    """The score of one layer's tokens before the window, by the paper's formulas, one key at a time."""
    k, n = site.k[0], site.k.shape[2]
    logits = (site.q[0, :, -recent:] @ site.k[0].repeat_interleave(site.groups, 0).mT) * site.scale
    weights = logits.unflatten(0, (-1, site.groups)).amax(1)[..., : n - recent].softmax(-1).mean(1)
    importance = F.max_pool1d(weights, pool, 1, pool // 2)
    like = F.normalize(k, dim=-1) @ F.normalize(k, dim=-1).mT
    for head in like:
        head.fill_diagonal_(0.0)
        for row in head:
            near = (row > alike).nonzero()[:, 0]
            if len(near):
                row[near[-1]] = 0.0
    redundancy = like.mean(1).softmax(-1)
    importance = F.pad(importance, (0, recent))
    return mix * importance - (1 - mix) * redundancy


@pytest.mark.parametrize(("mix", "alike", "pool"), [(0.07, 0.5, 7), (1.0, 0.5, 3), (0.0, 0.2, 1)])
@pytest.mark.parametrize("tile", [1 << 22, 300])
def test_the_score_is_the_papers(mix: float, alike: float, pool: int, tile: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    llama, ids, watch = model("llama"), tokens(1, N), Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    found = kept(llama, ids, RKV(limit=16, recent=RECENT, mix=mix, alike=alike, pool=pool))
    for layer, site in enumerate(watch.sites):
        assert found[layer] == best(score(site, RECENT, mix, alike, pool), 16, range(N - RECENT, N))


@torch.no_grad()
def test_a_head_never_holds_more_than_the_limit_and_the_steps_between() -> None:
    llama, cache, sizes = model("llama"), DynamicCache(), []
    with apply(llama, RKV(limit=16, recent=4, every=8)):
        llama(tokens(1, 10), past_key_values=cache)
        for step in range(60):
            llama(tokens(1, 1, step), past_key_values=cache)
            sizes.append(int(cache.layers[0].store.padded("positions").ge(0).sum(-1).max()))
    assert max(sizes) <= 16 + 8 and sizes[-1] >= 16 and min(sizes[20:]) == 16


@torch.no_grad()
def test_the_queries_of_earlier_steps_score_too() -> None:
    """The last queries, not the current one alone, say what matters while decoding."""
    llama, ids, more = model("llama"), tokens(1, N), tokens(1, 8, 5)
    with apply(llama, RKV(limit=16, recent=8, every=8, mix=1.0, pool=1)):
        step, whole = DynamicCache(), DynamicCache()
        llama(ids[:, :12], past_key_values=step)
        for one in more[0]:
            llama(one[None, None], past_key_values=step)
        llama(torch.cat([ids[:, :12], more], 1), past_key_values=whole)
        for a, b in zip(step.layers, whole.layers, strict=True):
            held = [layer.store.padded("positions").sort(-1).values for layer in (a, b)]
            assert torch.equal(held[0][held[0] >= 0], held[1][held[1] >= 0])


def test_bad_options() -> None:
    for options, says in (
        ({"mix": 2}, "mix=2"),
        ({"alike": 3}, "alike=3"),
        ({"pool": 2}, "pool=2"),
        ({"recent": 0}, "re"),
    ):
        with pytest.raises(OptionError, match=says):
            RKV(**options)


def test_text_that_repeats_itself_leaves_room_for_the_rest(claim: ClaimFixture) -> None:
    """A sentence of four tokens stands six times in a text; its latest copy and the other tokens stay."""
    lm, draw, share = induction_lm(), torch.Generator().manual_seed(0), {"ours": 0.0, "baseline": 0.0}
    for _ in range(8):
        words = 1 + torch.randperm(40, generator=draw)[:16]
        text = torch.cat([torch.tensor([0]), *(torch.cat([words[:4], words[4 + 2 * i : 6 + 2 * i]]) for i in range(6))])
        for name, mix in (("ours", 0.07), ("baseline", 1.0)):
            heads = kept(lm, text[None], RKV(limit=18, recent=2, mix=mix, pool=1))[1]
            distinct = [len({int(text[place]) for place in head}) for head in heads]
            share[name] += sum(distinct) / len(distinct) / len(set(text.tolist())) / 8
    claim(
        "share of a repetitive text's distinct tokens that are kept",
        ours=share["ours"], baseline=share["baseline"], better="higher", margin=0.1,
        baseline_name="the same importance without redundancy", seed=0,
    )  # fmt: skip
