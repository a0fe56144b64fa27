"""Initial value problems `dy/du = f(u, y)` on 0..1: differentiable, and each example with steps of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import DivergedError, OptionError, shown

Solver = Literal["dopri5", "rk4", "euler"]
Slope = Callable[[Tensor, Tensor], Tensor]

#: The pair of Dormand and Prince (1980): the nodes after the first, how each stage adds up the slopes before it (the
#: last stage is the solution of fifth order), and the difference of the solutions of fifth and fourth order.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

SAFETY, LEAST_FACTOR, LARGEST_FACTOR, MOST_ATTEMPTS = 0.9, 0.2, 10.0, 1000


class Solved(NamedTuple):
    """The solution at u = 1, and how many evaluations of the slope each example took."""

    value: Float[Tensor, "b n"]
    evaluations: Int[Tensor, " b"]


class Tolerance(NamedTuple):
    """The error that a step may have: `absolute + relative * |y|`, as a root mean square over the real entries."""

    relative: float
    absolute: float
    real: Bool[Tensor, "b n"]

    def ratio(self, error: Tensor, *sizes: Tensor) -> Float[Tensor, "b 1"]:
        """Return the error of each example relative to what it may be at the largest of these sizes."""
        largest = torch.stack([size.abs() for size in sizes]).amax(0)
        share = (error / (self.absolute + self.relative * largest)).masked_fill(~self.real, 0.0)
        return (share.square().sum(-1, keepdim=True) / self.real.sum(-1, keepdim=True).clamp(min=1)).sqrt()


def solve_ode(
    slope: Slope, start: Float[Tensor, "b n"], solver: Solver = "dopri5", *, rtol: float = 1e-3, atol: float = 1e-3,
    steps: int = 4, real: Bool[Tensor, "b n"] | None = None,
) -> Solved:  # fmt: skip
    """Return `y(1)` where `dy/du = slope(u, y)` and `y(0) = start`.

    Gradients pass through the steps; the sizes of steps are constants to them.

    Args:
        slope: f, from u `(B, 1)` and y `(B, N)` to `(B, N)`. Examples may not mix in it.
        start: y(0).
        solver: "dopri5" adapts its steps to the tolerance, for each example apart (the pair of Dormand and Prince, with
            the first step and the control of Hairer, Norsett and Wanner, as in scipy's RK45). "rk4" (the classic one)
            and "euler" take equal steps.
        rtol, atol: relative and absolute tolerance of "dopri5".
        steps: steps of "rk4" and "euler", of 4 evaluations and 1.
        real: the entries whose error counts; None for all.

    Raises:
        OptionError: an option out of range.
        DivergedError: "dopri5" took 1,000 steps without reaching the end.
    """
    check_options(solver, rtol, atol, steps)
    if solver != "dopri5":
        return _fixed(slope, start, solver, steps)
    real = torch.ones_like(start, dtype=torch.bool) if real is None else real
    return _adaptive(slope, start, Tolerance(rtol, atol, real))


def check_options(solver: str, rtol: float, atol: float, steps: int) -> None:
    """Refuse options that `solve_ode` does not have."""
    validate.one_of("solver", solver, ("dopri5", "rk4", "euler"))
    validate.count("steps", steps, 1)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not value > 0:
            raise OptionError(f"{name}={shown(value)} must be a number above 0")


def _fixed(slope: Slope, start: Tensor, solver: Solver, steps: int) -> Solved:
    y, u, h = start, start.new_zeros(len(start), 1), 1 / steps
    for step in range(steps):
        y = y + h * (slope(u + step * h, y) if solver == "euler" else _mean_slope(slope, u + step * h, y, h))
    evaluations = steps * (1 if solver == "euler" else 4)
    return Solved(y, torch.full((len(start),), evaluations, device=start.device))


def _mean_slope(slope: Slope, u: Tensor, y: Tensor, h: float) -> Tensor:
    """Return the slope that the classic method of Runge and Kutta takes over a step."""
    first = slope(u, y)
    second = slope(u + h / 2, y + h / 2 * first)
    third = slope(u + h / 2, y + h / 2 * second)
    fourth = slope(u + h, y + h * third)
    return (first + 2 * second + 2 * third + fourth) / 6


def _adaptive(slope: Slope, start: Tensor, tolerance: Tolerance) -> Solved:
    y, u = start, start.new_zeros(len(start), 1)
    first = slope(u, y)
    h, again = _first_step(slope, y, first, tolerance), torch.zeros_like(u, dtype=torch.bool)
    evaluations = torch.full((len(start),), 2, device=start.device)
    for _ in range(MOST_ATTEMPTS):
        left = 1 - u
        running = left > 0
        if not running.any():
            return Solved(y, evaluations)
        finite = first.isfinite().all(-1, keepdim=True)  # no step size helps an example with NaN or inf
        h = torch.where(finite, torch.minimum(h, left), left)
        step = _attempt(slope, u, y, first, h)
        with torch.no_grad():
            ratio = tolerance.ratio(step.error, y, step.value)
        good = (ratio < 1) | ~finite
        if not good.all():  # taken again, so that what a rejected step computed is in no gradient
            step = _attempt(slope, u, y, first, torch.where(good, h, 0.0))
        y, first = step.value, step.slope
        u = torch.where(good, torch.where(h >= left, 1.0, u + h), u)
        evaluations = evaluations + len(NODES) * running[:, 0]
        factor = (SAFETY * ratio**-0.2).nan_to_num(nan=LEAST_FACTOR).clamp(LEAST_FACTOR, LARGEST_FACTOR)
        h = h * torch.where(again & good, factor.clamp(max=1.0), factor)
        again = ~good
    raise DivergedError(f'solver="dopri5" did not reach the end in {MOST_ATTEMPTS} steps; "rk4" takes equal steps')


@torch.no_grad()
def _first_step(slope: Slope, y: Tensor, first: Tensor, tolerance: Tolerance) -> Float[Tensor, "b 1"]:
    """Return a first step at which the solution bends little, from one evaluation more."""
    size, speed = tolerance.ratio(y, y), tolerance.ratio(first, y)
    probe = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1.0)
    bend = tolerance.ratio(slope(probe, y + probe * first) - first, y) / probe
    fastest = torch.maximum(speed, bend)
    step = torch.where(fastest <= 1e-15, (1e-3 * probe).clamp(min=1e-6), (0.01 / fastest) ** 0.2)
    return torch.minimum(100 * probe, step).clamp(max=1.0)


class _Step(NamedTuple):
    value: Tensor
    slope: Tensor
    error: Tensor


def _attempt(slope: Slope, u: Tensor, y: Tensor, first: Tensor, h: Tensor) -> _Step:
    """Take a step of h `(B, 1)` from y, where the slope is `first`; a step of 0 stays there."""
    slopes, value = [first], y
    for node, weights in zip(NODES, STAGES, strict=True):
        value = y + h * _sum(weights, slopes)
        slopes.append(slope(u + node * h, value))
    return _Step(value, slopes[-1], h * _sum(ERROR, slopes))


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, each in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * each if weight else total
    return total
