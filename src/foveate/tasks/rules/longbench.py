"""LongBench's rules (THUDM/LongBench, LongBench/metrics.py and eval.py): the best score over the accepted answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import Any

from foveate.core.errors import OptionError
from foveate.tasks.rules.words import f1, lcs_words, squad_words, unspaced

Facts = Mapping[str, Any]
#: Of these sets only the first line of an output counts.
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_NUMBER = re.compile(r"\d+")


def _best(rule: Callable[[str, str, Facts], float]) -> Callable[[str, tuple[str, ...], Facts], float]:
    def score(output: str, answers: tuple[str, ...], facts: Facts) -> float:
        if facts.get("dataset") in FIRST_LINE:
            output = output.lstrip("\n").split("\n")[0]
        return max(rule(output, answer, facts) for answer in answers)

    score.__doc__ = rule.__doc__
    return score


@_best
def qa(output: str, answer: str, facts: Facts) -> float:
    """Return the F1 of SQuAD's words."""
    return f1(squad_words(output), squad_words(answer))


@_best
def qa_zh(output: str, answer: str, facts: Facts) -> float:
    """Return the F1 of Chinese words, which jieba separates, without punctuation."""
    cut = _jieba()
    words = [[word for each in cut(text) if (word := unspaced(each))] for text in (output, answer)]
    return f1(*words)


@_best
def rouge(output: str, answer: str, facts: Facts) -> float:
    """Return ROUGE-L as the package rouge computes it: over whole texts, with each word counted once."""
    return rouge_l(output, answer)


@_best
def rouge_zh(output: str, answer: str, facts: Facts) -> float:
    """Return ROUGE-L of Chinese words, which jieba separates."""
    cut = _jieba()
    return rouge_l(" ".join(cut(output)), " ".join(cut(answer)))


def rouge_l(output: str, answer: str) -> float:
    """Return the F-measure of the summary-level ROUGE-L of package rouge 1.0: sentences end at each full stop."""
    found, wanted = ([" ".join(part.split()) for part in text.split(".") if part] for text in (output, answer))
    if not found or not wanted:
        return 0.0
    found_words, wanted_words = ([part.split(" ") for part in parts] for parts in (found, wanted))
    shared: set[str] = set()
    for sentence in wanted_words:
        for other in found_words:
            shared |= lcs_words(sentence, other)
    recall = len(shared) / len({word for part in wanted_words for word in part})
    precision = len(shared) / len({word for part in found_words for word in part})
    return 2.0 * (precision * recall) / (precision + recall + 1e-8)


@_best
def classes(output: str, answer: str, facts: Facts) -> float:
    """Return 1 / n if the answer is one of the n classes that the output names, else 0.

    A class whose name is part of the answer's does not count. The release removes such classes from the list that it
    walks through, and so skips the class after each; this is kept.
    """
    named = [name for name in facts.get("classes") or () if name in output]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            named.remove(named[at])
        at += 1
    return 1.0 / len(named) if answer in named else 0.0


@_best
def retrieval(output: str, answer: str, facts: Facts) -> float:
    """Return the share of the output's numbers that are the paragraph's."""
    wanted = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return 0.0 if wanted is None else _share(output, wanted[1])


@_best
def count(output: str, answer: str, facts: Facts) -> float:
    """Return the share of the output's numbers that are the answer."""
    return _share(output, answer)


@_best
def code(output: str, answer: str, facts: Facts) -> float:
    """Return the similarity of the first line without a comment or a backtick; see `code_similarity`."""
    return code_similarity(first_code_line(output), answer)


def first_code_line(output: str) -> str:
    """Return the first line that holds no backtick, `#` or `//`, after leading line breaks."""
    lines = output.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def code_similarity(left: str, right: str) -> float:
    """Return difflib's ratio in whole percent, as fuzzywuzzy without python-Levenshtein has it, over 100."""
    return round(100 * SequenceMatcher(None, left, right).ratio()) / 100


def _share(output: str, wanted: str) -> float:
    numbers = _NUMBER.findall(output)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0


def _jieba() -> Callable[[str], list[str]]:
    try:
        import jieba
    except ImportError:
        raise OptionError('Chinese sets of LongBench need the package jieba: pip install "foveate[scores]"') from None
    jieba.setLogLevel(60)  # it reports its start on stderr
    return lambda text: list(jieba.cut(text, cut_all=False))
