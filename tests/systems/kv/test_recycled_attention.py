"""Recycled Attention does what its paper claims, on models with constructed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.parts.last_query import top_keys
from foveate.kv.recycled_attention import Dynamic, RecycledAttention, attention_overlap
from foveate.kv.sink_recent import SinkRecent
from tests.conftest import ClaimFixture
from tests.support.constructed import BOS, HEAD, KEYS, SLOW, TOKEN, VALUES, accuracy, induction_lm, recall
from tests.support.host_models import DECODERS, Reads, feed, model, padded, tokens

DECODING = [20, *[1] * 10]


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "mistral"])
@torch.no_grad()
def test_full_steps_and_a_full_budget_are_dense(name: str) -> None:
    ids, mask = padded(tokens(2, 30), "left")
    expected = feed(model(name), ids, mask, DECODING)
    for policy in (RecycledAttention(3, stride=1), RecycledAttention(30, stride=5), RecycledAttention(20, stride=50)):
        with apply(model(name), policy):
            torch.testing.assert_close(feed(model(name), ids, mask, DECODING), expected, atol=1e-5, rtol=1e-5)


# -- the mechanism -----------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that computes the output of each step by hand, and records the steps that read everything."""

    def __init__(self, policy: RecycledAttention) -> None:
        self.policy, self.full = policy, []
        self.sets: dict[int, list[list[list[int]]]] = {}
        self.since = 0

    def read(self, site: Site, out: Tensor) -> None:
        step, policy = site.seen - 20, self.policy
        k, v = (x.repeat_interleave(site.groups, 1) for x in (site.k, site.v))
        logits = (site.q[:, :, -1:] @ k.mT)[:, :, 0] * site.scale
        full = step == 0 or (step >= policy.phase and (step - policy.phase) % policy.stride == 0)
        if not full:
            new = list(range(self.since, site.seen))
            kept = policy.k if policy.grow else max(0, policy.k - len(new))
            new = new if policy.grow else new[-policy.k :]
            for b, heads in enumerate(self.sets[site.layer]):
                for h in range(site.q.shape[1]):
                    seen = [*heads[h // site.groups][:kept], *new]
                    hidden = torch.tensor([j not in seen for j in range(site.seen)])
                    logits[b, h, hidden] = float("-inf")
        weights = logits.softmax(-1)
        torch.testing.assert_close(out[:, :, -1], (weights[:, :, None] @ v)[:, :, 0], atol=1e-5, rtol=1e-4)
        if full:
            groups = weights.unflatten(1, (-1, site.groups))
            scores = groups.amax(2) if policy.group_reduce == "max" else groups.mean(2)
            self.sets[site.layer] = scores.argsort(descending=True)[..., : policy.k].tolist()
            self.since = site.seen
            if site.layer == 0:
                self.full.append(step)


@pytest.mark.parametrize(
    "options, full",
    [
        ({"stride": 4}, [0, 4, 8]),
        ({"stride": 4, "phase": 1}, [0, 1, 5, 9]),
        ({"stride": 3, "phase": 6}, [0, 6, 9]),
        ({"stride": 4, "group_reduce": "mean"}, [0, 4, 8]),
        ({"stride": 4, "grow": False}, [0, 4, 8]),
        ({"stride": 9, "grow": False}, [0, 9]),
        ({"stride": 50}, [0]),
    ],
)
@torch.no_grad()
def test_full_and_sparse_steps_follow_the_schedule(options: dict[str, Any], full: list[int]) -> None:
    ids, policy, cache = tokens(2, 30), RecycledAttention(6, **options), DynamicCache()
    checks = Checks(policy)
    with apply(model("llama"), policy, checks) as run:
        for _ in range(2):  # a second sequence starts a new schedule
            checks.full.clear()
            cache = DynamicCache()
            feed(model("llama"), ids, torch.ones_like(ids), DECODING, cache)
            assert checks.full == full
    assert run.stats.kept == 1.0
    assert cache.get_seq_length() == 30 and cache.layers[0].keys.shape[2] == 30
    since = [step - max(f for f in full if f <= step) for step in range(1, 11)]
    size = [6 if options.get("grow") is False else 6 + new for new in since]
    shares = [1.0 if new == 0 else n / (20 + step) for step, new, n in zip(range(1, 11), since, size, strict=True)]
    assert run.stats.read == pytest.approx(sum(shares) / 10)


@torch.no_grad()
def test_a_cropped_cache_is_read_whole_once() -> None:
    """The chosen keys may have been cropped."""
    llama, ids = model("llama"), tokens(2, 31)
    expected = llama(torch.cat([ids[:, :15], ids[:, 30:]], 1)).logits[:, -1]
    with apply(llama, RecycledAttention(3, stride=50)) as run:
        cache = DynamicCache()
        feed(llama, ids[:, :22], torch.ones(2, 22), [20, 1, 1], cache)
        cache.crop(-7)
        got = llama(ids[:, 30:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        llama(ids[:, 30:], past_key_values=cache)
    assert run.stats.read == pytest.approx((4 / 21 + 5 / 22 + 1 + 4 / 17) / 4)


def test_a_pool_chooses_neighbours() -> None:
    """Among the equal scores that the pool makes, later tokens come first."""
    weights = torch.zeros(1, 1, 9)
    weights[0, 0, 4] = 1.0
    reads = Reads(lambda site: site)
    with torch.no_grad(), apply(model("llama"), reads):
        model("llama")(tokens(1, 9))
    site = reads.seen[0]
    assert top_keys(weights, 3, site, pool=3).tolist() == [[[5, 4, 3]]]
    assert top_keys(weights, 1, site).tolist() == [[[4]]]


# -- what the paper claims ---------------------------------------------------------------------------------------------


class HeavyHitters(Method):
    """A baseline that evicts: half the slots hold the most attended tokens so far, half the newest."""

    def __init__(self, size: int) -> None:
        self.size = size

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        notes = site.notes(self)
        received = weights.unflatten(1, (-1, site.groups)).sum((2, 3))
        before = notes.get("mass", received[..., :0])
        mass = torch.cat([before, torch.zeros(*before.shape[:2], site.seen - before.shape[2])], 2)
        real = site.positions >= 0
        notes["mass"] = mass.scatter_add(2, site.positions.clamp_min(0), received * real)
        return weights

    def keep(self, site: Site) -> Tensor:
        recent = site.positions >= site.seen - self.size // 2
        mass = site.notes(self)["mass"].gather(2, site.positions.clamp_min(0))
        mass = mass.masked_fill(recent | (site.positions < 0), -1.0)
        heavy = torch.zeros_like(recent).scatter_(2, mass.topk(min(self.size // 2, mass.shape[2])).indices, True)
        return recent | heavy


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(8, length=512, answer=8, away=200)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    assert score(HeavyHitters(2048)) == 1.0  # the baseline works if nothing has to be evicted
    ours = score(RecycledAttention(32, stride=4, pool=9))
    statement = "32 tokens of 512, chosen anew every fourth step, recall eight tokens from far behind the window"
    for policy, name in (
        (SinkRecent(sink=4, recent=28), "sinks and a recent window, same size"),
        (HeavyHitters(32), "eviction of what was attended to least, same size"),
    ):
        claim(statement, ours=ours, baseline=score(policy), better="higher", margin=0.7, baseline_name=name, seed=0)
    assert ours >= 0.9


FIRST, SECOND = KEYS[:8], KEYS[8:]


def topics() -> LlamaForCausalLM:
    """Make a model whose fillers attend to the first half of the keys, and values to the second, in all heads."""
    lm = induction_lm(2, heads=2, kv_heads=2)
    places = {SLOW: (range(1, 16), FIRST), SLOW + 1: (VALUES, SECOND)}
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            for head in range(2):
                for place, (queries, keys) in places.items():
                    layer.self_attn.q_proj.weight[head * HEAD + place, [TOKEN + token for token in queries]] = 20.0
                    layer.self_attn.k_proj.weight[head * HEAD + place, [TOKEN + token for token in keys]] = HEAD**0.5
    return lm


PROMPT, ANSWER = 41, 24


def conversation(change: int) -> Tensor:
    """Return a prompt of keys and filler, and an answer that changes from filler to values at its `change`-th token."""
    draw = torch.Generator().manual_seed(change)

    def some(of: range, count: int) -> Tensor:
        return torch.randint(of.start, of.stop, (count,), generator=draw)

    filler = some(range(1, 16), PROMPT - 11 + change - 1)
    return torch.cat([torch.tensor([BOS]), some(FIRST, 5), some(SECOND, 5), filler, some(VALUES, ANSWER - change + 1)])[
        None
    ]


class Counts(Method):
    """A method that records the steps that read everything."""

    def __init__(self, policy: RecycledAttention, prompt: int) -> None:
        self.policy, self.prompt, self.full = policy, prompt, []

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "decode" and site.layer == 1 and site.step[id(self.policy)]:
            self.full.append(site.seen - self.prompt)


@torch.no_grad()
def test_a_dynamic_schedule_notices_a_change(claim: ClaimFixture) -> None:
    lm, changes = topics(), (5, 9, 14)
    texts, pieces = [conversation(change) for change in changes], [PROMPT, *[1] * ANSWER]
    dense = [feed(lm, ids, torch.ones_like(ids), pieces) for ids in texts]

    def measure(policy: RecycledAttention) -> tuple[float, list[list[int]]]:
        """Return the mean error of the logits, and the full steps of each conversation."""
        errors, full = [], []
        for ids, expected in zip(texts, dense, strict=True):
            counts = Counts(policy, PROMPT)
            with apply(lm, policy, counts):
                got = feed(lm, ids, torch.ones_like(ids), pieces)
            errors.append((got - expected)[PROMPT:].abs().mean().item())
            full.append(counts.full)
        return sum(errors) / len(errors), full

    error, full = measure(RecycledAttention(6, dynamic=Dynamic(threshold=0.8, every=1)))
    for change, steps in zip(changes, full, strict=True):
        assert steps
        assert all(change <= step <= change + 2 for step in steps)
    fixed = [measure(RecycledAttention(6, stride=stride)) for stride in (1, 2, 3, 4, 6, 8, 12, 24)]
    claim(
        "a schedule that compares queries needs fewer full steps than any fixed stride of no larger error",
        ours=sum(map(len, full)) / len(changes),
        baseline=min(sum(map(len, steps)) / len(changes) for missed, steps in fixed if missed <= error),
        better="lower",
        margin=4.0,
        baseline_name="the best fixed stride",
        seed=0,
    )
    never = measure(RecycledAttention(6, dynamic=Dynamic(threshold=-1.0, every=1)))
    assert never[1] == [[]] * len(changes)
    assert never[0] > 4 * error


# -- the lens ----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    ids, k, lags, start = tokens(2, 20), 6, [0, 1, 5], 14
    expected: list[list[list[float]]] = []

    class ByHand(Method):
        def read(self, site: Site, out: Tensor) -> None:
            keys = site.k.repeat_interleave(2, 1)
            hidden = torch.arange(20) > torch.arange(20)[:, None]
            weights = ((site.q @ keys.mT) * site.scale).masked_fill(hidden, float("-inf")).softmax(-1)
            rows = []
            for lag in lags:
                top, near = [], []
                for b in range(2):
                    for h in range(4):
                        pair = weights[b, h // 2 * 2 : h // 2 * 2 + 2, start].amax(0)
                        row, since = weights[b, h, start + lag], set(range(start + 1, 20))
                        top.append(row[sorted(set(pair.topk(k).indices.tolist()) | since)].sum().item())
                        near.append(row[sorted({0, 1, 2, 3, 13, 14} | since)].sum().item())
                rows.append([sum(top) / 8, sum(near) / 8])
            expected.append(rows)

    with torch.no_grad(), apply(model("llama"), ByHand()):
        model("llama")(ids)
    found = attention_overlap(model("llama"), ids, k, lags)
    torch.testing.assert_close(torch.stack(found, 1), torch.tensor(expected).mean(0))


def test_overlap_of_everything_is_one() -> None:
    found = attention_overlap(model("llama"), tokens(2, 20), 20, [0, 3, 19])
    torch.testing.assert_close(found.recycled, torch.ones(3))
    torch.testing.assert_close(found.sink_recent, torch.ones(3))
    with pytest.raises(FoveateError, match=r"lags=\(3, 20\) must be in 0..19 for 20 tokens"):
        attention_overlap(model("llama"), tokens(2, 20), 20, [3, 20])


# -- small parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_budget() -> None:
    here = host(model("llama"))
    for budget in (0.25, 0.5, 0.1):
        policy = RecycledAttention.at_budget(budget, here, 400)
        with apply(model("llama"), policy) as run:
            model("llama").generate(tokens(1, 400), max_new_tokens=1 + policy.stride, do_sample=False)
        assert run.stats.read == pytest.approx(budget, abs=0.03)
    assert RecycledAttention.at_budget(1.0, here, 100).k >= 98
    assert RecycledAttention.at_budget(0.0, here, 100).k == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"k": 0}, "k=0 must be a whole number, at least 1"),
        ({"stride": 0}, "stride=0 must be a whole number, at least 1"),
        ({"phase": -1}, "phase=-1 must be a whole number, at least 0"),
        ({"pool": 2}, "pool=2 must be odd"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of 'max', 'mean'"),
        ({"dynamic": {"threshold": 0.8}}, r"dynamic must be a Dynamic\(threshold, every\) or None; got dict"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        RecycledAttention(**bad)


def test_bad_schedules() -> None:
    with pytest.raises(FoveateError, match="threshold=2 must be in -1.0..1.0"):
        Dynamic(threshold=2)
    with pytest.raises(FoveateError, match="every=0 must be a whole number, at least 1"):
        Dynamic(every=0)
