"""Real English text that ships with CPython, so that every task runs offline.

The reference manual's topics (`pydoc_data.topics`, about 0.45 MB) are split by topic into "train" and "heldout"; the
standard library's docstrings (about 1.6 MB) are added to "train" alone. Topics quote each other, so a paragraph of
"heldout" is removed from "train". The text depends on the CPython version, which is why trained labs record
`digest("train")`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from foveate.core.errors import OptionError

_HELDOUT_ONE_IN = 4
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


def _topics() -> tuple[list[str], list[str]]:
    """Return the manual's paragraphs as (train, heldout); the two share none."""
    from pydoc_data.topics import topics

    held = [key for key in sorted(topics) if zlib.crc32(key.encode()) % _HELDOUT_ONE_IN == 0]
    heldout = [part for key in held for part in _paragraphs(topics[key])]
    seen = set(heldout)
    train = [p for key in sorted(topics) if key not in held for p in _paragraphs(topics[key]) if p not in seen]
    return train, heldout


def _paragraphs(text: str) -> list[str]:
    flat = re.sub(r"[ \t]+", " ", text.encode("ascii", "ignore").decode())
    return [part.strip() for part in re.split(r"\n\s*\n", flat) if part.strip()]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _NOT_LIBRARY & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a template or a deliberately invalid sample: it holds no docstrings to read
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 80:
                    yield doc


@cache
def text(split: str = "heldout") -> str:
    """Return the text of one split ("train" or "heldout"): ASCII, with runs of blanks replaced by one."""
    if split not in ("train", "heldout"):
        raise OptionError(f'split={split!r} must be "train" or "heldout"')
    train, heldout = _topics()
    if split == "heldout":
        return "\n\n".join(heldout)
    return "\n\n".join(train + [part for doc in _docstrings() for part in _paragraphs(doc)])


def digest(split: str) -> str:
    """Return the SHA-256 of a split, so that two machines can check that they train on the same bytes."""
    return hashlib.sha256(text(split).encode()).hexdigest()
