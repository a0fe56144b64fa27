"""Find the tokens of words in a prompt, for cross-attention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from foveate.core.errors import OptionError, shown


def word_spans(tokenizer: Any, prompt: str, words: Iterable[str]) -> dict[str, list[int]]:
    """Return the positions of the tokens of some words or phrases, in all places where they stand in the prompt.

        with foveate.apply(pipe.unet, method) as run:
            run.spans = foveate.host.word_spans(pipe.tokenizer, prompt, ["cat", "red hat"])

    Positions count the tokens that the tokenizer puts before the text, so that they are places of the encoded prompt.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompt: the text.
        words: whole words, or phrases of them; upper and lower case are the same.

    Raises:
        OptionError: a word is not in the prompt, or behind the last token that the tokenizer's model reads.
    """
    offsets = _offsets(tokenizer, prompt)
    found = {}
    for word in words:
        spans = [_tokens(offsets, place, word, tokenizer) for place in _places(prompt, word)]
        found[word] = sorted({position for span in spans for position in span})
    return found


def phrase_spans(tokenizer: Any, prompt: str, phrases: Iterable[str]) -> list[range]:
    """Return the tokens of each phrase in a prompt; a phrase that is named again stands for its next place.

    Args:
        tokenizer, prompt: see `word_spans`.
        phrases: the phrases.

    Raises:
        OptionError: see `word_spans`.
    """
    offsets, used, found = _offsets(tokenizer, prompt), Counter[str](), []
    for phrase in phrases:
        places, number = _places(prompt, phrase), used[phrase.lower()]
        if number >= len(places):
            raise OptionError(f"phrases: {shown(phrase)} is named {number + 1} times, and prompt has it {number} times")
        used[phrase.lower()] += 1
        found.append(_tokens(offsets, places[number], phrase, tokenizer))
    return found


def tokens_before(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens that a tokenizer puts before the text."""
    return next((at for at, (start, stop) in enumerate(_offsets(tokenizer, prompt)) if stop > start), 0)


def _offsets(tokenizer: Any, prompt: str) -> list[tuple[int, int]]:
    """Return the first and last character of each token; special tokens have none."""
    if not isinstance(prompt, str):
        raise OptionError(f"prompt={shown(prompt)} must be one text")
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError(f"{type(tokenizer).__name__} does not say where tokens stand; use a fast tokenizer")
    return list(tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"])


def _places(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Return the characters of each place where a phrase stands."""
    if not isinstance(phrase, str) or not phrase.strip():
        raise OptionError(f"words: {shown(phrase)} must be a word or a phrase")
    whole = rf"(?<!\w){re.escape(phrase.strip())}(?!\w)"
    places = [match.span() for match in re.finditer(whole, prompt, re.IGNORECASE)]
    if not places:
        raise OptionError(f"words: {shown(phrase)} is not in prompt={shown(prompt)}")
    return places


def _tokens(offsets: list[tuple[int, int]], place: tuple[int, int], phrase: str, tokenizer: Any) -> range:
    """Return the tokens that hold some characters."""
    first, last = place
    inside = [at for at, (start, stop) in enumerate(offsets) if start < stop and start < last and stop > first]
    # the last place that the model reads is the end token's
    if not inside or inside[-1] >= tokenizer.model_max_length - 1:
        raise OptionError(f"words: {shown(phrase)} is behind the {tokenizer.model_max_length} tokens that are read")
    return range(inside[0], inside[-1] + 1)
