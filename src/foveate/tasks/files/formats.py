"""Formats of rows that are recognised by their fields.

| rows of | fields | prompt |
|---|---|---|
| a file of one's own | prompt, answer or answers | as it is |
| conversations | messages (or conversations), answer | by the model's chat template |
| lm-eval's samples | doc, arguments, target | the request that was sent |
| RULER | input, outputs, answer_prefix | input and prefix |
| RULER of kvpress | context, question, answer_prefix, answer | the three in order |
| LongBench, InfiniteBench | context, input, answers or answer | context, blank line, input |
| LongBench v2 | context, question, choice_A ... choice_D, answer | context, question, choices |
| BABILong | input, question, target | input, blank line, question |
| question answering | context, question, answers or answer | context, blank line, question |
| instructions | instruction, input, output | instruction, blank line, input |

The last four end in `Answer:`. A benchmark's own instructions differ by task and are not in its rows: prompts that
carry them belong into a `prompt` field.
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
    """A prompt in its parts: `context` and `question` keep their places, `prefix` begins the answer."""

    context: str = ""
    question: str = ""
    prefix: str = ""
    between: str = "\n\n"
    messages: tuple[dict[str, str], ...] = ()

    def example(self, answers: tuple[str, ...]) -> Example:
        """The parts put together, with their places as spans."""
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
class Kind:
    """Rows that are recognised by their fields.

    Args:
        fields: what the prompt is made of.
        prompt: makes it.
        answer: finds the accepted answers, or None.
        metric: how such answers are scored. RULER asks for all of its answers, but for those of its questions (`qa`).
    """

    fields: frozenset[str]
    prompt: Callable[[Row], Text]
    answer: Callable[[Row], Any]
    metric: str = "contains"


def text(value: Any, name: str = "prompt") -> str:
    """Text as a model can read it: lone halves of a surrogate pair, which JSON allows, become U+FFFD."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(f"{name} must be text; got {type(value).__name__}")
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def listed(value: Any) -> Any:
    """A list that a table's cell holds as text."""
    return parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def parsed(value: str) -> Any:
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
    return Text(said(messages), messages=messages)


def _message(item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise TypeError(f"a message must be an object with role and content; got {item!r:.40}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        other = [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]
        if other:
            raise ValueError(f"a message must hold text alone; got {other[0]!r:.40}")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a message must have role and content; got {item!r:.60}")
    return {"role": _ROLES.get(role, role), "content": text(content)}


def said(messages: tuple[dict[str, str], ...]) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _requests(row: Row) -> list[tuple[Any, Any]]:
    """lm-eval's requests: `(context, what is asked of the model about it)`."""
    held = row["arguments"]
    held = parsed(held) if isinstance(held, str) else held
    each = list(held.values()) if isinstance(held, dict) else list(held)
    pairs = [list(item.values()) if isinstance(item, dict) else list(item) for item in each]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) > 1]


def _request(row: Row) -> Text:
    requests = _requests(row)
    if not requests:
        raise ValueError("arguments must hold a context and what is asked about it")
    return Text(text(requests[0][0]))


def _target(row: Row) -> Any:
    """The target; of several continuations, the one that the target counts to."""
    try:
        continuations = [asked for _, asked in _requests(row) if isinstance(asked, str)]
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


def _asked(context: str, question: str) -> Callable[[Row], Text]:
    def made(row: Row) -> Text:
        asked = text(row[question]).strip()
        code = str(row.get("dataset", "")).startswith(("lcc", "repobench"))
        if code:  # to be continued where it ends
            return Text(text(row[context]), text(row[question]), between="")
        return Text(text(row[context]), asked, "\n\nAnswer:")

    return made


def _instruction(row: Row) -> Text:
    return Text(text(row["instruction"]), text(row.get("input") or ""), "\n\nAnswer:")


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


#: Kinds of rows, the ones with more fields of their own first.
KINDS = (
    Kind(_fields("doc", "arguments"), _request, _target),
    Kind(_fields("prompt"), _own, _any_of("answer", "answers", "completion", "target"), "begins"),
    Kind(_fields("messages"), lambda row: _conversation(row["messages"]), _any_of("answer", "answers", "target")),
    Kind(_fields("conversations"), lambda row: _conversation(row["conversations"]), _any_of("answer", "answers")),
    Kind(_fields("context", "question", "answer_prefix"), _ruler_kvpress, _any_of("answer"), "contains-all"),
    Kind(_fields("context", "question", *(f"choice_{x}" for x in "ABCD")), _choices, _any_of("answer"), "begins"),
    Kind(_fields("input", "outputs", "answer_prefix"), _ruler, _any_of("outputs"), "contains-all"),
    Kind(_fields("input", "outputs"), _ruler, _any_of("outputs"), "contains-all"),
    Kind(_fields("input", "question", "target"), _asked("input", "question"), _any_of("target")),
    Kind(_fields("context", "input"), _asked("context", "input"), _any_of("answers", "answer")),
    Kind(_fields("context", "question"), _asked("context", "question"), _any_of("answers", "answer")),
    Kind(_fields("instruction"), _instruction, _any_of("output")),
)
