"""Attention as the posterior over a latent edge: by enumeration, with axis "key" and with axis "slot"."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.dense.marginal_attention import (
    MarginalAttention,
    collapsed_gradient,
    enumerate_edges,
    expectation_maximisation,
)
from foveate.ops.dense.softmax import Softmax
from tests.contracts.operators import a_mask
from tests.support.tensors import assert_near, gradients, qkv


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampler(seed: int = 0, **options) -> MarginalAttention:
    return MarginalAttention(estimate="sample", generator=torch.Generator().manual_seed(seed), **options)


def log_psi(op: MarginalAttention, q: Tensor, k: Tensor, scale: float) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if op.potential == "dot":
        return scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    return -scale / 2 * ((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1)


# -- the oracle --------------------------------------------------------------------------------------------------------


def test_enumerated_marginals_are_the_factorised_ones() -> None:
    """Enumerating all 5^4 sets of edges, one for each of 4 queries, gives the factorised marginals."""
    score, prior = random(4, 5), random(4, 5, seed=1)
    assert_near(enumerate_edges(score), torch.softmax(score, -1), 1e-10)
    assert_near(enumerate_edges(score, prior), torch.softmax(score + prior, -1), 1e-10)
    forbidden = prior.masked_fill(torch.eye(4, 5, dtype=torch.bool), -math.inf)
    marginals = enumerate_edges(score, forbidden)
    assert_near(marginals, torch.softmax(score + forbidden, -1), 1e-10)
    assert not marginals.diagonal().any()
    assert_near(enumerate_edges(random(2, 3, 2, 6))[1, 2], torch.softmax(random(2, 3, 2, 6)[1, 2], -1), 1e-10)
    assert_near(enumerate_edges(random(1, 6)), torch.softmax(random(1, 6), -1), 1e-10)


def test_enumeration_has_an_end() -> None:
    with pytest.raises(ShapeError, match=r"at most 65536 joint states; got 5 \*\* 7 = 78125"):
        enumerate_edges(random(7, 5))
    assert enumerate_edges(random(8, 4)).shape == (8, 4), "exactly as many as are allowed"


@pytest.mark.parametrize("potential", ["dot", "gaussian"])
def test_weights_are_enumerated_marginals(potential: str) -> None:
    q, k, _ = qkv(4, 5, width=3)
    op = MarginalAttention(potential)
    assert_near(op.weights(q, k, scale=0.7), enumerate_edges(log_psi(op, q, k, 0.7)), 1e-10)
    bias = random(2, 4, 4, 5, seed=2)
    assert_near(op.weights(q, k, mask=bias), enumerate_edges(log_psi(op, q, k, 3**-0.5), bias), 1e-10)


@pytest.mark.parametrize("potential", ["dot", "gaussian"])
def test_the_collapsed_gradient(potential: str) -> None:
    """A gradient step on the marginal log-likelihood is attention, with the gradients of each log psi as values."""
    k, prior, y = random(6, 3), random(6, seed=1), random(3, seed=2).requires_grad_()

    def log_psi(y: Tensor) -> Tensor:
        return k @ y if potential == "dot" else -((k - y) ** 2).sum(-1)

    (expected,) = torch.autograd.grad(torch.logsumexp(log_psi(y) + prior, -1), y)
    assert_near(collapsed_gradient(y.detach(), log_psi, prior), expected, 1e-10)
    posterior = torch.softmax(log_psi(y) + prior, -1)
    by_key = torch.stack([torch.autograd.grad(log_psi(y)[j], y)[0] for j in range(6)])
    assert_near(collapsed_gradient(y.detach(), log_psi, prior), (posterior @ by_key).detach(), 1e-10)
    uniform = collapsed_gradient(y.detach(), log_psi)
    assert_near(uniform, torch.autograd.grad(torch.logsumexp(log_psi(y), -1), y)[0], 1e-10)
    assert not torch.allclose(uniform, expected)


def test_the_evidence_and_its_gradient() -> None:
    q, k, _ = qkv(4, 5, width=3, grad=True)
    bias = random(2, 4, 4, 5, seed=2)
    for axis, dim in (("key", -1), ("slot", -2)):
        op = MarginalAttention("gaussian", axis=axis)
        ours = op.evidence(q, k, mask=bias, scale=0.7)
        assert_near(ours, torch.logsumexp(log_psi(op, q, k, 0.7) + bias, dim), 1e-10)
        assert_near(op.evidence(q, k), torch.logsumexp(log_psi(op, q, k, 3**-0.5), dim), 1e-10)
        hidden = torch.ones(2, 1, 4, 5, dtype=torch.bool)
        hidden[:, :, 1], hidden[..., 3] = False, False
        found = op.evidence(q, k, mask=hidden)
        assert not found[:, :, 1 if axis == "key" else 3].any()
        assert all(grad.isfinite().all() for grad in gradients(found, [q, k]))
    dot = MarginalAttention()
    (grad,) = torch.autograd.grad(dot.evidence(q, k, scale=1.0).sum(), q)
    assert_near(grad, dot(q, k, k, scale=1.0).detach(), 1e-10, "attention to the keys themselves")


# -- by key ------------------------------------------------------------------------------------------------------------


def test_keys_of_one_length_make_a_gaussian_a_softmax() -> None:
    q, k, v = qkv(6, 9, value_width=5)
    unit = F.normalize(k, dim=-1)
    gaussian, dot = MarginalAttention("gaussian"), MarginalAttention()
    assert_near(gaussian(q, unit, v), Softmax()(q, unit, v), 1e-8)
    assert (gaussian(q, k, v) - dot(q, k, v)).abs().max() > 1e-2
    norms = (k * k).sum(-1).repeat_interleave(2, 1)[:, :, None] / 2
    assert_near(gaussian(q, k, v, scale=0.7, mask=0.7 * norms), dot(q, k, v, scale=0.7), 1e-8, "the norms added back")


def test_it_runs_on_fused_kernels() -> None:
    for potential in ("dot", "gaussian"):
        assert MarginalAttention(potential).plan(*qkv(6)).engine == "fused"


@pytest.mark.parametrize("potential", ["dot", "gaussian"])
@pytest.mark.parametrize("kind", [None, "keys", "pairs", "bias"])
def test_hard_edges_by_key(potential: str, kind: str | None) -> None:
    q, k, v = qkv(9, 12, grad=True)
    mask = None if kind is None else a_mask(kind, 9, 12)
    soft, hard = MarginalAttention(potential), MarginalAttention(potential, "map")
    weights = soft.weights(q, k, mask=mask)
    expected = F.one_hot(weights.argmax(-1), 12) * (weights.sum(-1, keepdim=True) > 0)
    assert torch.equal(hard.weights(q, k, mask=mask), expected.double())
    dq, dk, dv = gradients(hard(q, k, v, mask=mask), [q, k, v])
    assert not dq.any() and not dk.any()
    assert dv.any()
    op = sampler(potential=potential)
    mean = sum(op.weights(q, k, mask=mask) for _ in range(200)) / 200
    assert not mean[weights == 0].any()
    assert (mean - weights).abs().mean() < 0.03
    if kind != "bias":
        return
    assert_near(sampler()(q, k, v, mask=mask), sampler().weights(q, k, mask=mask) @ v.repeat_interleave(2, 1), 1e-12)


def test_a_sample_is_drawn_once() -> None:
    q, k, v = qkv(200, grad=True)
    whole, chunks = (sampler()(q, k, v, causal=True, engine=engine) for engine in ("reference", "chunked"))
    assert_near(chunks, whole, 1e-12)
    for one, other in zip(gradients(chunks, [q, k, v]), gradients(whole, [q, k, v]), strict=True):
        assert_near(one, other, 1e-12)
    assert not torch.equal(sampler(1)(q, k, v, causal=True), whole)
    assert sampler().capabilities.streaming == "own"
    assert MarginalAttention(estimate="map").capabilities.streaming == "exact"


# -- by slot -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", ["dot", "gaussian"])
@pytest.mark.parametrize("kind", [None, "keys", "pairs", "bias"])
@pytest.mark.parametrize("engine", ["auto", "reference", "chunked"])
def test_slots_share_each_key(potential: str, kind: str | None, engine: str) -> None:
    q, k, v = qkv(9, 12, grad=True)
    mask = None if kind is None else a_mask(kind, 9, 12)
    op = MarginalAttention(potential, axis="slot")
    logits = log_psi(op, q, k, 8**-0.5)
    if mask is not None:
        logits = logits + (mask if kind == "bias" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    shares = torch.nan_to_num(torch.softmax(logits, -2))  # keys that no slot sees belong to none
    expected = torch.nan_to_num(shares / shares.sum(-1, keepdim=True))
    assert_near(op.weights(q, k, mask=mask), expected, 1e-10)
    out = op(q, k, v, mask=mask, engine=engine)
    assert_near(out, expected @ v.repeat_interleave(2, 1), 1e-10)
    theirs = op(q, k, v, mask=mask, engine="reference")
    for one, other in zip(gradients(out, [q, k, v]), gradients(theirs, [q, k, v]), strict=True):
        assert one.isfinite().all()
        assert_near(one, other, 1e-9)


def test_the_gradient_by_slot() -> None:
    q, k, v = qkv(3, 5, batch=1, heads=2, kv_heads=1, width=4, grad=True)
    op = MarginalAttention("gaussian", axis="slot")
    assert torch.autograd.gradcheck(op, (q, k, v))


@pytest.mark.parametrize("kind", [None, "keys", "pairs", "bias"])
def test_hard_edges_by_slot(kind: str | None) -> None:
    """As in k-means, each key belongs to one slot, which is the mean of its keys; the prior only picks the slot."""
    q, k, v = qkv(4, 12)
    mask = None if kind is None else a_mask(kind, 4, 12)
    op, logits = (
        MarginalAttention("gaussian", "map", axis="slot"),
        log_psi(MarginalAttention("gaussian"), q, k, 8**-0.5),
    )
    if mask is not None:
        logits = logits + (mask if kind == "bias" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    ours = op.weights(q, k, mask=mask)
    for b, h, i in itertools.product(range(2), range(4), range(4)):
        owners = [logits[b, h, :, j].argmax().item() for j in range(12)]
        mine = [j for j in range(12) if owners[j] == i and logits[b, h, i, j] > -math.inf]
        expected = torch.zeros(12, dtype=torch.float64)
        expected[mine] = 1 / max(len(mine), 1)
        assert_near(ours[b, h, i], expected, 1e-12)
    assert_near(op(q, k, v, mask=mask, engine="chunked"), ours @ v.repeat_interleave(2, 1), 1e-12)


def test_sampled_slots() -> None:
    q, k, v = qkv(4, 12)
    soft = MarginalAttention(axis="slot")
    logits = log_psi(soft, q, k, 8**-0.5)
    op = sampler(axis="slot")
    drawn = [op.weights(q, k) > 0 for _ in range(200)]
    assert all((one.sum(-2) == 1).all() for one in drawn)
    assert (sum(one.double() for one in drawn) / 200 - torch.softmax(logits, -2)).abs().mean() < 0.03
    weights = sampler(axis="slot").weights(q, k)
    assert_near(weights.sum(-1), (weights > 0).any(-1).double(), 1e-12)
    assert_near(sampler(axis="slot")(q, k, v), weights @ v.repeat_interleave(2, 1), 1e-12)


def test_slots_are_not_causal() -> None:
    op = MarginalAttention(axis="slot")
    for q, k, v in (qkv(5), qkv(4, 5)):
        with pytest.raises(UnsupportedPattern, match="MarginalAttention does not define"):
            op(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        op.init_state(1, 1, 1, 4, 4)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"potential": "cosine"}, "potential='cosine'"),
        ({"estimate": "median"}, "estimate='median'"),
        ({"axis": "query"}, "axis='query'"),
        ({"estimate": "sample"}, "generator must come with estimate"),
        ({"generator": torch.Generator()}, 'only with it; got estimate="mean"'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MarginalAttention(**options)


def test_bad_arguments() -> None:
    nodes = random(1, 1, 9, 2)
    with pytest.raises(OptionError, match='axis="key"'):
        expectation_maximisation(MarginalAttention(), nodes[:, :, :3], nodes, 2)
    with pytest.raises(OptionError, match="steps=0"):
        expectation_maximisation(MarginalAttention(axis="slot"), nodes[:, :, :3], nodes, 0)
    with pytest.raises(ShapeError, match="k must be as wide"):
        MarginalAttention().evidence(nodes, nodes[..., :1])


# -- slots find clusters -----------------------------------------------------------------------------------------------


def blobs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw 150 points of three Gaussians with their labels, and three of the points as slots."""
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 3.5]], dtype=torch.float64)
    made = torch.arange(150) % 3
    nodes = (centres[made] + 0.7 * random(150, 2, seed=seed))[None, None]
    start = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[:3]
    return nodes, made, nodes[:, :, start]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slots_that_compete_find_the_clusters(seed: int, claim) -> None:
    nodes, made, start = blobs(seed)

    def agreement(slots: Tensor) -> float:
        return adjusted_rand_score(made, torch.cdist(nodes[0, 0], slots[0, 0]).argmin(-1))

    competing = MarginalAttention("gaussian", axis="slot")
    slots, evidence = expectation_maximisation(competing, start, nodes, 10, scale=2.0)
    once = MarginalAttention("gaussian")(start, nodes, nodes, scale=2.0)
    claim(
        f"slots that compete for points in ten steps find three Gaussians: adjusted Rand index (seed {seed})",
        ours=agreement(slots), baseline=agreement(once), better="higher", margin=0.3,
        baseline_name="softmax over points, once", seed=seed,
    )  # fmt: skip
    assert agreement(slots) > 0.8
    assert (evidence.diff() >= -1e-9).all(), "EM never loses likelihood"
    assert evidence[-1] - evidence[0] > 10


@pytest.mark.parametrize("potential", ["dot", "gaussian"])
@pytest.mark.parametrize("axis", ["key", "slot"])
@pytest.mark.parametrize("estimate", ["mean", "map"])
def test_the_plan_counts_every_scoring_of_pairs(potential: str, axis: str, estimate: str) -> None:
    """The plan counts one scoring for hard edges to slots, and two for soft shares of keys."""
    q, k, v = qkv(7, 9, dtype=torch.float32)
    op = MarginalAttention(potential, estimate, axis=axis)
    with FlopCounterMode(display=False) as counter:
        op(q, k, v, engine="reference")
    assert op.plan(q, k, v, engine="reference").flops == counter.get_total_flops() > 0
