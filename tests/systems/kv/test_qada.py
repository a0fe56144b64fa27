"""QAdA tells from local keys and moments which heads need the far context, on tensors and on whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.parts.key_moments import gaussian_mass
from foveate.kv.qada import QAdA
from foveate.kv.sink_recent import SinkRecent
from tests.conftest import ClaimFixture
from tests.contracts.policies import Batch
from tests.support.host_models import Reads, feed, model, padded, tokens

DECODING = [20, *[1] * 10]


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_a_threshold_of_one_is_dense(name: str) -> None:
    ids, mask = padded(tokens(2, 30), "left")
    expected = feed(model(name), ids, mask, DECODING)
    with apply(model(name), QAdA(1.0, 1, 2)):
        assert torch.equal(feed(model(name), ids, mask, DECODING), expected)


@torch.no_grad()
def test_a_threshold_of_zero_is_sinks_and_a_window() -> None:
    """A policy that evicts down to 5 recent tokens lets each new token see these and itself."""
    ids = tokens(2, 30)
    with apply(model("llama"), SinkRecent(2, 5)):
        expected = feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    with apply(model("llama"), QAdA(0.0, 2, 6)):
        got = feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# -- the mechanism -----------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that decides and computes each decoding step's output by hand, head by head."""

    def __init__(self, policy: QAdA) -> None:
        self.policy, self.checked, self.far = policy, 0, 0

    def read(self, site: Site, out: Tensor) -> None:
        policy, length = self.policy, site.seen
        if site.phase == "prefill" or site.layer < policy.dense_layers:
            return
        near = [*range(policy.sink), *range(length - policy.local, length)]
        for b in range(site.q.shape[0]):
            for h in range(site.q.shape[1]):
                q, k, v = site.q[b, h, 0], site.k[b, h // site.groups], site.v[b, h // site.groups]
                logits, known = k @ q * site.scale, k[policy.sink :]
                mean, covariance = known.mean(0), torch.cov(known.T, correction=0)
                bulk = math.log(length - len(near)) + float(q @ mean) * site.scale
                bulk += float(q @ covariance @ q) * site.scale**2 / 2
                margin = float(logits[near].logsumexp(0)) - bulk
                is_far = margin <= math.log(policy.tau / (1 - policy.tau))
                read = list(range(length)) if is_far else near
                expected = logits[read].softmax(0) @ v[read]
                torch.testing.assert_close(out[b, h, 0], expected, atol=1e-5, rtol=1e-4)
                self.far, self.checked = self.far + is_far, self.checked + 1


@pytest.mark.parametrize("tau, sink, local, dense", [(0.5, 2, 6, 0), (0.3, 0, 4, 1), (0.55, 3, 8, 2)])
@torch.no_grad()
def test_each_head_decides_for_each_query(tau: float, sink: int, local: int, dense: int) -> None:
    ids, policy = tokens(2, 30), QAdA(tau, sink, local, dense)
    checks = Checks(policy)
    with apply(model("llama"), policy, checks) as run:
        feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    assert checks.checked == 10 * (3 - dense) * 8
    assert 0.1 < checks.far / checks.checked < 0.95
    assert run.stats.kept == 1.0 and 0.2 < run.stats.read < 1


@torch.no_grad()
def test_the_heads_with_the_least_local_share_come_first() -> None:
    margin = torch.tensor([[0.1, -2.0, -1.0, 3.0], [-1.0, -2.0, -3.0, -4.0]])
    assert QAdA(0.5, most=1).is_far(margin).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert QAdA(0.5, most=3).is_far(margin).sum(1).tolist() == [2, 3]
    assert QAdA(0.5).is_far(margin).sum(1).tolist() == [2, 4]
    assert not QAdA(0.0).is_far(margin).any()


@torch.no_grad()
def test_moments_are_those_of_all_keys_after_the_sinks() -> None:
    llama, ids, found = model("llama"), tokens(2, 30), []

    def moments(site: Site) -> None:
        notes = next(x for (_, layer), x in site.all_notes.items() if layer == site.layer and "mean" in x)
        k = site.k[:, :, 3:]
        torch.testing.assert_close(notes["mean"][:, :, 0], k.mean(2), atol=1e-5, rtol=1e-4)
        covariance = torch.stack([torch.stack([torch.cov(head.T, correction=0) for head in row]) for row in k])
        torch.testing.assert_close(notes["spread"] / notes["count"], covariance, atol=1e-4, rtol=1e-3)
        found.append(site.seen)

    with apply(llama, QAdA(0.5, 3, 4), Reads(moments)):
        cache = DynamicCache()
        feed(llama, ids, torch.ones_like(ids), [9, 11, *[1] * 10], cache)
        cache.crop(15)
        llama(ids[:, :1], past_key_values=cache)
    assert found[-1] == 16 and len(found) == 13 * 3


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_reads_what_its_sequences_read_alone(side: str) -> None:
    """One is always within sinks and window, one leaves them while it decodes, and one has left them before."""
    lengths, after, policy = (3, 10, 24), 6, QAdA(0.55, 2, 10, most=3)
    batch = Batch.of(lengths, side, after)
    ids, mask, places = batch.ids, batch.mask, (batch.mask.cumsum(1) - 1).clamp_min(0)

    def shares(ids: Tensor, mask: Tensor, places: Tensor, prompt: int) -> tuple[Tensor, list[float]]:
        """The logits of the decoding steps, and the share that each layer reads in each of them."""
        reads, cache, logits = Reads(lambda site: site.read_share), DynamicCache(), []
        with apply(model("llama"), policy, reads):
            for piece in (slice(0, prompt), *(slice(end - 1, end) for end in range(prompt + 1, ids.shape[1] + 1))):
                out = model("llama")(
                    ids[:, piece], attention_mask=mask[:, : piece.stop], position_ids=places[:, piece],
                    past_key_values=cache,
                )  # fmt: skip
                logits.append(out.logits[:, -1])
        return torch.stack(logits[1:], 1), reads.seen[3:]

    together, share = shares(ids, mask, places, max(lengths))
    alone = []
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        own = (each[row : row + 1, real] for each in (ids, mask, places))
        logits, read = shares(*own, length)
        torch.testing.assert_close(together[row : row + 1], logits, atol=1e-4, rtol=1e-4)
        alone.append(read)
    assert alone[0] == [1.0] * len(share) and min(alone[1]) < 1 and min(alone[2]) < 0.9
    torch.testing.assert_close(torch.tensor(share), torch.tensor(alone).mean(0))


@torch.no_grad()
def test_drafts_do_not_change_the_text() -> None:
    llama, ids = model("llama"), tokens(1, 12).repeat(1, 3)
    with apply(llama, QAdA(0.4, 2, 6)):
        plain = llama.generate(ids, max_new_tokens=16, do_sample=False)
        drafted = llama.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_the_mass_of_gaussian_keys_is_predicted() -> None:
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(4096, 32, generator=draw).double()
    q = torch.randn(100, 32, generator=draw).double()
    q = q * (2 * torch.rand(100, 1, generator=draw).double() / ((q**2).sum(1, keepdim=True) / 32)).sqrt()
    mean, covariance = k.mean(0), torch.cov(k.T, correction=0)
    count = torch.tensor([[[4096]]])
    got = gaussian_mass(q[None, None], mean[None, None, None], covariance[None, None], count, 32**-0.5)[0, 0]
    exact = (q @ k.T / 32**0.5).logsumexp(1)
    assert float((got - exact).abs().mean()) < 0.1
    assert float((got - math.log(4096) - exact.add(-math.log(4096))).abs().max()) < 0.6


def swinging(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of 6 heads, half of whose queries match a far cluster of keys."""
    draw = torch.Generator().manual_seed(seed)
    k = torch.randn(6, 512, 16, generator=draw)
    axis = torch.nn.functional.normalize(torch.randn(6, 1, 16, generator=draw), dim=-1)
    far = torch.randint(20, 400, (6, 60), generator=draw)
    k.scatter_add_(1, far[..., None].expand(-1, -1, 16), (6 * axis).expand(-1, 60, -1))
    q = torch.randn(6, 64, 16, generator=draw)
    local = k[:, -1:] * 2.0
    swings = (torch.rand(6, 64, 1, generator=draw) < 0.5).float()
    q = q + swings * 5 * axis + (1 - swings) * local
    return q, k, torch.randn(6, 512, 16, generator=draw)


def test_the_prediction_follows_the_query(claim: ClaimFixture) -> None:
    """At equal sparsity, heads that swing with the query are better judged for each query than once for all."""
    near = [*range(16), *range(512 - 64, 512)]
    ours, static, areas = 0.0, 0.0, []
    for seed in range(5):
        q, k, v = swinging(seed)
        logits = q @ k.mT / 4
        mean, covariance = k[:, 16:].mean(1), torch.stack([torch.cov(head[16:].T, correction=0) for head in k])
        count = torch.tensor([[[512 - len(near)]]])
        bulk = gaussian_mass(q[None], mean[None, :, None], covariance[None], count, 0.25)[0]
        margin = logits[..., near].logsumexp(-1) - bulk
        rest = torch.ones(512, dtype=torch.bool)
        rest[near] = False
        truth = logits[..., near].logsumexp(-1) - logits[..., rest].logsumexp(-1) > 0
        areas.append((margin[truth][:, None] > margin[~truth]).double().mean().item())
        exact, local = logits.softmax(-1) @ v, logits[..., near].softmax(-1) @ v[:, near]
        error = (exact - local).norm(dim=-1)
        chosen = margin.flatten().argsort()[: margin.numel() // 2]
        ours += float(error.sum() - error.flatten()[chosen].sum())
        heads = margin.mean(1).argsort()[:3]
        static += float(error.sum() - error[heads].sum())
    assert min(areas) > 0.9
    claim(
        "half of the queries of 6 swinging heads read everything, chosen by margin: error of the outputs, as a share "
        "of that of the static choice",
        ours=ours / static, baseline=1.0, better="lower", margin=0.15, seed=0,
        baseline_name="all queries of the three heads with the least mean margin",
    )  # fmt: skip


def test_a_lone_far_key_is_not_seen() -> None:
    """A known limit: one key in 4,096 that takes most of the attention hardly moves the moments."""
    draw = torch.Generator().manual_seed(0)
    k, q = torch.randn(4096, 32, generator=draw), torch.randn(32, generator=draw)
    k[100] = 3 * q
    mean, covariance = k.mean(0), torch.cov(k.T, correction=0)
    got = gaussian_mass(
        q[None, None, None], mean[None, None, None], covariance[None, None], torch.tensor([[[4096]]]), 32**-0.5
    )
    assert float((k @ q / 32**0.5).logsumexp(0)) > float(got) + 2


# -- small parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_budget() -> None:
    here = host(model("llama"))
    for budget in (0.1, 0.25, 0.5):
        with apply(model("llama"), QAdA.at_budget(budget, here, 200)) as run:
            model("llama").generate(tokens(1, 200), max_new_tokens=3, do_sample=False)
        assert 0.5 * budget <= run.stats.read <= budget + 0.01
    assert QAdA.at_budget(0.5, here, 200).most == 1
    assert QAdA.at_budget(0.0, here, 100).local == 1
    assert QAdA.at_budget(1.0, here, 100).tau == 1


def test_models_of_dense_layers_only_are_refused() -> None:
    refused = pytest.raises(UnsupportedModel, match="dense_layers=3: LlamaForCausalLM has 3 layers")
    with refused, apply(model("llama"), QAdA(dense_layers=3)):
        pass


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"tau": 1.5}, "tau=1.5 must be "),
        ({"sink": -1}, "sink=-1 must be a whole number, at least 0"),
        ({"local": 0}, "local=0 must be a whole number, at least 1"),
        ({"dense_layers": -1}, "dense_layers=-1 must be a whole number, at least 0"),
        ({"most": -1}, "most=-1 must be a whole number, at least 0"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        QAdA(**bad)
