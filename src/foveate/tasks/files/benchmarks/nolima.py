"""NoLiMa: Long-Context Evaluation Beyond Literal Matching (2025), arXiv 2502.05167. A needle set and its books.

The needle set is NoLiMa's JSON file. The books are text files in `haystack/rand_shuffle` beside the set's folder, in
`haystack` beside the file, or beside the file itself. Each needle stands between two lines of a book, at one of 26
depths, as in the release (adobe-research/NoLiMa, data/book_haystack.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from foveate.core import validate
from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.tokens import CHARACTERS, Tokens
from foveate.tasks.files import records
from foveate.tasks.files.parts import text

_FIELDS = {"needle", "questions", "tests"}
_FOLDERS = ("../haystack/rand_shuffle", "../haystack", "haystack/rand_shuffle", "haystack", ".")
_DEPTHS, _BASE_SEED, _NEW_TOKENS = 26, 42, 192
#: Foveate's own words, for needle sets without a template of their own.
_TEMPLATE = (
    "Here is a part of a book.\n\n{haystack}\n\nAnswer in a few words, by what the book says or what follows from it."
    "\n\nQuestion: {question}\n\nAnswer:"
)


@dataclass(frozen=True)
class _Test:
    """One question about one needle."""

    name: str
    seed: int
    needle: str
    question: str
    gold: tuple[str, ...]
    characters: tuple[str, ...]
    template: str


@dataclass(frozen=True)
class NoLiMa(Task):
    """Questions about a needle that shares no words with them.

    A small `count` is a random choice of all pairs of book, question and depth. The score is NoLiMa's `contains`. The
    instructions are those of the needle set; the release's default ones are not in its data, and are replaced by
    Foveate's own. Needles with distractors are refused.

    Args:
        path: the needle set.
        length: tokens of the book in each prompt.
        count: how many examples.
        seed: the seed of the choice; the names in the needles have the release's own seeds.
        tokens: the tokens that `length` counts.
        template: the prompt, with `{haystack}` and `{question}`; None takes the needle set's.
    """

    path: Path
    length: int = 1000
    count: int = 20
    seed: int = 0
    tokens: Tokens = field(default=CHARACTERS, compare=False)
    template: str | None = None

    def __post_init__(self) -> None:
        validate.at_least("length", self.length, 100)
        validate.at_least("count", self.count, 1)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metric(self) -> str:
        return "nolima"

    def sized(self, tokens: Tokens) -> Self:
        return replace(self, tokens=tokens)

    def examples(self) -> list[Example]:
        tests, books = list(self._tests()), self._books
        if not tests:
            raise TaskError(f"task={str(self.path)!r} holds no questions; it must hold at least one with a test")
        total = len(books) * len(tests) * _DEPTHS
        chosen = sorted(random.Random(self.seed).sample(range(total), min(self.count, total)))
        found = []
        for index in chosen:
            pair, depth = divmod(index, _DEPTHS)
            book, test = divmod(pair, len(tests))
            found.append(self._example(tests[test], book, depth))
        return found

    def _example(self, test: _Test, book: int, depth: int) -> Example:
        needle, question, gold = test.needle, test.question, test.gold
        if "{CHAR}" in needle:
            draw = np.random.RandomState(test.seed + book)  # the release draws a name for each depth, in order
            name = [str(draw.choice(list(test.characters))) for _ in range(depth + 1)][-1]
            needle, question, gold = needle.replace("{CHAR}", name), question.replace("{CHAR}", name), (name,)
        placed = self._placed(book, needle, depth / (_DEPTHS - 1))
        before, after = test.template.split("{haystack}", 1)
        prompt, end = before + placed + after.replace("{question}", question), len(before) + len(placed)
        spans = {"context": (0, end), "question": (end, len(prompt))}
        at = prompt.find(needle)
        return Example(
            prompt, f" {gold[0]}", {**spans, "needle": (at, at + len(needle))}, gold, rule="nolima",
            facts={"match": "contains", "groups": [test.name]}, new_tokens=_NEW_TOKENS,
        )  # fmt: skip

    def _placed(self, book: int, needle: str, depth: float) -> str:
        """Put the needle after the first line break that lies deep enough, in `length` tokens of a book."""
        ids, breaks = self._encoded[book]
        cut = next((at for at in breaks if at / (self.length + 1) >= depth), None)
        start = 0 if cut is None else cut - round(self.length * depth)
        if cut is None or start + self.length > len(ids):
            raise TaskError(
                f"length={self.length} needs a longer book than {self._books[book].name}: {len(ids)} tokens"
            )
        before = self.tokens.decode(ids[start : cut + 1])
        before = before[: max(before.rfind("\n"), 0)]
        return f"{before} {needle}\n{self.tokens.decode(ids[cut + 1 : start + self.length])}"

    @cached_property
    def _encoded(self) -> list[tuple[list[int], list[int]]]:
        """Return each book's ids, and the places of its line breaks."""
        found = []
        for book in self._books:
            ids = self.tokens.encode(book.read_text("utf-8"))
            found.append((ids, [0, *(at for at, token in enumerate(ids) if "\n" in self.tokens.decode([token]))]))
        return found

    @cached_property
    def _books(self) -> list[Path]:
        for folder in _FOLDERS:
            books = sorted((self.path.parent / folder).glob("*.txt"))
            if books:
                return books
        raise TaskError(
            f"task={str(self.path)!r} needs NoLiMa's books, as .txt files in {_FOLDERS[0]} beside its folder"
        )

    def _tests(self) -> Iterator[_Test]:
        for place, row in records.read(self.path):
            where = f"task={str(self.path)!r} {place}"
            if not isinstance(row, dict) or not row.keys() >= _FIELDS:
                raise TaskError(f"{where} must have {', '.join(sorted(_FIELDS))}")
            if row.get("distractors"):
                raise TaskError(f"{where} has distractors, which are not supported")
            yield from _tests_of(row, where, self.template)


