"""Linear operators that compute features span by span give the same results and never hold all features."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.bench.parts.memory import peak_bytes
from foveate.ops.base import linear_spans
from foveate.ops.base.linear import Linear
from foveate.ops.linear.based import TaylorAttention
from foveate.ops.linear.hedgehog import Hedgehog
from foveate.ops.operator import CAUSAL_PATTERNS, Pattern

HEADS, DIM, VALUE, BLOCK = 4, 6, 5, 8
PATTERNS: tuple[Pattern, ...] = ("self", "causal self", "cross", "causal cross")


@final
class Fading(Linear):
    """A fixed decay for each head, or one for each feature of a key."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL_PATTERNS)
    tokenwise: ClassVar[bool] = True

    def __init__(self, by_key: bool) -> None:
        super().__init__()
        self.by_key = by_key

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return F.softplus(q * scale)

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return F.softplus(k)

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return F.logsigmoid(k) if self.by_key else -torch.linspace(0, 2, k.shape[1], dtype=k.dtype)


OPERATORS = {
    "hedgehog": lambda: Hedgehog(HEADS, DIM, "exp", gain=0.5).double(),
    "taylor": TaylorAttention,
    "fading": lambda: Fading(False),
    "fading by key": lambda: Fading(True),
}
CASES = [
    (name, pattern)
    for name, make in OPERATORS.items()
    for pattern in PATTERNS
    if pattern in make().capabilities.patterns
]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set spans of one block."""
    monkeypatch.setattr(linear_spans, "ROWS", 1)


def made(name: str) -> Linear:
    op = OPERATORS[name]()
    op.block = BLOCK
    return op


def drawn(n: int, n_queries: int, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, HEADS, n_queries, DIM), (2, kv_heads, n, DIM), (2, kv_heads, n, VALUE)
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("name", "pattern"), CASES, ids=[", ".join(case) for case in CASES])
@pytest.mark.parametrize("masked", [False, True])
def test_spans_are_the_whole_matrix_in_outputs_and_gradients(name: str, pattern: Pattern, masked: bool) -> None:
    op, causal = made(name), pattern.startswith("causal")
    q, k, v = drawn(43, 27 if pattern.endswith("cross") else 43)  # the last span is ragged, and so is the past
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 43, dtype=torch.bool)
        mask[0, ..., :9] = mask[1, ..., [3, 20, 42]] = False
        k, v = (x.detach().masked_fill(~mask.mT, math.nan).requires_grad_() for x in (k, v))
    seen = torch.randn(2, HEADS, q.shape[2], VALUE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for engine in ("chunked", "reference"):
        out = op(q, k, v, mask=mask, causal=causal, engine=engine)
        found.append([out, *torch.autograd.grad((out * seen).sum(), [q, k, v, *op.parameters()])])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("n_queries", [0, 5, 43])
def test_the_state_after_a_prompt_is_that_of_its_steps(name: str, n_queries: int) -> None:
    op, (q, k, v) = made(name), drawn(43, 43)
    with torch.no_grad():
        out, found = op.prefill(q[:, :, 43 - n_queries :], k, v)
        state = op.init_state(2, HEADS, 2, DIM, VALUE, dtype=torch.float64)
        for t in range(43):
            at = slice(t, t + 1)
            y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
    torch.testing.assert_close(found.sums, state.sums, rtol=1e-9, atol=1e-11)
    assert out.shape == (2, HEADS, n_queries, VALUE)
    if n_queries:
        torch.testing.assert_close(out[:, :, -1:], y, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_and_no_queries(causal: bool) -> None:
    op, (q, k, v) = made("hedgehog"), drawn(12, 12)
    assert op(q[:, :, :0], k, v, causal=causal).shape == (2, HEADS, 0, VALUE)
    empty = op(q[:, :, :0] if causal else q, k[:, :, :0], v[:, :, :0], causal=causal)
    assert empty.shape == (2, HEADS, 0 if causal else 12, VALUE)
    assert not empty.any()
    _, state = op.prefill(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    assert state.sums.shape == (2, HEADS, 2 * DIM, VALUE + 1)
    assert not state.sums.any()


@pytest.mark.parametrize("key", ["hedgehog", "taylor"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_features_of_all_tokens_never_exist_at_once(key: str, causal: bool) -> None:
    """A call's peak memory is less than the features of its keys."""
    n, dim = 8192, 16
    op = Hedgehog(HEADS, dim) if key == "hedgehog" else TaylorAttention()
    q, k, v = torch.randn(3, 1, HEADS, n, dim, generator=torch.Generator().manual_seed(0)).unbind()
    v = v[..., :4]  # so that the output itself does not count
    with torch.inference_mode():
        width = op.key_features(k[:, :, :1], 1.0).shape[-1]
        most = peak_bytes(lambda: op(q, k, v, causal=causal), torch.device("cpu"))
    assert most < HEADS * n * width * 4


@pytest.mark.parametrize(("batch", "heads", "most"), [(1, 2, 700), (1, 8, 256), (2, 16, 64), (8, 64, 64)])
def test_spans_are_shorter_the_more_heads_and_sequences_there_are(
    batch: int, heads: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A span has 2048 rows of features, and at least one block of tokens."""
    op, lengths = TaylorAttention(), []
    features = op.query_features

    def noted(q: Tensor, scale: float) -> Tensor:
        lengths.append(q.shape[2])
        return features(q, scale)

    monkeypatch.setattr(op, "query_features", noted)
    q = torch.zeros(batch, heads, 700, 2)
    op(q, q, q, causal=True)
    assert (max(lengths), sum(lengths)) == (most, 700)
