"""RocketKV splits its budget as the release does, and both stages do what its paper claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import FoveateError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.parts.hybrid_scores import channel_products, largest_channels, token_weights
from foveate.kv.parts.page_bounds import extremes
from foveate.kv.random_keep import RandomKeep
from foveate.kv.rocketkv import RocketKV
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import Reads, feed, model, padded, tokens

DECODING = [40, *[1] * 10]


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4096, 32768, 131072])
@pytest.mark.parametrize("budget", [256, 512, 1024, 4096])
@pytest.mark.parametrize("width", [64, 128])
def test_the_budget_is_split_as_in_the_release(length: int, budget: int, width: int) -> None:
    """With the whole length as prompt: the release takes the number of new tokens from the prompt's part."""
    ratio = length / budget
    stored = length / ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8)
    left = max(1.0, stored / budget)
    page = min(math.floor(left), math.ceil(math.sqrt(left)))
    policy = RocketKV(ratio=ratio)
    assert policy.share * length == pytest.approx(stored)
    assert policy.page == page
    assert policy.channels(width) == min(width, max(1, round(width * page / left)))


def test_the_exponent_has_a_limit_and_can_be_given() -> None:
    assert RocketKV(ratio=2.0**12).exponent == 0.8
    assert RocketKV(ratio=16, alpha=0.5).share == 0.25
    assert RocketKV(ratio=16, alpha=0.5).page == 2
    assert RocketKV(ratio=16, alpha=1.0).page == 1 and RocketKV(ratio=16, alpha=1.0).channels(8) == 8


@torch.no_grad()
def test_a_ratio_of_one_is_dense() -> None:
    ids, mask = padded(tokens(2, 50), "left")
    expected = feed(model("llama"), ids, mask, DECODING)
    with apply(model("llama"), RocketKV(ratio=1)):
        assert torch.equal(feed(model("llama"), ids, mask, DECODING), expected)


# -- stage 1 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stage_1_keeps_what_the_last_queries_attend_to() -> None:
    """Sums over window and heads, then a max-pool, and the largest; written as the release does it."""
    policy, cache, found = RocketKV(ratio=4.0, alpha=0.5, recent=6, pool=5), DynamicCache(), []

    def expected(site: Site) -> Tensor:
        k = site.k.repeat_interleave(site.groups, 1)
        logits = site.q[:, :, -6:] @ k.mT * site.scale
        future = torch.arange(40) > torch.arange(34, 40)[:, None]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)[..., :-6].sum(2)
        scores = F.max_pool1d(weights.unflatten(1, (2, 2)).sum(2), 5, 1, 2)
        best = scores.sort(descending=True, stable=True).indices[..., : 20 - 6].sort().values
        return torch.cat([best, torch.arange(34, 40).expand(2, 2, 6)], -1)

    with apply(model("llama"), policy, Reads(lambda site: found.append(expected(site)))):
        model("llama")(tokens(2, 40), past_key_values=cache)
    for layer, kept in zip(cache.layers, found, strict=True):
        assert torch.equal(layer.positions.long(), kept)


# -- stage 2 -----------------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that computes each decoding step's output by hand, key/value head by key/value head."""

    def __init__(self, policy: RocketKV, prompt: int) -> None:
        self.policy, self.checked = policy, 0
        self.reads = round(prompt / policy.ratio / 2)

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "prefill":
            return
        for b in range(site.q.shape[0]):
            for h in range(site.k.shape[1]):
                heads = range(h * site.groups, (h + 1) * site.groups)
                q, k, v = site.q[b, list(heads), 0], site.k[b, h], site.v[b, h]
                read = self.tokens(q, k, site.scale)
                weights = (q @ k[read].T * site.scale).softmax(-1)
                torch.testing.assert_close(out[b, list(heads), 0], weights @ v[read], atol=1e-5, rtol=1e-4)
        self.checked += 1

    def tokens(self, q: Tensor, k: Tensor, scale: float) -> list[int]:
        page = self.policy.page
        channels = q.abs().sum(0).argsort(descending=True)[: self.policy.channels(q.shape[1])].tolist()
        logits = torch.zeros(q.shape[0], k.shape[0])
        for start in range(0, k.shape[0], page):
            keys = k[start : start + page]
            for c in channels:
                best = keys[:, c].max() if q[:, c].sum() > 0 else keys[:, c].min()
                logits[:, start : start + page] += (q[:, c] * best)[:, None]
        share = q[:, channels].abs().sum(1, keepdim=True) / q.abs().sum(1, keepdim=True)
        weights = (logits * scale / share.sqrt()).softmax(-1).sum(0)
        order = weights.sort(descending=True, stable=True).indices  # the first token of a page comes first
        return sorted(order[: self.reads].tolist())


