"""Decayed scans over a chunk: the shares of old tokens, down to negligible ones."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.functional.fast_weights import shares, shares_at_the_end
from foveate.ops.functional.recurrence import decay_matrix, since_the_start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_shares_are_products_of_factors(dtype: torch.dtype) -> None:
    """A share is the product of the factors, which may be negative or complex."""
    factors = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix, first = decay_matrix(factors), since_the_start(factors)
    for t in range(6):
        torch.testing.assert_close(first[:, t], factors[:, : t + 1].prod(-1))
        for s in range(6):
            expected = factors[:, s + 1 : t + 1].prod(-1) if s <= t else torch.zeros(2, dtype=dtype)
            torch.testing.assert_close(matrix[:, t, s], expected)


@pytest.mark.parametrize("eta", [0.1, 0.01, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_no_share_is_too_small_to_be_multiplied_fast(eta: float, alpha: float) -> None:
    """No share is below the smallest normal number, which would slow long chunks down several times."""
    given = {"eta": eta, "alpha": alpha, "theta": 0.01, "write": 1.0}
    rates = {name: torch.full((1, 64), rate) for name, rate in given.items()}
    least = torch.finfo(torch.float32).tiny
    for made in (*shares(rates), *shares_at_the_end(rates)):
        assert not ((made != 0) & (made.abs() < least)).any()
    exact = shares({name: rate.double() for name, rate in rates.items()})
    for ours, theirs in zip(shares(rates), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("least", [0.0, 1e-36])
def test_negligible_shares_still_have_a_gradient(least: float) -> None:
    """A factor near 0 has the gradient of the input that it would let through."""
    factors = torch.tensor([0.5, least, 0.25], requires_grad=True)
    matrix = decay_matrix(factors)
    assert not matrix[1:, 0].any()
    torch.testing.assert_close(torch.autograd.grad(matrix[2, 0], factors)[0], torch.tensor([0.0, 0.25, least]))
    torch.testing.assert_close(torch.autograd.grad(since_the_start(factors)[2], factors)[0][1], torch.tensor(0.125))
