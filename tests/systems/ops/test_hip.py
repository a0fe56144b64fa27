"""HiP: the search finds important keys if neighbours are similar, at sub-quadratic cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.ops.sparse import hip
from foveate.ops.sparse.hip import HiP
from tests.support.tensors import assert_near, qkv


@pytest.mark.parametrize("options", [{"keep": 40}, {"keep": 4, "window": 40}, {"keep": 4, "sinks": 40}])
@pytest.mark.parametrize("rep", ["first", "middle"])
def test_keeping_all_is_causal_attention(options: dict[str, int], rep: str) -> None:
    q, k, v = qkv(39)
    assert_near(HiP(block_q=8, rep=rep, **options)(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


def chosen(op: HiP, q: Tensor, k: Tensor) -> list[Tensor]:
    """Return the keys that each group of queries of the first head keeps."""
    s = op.selection(q, k, True, 1.0)
    return [index[real].sort().values for index, real in zip(s.indices[0, 0], s.real[0, 0], strict=True)]


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (3, 0), (0, 5), (3, 5)])
def test_keys_of_a_group(sinks: int, window: int) -> None:
    q, k, _ = qkv(50, heads=1, kv_heads=1)
    op = HiP(keep=8, block_q=4, sinks=sinks, window=window)
    for group, keys in enumerate(chosen(op, q, k)):
        first, last = group * 4, min(group * 4 + 3, 49)
        assert len(keys.unique()) == len(keys), "no key twice"
        assert keys.max() <= last
        assert set(range(min(sinks, last + 1))) <= set(keys.tolist())
        assert set(range(max(first - window + 1, 0), last + 1)) <= set(keys.tolist()) or not window
        assert len(keys) <= 8 + sinks + (window + 3 if window else 0)
        assert len(keys) >= min(8, last + 1) - 1, "the budget is used; a ragged last block may cost one"


@pytest.mark.parametrize("rep", ["first", "middle"])
@pytest.mark.parametrize("block_q", [1, 4])
def test_the_search_by_hand(rep: str, block_q: int) -> None:
    """The search equals the paper's algorithm for one head, with lists."""
    q, k, _ = qkv(62, heads=1, kv_heads=1, width=3)
    keep, block = 8, 2
    products = (q[0, 0] @ k[0, 0].T).masked_fill(torch.ones(62, 62, dtype=torch.bool).triu(1), float("-inf"))
    for group, keys in enumerate(chosen(HiP(keep, block_q, block, rep), q, k)):
        rows = products[group * block_q : (group + 1) * block_q]
        last = group * block_q + len(rows) - 1
        n_blocks, chunks = -(-(last + 1) // block), keep // block
        parts = [(i * n_blocks // chunks, (i + 1) * n_blocks // chunks) for i in range(chunks)]
        parts = [(a, b) for a, b in parts if b > a]

        def score(part: tuple[int, int], rows: Tensor = rows) -> float:
            stands = (part[0] + part[1]) // 2 if rep == "middle" else part[0]
            return rows[:, 2 * stands : 2 * stands + 2].max().item()

        while any(b - a > 1 for a, b in parts):
            cuts = [(a, a + (b - a) // 2, b) for a, b in parts]
            halves = [half for a, m, b in cuts for half in ((a, m), (m, b)) if half[1] > half[0]]
            parts = sorted(sorted(halves, key=score, reverse=True)[:chunks])
        assert keys.tolist() == [j for a, _ in parts for j in (2 * a, 2 * a + 1) if j <= last]


@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("keep", [32, 128])
def test_the_search_is_sub_quadratic(n: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of scored representatives grows less than quadratically."""
    counted: list[Tensor] = []
    scores = hip.Part.scores
    monkeypatch.setattr(hip.Part, "scores", lambda self, *at: counted.append(at[1].sum(-1)) or scores(self, *at))
    q, k, _ = qkv(n, heads=1, kv_heads=1, batch=1, width=4, dtype=torch.float32)
    HiP(keep, block_q=32, block_k=2).selection(q[:, :, -32:], k, True, 1.0)
    scored = int(torch.stack(counted).sum())
    assert keep <= scored <= 2 * (keep / 2) * math.ceil(math.log2(n / keep) + 1)


def drifting(n: int, coefficient: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make queries, and keys from a stationary random walk over positions, so that neighbours are similar."""
    random = torch.Generator().manual_seed(seed)
    noise, keys = torch.randn(n, 1, 4, 32, generator=random), [torch.randn(1, 4, 32, generator=random)]
    for step in noise[1:]:
        keys.append(coefficient * keys[-1] + (1 - coefficient**2) ** 0.5 * step)
    return torch.randn(1, 4, 1, 32, generator=random) * 3, torch.stack(keys, 2)


def recovered(keys: Tensor, q: Tensor, k: Tensor) -> float:
    """Return the attention mass on some keys `(1, 4, 64)` over that on the best keys of the same number."""
    weights = oracle.weights(q, k)[:, :, 0]
    best = weights.topk(keys.shape[-1]).values.sum(-1)
    return (weights.gather(-1, keys).sum(-1) / best).mean().item()


def searched(q: Tensor, k: Tensor) -> float:
    return recovered(HiP(64).selection(q, k, True, 1.0).indices[:, :, 0], q, k)


def test_it_finds_the_mass_where_neighbours_are_alike(claim) -> None:
    q, k = drifting(1024, 0.98)
    ours = searched(q, k)
    picked = torch.rand(1, 4, 1024, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :64]
    streaming = torch.cat([torch.arange(4), torch.arange(1024 - 60, 1024)]).expand(1, 4, 64)
    sentence = "the search recovers the attention mass of the best keys if neighbours are similar: 64 of 1,024 keys"
    for name, keys in {"4 sinks + 60 recent keys": streaming, "64 random keys": picked}.items():
        baseline = recovered(keys, q, k)
        claim(sentence, ours=ours, baseline=baseline, better="higher", margin=0.5, baseline_name=name, seed=0)
    assert ours > 0.8


def test_it_needs_that_locality() -> None:
    q, k = drifting(1024, 0.0)
    assert searched(q, k) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": 5}, "keep=5 must be a multiple of block_k=2"),
        ({"block_q": 0}, "block_q=0"),
        ({"block_k": 1.5}, r"block_k=1\.5"),
        ({"rep": "last"}, "rep='last' must be one of"),
        ({"sinks": -1}, "sinks=-1"),
        ({"window": -1}, "window=-1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HiP(**options)


def test_a_budget_is_the_keys_kept() -> None:
    assert [HiP.at_budget(share, 1024).keep for share in (0.25, 0.1, 0.0)] == [256, 102, 2]


def test_the_plan_counts_the_search() -> None:
    """The plan equals PyTorch's count of products while choosing keys, plus two for each kept key."""
    q, k, v = qkv(256, heads=4, kv_heads=2, batch=2, width=8, dtype=torch.float32)
    op = HiP(16, block_q=4)
    for queries in (1, 256):
        with FlopCounterMode(display=False) as counter:
            op.selection(q[:, :, -queries:], k, True, 1.0)
        assert counter.get_total_flops() == 2 * op.selection_macs(q[:, :, -queries:], k, True) > 0
    plan = op.plan(q[:, :, -1:], k, v, causal=True)
    assert plan.flops == 2 * 2 * 4 * 16 * (8 + 8) + 2 * op.selection_macs(q[:, :, -1:], k, True)
