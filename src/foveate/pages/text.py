"""Texts of models and users in a form that cannot control a page or a terminal."""

from __future__ import annotations

import unicodedata

_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def visible(text: str, lines: bool = False) -> str:
    """Replace control characters by symbols, so that no output can control a terminal or a page.

    With `lines`, line breaks and tabs stay.
    """
    return "".join(char if lines and char in "\n\t" else _symbol(char) for char in text)


def _symbol(char: str) -> str:
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\N{SYMBOL FOR DELETE}"
    # Cc: other controls; Cs: lone surrogates, which cannot be encoded; bidirectional overrides reorder a line.
    if unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in _OVERRIDES:
        return "\N{REPLACEMENT CHARACTER}"
    return char
