"""Turn a row of a file into examples, by named fields or by a known format."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example
from foveate.tasks.files.benchmarks import scbench
from foveate.tasks.files.formats import FORMATS, RowFormat, any_answer
from foveate.tasks.files.parts import Item, Row, Text, listed, parsed, text, transcript

_FIELD = re.compile(r"\{([^{}]+)\}")


def examples(
    row: Any,
    where: str,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    path: str = "",
    turns: str = scbench.MODES[0],
) -> tuple[list[Example], str]:
    """Build the examples of a row, and choose their score. Most formats have one example per row.

    Args:
        row: the row; it has to be a dict.
        where: the row's place, for error messages.
        prompt_field: a field's path, with dots into objects and lists (`doc.question`), or a template with fields in
            braces.
        answer_field: a field's path.
        path: the file's path; in some benchmarks it names the task.
        turns: see `Prompts`.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where} must be an object with prompt and answer; got {type(row).__name__}")
    row = {str(name): value for name, value in row.items()}
    known = _format(row, where, prompt_field, answer_field)
    metric = "begins" if known is None else known.metric
    items = _items(known, row, where, path, turns, prompt_field)
    if (prompt_field or answer_field) and len(items) > 1:
        raise TaskError(f"{where} holds {len(items)} questions; prompt_field and answer_field go with one")
    found = []
    for item in items:
        if prompt_field is not None:
            item = replace(item, text=Text(filled(row, where, prompt_field)))
        if answer_field is not None:
            item = replace(item, answer=listed(_lookup(row, where, answer_field)))
        found.append(_example(item, where, prompt_field or "prompt", answer_field or item.answer_name))
    return found, metric


def _items(
    known: RowFormat | None, row: Row, where: str, path: str, turns: str, prompt_field: str | None
) -> list[Item]:
    """Read a row's questions; a benchmark's row whose prompt is given may lack fields that the prompt would need."""
    if known is None:
        return [Item(Text(), any_answer(row), answer_name=any_answer.field(row))]
    if prompt_field is not None and known.items is None:
        return [known.answered(Text(), row)]
    try:
        return scbench.items(row, path, turns) if known.items is scbench.items else known.read(row, path)
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from None


def _example(item: Item, where: str, prompt_name: str, answer_name: str) -> Example:
    prompt, answer = item.text, item.answer
    if answer is None and prompt.messages and prompt.messages[-1]["role"] == "assistant":
        *history, last = prompt.messages
        prompt, answer = Text(transcript(tuple(history)), messages=tuple(history)), last["content"]
    if answer is None and prompt.messages:
        raise TaskError(f"{where}: {answer_name} must be given, or the last message must be the assistant's")
    found = prompt.example(_answers(answer, where, answer_name, unique=not item.rule))
    if not found.prompt.strip():
        raise TaskError(f"{where}: {prompt_name} must be non-empty text; got {found.prompt!r}")
    return replace(found, rule=item.rule, facts=item.facts, new_tokens=item.new_tokens)


def _format(row: Row, where: str, prompt_field: str | None, answer_field: str | None) -> RowFormat | None:
    """Return the first format whose fields the row has; None if none fits and the caller names the fields."""
    fitting = [known for known in FORMATS if known.fields <= row.keys()]
    found = next((known for known in fitting if answer_field or known.fits(row)), None)
    found = found or next(iter(fitting), None)
    if found is None and prompt_field is None:
        shown = ", ".join(list(row)[:8]) or "no fields"
        raise TaskError(
            f"{where} has {shown}; it must have prompt and answer, or be a row of a known benchmark, "
            "or --prompt-field and --answer-field must name its fields"
        )
    return found


def filled(row: Row, where: str, pattern: str) -> str:
    """Return a field's text, or fill a template; `\\n` in a template, as a shell passes it, is a new line."""
    if not _FIELD.search(pattern):
        return text(_lookup(row, where, pattern), f"{where}: {pattern}")
    return _FIELD.sub(
        lambda found: text(_lookup(row, where, found[1]), f"{where}: {found[1]}"), pattern.replace("\\n", "\n")
    )


def _lookup(row: Row, where: str, path: str) -> Any:
    """Return the value at a path: a field's name, or several names with dots between them."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            value = parsed(value)
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise TaskError(f"{where} has no field {path!r}; it has {', '.join(list(row)[:8])}")
    return value


def _answers(value: Any, where: str, name: str, unique: bool) -> tuple[str, ...]:
    """Return the accepted answers of a text, a number, a list of them, or an object with such a list as `text`."""
    if isinstance(value, dict):
        value = value.get("text", value.get("value"))
    listed = value if isinstance(value, list | tuple) else [value]
    found = []
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise TaskError(f"{where}: {name} must be non-empty text, a number or a list of them; got {value!r:.60}")
        found.append(text(item, f"{where}: {name}"))
    found = [item for item in (dict.fromkeys(found) if unique else found) if item.strip()]
    if not found:
        raise TaskError(f"{where}: {name} must be non-empty text, a number or a list of them; got {value!r:.60}")
    return tuple(found)
