"""Capabilities: the saved file equals the classes' declarations, and declared growth equals the cost."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.bench.capabilities import snapshot
from foveate.core.catalog import CAPABILITIES, CATEGORIES, capabilities, grouped, systems
from foveate.core.errors import UnknownKey
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.ops.base.selective import Selective
from tests.contracts.operators import CLASSES, HEADS, WIDTH, example
from tests.support.tensors import qkv

#: Bounds on the cost of four times the tokens over the cost of the tokens, for each declared growth.
RANGES = {"N": (3.5, 4.5), "N log N": (4.0, 7.0), "N²": (9.0, 17.0)}


def test_the_saved_facts_are_those_of_the_classes() -> None:
    assert json.loads(CAPABILITIES.read_text("utf-8")) == snapshot(), "make systems writes them anew"


@pytest.mark.parametrize("key", CLASSES)
def test_time_grows_as_declared(key: str) -> None:
    """A plan's flops on one engine grow as declared, at lengths where constant costs are small."""
    op = example(key)
    causal, engine = "self" not in op.capabilities.patterns, "gather" if isinstance(op, Selective) else "auto"

    def flops(length: int) -> float:
        q, k, v = (x.float() for x in qkv(length, batch=1, heads=HEADS, kv_heads=HEADS, width=WIDTH))
        return op.float().plan(q, k, v, causal=causal, engine=engine).flops

    low, high = RANGES[op.capabilities.growth]
    length = 4096 if op.capabilities.growth == "N" else 1024  # a window's blocks have reached their size there
    assert low <= flops(4 * length) / flops(length) <= high, op.capabilities.growth


def test_a_layer_grows_as_its_operator_does() -> None:
    assert MultiHeadAttention(16, 2).capabilities.growth == "N²"
    assert MultiHeadAttention(16, 2, op="hedgehog").capabilities.growth == "N"


def test_systems_without_such_facts() -> None:
    assert capabilities("sink_recent") == {}
    assert capabilities("hedgehog")["growth"] == "N"


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_system_has_a_taxonomy(category: str) -> None:
    groups = grouped(systems(), category)
    assert list(groups) == list(CATEGORIES[category])
    assert {row.key for rows in groups.values() for row in rows} == {row.key for row in systems()}


def test_groups() -> None:
    keys = {place: {row.key for row in rows} for place, rows in grouped(systems(), "positions").items()}
    assert {"hip", "token_select"} <= keys["hard"]
    assert "softmax" in keys["soft"]
    assert "sliding_window" in keys["local"]
    assert "sliding_window" not in keys["soft"]
    with pytest.raises(UnknownKey, match='unknown category "position"; did you mean "positions"'):
        grouped(systems(), "position")


def test_facts_hold_for_the_defaults() -> None:
    found = snapshot()
    assert found["sigmoid_attention"]["streams"] is None, "its default bias counts the keys of the call"
    assert found["sigmoid_attention"]["by_options"] == {"streams": "exact", "state": "grows"}
    assert (found["music_transformer"]["growth"], found["music_transformer"]["by_options"]) == ("N²", {"growth": "N"})
    assert found["sliding_window"]["state"] == "constant"
    assert found["moh"]["by_options"] == {}, "its defaults are for more heads: only an example is left"


def test_groups_by_facts() -> None:
    families = {name: [row.key for row in rows] for name, rows in grouped(systems(), "family").items()}
    assert "hedgehog" in families["linear"]
    assert "softmax" in families["scored"]
    assert "token_select" in families["none"]
    assert sum(map(len, families.values())) == len(systems())
    assert all(row.room == room for room, rows in grouped(systems(), "room").items() for row in rows)


def test_facts_are_plain() -> None:
    for facts in snapshot().values():
        assert facts["patterns"]
        assert facts["state"] in (None, "constant", "grows")
        assert (facts["streams"] is None) == (facts["state"] is None)
    assert torch.is_grad_enabled()
