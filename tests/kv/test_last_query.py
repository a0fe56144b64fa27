"""Visible keys, their logits, and the largest of them, in batches with and without padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.kv.parts.last_query import last_logits, max_pooled, top_keys, visible

INF = float("inf")
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]]).bool()


def padded(real: Tensor = REAL) -> Any:
    return SimpleNamespace(step={}, seen=real.shape[1], real=real, q=torch.zeros(2, 4, 1, 8))


def expected(scores: list[float], allowed: list[bool], real: list[bool], pool: int) -> list[int]:
    """Rank the tokens of one sequence by hand: those allowed, the others, the padding."""
    own = [at for at, is_real in enumerate(real) if is_real]
    pooled = {
        at: max(scores[near] for near in own[max(0, place - pool // 2) : place + pool // 2 + 1])
        for place, at in enumerate(own)
    }
    key = {at: (2, pooled[at], at) if allowed[at] else (1, 0.0, -at) for at in own}
    return sorted(range(len(real)), key=lambda at: key.get(at, (0, 0.0, -at)), reverse=True)


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("pool", [3, 5])
def test_padding_is_no_neighbour_and_comes_last(pool: int, heads: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(2, *heads, 8, generator=draw)
    scores[~REAL.view(2, *(1,) * len(heads), 8).expand_as(scores)] = 0.0  # as its weights are
    allowed = torch.rand(scores.shape, generator=draw) > 0.3
    found = top_keys(scores, 8, padded(), pool, allowed)
    for row in range(2):
        lines = (x[row].reshape(-1, 8).tolist() for x in (scores, allowed, found))
        for some, may, got in zip(*lines, strict=True):
            assert got == expected(some, may, REAL[row].tolist(), pool)


def test_more_tokens_than_scores_are_padding_that_is_left_out() -> None:
    """A call may score fewer keys than the text has: those before its own tokens."""
    scores = torch.tensor([[0.0, 0.0, 0.1, 0.5, 0.2, 0.3], [0.4, 0.1, 0.2, 0.0, 0.0, 0.3]])
    found = top_keys(scores, 2, padded(), 3)
    assert found.tolist() == [[4, 3], [1, 0]]


def test_a_pool_takes_the_largest_of_neighbours() -> None:
    scores = torch.tensor([[[0.1, 0.7, 0.2, 0.0, 0.3]]])
    assert torch.equal(max_pooled(scores, 1), scores) and torch.equal(max_pooled(scores, 0), scores)
    torch.testing.assert_close(max_pooled(scores, 3), torch.tensor([[[0.7, 0.7, 0.7, 0.3, 0.3]]]))


def test_a_key_is_visible_if_any_query_of_any_head_may_see_it() -> None:
    mask = torch.zeros(1, 2, 3, 6, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[0, 1, 2, 4] = mask[0, 0, 1, 2] = True
    site: Any = SimpleNamespace(is_plain_causal=False, mask=mask, q=torch.zeros(2, 2, 3, 8))
    seen = visible(site)
    assert seen is not None and seen.tolist() == [[False, True, True, False, True, False]] * 2
    seen = visible(site, slice(1, 2))
    assert seen is not None and seen.tolist() == [[False, False, True, False, False, False]] * 2
    assert visible(SimpleNamespace(is_plain_causal=False, mask=None)) is None  # type: ignore[arg-type]
    keys = torch.tensor([[True, False], [True, True]])
    plain: Any = SimpleNamespace(is_plain_causal=True, key_mask=keys[:, None, None])
    seen = visible(plain)
    assert seen is not None and torch.equal(seen, keys)
    assert visible(SimpleNamespace(is_plain_causal=True, key_mask=None)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["none", "keys", "bias"])
def test_logits_of_the_last_query(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=draw), torch.randn(2, 2, 5, 8, generator=draw)
    mask = {"none": None, "keys": torch.rand(2, 1, 3, 5, generator=draw) > 0.4, "bias": torch.rand(2, 4, 3, 5)}[kind]
    site: Any = SimpleNamespace(
        q=q, k=k, scale=0.3, softcap=2.0, is_plain_causal=kind == "none", key_mask=None, mask=mask, step={}, seen=5,
        real=None,
    )  # fmt: skip
    logits = 2.0 * torch.tanh(0.3 * q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(2, 3) / 2.0)[:, :, 0]
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, -1], -INF) if kind == "keys" else logits + mask[:, :, -1]
    torch.testing.assert_close(last_logits(site), logits)
