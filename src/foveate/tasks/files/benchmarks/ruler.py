"""Rows of RULER, as its own scripts, kvpress and NeMo Skills (the second version) write them.

RULER: What's the Real Context Size of Your Long-Context Language Models? (2024), arXiv 2404.06654.
"""

from __future__ import annotations

import re

from foveate.core.errors import TaskError
from foveate.tasks.files.parts import Item, Row, Text, field_text, listed, text

#: How many tokens RULER lets a model generate, by the first part of a task's name.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_NAMES = re.compile(
    r"(?<![a-z])(niah_(?:single|multikey)_[123]|niah_multi(?:value|query)|vt|cwe|fwe|qa_[12])(?![a-z\d])"
)
_SECOND = re.compile(r"(m[kv]_niah|qa)_(basic|easy|medium|hard)(?![a-z\d])")
_SECOND_TOKENS = 16_384
_SINGLE_LETTERS, _TWO_STEPS = ("mk_niah_medium", "mk_niah_hard"), ("mv_niah_medium",)


def first(row: Row, path: str) -> list[Item]:
    """Read a row of RULER's own JSON lines.

    A row does not name its task. The path does (`niah_single_1/validation.jsonl`); else the prefix `Answer:` tells the
    question-answering tasks, where one answer is enough. The question is the last paragraph of the input.
    """
    prefix, body = text(row.get("answer_prefix") or "", "answer_prefix"), field_text(row, "input")
    body = body.removesuffix(prefix) if prefix else body
    named = _NAMES.findall(path)
    kind = named[-1].split("_")[0] if named else "qa" if prefix.strip() == "Answer:" else ""
    parts = Text(*divided(body), prefix, between="")
    rule = "ruler-any" if kind == "qa" else "ruler-all"
    return [Item(parts, row["outputs"], rule, {"groups": named[-1:]}, NEW_TOKENS.get(kind, 0), "outputs")]


def kvpress(row: Row, path: str) -> list[Item]:
    """Read a row of the Parquet files that kvpress evaluates; its rule deletes control characters."""
    context, question, prefix = (field_text(row, name) for name in ("context", "question", "answer_prefix"))
    parts = Text(context, question, prefix, between="")
    answer, kind = listed(row["answer"]), str(row.get("task")).split("_")[0]
    if kind not in NEW_TOKENS:
        return [Item(parts, answer, new_tokens=_whole(row.get("max_new_tokens")))]
    rule = "ruler-any" if kind == "qa" else "ruler-all"
    tokens = _whole(row.get("max_new_tokens")) or NEW_TOKENS[kind]
    return [Item(parts, answer, rule, {"controls": "", "groups": [str(row["task"])]}, tokens)]


def second(row: Row, path: str) -> list[Item]:
    """Read a row of RULER v2: `question`, `expected_answer`, and in NeMo Gym's rows `eval_type` and `match_type`.

    Without the last two, the sub-task in the path decides as in NeMo Skills: letters for mk_niah_medium and _hard, the
    last paragraph for mv_niah_medium, any answer for the qa tasks, and all answers for the others.
    """
    answer, task = listed(row["expected_answer"]), _second_task(row, path)
    facts: dict[str, object] = {"groups": [task] if task else []}
    if row.get("eval_type", "") == "multichoice" or (not row.get("eval_type") and task in _SINGLE_LETTERS):
        rule = "ruler2-choice"
    else:
        part = "part" if task.startswith("qa") else "2steps" if task in _TWO_STEPS else "all"
        match = str(row.get("match_type") or part)
        if match not in ("all", "part", "2steps"):
            raise TaskError(f'match_type="{match}" must be all, part or 2steps')
        rule, facts["match"] = "ruler2-soft", match
    context, question = divided(field_text(row, "question"))
    return [Item(Text(context, question, between=""), answer, rule, facts, _budget(answer, rule), "expected_answer")]


def divided(body: str) -> tuple[str, str]:
    """Divide an input before the line break that its last paragraph follows; without one, all of it is the context."""
    cut = body.rstrip().rfind("\n")
    return (body[:cut], body[cut:]) if cut > 0 else (body, "")


def _second_task(row: Row, path: str) -> str:
    found = _SECOND.findall(f"{path} {row.get('task') or ''}")
    return "_".join(found[-1]) if found else ""


def _budget(answer: object, rule: str) -> int:
    """Return the tokens to generate; the release allows 16,384, which only a chain of thought needs."""
    return min(_SECOND_TOKENS, 1024) if rule == "ruler2-choice" else 0


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