@pytest.mark.parametrize("ratio, alpha", [(4.0, 0.5), (6.0, 0.0), (5.0, 0.1), (3.0, 0.9), (8.0, None)])
@torch.no_grad()
def test_the_tokens_with_the_largest_estimates_are_read(ratio: float, alpha: float | None) -> None:
    ids, policy = tokens(2, 50), RocketKV(ratio=ratio, alpha=alpha, recent=4, pool=3)
    checks = Checks(policy, 40)
    with apply(model("llama"), policy, checks):
        feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    assert checks.checked == 30


@torch.no_grad()
def test_it_stores_one_share_and_reads_another() -> None:
    read = Reads(lambda site: site.selections[0].keys_read() if site.selections else None)
    with apply(model("llama"), RocketKV(ratio=8.0, recent=4, pool=3), read) as run:
        model("llama").generate(tokens(2, 80), max_new_tokens=6, do_sample=False)
    kept = round(80 * 8.0 ** -(0.2 + 0.06 * 3))
    assert read.seen[3:] == [5.0] * 15
    assert run.stats.kept == pytest.approx((kept + 5) / 85)
    assert run.stats.read == pytest.approx(sum(5 / n for n in range(81, 86)) / 5)


@pytest.mark.parametrize("ratio, alpha", [(6.0, 0.0), (8.0, None)])
@torch.no_grad()
def test_drafts_do_not_change_the_text(ratio: float, alpha: float | None) -> None:
    llama, ids = model("llama"), tokens(1, 12).repeat(1, 4)
    with apply(llama, RocketKV(ratio=ratio, alpha=alpha, recent=4, pool=3)):
        plain = llama.generate(ids, max_new_tokens=16, do_sample=False)
        drafted = llama.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)


# -- what the paper claims ---------------------------------------------------------------------------------------------


