"""Multiple choice: the letter that an output decides for, as LongBench v2, RULER v2 and SCBench read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BRACKETED, _BARE = re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])")
_FINAL = re.compile(r"The final answer is (.+)$", re.MULTILINE)
_LAST_LETTER = re.compile(r"\b[A-Z]\b(?!.*\b[A-Z]\b)", re.DOTALL)
_COLON = re.compile(r"(?i)[\*\_]{0,2}Answer[\*\_]{0,2}\s*:[\s\*\_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")
#: Letters of other scripts that mean A to D.
_OTHER = str.maketrans(
    {
        other: f" {letter}"
        for letters in ("أبجد", "অবডঢ", "ＡＢＣＤ")
        for letter, other in zip("ABCD", letters, strict=True)
    }
)
_SCBENCH_MARKS = re.compile(r"[\n\"'.,?!{}]")
_SCBENCH_PREFIXES = ("answer is:", "answer:", "answer is", "option is")


def longbench2(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 if the output says "The correct answer is (X)", or else the same without brackets, with X right.

    Args:
        output: the model's output.
        answers: the letter.
        facts: "prefix" is the beginning of the answer, which the prompt already holds; "no_answer" is the score of an
            output without a letter, 0.0 by default.
    """
    text = (facts.get("prefix", "") + output).strip().replace("*", "")
    found = _BRACKETED.search(text) or _BARE.search(text)
    return float(facts.get("no_answer", 0.0)) if found is None else float(found[1] in answers)


def boxed(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 if the letter in the last `\\boxed{}` of the output, or its other final answer, is right."""
    return float(boxed_letter(output) == answers[0].strip().upper())


def boxed_letter(text: str) -> str | None:
    """Return the letter of NeMo Skills' multiple choice: a final answer, else a box, else a letter after `Answer:`."""
    finals = _FINAL.findall(text)
    held = finals[-1] if finals else _last_box(text)
    if held is not None:
        held = held.translate(_OTHER).strip()
        if len(held) == 1:
            return held.upper()
        if letters := _LAST_LETTER.findall(held):
            return letters[-1].upper()
    after = _COLON.findall(text)
    return after[-1].upper() if after else None


def _last_box(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, whose braces may be nested."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0 and text[at] == "}":
            return text[start + len("\\boxed{") : at]
    return None


def scbench(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 for a right first letter, else after "answer is" and its like, else for the first A, B, C or D.

    `answers` holds the letter, and the text of the option where the file has it.
    """
    text = output.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = re.sub(" +", " ", _SCBENCH_MARKS.sub(" ", text))
    for prefix in _SCBENCH_PREFIXES:
        at = text.find(prefix)
        if at >= 0:  # one character after the prefix is skipped, whichever it is
            after = text[at + len(prefix) + 1 :]
            return float(bool(after) and any(after.startswith(answer) for answer in answers))
    first = next((word for word in text.split() if word in "ABCD"), None)
    return float(first in answers)
