"""Quest does what its paper claims, on tensors and on an induction model with constructed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.parts import page_bounds as parts
from foveate.kv.parts.page_bounds import extremes, page_bounds
from foveate.kv.quest import Quest
from foveate.kv.sink_recent import SinkRecent
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import Reads, feed, model, padded, tokens

DECODING = [20, *[1] * 10]


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_a_full_budget_is_dense(name: str) -> None:
    ids, mask = padded(tokens(2, 30), "left")
    expected = feed(model(name), ids, mask, DECODING)
    with apply(model(name), Quest(6, 5, 0)):
        assert torch.equal(feed(model(name), ids, mask, DECODING), expected)


@torch.no_grad()
def test_a_padded_sequence_whose_pages_all_fit_is_dense() -> None:
    """The policy selects, since the batch is longer than its budget; the short sequence fits in the budget."""
    ids, mask = padded(tokens(2, 30), "left", 12)
    expected = feed(model("llama"), ids, mask, DECODING)
    with apply(model("llama"), Quest(6, 3, 0)):
        got = feed(model("llama"), ids, mask, DECODING)
    torch.testing.assert_close(got[:18], expected[:18], atol=1e-5, rtol=1e-5)
    assert (got[18:] - expected[18:]).abs().max() > 0.01


# -- the mechanism -----------------------------------------------------------------------------------------------------


def bound_by_hand(q: Tensor, keys: Tensor) -> float:
    """Return the sum over channels of the larger product of the query with the page's least and largest key."""
    low, high = keys.min(0).values, keys.max(0).values
    return float(torch.maximum(q * low, q * high).sum())


