"""Planar problems with exact solvers: convex hulls and shortest tours.

Pointer Networks (2015) learns these problems.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError

#: The most points that `shortest_tour` takes; its table doubles with each point.
MAX_TOUR = 12


def planar_batch(
    problem: Literal["hull", "tour", "sort"], count: int, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "b n c"], Int[Tensor, "b s"]]:
    """Draw problems and solve them; the answers are positions in the input.

    "hull": n points, uniform in the unit square; the answer holds the hull's corners, then n (stop), then -1. "tour":
    the same points; the shortest tour. "sort": n numbers (C = 1); their ascending order.
    """
    validate.one_of("problem", problem, ("hull", "tour", "sort"))
    validate.count("count", count, 1)
    validate.count("n", n, 3 if problem == "hull" else 1)
    points = torch.rand(count, n, 1 if problem == "sort" else 2, generator=generator)
    if problem == "sort":
        return points, points[..., 0].argsort(-1)
    if problem == "tour":
        return points, torch.tensor([shortest_tour(each) for each in points])
    answers = torch.full((count, n + 1), -1)
    for row, each in zip(answers, points, strict=True):
        hull = [*convex_hull(each), n]
        row[: len(hull)] = torch.tensor(hull)
    return points, answers


def convex_hull(points: Float[Tensor, "n 2"]) -> list[int]:
    """Return the hull's corners, counter-clockwise from the lowest index. Points on an edge are no corners."""
    at = points.double().tolist()
    order = sorted(range(len(at)), key=lambda i: at[i])

    def half(indices: list[int]) -> list[int]:
        chain: list[int] = []
        for i in indices:
            while len(chain) > 1 and _turn(at[chain[-2]], at[chain[-1]], at[i]) <= 0:
                chain.pop()
            chain.append(i)
        return chain[:-1]

    hull = half(order) + half(order[::-1]) or order[:1]
    start = hull.index(min(hull))
    return hull[start:] + hull[:start]


def _turn(a: list[float], b: list[float], c: list[float]) -> float:
    """Return twice the signed area of the triangle: above 0 if a, b, c turn left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def shortest_tour(points: Float[Tensor, "n 2"]) -> list[int]:
    """Return the shortest closed tour from point 0, by Held and Karp's dynamic programming.

    Of the two directions it takes the one whose second point has the lower index.
    """
    n = len(points)
    if n > MAX_TOUR:
        raise OptionError(f"points={n} must be at most {MAX_TOUR} for an exact tour")
    if n < 3:
        return list(range(n))
    far = torch.cdist(points.double(), points.double()).tolist()
    best = {(frozenset([j]), j): (far[0][j], 0) for j in range(1, n)}
    for size in range(2, n):
        for some in map(frozenset, combinations(range(1, n), size)):
            for j in some:
                rest = some - {j}
                best[some, j] = min((best[rest, i][0] + far[i][j], i) for i in rest)
    left = frozenset(range(1, n))
    end = min(left, key=lambda j: best[left, j][0] + far[j][0])
    tour = [end]
    while len(tour) < n - 1:
        before = best[left, end][1]
        left, end = left - {end}, before
        tour.append(end)
    return [0, *(tour if tour[0] < tour[-1] else tour[::-1])]


def tour_length(points: Float[Tensor, "n 2"], tour: list[int]) -> float:
    """Return the length of the closed tour."""
    path = points[tour]
    return (path - path.roll(-1, 0)).norm(dim=-1).sum().item()
