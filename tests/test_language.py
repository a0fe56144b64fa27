"""Docstrings open with a sentence or a plain name for the thing, not with a clause that has no head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Words that a question or a clause without a main verb begins with.
HEADLESS = {
    "what", "whether", "where", "which", "how", "when", "who", "whose", "why", "of", "from", "in", "to", "by", "that",
    "if", "as", "for", "with", "on", "at", "until", "because",
}  # fmt: skip


def docstrings(folder: str) -> Iterator[tuple[str, str]]:
    """Every docstring of a folder's files, with its place."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    line = 1 if isinstance(node, ast.Module) else node.lineno
                    yield f"{path.relative_to(ROOT)}:{line}", text


def headless(text: str) -> bool:
    first = text.split(maxsplit=1)[0].strip("`\"'(,.:;").lower()
    return first in HEADLESS


def test_no_docstring_opens_without_a_head() -> None:
    found = [
        f"{place}: {text.splitlines()[0]}"
        for folder in ("src", "benchmarks", "docs")
        for place, text in docstrings(folder)
        if headless(text)
    ]
    assert not found, "\n".join(found)
