"""Measures from tiles, for calls without fused statistics, agree with the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.core import masks, oracle
from foveate.core.selection import Indices
from foveate.host import Site, weight_tiles
from foveate.host.fused_statistics import Statistics
from foveate.lens import MEASURES
from foveate.lens.capture import tiles
from foveate.lens.measures import KeyTokens
from tests.support.tensors import assert_near, qkv

IDS = torch.randint(0, 3, (2, 16), generator=torch.Generator().manual_seed(5))


def site(q: Tensor, k: Tensor, **fields: Any) -> Site:
    """Build a call as the host would describe it."""
    return Site(nn.Identity(), 0, q, k, k, **{"scale": 0.6, "attention_mask": None, "is_causal": True, **fields})


def measure(call: Site) -> tiles.Measurements:
    assert Statistics.of(call) is None
    weighed = [measure for measure in MEASURES.values() if not measure.reads_output]
    return tiles.measure_call(call, weighed, KeyTokens.of(call, IDS[:, : call.seen]))


def check(found: tiles.Measurements, w: Tensor, seen: Tensor) -> None:
    """Check `found` against the matrix `w` and the visible pairs `seen`."""
    assert_near(found.values["entropy"], torch.special.entr(w).sum(-1), 1e-4)
    assert_near(found.values["sink_mass"], w[..., 0], 1e-4)
    assert_near(found.values["received_mass"], w.sum(-2), 1e-4)
    rows, keys = w.shape[-2:]
    away = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    assert_near(found.values["mean_distance"], (w * away.abs()).sum(-1), 1e-4)
    assert_near(found.values["previous_token"], (w * (away == 1)).sum(-1), 1e-4)
    assert_near(found.values["within_4"], (w * (away.abs() <= 4)).sum(-1), 1e-4)
    assert_near(found.values["windowed_distance"], (w * away.abs().clamp_max(10)).sum(-1), 1e-4)
    assert_near(found.values["future_influence"], (w * (away >= 10)).sum(-2), 1e-4)
    ids = IDS[:, :keys]
    same = (ids[:, -rows:, None] == ids[:, None]) & (away != 0)
    assert_near(found.values["duplicate_token"], (w * same[:, None]).sum(-1), 1e-4)
    assert torch.equal(found.counted, w.sum(-1) > 0)
    assert_near(found.visible, seen.expand_as(w).sum(-2), 1e-6)


@pytest.fixture(params=[1 << 20, 300], ids=["one tile", "many tiles"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_tiles, "TILE", request.param)


pytestmark = pytest.mark.usefixtures("_tile", "poisoned_memory")


def test_soft_caps_are_measured() -> None:
    q, k, _ = qkv(9, 13, dtype=torch.float32)
    logits = 0.5 * torch.tanh(0.6 * q @ k.repeat_interleave(2, 1).mT / 0.5)
    seen = masks.causal(9, 13)
    check(measure(site(q, k, softcap=0.5)), logits.masked_fill(~seen, float("-inf")).softmax(-1), seen)


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_float_bias_is_measured(hidden: float) -> None:
    q, k, _ = qkv(9, 9, dtype=torch.float32)
    seen = masks.window(9, 9, 4)[None, None].clone()
    bias = torch.randn(2, 1, 9, 9).masked_fill(~seen, hidden)
    w = oracle.weights(q, k, mask=bias.masked_fill(~seen, float("-inf")), scale=0.6)
    check(measure(site(q, k, attention_mask=bias)), w, seen)


def test_masks_with_empty_rows_are_measured() -> None:
    q, k, _ = qkv(9, 9, dtype=torch.float32)
    seen = torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    seen[0, 1, 3] = False
    check(measure(site(q, k, attention_mask=seen)), oracle.weights(q, k, mask=seen, scale=0.6), seen)


def test_selected_keys_are_measured() -> None:
    q, k, _ = qkv(6, 9, dtype=torch.float32)
    chosen = Indices(torch.tensor([[[[0, 3, 5], [1, 2, 8]]]]), 6, 9, group=3)
    seen = chosen.dense() & masks.causal(6, 9)
    found = measure(site(q, k, selections=[chosen]))
    check(found, oracle.weights(q, k, mask=seen, scale=0.6), seen)


def test_given_weights_are_measured() -> None:
    q, k, _ = qkv(9, 9, dtype=torch.float32)
    w = torch.rand(2, 4, 9, 9).tril()
    w = w / w.sum(-1, keepdim=True)
    call = site(q, k, weights=w)
    check(measure(call), w, masks.causal(9, 9))
    assert_near(weight_tiles.weights_of(call, slice(2, 5), 3), w[:, 3, 2:5], 1e-6)


def test_nan_in_hidden_keys_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden keys may hold NaN, also on devices without a fused kernel."""
    monkeypatch.setattr("foveate.host.fused_statistics.has_kernel", lambda q: False)
    q, k, _ = qkv(9, 9, dtype=torch.float32)
    seen = masks.causal(9, 9)[None, None] & (torch.arange(9) != 4)
    w = oracle.weights(q, k, mask=seen, scale=0.6)
    k[:, :, 4] = float("nan")
    check(measure(site(q, k, attention_mask=seen)), w, seen)
