"""Policies against NVIDIA's kvpress: the tokens that each layer and head keeps of the same prompt.

kvpress needs an older transformers, so that its side is a record: `kvpress_record.py` makes it and says how.

All layers can be compared. Both sides drop keys after a layer's attention to the whole prompt, so that no layer of a
prompt in one call reads a compressed one, and the deeper layers have the same inputs as well. They differ where a layer
was compressed before: in a prompt of several calls, and while decoding, which the record has none of.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import (
    TOVA,
    AdaKV,
    CapKV,
    ChunkKV,
    CriticalKV,
    CurDKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    PyramidKV,
    ScorePolicy,
    SnapKV,
)
from tests.parity import kvpress_record as record
from tests.parity.kvpress_record import RATIOS, Kept
from tests.support.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text())
WINDOW = {"recent": 8, "pool": 5}


def snapkv(share: float) -> SnapKV:
    return SnapKV(share=share, **WINDOW)


def kvzip(share: float, **options: Any) -> KVzip:
    return KVzip(share=share, tokenizer=record.Letters(), **options)


#: Ours for each press of the record that keeps the same, at a share that is kept.
POLICIES: dict[str, Callable[[float], ScorePolicy]] = {
    "knorm": lambda share: KNorm(share=share),
    "keydiff": lambda share: KeyDiff(share=share),
    "tova": lambda share: TOVA(share=share),
    "snapkv": snapkv,
    "snapkv, no pooling": lambda share: SnapKV(share=share, recent=8, pool=1),
    "pyramidkv, beta 2": lambda share: PyramidKV(share=share, beta=2, **WINDOW),
    "expected_attention": lambda share: ExpectedAttention(share=share),
    "expected_attention, epsilon 0.01": lambda share: ExpectedAttention(share=share, epsilon=0.01),
    "expected_attention, no covariance": lambda share: ExpectedAttention(share=share, covariance=False),
    "lagkv": lambda share: LagKV(share=share, lag=12),
    "lagkv, across partitions": lambda share: LagKV(share=share, lag=12, cross=True),
    "lagkv, short text": lambda share: LagKV(share=share),
    "adakv": lambda share: AdaKV(snapkv(share), variant="kvpress"),
    "adakv, knorm": lambda share: AdaKV(KNorm(share=share), variant="kvpress"),
    "criticalkv": lambda share: CriticalKV(snapkv(share)),
    "criticalkv, knorm": lambda share: CriticalKV(KNorm(share=share)),
    "criticalkv, adaptive": lambda share: CriticalKV(AdaKV(snapkv(share), variant="kvpress")),
    "chunkkv, chunks of 4": lambda share: ChunkKV(snapkv(share), chunk=4),
    "chunkkv, knorm": lambda share: ChunkKV(KNorm(share=share), chunk=5),
    "cur_dkv": lambda share: CurDKV(share=share),
    "cur_dkv, mean, windows of 10": lambda share: CurDKV(share=share, kind="mean", window=10),
    "cur_dkv, values of the whole": lambda share: CurDKV(share=share, kind="value", window=None),
    "cap_kv": lambda share: CapKV(share=share),
    "kvzip": kvzip,
    "kvzip, parts of 24": lambda share: kvzip(share, chunk=24),
    "kvzip, layers": lambda share: kvzip(share, heads="adaptive"),
    "kvzip, plus": lambda share: kvzip(share, plus=True),
}


@cache
def llama() -> PreTrainedModel:
    return record.model()


@torch.no_grad()
def kept(policy: ScorePolicy) -> Kept:
    cache = DynamicCache()
    with apply(llama(), policy):
        llama()(record.ids(), past_key_values=cache)
        layers = [layer.store.padded("positions")[0] for layer in cache.layers]
    return [[sorted(p for p in head.tolist() if p >= 0) for head in layer] for layer in layers]


def test_both_sides_have_the_same_keys() -> None:
    assert_near(Tensor(record.sample(record.keys(llama()))), Tensor(RECORD["keys"]), 1e-4)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_layer_and_head_keeps_the_same_tokens(name: str, ratio: float) -> None:
    assert kept(POLICIES[name](1 - ratio)) == RECORD[name][str(ratio)]


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_policy_with_adaptive_heads_is_adakv(ratio: float) -> None:
    assert kept(replace(snapkv(1 - ratio), heads="adaptive")) == RECORD["adakv"][str(ratio)]


def test_a_record_can_tell_presses_apart() -> None:
    """No two presses keep the same of the prompt where half of it stays; the same layers and heads are in all."""
    found = [RECORD[name]["0.5"] for name in POLICIES]
    assert all(len(layers) == record.LAYERS and len(layers[0]) == record.KV_HEADS for layers in found)
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


# -- where the two differ, and why -------------------------------------------------------------------------------------


def test_kvpress_rounds_the_number_down() -> None:
    """A share of 0.7 of 64 tokens is 44.8: kvpress keeps 44, we the nearest number, and the same ones otherwise.

    Downwards has a trap: 1 - 0.9 is a little less than 0.1, so that kvpress keeps 4 of 50 tokens at a ratio of 0.9.
    """
    for ours, theirs in zip(kept(KNorm(share=0.7)), RECORD["knorm"]["0.3"], strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert (len(mine), len(other)) == (45, 44) and set(other) < set(mine)


def test_of_a_window_beyond_the_budget_the_newest_tokens_stay() -> None:
    """In kvpress all of a window has one score, and the sort's whim decides which of it stays where not all can."""
    window = range(record.LENGTH - 24, record.LENGTH)
    ours, theirs = kept(SnapKV(share=0.25, recent=24)), RECORD["snapkv, wide window"]["0.75"]
    for layer, other in zip(ours, theirs, strict=True):
        assert all(head == list(window)[-16:] for head in layer)
        assert all(set(head) < set(window) and len(head) == 16 for head in other)


