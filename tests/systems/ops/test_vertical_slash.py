"""Vertical-slash: the columns and diagonals of the last queries' attention, in a fixed number, read for all queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.core.selection import Blocks
from foveate.ops import VerticalSlash
from foveate.ops.functional import stripes
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, qkv


def blocks(op: VerticalSlash, q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    found = op.selection(q, k, True, scale)
    assert isinstance(found, Blocks)
    return found.blocks


# -- the shared parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 20, 50])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(20, 20), (7, 20), (1, 5)])
@pytest.mark.parametrize("slab", [1, 1 << 24])
def test_mass_by_hand(n_queries: int, n_keys: int, rows: int, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry equals the sum over a column, or a diagonal, of the whole matrix of the last queries."""
    monkeypatch.setattr(stripes, "SLAB", slab)
    q, k, _ = qkv(n_queries, n_keys)
    weights = oracle.weights(q, k, causal=True, scale=0.6)[:, :, -rows:]
    rows = weights.shape[2]
    mass = stripes.last_queries(q, k, rows, 0.6)
    assert_near(mass.columns, weights.mean(2), 1e-12)
    diagonals = torch.zeros(2, 4, n_keys, dtype=torch.float64)
    for row in range(rows):
        for key in range(n_keys - rows + row + 1):
            diagonals[..., n_keys - rows + row - key] += weights[:, :, row, key] / rows
    assert_near(mass.diagonals, diagonals, 1e-12)


def test_blocks_of_ragged_lengths() -> None:
    x = torch.arange(1.0, 8.0).expand(1, 1, 7)
    assert stripes.pooled(x, 3)[0, 0].tolist() == [6, 15, 7]
    assert stripes.means(x[..., None], 3)[0, 0].flatten().tolist() == [2, 5, 7]


def test_what_covers_a_share() -> None:
    mass = torch.tensor([[[0.1, 0.5, 0.0, 0.4]]])
    shares = {0.0: 1, 0.4: 1, 0.6: 2, 0.95: 3, 1.0: 4}
    assert {share: stripes.covering(mass, share).item() for share in shares} == shares


