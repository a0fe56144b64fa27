"""Selections: all forms that one converts to agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from foveate.core import masks
from foveate.core.errors import ShapeError
from foveate.core.selection import Blocks, Indices, Rule
from foveate.core.window_selection import window

few = settings(max_examples=25, deadline=None, derandomize=True)


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 2 + h


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    n_queries = draw(st.integers(1, 9))
    n_keys = draw(st.integers(n_queries, 13))
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from((1, 2))), -(-n_queries // size[0]), -(-n_keys // size[1]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chosen = torch.rand(shape, generator=random) > draw(st.sampled_from((0.0, 0.5, 1.0)))
    rule: Rule | None = draw(st.sampled_from((None, near)))
    return Blocks(chosen, size, n_queries, n_keys, rule)


@st.composite
def indices(draw: st.DrawFn) -> Indices:
    n_queries, n_keys, group = draw(st.integers(1, 9)), draw(st.integers(1, 13)), draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), -(-n_queries // group), n_keys)
    index = torch.rand(shape, generator=random).argsort(-1)[..., : draw(st.integers(1, n_keys))]
    valid = torch.rand(index.shape, generator=random) > 0.3 if draw(st.booleans()) else None
    return Indices(index, n_queries, n_keys, valid, group)


def spelt_out(s: Blocks | Indices) -> Tensor:
    """Return the pairs of a selection by its definition."""
    b, h = (s.blocks if isinstance(s, Blocks) else s.indices).shape[:2]
    seen = torch.zeros(b, h, s.n_queries, s.n_keys, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, seen.shape)):
        b, h, q, k = at
        if isinstance(s, Blocks):
            chosen = s.blocks[b, h, q // s.size[0], k // s.size[1]]
            seen[b, h, q, k] = chosen and (s.rule is None or s.rule(*at))
        else:
            mine = s.indices[b, h, q // s.group]
            seen[b, h, q, k] = bool((mine[s.real[b, h, q // s.group]] == k).any())
    return seen


def from_gathered(s: Blocks | Indices) -> Tensor:
    tall = s.size[0] if isinstance(s, Blocks) else s.group
    index, seen = s.gathered(slice(None))
    assert index.min() >= 0
    assert index.max() < s.n_keys
    index = index[..., None, :].expand(seen.shape)
    out = torch.zeros(*seen.shape[:4], s.n_keys, dtype=torch.int)
    out.scatter_add_(4, index, seen.int())
    assert out.max() <= 1, "no key is gathered twice for one query"
    assert out.shape[3] == tall
    return out.flatten(2, 3)[:, :, : s.n_queries].bool()


@few
@given(st.one_of(blocks(), indices()))
def test_dense_and_gathered_agree_with_the_selection(s: Blocks | Indices) -> None:
    expected = spelt_out(s)
    assert torch.equal(s.dense(), expected)
    assert torch.equal(from_gathered(s), expected)
    assert s.density() == pytest.approx(expected.double().mean().item())


@few
@given(st.one_of(blocks(), indices()), st.integers(0, 5), st.integers(0, 9))
def test_some_rows(s: Blocks | Indices, start: int, stop: int) -> None:
    assert torch.equal(s.dense(slice(start, stop)), s.dense()[:, :, start:stop])


@few
@given(blocks())
def test_the_causal_selection_loses_only_the_future(s: Blocks) -> None:
    past = masks.causal(s.n_queries, s.n_keys)
    twin = s.causal()
    assert torch.equal(twin.dense(), s.dense() & past)
    again = twin.causal()
    assert torch.equal(again.dense(), twin.dense())
    if twin.whole is not None:
        assert torch.equal(replaced(twin, twin.whole).dense(), replaced(twin, twin.whole, None).dense())
    shift = s.n_keys - s.n_queries
    for i, j in twin.blocks.any(1).any(0).nonzero().tolist():
        last = min((i + 1) * s.size[0], s.n_queries) - 1 + shift
        assert j * s.size[1] <= last, "tiles of the future alone are not read"


def replaced(s: Blocks, tiles: Tensor, rule: Rule | str | None = "same") -> Blocks:
    return Blocks(tiles, s.size, s.n_queries, s.n_keys, s.rule if rule == "same" else rule)


@few
@given(blocks())
def test_flex_attention_reads_the_same_tiles(s: Blocks) -> None:
    for form in (s, s.causal()):
        mask = form.block_mask
        tiles = mask.to_dense().bool()[:, :, : form.blocks.shape[2], : form.blocks.shape[3]]
        assert torch.equal(tiles, form.blocks)
        if form.rule is not None:
            assert mask.mask_mod is form.rule
        whole = torch.zeros_like(form.blocks)
        if mask.full_kv_num_blocks is not None:
            for at in torch.cartesian_prod(*map(torch.arange, whole.shape[:3])):
                at = tuple(at)
                whole[at][mask.full_kv_indices[at][: mask.full_kv_num_blocks[at]].long()] = True
        expected = form.blocks & form.whole if form.whole is not None else form.blocks
        assert torch.equal(whole, expected if form.whole is not None or form.rule is None else torch.zeros_like(whole))


def test_for_query_heads() -> None:
    s = Blocks(torch.rand(1, 2, 2, 3) > 0.4, (4, 4), 8, 12, near)
    assert s.for_heads(2) is s
    assert torch.equal(s.for_heads(6).dense(), s.dense().repeat_interleave(3, 1))
    listed = Indices(torch.arange(12).reshape(1, 3, 4, 1), 8, 12, group=2)
    assert torch.equal(listed.for_heads(6).dense(), listed.dense().repeat_interleave(2, 1))
    one = Indices(torch.zeros(1, 1, 8, 1, dtype=torch.long), 8, 12)
    assert one.for_heads(6) is one
    with pytest.raises(ShapeError, match="3 heads does not fit 4"):
        listed.for_heads(4)


def test_density_counts_visible_pairs() -> None:
    s = Blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), (2, 2), 4, 4)
    assert s.density() == s.density(causal=True) == 1.0
    half = Blocks(torch.eye(2, dtype=torch.bool)[None, None], (2, 2), 4, 4)
    assert half.density() == pytest.approx(8 / 16)
    assert half.density(causal=True) == pytest.approx(6 / 10)
    assert half.keys_read() == 2


def test_keys_read_counts_real_keys_and_queries() -> None:
    assert Blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), (128, 128), 16, 16).keys_read() == 16
    ragged = Blocks(torch.tensor([[[[True, True], [True, False]]]]), (4, 4), 5, 6)
    assert ragged.keys_read() == pytest.approx((4 * 6 + 1 * 4) / 5)


def test_keys_read_of_shapes_alone_is_the_bound() -> None:
    tiles = torch.ones(1, 1, 2, 3, dtype=torch.bool, device="meta")
    assert Blocks(tiles, (4, 4), 8, 10).keys_read() == 10
    keys = torch.zeros(1, 1, 8, 3, dtype=torch.long, device="meta")
    assert Indices(keys, 8, 10, torch.ones_like(keys, dtype=torch.bool)).keys_read() == 3


def test_keys_read_by_a_list() -> None:
    valid = torch.tensor([[[[True, True], [True, False]]]])
    assert Indices(torch.tensor([[[[0, 1], [2, 0]]]]), 4, 3, valid, group=2).keys_read() == 1.5


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Blocks(torch.ones(1, 1, 2, 3, dtype=torch.bool), (4, 4), 8, 8), r"blocks must be \(B, H, 2, 2\)"),
        (lambda: Blocks(torch.ones(2, 2, dtype=torch.bool), (4, 4), 8, 8), "blocks must be"),
        (lambda: Indices(torch.zeros(1, 1, 3, 2, dtype=torch.long), 8, 8), r"indices must be \(B, H, 8, n\)"),
        (lambda: Indices(torch.zeros(1, 1, 8, 2).long(), 8, 8, torch.ones(1, 1, 8, 3).bool()), "valid must be like"),
    ],
)
def test_malformed_selections_are_refused(made, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        made()


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 300), (130, 300), (300, 300), (400, 400), (4100, 4100)])
@pytest.mark.parametrize(("size", "sinks"), [(1, 0), (100, 0), (129, 5), (1000, 0)])
def test_the_window(n_queries: int, n_keys: int, size: int, sinks: int) -> None:
    s = window(n_queries, n_keys, size, sinks, torch.device("cpu"))
    expected = masks.window(n_queries, n_keys, size, sinks=sinks)[None, None]
    assert torch.equal(s.dense(), expected)
    assert torch.equal(s.causal().dense(), expected)
    assert torch.equal(replaced(s, s.whole).dense(), replaced(s, s.whole, None).dense())
    assert s is window(n_queries, n_keys, size, sinks, torch.device("cpu"))
