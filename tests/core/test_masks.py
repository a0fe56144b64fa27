"""Functions on masks equal definitions pair by pair."""

from __future__ import annotations

import pytest
import torch

from foveate.core import masks

SIZES = [(1, 1), (1, 7), (4, 7), (7, 7)]


@pytest.mark.parametrize(("n_queries", "n_keys"), SIZES)
def test_causality_is_aligned_at_the_last_key(n_queries: int, n_keys: int) -> None:
    seen = masks.causal(n_queries, n_keys)
    for i in range(n_queries):
        for j in range(n_keys):
            assert seen[i, j].item() == (n_keys - j >= n_queries - i)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, None), slice(2, 2), slice(-3, None)])
def test_some_rows_of_causality(rows: slice) -> None:
    assert torch.equal(masks.causal(5, 8, rows=rows), masks.causal(5, 8)[rows])


@pytest.mark.parametrize(("n_queries", "n_keys"), SIZES)
@pytest.mark.parametrize(("size", "sinks"), [(1, 0), (3, 0), (3, 2), (100, 0)])
def test_a_window_counts_the_query_itself(n_queries: int, n_keys: int, size: int, sinks: int) -> None:
    seen = masks.window(n_queries, n_keys, size, sinks=sinks)
    for i in range(n_queries):
        at = n_keys - n_queries + i
        expected = {j for j in range(at + 1) if at - j < size or j < sinks}
        assert set(seen[i].nonzero().flatten().tolist()) == expected


def test_padding_on_either_side() -> None:
    lengths = torch.tensor([0, 2, 3])
    right, left = masks.padding(lengths, 3), masks.padding(lengths, 3, left=True)
    assert right.shape == left.shape == (3, 1, 1, 3)
    assert right[:, 0, 0].int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert left[:, 0, 0].int().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]


def test_a_bool_mask_and_its_bias_agree() -> None:
    mask = torch.tensor([True, False])
    bias = masks.as_bias(mask, torch.float64)
    assert bias.tolist() == [0.0, float("-inf")]
    assert bias.dtype == torch.float64
    assert torch.equal(masks.allowed(bias), mask)
    assert masks.as_bias(torch.ones(2), torch.float64).dtype == torch.float64


def test_masks_combine() -> None:
    a, b = torch.tensor([[True, False, True]]), torch.tensor([[True], [False]])
    bias = torch.tensor([1.0, 2.0, masks.NEG_INF])
    never = masks.NEG_INF
    assert masks.combine(None, None) is None
    assert masks.combine(a, None) is a
    assert torch.equal(masks.combine(a, b), a & b)
    assert torch.equal(masks.combine(bias, a, None, b), torch.tensor([[1.0, never, never], [never] * 3]))
    assert torch.equal(masks.combine(bias, bias), torch.tensor([2.0, 4.0, never]))


@pytest.mark.parametrize("shape", [(), (6,), (4, 6), (1, 6), (4, 1), (3, 1, 4, 6), (3, 2, 1, 1)])
def test_a_part_of_a_broadcastable_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    part = masks.columns_of(masks.rows_of(mask, slice(1, 3)), slice(2, 5))
    whole = mask.expand(3, 2, 4, 6)[:, :, 1:3, 2:5]
    assert torch.equal(part.expand(3, 2, 2, 3), whole)
    assert masks.rows_of(None, slice(1)) is masks.columns_of(None, slice(1)) is None


def test_the_keys_of_a_mask_of_any_shape() -> None:
    for shape in ((), (6,), (1, 6), (3, 1, 1, 6), (3, 1, 1, 1)):
        mask = torch.rand(shape) > 0.5
        assert torch.equal(masks.keys_of(mask, 3, 6), mask.expand(3, 1, 1, 6)[:, 0, 0])


def test_mask_and_causality_together() -> None:
    keys = torch.tensor([True, True, False])
    assert masks.full(None, False, 2, 3, "cpu") is None
    assert masks.full(keys, False, 2, 3, "cpu") is keys
    assert torch.equal(masks.full(keys, True, 2, 3, "cpu"), masks.causal(2, 3) & keys)
