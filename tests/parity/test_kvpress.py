"""Policies against NVIDIA's kvpress: the tokens that each layer and head keeps of the same prompt.

kvpress needs an older transformers, so that its side is a record: `kvpress_record.py` makes it and says how.

All layers can be compared. Both sides drop keys after a layer's attention to the whole prompt, so that no layer of a
prompt in one call reads a compressed one, and the deeper layers have the same inputs as well. They differ where a layer
was compressed before: in a prompt of several calls, and while decoding, which the record has none of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.core.errors import OptionError
from foveate.host import apply
from foveate.kv import TOVA, KeyDiff, KNorm, ScorePolicy, SnapKV
from tests.parity import kvpress_record as record
from tests.parity.kvpress_record import RATIOS, Kept
from tests.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text())
WINDOW = {"recent": 8, "pool": 5}

#: Ours for each press of the record, at a share that is kept.
POLICIES: dict[str, Callable[[float], ScorePolicy]] = {
    "knorm": lambda share: KNorm(share=share),
    "keydiff": lambda share: KeyDiff(share=share),
    "tova": lambda share: TOVA(share=share),
    "snapkv": lambda share: SnapKV(share=share, **WINDOW),
    "snapkv, no pooling": lambda share: SnapKV(share=share, recent=8, pool=1),
    "adakv": lambda share: SnapKV(share=share, heads="adaptive", **WINDOW),
    "adakv, knorm": lambda share: KNorm(share=share, heads="adaptive"),
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


def test_a_record_can_tell_presses_apart() -> None:
    """No two presses keep the same, at either ratio; the same layers and heads are in all."""
    for ratio in map(str, RATIOS):
        found = [RECORD[name][ratio] for name in POLICIES]
        assert all(len(layers) == record.LAYERS and len(layers[0]) == record.KV_HEADS for layers in found)
        assert all(one != other for i, one in enumerate(found) for other in found[:i])


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


def test_pools_have_a_middle() -> None:
    """kvpress fails for an even width in the middle of a prompt, since its pool is one longer then."""
    with pytest.raises(OptionError, match="pool=4"):
        SnapKV(pool=4)
