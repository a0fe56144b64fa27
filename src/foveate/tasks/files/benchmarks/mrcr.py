"""Rows of OpenAI's MRCR: a long conversation that asks for one of several similar answers again."""

from __future__ import annotations

from dataclasses import replace

from foveate.tasks.files.parts import Item, Row, conversation, field_text, transcript


def items(row: Row, path: str) -> list[Item]:
    """Read a row; its last message is the question, and the messages before it are the context."""
    parts = conversation(row["prompt"], "prompt")
    question = parts.messages[-1]["content"]
    before = transcript(parts.messages)[: -len(question)]
    answer, prefix = field_text(row, "answer"), field_text(row, "random_string_to_prepend")
    return [Item(replace(parts, context=before, question=question, between=""), answer, "mrcr", {"prefix": prefix})]
