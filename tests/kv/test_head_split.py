"""The split of a budget by head, on layouts made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate.core.errors import ShapeError, UnsupportedModel
from foveate.host.hf.layout import AttendingLayer, Layout
from foveate.kv.parts import head_split

HOST: Any = SimpleNamespace(model=object())


def given(
    monkeypatch: pytest.MonkeyPatch, *windows: int | None, kv_heads: tuple[int, ...] = (), expanded: bool = False
) -> Layout:
    """Give `HOST` one layer for each window, with twice as many query heads as stored heads."""
    heads = kv_heads or (2,) * len(windows)
    layers = [
        AttendingLayer(2 * number, 2 * count, count, expanded, window)
        for number, (window, count) in enumerate(zip(windows, heads, strict=True))
    ]
    made = Layout(tuple(layers))
    monkeypatch.setattr(head_split, "layout", lambda host: made)
    return made


@pytest.mark.parametrize(
    ("budget", "length", "full", "window"),
    [
        (0.5, 160, 3, 32),  # 10 tokens would leave room for 3.7 full heads; the rest of a budget lengthens the window
        (0.3, 64, 1, 13),  # no window is shorter than 8 tokens, also where a sixteenth is
        (0.125, 64, 0, 8),
        (0.01, 160, 0, 2),
        (0.0, 160, 0, 1),
        (1.0, 160, 8, 1),
        (0.5, 8, 8, 1),  # a prompt as short as the window leaves nothing to drop
    ],
)
def test_a_budget_is_split_into_full_heads_and_a_window(
    budget: float, length: int, full: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, None, None, None, None)
    may, *found = head_split.split_at_budget(budget, HOST, length)
    assert may.all() and found == [full, window]
    if full < 8 and window > 2:
        assert full * length + (8 - full) * window == pytest.approx(budget * 8 * length, rel=0.02)


def test_heads_of_layers_with_a_window_are_never_full(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, None, 99, 100, 101)
    may, full, window = head_split.split_at_budget(0.9, HOST, 100)
    assert may[:, 0].tolist() == [True, False, False, True]
    assert (full, window) == (4, 80)


def test_a_narrow_layer_has_fewer_heads_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given(monkeypatch, None, None, kv_heads=(1, 3))
    may, full, _ = head_split.split_at_budget(1.0, HOST, 100)
    assert may.tolist() == [[True, False, False], [True] * 3] and full == 4
    scores = torch.arange(12.0).view(2, 6)
    expected = [[1.0, float("-inf"), float("-inf")], [7.0, 9.0, 11.0]]
    assert head_split.per_kv_head(scores, found).tolist() == expected


def test_the_layers_that_see_furthest(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, 16, None, 64, None)
    assert head_split.far_numbers(HOST) == {2, 6}
    head_split.check_reach("policy", 10_000, HOST)
    given(monkeypatch, 16, 64, 32, 64)
    assert head_split.far_numbers(HOST) == {2, 6}
    head_split.check_reach("policy", 63, HOST)
    with pytest.raises(UnsupportedModel, match="policy reads 64 tokens, but no layer of object sees more than 64"):
        head_split.check_reach("policy", 64, HOST)


def test_the_best_heads_of_all_layers() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.3, 0.2, 0.8]])
    assert head_split.top(scores, 2).nonzero().tolist() == [[0, 1], [1, 2]]
    assert head_split.top(scores, 3).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]], "the earlier of two equal heads"
    assert not head_split.top(scores, 0).any()


def test_wrong_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, None, None)
    head_split.check_heads("heads", torch.ones(2, 2), HOST)
    with pytest.raises(ShapeError, match=r"\(2, 2\) for this model; got \(2, 4\)"):
        head_split.check_heads("heads", torch.ones(2, 4), HOST)
    given(monkeypatch, None, None, expanded=True)
    with pytest.raises(UnsupportedModel, match="share one latent in the cache"):
        head_split.check_heads("heads", torch.ones(2, 2), HOST)
