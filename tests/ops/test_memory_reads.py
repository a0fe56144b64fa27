"""Memories that answer queries with the weights at the start of their chunk: `reads="chunk"`."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.ops.functional.fast_weights import shares, shares_at_the_end
from foveate.ops.memory.titans import Titans
from tests.ops.test_memory import DIM, HEADS, LENGTH, VALUE, inputs_of, titans


@pytest.mark.parametrize("engine", ["chunked", "recurrent"])
@pytest.mark.parametrize("depth", [1, 2])
def test_read_by_chunks_of_one_is_reading_before_writing(engine, depth):
    """Token t reads the memory of the tokens before it; the first one reads the initial weights."""
    op = titans(depth=depth, chunk=1, reads="chunk")
    (q, k, v), rates = inputs_of(op)
    state, expected = op.init_state(2, HEADS, HEADS, DIM, VALUE, dtype=torch.float64), []
    for t in range(LENGTH):
        at = slice(t, t + 1)
        expected.append(op.recall(q[:, :, at], state))
        _, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, **{n: x[:, :, at] for n, x in rates.items()})
    out = op(q, k, v, causal=True, engine=engine, **rates)
    torch.testing.assert_close(out, torch.cat(expected, 2), rtol=1e-10, atol=1e-12)
    written = titans(depth=depth, chunk=1)(q, k, v, causal=True, engine=engine, **rates)
    assert (out - written).abs().amax((0, 1, 3)).min() > 1e-6


def test_how_queries_are_read_does_not_change_what_is_written():
    found = []
    for reads in ("token", "chunk"):
        op = titans(depth=2, chunk=4, reads=reads)
        (q, k, v), rates = inputs_of(op)
        _, state = op.prefill(q, k, v, **rates)
        found.append([*state.memory, *state.momentum, *state.anchor])
        assert state.place == LENGTH % 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("depth", [1, 2])
def test_read_by_chunks_costs_less(depth):
    """PyTorch's counter and the plan agree that it takes at most four fifths of the products, for equal chunks."""
    seen, planned = {}, {}
    for reads in ("token", "chunk"):
        op = Titans(2, 32, depth=depth, chunk=16, reads=reads)
        q, k, v = torch.randn(3, 1, 2, 128, 32, generator=torch.Generator().manual_seed(0)).unbind()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            op(q, k, v, causal=True)
        seen[reads], planned[reads] = counter.get_total_flops(), op.plan(q, k, v, causal=True).flops
    assert seen["chunk"] < 0.8 * seen["token"]
    assert planned["chunk"] < 0.8 * planned["token"]
    assert 0.85 < planned["chunk"] / seen["chunk"] < 1.15


@pytest.mark.parametrize("zeros", [False, True])
def test_shares_at_the_end_are_the_last_of_all(zeros):
    g = torch.Generator().manual_seed(0)
    rates = {n: torch.rand(2, 3, 7, generator=g, dtype=torch.float64) for n in ("alpha", "eta", "theta", "write")}
    if zeros:
        rates["eta"][:, :, [0, 4]] = 0.0
        rates["alpha"][:, :, [3, 6]] = 1.0
    for rate in rates.values():
        rate.requires_grad_()
    found = []
    for made in (shares(rates), shares_at_the_end(rates)):
        rows = [part[:, :, -1:] for part in made]
        seen = torch.cat(rows).square().sum()
        found.append([*rows, *torch.autograd.grad(seen, list(rates.values()))])
    for every, last in zip(*found, strict=True):
        torch.testing.assert_close(last, every, rtol=1e-10, atol=1e-12)


def test_a_bad_token_shows_from_the_next_chunk_on():
    op = titans(depth=2, chunk=4, reads="chunk")
    (q, k, v), rates = inputs_of(op)
    clean = op(q, k, v, causal=True, **rates)
    for x in (k, v, *rates.values()):
        dirty = x.detach().clone()
        dirty[:, :, 5] = float("nan")
        given = [dirty if y is x else y for y in (k, v)]
        out = op(q, *given, causal=True, **{name: dirty if y is x else y for name, y in rates.items()})
        torch.testing.assert_close(out[:, :, :8], clean[:, :, :8], rtol=0, atol=0)
        assert out[:, :, 8:].isnan().all()
