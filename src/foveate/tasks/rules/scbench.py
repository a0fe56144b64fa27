"""SCBench's rules (microsoft/MInference, scbench/compute_scores.py and repo_qa_utils.py), one per set."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from foveate.core.errors import OptionError
from foveate.tasks.rules.words import f1, unspaced

Facts = Mapping[str, Any]
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_BLOCK = re.compile(r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", re.DOTALL | re.MULTILINE)
_SIMILAR = 0.8  # RepoQA's threshold


def part(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if the output contains an answer, in the same case: kv, prefix_suffix."""
    return float(any(answer in output for answer in answers))


def part_any_case(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if the output contains an answer, in any case: qa_eng, many_shot.

    The release gives many_shot's answer as text to a rule for lists, and so accepts any of its letters. That is not
    kept.
    """
    text = output.strip().upper()
    return float(any(answer.upper() in text for answer in answers))


def share(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return the share of the answers that the output contains, rounded to hundredths: vt."""
    text = output.lower()
    return round(sum(answer.lower() in text for answer in answers) / len(answers), 2)


def characters(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return the best F1 of characters, without blanks and punctuation: qa_chn.

    An answer is a whole text. The release walks over the characters of an answer that is not in a list.
    """
    return max(f1(list(unspaced(output)), list(unspaced(answer))) for answer in answers)


def number(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if the first number of the output is the answer; a whole answer ignores decimals: mf."""
    found = _NUMBER.search(output)
    if found is None:
        return 0.0
    whole = re.fullmatch(r"[-+]?\d+", answers[0].strip()) is not None
    value = float(found[0])  # inf for hundreds of digits
    return float(math.isfinite(value) and (int(value) == int(answers[0]) if whole else value == float(answers[0])))


def passkey(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if the first digits of the output are the answer: the needles of summary_with_needles."""
    found = re.search(r"[0-9]+", output)
    return float(found is not None and found[0] == answers[0])


def summary(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return the F-measure of ROUGE-Lsum by the package rouge-score: summary."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise OptionError('summaries of SCBench need the package rouge-score: pip install "foveate[scores]"') from None
    return float(RougeScorer(["rougeLsum"]).score_multi(list(answers), output)["rougeLsum"].fmeasure)


def repository(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if, of a repository's functions, the right one is most similar to the output, by 0.8 or more: repoqa.

    Args:
        output: the model's output; of a code block its first function counts.
        answers: the function.
        facts: "name" of the function; "functions" holds all requested ones of the repository by name.

    The release finds the first function of a block by tree-sitter, in six languages. Here Python is parsed, and of
    other languages the whole block counts, so that text around a function in its block lowers the similarity.
    """
    candidate = _first_function(output.strip(), str(facts.get("language", "python")))
    functions: Mapping[str, str] = facts.get("functions") or {facts.get("name", ""): answers[0]}
    best, name = 0.0, None
    for each, function in functions.items():
        similarity = bleu(candidate, function)
        if similarity > best:
            best, name = similarity, each
    return float(name == facts.get("name", "") and best >= _SIMILAR)


def bleu(candidate: str, reference: str) -> float:
    """Return the BLEU of words with NLTK's fourth smoothing."""
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError:
        raise OptionError('functions of SCBench need the package nltk: pip install "foveate[scores]"') from None
    found, wanted = (re.split(r"\s+", text.strip()) for text in (candidate, reference))
    return float(sentence_bleu([wanted], found, smoothing_function=SmoothingFunction().method4))


def _first_function(output: str, language: str) -> str:
    blocks = _BLOCK.findall(output)
    if not blocks:
        return output
    if language != "python":
        return str(blocks[0])
    for block in blocks:
        try:
            tree = ast.parse(block)
        except (SyntaxError, ValueError):
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        if functions:
            first = min(functions, key=lambda node: node.lineno)
            return ast.get_source_segment(block, first) or str(block)
    return str(blocks[0])
