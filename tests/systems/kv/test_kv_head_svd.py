"""KV-head SVD does what its paper claims: fewer key/value heads, at a small loss, in a real transformers model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from foveate.bench.loading import load
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host import apply
from foveate.kv import SinkRecent, compress_kv_heads, kv_spectrum, load_compressed
from foveate.tasks.parts.corpus import text
from tests.conftest import ClaimFixture
from tests.support import host_models
from tests.support.lab import lab

WIDTH, HEADS = 8, 4


def model(name: str, **changes: Any) -> hf.PreTrainedModel:
    """A small model with four key/value heads, whose biases and norms are not at their first values."""
    sizes = {**host_models._DECODER, "num_key_value_heads": HEADS, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "no rotary":
            made: hf.PreTrainedModel = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**sizes, no_rope_layers=[0, 0, 0]))
        else:
            of = {
                "llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
                "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config), "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config),
                "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config), "phi": (hf.PhiForCausalLM, hf.PhiConfig),
            }[name]  # fmt: skip
            made = of[0](of[1](**sizes))
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def data(count: int = 3) -> list[Tensor]:
    return [host_models.tokens(4, 40, seed) for seed in range(count)]


@torch.no_grad()
def logits(subject: hf.PreTrainedModel, ids: Tensor) -> Tensor:
    return subject(ids).logits


def off(a: hf.PreTrainedModel, b: hf.PreTrainedModel) -> float:
    ids = host_models.tokens(2, 24, seed=9)
    return float((logits(a, ids) - logits(b, ids)).abs().max())


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["post", "pairs"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3", "no rotary", "gemma2", "phi"])
def test_one_head_a_group_is_the_model(name: str, rope: str) -> None:
    before = model(name)
    refused = {("gemma2", "post"): "softcapping", ("qwen3", "pairs"): "normalises keys", ("phi", "post"): "rotate"}
    if (name, rope) in refused:
        with pytest.raises(UnsupportedModel, match=refused[name, rope]):
            compress_kv_heads(before, HEADS, data(), rope=rope)
        return
    after = compress_kv_heads(before, HEADS, data(), rope=rope)
    assert type(after) is type(before)
    assert off(before, after) < 1e-4
    assert off(before, compress_kv_heads(before, 2, data(), rope=rope)) > 1e-2


def _shared(before: hf.PreTrainedModel, rotates: bool) -> hf.PreTrainedModel:
    """Give all heads of a layer the keys and values of the first, each changed by a map of its own."""
    draw = torch.Generator().manual_seed(2)
    for layer in before.model.layers:
        for name in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            for head in range(1, HEADS):
                mixing = torch.randn(WIDTH, WIDTH, generator=draw)
                if name == "k_proj" and rotates:  # a map that commutes with the rotation
                    a, b = torch.randn(2, WIDTH // 2, generator=draw)
                    mixing = torch.cat([torch.cat([a.diag(), -b.diag()], 1), torch.cat([b.diag(), a.diag()], 1)])
                weight.data[head * WIDTH : (head + 1) * WIDTH] = mixing @ weight.data[:WIDTH]
    return before


@pytest.mark.parametrize("name, rope", [("llama", "post"), ("llama", "pairs"), ("no rotary", "post")])
def test_caches_of_low_rank_are_reproduced(name: str, rope: str) -> None:
    before = _shared(model(name), name == "llama")
    assert off(before, compress_kv_heads(before, 1, data(), rope=rope)) < 1e-3
    assert off(before, compress_kv_heads(before, 1, method="mean_pool")) > 1e-1
    spectrum = kv_spectrum(before, data(), 1)
    assert all(float(x[..., WIDTH - 1].min()) > 1 - 1e-6 for x in spectrum.values())


def test_means_are_exact_for_equal_heads_only() -> None:
    before = model("llama")
    for layer in before.model.layers:
        for name in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.data.copy_(weight.data[:WIDTH].repeat(HEADS, 1))
    assert off(before, compress_kv_heads(before, 1, method="mean_pool")) < 1e-4


# -- the converted model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["post", "pairs"])
def test_the_cache_holds_the_groups_and_nothing_else(rope: str) -> None:
    after = compress_kv_heads(model("qwen2"), 2, data(), rope=rope)
    assert after.config.num_key_value_heads == 2
    cache = hf.DynamicCache(config=after.config)
    with torch.no_grad():
        after(host_models.tokens(1, 30), past_key_values=cache)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert numbers == 3 * 30 * 2 * WIDTH * 2


@pytest.mark.parametrize("rope", ["post", "pairs"])
def test_grouped_heads_with_biases(rope: str) -> None:
    """Two key/value heads of two query heads each become one, which is exact if both hold the same."""
    before = model("qwen2", num_key_value_heads=2)
    assert off(before, compress_kv_heads(before, 2, data(), rope=rope)) < 1e-4
    for layer in before.model.layers:
        for name in ("k_proj", "v_proj"):
            for parameter in getattr(layer.self_attn, name).parameters():
                parameter.data[WIDTH:] = -2.0 * parameter.data[:WIDTH]
    assert off(before, compress_kv_heads(before, 1, data(), rope=rope)) < 1e-3


def test_the_order_says_which_heads_form_a_group() -> None:
    """Heads 0 and 2 hold the same, and so do 1 and 3: neighbours lose, the right pairs do not."""
    before = model("llama")
    for layer in before.model.layers:
        for name in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.data[2 * WIDTH :] = weight.data[: 2 * WIDTH]
    order = torch.tensor([[0, 2, 3, 1]] * 3)
    assert off(before, compress_kv_heads(before, 2, data())) > 1e-1
    for rope in ("post", "pairs"):
        assert off(before, compress_kv_heads(before, 2, data(), order=order, rope=rope)) < 1e-3


@pytest.mark.parametrize("rope", ["post", "pairs"])
def test_a_saved_model_loads(rope: str, tmp_path: Path) -> None:
    after = compress_kv_heads(model("llama"), 2, data(), rope=rope)
    after.save_pretrained(tmp_path)
    assert off(after, load_compressed(tmp_path)) == 0.0
    if rope == "pairs":  # a plain model, for any library
        assert off(after, hf.AutoModelForCausalLM.from_pretrained(tmp_path)) == 0.0
    else:  # never half a model
        with pytest.raises(RuntimeError, match="size"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_compare_loads_it_from_its_folder(tmp_path: Path) -> None:
    before, tokenizer = lab()
    after = compress_kv_heads(before, 2, [torch.arange(64)[None]])
    after.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, _, _ = load(str(tmp_path))
    ids = torch.arange(40)[None]
    assert torch.equal(logits(found, ids), logits(after, ids))


@pytest.mark.parametrize("rope", ["post", "pairs"])
def test_policies_decode_and_trains(rope: str) -> None:
    before = model("llama")
    after, ids = compress_kv_heads(before, 2, data(), rope=rope), host_models.tokens(2, 20)
    with torch.no_grad():
        whole = after(ids, use_cache=False).logits[:, -1]
        cache = hf.DynamicCache(config=after.config)
        for part in (ids[:, :13], ids[:, 13:19], ids[:, 19:]):
            stepped = after(part, past_key_values=cache).logits[:, -1]
        assert (whole - stepped).abs().max() < 1e-4
        with apply(after, SinkRecent(sink=2, recent=6)) as run:
            after.generate(ids, max_new_tokens=4, do_sample=False)
        assert 0 < run.stats.kept < 0.5
    after(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in after.model.layers[1].self_attn.parameters())
    assert all(p.grad is None for p in before.parameters())


def test_the_model_is_left_as_it_is() -> None:
    before, twin = model("qwen2"), model("qwen2")
    for rope in ("post", "pairs"):
        compress_kv_heads(before, 1, data(), rope=rope)
    with pytest.raises(OptionError, match=r"^groups=3 must divide"):
        compress_kv_heads(before, 3, data())
    for (name, a), (_, b) in zip(before.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert before.config.num_key_value_heads == HEADS


def test_bad_calls_are_refused() -> None:
    before = model("llama")
    for match, options in (
        ("^groups=0 must be", {"groups": 0}), ("^data must hold", {"groups": 2}),
        ("^method='pca' must be", {"groups": 2, "method": "pca"}),
        ("^rope='pre' must be", {"groups": 2, "rope": "pre"}),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=match):
            compress_kv_heads(before, **options)
    for order in (torch.zeros(3, HEADS, dtype=torch.long), torch.arange(HEADS)[None]):
        with pytest.raises(ShapeError, match="^order must hold each of the 4 heads once"):
            compress_kv_heads(before, 2, data(), order=order)
    with pytest.raises(UnsupportedModel, match="no decoder"):
        compress_kv_heads(host_models.model("bert"), 2, data())
    with pytest.raises(UnsupportedModel, match="compressed already"):
        compress_kv_heads(compress_kv_heads(before, 2, data()), 1, data())
    with pytest.raises(ShapeError, match=r"^data must yield token ids \(B, N\); got Tensor \(5,\)"):
        compress_kv_heads(before, 2, torch.arange(10).view(2, 5))
    with pytest.raises(OptionError, match="^data must hold"):
        kv_spectrum(before, [], 2)


# -- the claim ---------------------------------------------------------------------------------------------------------


@cache
def pages(split: str, start: int, count: int, length: int = 256) -> Tensor:
    _, tokenizer = lab()
    ids = tokenizer(text(split)[start : start + 2 * count * length], return_tensors="pt", verbose=False).input_ids
    return ids[:, : count * length].view(count, length)


@torch.no_grad()
def loss(subject: hf.PreTrainedModel) -> float:
    ids = pages("heldout", 0, 6)
    return float(subject(ids, labels=ids).loss)


def test_caches_give_a_better_basis_than_weights_and_means(claim: ClaimFixture) -> None:
    """On a trained model, with three draws of the text that calibrates, and no training afterwards."""
    before, _ = lab()
    full = loss(before)
    ours = [
        max(loss(compress_kv_heads(before, 2, [pages("train", start, 6)], rope=rope)) for rope in ("post", "pairs"))
        for start in (0, 40_000, 80_000)
    ]
    weights = min(
        loss(compress_kv_heads(before, 2, method="svd_w", **options))
        for options in ({}, {"rotated_weights": True}, {"rope": "pairs"})
    )
    means = loss(compress_kv_heads(before, 2, method="mean_pool"))
    assert max(ours) < full + 0.5
    claim(
        "half of the key/value heads, merged along the caches' main directions: nats a byte, worst of 3 draws",
        ours=max(ours), baseline=min(weights, means), better="lower", margin=0.5,
        baseline_name="main directions of the weights, or means of the heads, whichever is better", seed=0,
    )  # fmt: skip


def test_rotated_keys_need_a_basis_after_the_rotation_or_one_that_commutes() -> None:
    """A basis from weights alone fits rotated keys better where it knows the rotation."""
    before, _ = lab()
    plain = loss(compress_kv_heads(before, 2, method="svd_w"))
    assert loss(compress_kv_heads(before, 2, method="svd_w", rotated_weights=True)) < plain - 0.1
