"""Scan and Snap: gradients against autograd, which tokens gain attention, in which order, and when it stops."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.lens.parts.rank_correlation import rank_correlation
from foveate.studies.base.fits import slope
from foveate.studies.scan_and_snap.dynamics import Dynamics, attended
from foveate.studies.scan_and_snap.simulator import ScanAndSnap, gradients
from foveate.studies.scan_and_snap.token_classes import Sequences, TokenClasses
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(**options) -> TokenClasses:
    return TokenClasses.drawn(generator=seeded(), **options)


@cache
def trained(eta_y: float = 1.0, eta_z: float = 1.0, normalize: bool = True, steps: int = 2000) -> Dynamics:
    return ScanAndSnap(classes(), normalize).run(eta_y, eta_z, steps)


# -- the data ----------------------------------------------------------------------------------------------------------


def test_the_data_are_those_of_the_paper() -> None:
    """The probabilities that the authors' run of figure 4 prints."""
    found = TokenClasses.drawn(2, 2, 10, 10, weights=(0.1, 1.0), common_weight=1.0, spaced=True)
    assert_near(found.p[0, :10], torch.arange(1, 11) * 0.1 / 15.5, 1e-7)
    assert_near(found.p[0, 20:], torch.full((10,), 1 / 15.5, dtype=torch.float64), 1e-12)
    assert found.p[0, 0] == pytest.approx(0.0065, abs=5e-5) and found.p[0, 25] == pytest.approx(0.0645, abs=5e-5)
    assert found.vocabulary == 34 and found.query.tolist() == [0, 1]


def test_classes_have_tokens_of_their_own() -> None:
    data = classes(classes=4, queries=2, distinct=3, common=5)
    assert data.query.tolist() == [0, 0, 1, 1] and data.queries == 2
    assert data.distinct.sum(1).tolist() == [3] * 4 and data.distinct.sum(0).tolist() == [1] * 12 + [0] * 5
    assert data.common.tolist() == [False] * 12 + [True] * 5
    assert_near(data.p.sum(1), torch.ones(4, dtype=torch.float64), 1e-12)
    assert ((data.p > 0) == (data.distinct | data.common)).all()


def test_samples_have_the_shares_of_their_class() -> None:
    data = classes(classes=3, queries=1, distinct=2, common=3)
    seen = data.sample(6000, 40, seeded())
    assert_near(seen.shares.sum(1), torch.ones(6000, dtype=torch.float64), 1e-12)
    assert_near(seen.shares * 40, (seen.shares * 40).round(), 1e-9)
    for number in range(3):
        own = seen.shares[seen.classes == number]
        assert 1800 < len(own) < 2200
        assert_near(own.mean(0), data.p[number], 0.01)


# -- the model ---------------------------------------------------------------------------------------------------------


def by_positions(tokens: Tensor, query: Tensor, target: Tensor, y: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """The loss of the model on sequences of tokens, position by position, as the authors' code has it."""
    x = F.one_hot(tokens, z.shape[1]).double()
    weights = (x * z[query][:, None]).sum(-1).softmax(-1)
    mixed = (weights[..., None] * x).sum(1)
    if normalize:
        mixed = mixed / mixed.norm(dim=1, keepdim=True)
    return F.cross_entropy(mixed @ y, target)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [3, 12])
def test_gradients_are_those_of_autograd_on_sequences(normalize: bool, length: int) -> None:
    y = torch.randn(7, 9, generator=seeded(), dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 7, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (20, length), generator=seeded(2))
    query, target = torch.randint(3, (20,), generator=seeded(3)), torch.randint(9, (20,), generator=seeded(4))
    loss = by_positions(tokens, query, target, y, z, normalize)
    loss.backward()
    shares = F.one_hot(tokens, 7).double().mean(1)
    found = gradients(Sequences(shares, target), query, y.detach(), z.detach(), normalize)
    assert found.loss == pytest.approx(loss.item(), abs=1e-12)
    assert_near(found.y, -y.grad, 1e-12)
    assert_near(found.z, -z.grad, 1e-12)


