"""Small parts of the recurrent families: engines by name, heads, wide sums, bytes of a state, slopes, caches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from foveate.core.call import AttentionCall
from foveate.core.errors import ShapeError, UnsupportedEngine
from foveate.ops import create
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.state_size import state_bytes, tensors
from foveate.ops.functional import alibi
from foveate.ops.functional.heads import accumulating, per_query_head
from tests.support.tensors import qkv


def test_auto_is_the_first_engine() -> None:
    op = create("lightning_attention_2")
    q, k, v = qkv(4)
    names = op.capabilities.engines
    assert [op._engine(AttentionCall(q, k, v, 1.0, engine=name)) for name in ("auto", *names)] == ["chunked", *names]
    with pytest.raises(UnsupportedEngine, match='engine="flex" cannot run .* it runs on auto, chunked, recurrent'):
        op(q, k, v, causal=True, engine="flex")


def test_heads_are_repeated_in_groups_and_not_copied_where_they_agree() -> None:
    for n in (4, 5):  # also if there are as many tokens as heads
        _, k, _ = qkv(n, heads=4, kv_heads=2)
        assert torch.equal(per_query_head(k, 4), k[:, [0, 0, 1, 1]])
        assert per_query_head(k, 2) is k


def test_sums_are_wide() -> None:
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
    for given, kept in {**wide, torch.float64: torch.float64}.items():
        assert accumulating(given) == kept


def test_bytes_of_nested_states() -> None:
    @dataclass
    class Held:
        a: torch.Tensor
        rest: object
        place: int = 3

    one, two = torch.zeros(3, 5), torch.zeros(7, dtype=torch.float64)
    state = Held(one, {"x": [two, None], "y": (Held(one, ()),)})
    assert [x is y for x, y in zip(tensors(state), (one, two, one), strict=True)] == [True] * 3
    assert state_bytes(state) == 2 * 60 + 56
    assert state_bytes(None) == state_bytes(4) == 0


def test_slopes() -> None:
    assert alibi.alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi.alibi_slopes(1).tolist() == [2.0**-8]
    # the slopes of 4 heads, then every other one of 8
    assert alibi.alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi.alibi_slopes(12)[8:].tolist() == pytest.approx([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])


def test_a_cache_takes_what_fits() -> None:
    state = KVState.empty(2, 3, 4, 5, torch.float32, torch.device("cpu"))
    k, v = torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 5)
    held = state.append(k, v).append(2 * k, 2 * v)
    assert held.k[0, 0, :, 0].tolist() == [1, 2] == held.v[1, 2, :, 4].tolist()
    for bad_k, bad_v, name in (
        (k[:1], v, "k"), (k[:, :2], v, "k"), (k[..., :3], v, "k"), (k.double(), v, "k"), (k, v[..., :4], "v"),
        (torch.ones(3, 3, 1, 4), v, "k"), (torch.ones(2, 4, 1, 4), v, "k"), (torch.ones(2, 3, 1, 5), v, "k"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=f"{name} must fit the state"):
            held.append(bad_k, bad_v)
