"""The sliding window with sinks, and the claim of StreamingLLM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.core import masks, oracle
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.support.tensors import assert_near, qkv


@pytest.mark.parametrize(("n_queries", "n_keys"), [(200, 200), (3, 200), (1, 200)])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 4), (150, 4), (500, 0)])
def test_it_is_attention_under_the_windows_mask(n_queries: int, n_keys: int, window: int, sinks: int) -> None:
    q, k, v = qkv(n_queries, n_keys)
    expected = oracle.attention(q, k, v, mask=masks.window(n_queries, n_keys, window, sinks=sinks))
    assert_near(SlidingWindow(window, sinks)(q, k, v, causal=True), expected, 1e-12)


def test_cost_follows_the_window() -> None:
    x = torch.zeros(1, 1, 8192, 8)
    few, many = (SlidingWindow(512, sinks).plan(x, x, x, causal=True, engine="gather") for sinks in (0, 4))
    assert few.density < 0.16
    assert few.flops < many.flops < 1.4 * few.flops


def local_heads(sink: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make heads that attend to near keys and, with `sink`, put the rest on the first key, whose value is near zero."""
    q, k, v = qkv(256, heads=4, kv_heads=4, width=16, dtype=torch.float32)
    angle = torch.arange(256)[:, None] * torch.exp2(-torch.arange(8.0))
    place = torch.cat([angle.cos(), angle.sin()], -1)
    q, k, v = q + 3 * place, k + 3 * place, v.clone()
    if sink:
        anchor = torch.nn.functional.normalize(q.mean((0, 2)), dim=-1)
        k[:, :, 0] = sink * anchor
        v[:, :, 0] = 0.0
    return q, k, v


def test_sinks_keep_a_stream_near_full_attention(claim) -> None:
    q, k, v = local_heads(sink=30.0)
    full = oracle.attention(q, k, v, causal=True)

    def error(op: SlidingWindow) -> float:
        late = slice(64, None)  # queries whose window has passed the first key
        return ((op(q, k, v, causal=True) - full)[:, :, late].norm() / full[:, :, late].norm()).item()

    claim(
        "a few kept first tokens keep streaming close to full attention: relative error",
        ours=error(SlidingWindow(60, 4)), baseline=error(SlidingWindow(64, 0)), better="lower", margin=1.0,
        baseline_name="window of the same size", seed=0,
    )  # fmt: skip


def test_without_a_sink_first_tokens_gain_nothing() -> None:
    """Without sinks, four more keys gain nothing."""
    q, k, v = local_heads(sink=0.0)
    full = oracle.attention(q, k, v, causal=True)
    with_sinks, without = (
        (SlidingWindow(64 - sinks, sinks)(q, k, v, causal=True) - full)[:, :, 64:].norm() for sinks in (4, 0)
    )
    assert with_sinks > 0.95 * without


def test_a_stream_keeps_only_visible_keys() -> None:
    op = SlidingWindow(window=4, sinks=2)
    q, k, v = qkv(15)
    state, out = op.init_state(2, 4, 2, 8, 8, dtype=torch.float64), []
    for t in range(15):
        at = slice(t, t + 1)
        y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
        out.append(y)
        assert state.k.shape[2] == min(t + 1, 6)
    assert_near(torch.cat(out, 2), op(q, k, v, causal=True), 1e-12)
    _, prefilled = op.prefill(q, k, v)
    assert torch.equal(prefilled.k, state.k)
    assert torch.equal(prefilled.v, state.v)


def test_a_budget_is_the_window_and_its_sinks() -> None:
    op = SlidingWindow.at_budget(0.25, 1024)
    assert (op.window, op.sinks) == (252, 4)
    assert SlidingWindow.at_budget(0.001, 1024).window == 1
