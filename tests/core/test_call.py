"""A call's tiles, and whether its queries may have to ignore keys."""

from __future__ import annotations

import pytest
import torch

from foveate.core.call import AttentionCall
from foveate.core.engines.flex import rounded_lengths
from foveate.core.selection import Blocks


def call(queries: int, keys: int, *, causal: bool = False, mask: bool = False, tile: int = 0) -> AttentionCall:
    q, k = torch.zeros(1, 2, queries, 4), torch.zeros(1, 2, keys, 4)
    tiles = torch.ones(1, 1, -(-queries // tile), -(-keys // tile), dtype=torch.bool) if tile else None
    chosen = None if tiles is None else Blocks(tiles, (tile, tile), queries, keys)
    return AttentionCall(q, k, k, 0.5, torch.ones(keys, dtype=torch.bool) if mask else None, causal, chosen)


@pytest.mark.parametrize(
    ("found", "hides"),
    [
        (call(3, 5), False), (call(1, 5, causal=True), False), (call(3, 5, causal=True), True), (call(1, 5), False),
        (call(1, 5, mask=True), True), (call(1, 5, tile=2), True),
    ],
)  # fmt: skip
def test_a_call_hides_keys_by_a_mask_a_selection_or_causality(found: AttentionCall, hides: bool) -> None:
    assert found.hides_keys == hides


def test_a_tile_knows_its_positions_counted_in_keys() -> None:
    tile = call(4, 9, causal=True).tile(slice(1, 3), slice(2, 6))
    assert tile.rows.tolist() == [6, 7] and tile.cols.tolist() == [2, 3, 4, 5]
    assert tile.first == (6, 2) and (tile.n_queries, tile.n_keys, tile.causal) == (4, 9, True)
    whole = call(9, 9).tile()
    assert whole.first == (0, 0) and whole.rows.tolist() == whole.cols.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "lengths"),
    [
        (33, 80, False, (64, 128)),  # in tiles of 16: three are four, five are eight
        (33, 81, False, (33, 81)),  # a last tile that is not full must stay the last
        (33, 81, True, (64, 128)),
        (16, 16, True, (16, 16)),
        (17, 33, True, (32, 64)),
    ],
)
def test_a_compiled_kernel_serves_lengths_up_to_a_power_of_two(
    queries: int, keys: int, causal: bool, lengths: tuple[int, int]
) -> None:
    assert rounded_lengths(call(queries, keys, causal=causal, tile=16)) == lengths