def test_the_projection_replaces_the_second_term_of_the_softmax() -> None:
    """The paper's form, `diag(c) P_perp(c) / |c|`, has no term in `c cᵀ`: the projection removes it."""
    c = torch.rand(6, generator=seeded(), dtype=torch.float64)
    c = c / c.sum()
    perp = torch.eye(6, dtype=torch.float64) - torch.outer(c, c) / c.square().sum()
    with_both = (torch.diag(c) - torch.outer(c, c)) @ perp
    assert_near(with_both, torch.diag(c) @ perp, 1e-12)


def test_attention_is_uniform_at_first_and_stays_so_without_its_learning_rate() -> None:
    found = trained(eta_z=0.0, steps=300)
    assert_near(found.attention(0), torch.full((2, 60), 1 / 60, dtype=torch.float64), 1e-12)
    assert_near(found.attention(), found.attention(0), 1e-9)
    assert_near(found.composition(), found.data.p, 1e-12)
    assert found.loss[0].item() == pytest.approx(math.log(66)) and found.loss[-1] < 0.5
    assert found.snap_time() is None


def test_the_decoder_follows_its_closed_form_on_orthogonal_classes() -> None:
    """Without common tokens the gap u of the right logit solves `u + (e^u - 1) / (M - 1) = M / (M - 1) eta t / K`."""
    data = classes(classes=4, queries=2, distinct=5, common=0)
    m, eta, steps = data.vocabulary, 0.02, 1500
    found = ScanAndSnap(data).run(eta_y=eta, eta_z=0.5, steps=steps)
    p = (-found.loss).exp()
    gap = (p * (m - 1) / (1 - p)).log()
    time = torch.arange(steps) * eta
    assert_near(gap + gap.expm1() / (m - 1), m / (m - 1) * time / 4, 0.02)
    assert found.z.abs().max() < 1e-12, "scores of classes that share no token must not move"


def test_sampled_sequences_learn_what_the_expectation_does() -> None:
    data = classes()
    exact = ScanAndSnap(data).run(1.0, 1.0, 150)
    sampled = ScanAndSnap(data).run(1.0, 1.0, 150, context=400, batch=64, generator=seeded())
    assert sampled.distinct_mass()[-1] == pytest.approx(exact.distinct_mass()[-1].item(), abs=0.03)
    assert torch.corrcoef(torch.stack([sampled.distinct_scores(), exact.distinct_scores()]))[0, 1] > 0.95
    again = ScanAndSnap(data).run(1.0, 1.0, 3, context=400, batch=64, generator=seeded())
    assert torch.equal(again.z, sampled.z[:4])


# -- what the paper states ---------------------------------------------------------------------------------------------


def test_distinct_tokens_gain_and_common_ones_lose(claim: ClaimFixture) -> None:
    found, still = trained(), trained(eta_z=0.0, steps=300)
    distinct, common = found.distinct_mass(), found.common_mass()
    assert distinct[0] == pytest.approx(0.37, abs=0.03)
    assert distinct[-1] / distinct[0] > 1.3 and common[-1] < 0.8 * common[0]
    assert_near(distinct + common, torch.ones(2001, dtype=torch.float64), 1e-9)
    assert_near(still.distinct_mass(), distinct[:1].expand(301), 1e-9)
    assert (found.distinct_scores() > 0).all() and (found.common_scores() < 0).all()
    claim(
        "attention moves to the tokens that occur for one next token only: its share on them after 2000 steps",
        ours=distinct[-1].item(), baseline=still.distinct_mass()[-1].item(), better="higher", margin=0.12,
        baseline_name="attention that is not trained", seed=0,
    )  # fmt: skip


def test_attention_grows_in_the_order_of_co_occurrence() -> None:
    found = trained()
    for number, own in enumerate(found.data.distinct):
        p, z = found.data.p[number, own], found.z[:, found.data.query[number], own]
        assert rank_correlation(torch.stack([p, z[-1]]))[0, 1] > 0.99
        order = p.argsort()
        assert (z[1:, order].diff(dim=1) >= 0).all(), "the sign of a relative gain stays"


