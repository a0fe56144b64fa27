"""Formats of rows, recognised by their fields.

| rows of | fields | prompt |
|---|---|---|
| the user's own file | prompt, answer or answers | unchanged |
| conversations | messages (or conversations), answer | by the model's chat template |
| lm-eval's samples | doc, arguments, target | the request that was sent |
| RULER | input, outputs, answer_prefix | input and prefix |
| RULER of kvpress | context, question, answer_prefix, answer | the three in order |
| LongBench, InfiniteBench | context, input, answers or answer | context, blank line, input |
| LongBench v2 | context, question, choice_A ... choice_D, answer | context, question, choices |
| BABILong | input, question, target | input, blank line, question |
| question answering | context, question, answers or answer | context, blank line, question |
| instructions | instruction, input, output | instruction, blank line, input |

Prompts of the last four end in `Answer:`. A benchmark's instructions differ by task and are not in its rows; to use
them, write the whole prompt into a `prompt` field.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
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
class RowFormat:
    """A row format.

    Args:
        fields: a row with all of these fields has this format.
        prompt: builds the prompt from a row.
        answer: returns the accepted answers, or None.
        metric: the default score. RULER asks for all answers, except in its question-answering tasks (`qa`).
    """

    fields: frozenset[str]
    prompt: Callable[[Row], Text]
    answer: Callable[[Row], Any]
    metric: str = "contains"


def text(value: Any, name: str = "prompt") -> str:
    """Return valid Unicode text: lone surrogates, which JSON allows, become U+FFFD."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(f"{name} must be text; got {type(value).__name__}")
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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


def _any_of(*names: str) -> Callable[[Row], Any]:
    return lambda row: next((listed(row[name]) for name in names if row.get(name) is not None), None)


any_answer = _any_of("answer", "answers", "target", "outputs", "output")


def _own(row: Row) -> Text:
    value = row["prompt"]
    if isinstance(value, list):
        return _conversation(value)
    return Text(text(value))


def _conversation(value: Any) -> Text:
    value = listed(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list; got {value!r:.40}")
    messages = tuple(_message(item) for item in value)
    return Text(transcript(messages), messages=messages)


def _message(item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise TypeError(f"a message must be an object with role and content; got {item!r:.40}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list):  # a list of parts, as in OpenAI's API
        other = [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]
        if other:
            raise ValueError(f"a message must contain only text; got {other[0]!r:.40}")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a message must have role and content; got {item!r:.60}")
    return {"role": _ROLES.get(role, role), "content": text(content)}


def transcript(messages: tuple[dict[str, str], ...]) -> str:
    """Write a conversation as plain text."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _requests(row: Row) -> list[tuple[Any, Any]]:
    """Return lm-eval's requests as pairs `(context, continuation or generation settings)`."""
    held = row["arguments"]
    held = parsed(held) if isinstance(held, str) else held
    each = list(held.values()) if isinstance(held, dict) else list(held)
    pairs = [list(item.values()) if isinstance(item, dict) else list(item) for item in each]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) > 1]


def _request(row: Row) -> Text:
    requests = _requests(row)
    if not requests:
        raise ValueError(f"arguments must hold a context and a continuation; got {row['arguments']!r:.40}")
    return Text(text(requests[0][0]))


def _target(row: Row) -> Any:
    """Return the target; if there are several continuations, the target is an index into them."""
    try:
        continuations = [text for _, text in _requests(row) if isinstance(text, str)]
    except (TypeError, ValueError, AttributeError, IndexError):
        return None
    target = listed(row.get("target"))
    if len(continuations) == 1:
        return continuations[0]
    if continuations and str(target).isdigit() and int(target) < len(continuations):
        return continuations[int(target)]
    return target


def _ruler(row: Row) -> Text:
    prefix, body = text(row.get("answer_prefix") or ""), text(row["input"])
    return Text(body.removesuffix(prefix), prefix=prefix)


def _ruler_kvpress(row: Row) -> Text:
    return Text(text(row["context"]), text(row["question"]), text(row["answer_prefix"]), between="")


def _choices(row: Row) -> Text:
    choices = "\n".join(f"({letter}) {text(row['choice_' + letter])}" for letter in "ABCD")
    return Text(text(row["context"]), f"{text(row['question'])}\n{choices}", "\n\nAnswer: (")


def _with_question(context: str, question: str) -> Callable[[Row], Text]:
    def build(row: Row) -> Text:
        code = str(row.get("dataset", "")).startswith(("lcc", "repobench"))
        if code:  # the model continues the code, so that nothing may follow it
            return Text(text(row[context]), text(row[question]), between="")
        return Text(text(row[context]), text(row[question]).strip(), "\n\nAnswer:")

    return build


def _instruction(row: Row) -> Text:
    return Text(text(row["instruction"]), text(row.get("input") or ""), "\n\nAnswer:")


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


#: The known formats, the most specific first.
FORMATS = (
    RowFormat(_fields("doc", "arguments"), _request, _target),
    RowFormat(_fields("prompt"), _own, _any_of("answer", "answers", "completion", "target"), "begins"),
    RowFormat(_fields("messages"), lambda row: _conversation(row["messages"]), _any_of("answer", "answers", "target")),
    RowFormat(_fields("conversations"), lambda row: _conversation(row["conversations"]), _any_of("answer", "answers")),
    RowFormat(_fields("context", "question", "answer_prefix"), _ruler_kvpress, _any_of("answer"), "contains-all"),
    RowFormat(_fields("context", "question", *(f"choice_{x}" for x in "ABCD")), _choices, _any_of("answer"), "begins"),
    RowFormat(_fields("input", "outputs", "answer_prefix"), _ruler, _any_of("outputs"), "contains-all"),
    RowFormat(_fields("input", "outputs"), _ruler, _any_of("outputs"), "contains-all"),
    RowFormat(_fields("input", "question", "target"), _with_question("input", "question"), _any_of("target")),
    RowFormat(_fields("context", "input"), _with_question("context", "input"), _any_of("answers", "answer")),
    RowFormat(_fields("context", "question"), _with_question("context", "question"), _any_of("answers", "answer")),
    RowFormat(_fields("instruction"), _instruction, _any_of("output")),
)
