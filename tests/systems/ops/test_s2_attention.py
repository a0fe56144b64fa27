"""S2-Attention: each head sees another shard, and all shards cover the context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.ops.sparse.s2_attention import S2Attention, is_kv_efficient, s2_mask
from tests.support.tensors import assert_near, qkv


def elementwise(mask: Tensor, block: int, n: int) -> Tensor:
    """Expand a block mask to tokens, causal inside the diagonal blocks."""
    tokens = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n]
    return tokens & torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("n", [1, 8, 30, 32])
@pytest.mark.parametrize("shards", [None, 1, 2, 4])
def test_it_is_attention_under_its_mask(n: int, shards: int | None) -> None:
    q, k, v = qkv(n, heads=4, kv_heads=2)
    mask = elementwise(s2_mask(shards or 2, -(-n // 4), 2, 4), 4, n).repeat_interleave(4 // (shards or 2), 0)
    expected = oracle.attention(q, k, v, mask=mask)
    assert_near(S2Attention(4, 2, 4, shards)(q, k, v, causal=True), expected, 1e-12)


@pytest.mark.parametrize("options", [{"stride": 1, "local_blocks": 1}, {"stride": 8, "local_blocks": 8}])
def test_its_limits_are_causal_attention(options: dict[str, int]) -> None:
    q, k, v = qkv(32)
    assert_near(S2Attention(4, **options)(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


@pytest.mark.parametrize("shards", [8, 9, 16])
def test_heads_together_see_everything(shards: int) -> None:
    past = torch.ones(40, 40, dtype=torch.bool).tril()
    assert torch.equal(s2_mask(shards, 40, 2, 8).any(0), past)
    assert not torch.equal(s2_mask(1, 40, 2, 8).any(0), past)


def test_a_skipped_block_is_never_needed_again() -> None:
    assert is_kv_efficient(s2_mask(4, 40, 3, 8))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    counted_from_the_query = (j <= i) & ((i - j < 3) | ((i - j) % 8 == 0))
    assert not is_kv_efficient(counted_from_the_query[None])


def test_decoding_from_a_cache_that_drops_what_each_head_skips() -> None:
    n, block, op = 30, 4, S2Attention(4, local_blocks=2, stride=4)
    q, k, v = qkv(n, heads=4, kv_heads=4)
    whole, mask = op(q, k, v, causal=True), s2_mask(4, 8, 2, 4)
    for head in range(4):
        cache: list[int] = []
        for t in range(n):
            cache = [j for j in [*cache, t] if mask[head, t // block, j // block]]
            one = oracle.attention(q[:, head, None, t, None], k[:, head, None, cache], v[:, head, None, cache])
            assert_near(one[:, 0, 0], whole[:, head, t], 1e-12)
        assert len(cache) < n


@pytest.mark.parametrize("prompt", [None, 1, 13])
@pytest.mark.parametrize(("heads", "kv_heads", "shards", "dense"), [
    (4, 4, None, 0), (4, 2, None, 0), (4, 2, 4, 0), (4, 4, 2, 0), (6, 3, 2, 0), (4, 2, None, 1), (4, 4, 4, 3),
])  # fmt: skip
def test_a_stream_keeps_the_keys_that_each_head_needs(heads, kv_heads, shards, dense, prompt) -> None:
    n, block, op = 45, 4, S2Attention(4, local_blocks=2, stride=4, shards=shards, dense_heads=dense)
    q, k, v = qkv(n, heads=heads, kv_heads=kv_heads, value_width=3)
    whole, out = op(q, k, v, causal=True), []
    state = op.init_state(2, heads, kv_heads, q.shape[3], 3, dtype=q.dtype)
    if prompt is not None:
        y, state = op.prefill(*(x[:, :, :prompt] for x in (q, k, v)))
        out.append(y)
    each, groups = heads // (shards or kv_heads), heads // kv_heads
    mask = s2_mask(shards or kv_heads, 12, 2, 4).repeat_interleave(each, 0)
    mask[heads - dense * groups :] = torch.ones(12, 12, dtype=torch.bool).tril()
    for t in range(prompt or 0, n):
        y, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        out.append(y)
        for head in range(kv_heads):
            rows = mask[head * groups : (head + 1) * groups, t // block].any(0)
            needed = [place for place in range(t + 1) if rows[place // block]]
            held = state.places[head] >= 0
            assert state.places[head][held].tolist() == needed
            assert torch.equal(state.k[:, head][:, held], k[:, head, needed])
            assert not state.k[:, head][:, ~held].any()
    assert_near(torch.cat(out, 2), whole, 1e-12)
    assert state.seen == n
    assert (state.k.shape[2] < n) == (dense == 0), "dense heads need everything"


def test_a_budget_of_heads_is_dense() -> None:
    """The last key/value heads are dense for all of their queries; the others keep their shards."""
    q, k, v = qkv(32, heads=6, kv_heads=3)
    out = S2Attention(4, 2, 4, dense_heads=2)(q, k, v, causal=True)
    assert_near(out[:, 2:], oracle.attention(q[:, 2:], k[:, 1:], v[:, 1:], causal=True), 1e-12)
    assert_near(out[:, :2], S2Attention(4, 2, 4)(q, k, v, causal=True)[:, :2], 1e-12)
    late = S2Attention(4, 2, 4, dense_heads=2)(q[:, :, 25:], k, v, causal=True)
    assert_near(late, out[:, :, 25:], 1e-12)
    with pytest.raises(OptionError, match="dense_heads=4 must be at most Hkv=3"):
        S2Attention(dense_heads=4)(q, k, v, causal=True)
    with pytest.raises(OptionError, match="dense_heads=-1 must be a whole number"):
        S2Attention(dense_heads=-1)


@pytest.mark.parametrize(
    ("budget", "length", "local_blocks", "stride"),
    [(0.25, 4096, 8, 7), (0.3, 4096, 10, 6), (0.5, 256, 1, 3), (1.0, 64, 1, 1)],
)
def test_a_budget_goes_half_to_the_window_and_half_to_the_past(budget, length, local_blocks, stride) -> None:
    op = S2Attention.at_budget(budget, length)
    assert (op.local_blocks, op.stride) == (local_blocks, stride)


def test_shards_must_fit_the_heads() -> None:
    with pytest.raises(OptionError, match=r"shards=3 must divide the number of heads, Hq=4"):
        S2Attention(shards=3)(*qkv(8), causal=True)


def test_different_shards_find_needles_that_equal_ones_miss(claim) -> None:
    """Heads with different shards find a key anywhere in the context; equal shards of the same sparsity miss some."""
    n, block, heads = 512, 8, 8
    random = torch.Generator().manual_seed(0)

    def found(shards: int) -> float:
        op, hits, places = S2Attention(block, local_blocks=2, stride=8, shards=shards), 0, range(0, n - 32, 7)
        for place in places:
            k = torch.randn(1, heads, n, 16, generator=random)
            k[:, :, place] = 8.0
            v = torch.zeros(1, heads, n, 1)
            v[:, :, place] = 1.0
            hits += bool((op(torch.ones(1, heads, 1, 16), k, v, causal=True) > 0.9).any())
        return hits / len(places)

    claim(
        "shards that differ by head find needles that equal shards of the same sparsity miss: share of needles found",
        ours=found(8), baseline=found(1), better="higher", margin=0.5, baseline_name="the same shard for all heads",
        seed=0,
    )  # fmt: skip


def test_shards_have_equally_spaced_offsets() -> None:
    """Two shards at a stride of 8 keep blocks 4 apart; more shards than the stride repeat offsets."""
    kept = [s2_mask(shards, 17, 1, 8)[:, 16, :16].nonzero().tolist() for shards in (2, 16)]
    assert kept[0] == [[0, 0], [0, 8], [1, 4], [1, 12]]
    assert [block for shard, block in kept[1] if shard == 1] == [7, 15] == [b for shard, b in kept[1] if shard == 9]
