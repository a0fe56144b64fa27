"""Differential equations against their closed forms, scipy and torchdiffeq; each example has steps of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.errors import DivergedError, OptionError
from foveate.nn.parts.ode import ERROR, NODES, STAGES, solve_ode
from tests.support.tensors import assert_near

RATES = torch.tensor([[-1.0, 0.5], [-6.0, 2.0], [0.3, -3.0]], dtype=torch.float64)
START = torch.tensor([[1.0, -2.0], [0.5, 0.1], [3.0, 0.0]], dtype=torch.float64)


def driven(u: Tensor, y: Tensor) -> Tensor:
    return RATES[: len(y)] * y + torch.sin(5 * u)


def exact(rates: Tensor, start: Tensor) -> Tensor:
    """Return y(1) of `y' = r y + sin 5u`."""
    shift = 5 / (rates.square() + 25)
    return (start + shift) * rates.exp() - (rates * math.sin(5) + 5 * math.cos(5)) / (rates.square() + 25)


def test_the_tables_are_consistent() -> None:
    for node, weights in zip(NODES, STAGES, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-12)
    assert sum(ERROR) == pytest.approx(0, abs=1e-15)


def order(solver: str, steps: tuple[int, int]) -> float:
    errors = [(solve_ode(driven, START, solver, steps=n).value - exact(RATES, START)).abs().max() for n in steps]
    return math.log(errors[0] / errors[1], steps[1] / steps[0])


def test_fixed_steps_converge_at_their_order() -> None:
    assert order("euler", (64, 128)) == pytest.approx(1, abs=0.1)
    assert order("rk4", (16, 32)) == pytest.approx(4, abs=0.2)
    once = solve_ode(driven, START, "euler", steps=1)
    assert_near(once.value, START + driven(torch.zeros(3, 1).double(), START), 0)
    assert once.evaluations.tolist() == [1, 1, 1]
    assert solve_ode(driven, START, "rk4", steps=3).evaluations.tolist() == [12, 12, 12]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_adaptive_steps_keep_the_tolerance(tolerance: float) -> None:
    found = solve_ode(driven, START, rtol=tolerance, atol=tolerance)
    assert_near(found.value, exact(RATES, START), 3 * tolerance)


def test_narrower_tolerances_cost_more() -> None:
    counts = [solve_ode(driven, START, rtol=t, atol=t).evaluations for t in (1e-3, 1e-6, 1e-9)]
    assert (counts[0] < counts[1]).all()
    assert (counts[1] < counts[2]).all()


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_values_and_evaluations_are_those_of_scipy(tolerance: float) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    found = solve_ode(driven, START, rtol=tolerance, atol=tolerance)
    for i in range(3):

        def slope(u: float, y: np.ndarray, i: int = i) -> np.ndarray:
            return RATES[i].numpy() * y + math.sin(5 * u)

        theirs = integrate.solve_ivp(slope, (0, 1), START[i].numpy(), "RK45", rtol=tolerance, atol=tolerance)
        assert_near(found.value[i], torch.from_numpy(theirs.y[:, -1]), 1e-12)
        assert int(found.evaluations[i]) == theirs.nfev


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_values_are_those_of_torchdiffeq(tolerance: float) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    found = solve_ode(driven, START, rtol=tolerance, atol=tolerance).value
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    theirs = torchdiffeq.odeint(driven, START, span, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
    assert_near(found, theirs, 10 * tolerance)


def test_examples_have_steps_of_their_own() -> None:
    together = solve_ode(driven, START, rtol=1e-6, atol=1e-6)
    assert len(set(together.evaluations.tolist())) > 1
    for i in range(3):
        alone = solve_ode(lambda u, y, i=i: RATES[i] * y + torch.sin(5 * u), START[i : i + 1], rtol=1e-6, atol=1e-6)
        assert_near(alone.value[0], together.value[i], 1e-14)
        assert alone.evaluations[0] == together.evaluations[i]


def test_only_real_entries_choose_the_steps() -> None:
    real = torch.tensor([[True, False]] * 3)

    def slope(u: Tensor, y: Tensor) -> Tensor:
        wild = 40 * torch.cos(200 * u)
        return torch.cat([driven(u, y)[:, :1], wild.expand(len(y), 1)], -1)

    calm = solve_ode(lambda u, y: driven(u, torch.cat([y, y], -1))[:, :1], START[:, :1])
    found = solve_ode(slope, START, real=real)
    assert_near(found.value[:, :1], calm.value, 1e-14)
    assert torch.equal(found.evaluations, calm.evaluations)
    assert (solve_ode(slope, START).evaluations > calm.evaluations).all()


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_gradients_are_those_of_the_solution(solver: str) -> None:
    start, rates = START.clone().requires_grad_(), RATES.clone().requires_grad_()
    options = dict(rtol=1e-9, atol=1e-9, steps=64)
    ours = solve_ode(lambda u, y: rates * y + torch.sin(5 * u), start, solver, **options).value
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), (start, rates)),
        torch.autograd.grad(exact(rates, start).square().sum(), (start, rates)), strict=True,
    ):  # fmt: skip
        assert_near(mine, theirs, 1e-5)


def test_rejected_steps_leave_no_trace_in_gradients() -> None:
    """A step into a cliff meets slopes of inf, and is rejected; the gradient must not know of it."""
    start = torch.tensor([[1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    steepness, met_inf = torch.tensor([[1000.0], [300.0]], dtype=torch.float64), []

    def slope(u: Tensor, y: Tensor) -> Tensor:
        fall = -torch.where(u > 0.5, steepness, 0.0) * y
        out = fall * torch.where(y.abs() > 1.5, float("inf"), 1.0)
        met_inf.append(not out.isfinite().all())
        return out

    found = solve_ode(slope, start, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(found.value.sum(), start)
    assert any(met_inf)
    assert_near(found.value, torch.zeros(2, 1).double(), 1e-3)
    assert_near(grad, torch.zeros(2, 1).double(), 1e-3)


def test_nan_stays_in_its_example() -> None:
    start = START.clone()
    start[1, 0] = float("nan")
    found = solve_ode(driven, start)
    assert found.value[1, 0].isnan()
    assert_near(found.value[[0, 2]], solve_ode(driven, START).value[[0, 2]], 0)


def test_what_has_no_end_is_refused() -> None:
    with pytest.raises(DivergedError, match="did not reach the end in 1000 steps"):
        solve_ode(lambda u, y: y.square(), torch.tensor([[2.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_change_and_no_entries(dtype: torch.dtype) -> None:
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for solver in ("dopri5", "rk4", "euler"):
        assert torch.equal(solve_ode(lambda u, y: torch.zeros_like(y), start, solver).value, start)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert solve_ode(lambda u, y: 0 * y, start, real=nothing).value.isfinite().all()


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(solver="heun"), "solver='heun' must be one of 'dopri5', 'rk4', 'euler'"), (dict(steps=0), "steps=0"),
        (dict(rtol=0.0), "rtol=0.0 must be a number above 0"), (dict(atol=-1), "atol=-1"),
        (dict(rtol=True), "rtol=True"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        solve_ode(driven, START, **options)
