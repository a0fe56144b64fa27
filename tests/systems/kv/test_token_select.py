"""TokenSelect does what its paper claims, on tensors and on an induction model with constructed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv import token_select
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.token_select import TokenSelect, soft_vote
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import DECODERS, feed, model, padded, tokens

Patch = pytest.MonkeyPatch
DECODING, CHUNKS = [20, *[1] * 10], [7, 9, 5, 8, 1]


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "mistral"])
@pytest.mark.parametrize("pieces", [DECODING, CHUNKS], ids=["decoding", "chunks"])
@torch.no_grad()
def test_a_full_budget_is_dense(name: str, pieces: list[int]) -> None:
    ids, mask = padded(tokens(2, 30), "left")
    expected = feed(model(name), ids, mask, pieces)
    for policy in (TokenSelect(2, 4, 24), TokenSelect(2, 4, 24, chunk=4), TokenSelect(0, 0, 30, sim_threshold=-1)):
        with apply(model(name), policy):
            torch.testing.assert_close(feed(model(name), ids, mask, pieces), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_sequence_whose_tokens_all_fit_is_dense() -> None:
    """The policy selects, since the batch is longer than its budget; the short sequence fits in the budget."""
    ids, mask = padded(tokens(2, 30), "left", 12)
    for pieces in (DECODING, CHUNKS):
        expected = feed(model("llama"), ids, mask, pieces)
        with apply(model("llama"), TokenSelect(2, 4, 13, sim_threshold=1.01, chunk=6)):
            got = feed(model("llama"), ids, mask, pieces)
        torch.testing.assert_close(got[:18], expected[:18], atol=1e-5, rtol=1e-5)
        assert (got[18:] - expected[18:]).abs().max() > 0.01


# -- the mechanism -----------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that computes a site's output under the policy by hand, pair by pair."""

    def __init__(self, policy: TokenSelect) -> None:
        self.policy, self.checked = policy, 0

    def read(self, site: Site, out: Tensor) -> None:
        nq, total = site.q.shape[2], site.seen
        for b in range(site.q.shape[0]):
            for start in range(0, nq, self.policy.chunk):
                rows = range(start, min(start + self.policy.chunk, nq))
                chosen = self.working_set(site, b, rows)
                for i in rows:
                    keys = torch.tensor([j for j in chosen if j <= total - nq + i])
                    for h in range(site.q.shape[1]):
                        k, v = site.k[b, h // site.groups], site.v[b, h // site.groups]
                        weights = (site.q[b, h, i] @ k[keys].T * site.scale).softmax(-1)
                        torch.testing.assert_close(out[b, h, i], weights @ v[keys], atol=1e-5, rtol=1e-4)
        self.checked += 1

    def working_set(self, site: Site, b: int, rows: range) -> list[int]:
        policy, past = self.policy, site.seen - site.q.shape[2] + rows[0]
        own = [past + i for i in range(len(rows))]
        if past <= policy.sink + policy.local + policy.k:
            return [*range(past), *own]
        candidates = list(range(policy.sink, past - policy.local))
        votes = torch.zeros(len(candidates))
        for h in range(site.q.shape[1]):
            query = site.q[b, h, rows[0] : rows[-1] + 1].mean(0)
            votes += (query @ site.k[b, h // site.groups, candidates].T * site.scale).softmax(-1)
        best = sorted(candidates, key=lambda j: -float(votes[candidates.index(j)]))[: policy.k]
        return [*range(policy.sink), *sorted(best), *range(past - policy.local, past), *own]


@pytest.mark.parametrize("pieces", [DECODING, CHUNKS, [30]], ids=["decoding", "chunks", "one call"])
@torch.no_grad()
def test_the_chosen_tokens_are_read(pieces: list[int]) -> None:
    llama, ids, policy = model("llama"), tokens(2, 30), TokenSelect(2, 3, 4, sim_threshold=1.01, chunk=6)
    checks = Checks(policy)
    with apply(llama, policy, checks):
        feed(llama, ids, torch.ones_like(ids), pieces)
    assert checks.checked == 3 * len(pieces)


@torch.no_grad()
def test_a_prompt_in_one_call_is_cut_into_the_same_chunks() -> None:
    llama, ids = model("llama"), tokens(2, 30)
    mask = torch.ones_like(ids)
    with apply(llama, TokenSelect(2, 3, 4, sim_threshold=1.01, chunk=6)):
        torch.testing.assert_close(feed(llama, ids, mask, [30]), feed(llama, ids, mask, [6] * 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold, votes", [(1.01, 10), (-1.0, 1)])
@torch.no_grad()
def test_the_threshold_decides_when_it_votes(threshold: float, votes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 1 a layer votes at every step; at -1 once per sequence."""
    count: list[int] = []
    monkeypatch.setattr(token_select, "soft_vote", lambda *given: count.append(1) or soft_vote(*given))
    llama, ids = model("llama"), tokens(2, 30)
    with apply(llama, TokenSelect(2, 3, 4, threshold)):
        for _ in range(2):
            count.clear()
            feed(llama, ids, torch.ones_like(ids), DECODING)
            assert len(count) == 3 * votes


@torch.no_grad()
def test_a_cropped_cache_votes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[int] = []
    monkeypatch.setattr(token_select, "soft_vote", lambda *given: count.append(1) or soft_vote(*given))
    llama, ids, cache = model("llama"), tokens(2, 30), DynamicCache()
    with apply(llama, TokenSelect(2, 3, 4, -1.0)):
        feed(llama, ids, torch.ones_like(ids), DECODING, cache)
        cache.crop(-8)
        count.clear()
        llama(ids[:, :1], past_key_values=cache)
        assert len(count) == 3


@torch.no_grad()
def test_sequences_of_a_batch_decide_each_for_itself() -> None:
    llama, ids = model("llama"), tokens(3, 30)
    for threshold in (0.5, 0.8, 0.9):
        with apply(llama, TokenSelect(2, 3, 4, threshold)):
            together = feed(llama, ids, torch.ones_like(ids), DECODING).view(3, 30, -1)
            separate = [feed(llama, row[None], torch.ones_like(row[None]), DECODING) for row in ids]
        torch.testing.assert_close(together, torch.stack(separate), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_reads_less_and_keeps_everything() -> None:
    with apply(model("llama"), TokenSelect(2, 4, 4)) as run:
        cache = DynamicCache()
        model("llama").generate(tokens(2, 40), max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert run.stats.read == pytest.approx(sum(11 / n for n in range(41, 46)) / 5)
    assert run.stats.kept == 1.0
    assert cache.get_seq_length() == 45 and cache.layers[0].keys.shape[2] == 45


# -- what the paper claims ---------------------------------------------------------------------------------------------


def as_tensors(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys, one pair of heads per row, whose dot products are these logits."""
    return torch.ones(logits.shape[0], 1), logits[..., None]


def found(scores: Tensor, needles: Tensor, budget: int) -> float:
    return torch.isin(scores.topk(budget).indices, needles).sum().item() / needles.numel()


def test_one_loud_head_does_not_drown_the_others(claim: ClaimFixture) -> None:
    soft, hard = [], []
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(8, 1024, generator=draw)
        needles = torch.randperm(1024, generator=draw)[:16]
        logits[1:, needles] += 4.0
        logits[0] = 30.0 * torch.randn(1024, generator=draw)
        soft.append(found(soft_vote(*as_tensors(logits), scale=1.0), needles, 64))
        hard.append(found(logits.sum(0), needles, 64))
    claim(
        "a vote of softmax weights finds 16 needles that seven quiet heads agree on (recall in 64 of 1,024)",
        ours=sum(soft) / 5,
        baseline=sum(hard) / 5,
        better="higher",
        margin=0.4,
        baseline_name="sum of the heads' logits",
        seed=0,
    )
    assert sum(soft) / 5 >= 0.9


def test_tokens_are_worth_more_than_blocks(claim: ClaimFixture) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1024, generator=draw)
    logits[:, torch.randperm(1024, generator=draw)[:48]] += 5.0
    weights, votes = logits.softmax(-1), soft_vote(*as_tensors(logits), scale=1.0)
    blocks = votes.view(-1, 16).sum(-1).topk(4).indices[:, None] * 16 + torch.arange(16)
    claim(
        "64 single tokens out of 1,024 recover more attention mass than four blocks of 16 where needles are scattered",
        ours=float(weights[:, votes.topk(64).indices].sum(-1).mean()),
        baseline=float(weights[:, blocks.flatten()].sum(-1).mean()),
        better="higher",
        margin=0.1,
        baseline_name="blocks of 16 with the largest votes",
        seed=0,
    )


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(8, length=256, answer=8, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    claim(
        "reading 33 of 256 tokens, an induction model recalls eight tokens from far behind the window",
        ours=score(TokenSelect(sink=4, local=12, k=16, sim_threshold=1.01)),
        baseline=score(SinkRecent(sink=4, recent=29)),
        better="higher",
        margin=0.8,
        baseline_name="sinks and a recent window, same size",
        seed=0,
    )


# -- small parts -------------------------------------------------------------------------------------------------------


def test_pooling_chooses_neighbours() -> None:
    logits = torch.zeros(2, 9)
    logits[:, 4] = 5.0
    plain, pooled = (soft_vote(*as_tensors(logits), pool=width, scale=1.0) for width in (0, 3))
    assert pooled.topk(3).indices.sort().values.tolist() == [3, 4, 5]
    torch.testing.assert_close(pooled[3:6], plain[4].expand(3))
    assert torch.equal(soft_vote(*as_tensors(logits), pool=1, scale=1.0), plain)


def test_grouped_heads_vote_with_their_own_keys() -> None:
    q, k = torch.randn(3, 4, 5), torch.randn(3, 2, 7, 5)
    wide = k.repeat_interleave(2, 1)
    torch.testing.assert_close(soft_vote(q, k), (q[:, :, None] @ wide.mT / 5**0.5)[:, :, 0].softmax(-1).sum(1))
    torch.testing.assert_close(soft_vote(q[0], k[0]), soft_vote(q, k)[0])
    torch.testing.assert_close(soft_vote(q, k).sum(-1), torch.full((3,), 4.0))


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_votes_have_the_scale_of_attention_or_none_as_in_the_release(scaled: bool, monkeypatch: Patch) -> None:
    scales, vote = [], soft_vote

    def spy(q: Tensor, k: Tensor, pool: int, scale: float, candidates: Tensor | None) -> Tensor:
        scales.append((scale, q.shape[-1]))
        return vote(q, k, pool, scale, candidates)

    monkeypatch.setattr(token_select, "soft_vote", spy)
    with apply(model("llama"), TokenSelect(1, 2, 5, sim_threshold=1.01, scale_votes=scaled)):
        ids = tokens(1, 30)
        feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    assert scales
    assert all(scale == (width**-0.5 if scaled else 1.0) for scale, width in scales)


@torch.no_grad()
def test_budget() -> None:
    here = host(model("llama"))
    for budget, length in ((0.25, 400), (0.5, 100), (0.1, 60)):
        with apply(model("llama"), TokenSelect.at_budget(budget, here, length)) as run:
            model("llama").generate(tokens(1, length), max_new_tokens=2, do_sample=False)
        assert run.stats.read == pytest.approx(budget, abs=0.02)
    assert TokenSelect.at_budget(0.0, here, 100).k == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"k": 0}, "k=0 must be a whole number, at least 1"),
        ({"sink": -1}, "sink=-1 must be a whole number, at least 0"),
        ({"pool": 4}, "pool=4 must be odd"),
        ({"chunk": 0}, "chunk=0 must be a whole number, at least 1"),
        ({"scale_votes": 1}, "scale_votes=1 must be True or False"),
        ({"sim_threshold": -2}, "sim_threshold=-2 must be at least -1"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        TokenSelect(**bad)
