"""GNA: windows of leaders by definition, its limits, and the simulator against counts from the mask."""

from __future__ import annotations

import random

import pytest
import torch

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.ops import FNA, GNA, gna_simulate, neighborhood_mask
from foveate.ops.base.neighborhood import axis_rules
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, qkv


def sees(length: int, window: int, stride: int, causal: bool, query: int, key: int) -> bool:
    """The paper's definition along one axis without dilation, one pair at a time."""
    group = query // stride * stride
    if causal:
        leader = min(group + stride - 1, length - 1)
        return key <= query and leader - key < window
    leader, right = min(group + stride // 2, length - 1), window // 2 - 1 + window % 2
    centre = min(max(leader, window // 2), length - 1 - right)
    return centre - window // 2 <= key <= centre + right


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "length, window, stride", [(17, 5, 2), (17, 6, 3), (16, 8, 4), (16, 4, 4), (20, 7, 7), (9, 9, 2)]
)
def test_windows_are_those_of_the_leaders(length: int, window: int, stride: int, causal: bool) -> None:
    expected = torch.tensor(
        [[sees(length, window, stride, causal, i, j) for j in range(length)] for i in range(length)]
    )
    assert torch.equal(neighborhood_mask((length,), window, 1, causal, stride), expected)
    q, k, v = qkv(length)
    assert_near(GNA((length,), window, stride, 1, causal)(q, k, v), oracle.attention(q, k, v, mask=expected), 1e-12)
    if causal:
        leaders = [min(i // stride * stride + stride - 1, length - 1) for i in range(length)]
        counts = [min(i + 1, window - (leaders[i] - i)) for i in range(length)]
        assert expected.sum(1).tolist() == counts and not expected.triu(1).any()
    else:
        for start in range(0, length, stride):
            group = expected[start : start + stride]
            assert torch.equal(group, group[:1].expand_as(group))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("causal", [False, (True, False)])
def test_a_stride_of_one_is_fna(dilation: int, causal: bool | tuple[bool, ...]) -> None:
    q, k, v = qkv(80)
    ours, theirs = GNA((8, 10), (3, 4), 1, dilation, causal), FNA((8, 10), (3, 4), dilation, causal)
    assert torch.equal(ours(q, k, v), theirs(q, k, v))


def test_a_stride_of_the_window_is_attention_within_blocks() -> None:
    block = torch.arange(8 * 12).reshape(8, 12)
    block = block // 12 // 4 * 3 + block % 12 // 4
    mask = block.flatten()[:, None] == block.flatten()
    assert torch.equal(neighborhood_mask((8, 12), 4, stride=4), mask)
    q, k, v = qkv(96)
    assert_near(GNA((8, 12), 4, 4)(q, k, v), oracle.attention(q, k, v, mask=mask), 1e-12)


def test_a_window_of_the_grid_is_full_attention() -> None:
    q, k, v = qkv(30)
    assert_near(GNA((5, 6), (5, 6), 3)(q, k, v), oracle.attention(q, k, v), 1e-12)


def settings(count: int) -> list[tuple[tuple[int, ...], ...]]:
    draw, found = random.Random(0), []
    for _ in range(count):
        axes = draw.choice((1, 2))
        grid = tuple(draw.randint(6, 24 if axes == 1 else 12) for _ in range(axes))
        dilation = tuple(draw.choice((1, 1, 2)) for _ in grid)
        window = tuple(draw.randint(1, length // r) for length, r in zip(grid, dilation, strict=True))
        stride = tuple(draw.randint(1, w) for w in window)
        tiles = [tuple(draw.randint(1, 5) for _ in grid) for _ in range(2)]
        found.append((grid, window, stride, dilation, tuple(draw.random() < 0.3 for _ in grid), *tiles))
    return found


@pytest.mark.parametrize("grid, window, stride, dilation, causal, q_tile, kv_tile", settings(20))
def test_the_simulator_counts_what_the_mask_says(grid, window, stride, dilation, causal, q_tile, kv_tile) -> None:  # type: ignore[no-untyped-def]
    rules = axis_rules(grid, window, dilation, stride, causal)
    mask = neighborhood_mask(grid, window, dilation, causal, stride)

    def boxes(sides: tuple[int, ...]) -> list[torch.Tensor]:
        parts = [[torch.tensor(chunk) for chunk in rule.chunks(side)] for rule, side in zip(rules, sides, strict=True)]
        if len(grid) == 1:
            return parts[0]
        return [(a[:, None] * grid[1] + b).flatten() for a in parts[0] for b in parts[1]]

    queries, keys = boxes(q_tile), boxes(kv_tile)
    parts = [[mask[mine][:, theirs] for theirs in keys] for mine in queries]
    visited = sum(bool(part.any()) for row in parts for part in row)
    dense = sum(bool(part.all()) for row in parts for part in row)
    found = gna_simulate(grid, window, stride, dilation, causal, q_tile=q_tile, kv_tile=kv_tile)
    assert found.visited * len(queries) == pytest.approx(visited, abs=1e-9)
    assert found.dense_share == pytest.approx(dense / visited)
    assert found.speedup == pytest.approx(len(queries) * len(keys) / visited)
    assert found.flop_bound == pytest.approx(mask.numel() / int(mask.sum()))
    if all(length % (r * side) == 0 for length, r, side in zip(grid, dilation, kv_tile, strict=True)):
        assert found.speedup <= found.flop_bound + 1e-9


def test_alignment_buys_speed(claim: ClaimFixture) -> None:
    """The paper's point in numbers: 32 x 32 cells in tiles of 8 x 8."""

    def speed(window: int, stride: int) -> float:
        return gna_simulate((32, 32), window, stride, q_tile=8, kv_tile=8).speedup

    assert speed(24, 8) == pytest.approx(16 / 9) == gna_simulate((32, 32), 24, 8, q_tile=8, kv_tile=8).flop_bound
    assert speed(24, 1) == pytest.approx(1.306, abs=5e-4)
    assert (speed(16, 16), speed(16, 1), speed(16, 8)) == pytest.approx((4.0, 2.56, 2.56))
    assert gna_simulate((32, 32), 16, 16, q_tile=8, kv_tile=8).dense_share == 1
    claim(
        "A stride that fits the tiles reaches the bound of the keys that are seen, and a window per query does not",
        ours=speed(24, 8), baseline=speed(24, 1), better="higher", baseline_name="stride 1", margin=0.4,
    )  # fmt: skip


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="stride=4 must be at most window=3"):
        GNA((8, 8), 3, 4)
    with pytest.raises(OptionError, match="q_tile"):
        gna_simulate((8, 8), 3, q_tile=0, kv_tile=2)