class Checks(Method):
    """A method that computes each decoding step's output by hand, head by head."""

    def __init__(self, policy: Quest) -> None:
        self.policy, self.checked = policy, 0

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "prefill" or site.layer < self.policy.dense_layers:
            return
        for b in range(site.q.shape[0]):
            for h in range(site.q.shape[1]):
                k, v = site.k[b, h // site.groups], site.v[b, h // site.groups]
                read = self.pages(site, b, h)
                weights = (site.q[b, h] @ k[read].T * site.scale).softmax(-1)
                torch.testing.assert_close(out[b, h], weights @ v[read], atol=1e-5, rtol=1e-4)
        self.checked += 1

    def pages(self, site: Site, b: int, h: int) -> list[int]:
        pages = list(torch.arange(site.seen).split(self.policy.page))
        first = h // site.groups * site.groups
        heads = [h] if self.policy.per == "head" else range(first, first + site.groups)
        k = site.k[b, h // site.groups]
        bounds = torch.tensor([[bound_by_hand(site.q[b, i, 0], k[page]) for page in pages[:-1]] for i in heads])
        scores = bounds.max(0).values if self.policy.reduce == "max" else bounds.mean(0)
        best = scores.argsort(descending=True)[: self.policy.pages - 1].tolist()
        return torch.cat([*[pages[i] for i in sorted(best)], pages[-1]]).tolist()


@pytest.mark.parametrize("per, reduce", [("head", "max"), ("group", "max"), ("group", "mean")])
@pytest.mark.parametrize("pages, page, dense", [(3, 4, 0), (2, 5, 1), (1, 6, 0), (4, 1, 2)])
@torch.no_grad()
def test_the_pages_with_the_largest_bounds_are_read(per: Any, reduce: Any, pages: int, page: int, dense: int) -> None:
    ids, policy = tokens(2, 30), Quest(pages, page, dense, per, reduce)
    checks = Checks(policy)
    with apply(model("llama"), policy, checks):
        feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    assert checks.checked == 10 * (3 - dense)


def test_no_key_of_a_page_exceeds_its_bound() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 4, 8, generator=draw), torch.randn(2, 3, 5, 6, 8, generator=draw)
    products = torch.einsum("bhgd,bhpnd->bhgpn", q, k)
    bounds = page_bounds(q, extremes(k))
    assert (products <= bounds[..., None] + 1e-5).all()
    one = k[..., :1, :]  # a page of one key has no slack
    torch.testing.assert_close(page_bounds(q, extremes(one)), torch.einsum("bhgd,bhpnd->bhgp", q, one))


@torch.no_grad()
def test_a_key_enters_the_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step makes the extremes of at most one page: over a text, as many keys as it has full pages."""
    read: list[int] = []

    def spy(k: Tensor) -> Tensor:
        read.append(k.shape[2] * k.shape[3])
        return extremes(k)

    monkeypatch.setattr(parts, "extremes", spy)
    ids = tokens(1, 60)
    with apply(model("llama"), Quest(2, 4, 2)):
        feed(model("llama"), ids, torch.ones_like(ids), [30, *[1] * 30])
    assert read[0] == 28 and set(read[1:]) == {4}
    assert sum(read) == 60


@torch.no_grad()
def test_a_cropped_cache_forgets_its_pages() -> None:
    """Other tokens after a crop: the pages are theirs."""
    llama, ids, policy = model("llama"), tokens(2, 30), Quest(2, 3, 0)
    other = tokens(2, 12, seed=5)
    with apply(llama, policy):
        cache = DynamicCache()
        feed(llama, ids, torch.ones_like(ids), DECODING, cache)
        cache.crop(20)
        again = [llama(other[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
        fresh = torch.cat([ids[:, :20], other], 1)
        expected = feed(llama, fresh, torch.ones_like(fresh), [20, *[1] * 12]).view(2, 32, -1)
    torch.testing.assert_close(torch.cat(again, 1), expected[:, 20:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_drafts_do_not_change_the_text() -> None:
    llama, ids = model("llama"), tokens(1, 12).repeat(1, 3)
    with apply(llama, Quest(2, 4, 0)):
        plain = llama.generate(ids, max_new_tokens=16, do_sample=False)
        drafted = llama.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)


@torch.no_grad()
def test_it_reads_less_and_keeps_everything() -> None:
    shares = Reads(lambda site: (site.layer, site.selections[0].keys_read() if site.selections else site.k.shape[2]))
    with apply(model("llama"), Quest(3, 4, 1), shares) as run:
        cache = DynamicCache()
        model("llama").generate(tokens(2, 40), max_new_tokens=6, do_sample=False, past_key_values=cache)
    expected = [(n, 8 + (n - 1) % 4 + 1) for n in range(41, 46)]
    assert [x for x in shares.seen if x[0] == 2][1:] == [(2, float(read)) for _, read in expected]
    assert run.stats.read == pytest.approx(sum((1 + 2 * read / n) / 3 for n, read in expected) / 5)
    assert run.stats.kept == 1.0 and cache.layers[0].keys.shape[2] == 45


# -- what the paper claims ---------------------------------------------------------------------------------------------


def found(scores: Tensor, needle: int, pages: int) -> float:
    return float(needle in scores.topk(pages).indices.tolist())


def test_extremes_find_what_means_hide(claim: ClaimFixture) -> None:
    """A key that matches the query stands beside its opposite in a random page; 8 of 128 pages are read."""
    ours, means = 0.0, 0.0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        k, q = torch.randn(1, 1, 128, 16, 64, generator=draw), torch.randn(1, 1, 1, 64, generator=draw)
        at, place = (int(torch.randint(n, (), generator=draw)) for n in (128, 15))
        k[0, 0, at, place], k[0, 0, at, place + 1] = 1.5 * q[0, 0, 0], -1.5 * q[0, 0, 0]
        ours += found(page_bounds(q, extremes(k))[0, 0, 0], at, 8)
        means += found((k[0, 0].mean(1) @ q[0, 0, 0]), at, 8)
    claim(
        "the bound by minimum and maximum finds a matching key beside its opposite in 8 of 128 pages: share found",
        ours=ours / 20, baseline=means / 20, better="higher", margin=0.5, baseline_name="the mean key of each page",
        seed=0,
    )  # fmt: skip


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(8, length=256, answer=8, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    claim(
        "reading 5 of 32 pages of 8 tokens, an induction model recalls eight tokens from far behind",
        ours=score(Quest(5, 8, 0)), baseline=score(SinkRecent(sink=4, recent=36)), better="higher", margin=0.8,
        baseline_name="sinks and a recent window, same size", seed=0,
    )  # fmt: skip


# -- small parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_budget() -> None:
    here = host(model("llama"))
    for budget, length in ((0.25, 400), (0.5, 200), (0.1, 100)):
        policy = Quest.at_budget(budget, here, length)
        with apply(model("llama"), policy) as run:
            model("llama").generate(tokens(1, length), max_new_tokens=2, do_sample=False)
        assert run.stats.read == pytest.approx(budget, abs=1.5 * policy.page / length)
    assert Quest.at_budget(0.0, here, 100).pages == 1
    assert Quest.at_budget(0.25, here, 4096).page == 16


def test_models_of_dense_layers_only_are_refused() -> None:
    refused = pytest.raises(UnsupportedModel, match="dense_layers=3: LlamaForCausalLM has 3 layers")
    with refused, apply(model("llama"), Quest(dense_layers=3)):
        pass
    refused = pytest.raises(UnsupportedModel, match="pages: quest reads 1024 tokens, but no layer of")
    with refused, apply(model("mistral"), Quest(dense_layers=0)):
        pass


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"pages": 0}, "pages=0 must be a whole number, at least 1"),
        ({"page": 0}, "page=0 must be a whole number, at least 1"),
        ({"dense_layers": -1}, "dense_layers=-1 must be a whole number, at least 0"),
        ({"per": "layer"}, "per='layer' must be "),
        ({"reduce": "sum"}, "reduce='sum' must be "),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Quest(**bad)
