"""FNA: the windows by definition, attention and gradients under them on every engine, and memory of tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from foveate.core import oracle
from foveate.core.call import AttentionCall
from foveate.core.engines import gather
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.core.neighborhoods import neighborhoods
from foveate.ops import FNA, neighborhood_mask
from foveate.ops.base.neighborhood import axis_rules
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, qkv

#: Grid, window, dilation and causal axes: odd and even windows, each number of axes, each mix of causal axes.
CASES = [
    ((17,), 5, 1, False), ((17,), 4, 3, False), ((17,), 5, 2, True), ((70,), 6, 1, True),
    ((7, 9), (3, 4), 1, False), ((7, 9), (3, 4), (2, 1), (True, False)), ((8, 6), (2, 3), (3, 2), (False, True)),
    ((8, 6), 3, 2, True), ((4, 5, 6), (3, 2, 3), 1, False), ((4, 5, 6), (2, 2, 3), (2, 1, 2), (True, False, False)),
    ((4, 5, 6), (4, 1, 2), 1, (False, True, True)),
]  # fmt: skip


def sees(length: int, window: int, dilation: int, causal: bool, query: int, key: int) -> bool:
    """The paper's definition along one axis, one pair at a time."""
    if query % dilation != key % dilation:
        return False
    i, j, last = query // dilation, key // dilation, (length - 1 - query % dilation) // dilation
    if causal:
        return 0 <= i - j < window
    left, right = window // 2, window // 2 - 1 + window % 2
    centre = min(max(i, left), last - right)
    return centre - left <= j <= centre + right


def by_definition(grid: tuple[int, ...], window: object, dilation: object, causal: object) -> Tensor:
    def each(x: object, axis: int) -> int:
        return x[axis] if isinstance(x, tuple) else x  # type: ignore[return-value]

    cells = list(itertools.product(*(range(length) for length in grid)))
    return torch.tensor([
        [
            all(
                sees(length, each(window, a), each(dilation, a), bool(each(causal, a)), i[a], j[a])
                for a, length in enumerate(grid)
            )
            for j in cells
        ]
        for i in cells
    ])  # fmt: skip


@pytest.mark.parametrize("grid, window, dilation, causal", CASES)
def test_windows_are_those_of_the_definition(grid, window, dilation, causal) -> None:  # type: ignore[no-untyped-def]
    expected = by_definition(grid, window, dilation, causal)
    assert torch.equal(neighborhood_mask(grid, window, dilation, causal), expected)
    chosen = FNA(grid, window, dilation, causal).select(
        torch.empty(1, 1, len(expected), 1), torch.empty(1, 1, len(expected), 1), False, 1.0
    )
    assert torch.equal(chosen.dense()[0, 0], expected)
    assert torch.equal(chosen.dense(slice(3, 8))[0, 0], expected[3:8])
    if not (causal is True or (isinstance(causal, tuple) and any(causal))):
        sides = window if isinstance(window, tuple) else (window,) * len(grid)
        assert expected.sum(1).tolist() == [torch.tensor(sides).prod().item()] * len(expected)  # borders included


@pytest.mark.parametrize("engine", ["auto", "gather", "reference", "chunked"])
@pytest.mark.parametrize("grid, window, dilation, causal", CASES)
def test_it_is_attention_under_its_mask(grid, window, dilation, causal, engine) -> None:  # type: ignore[no-untyped-def]
    mask = by_definition(grid, window, dilation, causal)
    q, k, v = (x.requires_grad_() for x in qkv(len(mask), heads=4, kv_heads=2))
    op = FNA(grid, window, dilation, causal)
    out, expected = op(q, k, v, engine=engine), oracle.attention(q, k, v, mask=mask)
    assert_near(out, expected, 1e-10)
    with torch.no_grad():  # then the tiles of a grid are read as boxes
        assert_near(op(q, k, v, engine=engine), expected, 1e-10)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        assert_near(mine, theirs, 1e-9)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("grid, window, dilation, causal", CASES[4:])
