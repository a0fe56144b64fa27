"""HyperAttention: equal to a loop written from the paper, exact at its limits, unbiased, and better than its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.core import online_softmax, oracle
from foveate.core.errors import OptionError, ShapeError
from foveate.ops import HyperAttention
from foveate.ops.functional import sorted_blocks
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, gradients, qkv


def made(width: int, seed: int = 0, **options: int) -> HyperAttention:
    return HyperAttention(width, generator=torch.Generator().manual_seed(seed), **options).double()


# -- the paper, one query at a time ------------------------------------------------------------------------------------


def gray(bits: int) -> list[int]:
    """The reflected binary code: neighbours in the list differ in one bit."""
    return [0] if bits == 0 else [*(half := gray(bits - 1)), *(x + 2 ** (bits - 1) for x in reversed(half))]


def bucket(x: Tensor, op: HyperAttention) -> int:
    code = sum(2**bit for bit, direction in enumerate(op.directions) if float(direction @ x) > 0)
    return gray(op.bits).index(code)


def cut(items: list[int], blocks: int) -> list[list[int]]:
    return [items[i * len(items) // blocks : (i + 1) * len(items) // blocks] for i in range(blocks)]


def counts_of(op: HyperAttention, q: Tensor, k: Tensor, head: int, number: int, heads: int) -> Tensor:
    """How often each pair of `q (Nq, D)` and `k (Nk, D)` counts, for one head and segment without causality."""
    blocks = -(-len(k) // op.block)
    queries = sorted(range(len(q)), key=lambda i: (bucket(q[i], op), i))
    keys = sorted(range(len(k)), key=lambda j: (bucket(k[j], op), j))
    counts = torch.zeros(len(q), len(k), dtype=torch.float64)
    segment = sorted_blocks.Segments(1, len(q), len(k), number=number)
    ranks = sorted_blocks._ranks(op.draws, heads, segment, torch.tensor([[[len(k)]]]))[0, head, 0].tolist()
    for mine, theirs in zip(cut(queries, blocks), cut(keys, blocks), strict=True):
        for i in mine:
            counts[i, theirs] = 1
            for rank in ranks:
                if keys[rank] not in theirs:
                    counts[i, keys[rank]] += len(k) / op.samples
    return counts


def causal_counts(op: HyperAttention, q: Tensor, k: Tensor, head: int, heads: int, number: int = 1) -> Tensor:
    """The same for a causal call of an even number of halvings: each half by itself, and the second reads the first."""
    n = len(q)
    if n <= op.min_len:
        return torch.ones(n, n, dtype=torch.float64).tril()
    counts, half = torch.zeros(n, n, dtype=torch.float64), n // 2
    counts[:half, :half] = causal_counts(op, q[:half], k[:half], head, heads, 2 * number)
    counts[half:, half:] = causal_counts(op, q[half:], k[half:], head, heads, 2 * number + 1)
    counts[half:, :half] = counts_of(op, q[half:], k[:half], head, number, heads)
    return counts


@pytest.mark.parametrize("causal, block", [(False, 8), (False, 7), (True, 4), (True, 3)])
def test_it_is_the_paper(causal: bool, block: int) -> None:
    """A softmax in which a pair counts as often as the loops say: blocks, drawn keys and halves."""
    q, k, v = qkv(48, heads=4, kv_heads=2, batch=2)
    op = made(8, bits=4, block=block, samples=5, min_len=12)
    out = torch.empty_like(q)
    for b in range(2):
        for h in range(4):
            mine, keys, values = q[b, h], k[b, h // 2], v[b, h // 2]
            counts = causal_counts(op, mine, keys, h, 4) if causal else counts_of(op, mine, keys, h, 0, 4)
            weights = counts * torch.exp(mine @ keys.T / math.sqrt(8))
            out[b, h] = weights / weights.sum(1, keepdim=True) @ values
    assert_near(op(q, k, v, causal=causal), out, 1e-10)
    assert_near(op(q, k, v, causal=causal, engine="reference"), out, 1e-10)


def test_neighbouring_buckets_differ_in_one_sign() -> None:
    op = made(6, bits=5)
    signs = (
        2.0 * (torch.arange(32)[:, None] >> torch.arange(5) & 1).double() - 1
    )  # each pattern, by a token that has it
    tokens = signs @ torch.linalg.pinv(op.directions).T
    codes = op.codes(tokens[None, None])[0, 0]
    patterns = signs[codes.argsort()]
    assert codes.sort().values.tolist() == list(range(32))
    assert ((patterns[1:] != patterns[:-1]).sum(1) == 1).all()
    assert codes.tolist() == [bucket(token, op) for token in tokens]


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"min_len": 41}, {"block": 40, "min_len": 2}, {"block": 99, "samples": 0, "min_len": 1}]
)
@pytest.mark.parametrize("causal", [False, True])
def test_short_calls_and_large_blocks_are_exact(options: dict[str, int], causal: bool) -> None:
    q, k, v = qkv(40)
    op = made(8, **options)
    assert_near(op(q, k, v, causal=causal), oracle.attention(q, k, v, causal=causal), 1e-10)
    out, lse = op.with_lse(q, k, v, causal=causal)
    logits = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    if causal:
        logits = logits.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf"))
    assert_near(out, oracle.attention(q, k, v, causal=causal), 1e-10)
    assert_near(lse, torch.logsumexp(logits, -1), 1e-10)


def test_the_limit_of_length_is_that_of_the_release() -> None:
    """A causal call of `min_len` tokens is exact; without causality it has to be shorter."""
    q, k, v = qkv(16)
    op = made(8, block=4, samples=2, min_len=16)
    assert_near(op(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-10)
    assert (op(q, k, v) - oracle.attention(q, k, v)).abs().max() > 1e-3
    assert_near(op(q[:, :, :15], k, v), oracle.attention(q[:, :, :15], k, v), 1e-10)


def test_two_halves_of_the_keys_merge_to_all() -> None:
    q, k, v = qkv(20, heads=2, kv_heads=2)
    logits = q @ k.mT
    halves = [online_softmax.partial(logits[..., at], v[:, :, at]) for at in (slice(7), slice(7, None))]
    both = online_softmax.merge(*halves)
    assert_near(online_softmax.finish(both), oracle.attention(q, k, v, scale=1.0), 1e-12)
    assert_near(online_softmax.log_sum_exp(both), torch.logsumexp(logits, -1), 1e-12)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_padded_keys_are_in_no_block_and_are_not_drawn() -> None:
    """A padded batch equals its sequences without padding, if both have the same number of blocks."""
    q, k, v = qkv(32, batch=2)
    op, real = made(8, bits=3, block=8, samples=6, min_len=1), torch.ones(2, 1, 1, 32, dtype=torch.bool)
    real[1, ..., :3], k[1, :, :3] = False, 100.0
    out = op(q, k, v, mask=real)
    assert_near(out[1:], op(q[1:], k[1:, :, 3:], v[1:, :, 3:]), 1e-10)
    assert_near(out[:1], op(q[:1], k[:1], v[:1]), 1e-10)


@pytest.mark.parametrize("kind", ["pairs", "bias"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_pairs_hold_in_blocks_in_the_sample_and_in_pieces(kind: str, causal: bool) -> None:
    """The output under a mask is a softmax of the pairs that count, with the bias in their logits."""
    q, k, v = qkv(40, batch=2)
    random = torch.Generator().manual_seed(5)
    seen = torch.rand(2, 4, 40, 40, generator=random) < 0.7
    bias = torch.randn(2, 4, 40, 40, generator=random, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    op = made(8, bits=3, block=8, samples=6, min_len=10)
    counts = torch.stack([
        torch.stack([
            causal_counts(op, q[b, h], k[b, h // 2], h, 4) if causal else counts_of(op, q[b, h], k[b, h // 2], h, 0, 4)
            for h in range(4)
        ])
        for b in range(2)
    ])  # fmt: skip
    logits = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8) + (
        bias if kind == "bias" else torch.where(seen, 0.0, bias)
    )
    weights = counts * torch.exp(logits)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    out = op(q, k, v, causal=causal, mask=bias if kind == "bias" else seen)
    assert_near(out, weights @ v.repeat_interleave(2, 1), 1e-10)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(60)
    op, mask = made(8, bits=3, block=4, samples=3, min_len=8), torch.rand(60, 60) < 0.8
    for causal in (False, True):
        whole = op(q, k, v, mask=mask, causal=causal)
        with monkeypatch.context() as small:
            small.setattr(sorted_blocks, "SLAB", 300)
            small.setattr("foveate.ops.sparse.hyper_attention.SLAB", 300)
            assert_near(op(q, k, v, mask=mask, causal=causal), whole, 1e-12)


# -- the sample --------------------------------------------------------------------------------------------------------


def test_every_key_is_drawn_equally_often_and_heads_draw_apart() -> None:
    draws = torch.randint(2**31, (4000,), generator=torch.Generator().manual_seed(0))
    ranks = sorted_blocks._ranks(draws, 3, sorted_blocks.Segments(2, 9, 9, number=2), torch.tensor([[[10, 7]]]))
    assert ranks.shape == (1, 3, 2, 4000)
    for head in range(3):
        for segment, n in enumerate((10, 7)):
            share = torch.bincount(ranks[0, head, segment], minlength=n) / 4000 * n
            assert len(share) == n and (share - 1).abs().max() < 0.2
    assert (ranks[0, 0, 0] == ranks[0, 1, 0]).double().mean() < 0.3


@pytest.mark.parametrize("options", [{"block": 0}, {"block": 16}])
@pytest.mark.parametrize("causal", [False, True])
def test_the_sum_is_unbiased(options: dict[str, int], causal: bool) -> None:
    q, k, v = (0.6 * x for x in qkv(64, batch=1, heads=2, kv_heads=2))
    seen = torch.ones(64, 64, dtype=torch.float64).tril() if causal else 1.0
    expected = (torch.exp(q @ k.mT / math.sqrt(8)) * seen).sum(-1)
    found = [
        made(8, seed, bits=3, samples=32, min_len=8, **options).with_lse(q, k, v, causal=causal)[1].exp()
        for seed in range(200)
    ]
    assert ((torch.stack(found).mean(0) / expected) - 1).abs().max() < 0.03


# -- what it is for ----------------------------------------------------------------------------------------------------


def one_hot_key_each(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each query has one key that holds about 0.6 of its weight, somewhere."""
    random, n, d = torch.Generator().manual_seed(seed), 1024, 32
    u = torch.nn.functional.normalize(torch.randn(n, d, generator=random), dim=-1)
    k = 7 * (u + 0.1 * torch.randn(n, d, generator=random) / math.sqrt(d))
    place = torch.randperm(n, generator=random)
    return (7 * u)[None, None], k[place][None, None], torch.randn(1, 1, n, d, generator=random)


