"""Noun phrases of a prompt by spaCy, which is optional."""

from __future__ import annotations

from foveate.core.errors import OptionError


def noun_phrases(prompt: str, model: str = "en_core_web_sm") -> list[str]:
    """Return the noun phrases of a prompt that have several words and are not the whole prompt.

    Args:
        prompt: an English text.
        model: the name of a spaCy pipeline with a parser.

    Raises:
        OptionError: spaCy or its pipeline is not installed.
    """
    try:
        import spacy
    except ImportError:
        raise OptionError(
            "noun_phrases needs the package spacy: pip install spacy, or give the phrases as a list"
        ) from None
    try:
        parse = spacy.load(model)
    except OSError:
        raise OptionError(f"noun_phrases needs spaCy's pipeline {model}: python -m spacy download {model}") from None
    chunks = [chunk for chunk in parse(prompt).noun_chunks if len(chunk) > 1]
    return [chunk.text for chunk in chunks if chunk.text.strip() != prompt.strip()]
