"""Distribution functions: their definitions, and their gradients in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.ops.functional.normalizers import DISTRIBUTIONS, LocalWindow, argmax, entmax, sample, sparsemax
from tests.support.tensors import assert_near

INF = float("inf")
ALPHAS = (1, 1.2, 1.5, 1.75, 2, 3)


def rows(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_entmax_is_what_it_is_defined_to_be(alpha: float, spread: float) -> None:
    """p is a distribution, and p ** (alpha - 1) - (alpha - 1) z is constant on its support and maximal there."""
    z = rows(40, 9, spread=spread)
    p = entmax(z, alpha)
    assert (p >= 0).all()
    assert_near(p.sum(-1), torch.ones(40, dtype=torch.float64), 1e-12)
    if alpha == 1:
        assert_near(p, z.exp() / z.exp().sum(-1, keepdim=True), 1e-12)
        return
    level = (alpha - 1) * z - p ** (alpha - 1)
    tau = torch.where(p > 0, level, 0).sum(-1) / (p > 0).sum(-1)
    assert_near(torch.where(p > 0, level - tau[:, None], 0), torch.zeros_like(p), 1e-9)
    assert ((alpha - 1) * z - tau[:, None])[p == 0].max(-1).values <= 1e-12 if (p == 0).any() else spread < 1


def test_entmax_by_hand() -> None:
    z = torch.tensor([1.0, 0.8, 0.1, -3.0], dtype=torch.float64)
    assert_near(sparsemax(z), torch.tensor([0.6, 0.4, 0, 0], dtype=torch.float64), 1e-12)
    two = torch.tensor([0.4, 0.0], dtype=torch.float64)  # sqrt(p) = x - tau with x = (0.2, 0): 2 tau^2 - 0.4 tau = 0.96
    tau = (0.2 - math.sqrt(0.04 - 2 * (0.04 - 1))) / 2
    assert_near(entmax(two), torch.tensor([(0.2 - tau) ** 2, tau**2], dtype=torch.float64), 1e-12)
    assert torch.equal(sparsemax(torch.tensor([5.0, 5.0, 5.0, 5.0])), torch.full((4,), 0.25))
    assert torch.equal(entmax(z), entmax(z, 1.5))


def test_larger_alpha_is_sparser() -> None:
    z = rows(50, 20)
    support = [(entmax(z, alpha) > 0).double().mean().item() for alpha in ALPHAS]
    assert support[0] == 1
    assert all(one > other for one, other in itertools.pairwise(support))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_sorting_and_bisecting_agree(alpha: float) -> None:
    z = rows(30, 12)
    for near in (alpha - 1e-7, alpha + 1e-7):
        assert_near(entmax(z, near), entmax(z, alpha), 1e-5)
    assert_near(entmax(z.float(), alpha - 1e-4), entmax(z, alpha - 1e-4), 1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients(alpha: float) -> None:
    z = rows(6, 5, spread=1.0)
    z[0, 1] = z[2, :3] = z[3] = -INF
    z[4, 0] = 40.0  # all weight on one key
    seen = z > -INF
    leaf = z.masked_fill(~seen, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entmax(x.masked_fill(~seen, -INF), alpha), leaf)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_hidden_keys_have_no_weight_and_no_effect(alpha: float) -> None:
    z = rows(4, 6, 5)
    z[..., 2] = z[1, 2, :3] = z[2, 3] = -INF
    leaf = z.clone().requires_grad_()
    p = entmax(leaf, alpha)
    assert not p[z == -INF].any()
    assert not p[2, 3].any()
    left = torch.tensor([0, 1, 3, 4])
    assert_near(p[0][:, left], entmax(z[0][:, left], alpha), 1e-10)
    (grad,) = torch.autograd.grad((p * rows(4, 6, 5, seed=1)).sum(), leaf)
    assert grad.isfinite().all()
    assert not grad[z == -INF].any()
    assert grad[0].any()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_types(alpha: float, dtype: torch.dtype) -> None:
    z = rows(20, 16).to(dtype).requires_grad_()
    p = entmax(z, alpha)
    assert p.dtype == dtype
    assert_near(p, entmax(z.double(), alpha), 0.01 if dtype == torch.bfloat16 else 1e-5)
    (grad,) = torch.autograd.grad(p[:, 0].sum(), z)
    assert grad.dtype == dtype
    huge = entmax((1e30 * z.detach().float()).to(dtype), alpha)
    assert huge.isfinite().all()
    assert_near(huge.sum(-1), torch.ones(20, dtype=dtype), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, INF, float("nan"), "two", True])
def test_a_bad_alpha_is_refused(alpha: object) -> None:
    with pytest.raises(OptionError, match="alpha="):
        entmax(torch.zeros(3), alpha)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_that_see_nothing_are_zeros(name: str) -> None:
    z = rows(3, 5)
    z[1], z[0, 0] = -INF, -INF
    p = DISTRIBUTIONS[name](z)
    assert not p[1].any()
    assert not p[0, 0]
    assert p[0].any() and p[2].any()


def test_the_names() -> None:
    z = rows(3, 5)
    assert_near(DISTRIBUTIONS["softmax"](z), torch.softmax(z, -1), 1e-12)
    assert_near(DISTRIBUTIONS["sigmoid"](z), 1 / (1 + (-z).exp()), 1e-12)
    assert torch.equal(DISTRIBUTIONS["sparsemax"](z), entmax(z, 2))
    assert torch.equal(DISTRIBUTIONS["argmax"](z), argmax(z))


def test_argmax() -> None:
    z = torch.tensor([[0.0, 3.0, 3.0], [2.0, -INF, 1.0]])
    assert argmax(z).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert argmax(z.bfloat16()).dtype == torch.bfloat16


def test_a_sample_inverts_the_cumulative_softmax() -> None:
    z = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    for number, key in ((0.0, 0), (0.099, 0), (0.11, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.9999999, 3)):
        assert sample(z[None], torch.tensor([number])).tolist() == [[float(j == key) for j in range(4)]], number
    z = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF], [-INF] * 5])
    for number, key in ((0.0, 1), (0.49, 1), (0.5, 3), (1 - 2**-24, 3)):
        assert sample(z, torch.full((2,), number)).tolist() == [[float(j == key) for j in range(5)], [0.0] * 5]


def test_samples_follow_the_softmax() -> None:
    z = rows(5)
    drawn = sample(z.expand(20000, 5), torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    assert (drawn.sum(-1) == 1).all()
    assert (drawn.mean(0) - torch.softmax(z, -1)).abs().sum() / 2 < 0.01
    assert not sample(z.expand(2, 5).requires_grad_(), torch.zeros(2)).requires_grad


# -- the local window --------------------------------------------------------------------------------------------------


def window(**options) -> LocalWindow:
    found = LocalWindow(2, 3, **{"window": 2, **options}).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found.w.normal_(generator=random)
        found.v.normal_(generator=random)
    return found


def test_the_window_by_hand() -> None:
    local, q = window(window=2, sigma=0.7), rows(2, 2, 4, 3, seed=3)
    seen = torch.tensor([7, 8, 9, 9])
    centre, z = local.centre(q, seen), rows(2, 2, 4, 9, seed=4)
    cut = local.cut(z, centre, torch.arange(9))
    dampened = local.dampen(torch.ones_like(z), centre, torch.arange(9))
    inside = 0
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(4)).tolist():
        p = seen[i].item() / (1 + math.exp(-torch.dot(local.v[h], torch.tanh(local.w[h] @ q[b, h, i])).item()))
        assert abs(centre[b, h, i].item() - p) < 1e-12
        for s in range(9):
            near = abs(s - p) <= 2
            inside += near
            assert cut[b, h, i, s] == (z[b, h, i, s] if near else -INF)
            assert abs(dampened[b, h, i, s].item() - math.exp(-((s - p) ** 2) / (2 * 0.7**2))) < 1e-12
    assert 40 < inside < 100


def test_window_options() -> None:
    assert window(window=3).sigma == 1.5
    endless = window(window=INF)
    z, centre = rows(1, 2, 3, 9), torch.zeros(1, 2, 3, dtype=torch.float64)
    assert torch.equal(endless.cut(z, centre, torch.arange(9)), z)
    assert torch.equal(endless.dampen(z, centre, torch.arange(9)), z)
    edge = window(window=2).cut(torch.zeros(1, 1, 1, 9), torch.full((1, 1, 1), 4.0), torch.arange(9))
    assert (edge == 0).flatten().nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    for options, message in (
        ({"window": 0.5}, "window=0.5"),
        ({"window": "all"}, "window='all'"),
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": float("nan")}, "sigma=nan"),
    ):
        with pytest.raises(OptionError, match=message):
            window(**options)
    for heads, width, message in ((0, 3, "heads=0"), (2, 0, "head_dim=0")):
        with pytest.raises(OptionError, match=message):
            LocalWindow(heads, width, 2)


def test_window_weights_start_as_linear_layers_do() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        local = LocalWindow(8, 64, 2)
    for weight in (local.w, local.v):
        assert weight.abs().max() <= 1 / 8
        assert 0.9 < weight.std().item() * 8 * math.sqrt(3) < 1.1