def test_blocks_find_the_large_weights(claim: ClaimFixture) -> None:
    errors: dict[str, list[float]] = {"ours": [], "sample": [], "near": []}
    for seed in range(5):
        q, k, v = one_hot_key_each(seed)
        exact = oracle.attention(q, k, v)
        ops = {
            "ours": made(32, seed, block=64, samples=64, min_len=1).float(),
            "sample": made(32, seed, block=0, samples=128, min_len=1).float(),
        }
        found = {name: op(q, k, v) for name, op in ops.items()}
        near = torch.block_diag(*[torch.ones(128, 128, dtype=torch.bool)] * 8).bool()
        found["near"] = oracle.attention(q, k, v, mask=near[None, None])
        for name, out in found.items():
            errors[name].append(((out - exact).norm() / exact.norm()).item())
    ours, sample, near = (sum(errors[name]) / 5 for name in ("ours", "sample", "near"))
    for baseline, name in ((sample, "a sample of 128 keys"), (near, "blocks of 128 neighbours")):
        claim(
            "64 sorted and 64 drawn keys of 1,024, where one key has most of each query's weight: error of the output",
            ours=ours, baseline=0.75 * baseline, better="lower", baseline_name=f"0.75 x that of {name}", seed=0,
        )  # fmt: skip


