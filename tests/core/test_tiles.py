"""Tiles that differ by head: computed head by head, exactly those that are chosen, and equal to the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core import engines, masks, oracle
from foveate.core.call import AttentionCall
from foveate.core.engines import tiles
from foveate.core.selection import Blocks
from tests.support.tensors import assert_near, gradients, qkv


def chosen(
    n_queries: int, n_keys: int, size: tuple[int, int], heads: int = 4, batch: int = 2, share: float = 0.3
) -> Blocks:
    """Some tiles; the first row of the first head has none, and the last head has many."""
    random = torch.Generator().manual_seed(3)
    shape = batch, heads, -(-n_queries // size[0]), -(-n_keys // size[1])
    found = torch.rand(shape, generator=random) < share
    found[:, -1] |= torch.rand(shape[2:], generator=random) < 0.6
    found[0, 0, 0] = False
    return Blocks(found, size, n_queries, n_keys)


def made(selection: Blocks, causal: bool, dtype: torch.dtype = torch.float64, grad: bool = False) -> AttentionCall:
    q, k, v = qkv(selection.n_queries, selection.n_keys, value_width=5, dtype=dtype, grad=grad)
    return AttentionCall(q, k, v, 0.7, causal=causal, selected=selection)


def expected(call: AttentionCall) -> Tensor:
    assert call.selection is not None
    return oracle.attention(call.q, call.k, call.v, mask=call.selection.dense(), causal=call.causal, scale=call.scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (16, 8), (32, 20), (17, 5)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(64, 64), (67, 67), (41, 90), (16, 33)])
def test_it_is_the_oracle(n_queries: int, n_keys: int, size: tuple[int, int], causal: bool) -> None:
    call = made(chosen(n_queries, n_keys, size), causal)
    assert tiles.fits(call) == (n_queries >= 16)
    assert_near(tiles.attend(call), expected(call), 1e-12)
    assert_near(engines.run(call, "gather"), expected(call), 1e-12)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (1, 2)])
def test_heads_and_sequences_may_share_a_choice(shape: tuple[int, int]) -> None:
    call = made(chosen(50, 50, (16, 16), shape[1], shape[0]), True)
    assert tiles.fits(call)
    assert_near(tiles.attend(call), expected(call), 1e-12)


def test_it_computes_the_pairs_of_chosen_tiles_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs would give every head as many keys as the head with the most."""
    computed = []
    row = tiles.Head.row

    def counted(self: tiles.Head, queries: slice, columns: Tensor, hidden: Tensor) -> Tensor:
        computed.append((queries.stop - queries.start) * len(columns) * self.k.shape[1])
        return row(self, queries, columns, hidden)

    monkeypatch.setattr(tiles.Head, "row", counted)
    selection = chosen(256, 256, (16, 16), share=0.05)
    engines.run(made(selection, True), "gather")
    kept = selection.causal().blocks
    assert sum(computed) == int(kept.sum()) * 16 * 16
    assert sum(computed) < 0.7 * int(kept.sum(-1).amax((0, 1)).sum()) * 8 * 16 * 16


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_hidden_keys_has_no_effect(garbage: float) -> None:
    selection = chosen(64, 64, (16, 16))
    selection.blocks[..., 2] = False
    clean = made(selection, True)
    want = expected(clean)
    clean.k[:, :, 32:48] = garbage
    clean.v[:, :, 32:48] = -garbage
    assert_near(engines.run(clean, "gather"), want, 1e-12)


def test_half_precision_is_summed_in_float32() -> None:
    call = made(chosen(64, 64, (16, 16)), True, torch.bfloat16)
    out = tiles.attend(call)
    assert out.dtype == torch.bfloat16
    assert_near(out, expected(call), 0.01)


def test_calls_that_slabs_compute() -> None:
    """A gradient, a mask, a rule, short rows, few queries, and heads that all choose alike."""
    selection = chosen(64, 64, (16, 16))
    call = made(selection, True, grad=True)
    assert not tiles.fits(call)
    out = engines.run(call, "gather")
    twin = made(selection, True, grad=True)
    for ours, theirs in zip(
        gradients(out, [call.q, call.k, call.v]),
        gradients(engines.run(twin, "reference"), [twin.q, twin.k, twin.v]),
        strict=True,
    ):
        assert_near(ours, theirs, 1e-10)
    plain = made(selection, True)
    masked = AttentionCall(plain.q, plain.k, plain.v, 0.7, torch.ones(64, dtype=torch.bool), True, selection)
    ruled = Blocks(selection.blocks, (16, 16), 64, 64, lambda b, h, q, k: q >= k)
    others = [
        masked,
        made(ruled, True),
        made(chosen(64, 64, (8, 16)), True),
        made(chosen(15, 64, (16, 16)), True),
        made(chosen(64, 64, (16, 16), 1, 1), True),
    ]
    for other in others:
        assert not tiles.fits(other)
        assert_near(engines.run(other, "gather"), engines.run(other, "reference"), 1e-12)


def test_what_a_row_hides() -> None:
    rows = tiles._Rows((), (4, 3), 6, 10, True)
    last = torch.tensor([1, 2])
    future = masks.causal(6, 10)
    assert rows.queries(0) == 4 and rows.queries(1) == 2
    assert torch.equal(~rows.hidden(0, last), future[:4, 3:9])
    assert torch.equal(~rows.hidden(1, torch.tensor([2, 3]))[:, :4], future[4:, 6:10])
    assert rows.hidden(1, torch.tensor([3]))[:, 1:].all(), "what fills up the last tile"
