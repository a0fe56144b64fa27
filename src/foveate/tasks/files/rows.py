"""From a row of somebody's file to an example: fields by name, or a format that is known."""

from __future__ import annotations

import re
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example
from foveate.tasks.files.formats import KINDS, Kind, Row, Text, any_answer, listed, parsed, said, text

_FIELD = re.compile(r"\{([^{}]+)\}")


def example(row: Any, where: str, prompt_field: str | None, answer_field: str | None) -> tuple[Example, str]:
    """The example that a row stands for, and the name of the score that fits it.

    Args:
        row: an object.
        where: the row's place, for errors.
        prompt_field: a field, with dots into objects and lists (`doc.question`), or a text with fields in braces.
        answer_field: a field.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where} must be an object with prompt and answer; got {type(row).__name__}")
    row = {str(name): value for name, value in row.items()}
    kind = _kind(row, where, prompt_field, answer_field)
    if prompt_field is not None:
        asked = Text(_filled(row, where, prompt_field))
    else:
        assert kind is not None
        asked = _made(kind, row, where)
    told = kind.answer(row) if kind is not None else any_answer(row)
    if answer_field is not None:
        told = listed(_looked_up(row, where, answer_field))
    if told is None and asked.messages and asked.messages[-1]["role"] == "assistant":
        asked, told = Text(said(asked.messages[:-1]), messages=asked.messages[:-1]), asked.messages[-1]["content"]
    found = asked.example(_answers(told, where, answer_field or "answer"))
    if not found.prompt.strip():
        raise TaskError(f"{where}: {prompt_field or 'prompt'} must be non-empty text; got {found.prompt!r}")
    return found, _metric(kind, row)


def _metric(kind: Kind | None, row: Row) -> str:
    if kind is None:
        return "begins"
    alternatives = str(row.get("answer_prefix")).strip() == "Answer:" or str(row.get("task")).startswith("qa")
    return "contains" if kind.metric == "contains-all" and alternatives else kind.metric


def _kind(row: Row, where: str, prompt_field: str | None, answer_field: str | None) -> Kind | None:
    """The first kind that the row has all fields of; None where the caller's fields make one unnecessary."""
    whole = [kind for kind in KINDS if kind.fields <= row.keys()]
    found = next((kind for kind in whole if answer_field or kind.answer(row) is not None), None)
    found = found or next(iter(whole), None)
    if found is None and prompt_field is None:
        shown = ", ".join(list(row)[:8]) or "no fields"
        raise TaskError(
            f"{where} has {shown}; it must have prompt and answer, or be a row of a known benchmark; "
            "--prompt-field and --answer-field name other fields"
        )
    return found


def _made(kind: Kind, row: Row, where: str) -> Text:
    try:
        return kind.prompt(row)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise TaskError(f"{where}: prompt must be non-empty text; {error}") from None


def _filled(row: Row, where: str, pattern: str) -> str:
    """A field's text, or a pattern with fields in braces, in which a shell's `\\n` is a new line."""
    if not _FIELD.search(pattern):
        return text(_looked_up(row, where, pattern), pattern)
    return _FIELD.sub(lambda found: text(_looked_up(row, where, found[1]), found[1]), pattern.replace("\\n", "\n"))


def _looked_up(row: Row, where: str, path: str) -> Any:
    """What lies under a name, or under several with dots between them."""
    if path in row:
        return row[path]
    held: Any = row
    for name in path.split("."):
        if isinstance(held, str) and held.lstrip().startswith(("{", "[")):
            held = parsed(held)
        if isinstance(held, list) and name.isdigit() and int(name) < len(held):
            held = held[int(name)]
        elif isinstance(held, dict) and name in held:
            held = held[name]
        else:
            raise TaskError(f"{where} has no field {path!r}; it has {', '.join(list(row)[:8])}")
    return held


def _answers(value: Any, where: str, name: str) -> tuple[str, ...]:
    """Every accepted answer, from a text, a number, a list of them, or an object that holds such a list as `text`."""
    if isinstance(value, dict):
        value = value.get("text", value.get("value"))
    listed = value if isinstance(value, list | tuple) else [value]
    found = []
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise TaskError(f"{where}: {name} must be non-empty text, a number or a list of them; got {value!r:.60}")
        found.append(text(item, name))
    found = [item for item in dict.fromkeys(found) if item.strip()]
    if not found:
        raise TaskError(f"{where}: {name} must be non-empty text, a number or a list of them; got {value!r:.60}")
    return tuple(found)
