"""Rules that score a model's answer beside the accepted ones, each in 0..1.

No rule takes a part of a word or of a number for the whole: `12` is not said by `123456`, `1.25` or `12th`. Texts are
compared in Unicode's composed form, with blanks at either end left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from foveate.core.errors import OptionError, TaskError, unknown

Rule = Callable[[str, tuple[str, ...]], float]

#: Measured from the model's probabilities and not from its words: the mean next-token loss of the answer.
LOSS = "loss"
#: Scripts that write words without blanks between them: there, a word may begin and end anywhere.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")
_NUMBER = re.compile(r"(?<![\w.,])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)|[-+−]?\d+(?:\.\d+)?")


def begins(output: str, answers: tuple[str, ...]) -> float:
    """1.0 where the output begins with an accepted answer."""
    said = _plain(output)
    return float(any(said.startswith(answer) and _ends(said, len(answer)) for answer in map(_plain, answers)))


def exact(output: str, answers: tuple[str, ...]) -> float:
    """1.0 where the output's first line is an accepted answer, or all of the output where that answer has several."""
    said = _plain(output)
    return float(any(said == answer or said.split("\n")[0].rstrip() == answer for answer in map(_plain, answers)))


def contains(output: str, answers: tuple[str, ...]) -> float:
    """1.0 where an accepted answer stands somewhere in the output, in capitals or not."""
    return float(any(_stands_in(answer, output) for answer in answers))


def contains_all(output: str, answers: tuple[str, ...]) -> float:
    """The share of the answers that stand somewhere in the output, for tasks that ask for several things at once."""
    return sum(_stands_in(answer, output) for answer in answers) / len(answers)


def first_number(output: str, answers: tuple[str, ...]) -> float:
    """1.0 where the first number of the output is that of an accepted answer: 1,234.0 is 1234."""
    said = number(output)
    return float(said is not None and any(said == number(answer) for answer in answers))


def rouge(output: str, answers: tuple[str, ...]) -> float:
    """The F-measure of ROUGE-L to the nearest accepted answer (by the package rouge-score, in any script)."""
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
    """Refuse a score by an unknown name, and one that these answers cannot have."""
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
                    f'score="first-number" needs a number in each answer; example {index} has {accepted[0]!r}'
                )


def number(text: str) -> float | None:
    """The first number in a text; None where there is none."""
    found = _NUMBER.search(text)
    return None if found is None else float(found[0].replace(",", "").replace("−", "-"))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _stands_in(answer: str, output: str) -> bool:
    wanted, said = _plain(answer).casefold(), _plain(output).casefold()
    at = said.find(wanted) if wanted else -1
    while at >= 0:
        if _begins(said, at) and _ends(said, at + len(wanted)):
            return True
        at = said.find(wanted, at + 1)
    return False


def _begins(text: str, at: int) -> bool:
    """Whether a word or number may begin at this place."""
    if at == 0 or at == len(text):
        return True
    if text[at].isdigit() and re.search(r"(\d[.,]|(?<![\w)\]])[-−])$", text[max(0, at - 3) : at]):
        return False
    return not _joined(text[at - 1], text[at])


def _ends(text: str, at: int) -> bool:
    """Whether a word or number may end before this place."""
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
    """Lower-case words; where a script writes without blanks, each character is one."""

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