def is_needle_set(path: Path) -> bool:
    """Return True if a file's first row is a needle of NoLiMa."""
    if records.kind(path) != ".json" or not path.is_file():
        return False
    first = next(records.read(path), (None, None))[1]
    return isinstance(first, dict) and first.keys() >= _FIELDS


def _tests_of(row: dict[str, Any], where: str, template: str | None) -> Iterator[_Test]:
    name = str(row.get("id", ""))
    seed = _BASE_SEED + (int(name[:4]) if name[:4].isdigit() else 0)
    template = template or text(row.get("task_template") or _TEMPLATE, f"{where}: task_template")
    if "{haystack}" not in template or "{question}" not in template:
        raise TaskError(f"{where}: the template must hold {{haystack}} and {{question}}")
    for part in ("questions", "tests"):
        if not isinstance(row[part], dict):
            raise TaskError(f"{where}: {part} must be an object; got {row[part]!r:.40}")
    for key, test in row["tests"].items():
        if not isinstance(test, dict) or not isinstance(test.get("input_args"), list):
            raise TaskError(f"{where}: tests: {key} must be an object with a list input_args; got {test!r:.40}")
    characters = _texts(row, "character_set", where)
    for kind, asked in row["questions"].items():
        for key, test in row["tests"].items():
            needle, question = text(row["needle"], f"{where}: needle"), text(asked, f"{where}: questions: {kind}")
            for number, word in enumerate(_texts(test, "input_args", f"{where}: tests: {key}"), 1):
                question, needle = (each.replace(f"{{{number}}}", word) for each in (question, needle))
            drawn, gold = "{CHAR}" in needle, _texts(test, "gold_answers", f"{where}: tests: {key}")
            if not (characters if drawn else gold):
                needed = "character_set" if drawn else "gold_answers"
                raise TaskError(f"{where}: tests: {key} must have {needed} for its needle")
            yield _Test(f"{name} {key} {kind}", seed, needle, question, gold, characters, template)


def _texts(holder: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = holder.get(name) or []
    if not isinstance(values, list):
        raise TaskError(f"{where}: {name} must be a list; got {values!r:.40}")
    return tuple(text(value, f"{where}: {name}") for value in values)
