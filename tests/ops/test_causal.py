"""Causal products: NaN and inf act from their own token on, in their own column."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.functional.causal import causal_product, poison


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_reaches_only_later_tokens_of_its_column(rows: int, bad: float) -> None:
    """The last row belongs to the last value, so that fewer rows are the last ones."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 6, 6, generator=draw, dtype=torch.float64).tril()[:, -rows:]
    values = torch.randn(2, 6, 3, generator=draw, dtype=torch.float64)
    clean = weights @ values
    assert torch.equal(causal_product(weights, values), clean)
    values[1, 4, 2] = bad
    found = causal_product(weights, values)
    reached = torch.zeros_like(found, dtype=torch.bool)
    reached[1, rows - 2 :, 2] = True
    assert torch.equal(found.isnan(), reached) and found.dtype == torch.float64
    torch.testing.assert_close(found[~reached], clean[~reached])


def test_poison_begins_with_the_first_bad_token() -> None:
    bad = torch.tensor([[False, True], [True, False], [False, False]])
    assert poison(bad).isnan().tolist() == [[False, True], [True, True], [True, True]]
    assert poison(bad)[0, 0] == 0.0
