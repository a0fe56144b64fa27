"""KIVI: codes and values by the paper's formula, what is stored, and which axis keys want."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.host.slots.codec import Coding
from foveate.kv import KIVI, SnapKV
from foveate.kv.parts.bit_packing import pack, unpack
from foveate.kv.parts.uniform_codec import Uniform
from tests.conftest import ClaimFixture
from tests.support.host_models import feed, model, tokens

N = 40


def coding(policy: KIVI) -> Coding:
    found = policy.coding(0, None)
    assert found is not None
    return found


def by_formula(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and dequantised values of groups along an axis: Q(X) = round((X - z) / s), s = (max - min) / (2^B - 1)."""
    codes, values = [], []
    for part in x.split(group, dim):
        low, high = part.amin(dim, keepdim=True), part.amax(dim, keepdim=True)
        step = (high - low) / (2**bits - 1)
        code = ((part - low) / step).round()
        codes.append(code)
        values.append(code * step + low)
    return torch.cat(codes, dim), torch.cat(values, dim)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_and_values_are_the_papers(bits: int) -> None:
    """Keys: groups of 32 tokens in each channel. Values: groups of 32 channels of each token."""
    draw = torch.Generator().manual_seed(bits)
    k, v = (torch.randn(2, 3, 96, 64, generator=draw) for _ in range(2))
    found = coding(KIVI(bits=bits, scales="float32"))
    for codec, x, dim in ((found.keys, k, 2), (found.values, v, 3)):
        parts = codec.encode(x, {})
        codes, values = by_formula(x, bits, 32, dim)
        assert torch.equal(unpack(parts["codes"], bits, 64).float(), codes)
        torch.testing.assert_close(codec.decode(parts, 64, torch.float32), values, atol=1e-5, rtol=1e-5)
        assert parts["codes"].dtype == torch.uint8 and parts["codes"].shape == (2, 3, 96, 64 * bits // 8)


@pytest.mark.parametrize("bits", [2, 4])
def test_scales_in_half_precision_cost_little(bits: int) -> None:
    """Large keys with an offset, as some models have: the error stays that of the codes."""
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 64, 64, generator=draw) + 300 * torch.randn(1, 2, 1, 64, generator=draw)
    for scales in ("float16", "float32"):
        codec = coding(KIVI(bits=bits, scales=scales)).keys  # type: ignore[arg-type]
        off = codec.decode(codec.encode(k, {}), 64, torch.float32) - k
        step = (k.unflatten(2, (2, 32)).amax(3) - k.unflatten(2, (2, 32)).amin(3)) / (2**bits - 1)
        assert bool((off.unflatten(2, (2, 32)).abs() <= 0.51 * step[:, :, :, None] + 0.15).all())
    flat = torch.full((1, 1, 32, 8), 1e6)
    codec = Uniform(2, 32, "channel")
    assert codec.decode(codec.encode(flat, {}), 8, torch.float32).isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 8, 24, 80])
