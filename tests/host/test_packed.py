"""Packed heads compute the same attention in one pass over the keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import foveate
from foveate.core import engines, oracle
from foveate.core.call import AttentionCall
from foveate.core.engines import fused
from foveate.host.hf.cache import SlotLayer
from tests.support.host_models import DECODERS, Recent, feed, model, padded, tokens


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_packed_is_the_model_to_rounding(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded(tokens(2, 20), side)
    pieces = [12, *[1] * 4, 4]
    expected = feed(model(name), ids, mask, pieces)
    seen: list[tuple[int, int]] = []
    kernel = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return kernel(q, k, *args, **options)

    with foveate.apply(model(name), foveate.Packed()):
        monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
        got = feed(model(name), ids, mask, pieces)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert ((2, 2) in seen) == (name != "gemma2")  # a soft cap has no fused kernel


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("n", [1, 3, 16, 17])
@pytest.mark.parametrize("kind", ["none", "causal", "keys", "queries", "heads", "bias"])
def test_packing_keeps_the_mask(groups: int, n: int, kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, m, 8, generator=draw) for h, m in ((2 * groups, n), (2, 21), (2, 21)))
    shapes = {"keys": (2, 1, 1, 21), "queries": (2, 1, n, 21), "heads": (2, 2 * groups, n, 21), "bias": (1, 1, n, 21)}
    mask = None
    if kind in shapes:
        mask = torch.rand(shapes[kind], generator=draw) > 0.4
        mask = mask.float() * 3 if kind == "bias" else mask
    call = AttentionCall(q, k, v, 0.3, mask, causal=kind == "causal")
    got = fused.attend(call)
    expected = oracle.attention(q, k, v, mask=mask, causal=kind == "causal", scale=0.3)
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(engines.run(call), got)


@torch.no_grad()
def test_packed_beside_a_method_that_evicts() -> None:
    llama, ids = model("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    with foveate.apply(llama, Recent(6)):
        expected = feed(llama, ids, mask, [12, *[1] * 8])
    with foveate.apply(llama, foveate.Packed(), Recent(6)):
        got = feed(llama, ids, mask, [12, *[1] * 8])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_writes_new_tokens_in_place() -> None:
    """A buffer has room for one token in 32 more, so that of 64 tokens the next one moves nothing."""
    llama, ids = model("llama"), tokens(1, 72)
    cache = DynamicCache(config=llama.config)
    with foveate.apply(llama, foveate.Packed()):
        llama(ids[:, :64], past_key_values=cache)
        assert {type(layer) for layer in cache.layers} == {SlotLayer}
        places = []
        for at in range(64, 72):
            llama(ids[:, at : at + 1], past_key_values=cache)
            places.append(cache.layers[0].keys.data_ptr())
    assert sum(before == after for before, after in itertools.pairwise(places)) >= 4