def top_found(draw: torch.Generator, page: int, channels: int, count: int = 32) -> float:
    """Return the share of the `count` largest keys that an estimate finds; neighbouring keys are alike."""
    size = torch.rand(64, generator=draw) * 4
    noise = torch.randn(1, 64, 1024, generator=draw)
    k = F.avg_pool1d(noise, 17, 1, 8).mT[None] * 17**0.5 * size
    q = torch.randn(1, 1, 1, 64, generator=draw) * size
    chosen, held = largest_channels(q, channels)
    table = k if page == 1 else extremes(k.unflatten(2, (-1, page)))
    logits = channel_products(q, chosen, table) / (8 * held.sqrt())
    weights = token_weights(logits, torch.full((1, 1, 1024 // page), page)).repeat_interleave(page, 2)
    exact = (q @ k.mT)[0, 0, 0].topk(count).indices
    return torch.isin(weights[0, 0].topk(count).indices, exact).double().mean().item()


def test_pages_and_channels_together_estimate_best(claim: ClaimFixture) -> None:
    """A ratio of 16 is left: the split of the release, pages alone, and channels alone read equally many numbers."""
    policy = RocketKV(ratio=16.0, alpha=0.0)
    splits = ((policy.page, policy.channels(64)), (16, 64), (1, 4))
    assert splits[0] == (4, 16)
    hybrid, pages, channels = (
        sum(top_found(torch.Generator().manual_seed(seed), *split) for seed in range(20)) / 20 for split in splits
    )
    claim(
        "at equal traffic, pages and channels together find more of the 32 largest of 1,024 keys: share found",
        ours=hybrid, baseline=max(pages, channels), better="higher", margin=0.1,
        baseline_name="the better of pages alone and channels alone", seed=0,
    )  # fmt: skip


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(8, length=256, answer=8, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    policy = RocketKV(ratio=30.0, recent=8, pool=17)
    claim(
        "storing 19 % of 256 tokens and reading 4 at a step, an induction model recalls eight tokens from far away",
        ours=score(policy), baseline=score(RandomKeep(share=policy.share)), better="higher", margin=0.5,
        baseline_name="random tokens of the same number, all read", seed=0,
    )  # fmt: skip


# -- small parts -------------------------------------------------------------------------------------------------------


def test_a_page_counts_with_all_its_tokens() -> None:
    logits = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    sizes = torch.tensor([[[3, 1, 0]]])
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0]).softmax(-1)
    got = token_weights(logits, sizes)[0, 0]
    torch.testing.assert_close(got[:2], expected[2:])
    assert got[2] == float("-inf")


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.25, 0.5, 0.9])
def test_the_budget_covers_the_pages(budget: float) -> None:
    policy = RocketKV.at_budget(budget, host(model("llama")), 4096)
    assert 0.7 * budget <= policy.share * (1 + policy.tables) <= budget
    assert RocketKV.at_budget(1.0, host(model("llama")), 4096).ratio == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"ratio": 0.5}, "ratio=0.5 must be at least 1"),
        ({"alpha": 1.5}, "alpha=1.5 must be "),
        ({"recent": 0}, "recent=0 must be a whole number, at least 1"),
        ({"pool": 4}, "pool=4 must be odd"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        RocketKV(**bad)


@torch.no_grad()
@pytest.mark.parametrize(("length", "alpha"), [(4, None), (5, None), (64, 0.02)])
def test_pages_follow_positions_where_a_new_token_takes_a_free_slot(length: int, alpha: float | None) -> None:
    """Stage 1 drops a single token, whose slot the next token takes: slots are then in another order than positions."""
    policy, orders = RocketKV(ratio=3.0, alpha=alpha, recent=2, pool=3), []
    ids, new = tokens(2, length + 6), tokens(2, 6, 1)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0

    def logits(rows: slice, first: int, *more: Method) -> Tensor:
        """Logits of each new token, after the prompt from its token `first` on."""
        everything = torch.cat([ids, new], 1)[rows, first:]
        whole = torch.cat([mask, torch.ones_like(new)], 1)[rows, first:]
        places = (whole.cumsum(1) - 1).clamp_min(0)  # estimates depend on them: a part of the channels is no rotation
        cache, out, end = DynamicCache(), [], ids.shape[1] - first
        with apply(model("llama"), policy, *more):
            for start, stop in [(0, end), *((at, at + 1) for at in range(end, whole.shape[1]))]:
                step = model("llama")(
                    everything[:, start:stop], attention_mask=whole[:, :stop], position_ids=places[:, start:stop],
                    past_key_values=cache,
                )  # fmt: skip
                out.append(step.logits[:, -1:])
        return torch.cat(out, 1)

    watch = Reads(lambda site: orders.append(bool((site.positions.diff(dim=-1) < 0).any())))
    alone = logits(slice(0, 1), 6, watch)
    assert any(orders)
    torch.testing.assert_close(logits(slice(0, 2), 0)[:1], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_heads_of_different_lengths_are_refused() -> None:
    uneven = RandomKeep(share=0.5, heads="adaptive")
    with apply(model("llama"), uneven, RocketKV(ratio=3.0)):
        read = model("llama")(tokens(1, 40))
        with pytest.raises(UnsupportedModel, match='heads="equal"'):
            model("llama")(tokens(1, 1), past_key_values=read.past_key_values)
