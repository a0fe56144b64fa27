"""Symmetric systems: the solution, singular matrices, and several threads."""

from __future__ import annotations

import subprocess
import sys

import torch

from foveate.core.linear_systems import solve_positive
from tests.support.tensors import assert_near

THREADS = """
import torch
from foveate.core.linear_systems import solve_positive
torch.set_num_threads(2)
x = torch.randn(2, 300, 300, dtype=torch.float64)
a, b = x @ x.mT + torch.eye(300), torch.randn(2, 300, 4, dtype=torch.float64)
assert torch.allclose(a @ solve_positive(a, b), b)
"""


def test_it_solves_each_matrix_of_a_batch() -> None:
    x, b = torch.randn(3, 2, 9, 9, dtype=torch.float64), torch.randn(3, 2, 9, 4, dtype=torch.float64)
    a = x @ x.mT + torch.eye(9)
    assert_near(a @ solve_positive(a, b), b, 1e-10)


def test_a_singular_matrix_gets_the_smallest_solution() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    a = x @ x.mT
    b = a @ torch.randn(6, 2, dtype=torch.float64)
    found = solve_positive(a, b)
    assert_near(a @ found, b, 1e-9)
    assert_near(found, torch.linalg.pinv(a, hermitian=True) @ b, 1e-8)


def test_two_threads_return() -> None:
    assert subprocess.run([sys.executable, "-c", THREADS], check=False, timeout=120).returncode == 0
