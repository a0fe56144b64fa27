"""The phase of a call, from its own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from foveate.host import Site


def site(queries: int, keys: int, **more: Any) -> Site:
    q, k = torch.zeros(1, 4, queries, 8), torch.zeros(1, 2, keys, 8)
    return Site(nn.Identity(), 0, q, k, k, 0.5, None, is_causal=True, **more)


@pytest.mark.parametrize(
    ("queries", "keys", "more", "phase"),
    [
        (1, 1, {}, "prefill"),
        (5, 5, {}, "prefill"),
        (1, 9, {}, "decode"),
        (5, 9, {}, "prefill"),
        (5, 9, dict(drafts=True, tentative=4), "decode"),  # all but the first are drafts
        (5, 9, dict(drafts=True, tentative=5), "decode"),
        (5, 9, dict(drafts=True, tentative=3), "prefill"),
        (5, 9, dict(tentative=4), "prefill"),  # tokens that a search removes again are no drafts
        (16, 40, dict(prompt=24), "decode"),
        (17, 41, dict(prompt=24), "prefill"),
    ],
)
def test_the_phase_of_a_call(queries: int, keys: int, more: dict[str, Any], phase: str) -> None:
    found = site(queries, keys, **more)
    assert found.phase == phase
    assert (found.seen, found.groups, found.is_whole) == (keys, 2, True)
