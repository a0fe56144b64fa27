"""Rows of BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack (2024), arXiv 2406.10149."""

from __future__ import annotations

import re

from foveate.tasks.files.parts import Item, Row, Text, field_text
from foveate.tasks.rules.babilong import LABELS, guessed_task

_TASK = re.compile(r"(?<![a-z])(qa\d{1,2})(?!\d)")
_TOKENS = 20  # a sentence; the release stops at the first full stop


def items(row: Row, path: str) -> list[Item]:
    """Read a row. Its task is in the path (`qa1.jsonl`), in the field `task`, or follows from the target."""
    question, target = field_text(row, "question"), field_text(row, "target")
    parts = Text(field_text(row, "input"), question.strip(), "\n\nAnswer:")
    named = _TASK.findall(f"{path} {row.get('task') or ''}")
    task = named[-1] if named and named[-1] in LABELS else guessed_task(target)
    if task is None:
        return [Item(parts, target, answer_name="target")]
    facts = {"task": task, "question": question, "groups": [task]}
    return [Item(parts, target, "babilong", facts, _TOKENS, "target")]