def test_packing(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, width), codes)
    assert packed.shape[-1] == (-(-width // 8) * 3 if bits == 3 else -(-width * bits // 8))


def test_channels_that_no_group_divides() -> None:
    x = torch.randn(1, 1, 4, 80, generator=torch.Generator().manual_seed(0))
    codec = Uniform(4, 32, "token", "float32")
    values = torch.cat([by_formula(part, 4, 32, 3)[1] for part in x.split([64, 16], 3)], 3)
    torch.testing.assert_close(codec.decode(codec.encode(x, {}), 80, torch.float32), values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_that_of_the_decoded_cache() -> None:
    """The logits of a step are those of a model whose cache holds the dequantised keys and values."""
    llama, ids, one = model("llama"), tokens(2, N), tokens(2, 1, seed=1)
    cache, policy = DynamicCache(), KIVI(bits=2, residual=6, group=8)
    with apply(llama, policy):
        llama(ids, past_key_values=cache)
        store = cache.layers[0].store
        assert store.codes.slots == 4 * 32 and store.groups[0].length == 8
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys, layer.values, number)
        got = llama(one, past_key_values=cache).logits
    held_keys, held_values = plain.layers[0].keys, plain.layers[0].values
    torch.testing.assert_close(got, llama(one, past_key_values=plain).logits, atol=1e-4, rtol=1e-4)
    full = DynamicCache()
    llama(ids, past_key_values=full)
    for held, whole, dim in (
        (held_keys, full.layers[0].keys, 2),
        (held_values, full.layers[0].values, 3),
    ):
        expected = torch.cat([by_formula(whole[:, :, :32], 2, 8, dim)[1], whole[:, :, 32:]], 2)
        torch.testing.assert_close(held, expected, atol=5e-3, rtol=5e-3)  # scales in float16
        assert not torch.allclose(held, whole, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_bytes_by_hand() -> None:
    """At 2 bits, a token of a head takes a quarter of a byte for each channel, zeros, scales and a position."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, KIVI(bits=2, residual=8, group=8)) as run:
        llama(tokens(1, N), past_key_values=cache)
    keys, values = 8 * 2 / 8 + 8 * 4 / 8, 8 * 2 / 8 + 4
    assert run.stats.cache_bytes == 3 * 2 * (32 * (keys + values + 4) + 8 * 2 * 8 * 4)
    assert run.stats.kept == run.stats.cache_bytes / (3 * 2 * N * 2 * 8 * 4)


@torch.no_grad()
def test_widths_by_layer_and_dense_ends() -> None:
    llama = model("llama")
    for policy, coded in (
        (KIVI(bits=(None, 4, 2), residual=0, group=8), [0, 1, 1]),
        (KIVI(residual=0, group=8, dense=1), [0, 1, 0]),
        (KIVI(residual=0, group=8, layers=(2,)), [0, 0, 1]),
    ):
        cache = DynamicCache()
        with apply(llama, policy):
            llama(tokens(1, N), past_key_values=cache)
            assert [int(layer.store.codes is not None) for layer in cache.layers] == coded
    with (
        pytest.raises(OptionError, match="bits has 2 widths, and LlamaForCausalLM has 3 attending layers"),
        apply(llama, KIVI(bits=(2, 4))),
    ):
        pass


@torch.no_grad()
def test_eviction_and_codes_share_a_budget() -> None:
    """Half of the tokens at 8 bits take less than half of what 8 bits take."""
    llama, kept = model("llama"), []
    for methods in (
        [KIVI(bits=8, residual=0, group=4)],
        [SnapKV(share=0.5, recent=4), KIVI(bits=8, residual=0, group=4)],
    ):
        with apply(llama, *methods) as run:
            llama(tokens(1, N), past_key_values=DynamicCache())
        kept.append(run.stats.kept)
    assert kept[1] == pytest.approx(kept[0] / 2, rel=1e-6)


class _PerToken(Method):
    """KIVI with the keys' groups along the channels."""

    def __init__(self, policy: KIVI) -> None:
        self.policy = policy

    def encode(self, site: Any) -> Coding:
        found = coding(self.policy)
        return replace(found, keys=found.values)


def test_keys_want_groups_along_tokens(claim: ClaimFixture) -> None:
    """Keys with a few large channels, as models with biases have: groups along channels lose the other channels."""
    llama = model("qwen2")
    with torch.no_grad():
        before = [layer.self_attn.k_proj.bias.clone() for layer in llama.model.layers]
        try:
            for layer in llama.model.layers:
                layer.self_attn.k_proj.bias.view(2, 8)[:, [3, 7]] += 12.0  # a pair that turns slowly
            ids = tokens(4, 64)
            mask, policy = torch.ones_like(ids), KIVI(bits=2, residual=0, group=32)
            full = feed(llama, ids, mask, [32, *[1] * 32]).log_softmax(-1)
            loss = {}
            for name, method in (("ours", policy), ("tokens", _PerToken(policy))):
                with apply(llama, method):
                    got = feed(llama, ids, mask, [32, *[1] * 32]).log_softmax(-1)
                loss[name] = float((full.exp() * (full - got)).sum(-1).mean())
        finally:
            for layer, bias in zip(llama.model.layers, before, strict=True):
                layer.self_attn.k_proj.bias.copy_(bias)
    claim(
        "keys with large channels survive 2 bits in groups of tokens, and not in groups of channels (KL from the full "
        "cache, nats)",
        ours=loss["ours"], baseline=loss["tokens"], better="lower", margin=0.1,
        baseline_name="keys in groups of channels", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "bits=5 must be one of"),
        ({"bits": (2, 7)}, "bits=\\(2, 7\\) must be one of"),
        ({"value_bits": 0}, "value_bits=0"),
        ({"channels": 0}, "channels=0"),
        ({"scales": "int8"}, "scales='int8'"),
        ({"residual": -1}, "residual=-1"),
        ({"group": 0}, "group=0"),
        ({"dense": -1}, "dense=-1"),
        ({"layers": 3}, "layers=3"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        KIVI(**options)
