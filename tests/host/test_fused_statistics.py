"""Statistics from fused kernels agree with the whole matrix."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from foveate.core import masks, oracle
from foveate.host import fused_statistics, one_pass
from foveate.host.fused_statistics import Statistics, received, statistics, with_bias
from tests.support.tensors import assert_near, qkv


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    """Draw a call: grouped heads, more keys than queries, padding of keys and queries on either side."""
    groups, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    nq, past = draw(st.integers(1, 9)), draw(st.integers(0, 7))
    causal = draw(st.booleans())
    q, k, _ = qkv(
        nq, nq + past, heads=groups * kv_heads, kv_heads=kv_heads, width=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    padding = draw(st.sampled_from(["none", "left", "right"]))
    real = torch.ones(2, nq + past, dtype=torch.bool)
    hidden = draw(st.integers(0, nq + past))
    if hidden and padding != "none":
        real[0, :hidden] = padding == "right"
        real[0, hidden:] = padding == "left"
    return {
        "q": 2 * q, "k": k, "causal": causal, "scale": draw(st.floats(0.1, 2.0)),
        "key_mask": None if padding == "none" else real,
        "query_mask": None if padding == "none" else real[:, -nq:],
    }  # fmt: skip


def dense(call: dict[str, Tensor]) -> Tensor:
    """Return the weights of the counted queries, in float64."""
    mask = None if call["key_mask"] is None else call["key_mask"][:, None, None]
    w = oracle.weights(call["q"], call["k"], mask=mask, causal=call["causal"], scale=call["scale"])
    return w if call["query_mask"] is None else w * call["query_mask"][:, None, :, None]


def logits_over(call, logits: Tensor) -> Tensor:
    """The log-sum-exp of each query's visible logits."""
    n, m = logits.shape[-2:]
    seen = masks.causal(n, m) if call["causal"] else torch.ones(n, m, dtype=torch.bool)
    if call["key_mask"] is not None:
        seen = seen & call["key_mask"][:, None, None]
    return logits.masked_fill(~seen, float("-inf")).logsumexp(-1)


@settings(max_examples=120, deadline=None)
@given(call=calls(), tile=st.sampled_from([0, 20, 1 << 17]))
def test_every_statistic_agrees_with_the_matrix(call, tile: int) -> None:
    """From the fused kernel (`tile=0`), and from one pass over tiles of any size."""
    with patch.object(Statistics, "_by_tiles", tile > 0), patch.object(one_pass, "TILE", tile):
        check(call, Statistics(**call))


def check(call, stats: Statistics) -> None:
    w = dense(call)
    groups = call["q"].shape[1] // call["k"].shape[1]
    counted = w.sum(-1) > 0
    assert_near(stats.received, w.sum(-2), 1e-4, "received")
    assert torch.equal(stats.counted.expand_as(counted), counted)
    logits = call["scale"] * call["q"].double() @ call["k"].double().repeat_interleave(groups, 1).mT
    assert_near(stats.mean_logit * counted, (w * logits).sum(-1), 1e-4, "mean logit")
    assert_near(stats.mean_place * counted, w @ torch.arange(w.shape[3]).to(w), 1e-4, "mean key")
    assert_near(stats.lse[counted], logits_over(call, logits)[counted], 1e-4, "log-sum-exp")
    assert_near(stats.visible.expand(-1, w.shape[1], -1), (w > 0).sum(-2), 1e-6, "visible rows")
    chosen = torch.zeros(2, w.shape[3], dtype=torch.bool)
    chosen[0, ::3], chosen[1, -1] = True, True
    assert_near(stats.mass_on(chosen), (w * chosen[:, None, None]).sum(-1), 1e-4, "mass on some keys")


def test_values_may_be_wider_or_narrower_than_queries() -> None:
    q, k, _ = qkv(11, 14, width=6)
    w = oracle.weights(q, k, causal=True, scale=0.4)
    for width in (1, 6, 17):
        columns = torch.randn(2, 2, 14, width, dtype=torch.float64)
        lse, mean = statistics(q, k, columns, scale=0.4, causal=True)
        assert_near(mean, w @ columns.repeat_interleave(2, 1), 1e-6)
        # a weight is the exponential of its logit less the log-sum-exp
        first = (0.4 * (q * k[:, :, :1].repeat_interleave(2, 1)).sum(-1) - lse).exp()
        assert_near(first, w[..., 0], 1e-6)


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k, _ = qkv(4, 4)
    lse, mean = statistics(q, k, k, scale=1.0, key_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert bool((lse == float("-inf")).all()) and bool((mean == 0).all())
    assert bool((received(q, k, lse, scale=1.0) == 0).all())


def test_a_bias_as_an_extra_channel_is_a_bias() -> None:
    """The extra channel replaces a mask for kernels that take none, as on CUDA."""
    q, k, _ = qkv(9, 9, heads=2, dtype=torch.float32)
    bias = torch.randn(2, 1, 9)
    bias[0, :, :4] = fused_statistics.HIDDEN
    expected = fused_statistics._attend(q, k, k, 1.0, True, bias)
    wide_q, wide_k = with_bias(q, k, bias)
    for ours, theirs in zip(fused_statistics._attend(wide_q, wide_k, k, 1.0, True, None), expected, strict=True):
        sees = expected[0] > fused_statistics.HIDDEN / 2
        assert_near(ours[sees], theirs[sees], 1e-5)


@pytest.mark.parametrize("bias", [None, torch.zeros(2, 1, 13)])
def test_the_cuda_kernel_takes_these_shapes(bias: Tensor | None) -> None:
    """On meta tensors: widths are aligned, heads repeated, and the log-sum-exp is cut to length."""
    q, k, _ = (x.to("meta") for x in qkv(13, 13, width=6, dtype=torch.float32))
    columns = torch.empty(2, 2, 13, 11, device="meta")
    lse, mean = fused_statistics._attend(q, k, columns, 0.5, True, None if bias is None else bias.to("meta"))
    assert lse.shape == (2, 4, 13) and mean.shape == (2, 4, 13, 11)
