"""Generation under methods: the answer is the model's own, streamed, with the bytes and the speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from foveate.bench import chosen_methods
from foveate.bench.generation import Asked, generate, ids_of
from foveate.bench.loading import load
from foveate.core.errors import OptionError, TaskError, UnknownKey
from foveate.host import apply
from foveate.host.hf.model import host
from foveate.kv import SnapKV

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TEXT = "one two three four five six seven eight nine ten " * 4


@pytest.fixture(scope="module")
def loaded(decoder: Path) -> tuple[Any, Any]:
    model, tokenizer, _ = load(str(decoder))
    return model, tokenizer


def by_hand(model: Any, methods: tuple[Any, ...], ids: list[int], new: int) -> tuple[list[int], int]:
    cache, feed, out = DynamicCache(config=model.config), torch.tensor([ids]), []
    with torch.no_grad(), apply(model, *methods) as run:
        for _ in range(new):
            feed = model(feed, past_key_values=cache).logits[:, -1:].argmax(-1)
            out.append(int(feed))
        return out, run.stats.cache_bytes


@pytest.mark.parametrize("methods", [(), (SnapKV(share=0.3, recent=8),)])
def test_the_answer_is_that_of_the_model_under_the_methods(loaded: tuple[Any, Any], methods: tuple[Any, ...]) -> None:
    model, tokenizer = loaded
    pieces: list[str] = []
    found = generate(model, tokenizer, methods, Asked("word", TEXT), tokens=12, write=pieces.append)
    ids = tokenizer(f"{TEXT}\n\nword").input_ids
    expected, nbytes = by_hand(model, methods, ids, found.new_tokens)
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)
    assert (found.prompt_tokens, found.cache_bytes) == (len(ids), nbytes)
    assert found.kept == 1.0 if not methods else 0.3 < found.kept < 0.4
    assert found.tokens_per_second > 0 and "tokens/s; cache" in found.line()


def test_a_text_that_is_compressed_before_the_question(loaded: tuple[Any, Any]) -> None:
    methods = (SnapKV(share=0.3, recent=8),)
    one, two = (
        generate(*loaded, methods, Asked(question, TEXT, before_question=True), tokens=4)
        for question in ("what?", "a much longer question?")
    )
    assert one.cache_bytes == two.cache_bytes and one.kept == pytest.approx(0.3, abs=0.02)
    with pytest.raises(OptionError, match="before_question=True needs a text"):
        Asked("what?", before_question=True)


def test_one_token_has_no_speed(loaded: tuple[Any, Any]) -> None:
    found = generate(*loaded, (), Asked("what?"), tokens=1)
    assert math.isnan(found.tokens_per_second) and "one token" in found.line()


def test_the_chat_template(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = loaded

    def text(asked: Asked) -> str:
        return tokenizer.decode(ids_of(asked, tokenizer), skip_special_tokens=True)

    assert text(Asked("hi")) == "hi"
    with pytest.raises(OptionError, match="chat=True needs a tokenizer with a chat template"):
        text(Asked("hi", chat=True))
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert text(Asked("hi")) == "<user>hi</><a>"
    assert text(Asked("hi", chat=False)) == "hi"
    assert text(Asked("hi", "a text", system="be brief")) == "<system>be brief</><user>a text\n\nhi</><a>"
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<a>", "{{ raise_exception('no') }}"))
    with pytest.raises(TaskError, match="the model's chat template fails: no"):
        text(Asked("hi"))


def test_a_prompt_past_the_context(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match="the prompt and its answer take .* the model's context holds 768"):
        generate(*loaded, (), Asked("what?", TEXT * 5))
    with pytest.raises(OptionError, match="prompt must not be empty"):
        Asked(" ")


def test_characters_are_written_when_they_are_complete(loaded: tuple[Any, Any]) -> None:
    from foveate.bench.generation import _Stream

    _, tokenizer = loaded
    pieces: list[str] = []
    stream = _Stream(tokenizer, pieces.append, torch.device("cpu"))
    stream.start()
    stream.put(torch.tensor([[1]]))
    for byte in "aé€".encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert pieces == ["a", "é", "€"]


# -- the choice of methods ---------------------------------------------------------------------------------------------


def test_keys_at_a_budget_and_recipes(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import foveate

    model, tokenizer = loaded
    monkeypatch.setattr(chosen_methods, "FOLDER", tmp_path / "learnt")
    here = host(model)
    one, two = chosen_methods.chosen(None, ["snapkv", "recycled_attention"], 0.25, here, tokenizer, 200)
    assert (one.share, two.k) == (0.25, two.k) and two.k < 60  # type: ignore[attr-defined]
    file = foveate.save([SnapKV(share=0.125)], tmp_path / "mine.json", model=model)
    (found,) = chosen_methods.chosen(str(file), None, 0.35, here, tokenizer, 200)
    assert found.share == 0.125  # type: ignore[attr-defined]
    assert chosen_methods.chosen(None, None, 0.35, here, tokenizer, 200) == ()


@pytest.mark.parametrize(
    ("recipe", "keys", "budget", "words"),
    [
        ("a.json", ["snapkv"], 0.3, "recipe= and methods= exclude each other"),
        ("a.txt", None, 0.3, "recipe=a.txt must be a .json file"),
        ("absent.json", None, 0.3, "cannot read recipe absent.json"),
        (None, ["snapvk"], 0.3, 'unknown method "snapvk"'),
        (None, ["snapkv"], 1.5, "budget=1.5 must be above 0 and at most 1"),
    ],
)
def test_a_wrong_choice_is_refused(recipe: str | None, keys: list[str] | None, budget: float, words: str) -> None:
    with pytest.raises((OptionError, UnknownKey), match=words):
        chosen_methods.check(recipe, keys, budget)
