"""The docstring and options of a system, read from its source with `ast`, so that nothing is imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from foveate.core.errors import CatalogError

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Card:
    """The docstring of a class or function, and its options as in source: `keep: int = 512`."""

    doc: str
    options: list[str]


def read_card(target: str) -> Card:
    """Read the card of "module:Name"; the module must be one of Foveate's and define the name itself."""
    module, _, name = target.partition(":")
    node = _find(module, name)
    if node is None:
        raise CatalogError(f'object="{target}" must be defined in {module}; its source has no {name}')
    return Card(ast.get_docstring(node) or "", list(_options(module, node).values()))


Definition = ast.ClassDef | ast.FunctionDef


def _find(module: str, name: str) -> Definition | None:
    body = _parse(module).body
    return next((node for node in body if isinstance(node, Definition) and node.name == name), None)


def _parse(module: str) -> ast.Module:
    base = _PACKAGE.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text("utf-8"))
    raise CatalogError(f"module={module!r} must be a module of foveate; its source was not found")


def _options(module: str, node: Definition) -> dict[str, str]:
    """Return options by name: the arguments of `__init__`, or a dataclass's fields after its inherited ones."""
    if isinstance(node, ast.FunctionDef):
        return _arguments(node)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item)
    options: dict[str, str] = {}
    for base in node.bases:
        options |= _inherited(module, base)
    return options | _fields(node)


def _inherited(module: str, base: ast.expr) -> dict[str, str]:
    """Return the options of a base class of Foveate's; other base classes give none."""
    if isinstance(base, ast.Subscript):
        base = base.value
    if not isinstance(base, ast.Name):
        return {}
    home, name = module, base.id
    for node in _parse(module).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foveate."):
            for alias in node.names:
                if (alias.asname or alias.name) == base.id:
                    home, name = str(node.module), alias.name
    found = _find(home, name)
    return _options(home, found) if found is not None else {}


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Return a dataclass's own fields; annotations of other classes are not options."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return {}
    found = {}
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        name, kind = item.target.id, ast.unparse(item.annotation)
        if not name.startswith("_") and "ClassVar" not in kind:
            found[name] = _written(name, kind, _default(item.value))
    return found


def _default(value: ast.expr | None) -> str | None:
    """Return a field's default as source; `field(default=3)` gives 3, `field(default_factory=list)` gives list()."""
    if value is None:
        return None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        return given.get("default") or (f"{given['default_factory']}()" if "default_factory" in given else None)
    return ast.unparse(value)


def _arguments(node: ast.FunctionDef) -> dict[str, str]:
    """Return the arguments of a function, without `self`, `*args` and `**kwargs`."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    found = {}
    for arg, value in zip([*plain, *args.kwonlyargs], [*defaults, *args.kw_defaults], strict=True):
        if arg.arg != "self":
            kind = ast.unparse(arg.annotation) if arg.annotation else ""
            found[arg.arg] = _written(arg.arg, kind, ast.unparse(value) if value else None)
    return found


def _written(name: str, kind: str, default: str | None) -> str:
    typed = f"{name}: {kind}" if kind else name
    return typed if default is None else f"{typed} = {default}"
