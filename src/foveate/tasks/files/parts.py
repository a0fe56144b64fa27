"""The parts that a row of a file is turned into, and the readers of its cells."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, field
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example

Row = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Text:
    """The parts of a prompt; `prefix` is the beginning of the answer."""

    context: str = ""
    question: str = ""
    prefix: str = ""
    between: str = "\n\n"
    messages: tuple[dict[str, str], ...] = ()

    def example(self, answers: tuple[str, ...]) -> Example:
        """Join the parts, and record the place of each as a span."""
        prompt, spans = "", {}
        parts = {"context": self.context, "question": self.question, "prefix": self.prefix}
        for name, part in parts.items():
            if part and prompt and name == "question":
                prompt += self.between
            if part:
                spans[name] = (len(prompt), len(prompt) + len(part))
                prompt += part
        return Example(prompt, answers[0], spans, answers, self.messages)


@dataclass(frozen=True)
class Item:
    """One question of a row.

    Args:
        text: the parts of the prompt.
        answer: the accepted answer, or a list of them.
        rule: the benchmark's rule, a name in `foveate.tasks.rules.registry.RULES`; empty for the format's metric.
        facts: what the rule needs to know beside the answers.
        new_tokens: how many tokens the benchmark lets a model generate; 0 leaves it to the answers.
        answer_name: the field of the answer, for messages.
    """

    text: Text
    answer: Any
    rule: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    answer_name: str = "answer"


def text(value: Any, name: str) -> str:
    """Return valid Unicode text: lone surrogates, which JSON allows, become U+FFFD.

    Args:
        value: text or a number. NaN, which tables write for a missing cell, is refused.
        name: the field, for messages.
    """
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(f"{name} must be text; got {_kind(value)}")
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def field_text(row: Row, name: str, where: str = "") -> str:
    """Return the text of a field.

    Args:
        row: the row, or an object in it.
        name: the field.
        where: the place of the object in the row, such as "turn 2: ", for messages.
    """
    if name not in row:
        raise TaskError(f"{where}{name} must be text; there is none")
    return text(row[name], f"{where}{name}")


def _kind(value: Any) -> str:
    """Return what a value is, in the words of a file."""
    if isinstance(value, float):
        return str(value)
    return "nothing" if value is None else type(value).__name__


def listed(value: Any) -> Any:
    """Parse a list that a table's cell holds as text; other values pass through."""
    return parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def parsed(value: str) -> Any:
    """Parse JSON or a Python literal; any other text passes through."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def conversation(value: Any, name: str) -> Text:
    """Read a conversation: a list of messages, or the text of one. `name` is its field, for messages of errors."""
    value = listed(value)
    if not isinstance(value, list) or not value:
        raise TaskError(f"{name} must be a list of messages; got {value!r:.40}")
    messages = tuple(_message(item, name) for item in value)
    return Text(transcript(messages), messages=messages)


def _message(item: Any, name: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise TaskError(f"{name} must be a list of objects with role and content; one is {item!r:.40}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list):  # a list of parts, as in OpenAI's API
        other = [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]
        if other:
            raise TaskError(f"{name}: a message must contain only text; got {other[0]!r:.40}")
        content = "".join(field_text(part, "text", f"{name}: a part's ") for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise TaskError(f"{name}: a message must have role and content as texts; got {item!r:.60}")
    return {"role": text(_ROLES.get(role, role), "role"), "content": text(content, "content")}


def transcript(messages: tuple[dict[str, str], ...]) -> str:
    """Write a conversation as plain text."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