def test_only_pairs_of_blocks_and_drawn_keys_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = online_softmax.partial
    monkeypatch.setattr(online_softmax, "partial", lambda x, v: counted.append(x.numel()) or real(x, v))
    q, k, v = qkv(1024, batch=1, heads=2, kv_heads=1)
    op = made(8, block=32, samples=16, min_len=64)
    for causal in (False, True):
        counted.clear()
        op(q, k, v, causal=causal)
        planned = 2 * op.pairs(1024, 1024, causal)
        assert planned <= sum(counted) <= (1.6 if causal else 1.0) * planned, "pieces compute some of their future"
        assert planned < 2 * 0.2 * 1024**2
    counted.clear()
    made(8, block=0, samples=16, min_len=64)(q, k, v)
    assert sum(counted) <= 2 * 1024 * 17


def test_gradients_are_those_of_the_whole_matrix() -> None:
    q, k, v = qkv(30, grad=True)
    op = made(8, bits=3, block=4, samples=3, min_len=7)
    for causal in (False, True):
        ours, theirs = (gradients(op(q, k, v, causal=causal, engine=e), [q, k, v]) for e in ("groups", "reference"))
        for one, other in zip(ours, theirs, strict=True):
            assert one.any()
            assert_near(one, other, 1e-9)


def test_garbage_in_later_tokens_of_a_piece_does_not_reach_back() -> None:
    q, k, v = qkv(16)
    op = made(8, bits=3, block=4, samples=3, min_len=8)
    clean = op(q, k, v, causal=True)
    k[:, :, 5:8], v[:, :, 6] = float("nan"), float("inf")
    assert_near(op(q, k, v, causal=True)[:, :, :5], clean[:, :, :5], 1e-12)
    q.requires_grad_()
    (grad,) = gradients(op(q, k, qkv(16)[2], causal=True)[:, :, :5], [q])  # only gradients show garbage in keys alone
    assert grad[:, :, :5].any() and grad[:, :, :5].isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 0}, "bits=0"), ({"bits": 40}, "bits=40 must be at most 31"), ({"block": -1}, "block=-1"),
        ({"samples": -1}, "samples=-1"), ({"min_len": 0}, "min_len=0"),
        ({"block": 0, "samples": 0}, "must not both be 0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        HyperAttention(8, **options)


def test_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="built for D=4; got D=8"):
        HyperAttention(4)(*qkv(12))