def test_scores_follow_the_law_of_growth_where_the_decoder_is_faster() -> None:
    for eta_z, within in ((0.01, 0.02), (0.1, 0.1)):
        found = trained(eta_z=eta_z)
        own = found.data.distinct
        off = (found.predicted_scores()[own] - found.distinct_scores()).abs().max() / found.distinct_scores().max()
        assert off < within, eta_z
    assert (found.predicted_scores()[~own] == 0).all()


def test_attention_snaps_and_its_speed_decides_how_sparse_it_is(claim: ClaimFixture) -> None:
    found = trained()
    largest = found.z.flatten(1).amax(1)
    first, last = (largest[500] - largest[0]).item(), (largest[2000] - largest[1500]).item()
    assert first > 5 * last > 0
    snap = found.snap_time()
    assert snap is not None and 5 < snap < 200
    speed = found.speed()
    assert speed[snap - 1] == speed.max() and speed[-1] < 0.05 * speed.max()
    claim(
        "attention that learns as fast as the decoder ends sparser than one a hundred times slower: entropy, nats",
        ours=found.entropy()[-1].item(), baseline=trained(eta_z=0.01).entropy()[-1].item(), better="lower", margin=0.08,
        baseline_name="a hundredth of the learning rate", seed=0,
    )  # fmt: skip


def test_the_snap_comes_sooner_with_a_faster_decoder_and_not_with_faster_attention() -> None:
    rates = (0.2, 0.5, 1.0)
    times = [trained(eta_y=rate, eta_z=0.01, steps=300).snap_time() for rate in rates]
    assert slope(rates, times) == pytest.approx(-1, abs=0.1)
    same = [trained(eta_z=rate, steps=100).snap_time() for rate in (0.01, 0.1, 0.3)]
    assert max(same) - min(same) <= 0.2 * max(same)


def test_without_the_length_attention_does_not_tell_tokens_apart(claim: ClaimFixture) -> None:
    found, without = trained(), trained(normalize=False)

    def right(seen: Dynamics) -> float:
        return torch.cat([seen.distinct_scores() > 0, (seen.common_scores() < 0).flatten()]).double().mean().item()

    assert right(found) == 1
    claim(
        "scores of distinct tokens rise and those of common ones fall: the share of scores that do",
        ours=right(found), baseline=right(without), better="higher", margin=0.1,
        baseline_name="without the division by the length", seed=0,
    )  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenClasses.drawn(classes=0), "classes=0"),
        (lambda: TokenClasses.drawn(classes=2, queries=3), "queries=3 must be at most classes=2"),
        (lambda: TokenClasses.drawn(distinct=0), "distinct=0"),
        (lambda: TokenClasses.drawn(weights=(1.0, 0.5)), r"weights=\(1.0, 0.5\) must be two numbers above 0"),
        (lambda: TokenClasses.drawn(vocabulary=65), "vocabulary=65 must be a whole number, at least 66"),
        (lambda: ScanAndSnap(normalize=2), "normalize=2 must be True or False"),
        (lambda: ScanAndSnap().run(eta_y=-1.0), "eta_y=-1.0"),
        (lambda: ScanAndSnap().run(eta_z=float("inf")), "eta_z=inf must be in 0.."),
        (lambda: ScanAndSnap().run(steps=0), "steps=0"),
        (lambda: ScanAndSnap().run(context=0), "context=0"),
        (lambda: ScanAndSnap().run(batch=0), "batch=0"),
    ],
)
def test_bad_options_are_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_shares_under_attention_are_sound_for_large_scores() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    found = attended(p, torch.tensor([[900.0, 899.0, 2000.0]], dtype=torch.float64))
    assert_near(found, torch.tensor([[1.0, math.exp(-1), 0.0]], dtype=torch.float64) / (1 + math.exp(-1)), 1e-12)
