"""Memory-efficient attention equals softmax attention for every chunk size, forward and backward, without a matrix."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.bench.parts.memory import peak_bytes
from foveate.core import online_softmax, oracle
from foveate.core.errors import OptionError, UnsupportedEngine
from foveate.ops import create
from foveate.ops.dense.memory_efficient_attention import MemoryEfficientAttention
from foveate.ops.dense.softmax import Softmax
from tests.support.tensors import assert_near, gradients, qkv

CHUNKS = pytest.mark.parametrize(("q_chunk", "k_chunk"), [(1, 130), (7, 64), (64, 7), (130, 1), (1024, 4096)])


@CHUNKS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_it_is_softmax_attention_for_every_chunk(q_chunk: int, k_chunk: int, causal: bool, learned: bool) -> None:
    q, k, v = qkv(130, batch=1, heads=2, kv_heads=2, value_width=5, dtype=torch.float32, grad=True)
    bias = torch.randn(2, 130, 130, generator=torch.Generator().manual_seed(5)).requires_grad_(learned)
    full = bias.masked_fill(~torch.ones(130, 130, dtype=torch.bool).tril(), float("-inf")) if causal else bias
    exact = F.scaled_dot_product_attention(q, k, v, full, scale=0.4)
    ours = MemoryEfficientAttention(q_chunk, k_chunk)(q, k, v, mask=bias, causal=causal, scale=0.4)
    assert_near(ours, exact, 1e-5)
    wanted = [q, k, v, bias] if learned else [q, k, v]
    for one, other in zip(gradients(ours, wanted), gradients(exact, wanted), strict=True):
        assert_near(one, other, 1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(causal: bool) -> None:
    q, k, v = qkv(130, heads=2, dtype=torch.float32)
    q = 1e3 * q
    out = MemoryEfficientAttention(32, 16)(q, k, v, causal=causal)
    assert_near(out, oracle.attention(q.double(), k.double(), v.double(), causal=causal, scale=8**-0.5), 1e-4)


def parts(count: int, seed: int = 0) -> list[online_softmax.Partial]:
    """Return partial results of disjoint keys; the second one saw no key."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        logits = 20 * torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
        values = torch.randn(2, 4, 5, generator=random, dtype=torch.float64)
        made.append(online_softmax.partial(logits.fill_(float("-inf")) if index == 1 else logits, values))
    return made


def test_partial_results_merge_in_any_order_and_grouping() -> None:
    a, b, c = parts(3)
    merged = [reduce(online_softmax.merge, order) for order in permutations((a, b, c))]
    merged.append(online_softmax.merge(a, online_softmax.merge(b, c)))
    for other in merged[1:]:
        for one, two in zip(merged[0], other, strict=True):
            assert_near(one, two, 1e-10)


def test_logits_are_overwritten_only_inplace() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = float("-inf")
    before, values = logits.clone(), torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    kept = online_softmax.partial(logits, values)
    assert torch.equal(logits, before)
    for one, other in zip(online_softmax.partial(logits, values, inplace=True), kept, strict=True):
        assert torch.equal(one, other)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes of merged tiles."""
    seen: list[tuple[int, ...]] = []
    partial = online_softmax.partial

    def watched(logits: Tensor, values: Tensor, **options: bool) -> online_softmax.Partial:
        seen.append(tuple(logits.shape[-2:]))
        return partial(logits, values, **options)

    monkeypatch.setattr(online_softmax, "partial", watched)
    return seen


def test_chunks_have_the_given_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    q, k, v = qkv(10, 14)
    MemoryEfficientAttention(4, 8)(q, k, v)
    assert seen == [(4, 8), (4, 6), (4, 8), (4, 6), (2, 8), (2, 6)]
    seen.clear()
    MemoryEfficientAttention(4, 8)(q, k, v, causal=True)
    assert seen == [(4, 8), (4, 8), (4, 4), (2, 8), (2, 6)]
    op = MemoryEfficientAttention()
    assert (op.q_chunk, op.k_chunk) == (1024, 4096)
    plan = op.plan(q, k, v)
    assert plan.engine == "chunked"
    assert "in chunks of 1024 queries and 4096 keys" in plan.why


N, D = 4096, 32


def peak(op: MemoryEfficientAttention | Softmax, engine: str, backward: bool, width: int = D) -> int:
    inputs = qkv(N, batch=1, heads=1, kv_heads=1, width=width, dtype=torch.float32, grad=backward)

    def work() -> None:
        out = op(*inputs, engine=engine)
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    return peak_bytes(work, torch.device("cpu"))


@pytest.mark.parametrize(("backward", "least"), [(False, 20), (True, 8)])
def test_memory_that_the_matrix_would_take(backward: bool, least: int, claim) -> None:
    ours, naive = (
        peak(op, engine, backward)
        for op, engine in ((MemoryEfficientAttention(256, 256), "auto"), (Softmax(), "reference"))
    )
    matrix = 4 * N * N
    assert ours < matrix / least
    claim(
        f"chunks of 256 need less memory: MB at {N} tokens, {'forward and backward' if backward else 'forward'}",
        ours=ours / 1e6, baseline=naive / 1e6, better="lower", margin=(1 - 1 / least) * naive / 1e6,
        baseline_name="the reference engine with its matrix", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(("backward", "tiles"), [(False, 1.2), (True, 2.3)])
def test_few_tiles_are_alive_at_a_time(backward: bool, tiles: float) -> None:
    """One tile is alive forward, and a tile and its gradient backward, besides inputs, output and their gradients."""
    assert peak(MemoryEfficientAttention(1024, 1024), "auto", backward, width=8) < tiles * 4 * 1024 * 1024


def test_memory_does_not_grow_with_the_square() -> None:
    def needed(n: int) -> int:
        q, k, v = qkv(n, batch=1, heads=1, kv_heads=1, width=8, dtype=torch.float32)
        return peak_bytes(lambda: MemoryEfficientAttention(128, 128)(q, k, v), torch.device("cpu"))

    assert needed(4096) < 2.5 * needed(2048)


@pytest.mark.parametrize(
    ("options", "message"), [({"q_chunk": 0}, "q_chunk=0"), ({"k_chunk": 2.5}, "k_chunk=2.5"), ({"chunk": 4}, "chunk")]
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create("memory_efficient_attention", **options)


@pytest.mark.parametrize("engine", ["fused", "flex", "gather"])
def test_engines_that_have_no_chunks_are_refused(engine: str) -> None:
    with pytest.raises(UnsupportedEngine, match="the call names the chunks to compute it in"):
        MemoryEfficientAttention()(*qkv(6), engine=engine)
