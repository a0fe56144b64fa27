"""With `evict="after prompt"`, tokens are dropped at the end of the prompt, and none later."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, apply
from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.compressed import CompressedLayer
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.sink_recent import SinkRecent
from tests.support.host_models import SLIDING, Recent, model, tokens

GATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
METHODS: dict[str, Callable[[], Method]] = {
    "even": lambda: SinkRecent(2, 6),
    "uneven": lambda: DuoAttention(GATES, 0.5, 2, 6),
}
TEXT, QUESTION = tokens(1, 24), tokens(1, 5, seed=1)


def continue_from(subject: PreTrainedModel, cache: DynamicCache, ids: Tensor = QUESTION, steps: int = 6) -> Tensor:
    """Return the logits of the first token, of the others at once, and of greedy steps after them."""
    pieces, out = [ids[:, :1], ids[:, 1:]], []
    for step in range(steps):
        piece = pieces[step] if step < len(pieces) else out[-1][:, -1:].argmax(-1)
        out.append(subject(piece, past_key_values=cache).logits)
    return torch.cat(out, 1)


def saved(cache: DynamicCache, how: str) -> DynamicCache:
    if how == "deep copy":
        return copy.deepcopy(cache)
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("chunks", [[24], [9, 10, 5]])
@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_nothing_is_dropped_after_the_prompt(kind: str, chunks: list[int]) -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, METHODS[kind](), evict="after prompt") as run:
        for piece in TEXT.split(chunks, 1):
            llama(piece, past_key_values=cache)
        before = [layer.store.stored for layer in cache.layers]
        rows = {"even": [2 * 8] * 3, "uneven": [8 + 24] * 3}[kind]
        if kind == "even" or len(chunks) == 1:
            assert before == rows
        continue_from(llama, cache)
        assert [layer.store.stored for layer in cache.layers] == [count + 2 * 9 for count in before]
        assert run.stats.kept == sum(count + 18 for count in before) / (3 * 2 * (24 + 9))


@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_always_drops_at_every_step(kind: str) -> None:
    """Without the option, every step drops tokens."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, METHODS[kind]()):
        llama(TEXT, past_key_values=cache)
        continue_from(llama, cache)
        assert [layer.store.stored for layer in cache.layers] == [8 + (8 if kind == "even" else 33)] * 3


@pytest.mark.parametrize("how", ["as it is", "deep copy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_an_even_cache_works_without_foveate(name: str, how: str) -> None:
    subject, cache = model(name), DynamicCache(config=model(name).config)
    with apply(subject, METHODS["even"](), evict="after prompt"):
        subject(TEXT, past_key_values=cache)
        expected = continue_from(subject, copy.deepcopy(cache))
    assert all(type(layer) is CompressedLayer for layer in cache.layers)
    cache = cache if how == "as it is" else saved(cache, how)
    torch.testing.assert_close(continue_from(subject, cache), expected, atol=1e-5, rtol=1e-5)
    cache.crop(24 - cache.get_seq_length())
    other = tokens(1, 5, seed=2)
    with apply(subject, METHODS["even"](), evict="after prompt"):
        fresh = DynamicCache(config=subject.config)
        subject(TEXT, past_key_values=fresh)
        again = continue_from(subject, fresh, other)
    torch.testing.assert_close(continue_from(subject, cache, other), again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["as it is", "deep copy", "pickle", "torch.save", "saved inside"])
@torch.no_grad()
def test_an_uneven_cache_works_inside_another_block(how: str) -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, METHODS["uneven"](), evict="after prompt"):
        llama(TEXT, past_key_values=cache)
        expected = continue_from(llama, copy.deepcopy(cache))
        inside = saved(cache, "torch.save")
    cache = {"as it is": lambda: cache, "saved inside": lambda: inside}.get(how, lambda: saved(cache, how))()
    with pytest.raises(UnsupportedModel, match=r"use it inside foveate.apply\(model\)"):
        continue_from(llama, cache)
    for methods in ([], [METHODS["uneven"]()]):
        with apply(llama, *methods, evict="after prompt"):
            torch.testing.assert_close(continue_from(llama, cache), expected, atol=1e-5, rtol=1e-5)
            cache.crop(24 - cache.get_seq_length())
    assert all(isinstance(layer, SlotLayer) for layer in cache.layers)


@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_a_long_second_turn_is_no_prompt(kind: str) -> None:
    """The prompt of a compressed cache counts as read, also if many tokens come at once."""
    llama, cache, turn = model("llama"), DynamicCache(), tokens(1, 20, seed=3)
    with apply(llama, METHODS[kind](), evict="after prompt"):
        llama(TEXT, past_key_values=cache)
        llama(QUESTION[:, :1], past_key_values=cache)
        held = [layer.store.stored for layer in cache.layers]
        llama(turn, past_key_values=cache)
        assert [layer.store.stored for layer in cache.layers] == [count + 2 * 20 for count in held]
    again = saved(cache, "pickle")
    with apply(llama, METHODS[kind](), evict="after prompt") as run:
        llama(turn, past_key_values=again)
        assert run.stats.of(again).kept == sum(count + 2 * 40 for count in held) / (3 * 2 * 65)


@pytest.mark.parametrize("name", SLIDING)
@torch.no_grad()
def test_windows_keep_sliding(name: str) -> None:
    subject, cache = model(name), DynamicCache(config=model(name).config)
    with apply(subject, SinkRecent(2, 6), evict="after prompt"):
        subject(TEXT, past_key_values=cache)
        expected = continue_from(subject, copy.deepcopy(cache))
    with apply(subject):
        torch.testing.assert_close(continue_from(subject, cache), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_new_sequence_has_a_prompt_of_its_own() -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, Recent(6), evict="after prompt"):
        llama(TEXT, past_key_values=cache)
        continue_from(llama, cache)
        cache.reset()
        for piece in TEXT.split([8, 16], 1):
            llama(piece, past_key_values=cache)
        assert [layer.store.stored for layer in cache.layers] == [2 * 6] * 3


def test_an_unknown_time_is_refused() -> None:
    with pytest.raises(OptionError, match="evict='once' must be one of 'always', 'after prompt'"):
        apply(model("llama"), Recent(), evict="once")  # type: ignore[arg-type]
