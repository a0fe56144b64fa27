"""The standard library's functions with their documentation, and its source code: text that ships with CPython."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Packages that are read beside the library's single modules.
_PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing",
    "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zipfile",
)  # fmt: skip
_LEFT_OUT = {"antigravity", "this", "__phello__", "test", "tests"}
_SHORTEST, _LONGEST = 60, 2500  # characters of a docstring


@dataclass(frozen=True)
class Function:
    """A documented function or method.

    Args:
        name: with its module and class.
        module: its module.
        signature: its parameters with their defaults, as source.
        summary: the first sentence or line of its documentation.
        body: the rest of its documentation, may be empty.
        parameters: the names of its parameters in order, without `self` and `cls`.
    """

    name: str
    module: str
    signature: str
    summary: str
    body: str
    parameters: tuple[str, ...]

    @property
    def document(self) -> str:
        """Return the documentation as a page shows it."""
        return f"{self.name}({self.signature})\n{self.summary}" + (f"\n{self.body}" if self.body else "")


@cache
def functions() -> tuple[Function, ...]:
    """Return the public functions of the library that have documentation, ordered by name."""
    found: dict[str, Function] = {}
    for module, source in sources():
        for function in _documented(module, ast.parse(source)):
            found.setdefault(function.name, function)
    times = Counter(function.summary for function in found.values())
    return tuple(found[name] for name in sorted(found) if times[found[name].summary] == 1)


@cache
def sources() -> tuple[tuple[str, str], ...]:
    """Return the name and the source of each module, in ASCII and ordered by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*library.glob("*.py"), *(path for name in _PACKAGES for path in (library / name).rglob("*.py"))]
    found = []
    for path in files:
        parts = path.relative_to(library).with_suffix("").parts
        if any((part.startswith("_") and part != "__init__") or part in _LEFT_OUT for part in parts):
            continue
        source = path.read_text("utf-8", "ignore")
        if source.isascii():
            found.append((".".join(parts).removesuffix(".__init__"), source))
    return tuple(sorted(found))


def _documented(module: str, tree: ast.Module) -> Iterator[Function]:
    for outer in tree.body:
        members = outer.body if isinstance(outer, ast.ClassDef) and not outer.name.startswith("_") else [outer]
        prefix = f"{module}.{outer.name}" if isinstance(outer, ast.ClassDef) else module
        for node in members:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                function = _function(node, module, prefix)
                if function is not None:
                    yield function


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, prefix: str) -> Function | None:
    doc = ast.get_docstring(node) or ""
    doc = re.sub(r"[ \t]+", " ", doc)
    if not _SHORTEST <= len(doc) <= _LONGEST or not doc.isascii():
        return None
    first, _, rest = doc.partition("\n\n")
    summary = " ".join(first.split())
    if len(summary) > 200 or not summary[0].isupper():
        return None
    signature = ast.unparse(_plain(node.args))
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    parameters = tuple(name for name in names if name not in ("self", "cls"))
    return Function(f"{prefix}.{node.name}", module, signature, summary, rest.strip(), parameters)


def _plain(arguments: ast.arguments) -> ast.arguments:
    """Remove the annotations of parameters."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return arguments