def test_the_largest_come_with_what_is_forced() -> None:
    mass = torch.tensor([[[0.1, 0.5, 0.0, 0.4]]])
    assert stripes.largest(mass, 2, 0)[0, 0].tolist() == [False, True, False, True]
    assert stripes.largest(mass, 2, 1)[0, 0].tolist() == [True, True, False, False], "they count within the budget"
    assert stripes.largest(mass, 1, 3)[0, 0].tolist() == [True, True, True, False], "and may exceed it"
    both = stripes.largest(mass.expand(1, 2, 4), torch.tensor([[1, 3]]), 0)
    assert both.sum(-1).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(16, 16), (15, 15), (17, 17), (8, 16), (7, 17), (5, 14), (5, 15), (9, 20)]
)
def test_tiles_by_hand(n_queries: int, n_keys: int) -> None:
    """A tile is chosen if one of its causal pairs has a chosen key, or a chosen distance."""
    random, block = torch.Generator().manual_seed(0), 4
    count = -(-n_keys // block)
    columns, diagonals = torch.rand(2, 1, 8, count, generator=random) < 0.25
    found = stripes.tiles_of(columns, diagonals, n_queries, n_keys, block)
    for head in range(8):
        wanted = torch.zeros(-(-n_queries // block), count, dtype=torch.bool)
        for query in range(n_queries):
            place = query + n_keys - n_queries
            for key in range(place + 1):
                if columns[0, head, key // block] or diagonals[0, head, (place - key) // block]:
                    wanted[query // block, key // block] = True
        assert torch.equal(found[0, head], wanted)


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_queries", "n_keys"), [(40, 40), (39, 39), (22, 43)])
def test_the_choice_by_hand(n_queries: int, n_keys: int) -> None:
    """An independent form of it, head by head with lists, and forced blocks first."""
    q, k, _ = qkv(n_queries, n_keys)
    op = VerticalSlash(vertical=9, slash=10, probe=6, block=4, sinks=5, recent=3)
    found = blocks(op, q, k, 0.8)
    weights = oracle.weights(q, k, causal=True, scale=0.8)[:, :, -6:]
    count = -(-n_keys // 4)
    rows = torch.zeros_like(found)

    def best(mass: list[float], number: int, forced: int) -> set[int]:
        rest = sorted(range(forced, count), key=lambda block: -mass[block])
        return {*range(forced), *rest[: number - forced]}

    for item in range(2):
        for head in range(4):
            w = weights[item, head]
            columns, diagonals = [0.0] * count, [0.0] * count
            for row in range(6):
                for key in range(n_keys):
                    columns[key // 4] += w[row, key].item()
                    if (distance := n_keys - 6 + row - key) >= 0:
                        diagonals[distance // 4] += w[row, key].item()
            vertical, slash = best(columns, 3, 2), best(diagonals, 3, 1)
            for query in range(n_queries):
                place = query + n_keys - n_queries
                seen = {key // 4 for key in range(place + 1) if key // 4 in vertical or (place - key) // 4 in slash}
                rows[item, head, query // 4, list(seen)] = True
    assert torch.equal(found, rows)


def test_budgets_that_cover_everything_are_causal_attention() -> None:
    q, k, v = qkv(90)
    for op in (VerticalSlash(90, 1, block=8, probe=9), VerticalSlash(1, 90, block=8, probe=9)):
        assert bool(blocks(op, q, k).sum() >= 2 * 4 * 12 * 13 / 2)
        assert_near(op(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


def test_few_queries_are_dense() -> None:
    op = VerticalSlash(vertical=2, slash=2, probe=4, block=2, sinks=1, recent=1)
    for n_queries in (1, 4):
        q, k, v = qkv(n_queries, 40)
        assert op.selection(q, k, True, 1.0) is None
        assert_near(op(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)
    q, k, _ = qkv(5, 40)
    assert op.selection(q, k, True, 1.0) is not None


class Largest(TorchDispatchMode):
    """Remembers the size of the largest result."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_the_choice_makes_no_square_matrix() -> None:
    """The largest tensor is the attention of the last queries; its products are those of the plan."""
    q, k, v = qkv(1024, heads=2, kv_heads=1, batch=1, dtype=torch.float32)
    op = VerticalSlash(64, 64, probe=16, block=16)
    with Largest() as seen, FlopCounterMode(display=False) as counter:
        op.selection(q, k, True, 1.0)
    assert seen.size <= 2 * 16 * (1024 + 16)
    assert counter.get_total_flops() == 2 * op.selection_macs(q, k, True) == 2 * 2 * 16 * 1024 * 8
    assert op.plan(q, k, v, causal=True).density < 0.5


def test_it_finds_columns_and_diagonals(claim: ClaimFixture) -> None:
    """Heads with a few strong keys far back, and heads that look a fixed distance back."""
    n, block, random = 512, 16, torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, n, 64, generator=random).double()
    for head, key in ((0, 100), (1, 300)):
        k[0, head, key] = 3 * q[0, head].mean(0) / q[0, head].mean(0).norm() + k[0, head, key]
        q[0, head] += 12 * k[0, head, key] / k[0, head, key].norm()
    for head, distance in ((2, 160), (3, 320)):
        q[0, head, distance:] = 3 * k[0, head, :-distance]
    ours = VerticalSlash(vertical=2 * block, slash=2 * block, block=block, probe=16, sinks=1, recent=1)
    dense = oracle.attention(q, k, v, causal=True)
    density = blocks(ours, q, k).double().mean().item()
    row, column = torch.arange(n // block)[:, None], torch.arange(n // block)
    window = next(w for w in range(1, n) if ((row - column < w) & (column <= row)).double().mean() >= density)
    fixed = ((row - column < window) | (column == 0)) & (column <= row)
    near = Blocks(fixed[None, None], (block, block), n, n).dense()
    errors = [
        (out - dense).norm().item() / dense.norm().item()
        for out in (ours(q, k, v, causal=True), oracle.attention(q, k, v, mask=near, causal=True))
    ]
    claim(
        "columns and diagonals of the last queries are those of all queries: error of the output, 512 tokens",
        ours=errors[0], baseline=errors[1], better="lower", margin=0.3, baseline_name="a sink and a window as large",
        seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical": 0}, "vertical=0"),
        ({"slash": -1}, "slash=-1"),
        ({"probe": 0}, "probe=0"),
        ({"block": 0}, "block=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"recent": 0}, "recent=0 must be a whole number, at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VerticalSlash(**options)


def test_a_budget_is_shared_by_columns_and_diagonals() -> None:
    op = VerticalSlash.at_budget(0.25, 1024)
    assert (op.vertical, op.slash) == (128, 128)
