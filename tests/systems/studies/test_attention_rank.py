"""Rank against heads: the nearest-point task, heads of any rank, the arcsine kernel, and trained layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.core.errors import OptionError, ShapeError
from foveate.studies.attention_rank.nearest_point import NearestPointTask, farthest, nearest, on_sphere
from foveate.studies.attention_rank.random_heads import (
    RandomHeads,
    draw_vectors,
    error_curve,
    expected_error,
    head_agreement,
    target_agreement,
)
from foveate.studies.attention_rank.rank_attention import RankAttention
from foveate.studies.attention_rank.rank_curve import mean_error, rank_curve
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unif", "ortho", "doubled"])
def test_targets_are_the_nearest_points(mode: str) -> None:
    x, y, target = NearestPointTask(6, 5, queries=3, mode=mode).batch(50, seeded(), dtype=torch.float64)
    n = 10 if mode == "doubled" else 5
    assert x.shape == (50, n, 6) and y.shape == target.shape == (50, 3, 6)
    for points in (x, y, target):
        assert_near(points.norm(dim=-1), torch.ones(points.shape[:2], dtype=torch.float64), 1e-12)
    closest = torch.cdist(y, x).argmin(-1)
    for row in range(50):
        assert torch.equal(target[row], x[row][closest[row]])
    if mode == "doubled":
        assert torch.equal(x[:, 5:], -x[:, :5])
    if mode == "ortho":
        assert_near(x @ x.mT, torch.eye(5, dtype=torch.float64).expand(50, -1, -1), 1e-12)


def test_without_queries_points_ask_for_the_farthest_one() -> None:
    x, y, target = NearestPointTask(6, 5).batch(50, seeded())
    assert y is x
    away = torch.cdist(x, x).argmax(-1)
    for row in range(50):
        assert torch.equal(target[row], x[row][away[row]])
        assert not any(torch.equal(a, b) for a, b in zip(target[row], x[row], strict=True))


def test_orthonormal_points_are_uniform_rotations() -> None:
    x = NearestPointTask(3, 2, queries=1, mode="ortho").batch(20_000, seeded(), dtype=torch.float64).x
    assert x.mean(0).abs().max() < 0.02  # without the signs, the first coordinates would all be negative
    assert_near(x.square().mean(0), torch.full((2, 3), 1 / 3, dtype=torch.float64), 0.02)


def test_a_task_draws_from_its_generator() -> None:
    task = NearestPointTask(4, 3, queries=2)
    assert torch.equal(task.batch(5, seeded(1)).x, task.batch(5, seeded(1)).x)
    assert not torch.equal(task.batch(5, seeded(1)).x, task.batch(5, seeded(2)).x)


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_one_head_of_full_rank_is_exact(claim: ClaimFixture) -> None:
    for mode in ("unif", "ortho", "doubled"):
        task = NearestPointTask(16, 8, queries=3, mode=mode)
        assert mean_error(RankAttention.full_rank(16).double(), task, 1000, seeded()) == 0
        assert mean_error(RankAttention.full_rank(16, farthest=True).double(), task, 200, seeded()) > 1
    points = NearestPointTask(16, 8)
    assert mean_error(RankAttention.full_rank(16, farthest=True).double(), points, 1000, seeded()) == 0
    task = NearestPointTask(16, 8, queries=3)
    soft = [RankAttention.full_rank(16, temperature=t).double() for t in (1e-3, 1.0)]
    near, warm = (mean_error(net, task, 1000, seeded()) for net in soft)
    assert near < 0.01
    low = RankAttention.of_vectors(*draw_vectors(16, 16, seeded()), torch.full((16,), 1 / 16))
    claim(
        "one head of full rank finds the nearest of 8 points in 16 dimensions: squared error, softmax at a temperature "
        "of 0.001",
        ours=near, baseline=mean_error(low, task, 1000, seeded()), better="lower", margin=0.3,
        baseline_name="16 random hard heads of rank 1", seed=0,
    )  # fmt: skip
    assert warm > 0.3


@pytest.mark.parametrize("hard", [False, True])
def test_the_layer_is_its_formula(hard: bool) -> None:
    net = RankAttention(5, 2, 3, hard=hard, generator=seeded()).double()
    x, y, _ = NearestPointTask(5, 4, queries=2).batch(2, seeded(), dtype=torch.float64)
    out = net(x, y)
    for b in range(2):
        for m in range(2):
            expected = torch.zeros(5, dtype=torch.float64)
            for h in range(3):
                scores = torch.stack([(net.q[h] @ y[b, m]) @ (net.k[h] @ x[b, i]) / math.sqrt(2) for i in range(4)])
                alpha = F.one_hot(scores.argmax(), 4).double() if hard else scores.softmax(0)
                expected = expected + net.vo[h] @ (alpha @ x[b])
            assert_near(out[b, m], expected, 1e-12)


def test_a_head_of_full_rank_is_standard_attention() -> None:
    net = RankAttention(6, 6, 1, generator=seeded()).double()
    v, o = torch.randn(2, 6, 6, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        net.vo.copy_((o @ v)[None])
    x, y, _ = NearestPointTask(6, 7, queries=3).batch(4, seeded(), dtype=torch.float64)
    q, k, values = y @ net.q[0].mT, x @ net.k[0].mT, x @ v.mT
    expected = foveate.attend(q[:, None], k[:, None], values[:, None], "softmax")[:, 0] @ o.mT
    assert_near(net(x, y), expected, 1e-10)


def test_hard_attention_is_the_limit_of_soft_attention() -> None:
    hard, soft = (RankAttention(4, 2, 3, hard=hard, scale=scale, generator=seeded()) for hard, scale in
                  ((True, 1.0), (False, 1e5)))  # fmt: skip
    x, y, _ = NearestPointTask(4, 5, queries=3).batch(20, seeded())
    assert_near(hard(x, y), soft(x, y), 1e-3)


def test_initial_weights_have_the_published_ranges() -> None:
    net = RankAttention(8, 2, 64, generator=seeded())
    for weight, bound in ((net.q, math.sqrt(6 / 10)), (net.k, math.sqrt(6 / 10)), (net.vo, math.sqrt(6 / (65 * 8)))):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 0.05 * bound


# -- random heads on two points ----------------------------------------------------------------------------------------


def picks(q: Tensor, k: Tensor, draws: int = 60_000) -> tuple[Tensor, Tensor]:
    """Return True where heads, and the target, choose the first of two points, on drawn points: `(draws, H)`."""
    x, y, target = NearestPointTask(q.shape[1], 2, queries=1).batch(draws, seeded(7), dtype=torch.float64)
    return (y[:, 0] @ q.mT) * ((x[:, 0] - x[:, 1]) @ k.mT) > 0, (target[:, 0] == x[:, 0]).all(-1)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_agreement_is_that_of_drawn_points(dim: int) -> None:
    q, k = draw_vectors(dim, 12, seeded(3))
    heads, target = picks(q, k)
    shares = torch.stack([(heads == heads[:, [i]]).double().mean(0) for i in range(12)])
    assert_near(head_agreement(q, k), shares, 0.01)
    assert_near(target_agreement(q, k), (heads == target[:, None]).double().mean(0), 0.01)


def test_agreement_has_its_known_values() -> None:
    q, k = draw_vectors(5, 6, seeded())
    assert_near(head_agreement(q, k).diagonal(), torch.ones(6, dtype=torch.float64), 1e-6)
    assert_near(target_agreement(q, k) + target_agreement(q, -k), torch.ones(6, dtype=torch.float64), 1e-10)
    e = torch.eye(3, dtype=torch.float64)
    # with q = k in three dimensions, E|asin t| over t in -1..1 is π/2 - 1
    assert_near(target_agreement(e[:2], e[:2]), torch.full((2,), 1 - 1 / math.pi, dtype=torch.float64), 1e-6)
    assert_near(target_agreement(e[:1], e[1:2]), torch.full((1,), 0.5, dtype=torch.float64), 1e-12)
    # two dimensions are the limit of the formula for more: a small integral against the quadratic
    angles = torch.linspace(0.1, 3.0, 8, dtype=torch.float64)
    plane = torch.stack([angles.cos(), angles.sin()], 1)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(8, 2)
    grid = torch.arange(20_000, dtype=torch.float64) * (2 * math.pi / 20_000)
    w = torch.stack([grid.cos(), grid.sin()], 1)
    mean = ((w @ plane.mT).sign() * (w @ first.mT).clamp(-1, 1).asin()).mean(0) / math.pi
    assert_near(target_agreement(first, plane), 0.5 + mean, 1e-3)


def test_agreement_in_three_dimensions_is_an_integral_over_the_sphere() -> None:
    number = torch.arange(200_000, dtype=torch.float64) + 0.5  # a spiral whose points cover equal areas
    z, turn = 1 - number / 100_000, number * math.pi * (1 + math.sqrt(5))
    w = torch.stack([turn.cos() * (1 - z**2).sqrt(), turn.sin() * (1 - z**2).sqrt(), z], 1)
    q, k = draw_vectors(3, 20, seeded(4))
    mean = ((w @ k.mT).sign() * (w @ q.mT).clamp(-1, 1).asin()).mean(0) / math.pi
    assert_near(target_agreement(q, k), 0.5 + mean, 2e-4)


def test_weights_minimise_the_error_and_the_layer_has_it() -> None:
    heads = RandomHeads.drawn(4, 20, seeded())
    agreement, target = head_agreement(heads.q, heads.k), target_agreement(heads.q, heads.k)
    assert_near(agreement @ heads.a, target, 1e-9)
    for seed in range(5):
        moved = heads.a + 0.1 * torch.randn(20, generator=seeded(seed), dtype=torch.float64)
        assert expected_error(moved, agreement, target) > heads.error
    task = NearestPointTask(4, 2, queries=1)
    assert mean_error(heads.module(), task, 40_000, seeded(1)) == pytest.approx(heads.error, abs=0.02)
    ortho = NearestPointTask(4, 2, queries=1, mode="ortho")
    assert mean_error(heads.module(), ortho, 40_000, seeded(1)) == pytest.approx(heads.error, abs=0.02)


def test_the_curve_of_errors_falls_and_ends_at_the_fit() -> None:
    q, k = draw_vectors(4, 30, seeded())
    curve = error_curve(q, k)
    assert (curve.diff() <= 1e-12).all()
    for heads in (1, 7, 30):
        assert curve[heads - 1].item() == pytest.approx(RandomHeads.fitted(q[:heads], k[:heads]).error, abs=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 5, 16])
def test_heads_at_equal_angles_have_a_closed_form(heads: int) -> None:
    net = RankAttention.spaced(heads)
    q, a = net.q.detach()[:, 0], torch.full((heads,), 1 / heads, dtype=torch.float64)
    found = expected_error(a, head_agreement(q, q), target_agreement(q, q)).item()
    assert found == pytest.approx(1 / 6 + 1 / (3 * heads**2), abs=1e-9)
    task = NearestPointTask(2, 2, queries=1)
    assert mean_error(net, task, 20_000, seeded()) == pytest.approx(found, abs=0.025)


def test_low_rank_is_a_curse_in_high_dimension_only(claim: ClaimFixture) -> None:
    high = [RandomHeads.drawn(8, 64, seeded(seed)).error for seed in range(5)]
    plane = [RandomHeads.drawn(2, 16, seeded(seed)).error for seed in range(5)]
    assert min(high) > 0.35
    assert sorted(plane)[2] < 0.2
    claim(
        "16 random heads of rank 1 do well in 2 dimensions, and 64 do not in 8: squared error with the best weights",
        ours=sorted(plane)[2], baseline=sorted(high)[2], better="lower", margin=0.15,
        baseline_name="64 heads in 8 dimensions", seed=0,
    )  # fmt: skip


# -- training ----------------------------------------------------------------------------------------------------------


def test_trained_layers_err_less_at_a_higher_rank(claim: ClaimFixture) -> None:
    low, full = rank_curve(NearestPointTask(8, 4), (1, 8), 8, steps=250, batch=64, rate=0.05, generator=seeded())
    assert (low.heads, full.heads) == (8, 1)
    claim(
        "at equal rank times heads a trained layer errs less with a higher rank: squared error, 4 points, d = 8",
        ours=full.error, baseline=0.8 * low.error, better="lower", baseline_name="8 heads of rank 1, less a fifth",
        seed=0,
    )  # fmt: skip


def test_a_curve_trains_each_rank_from_its_generator() -> None:
    task = NearestPointTask(4, 3)
    first = rank_curve(task, (1, 2, 4), 4, steps=3, batch=8, generator=seeded())
    assert [(each.rank, each.heads) for each in first] == [(1, 4), (2, 2), (4, 1)]
    assert rank_curve(task, (1, 2, 4), 4, steps=3, batch=8, generator=seeded()) == first
    assert all(0 < each.error < 2 for each in first)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NearestPointTask(0), "dim=0"),
        (lambda: NearestPointTask(4, 0), "n=0"),
        (lambda: NearestPointTask(4, 2, queries=0), "queries=0"),
        (lambda: NearestPointTask(4, 2, mode="near"), "mode='near' must be one of 'unif', 'ortho', 'doubled'"),
        (lambda: NearestPointTask(4, 5, queries=1, mode="ortho"), "n=5 must be at most dim=4"),
        (lambda: NearestPointTask(4, 2, mode="ortho"), "queries=None must be a number with mode='ortho'"),
        (lambda: NearestPointTask(4, 2).batch(0), "size=0"),
        (lambda: RankAttention(4, 0, 1), "rank=0"),
        (lambda: RankAttention(4, 1, 1, scale=float("inf")), "scale=inf"),
        (lambda: RankAttention(4, 1, 1, head=2), 'has no option "head"; did you mean "heads"'),
        (lambda: RankAttention.full_rank(4, temperature=-1.0), "temperature=-1.0"),
        (lambda: draw_vectors(1, 4), "dim=1"),
        (lambda: draw_vectors(2, 0), "heads=0"),
        (lambda: rank_curve(NearestPointTask(4), (3,), 8), r"r_times_h=8 must be a multiple of every rank"),
        (lambda: rank_curve(NearestPointTask(4), (2,), 8, steps=0), "steps=0"),
    ],
)
def test_bad_options_are_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_bad_shapes_are_refused() -> None:
    net = RankAttention(4, 1, 1)
    with pytest.raises(ShapeError, match=r"x must be \(B, N, 4\) with B=2; got \(2, 3, 5\)"):
        net(torch.zeros(2, 3, 5), torch.zeros(2, 1, 4))
    with pytest.raises(ShapeError, match=r"y must be \(B, N, 4\) with B=2; got \(1, 3, 4\)"):
        net(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ShapeError, match="q and k must be"):
        error_curve(torch.ones(3, 4), torch.ones(3, 5))


def test_functions_take_points_alone() -> None:
    x = on_sphere(2, 5, 3, generator=seeded())
    assert torch.equal(nearest(x, -x), farthest(x, x))
