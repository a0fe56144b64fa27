"""Tokens of padded batches: their places in their own sequence, and each sequence's last query."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.host.padding import Tokens, last_query
from foveate.host.slots.slots import EMPTY

REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()


def test_each_token_has_a_place_in_its_own_sequence() -> None:
    found = Tokens(REAL)
    assert found.count.tolist() == [4, 4, 6]
    assert found.rank.tolist() == [[EMPTY, EMPTY, 0, 1, 2, 3], [0, 1, 2, EMPTY, 3, EMPTY], [0, 1, 2, 3, 4, 5]]
    positions = torch.tensor([[5, 2, EMPTY], [4, 3, 0], [5, EMPTY, 0]])[:, None]
    assert found.own(positions)[:, 0].tolist() == [[3, 0, EMPTY], [3, EMPTY, 0], [5, EMPTY, 0]]
    assert found.before(4).tolist() == [2, 3, 4]
    assert found.at(torch.tensor([[0, 3], [3, 2], [0, 5]])).tolist() == [[2, 5], [4, 2], [0, 5]]


def test_positions_past_the_text_are_those_of_its_last_token() -> None:
    found = Tokens(REAL)
    assert found.own(torch.full((3, 1, 1), 6)).flatten().tolist() == [3, EMPTY, 5]
    assert found.at(torch.full((3, 1), 6)).flatten().tolist() == [1, 5, 5]


def site(queries: int, real: Tensor | None) -> Any:
    q = torch.randn(3, 2, queries, 4, generator=torch.Generator().manual_seed(0))
    real_queries = None if real is None else real[:, -queries:]
    return SimpleNamespace(q=q, real=real, real_queries=real_queries, seen=6, step={})


@pytest.mark.parametrize(("queries", "real"), [(5, None), (1, None), (1, REAL)])
def test_the_last_query_of_a_call_without_padding_or_of_one_token(queries: int, real: Tensor | None) -> None:
    call = site(queries, real)
    found, has_one, number = last_query(call)
    assert torch.equal(found, call.q[:, :, -1]) and has_one is None and number is None


def test_the_last_query_that_is_a_token() -> None:
    call = site(3, REAL)
    found, has_one, number = last_query(call)
    assert has_one is not None and has_one.tolist() == [True, True, True]
    assert number is not None and number.tolist() == [2, 1, 2]
    assert torch.equal(found, torch.stack([call.q[row, :, at] for row, at in enumerate((2, 1, 2))]))
    nothing = REAL.clone()
    nothing[0, 3:] = False
    _, has_one, _ = last_query(site(3, nothing))
    assert has_one is not None and has_one.tolist() == [False, True, True]
