"""Rows of BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack (2024), arXiv 2406.10149."""

from __future__ import annotations

import re

from foveate.tasks.files.parts import Item, Row, Text, text
from foveate.tasks.rules.babilong import LABELS, guessed_task

_TASK = re.compile(r"(?<![a-z])(qa\d{1,2})(?!\d)")
_TOKENS = 20  # a sentence; the release stops at the first full stop


def items(row: Row, path: str) -> list[Item]:
    """Read a row. Its task is in the path (`qa1.jsonl`), in the field `task`, or follows from the target."""
    parts = Text(text(row["input"]), text(row["question"]).strip(), "\n\nAnswer:")
    target = text(row["target"], "target")
    named = _TASK.findall(f"{path} {row.get('task') or ''}")
    task = named[-1] if named and named[-1] in LABELS else guessed_task(target)
    if task is None:
        return [Item(parts, target)]
    return [
        Item(parts, target, "babilong", {"task": task, "question": text(row["question"]), "groups": [task]}, _TOKENS)
    ]
