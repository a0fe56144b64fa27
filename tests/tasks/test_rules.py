"""The benchmarks' own scoring rules, with the traps of each: values were computed with the benchmarks' own packages."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest

from foveate.core.errors import OptionError, UnknownKey
from foveate.tasks.base.task import Example
from foveate.tasks.rules import registry
from foveate.tasks.rules.registry import RULES
from foveate.tasks.rules.words import edit_distance
from foveate.tasks.text.needle import Needle

CLASSES = {"classes": ["Length", "Person", "Other length", "Time"]}


def score(rule: str, output: str, answers: str | tuple[str, ...], **facts: Any) -> float:
    return RULES[rule](output, (answers,) if isinstance(answers, str) else answers, facts)


@pytest.mark.parametrize(("rule", "output", "answers", "facts", "expected"), [
    # RULER: any case, inside longer numbers, control characters become line breaks
    ("ruler-all", "It is 123456.", ("123", "456"), {}, 1), ("ruler-all", "ANN", ("Ann", "Bob"), {}, 0.5),
    ("ruler-all", "12\x0034", ("1234",), {}, 0), ("ruler-all", "12\x0034", ("1234",), {"controls": ""}, 1),
    ("ruler-all", "12\n34", ("1234",), {"controls": ""}, 1), ("ruler-all", "x", ("x", "x"), {}, 1),
    ("ruler-any", "bob", ("Ann", "Bob"), {}, 1), ("ruler-any", "", ("Ann",), {}, 0),
    # RULER 2: substring, else 1 - word error rate
    ("ruler2-soft", "how far is it", ("How far is it?",), {}, 0.75),
    ("ruler2-soft", "so: How far is it?", ("How far is it?",), {}, 1),
    ("ruler2-soft", "one two three four five six seven", ("a b",), {}, 0),
    ("ruler2-soft", "a b", ("a b", "c d"), {"match": "all"}, 0.5),
    ("ruler2-soft", "a b", ("a b", "c d"), {"match": "part"}, 1),
    ("ruler2-soft", "first a b\n\nlast c d", ("a b",), {"match": "2steps"}, 0),
    ("ruler2-soft", "Document 3:\nold a b\n\nnew", ("a b",), {"match": "part"}, 0),
    ("ruler2-soft", "Document 3:\nold a b\n\nnew", ("a b",), {"match": "all"}, 1),
    ("ruler2-choice", r"so \boxed{C}", ("C",), {}, 1), ("ruler2-choice", r"\boxed{A} then \boxed{b}", ("B",), {}, 1),
    ("ruler2-choice", r"\boxed{\text{B}}", ("B",), {}, 1), ("ruler2-choice", "B", ("B",), {}, 0),
    ("ruler2-choice", "**Answer:** C", ("C",), {}, 1), ("ruler2-choice", "Answer: Cat", ("C",), {}, 0),
    ("ruler2-choice", "The final answer is D\nbye", ("D",), {}, 1), ("ruler2-choice", r"\boxed{ج}", ("C",), {}, 1),
    ("ruler2-choice", r"\boxed{C", ("C",), {}, 0),
    # LongBench
    ("longbench-qa", "The Anna!", ("Bob", "anna"), {}, 1), ("longbench-qa", "Anna and Bob", ("Anna",), {}, 0.5),
    ("longbench-qa", "an", ("a",), {}, 0),
    ("longbench-qa", "\n\nAnna\nBob Carl", ("Anna",), {"dataset": "triviaqa"}, 1),
    ("longbench-qa", "\n\nAnna\nBob Carl", ("Anna",), {"dataset": "hotpotqa"}, 0.5),
    ("longbench-classes", "Length", ("Length",), CLASSES, 1), ("longbench-classes", "length", ("Length",), CLASSES, 0),
    ("longbench-classes", "Length or Person", ("Length",), CLASSES, 0.5),
    ("longbench-classes", "Length\nPerson", ("Length",), {**CLASSES, "dataset": "trec"}, 1),
    ("longbench-classes", "Person", ("Length",), CLASSES, 0), ("longbench-classes", "", ("Length",), CLASSES, 0),
    # a class inside the answer's name goes, but the class after it is skipped
    ("longbench-classes", "a b c", ("a b c",), {"classes": ["a", "a b c"]}, 1),
    ("longbench-classes", "a b c", ("a b c",), {"classes": ["a", "b", "a b c"]}, 0.5),
    ("longbench-retrieval", "Paragraph 3, or 13", ("Paragraph 3",), {}, 0.5),
    ("longbench-retrieval", "段落3", ("段落3",), {}, 1), ("longbench-retrieval", "none", ("Paragraph 3",), {}, 0),
    ("longbench-count", "7 or 8", ("7",), {}, 0.5), ("longbench-count", "17", ("7",), {}, 0),
    ("longbench-code", "# note\n`x`\n    return x\nmore", ("    return x",), {}, 1),
    ("longbench-code", "\n\nreturn y", ("return x",), {}, 0.88), ("longbench-code", "// only", ("return x",), {}, 0),
    # LongBench 2
    ("longbench2-choice", "The correct answer is (B)", ("B",), {}, 1),
    ("longbench2-choice", "**The correct answer is B**", ("B",), {}, 1),
    ("longbench2-choice", "The correct answer is A. No: The correct answer is (B)", ("B",), {}, 1),
    ("longbench2-choice", "the correct answer is (B)", ("B",), {}, 0), ("longbench2-choice", "B", ("B",), {}, 0),
    ("longbench2-choice", "B) since", ("B",), {"prefix": "The correct answer is ("}, 1),
    ("longbench2-choice", "?", ("B",), {"no_answer": 0.25}, 0.25),
    # SCBench
    ("scbench-part", "is v1.", ("v1",), {}, 1), ("scbench-part", "is V1.", ("v1",), {}, 0),
    ("scbench-part-any-case", "is ann.", ("Ann",), {}, 1),
    ("scbench-share", "a", ("A", "B", "C"), {}, 0.33), ("scbench-share", "abc", ("A", "B", "C"), {}, 1),
    ("scbench-characters", "东京。", ("东京",), {}, 1), ("scbench-characters", "东京市", ("东京",), {}, 0.8),
    ("scbench-characters", "x", ("东京",), {}, 0),
    ("scbench-number", "it is 7.9", ("7",), {}, 1), ("scbench-number", "7.9", ("7.9",), {}, 1),
    ("scbench-number", "8 then 7", ("7",), {}, 0), ("scbench-number", "none", ("7",), {}, 0),
    ("scbench-number", "7 then 8", ("7",), {}, 1), ("scbench-number", "4.50", ("4.5",), {}, 1),
    ("scbench-number", "4", ("4.5",), {}, 0), ("scbench-number", "7", ("7.0",), {}, 1),
    ("scbench-number", "7.9", ("8",), {}, 0), ("scbench-number", "7.9", ("7.0",), {}, 0),
    ("scbench-number", "07", (" 7 ",), {}, 1), ("scbench-number", "x7y", ("7",), {}, 1),
    ("scbench-number", "1,234", ("1234",), {}, 0), ("scbench-number", ".5", ("0.5",), {}, 0),
    ("scbench-number", "-7", ("7",), {}, 1), ("scbench-number", "-7", ("-7",), {}, 0),  # the release reads no sign
    ("scbench-number", "9" * 400, ("7",), {}, 0), ("scbench-number", "8", ("7", "8"), {}, 0),
    ("scbench-passkey", "key 123 456", ("123",), {}, 1), ("scbench-passkey", "key 456", ("123",), {}, 0),
    ("scbench-choice", "B. a fox", ("B", "a fox"), {}, 1), ("scbench-choice", "a fox", ("B", "a fox"), {}, 1),
    ("scbench-choice", "Because", ("B", "a fox"), {}, 1), ("scbench-choice", "Candy", ("B", "a fox"), {}, 0),
    ("scbench-choice", "so the answer is: B", ("B", "a fox"), {}, 1),
    ("scbench-choice", "the answer is:B", ("B",), {}, 0),
    ("scbench-choice", "so the answer is B", ("B", "a fox"), {}, 1), ("scbench-choice", "", ("B",), {}, 0),
    ("scbench-choice", "maybe C or B", ("B",), {}, 0), ("scbench-choice", "answer is", ("B",), {}, 0),
    # NoLiMa, MRCR, BABILong
    ("nolima", "It was Yuki.", ("Yuki",), {}, 1), ("nolima", "It was yuki.", ("Yuki",), {}, 0),
    ("nolima", " Yuki ", ("Yuki",), {"match": "EM"}, 1), ("nolima", "Yuki!", ("Yuki",), {"match": "EM"}, 0),
    ("nolima", "Yuki\nno", ("Yuki",), {"match": "lastline_contains"}, 0),
    ("nolima", "no\nYuki", ("Yuki",), {"match": "lastline_EM"}, 1),
    ("mrcr", "Xy12Rain, rain.", ("Xy12Rain, rain.",), {"prefix": "Xy12"}, 1),
    ("mrcr", "Rain, rain.", ("Xy12Rain, rain.",), {"prefix": "Xy12"}, 0),
    ("mrcr", "Xy12Rain", ("Xy12Rain, rain.",), {"prefix": "Xy12"}, 8 / 15),
    ("mrcr", "So: Xy12Rain, rain.", ("Xy12Rain, rain.",), {"prefix": "Xy12"}, 0),
    ("babilong", "The Office. Not the garden.", ("office",), {"task": "qa1", "question": "Where is Mary?"}, 1),
    ("babilong", "office or garden", ("office",), {"task": "qa1", "question": "Where is Mary?"}, 0),
    ("babilong", "from garden to office", ("office",), {"task": "qa1", "question": "Where after the garden?"}, 1),
    ("babilong", "office\n<example> garden", ("office",), {"task": "qa1", "question": ""}, 1),
    ("babilong", "one", ("one",), {"task": "qa7", "question": "How many?"}, 1),
    ("babilong", "none", ("none",), {"task": "qa7", "question": "How many?"}, 0),
    ("babilong", "milk and apple", ("apple,milk",), {"task": "qa8", "question": ""}, 1),
    ("babilong", "apple", ("apple,milk",), {"task": "qa8", "question": ""}, 0),
    ("babilong", "e,s", ("e,s",), {"task": "qa19", "question": ""}, 1),
    # Foveate's own
    ("trace", "Result: 7\nResult: 12", ("12",), {}, 1), ("trace", "12", ("12",), {}, 0), ("trace", "", ("12",), {}, 0),
    ("trace", "Result: -3", ("3",), {}, 0),
])  # fmt: skip
def test_each_rule_by_example(
    rule: str, output: str, answers: tuple[str, ...], facts: dict[str, Any], expected: float
) -> None:
    assert score(rule, output, answers, **facts) == pytest.approx(expected)


@pytest.mark.parametrize(("output", "answer", "expected"), [
    ("the cat sat on a mat", "the cat ran. a dog sat", 0.49999999504), ("a a a b", "a b c", 0.7999999952),
    ("cat. dog. cat", "dog cat", 0.9999999950000001), ("", "a", 0.0), (".", "a", 0.0),
])  # fmt: skip
def test_rouge_of_longbench_counts_each_word_once(output: str, answer: str, expected: float) -> None:
    """The expected values are those of the package rouge 1.0.1."""
    assert score("longbench-rouge", output, answer) == pytest.approx(expected, abs=1e-9)


def test_rouge_of_samsum_reads_the_first_line() -> None:
    assert score("longbench-rouge", "\na b\nc d", "a b", dataset="samsum") == pytest.approx(1.0)
    assert score("longbench-rouge", "\na b\nc d", "a b", dataset="qmsum") < 0.9


def test_summaries_are_compared_line_by_line() -> None:
    assert score("scbench-summary", "b c\na", "a\nb c") == pytest.approx(1.0)
    assert score("scbench-summary", "b c a", "a b c") < 1.0


def test_a_function_has_to_be_most_similar_to_the_right_one() -> None:
    functions = {"add": "def add(a, b):\n    return a + b", "show": "def show(x):\n    print(x, x, x)"}
    facts = {"name": "add", "functions": functions, "language": "python"}
    answer = functions["add"]
    assert score("scbench-repository", answer, answer, **facts) == 1.0
    assert score("scbench-repository", f"Here:\n```python\nimport os\n\n{answer}\n```\nDone.", answer, **facts) == 1.0
    assert score("scbench-repository", functions["show"], answer, **facts) == 0.0
    assert score("scbench-repository", "def add(a, b):\n    total = 0\n    return total", answer, **facts) == 0.0
    assert score("scbench-repository", "```python\n(not code\n```", answer, **facts) == 0.0


def test_ndcg_rewards_the_best_first() -> None:
    grades = {"11": 2, "12": 1, "13": 0}
    best = 3 + 1 / math.log2(3)
    assert score("ndcg", " 11 > 12 > 13", "", grades=grades) == pytest.approx(1.0)
    assert score("ndcg", "12, 11", "", grades=grades) == pytest.approx((1 + 3 / math.log2(3)) / best)
    assert score("ndcg", "11 11 99 12", "", grades=grades) == pytest.approx(1.0)
    assert score("ndcg", "", "", grades=grades) == 0.0


@pytest.mark.parametrize(("left", "right", "distance"), [("kitten", "sitting", 3), ("", "ab", 2), ("ab", "ab", 0)])
def test_edit_distance(left: str, right: str, distance: int) -> None:
    assert edit_distance(left, right) == edit_distance(right, left) == distance


def test_an_example_is_scored_by_its_own_rule() -> None:
    example = Example("p", "12", rule="ruler-all")
    assert Needle().score(example, "it is 123456") == 1.0 and Needle().score(Example("p", "12"), "it is 123456") == 0.0


def test_names_of_rules_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.check(["ruler-all", "scbench-summary"])
    assert registry.common(["a", "a"]) == "a" and registry.common(["a", "b"]) == registry.SEVERAL
    with pytest.raises(UnknownKey, match='did you mean "ruler-all"'):
        registry.check(["ruler_all"])
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith(("rouge_score", "nltk", "jieba")):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    for rule, package in (
        ("scbench-summary", "rouge-score"),
        ("scbench-repository", "nltk"),
        ("longbench-qa-zh", "jieba"),
    ):
        with pytest.raises(OptionError, match=f"need the package {package}: pip install"):
            registry.check([rule])


def test_chinese_words_come_from_jieba() -> None:
    pytest.importorskip("jieba")
    assert score("longbench-qa-zh", "他住在北京。", "北京") == pytest.approx(2 / 5)
    assert score("longbench-rouge-zh", "他住在北京", "北京") == pytest.approx(0.39999999680000003)
