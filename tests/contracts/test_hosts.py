"""The contract of hosts: a method that makes no change has no effect, on every model and every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import UnsupportedModel
from foveate.host import Method, apply
from tests.support.host_models import (
    DECODERS,
    ENCODERS,
    NATIVE,
    NO_OPS,
    SLIDING,
    VOCAB,
    SameWeights,
    evicts,
    feed,
    model,
    padded,
    tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*attention mask.*")


def methods(path: str) -> list[Method]:
    return [kind() for kind in NO_OPS[path]]


def same(name: str, path: str, call: Callable[[], Tensor]) -> None:
    """Check that `call` returns the same with and without the methods."""
    if name in ENCODERS and evicts(*methods(path)):
        with pytest.raises(UnsupportedModel, match="has no decoder with a cache"), apply(model(name), *methods(path)):
            pytest.fail("it was not refused on entering")
        return
    with torch.no_grad():
        expected = call()
        with apply(model(name), *methods(path)):
            got = call()
        again = call()
    assert torch.equal(again, expected)
    slots_in_windows = name in SLIDING and path in (
        "slots",
        "keep",
        "dropping",
    )  # a window drops tokens, so attention reads slots
    if path in NATIVE and not slots_in_windows:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=NO_OPS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


# -- a forward pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_forward_of_a_decoder(decoder: str, path: str, side: str) -> None:
    ids, mask = padded(tokens(), side)
    same(decoder, path, lambda: model(decoder)(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("side", ["none", "right"])
def test_forward_of_an_encoder(path: str, side: str) -> None:
    ids, mask = padded(tokens(), side)
    same("bert", path, lambda: model("bert")(ids, attention_mask=mask).logits[mask.bool()])


def test_forward_of_a_vision_transformer(path: str) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    same("vit", path, lambda: model("vit")(images).logits)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_a_mask_of_the_callers_own(name: str, path: str, kind: str) -> None:
    ids = tokens()
    draw = torch.Generator().manual_seed(1)
    heads = 4 if kind == "per head" else 1
    mask = (torch.rand(2, heads, 14, 14, generator=draw) > 0.4) | torch.eye(14, dtype=torch.bool)
    given = mask
    if kind == "float" or name == "gemma2":  # its own kernel adds the mask
        given = torch.randn(mask.shape, generator=draw).masked_fill(~mask, float("-inf"))
    same(name, path, lambda: model(name)(ids, attention_mask=given).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_implementation_of_the_model(path: str, implementation: str) -> None:
    llama = model("llama")
    before = llama.config._attn_implementation
    llama.set_attn_implementation(implementation)
    ids, mask = padded(tokens(), "left")
    same("llama", path, lambda: llama(ids, attention_mask=mask).logits[mask.bool()])
    llama.set_attn_implementation(before)


def test_attention_weights_on_request(decoder: str) -> None:
    llama, (ids, mask) = model(decoder), padded(tokens(), "left")
    before = llama.config._attn_implementation
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask, output_attentions=True).attentions
    llama.set_attn_implementation(before)
    with torch.no_grad(), apply(llama, SameWeights()):
        got = llama(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(got) == len(expected) == 3
    real = mask.bool()[:, None, :, None]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours * real, theirs * real, atol=1e-5, rtol=1e-5)


def test_gradients(path: str) -> None:
    llama = model("llama")
    ids, mask = padded(tokens(), "left")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(*applied: Method) -> list[Tensor]:
        llama.zero_grad()
        with apply(llama, *applied):
            llama(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters() if parameter.grad is not None]

    llama.train()
    expected, got = gradients(), gradients(*methods(path))
    llama.eval().zero_grad()
    assert len(expected) == len(got) == len(list(llama.parameters()))
    for theirs, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# -- with a cache ------------------------------------------------------------------------------------------------------


PIECES = {"decoding": [9, 1, 1, 1, 1, 1], "chunks": [3, 6, 1, 4], "one token": [1, 1, 1, 2, 9]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("plain", [True, False], ids=["plain cache", "model's cache"])
def test_by_hand(decoder: str, path: str, pieces: str, plain: bool) -> None:
    ids, mask = padded(tokens(), "left")

    def call() -> Tensor:
        cache = DynamicCache() if plain else DynamicCache(config=model(decoder).config)
        return feed(model(decoder), ids, mask, PIECES[pieces], cache)

    same(decoder, path, call)


GENERATION = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 8},
    "chunked prefill": {"prefill_chunk_size": 5},
    "without cache": {"use_cache": False},
}


def generate(name: str, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    torch.manual_seed(0)
    given = {"max_new_tokens": 8, "do_sample": False, **options}
    return model(name).generate(ids, attention_mask=mask, **given)


@pytest.mark.parametrize("how", GENERATION)
def test_generate(decoder: str, path: str, how: str) -> None:
    ids, mask = padded(tokens(), "left")
    with torch.no_grad():
        expected = generate(decoder, ids, mask, **GENERATION[how])
        with apply(model(decoder), *methods(path)):
            got = generate(decoder, ids, mask, **GENERATION[how])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_with_a_cache_of_the_callers_own(name: str, path: str) -> None:
    """Half of the prompt is read before the methods are applied; generation continues after them."""
    ids, mask = padded(tokens(), "left")

    def conversation(*applied: Method) -> Tensor:
        cache = DynamicCache(config=model(name).config)
        model(name)(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        with apply(model(name), *applied):
            first = generate(name, ids, mask, past_key_values=cache)
        longer = torch.cat([first, tokens(2, 3, seed=1)], 1)
        mask_of_all = torch.cat([mask, torch.ones(2, longer.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        return generate(name, longer, mask_of_all, past_key_values=cache)

    with torch.no_grad():
        assert torch.equal(conversation(*methods(path)), conversation())


def test_cross_attention_has_no_slots(path: str) -> None:
    """An encoder-decoder's cache of the encoder's keys does not change."""
    ids, mask = padded(tokens(), "right")
    if path == "dropping":
        with pytest.raises(UnsupportedModel, match="cannot be dropped in Bart"), apply(model("bart"), *methods(path)):
            pass
        return
    for beams in (1, 3):
        with torch.no_grad():
            expected = generate("bart", ids, mask, num_beams=beams)
            with apply(model("bart"), *methods(path)):
                got = generate("bart", ids, mask, num_beams=beams)
        assert torch.equal(got, expected)
    assert int(expected.max()) < VOCAB