def test_an_adaptive_budget_leaves_each_head_a_token() -> None:
    """A fifth of 2 tokens is none; with a safeguard at all, both sides keep one. Without, a head of ours is empty."""
    few = 2 / record.LENGTH
    assert kept(KNorm(share=few, heads="adaptive")) == RECORD["adakv, knorm"][str(1 - few)]
    assert not all(map(all, kept(KNorm(share=few, heads="adaptive", safeguard=0.0))))


def test_pyramidkv_has_other_numbers_in_kvpress() -> None:
    """kvpress counts the window within a layer's number, and still caps that at the tokens before the window.

    It has equal numbers where the smallest does not hold the window, as at a quarter. Ours is capped at all tokens, and
    `even` has the window apart, as in the paper. The order of tokens is the same, so that the fewer are of the more.
    """
    of_both = {
        0.25: ([64, 48, 32], [56, 48, 40]), 0.5: ([62, 32, 2], [56, 32, 8]), 0.75: ([31, 16, 1], [16, 16, 16]),
    }  # fmt: skip
    for ratio, (numbers, others) in of_both.items():
        ours, theirs = kept(PyramidKV(share=1 - ratio, **WINDOW)), RECORD["pyramidkv"][str(ratio)]
        assert [len(layer[0]) for layer in ours] == numbers and [len(layer[0]) for layer in theirs] == others
        for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            assert set(mine) <= set(other) or set(other) <= set(mine)


def test_lagkv_has_ties_between_partitions() -> None:
    """A budget that does not split evenly: kvpress's sort decides between equal ranks, ours takes the newest."""
    ours, theirs = kept(LagKV(share=0.5, lag=8)), RECORD["lagkv, ties"]["0.5"]
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        scored = [sorted(p for p in head if 4 <= p < 52) for head in (mine, other)]
        for head in scored:  # 16 tokens of 6 partitions: the best two of each, and four thirds
            assert set(Counter((p - 4) // 8 for p in head).values()) == {2, 3} and len(head) == 16
        assert len(set(scored[0]) & set(scored[1])) >= 12 and mine[-12:] == other[-12:]
        assert {(p - 4) // 8 for p in set(scored[0]) - set(scored[1])} <= {2, 3, 4, 5}


def test_a_window_that_is_no_whole_chunks() -> None:
    """kvpress scores a window above all, so that its chunks stay whole, beyond the window; ours keeps the window.

    With its chunks of 20, kvpress so keeps half a text without looking at it, or 4 of 64 tokens at a quarter: a budget
    counts chunks, and the last is a short one. Ours counts tokens, and takes what fits of a chunk that is too long.
    """
    for ratio in RATIOS:
        ours, theirs = kept(ChunkKV(snapkv(1 - ratio), chunk=5)), RECORD["chunkkv, chunks of 5"][str(ratio)]
        for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            assert set(other) - set(mine) == {55} and set(mine) < set(other)
    theirs = [RECORD["chunkkv"][str(ratio)] for ratio in RATIOS]
    for half, quarter in zip(*map(itertools.chain.from_iterable, theirs), strict=True):
        assert half == list(range(40, 64)) and quarter == list(range(60, 64))
    assert {len(head) for layer in kept(ChunkKV(snapkv(0.25))) for head in layer} == {16}


def test_pools_have_a_middle() -> None:
    """kvpress fails for an even width in the middle of a prompt, since its pool is one longer then."""
    with pytest.raises(OptionError, match="pool=4"):
        SnapKV(pool=4)
