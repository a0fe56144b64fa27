"""The texts of single tokens, as they stand in the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PART = "\N{REPLACEMENT CHARACTER}"  # stands for a token that is a part of a character
_LONGEST = 8  # tokens that one character may take


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, with its spaces.

    A token is decoded together with the ones before it, since many tokenizers drop the space before a first word. A
    character of several tokens belongs to its last one, and the others are U+FFFD.
    """
    found: list[str] = []
    start = done = 0  # the tokens from `start` to `done` have been shown, and are decoded again as context
    for end in range(1, len(ids) + 1):
        before, now = (_decoded(tokenizer, ids[start:stop]) for stop in (done, end))
        if now.endswith(PART) and end - done < _LONGEST and end < len(ids):
            found.append(PART)
            continue
        found.append(now[len(before) :] or PART)
        start, done = done, end
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
