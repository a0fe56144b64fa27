"""Caches that are pickled, copied, given keys or trained through in the middle of decoding under methods."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers as hf

from foveate.core.errors import UnsupportedModel
from foveate.host import Method, Packed, apply
from foveate.host.cache_contents import held
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.tidal_decode import TidalDecode
from tests.support.host_models import model as model_of, tokens


def saved(cache: hf.DynamicCache) -> hf.DynamicCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def layers_copied(cache: hf.DynamicCache) -> hf.DynamicCache:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


COPIES: dict[str, Callable] = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}
METHODS = {
    "packed": Packed(),
    "sink_recent": SinkRecent(2, 20),
    "duo_attention": DuoAttention(torch.tensor([[0.1, 0.9]] * 3), 0.5, 2, 20),
}


@torch.no_grad()
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("key", METHODS)
def test_a_copy_decodes_as_the_original(how: str, key: str) -> None:
    model, cache = model_of("llama"), hf.DynamicCache()
    with apply(model, METHODS[key]):
        model(tokens(1, 40), past_key_values=cache)
        for step in range(3):
            model(tokens(1, 1, step), past_key_values=cache)
        other = COPIES[how](cache)
        for step in range(30):
            same = [model(tokens(1, 1, step), past_key_values=one).logits for one in (cache, other)]
            assert torch.equal(*same), step
    if held(other).kept == 1:
        return
    again = COPIES[how](other)  # also after the block
    with apply(model, METHODS[key]):
        for step in range(5):
            same = [model(tokens(1, 1, step), past_key_values=one).logits for one in (other, again)]
            assert torch.equal(*same), step


@torch.no_grad()
def test_copied_layers_do_not_share_their_tokens() -> None:
    model, cache = model_of("llama"), hf.DynamicCache()
    with apply(model, Packed()):
        model(tokens(1, 40), past_key_values=cache)
        other, expected = layers_copied(cache), copy.deepcopy(cache)
        for step in range(4):
            model(tokens(1, 1, 10 + step), past_key_values=other)
            mine, right = (model(tokens(1, 1, step), past_key_values=one).logits for one in (cache, expected))
            assert torch.equal(mine, right)


@torch.no_grad()
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_knows_that_its_prompt_was_read(how: str) -> None:
    model, cache = model_of("llama"), hf.DynamicCache()
    with apply(model, SinkRecent(2, 20), evict="after prompt"):
        model(tokens(1, 12), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        cache = COPIES[how](cache)
        model(tokens(1, 20), past_key_values=cache)
        assert held(cache).kept == 1.0


@torch.no_grad()
def test_setting_a_layers_keys_is_refused() -> None:
    model, cache = model_of("llama"), hf.DynamicCache()
    with apply(model, Packed()):
        model(tokens(1, 8), past_key_values=cache)
        with pytest.raises(UnsupportedModel, match="cannot be given other keys"):
            cache.layers[0].keys = cache.layers[0].keys[:, :, :4]


@pytest.mark.parametrize("method", [Packed(), SinkRecent(2, 40), TidalDecode(top_k=60, reselect_layers=())])
@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_one_projection_is_trained_through_a_growing_cache(method: Method, trained: str) -> None:
    """Keys, values and queries need not all have a gradient, for instance with an adapter on one projection."""
    model, grads = copy.deepcopy(model_of("llama")), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f"layers.0.self_attn.{trained}" in name
    for methods in ((), (method,)):
        cache, total = hf.DynamicCache(), torch.zeros(())
        with apply(model, *methods):
            for piece in tokens(1, 24).split([20, 1, 1, 1, 1], 1):
                total = total + model(piece, past_key_values=cache).logits.square().mean()
            model.zero_grad()
            total.backward()
        grads.append(next(p.grad.clone() for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


def test_packed_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(model_of("llama").config)
    with apply(model, Packed()), torch.no_grad():
        cache = hf.DynamicCache()
        model(torch.zeros(1, 8, dtype=torch.long, device="meta"), past_key_values=cache)
        assert model(torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache).logits.shape[1] == 1


@torch.no_grad()
@pytest.mark.parametrize("method", [(), (Packed(),), (SinkRecent(2, 4),)])
def test_attentions_are_returned_on_request(method: tuple[Method, ...]) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.set_attn_implementation("eager")
    cache = hf.DynamicCache()
    with apply(model, *method):
        model(tokens(1, 8), past_key_values=cache)
        seen = model(tokens(1, 1), past_key_values=cache, output_attentions=True).attentions
    assert len(seen) == 3 and all(weights is not None for weights in seen)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_the_tokens_in_a_window_are_counted(kind: str) -> None:
    model = model_of(kind)
    cache = hf.DynamicCache(config=model.config)
    with apply(model) as run:
        for piece in tokens(1, 17).split([14, 1, 1, 1], 1):
            model(piece, past_key_values=cache)
        assert (run.stats.kept, run.stats.cache_bytes) == (held(cache).kept, held(cache).nbytes)
