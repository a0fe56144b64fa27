"""SALE: logits of 4 bits find the tiles with keys that matter, and leave out what a threshold allows."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import oracle
from foveate.core.errors import OptionError, ShapeError
from foveate.core.selection import Blocks
from foveate.host import apply
from foveate.kv import sale_calibrate, sale_prefill
from foveate.ops import SALE
from foveate.ops.functional.low_bit import low_bit, rounded
from foveate.ops.sparse import sale
from tests.conftest import ClaimFixture
from tests.support import host_models
from tests.support.tensors import assert_near, qkv

SMALL = {"block_q": 4, "block_k": 2, "local": 5, "dense": 0}


def blocks(op: SALE, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    found = op.selection(q, k, True, q.shape[3] ** -0.5 if scale is None else scale)
    assert isinstance(found, Blocks)
    return found.blocks


# -- the estimate ------------------------------------------------------------------------------------------------------


def test_rounding_has_a_scale_for_each_row() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6], [0.14, -0.07, 0.0], [0.0, 0.0, 0.0]])
    assert_near(rounded(x, 4), torch.tensor([[7.0, -3.0, 1.0], [0.14, -0.08, 0.0], [0.0, 0.0, 0.0]]), 1e-6)
    assert len(rounded(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)), 4).unique()) <= 15


def test_many_bits_are_the_exact_logits_up_to_a_number_for_each_query() -> None:
    q, k, _ = qkv(30)
    smooth = k - k.mean(2, keepdim=True)
    factors = low_bit(q, smooth, 16)
    exact = q @ k.repeat_interleave(2, 1).mT
    off = factors.queries @ factors.keys.mT - exact
    assert_near(off, off.mean(-1, keepdim=True).expand_as(off), 2e-3)


def test_offsets_that_all_tokens_share_cost_no_bits(claim: ClaimFixture) -> None:
    q, k = torch.randn(2, 1, 1, 512, 64, generator=torch.Generator().manual_seed(0)).double()
    q[..., 0] += 8
    k[..., 0] += 8
    exact = q @ k.mT
    smooth = k - k.mean(2, keepdim=True)
    factors = low_bit(q, smooth, 4)
    ours = factors.queries @ factors.keys.mT - (exact - q @ k.mean(2, keepdim=True).mT)
    plain = rounded(q, 4) @ rounded(k, 4).mT - exact
    claim(
        "without the tokens' mean, 4 bits estimate logits at most 0.7 times as wrong: RMS, an offset of 8",
        ours=ours.square().mean().sqrt().item(), baseline=0.7 * plain.square().mean().sqrt().item(), better="lower",
        baseline_name="0.7 of 4 bits of the tokens as they are", seed=0,
    )  # fmt: skip


# -- the choice --------------------------------------------------------------------------------------------------------


def by_hand(q: Tensor, k: Tensor, scale: float, threshold: float, tall: int, wide: int, local: int) -> set:
    """Return the tiles of one head: the paper's passes 1 and 2 with loops, from 4 bits."""
    n, past = len(k), len(k) - len(q)
    smooth, centre, found = k - k.mean(0), q.mean(0), set()

    def bits(x: Tensor) -> tuple[Tensor, float]:
        step = x.abs().max().item() / 7
        return torch.round(x / step), step

    for row in range(0, len(q), tall):
        queries = range(row, min(row + tall, len(q)))
        last = queries[-1] + past if len(queries) == tall else n - 1
        low = max(0, row + past - local + 1) // wide
        near = {0, *range(low, last // wide + 1)}
        found |= {(row // tall, j) for j in near}
        for i in queries:
            keys = [j for tile in near for j in range(tile * wide, tile * wide + wide) if j <= i + past]
            total = sum(math.exp((q[i] @ smooth[j]).item() * scale) for j in keys)
            mine, step = bits(q[i] - centre)
            for j in range(wide, low * wide):
                theirs, other = bits(smooth[j])
                logit = ((mine @ theirs).item() * step * other + (centre @ smooth[j]).item()) * scale
                if math.exp(logit) > threshold * total:
                    found.add((row // tall, j // wide))
    return found


@pytest.mark.parametrize(("n_queries", "n_keys"), [(48, 48), (45, 45), (30, 51)])
@pytest.mark.parametrize("rows", [4, 12, 256])
def test_the_choice_by_hand(n_queries: int, n_keys: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a short last row, keys before the queries, and some rows and keys at a time."""
    monkeypatch.setattr(sale, "ROWS", rows)
    monkeypatch.setattr(sale, "SLAB", 1 << (8 if rows == 4 else 21))
    q, k, _ = qkv(n_queries, n_keys)
    q, k = q + 1, 2 * k - 0.5
    thresholds = torch.tensor([0.02, 0.1, 0.3, 1.0])
    found = blocks(SALE(thresholds, **SMALL), q, k, 0.4)
    for item in range(2):
        for head in range(4):
            wanted = by_hand(q[item, head], k[item, head // 2], 0.4, thresholds[head].item(), 4, 2, 5)
            assert {(i, j) for i, j in found[item, head].nonzero().tolist()} == wanted
    assert found[:, 0].sum() > found[:, 3].sum()


def test_a_threshold_of_zero_is_causal_attention() -> None:
    q, k, v = qkv(300, batch=1, width=16, dtype=torch.float32)
    out = SALE(0.0, dense=0)(q, k, v, causal=True)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (out - dense).abs().max() < 1e-5
    assert bool(blocks(SALE(0.0, dense=0), q, k)[..., -1, :].all())


def test_a_larger_threshold_keeps_no_more() -> None:
    q, k, _ = qkv(200, width=16)
    kept = [blocks(SALE(t, **SMALL), 2 * q, k) for t in (0.0, 0.01, 0.1, 1.0, math.inf)]
    for more, fewer in pairwise(kept):
        assert not (fewer & ~more).any()
        assert fewer.sum() < more.sum()
    always = kept[-1][0, 0]
    assert always[:, 0].all() and always.sum() < 5 * len(always)


def test_what_is_left_out_is_bounded() -> None:
    """Without a rounding error, a query leaves out at most the threshold for each key that it skips."""
    q, k, _ = qkv(256, batch=1, width=32)
    q = 0.5 * q
    weights = oracle.weights(q, k, causal=True)
    for threshold in (0.1, 0.2):
        op = SALE(threshold, bits=16, dense=0, local=16, block_q=16, block_k=8)
        seen = Blocks(blocks(op, q, k), (16, 8), 256, 256).dense()
        skipped = ~seen & torch.ones(256, 256, dtype=torch.bool).tril()
        left = weights * skipped
        assert 0.05 * threshold < left.max() <= threshold * (1 + 1e-3)
        assert (left.sum(-1) <= skipped.sum(-1) * threshold * (1 + 1e-3)).all()
        assert 0.1 < skipped.double().mean()


def needles(cancel: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Keys that all queries look for; with `cancel` the other keys of their tile make the tile's mean 0."""
    n, random = 1024, torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, n, 64, generator=random).double()
    direction = torch.randn(64, generator=random).double()
    direction /= direction.norm()
    q, k = q + 8 * direction, 0.5 * k
    places = [170, 333, 492, 655]
    for place in places:
        tile = slice(place // 32 * 32, place // 32 * 32 + 32)
        if cancel:
            k[0, 0, tile] -= 10 / 31 * direction + k[0, 0, tile].mean(0)
        k[0, 0, place] = 10 * direction
    return q, k, places


def lost(q: Tensor, k: Tensor, found: Tensor) -> float:
    seen = Blocks(found, (64, 32), 1024, 1024).dense()
    return (oracle.weights(q, k, causal=True) * ~seen).sum(-1).mean().item()


def by_means(q: Tensor, k: Tensor, ours: Tensor) -> Tensor:
    """Return as many tiles for each row, the sink and the local ones included, by averaged queries and keys."""
    scores = q.unflatten(2, (-1, 64)).mean(3) @ k.unflatten(2, (-1, 32)).mean(3).mT
    always = blocks(SALE(math.inf, dense=0), q, k)
    past = torch.arange(32) <= 2 * torch.arange(16)[:, None] + 1
    rank = scores.masked_fill(~past, -math.inf).masked_fill(always, math.inf).argsort(-1, descending=True).argsort(-1)
    return rank < ours.sum(-1, keepdim=True)


def test_it_finds_keys_that_averages_hide(claim: ClaimFixture) -> None:
    q, k, _ = needles(True)
    ours = blocks(SALE(0.05, dense=0), q, k)
    assert ours.double().mean() < 0.5
    claim(
        "single keys whose tile averages to nothing are found: attention lost, 1,024 tokens, 4 needles",
        ours=lost(q, k, ours), baseline=0.25 * lost(q, k, by_means(q, k, ours)), better="lower",
        baseline_name="a quarter of that of as many tiles by averages", seed=0,
    )  # fmt: skip


def test_averages_are_as_good_where_nothing_cancels() -> None:
    q, k, _ = needles(False)
    ours = blocks(SALE(0.05, dense=0), q, k)
    assert abs(lost(q, k, ours) - lost(q, k, by_means(q, k, ours))) < 0.02


def test_short_calls_are_dense() -> None:
    for n_queries, n_keys, dense in ((3, 60, True), (4, 60, False), (20, 20, True), (21, 21, False)):
        op = SALE(0.5, **{**SMALL, "dense": 20})
        q, k, v = qkv(n_queries, n_keys)
        assert (op.selection(q, k, True, 1.0) is None) == dense
        if dense:
            assert_near(op(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


def test_the_plan_counts_the_choice() -> None:
    q, k, _ = qkv(250, heads=4, kv_heads=2, batch=2, width=8, dtype=torch.float32)
    op = SALE(0.1, block_q=16, block_k=8, local=16, dense=0)
    with FlopCounterMode(display=False) as counter:
        op.selection(q, k, True, 1.0)
    assert counter.get_total_flops() == 2 * op.selection_macs(q, k, True) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, r"threshold=-1\.0 must be in"),
        ({"threshold": torch.zeros(2, 2)}, r"threshold=Tensor \(2, 2\) float32 must be \(Hq,\)"),
        ({"threshold": torch.tensor([-1.0])}, "no number below 0"),
        ({"block_q": 0}, "block_q=0"),
        ({"block_k": 0}, "block_k=0"),
        ({"local": 0}, "local=0"),
        ({"bits": 1}, "bits=1"),
        ({"bits": 17}, "bits=17 must be in 2..16"),
        ({"dense": -1}, "dense=-1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SALE(**options)


def test_thresholds_are_one_for_each_query_head() -> None:
    q, k, v = qkv(20)
    with pytest.raises(ShapeError, match=r"one number for each query head, \(Hq,\)=\(4,\); got \(2,\)"):
        SALE(torch.zeros(2), **SMALL)(q, k, v, causal=True)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_halves_until_the_error_is_small() -> None:
    """Every head's threshold is the first of the halves that keeps its output, or 0; the model stays as it is."""
    model, ids = host_models.model("llama"), host_models.tokens(1, 60)
    options = {"start": 0.8, "eps": 0.1, "floor": 0.06}
    with torch.no_grad():
        logits = model(ids).logits
        found = sale_calibrate(model, ids, **options, **SMALL)
        assert torch.equal(model(ids).logits, logits)
    assert found.shape == (3, 4)
    halves = torch.tensor([0.8, 0.4, 0.2, 0.1, 0.0])
    assert torch.isin(found, halves).all() and len(found.unique()) > 1
    calls = {}

    class Watch(host_models.Method):
        def read(self, site: host_models.Site, out: Tensor) -> None:
            calls[site.layer] = (site.q.clone(), site.k.clone(), site.v.clone(), site.scale, out.clone())

    with torch.no_grad(), apply(model, Watch()):
        model(ids)

    def error(layer: int, threshold: Tensor) -> Tensor:
        q, k, v, scale, out = calls[layer]
        return (SALE(threshold, **SMALL)(q, k, v, causal=True, scale=scale) - out).abs().sum((0, 2, 3)) / 60

    for layer in range(3):
        assert (error(layer, found[layer]) <= 0.1 + 1e-5).all()
        before = torch.where(found[layer] > 0, found[layer] * 2, 0.1)
        assert ((error(layer, before) > 0.1) | (found[layer] == 0.8)).all()


def test_a_calibrated_model_reads_a_prompt_as_before() -> None:
    model, ids = host_models.model("llama"), host_models.tokens(1, 60)
    strict, loose = (sale_calibrate(model, ids, start=0.5, eps=eps, floor=0.0, **SMALL) for eps in (0.02, 10.0))
    assert (loose == 0.5).all()
    logits = {}
    with torch.no_grad():
        dense = model(ids).logits
        for name, table in (("strict", strict), ("loose", loose)):
            with apply(model, *sale_prefill(model, table, **SMALL)):
                logits[name] = (model(ids).logits - dense).abs().mean().item()
    assert 0 < logits["strict"] < 0.5 * logits["loose"]


def test_calibrated_methods_are_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = host_models.model("llama"), host_models.tokens(1, 60)
    methods = sale_prefill(model, sale_calibrate(model, ids, start=0.8, eps=0.1, **SMALL), **SMALL)
    logits = []
    for each in (methods, foveate.load(foveate.save(methods, tmp_path / "sale.json"))):
        with torch.no_grad(), apply(model, *each):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_calibration_refuses_what_would_learn_nothing() -> None:
    model = host_models.model("llama")
    with pytest.raises(ShapeError, match=r"sample must be \(1, N\) with N=1025 or more"):
        sale_calibrate(model, host_models.tokens(1, 60))
    with pytest.raises(OptionError, match="eps=-1"):
        sale_calibrate(model, host_models.tokens(1, 60), eps=-1.0)
    with pytest.raises(OptionError, match="sample=.* must be a tensor"):
        sale_calibrate(model, [1, 2])
    with pytest.raises(ShapeError, match=r"thresholds must be \(layers, heads\)=\(3, 4\)"):
        sale_prefill(model, torch.ones(3, 2))
    with pytest.raises(OptionError, match="thresholds must not all be 0"):
        sale_prefill(model, torch.zeros(3, 4))
