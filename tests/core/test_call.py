"""A call's facts about itself, and the lengths of the compiled kernel that serves it."""

from __future__ import annotations

import pytest
import torch

from foveate.core.call import AttentionCall
from foveate.core.engines.flex import rounded_lengths
from foveate.core.engines.runs import plan
from foveate.core.engines.slices import _Bias
from foveate.core.selection import Blocks


def call(n_queries: int, n_keys: int, **options: object) -> AttentionCall:
    q, k = torch.zeros(1, 1, n_queries, 2), torch.zeros(1, 1, n_keys, 2)
    return AttentionCall(q, k, k, 1.0, **options)  # type: ignore[arg-type]


def test_one_causal_query_ignores_no_key() -> None:
    assert not call(1, 5, causal=True).hides_keys
    assert call(2, 5, causal=True).hides_keys
    assert not call(2, 5).hides_keys
    assert call(1, 5, mask=torch.ones(1, 1, 1, 5, dtype=torch.bool)).hides_keys


def test_tiles_know_where_they_begin() -> None:
    assert call(3, 8).tile(slice(1, 3), slice(4, 8)).first == (6, 4)  # the last query sits at the last key
    assert call(3, 8).tile().first == (5, 0)
    tile = call(4, 9, causal=True).tile(slice(1, 3), slice(2, 6))
    assert tile.rows.tolist() == [6, 7] and tile.cols.tolist() == [2, 3, 4, 5]
    assert (tile.n_queries, tile.n_keys, tile.causal) == (4, 9, True)


@pytest.mark.parametrize(("n", "causal", "rounded"), [(10, True, 16), (16, True, 16), (17, True, 32), (10, False, 10)])
def test_a_kernel_serves_the_next_power_of_two_of_tiles(n: int, causal: bool, rounded: int) -> None:
    tiles = -(-n // 4)
    chosen = Blocks(torch.ones(1, 1, tiles, tiles, dtype=torch.bool), (4, 4), n, n)
    assert rounded_lengths(call(n, n, causal=causal, selected=chosen)) == (rounded, rounded)


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "causal", "rounded"),
    [
        (33, 80, False, (64, 128)),  # in tiles of 16: three are four, five are eight
        (33, 81, False, (33, 81)),  # a last tile that is not full must stay the last
        (33, 81, True, (64, 128)),
        (17, 33, True, (32, 64)),
    ],
)
def test_queries_and_keys_are_rounded_apart(
    n_queries: int, n_keys: int, causal: bool, rounded: tuple[int, int]
) -> None:
    tiles = torch.ones(1, 1, -(-n_queries // 16), -(-n_keys // 16), dtype=torch.bool)
    chosen = Blocks(tiles, (16, 16), n_queries, n_keys)
    assert rounded_lengths(call(n_queries, n_keys, causal=causal, selected=chosen)) == rounded


def test_neighbouring_runs_share_one_bias() -> None:
    """Runs with one table of visible pairs get one tensor; a run with another table gets its own."""
    chosen = Blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), (4, 4), 8, 8)
    lower, whole = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    run = plan(chosen)[0][0]._replace(seen=lower)
    bias = _Bias(call(8, 8, selected=chosen), chosen)
    made = bias.of(run)[0]
    assert made is not None and bias.of(run)[0] is made
    other = bias.of(run._replace(seen=whole))[0]
    assert other is None or not torch.equal(other, made)
