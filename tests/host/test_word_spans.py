"""Tokens of words in a prompt: pieces, repeated words, case, and places behind what the encoder reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.core.errors import OptionError
from foveate.host import phrase_spans, word_spans
from foveate.host.diffusers.words import tokens_before
from tests.support.diffusion_models import words

#: <s> a red cube ##s and a blue ball </s>
PROMPT = "A red cubes and a blue ball"


def test_words_and_phrases() -> None:
    assert words()(PROMPT).tokens() == "<s> a red cube ##s and a blue ball </s>".split()
    found = word_spans(words(), PROMPT, ["red", "Cubes", "a", "blue ball", "red cubes and"])
    assert found == {"red": [2], "Cubes": [3, 4], "a": [1, 6], "blue ball": [7, 8], "red cubes and": [2, 3, 4, 5]}
    assert word_spans(words(), PROMPT, []) == {}


def test_phrases_named_again_stand_for_their_next_place() -> None:
    prompt = "a red ball, a red cube"
    assert words()(prompt).tokens()[4] == ","
    spans = phrase_spans(words(), prompt, ["red cube", "a", "A", "red ball", "red"])
    assert spans == [range(6, 8), range(1, 2), range(5, 6), range(2, 4), range(2, 3)]


def test_tokens_before_the_text() -> None:
    assert tokens_before(words(), PROMPT) == 1
    bare = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "?": 2}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    assert tokens_before(tokenizer, "a cat") == 0 and tokens_before(words(), "") == 0
    assert word_spans(tokenizer, "a cat", ["cat"]) == {"cat": [1]}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: word_spans(words(), PROMPT, ["green"]), "'green' is not in prompt='A red cubes and a blue ball'"),
        (lambda: word_spans(words(), PROMPT, ["cube"]), "'cube' is not in prompt"),
        (lambda: word_spans(words(), PROMPT, ["e ball"]), "'e ball' is not in prompt"),
        (lambda: word_spans(words(), PROMPT, [" "]), "' ' must be a word or a phrase"),
        (lambda: word_spans(words(), PROMPT, [3]), "3 must be a word or a phrase"),  # type: ignore[list-item]
        (lambda: word_spans(words(), "a " * 10 + "ball", ["ball"]), "'ball' is behind the 12 tokens that are read"),
        (lambda: word_spans(words(), ["a"], ["a"]), "prompt=['a'] must be one text"),  # type: ignore[arg-type]
        (lambda: word_spans(object(), "a", ["a"]), "object does not say where tokens stand; use a fast tokenizer"),
        (lambda: phrase_spans(words(), PROMPT, ["red", "red"]), "'red' is named 2 times, and prompt has it 1 times"),
    ],
)  # fmt: skip
def test_refusals(act: Callable[[], Any], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        act()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_place_that_is_read_holds_the_end_token() -> None:
    assert word_spans(words(), "a " * 9 + "ball", ["ball"]) == {"ball": [10]}
    with pytest.raises(OptionError):
        word_spans(words(), "a " * 10 + "ball", ["ball"])