def test_tiles_of_any_size_give_the_same(grid, window, dilation, causal, side, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Tiles that do not divide the grid, or are larger than it."""
    monkeypatch.setattr("foveate.core.neighborhoods.SIDES", (side,))
    monkeypatch.setattr("foveate.core.neighborhoods.TALLEST", 8**3)
    made = neighborhoods.__wrapped__(axis_rules(grid, window, dilation, 1, causal), torch.device("cpu"))
    mask = by_definition(grid, window, dilation, causal)
    q, k, v = qkv(len(mask))
    keep = torch.rand(len(mask), len(mask)) > 0.2
    call = AttentionCall(q, k, v, 0.3, keep, selected=made)
    assert_near(gather.attend(call), oracle.attention(q, k, v, mask=mask & keep, scale=0.3), 1e-10)


def test_a_window_of_the_grid_is_full_attention_and_one_cell_gives_the_values() -> None:
    q, k, v = qkv(30)
    assert_near(FNA((5, 6), (5, 6))(q, k, v), oracle.attention(q, k, v), 1e-12)
    assert_near(FNA((5, 6), 1)(q, k, v), v.repeat_interleave(q.shape[1] // v.shape[1], 1), 1e-12)


@pytest.mark.parametrize("grid, window, dilation", [((32, 32), 9, 1), ((20, 30), (4, 7), 1), ((18, 18), 5, 2)])
def test_every_key_that_a_tile_reads_is_seen_by_one_of_its_queries(grid, window, dilation) -> None:  # type: ignore[no-untyped-def]
    found = neighborhoods(axis_rules(grid, window, dilation), torch.device("cpu"))
    read = 0
    for row in range(found.n_rows):
        seen = found.gathered(slice(row, row + 1))[1][0, 0, 0]
        places = torch.unravel_index(torch.tensor(row), found.tiles)
        held = [int((axis.keys[place] >= 0).sum()) for axis, place in zip(found.axes, places, strict=True)]
        assert int(seen.any(0).sum()) == held[0] * held[1] > 0
        read += held[0] * held[1] * found.tall
    assert read < 0.6 * (grid[0] * grid[1]) ** 2


def test_memory_is_linear(claim: ClaimFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensors of a call, against the logits of all windows that the unfused form holds."""
    side, heads, width, largest = 64, 8, 32, [0]
    real = gather._slab

    def counted(call, q, selection, rows):  # type: ignore[no-untyped-def]
        keys, seen = selection.gathered(rows)
        largest[0] = max(largest[0], 2 * heads * width * keys.numel() + seen.numel())
        return real(call, q, selection, rows)

    monkeypatch.setattr(gather, "_slab", counted)
    q, k, v = (torch.randn(1, heads, side**2, width, generator=torch.Generator().manual_seed(i)) for i in range(3))
    FNA((side, side), 13)(q, k, v)
    claim(
        "Tiles hold a small part of the logits of all 13 x 13 windows, on 4,096 cells (numbers)",
        ours=largest[0], baseline=0.1 * heads * side**2 * 13**2, better="lower", baseline_name="a tenth of all logits",
        seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grid": (6, 6), "window": 7}, "window=7 at dilation=1 is longer than axis 0 of 6 cells; at most 6 fit"),
        ({"grid": (6, 6), "window": (3, 3), "dilation": (1, 3)}, "longer than axis 1 of 6 cells; at most 2 fit"),
        ({"grid": (6, 6), "window": (3,)}, "must be one value, or one for each of the grid's 2 axes"),
        ({"grid": (6, 6, 6, 6), "window": 3}, "must be the lengths of one, two or three axes"),
        ({"grid": (6, 0), "window": 3}, "grid"),
        ({"grid": (6, 6), "window": 0}, "window"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says.replace("(", r"\(").replace(")", r"\)")):
        FNA(**options)  # type: ignore[arg-type]


def test_bad_calls_are_refused() -> None:
    q, k, v = qkv(30)
    with pytest.raises(ShapeError, match="as many tokens as the grid"):
        FNA((6, 6), 3)(q, k, v)
    with pytest.raises(UnsupportedPattern):
        FNA((5, 6), 3)(q, k, v, causal=True)
