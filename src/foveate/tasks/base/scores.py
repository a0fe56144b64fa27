"""Rules that compare a model's answer with the accepted ones and return a score in 0..1.

No rule accepts a part of a word or number: `12` does not match `123456`, `1.25` or `12th`. Texts are compared in
Unicode's composed form (NFC), without blanks at either end.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from foveate.core.errors import OptionError, TaskError, unknown

Rule = Callable[[str, tuple[str, ...]], float]

#: The mean next-token loss of the answer. It needs the model's probabilities, so that no rule below computes it.
LOSS = "loss"
#: Scripts that write words without blanks between them: there, a word may begin and end anywhere.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")
_NUMBER = re.compile(r"(?<![\w.,])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)|[-+−]?\d+(?:\.\d+)?")


def begins(output: str, answers: tuple[str, ...]) -> float:
    """Return 1.0 if the output begins with an accepted answer."""
    text = _plain(output)
    return float(any(text.startswith(answer) and _ends(text, len(answer)) for answer in map(_plain, answers)))


def exact(output: str, answers: tuple[str, ...]) -> float:
    """Return 1.0 if the output's first line is an accepted answer, or the whole output is one of several lines."""
    text = _plain(output)
    return float(any(text == answer or text.split("\n")[0].rstrip() == answer for answer in map(_plain, answers)))


def contains(output: str, answers: tuple[str, ...]) -> float:
    """Return 1.0 if the output contains an accepted answer; case is ignored."""
    return float(any(_stands_in(answer, output) for answer in answers))


def contains_all(output: str, answers: tuple[str, ...]) -> float:
    """Return the share of the answers that the output contains, for tasks that ask for several things at once."""
    return sum(_stands_in(answer, output) for answer in answers) / len(answers)


def first_number(output: str, answers: tuple[str, ...]) -> float:
    """Return 1.0 if the first number of the output equals that of an accepted answer: 1,234.0 equals 1234."""
    found = number(output)
    return float(found is not None and any(found == number(answer) for answer in answers))


def rouge(output: str, answers: tuple[str, ...]) -> float:
    """Return the F-measure of ROUGE-L to the nearest accepted answer (by the package rouge-score, in any script)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise OptionError('score="rouge" needs the package rouge-score: pip install "foveate[scores]"') from None
    return float(RougeScorer(["rougeL"], tokenizer=_Words()).score_multi(list(answers), output)["rougeL"].fmeasure)


SCORES: dict[str, Rule] = {
    "begins": begins, "exact": exact, "contains": contains, "contains-all": contains_all,
    "first-number": first_number, "rouge": rouge,
}  # fmt: skip


def check(score: str, answers: Iterable[tuple[str, ...]]) -> None:
    """Refuse an unknown score, and a score that is undefined for these answers."""
    if score == LOSS:
        return
    if score not in SCORES:
        raise unknown("score", score, [*SCORES, LOSS])
    if score == "rouge":
        rouge("a", ("a",))
    if score == "first-number":
        for index, accepted in enumerate(answers, 1):
            if all(number(answer) is None for answer in accepted):
                raise TaskError(
                    f'score="first-number" needs a number in every answer; example {index} has {accepted[0]!r}'
                )


def number(text: str) -> float | None:
    """Return the first number in a text, or None."""
    found = _NUMBER.search(text)
    return None if found is None else float(found[0].replace(",", "").replace("−", "-"))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _stands_in(answer: str, output: str) -> bool:
    wanted, text = _plain(answer).casefold(), _plain(output).casefold()
    at = text.find(wanted) if wanted else -1
    while at >= 0:
        if _begins(text, at) and _ends(text, at + len(wanted)):
            return True
        at = text.find(wanted, at + 1)
    return False


def _begins(text: str, at: int) -> bool:
    """Return True if a word or number may begin at position `at`."""
    if at == 0 or at == len(text):
        return True
    if text[at].isdigit() and re.search(r"(\d[.,]|(?<![\w)\]])[-−])$", text[max(0, at - 3) : at]):
        return False
    return not _joined(text[at - 1], text[at])


def _ends(text: str, at: int) -> bool:
    """Return True if a word or number may end before position `at`."""
    if at in (0, len(text)):
        return True
    if text[at - 1].isdigit() and re.match(r"[.,]\d", text[at:]):
        return False
    return not _joined(text[at - 1], text[at])


def _joined(left: str, right: str) -> bool:
    return _in_word(left) and _in_word(right)


def _in_word(char: str) -> bool:
    if not (char.isalnum() or char == "_" or unicodedata.combining(char)):
        return False
    return not unicodedata.name(char, "").startswith(_UNSPACED)


class _Words:
    """A tokenizer for lower-case words; in scripts written without blanks each character is a word."""

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = []
        for word in re.findall(r"\w+", _plain(text).casefold()):
            run = ""
            for char in word:
                if _in_word(char):
                    run += char
                    continue
                found += [run, char] if run else [char]
                run = ""
            found += [run] if run else []
        return found
