"""Rows of SCBench: A KV Cache-Centric Analysis of Long-Context Methods (2024), arXiv 2412.10319.

A row has one context and several questions. In multi-turn mode each question follows the earlier ones and their
right answers; in multi-request mode each follows the context alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example
from foveate.tasks.files.parts import Item, Row, Text, field_text, listed, text

#: The rule and the number of new tokens of each set.
SETS = {
    "kv": ("part", 150), "kv_hard": ("part", 150), "kv_compressible": ("part", 150), "prefix_suffix": ("part", 150),
    "hashhop": ("part", 150), "vt": ("share", 30), "repoqa": ("repository", 1024), "qa_eng": ("part-any-case", 40),
    "qa_chn": ("characters", 40), "choice_eng": ("choice", 40), "many_shot": ("part-any-case", 10),
    "summary": ("summary", 200), "mf": ("number", 5), "passkey": ("passkey", 15),
}  # fmt: skip
#: The sets of two sub-tasks, with the number of new tokens of each.
_MIXED = {
    "summary_with_needles": {"summary": 800, "passkey": 15},
    "repoqa_and_kv": {"repoqa": 1024, "kv": 80},
}
_NAME = re.compile(r"scbench_([a-z_]+?)(?=\.|/|\\|-|$)")
#: In the first, a question follows the earlier ones and their right answers; in the second, the context alone.
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
MODES = ("multi-turn", "multi-request")


def items(row: Row, path: str, mode: str = MODES[0]) -> list[Item]:
    """Read the questions of a row, in order.

    Args:
        row: has `context` (`input` in the set vt) and `multi_turns`.
        path: names the set, such as `scbench_kv.jsonl`; else a field `task` does, or the row's shape.
        mode: "multi-turn" or "multi-request".
    """
    turns = listed(row["multi_turns"])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise TaskError(f"multi_turns must be a list of objects with input and answer; got {turns!r:.40}")
    name = _set(turns[0], row, path)
    context, before, found = text(row.get("context") or row.get("input"), "context"), "", []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number}: "
        question, prefix = _question(turn, where)
        answer = listed(turn.get("answer"))
        rule, tokens = _rule(turn, name)
        if rule == "scbench-number":
            _check_numbers(answer, f"{where}an answer of {name}")
        parts = Text(context, before + question, prefix)
        facts = {**_facts(row, turn, rule, where), "groups": [f"turn {number}", rule.removeprefix("scbench-")]}
        found.append(Item(parts, _answers(turn, answer, where), rule, facts, tokens, f"{where}answer"))
        if mode == MODES[0]:
            before += f"{question}{prefix} {_written(answer)}\n\n"
    return found


def _check_numbers(answer: Any, called: str) -> None:
    """Refuse an answer that is no number; the release takes the first of a list."""
    for each in answer if isinstance(answer, list) and answer else [answer]:
        if not _NUMBER.fullmatch(str(each).strip()):
            raise TaskError(f"{called} must be a number; got {answer!r:.40}")


def with_functions(examples: Sequence[Example]) -> list[Example]:
    """Give each example of RepoQA all requested functions of its repository, with which its rule compares."""
    functions: dict[str, dict[str, str]] = {}
    for example in examples:
        if example.rule == "scbench-repository":
            functions.setdefault(example.facts["repository"], {})[example.facts["name"]] = example.answers[0]
    return [
        replace(example, facts={**example.facts, "functions": functions[example.facts["repository"]]})
        if example.rule == "scbench-repository"
        else example
        for example in examples
    ]


def _set(turn: dict[str, Any], row: Row, path: str) -> str:
    named = _NAME.findall(f"{path} {row.get('task') or ''}")
    name = next((each for each in reversed(named) if each in SETS or each in _MIXED), None)
    if name is not None:
        return name
    return "choice_eng" if turn.get("options") else "vt" if isinstance(listed(turn.get("answer")), list) else "kv"


def _rule(turn: dict[str, Any], name: str) -> tuple[str, int]:
    if name not in _MIXED:
        rule, tokens = SETS[name]
        return f"scbench-{rule}", tokens
    task = str(turn.get("task", "")).removeprefix("scbench_")
    if task not in _MIXED[name]:
        raise TaskError(f"a question of {name} must have the task {' or '.join(_MIXED[name])}; got {task!r:.40}")
    return f"scbench-{SETS[task][0]}", _MIXED[name][task]


def _options(turn: dict[str, Any], where: str) -> list[str]:
    """Return the choices of a question; none if it has no choices."""
    options = listed(turn.get("options")) or []
    if not isinstance(options, list):
        raise TaskError(f"{where}options must be a list of texts; got {options!r:.40}")
    return [text(option, f"{where}options") for option in options]


def _question(turn: dict[str, Any], where: str) -> tuple[str, str]:
    """Return a question and the beginning of its answer."""
    question = field_text(turn, "input", where).strip()
    options = _options(turn, where)
    if not options:
        return question, "" if question.endswith((":", "：", " is")) else "\n\nAnswer:"
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    return f"{question}\n{lines}", "\n\nAnswer:"


def _answers(turn: dict[str, Any], answer: Any, where: str) -> Any:
    """Return the accepted answers; of a choice its letter, and its text where the file has it."""
    options = _options(turn, where)
    if not options or isinstance(answer, list):
        return answer
    written = text(answer, f"{where}answer").strip()
    if written in options:
        return ["ABCD"[options.index(written)], written]
    return [written, options["ABCD".index(written)]] if written in "ABCD"[: len(options)] and written else [written]


def _facts(row: Row, turn: dict[str, Any], rule: str, where: str) -> dict[str, Any]:
    if rule != "scbench-repository":
        return {}
    name = text(turn.get("name") or turn.get("func_name"), f"{where}name")  # its rule compares functions by name
    language = str(turn.get("lang") or row.get("lang") or "")
    return {"name": name, "repository": str(row.get("repo", "")), "language": language}


def _written(answer: Any) -> str:
    return text(", ".join(map(str, answer)) if isinstance(answer, list) else str(answer), "answer")
