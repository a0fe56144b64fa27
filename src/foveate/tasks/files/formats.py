"""Formats of rows, recognised by their fields.

| rows of | fields | prompt |
|---|---|---|
| the user's own file | prompt, answer or answers | unchanged |
| conversations | messages (or conversations), answer | by the model's chat template |
| lm-eval's samples | doc, arguments, target | the request that was sent |
| MRCR | prompt, answer, random_string_to_prepend | by the model's chat template |
| SCBench | context (or input), multi_turns | context and question, in later turns also the earlier ones |
| RULER v1 | input, outputs, answer_prefix | input and prefix |
| RULER and LongBench of kvpress | context, question, answer_prefix, answer or answers, task | the three in order |
| RULER v2 | question, expected_answer | unchanged |
| LongBench v1 | input, context, answers, dataset | context and input |
| LongBench v2 | context, question, choice_A ... choice_D, answer | context, question, choices |
| BABILong | input, question, target | input, blank line, question |
| InfiniteBench and others | context, input, answers or answer | context, blank line, input |
| question answering | context, question, answers or answer | context, blank line, question |
| instructions | instruction, input, output | instruction, blank line, input |

The benchmarks are scored by their own rules, see `foveate.tasks.rules`. A benchmark's instructions are not in its rows:
the few words that a prompt needs are Foveate's own. For comparable numbers write the benchmark's instructions into
`--prompt-field`, with the fields in braces; the rule stays that of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.files.benchmarks import babilong, longbench, mrcr, ruler, scbench
from foveate.tasks.files.parts import Item, Row, Text, conversation, field_text, listed, parsed, text

Items = Callable[[Row, str], list[Item]]


@dataclass(frozen=True)
class FirstOf:
    """The answer in the first of some fields that holds one."""

    names: tuple[str, ...]

    def field(self, row: Row) -> str:
        return next((name for name in self.names if row.get(name) is not None), self.names[0])

    def __call__(self, row: Row) -> Any:
        return listed(row.get(self.field(row)))


@dataclass(frozen=True)
class RowFormat:
    """A row format.

    Args:
        fields: a row with all of these fields has this format.
        prompt: builds the prompt from a row.
        answer: the fields of the accepted answers, or a function that returns them, or None.
        metric: the default score.
        items: builds a benchmark's questions from a row and the file's path, instead of `prompt` and `answer`.
    """

    fields: frozenset[str]
    prompt: Callable[[Row], Text] | None = None
    answer: Callable[[Row], Any] = lambda row: None
    metric: str = "contains"
    items: Items | None = None

    def read(self, row: Row, path: str) -> list[Item]:
        """Return the questions of a row."""
        if self.items is not None:
            return self.items(row, path)
        assert self.prompt is not None
        return [self.answered(self.prompt(row), row)]

    def answered(self, prompt: Text, row: Row) -> Item:
        """Return a prompt with the row's answer."""
        name = self.answer.field(row) if isinstance(self.answer, FirstOf) else "target"
        return Item(prompt, self.answer(row), answer_name=name)

    def fits(self, row: Row) -> bool:
        """Return True if the row has the format's fields and an answer."""
        return self.fields <= row.keys() and (self.items is not None or self.answer(row) is not None)


def _any_of(*names: str) -> FirstOf:
    return FirstOf(names)


any_answer = _any_of("answer", "answers", "target", "outputs", "output")


def _own(row: Row) -> Text:
    value = row["prompt"]
    if isinstance(value, list):
        return conversation(value, "prompt")
    return Text(text(value, "prompt"))


def _requests(row: Row) -> list[tuple[Any, Any]]:
    """Return lm-eval's requests as pairs `(context, continuation or generation settings)`."""
    held = row["arguments"]
    held = parsed(held) if isinstance(held, str) else held
    each = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(each, list | tuple) or not all(isinstance(item, dict | list | tuple) for item in each):
        raise TaskError(f"arguments must be a list of pairs of a context and a continuation; got {held!r:.40}")
    pairs = [list(item.values()) if isinstance(item, dict) else list(item) for item in each]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) > 1]


def _request(row: Row) -> Text:
    requests = _requests(row)
    if not requests:
        raise TaskError(f"arguments must hold a context and a continuation; got {row['arguments']!r:.40}")
    return Text(text(requests[0][0], "arguments: the context"))


def _target(row: Row) -> Any:
    """Return the target; if there are several continuations, the target is an index into them."""
    try:
        continuations = [text for _, text in _requests(row) if isinstance(text, str)]
    except TaskError:
        return None
    target = listed(row.get("target"))
    if len(continuations) == 1:
        return continuations[0]
    if continuations and str(target).isdigit() and int(target) < len(continuations):
        return continuations[int(target)]
    return target


def _with_question(context: str, question: str) -> Callable[[Row], Text]:
    def build(row: Row) -> Text:
        return Text(field_text(row, context), field_text(row, question).strip(), "\n\nAnswer:")

    return build


def _instruction(row: Row) -> Text:
    return Text(field_text(row, "instruction"), text(row.get("input") or "", "input"), "\n\nAnswer:")


def _fields(*names: str) -> frozenset[str]:
    return frozenset(names)


#: The known formats, the most specific first.
FORMATS = (
    RowFormat(_fields("doc", "arguments"), _request, _target),
    RowFormat(_fields("multi_turns"), items=scbench.items),
    RowFormat(_fields("prompt", "answer", "random_string_to_prepend"), items=mrcr.items),
    RowFormat(_fields("prompt"), _own, _any_of("answer", "answers", "completion", "target"), "begins"),
    RowFormat(
        _fields("messages"),
        lambda row: conversation(row["messages"], "messages"),
        _any_of("answer", "answers", "target"),
    ),
    RowFormat(
        _fields("conversations"),
        lambda row: conversation(row["conversations"], "conversations"),
        _any_of("answer", "answers"),
    ),
    RowFormat(_fields("context", "question", "answer_prefix", "answers", "task"), items=longbench.kvpress),
    RowFormat(_fields("context", "question", "answer_prefix", "answer"), items=ruler.kvpress),
    RowFormat(_fields("context", "question", "answer", *(f"choice_{x}" for x in "ABCD")), items=longbench.second),
    RowFormat(_fields("input", "outputs"), items=ruler.first),
    RowFormat(_fields("question", "expected_answer"), items=ruler.second),
    RowFormat(_fields("input", "question", "target"), items=babilong.items),
    RowFormat(_fields("context", "input", "answers", "dataset"), items=longbench.first),
    RowFormat(_fields("context", "input"), _with_question("context", "input"), _any_of("answers", "answer")),
    RowFormat(_fields("context", "question"), _with_question("context", "question"), _any_of("answers", "answer")),
    RowFormat(_fields("instruction"), _instruction, _any_of("output")),
)
