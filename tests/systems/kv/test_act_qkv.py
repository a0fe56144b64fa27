"""ActQKV does what its paper claims, on tensors and on an induction model with constructed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv import act_qkv
from foveate.kv.act_qkv import ActQKV
from foveate.kv.parts.layer_budgets import layer_budgets
from foveate.kv.parts.probe_query import activation_bias, probe_query
from foveate.kv.sink_recent import SinkRecent
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import DECODERS, feed, model, padded, tokens

DECODING, CHUNKS = [24, *[1] * 16], [11, 9, 8, 7, 5]
SMALL: dict[str, Any] = dict(chunk=6, block=4, budget=8, sink=2, local=3, representatives=2)


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "mistral"])
@pytest.mark.parametrize("pieces", [DECODING, CHUNKS], ids=["decoding", "chunks"])
@torch.no_grad()
def test_a_full_budget_is_dense(name: str, pieces: list[int]) -> None:
    ids, mask = padded(tokens(2, 40), "left")
    expected = feed(model(name), ids, mask, pieces)
    for policy in (ActQKV(sink=2, local=6, block=8, budget=32), ActQKV(4, 4, 36, 1, 3, cutoff="none")):
        with apply(model(name), policy):
            torch.testing.assert_close(feed(model(name), ids, mask, pieces), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_sequence_whose_tokens_all_fit_is_dense() -> None:
    ids, mask = padded(tokens(2, 40), "left", 24)
    for pieces in (DECODING, CHUNKS):
        expected = feed(model("llama"), ids, mask, pieces)
        with apply(model("llama"), ActQKV(**{**SMALL, "budget": 12})):
            got = feed(model("llama"), ids, mask, pieces)
        torch.testing.assert_close(got[:16], expected[:16], atol=1e-5, rtol=1e-5)
        assert (got[16:] - expected[16:]).abs().max() > 0.01


def test_equally_far_queries_make_the_mean_query() -> None:
    draw = torch.Generator().manual_seed(0)
    center, step = torch.randn(2, 3, 1, 8, generator=draw), torch.randn(2, 3, 4, 8, generator=draw).sign()
    q = torch.cat([center + 0.3 * step, center - 0.3 * step], 2)  # every channel deviates by as much
    torch.testing.assert_close(activation_bias(q), torch.ones(2, 8))
    torch.testing.assert_close(probe_query(q), probe_query(q, "mean"))
    torch.testing.assert_close(probe_query(q, "mean"), center[:, :, 0])
    assert torch.equal(probe_query(q, "last"), q[:, :, -1])


# -- the mechanism -----------------------------------------------------------------------------------------------------


def test_the_activation_bias_by_hand() -> None:
    q = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    for item in range(2):
        for token in range(7):
            parts = []
            for head in range(3):
                for channel in range(5):
                    values = q[item, head, :, channel]
                    parts.append((values[token] - values.mean()) ** 2 / values.var(correction=0))
            torch.testing.assert_close(activation_bias(q)[item, token], torch.stack(parts).mean())
    bias = activation_bias(q)
    torch.testing.assert_close(bias.mean(-1), torch.ones(2))
    expected = torch.einsum("bn,bhnd->bhd", bias / 7, q)
    torch.testing.assert_close(probe_query(q), expected)


def test_shift_and_scale_of_the_queries() -> None:
    draw = torch.Generator().manual_seed(0)
    q, shift = torch.randn(2, 3, 9, 5, generator=draw), torch.randn(1, 3, 1, 5, generator=draw)
    torch.testing.assert_close(activation_bias(q + shift), activation_bias(q), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(activation_bias(3.0 * q), activation_bias(q), atol=1e-5, rtol=1e-5)
    same = torch.ones(1, 2, 4, 3)
    assert torch.equal(activation_bias(same), torch.zeros(1, 4)) and torch.equal(probe_query(same), same[:, :, 0])


class Checks(Method):
    """A method that computes a site's output under the policy by hand, pair by pair."""

    def __init__(self, policy: ActQKV) -> None:
        self.policy, self.checked, self.entropy = policy, 0, torch.ones(2, 3)
        self.budgets: list[list[int]] = []

    def read(self, site: Site, out: Tensor) -> None:
        n, total = site.q.shape[2], site.seen
        if site.layer == 0:
            self.budgets = self.shared() if n == 1 else [[self.policy.budget // self.policy.block] * 3] * 2
        for b in range(site.q.shape[0]):
            for start in range(0, n, self.policy.chunk):
                rows = range(start, min(start + self.policy.chunk, n))
                chosen = self.working_set(site, b, rows)
                for i in rows:
                    keys = torch.tensor([j for j in chosen if j <= total - n + i])
                    for h in range(site.q.shape[1]):
                        k, v = site.k[b, h // site.groups], site.v[b, h // site.groups]
                        weights = (site.q[b, h, i] @ k[keys].T * site.scale).softmax(-1)
                        torch.testing.assert_close(out[b, h, i], weights @ v[keys], atol=1e-5, rtol=1e-4)
        self.checked += 1

    def shared(self) -> list[list[int]]:
        return layer_budgets(self.entropy, self.policy.budget // self.policy.block, self.policy.spread).tolist()

    def working_set(self, site: Site, b: int, rows: range) -> list[int]:
        policy, past = self.policy, site.seen - site.q.shape[2] + rows[0]
        own = [past + i for i in range(len(rows))]
        if past <= policy.sink + policy.local + policy.budget:
            return [*range(past), *own]
        blocks = (past - policy.sink - policy.local) // policy.block
        q, part = site.q[b, :, rows[0] : rows[-1] + 1], policy.block // policy.representatives
        weights = torch.ones(1)
        if len(rows) > 1:
            deviation = (q - q.mean(1, keepdim=True)) ** 2 / q.var(1, correction=0, keepdim=True)
            weights = deviation.mean((0, 2)) / deviation.mean((0, 2)).sum()
        probe, scores = (weights[:, None] * q).sum(1), []
        for block in range(blocks):
            starts = [policy.sink + block * policy.block + r * part for r in range(policy.representatives)]
            scores.append(max(self.score(site, b, probe, range(at, at + part)) for at in starts))
        weighed = torch.tensor(scores).softmax(-1)
        if blocks > policy.budget // policy.block:
            self.entropy[b, site.layer] = -torch.xlogy(weighed, weighed).sum()
        best = sorted(range(blocks), key=lambda j: -scores[j])[: self.budgets[b][site.layer]]
        inside = [policy.sink + j * policy.block + i for j in sorted(best) for i in range(policy.block)]
        return [*range(policy.sink), *inside, *range(policy.sink + blocks * policy.block, past), *own]

    @staticmethod
    def score(site: Site, b: int, probe: Tensor, places: range) -> float:
        heads = [probe[h] @ site.k[b, h // site.groups, list(places)].mean(0) for h in range(site.q.shape[1])]
        return float(sum(heads)) * site.scale / site.q.shape[1]


@pytest.mark.parametrize("pieces", [DECODING, CHUNKS, [40]], ids=["decoding", "chunks", "one call"])
@torch.no_grad()
def test_the_chosen_blocks_are_read(pieces: list[int]) -> None:
    llama, ids = tiny("llama", num_hidden_layers=3), tokens(2, 40) % 48 + 2
    for number, layer in enumerate(llama.model.layers):
        layer.self_attn.q_proj.weight.data.mul_(10.0 ** (number + 1))  # the last layer's scores are the most peaked
    policy = ActQKV(**{**SMALL, "block": 2, "budget": 10})
    checks = Checks(policy)
    with apply(llama, policy, checks):
        feed(llama, ids, torch.ones_like(ids), pieces)
    assert checks.checked == 3 * len(pieces)
    if pieces is DECODING:
        assert all(row[0] > row[2] for row in checks.shared())


@torch.no_grad()
def test_a_step_reads_no_more_than_its_new_mean_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, a step gathers the keys of one mean; the means are those of a fresh count."""
    from foveate.kv.parts import block_means

    sizes: list[int] = []
    gather = block_means._keys
    monkeypatch.setattr(block_means, "_keys", lambda site, own: sizes.append(own.shape[1]) or gather(site, own))
    llama, ids, cache = model("llama"), tokens(2, 40), DynamicCache()
    with apply(llama, ActQKV(**SMALL, cutoff="none")):
        feed(llama, ids, torch.ones_like(ids), DECODING, cache)
        assert set(sizes[-9:]) == {2} and max(sizes) > 20
        sizes.clear()
        cache.crop(-8)  # the means of what was removed are not used again
        again = llama(ids[:, :1], past_key_values=cache).logits
        assert max(sizes) > 20
    plain = DynamicCache()
    with apply(llama, ActQKV(**SMALL, cutoff="none")):
        feed(llama, ids[:, :32], torch.ones_like(ids[:, :32]), [24, *[1] * 8], plain)
        torch.testing.assert_close(llama(ids[:, :1], past_key_values=plain).logits, again)


def test_layers_share_one_budget() -> None:
    draw = torch.Generator().manual_seed(0)
    for spread in (1.0, 1.5, 2.0, 8.0):
        for blocks in (1, 3, 16):
            share = torch.rand(5, 7, generator=draw) ** 3
            got = layer_budgets(share, blocks, spread)
            assert got.sum(-1).tolist() == [7 * blocks] * 5
            assert int(got.min()) >= max(1, int(blocks / spread)) and int(got.max()) <= -(-blocks * spread // 1)
            order = share.argsort(-1)
            assert bool((got.gather(1, order).diff() >= 0).all())
    assert layer_budgets(torch.tensor([[1.0, 2.0, 3.0]]), 10, 4.0).tolist() == [[5, 10, 15]]
    assert layer_budgets(torch.zeros(1, 3), 5).tolist() == [[5, 5, 5]]


def test_spread_scores_get_more_than_peaked_ones() -> None:
    scores = torch.stack(
        [torch.zeros(32), 8.0 * torch.nn.functional.one_hot(torch.tensor(3), 32), torch.arange(32) / 8]
    )
    weights = scores.softmax(-1)
    uniform, peaked, between = layer_budgets(-(weights * weights.log()).sum(-1)[None], 8, 4.0)[0].tolist()
    assert uniform > between > peaked


@torch.no_grad()
def test_the_cutoff_follows_or_opposes_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, ids, seen = model("llama"), tokens(1, 60), {}

    def spy(share: Tensor, blocks: int, spread: float) -> Tensor:
        seen.setdefault(cutoff, []).append(share)
        return layer_budgets(share, blocks, spread)

    monkeypatch.setattr(act_qkv, "layer_budgets", spy)
    for cutoff in ("entropy", "inverse_entropy", "none"):
        with apply(llama, ActQKV(**SMALL, cutoff=cutoff)):
            feed(llama, ids, torch.ones_like(ids), [58, 1, 1])
    assert len(seen["entropy"]) == 2 and "none" not in seen
    torch.testing.assert_close(seen["inverse_entropy"][0], 1 / seen["entropy"][0])
    assert not torch.equal(*seen["entropy"])  # measured at each step


@torch.no_grad()
def test_it_reads_less_and_keeps_everything() -> None:
    with apply(model("llama"), ActQKV(block=4, budget=8, sink=2, local=4, representatives=1, cutoff="none")) as run:
        cache = DynamicCache()
        model("llama").generate(tokens(2, 40), max_new_tokens=6, do_sample=False, past_key_values=cache)
    read = [(2 + 8 + 4 + (past - 6) % 4 + 1) / (past + 1) for past in range(40, 45)]
    assert run.stats.read == pytest.approx(sum(read) / 5)
    assert run.stats.kept == 1.0 and cache.layers[0].keys.shape[2] == 45


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_the_probe_is_not_diluted_by_filler(claim: ClaimFixture) -> None:
    """Of 64 queries, 4 point at one of 32 blocks; the others are all but alike, and point at another."""
    draw = torch.Generator().manual_seed(0)
    hits = {"activation": 0, "mean": 0}
    for _ in range(200):
        blocks = torch.randn(32, 16, generator=draw)
        blocks /= blocks.norm(dim=-1, keepdim=True)
        needle, other = torch.randperm(32, generator=draw)[:2].tolist()
        q = blocks[other] + 0.1 * torch.randn(64, 16, generator=draw)
        q[torch.randperm(64, generator=draw)[:4]] = 4.0 * blocks[needle] + 0.1 * torch.randn(4, 16, generator=draw)
        for weighting in hits:
            probe = probe_query(q[None, None], weighting)[0, 0]  # type: ignore[arg-type]
            hits[weighting] += int((blocks @ probe).argmax()) == needle
    claim(
        "a probe weighted by activation bias retrieves the block that 4 of 64 queries point at: hits in 200 draws",
        ours=hits["activation"] / 200, baseline=hits["mean"] / 200, better="higher", margin=0.2,
        baseline_name="the mean query", seed=0,
    )  # fmt: skip


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm(heads=1, kv_heads=1)  # scores are summed over heads, so that the one that matches is alone
    ids, answers = recall(8, length=256, answer=8, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    claim(
        "reading at most 40 of 256 tokens, an induction model recalls eight tokens from far behind the window",
        ours=score(ActQKV(block=4, budget=16, sink=4, local=16, representatives=1)),
        baseline=score(SinkRecent(sink=4, recent=36)),
        better="higher",
        margin=0.8,
        baseline_name="sinks and a recent window, same size",
        seed=0,
    )


# -- small parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_budget() -> None:
    here = host(model("llama"))
    for budget, length in ((0.25, 240), (0.5, 100), (0.1, 120)):
        policy = ActQKV.at_budget(budget, here, length)
        with apply(model("llama"), policy) as run:  # a block is filled once
            model("llama").generate(tokens(1, length), max_new_tokens=policy.block + 1, do_sample=False)
        assert run.stats.read == pytest.approx(budget * length / (length + policy.block / 2), abs=0.03)
    assert ActQKV.at_budget(0.0, here, 100).budget == 1
    large = ActQKV.at_budget(0.25, here, 12800)
    assert (large.sink, large.local, large.block, large.representatives) == (128, 1024, 120, 4)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"chunk": 0}, "chunk=0 must be a whole number, at least 1"),
        ({"sink": -1}, "sink=-1 must be a whole number, at least 0"),
        ({"budget": 100}, "budget=100 must be a multiple of block=128"),
        ({"block": 10, "budget": 20}, "block=10 must be a multiple of representatives=4"),
        ({"weighting": "max"}, "weighting='max' must be one of"),
        ({"cutoff": "variance"}, "cutoff='variance' must be one of"),
        ({"spread": 0.5}, "spread=0.5 must be at least 1"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ActQKV(**bad)
