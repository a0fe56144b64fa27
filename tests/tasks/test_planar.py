"""Exact hulls and tours agree with brute force and scipy."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.spatial import ConvexHull

from foveate.core.errors import OptionError
from foveate.tasks.training.planar import convex_hull, planar_batch, shortest_tour, tour_length


def points(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [3, 4, 5, 9, 30])
def test_hulls_agree_with_scipy(n: int) -> None:
    for seed in range(10):
        at = points(n, seed)
        theirs = ConvexHull(at.numpy()).vertices.tolist()  # counter-clockwise in the plane
        first = theirs.index(min(theirs))
        assert convex_hull(at) == theirs[first:] + theirs[:first]


def test_hulls_of_few_or_collinear_points() -> None:
    assert convex_hull(torch.tensor([[0.5, 0.5]])) == [0]
    assert convex_hull(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == [0, 1]
    line = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
    assert convex_hull(line) == [1, 2], "what lies on an edge is no corner"


@pytest.mark.parametrize("n", [3, 4, 5, 7])
def test_tours_agree_with_brute_force(n: int) -> None:
    for seed in range(5):
        at = points(n, seed)
        lengths = {order: tour_length(at, [0, *order]) for order in permutations(range(1, n))}
        best = min(lengths.values())
        tour = shortest_tour(at)
        assert sorted(tour) == list(range(n))
        assert tour[0] == 0
        assert abs(tour_length(at, tour) - best) < 1e-5
        assert tour[1] < tour[-1]


def test_a_long_tour_is_no_longer_than_random_ones() -> None:
    at, random = points(9, 0), torch.Generator().manual_seed(1)
    ours = tour_length(at, shortest_tour(at))
    assert all(ours <= tour_length(at, torch.randperm(9, generator=random).tolist()) + 1e-6 for _ in range(2000))


def test_tours_of_few_points() -> None:
    assert [shortest_tour(points(n, 0)) for n in (1, 2)] == [[0], [0, 1]]
    assert len(shortest_tour(points(12, 0))) == 12
    square = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert shortest_tour(square) == [0, 2, 1, 3]
    assert tour_length(square, [0, 2, 1, 3]) == 4
    with pytest.raises(OptionError, match="points=13 must be at most 12"):
        shortest_tour(points(13, 0))


def test_batches_hold_the_solvers_answers() -> None:
    at, hulls = planar_batch("hull", 20, 6, torch.Generator().manual_seed(0))
    assert at.shape == (20, 6, 2)
    assert hulls.shape == (20, 7)
    for each, answer in zip(at, hulls.tolist(), strict=True):
        hull = convex_hull(each)
        assert answer == [*hull, 6] + [-1] * (6 - len(hull))
    at, tours = planar_batch("tour", 5, 6, torch.Generator().manual_seed(0))
    assert [shortest_tour(each) for each in at] == tours.tolist()
    numbers, order = planar_batch("sort", 5, 7, torch.Generator().manual_seed(0))
    assert numbers.shape == (5, 7, 1)
    assert (numbers[..., 0].gather(1, order).diff(dim=1) >= 0).all()
    assert 0 <= at.min() < at.max() <= 1
    again, _ = planar_batch("tour", 5, 6, torch.Generator().manual_seed(0))
    assert torch.equal(again, at)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("tsp", 2, 5), "problem='tsp'"), (("sort", 0, 5), "count=0"), (("hull", 2, 2), "n=2")]
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        planar_batch(*arguments, torch.Generator())
