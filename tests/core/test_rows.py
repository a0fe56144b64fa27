"""Rows that are copied whole equal those of indexing, for every memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core.engines.gather import taken


def whole(b: int, h: int, n: int, d: int) -> Tensor:
    return torch.randn(b, h, n, d, generator=torch.Generator().manual_seed(0))


LAID = {
    "contiguous": lambda: whole(2, 3, 20, 4),
    "with room behind": lambda: whole(2, 3, 30, 4)[:, :, :20],
    "with something in front": lambda: whole(2, 3, 30, 4)[:, :, 10:],
    "tokens before heads": lambda: whole(2, 20, 3, 4).transpose(1, 2),
    "some heads": lambda: whole(2, 6, 20, 4)[:, 1::2],
    "every second token": lambda: whole(2, 3, 40, 4)[:, :, ::2],
    "one for all heads": lambda: whole(2, 1, 20, 4).expand(-1, 3, -1, -1),
    "one for all": lambda: whole(1, 1, 20, 4).expand(2, 3, -1, -1),
    "part of the channels": lambda: whole(2, 3, 20, 6)[..., :4],
    "channels before tokens": lambda: whole(2, 3, 4, 20).transpose(2, 3),
    "wants a gradient": lambda: whole(2, 3, 20, 4).requires_grad_(),
}


@pytest.mark.parametrize("kind", LAID)
def test_rows_are_those_of_indexing(kind: str) -> None:
    x, other = LAID[kind](), whole(2, 3, 20, 7)
    index = torch.randint(0, 20, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    mine, theirs = taken(index, x, other)
    for found, source in ((mine, x), (theirs, other)):
        assert torch.equal(found, source.gather(2, index[..., None].expand(-1, -1, -1, source.shape[3])))
    assert mine.requires_grad == x.requires_grad


def test_a_gradient_flows_through_rows() -> None:
    x = whole(1, 2, 5, 3).requires_grad_()
    (rows,) = taken(torch.tensor([[[0, 0], [4, 1]]]), x)
    rows.sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, :, 0].tolist() == [[2, 0, 0, 0, 0], [0, 1, 0, 0, 1]]
