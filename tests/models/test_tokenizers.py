"""The tokenizers of small models: one id for each byte, or for each number."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from foveate.models.base import byte_tokenizer, number_tokenizer


@pytest.mark.parametrize("text", ["", "a b\n\t\x00~", "".join(map(chr, range(0xA0, 0x180))), "日本語 ☃ 🦊"])
def test_the_ids_of_a_text_are_its_bytes(text: str) -> None:
    tokenizer = byte_tokenizer.build(64)
    ids = tokenizer(text).input_ids
    assert ids == [byte_tokenizer.BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (byte_tokenizer.EOS, byte_tokenizer.PAD)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (64, "left")


def test_every_byte_has_the_character_of_a_byte_level_vocabulary() -> None:
    characters = byte_tokenizer._byte_characters()
    assert len(set(characters)) == 256 and set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert characters[ord("A")] == "A" and characters[0] == "Ā" and characters[ord(" ")] == "Ġ"


def test_the_ids_of_numbers_are_the_numbers() -> None:
    tokenizer = number_tokenizer.build(20)
    assert tokenizer("17 4 0 19").input_ids == [17, 4, 0, 19]
    assert tokenizer.decode([17, 4]) == "17 4" and len(tokenizer) == 20
    assert tokenizer("20").input_ids == [0], "a number that is not in the vocabulary"
    assert (tokenizer.padding_side, tokenizer.clean_up_tokenization_spaces) == ("left", False)
