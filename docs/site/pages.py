"""The text of the site's generated pages: one for each system, one for the public names of each room."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

from foveate.cli.card import read_card
from foveate.cli.search import needs_of
from foveate.core import catalog
from foveate.core.catalog_rows import System
from foveate.core.cite import cite
from foveate.core.public import PACKAGES

ROOT = Path(__file__).parent.parent.parent

#: What a room holds, in the order of the site.
ROOMS = {
    "ops": "Operators, `q, k, v -> out`.",
    "ops.functional": "Pure functions that operators share.",
    "nn": "Layers, `(B, N, C) -> (B, N, C)`.",
    "models": "Whole networks.",
    "host": "Methods on pretrained models: the seam and what runs it.",
    "kv": "Cache policies.",
    "steer": "Methods that change what a model attends to.",
    "lens": "Readers of attention.",
    "train": "Training, losses, initial weights, distillation.",
    "tasks": "Examples and scores.",
    "gaze": "Human gaze: scanpaths, saliency and their measures.",
    "studies": "A theorem or a prediction, shown.",
    "bench": "Measurements.",
    "report": "Tables and figures of what was measured.",
    "core": "Masks, selections, engines, the catalogue and the float64 oracle.",
}


# -- systems -----------------------------------------------------------------------------------------------------------


def rooms() -> dict[str, list[System]]:
    """Return the systems by room, in the order of the site."""
    found = catalog.grouped(catalog.systems(), "room")
    return {room: found[room] for room in sorted(found, key=lambda room: [*ROOMS, room].index(room))}


def systems_page() -> str:
    lines = [
        "# Systems",
        "",
        "One page for each published system. The search above takes a need in plain words, such as *long context",
        'without retraining*; so does `foveate systems --search "..."`. [What each can do](../systems.md) is a table.',
    ]
    for room, rows in rooms().items():
        lines += [
            "",
            f"## {room}",
            "",
            ROOMS.get(room, ""),
            "",
            "| system | year | paper | answers |",
            "|---|---|---|---|",
        ]
        for row in rows:
            answers = ", ".join(need.name for need in needs_of(row))
            lines.append(f"| [{row.key}]({row.key}.md) | {row.year} | {_cell(row.title)} | {answers} |")
    return "\n".join(lines) + "\n"


def system_page(row: System) -> str:
    name = row.object.partition(":")[2]
    facts = {
        "paper": f"[{row.title}]({row.url})" if row.url else row.title,
        "authors": ", ".join(row.authors),
        "year": str(row.year),
        "public name": f"[`foveate.{row.room}.{name}`](../api/{row.room}.md#{_anchor(row.object)})",
        "tags": ", ".join(row.tags),
        "test": f"[{row.test}](../../{row.test})",
    }
    facts |= {fact.replace("_", " "): _said(value) for fact, value in catalog.capabilities(row.key).items()}
    facts |= {category: ", ".join(getattr(row.taxonomy, category)) for category in catalog.CATEGORIES}
    needs = needs_of(row)
    tags = dict.fromkeys((*row.tags, *(need.name for need in needs)))  # the site's search looks there first
    lines = ["---", f"title: {row.key}", f"tags: {json.dumps([*tags])}", "---", ""]
    lines += [f"# {row.key}", "", f"**{row.title}** ({row.year})"]
    if needs:
        lines += ["", f"Answers: {', '.join(need.name for need in needs)}.", "", '??? note "In other words"', ""]
        lines += [f"    - {need.name}: {', '.join(need.phrases)}" for need in needs]
    lines += ["", "| | |", "|---|---|", *(f"| {fact} | {_cell(value)} |" for fact, value in facts.items() if value)]
    if row.example:
        lines += ["", "## Example", "", "```python", row.example.strip(), "```"]
    card = read_card(row.object)
    lines += ["", "## What it does", "", _prose(card.doc)]
    if card.options:
        lines += ["", "## Options", "", "```python", *card.options, "```"]
    if row.parts:
        lines += ["", "## Parts", "", *(f"- {_part(part)}" for part in row.parts)]
    lines += ["", "## Claims", "", *_claims(row.key)]
    lines += ["", "## Cite", "", "```bibtex", str(cite(row.key)).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name} {_said(fact)}" for name, fact in value.items())
    return "" if value is None else str(value)


def _part(target: str) -> str:
    module, _, name = target.partition(":")
    package = _package(module)
    return f"[`foveate.{package}.{name}`](../api/{package}.md#{_anchor(target)})"


def _prose(doc: str) -> str:
    """Return a docstring as Markdown: sections become lists, and indented text keeps its layout."""
    found = []
    for block in re.split(r"\n{2,}", doc):
        head, _, body = block.partition("\n")
        items = re.split(r"\n(?= {4}\S)", "\n" + body)[1:] if body.startswith("    ") else []
        if head.endswith(":") and items and all(re.match(r" {4}[^:\n]+: ", item) for item in items):
            found.append(f"**{head.removesuffix(':')}**\n\n" + "\n".join(f"- {_item(item)}" for item in items))
        elif all(line.startswith(("    ", ">>>", "...")) for line in block.split("\n")):
            found.append(f"```text\n{block}\n```")
        elif "\n    " in block:
            found.append(
                f"{head}\n\n```text\n{body}\n```" if body.startswith("    ") else block.replace("\n    ", "\n")
            )
        else:
            found.append(block)
    return "\n\n".join(found)


def _item(item: str) -> str:
    name, _, text = " ".join(item.split()).partition(": ")
    return f"`{name}`: {text}"


@cache
def _ledger() -> dict[str, list[str]]:
    """Return the lines of the claims' tables by system."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "claims.md").read_text("utf-8").splitlines():
        if match := re.match(r"\| \[?(\w+)\]?(?:\([^|]*\))? \|", line):
            found.setdefault(match[1], []).append(line)
    return found


def _claims(key: str) -> list[str]:
    """Return a system's claims as a table, whose links start one folder further down."""
    rows = _ledger().get(key, [])
    if not rows:
        return ["No line in the [ledger](../claims.md): its test holds properties only."]
    lines = ["Each line is a test ([ledger](../claims.md)).", ""]
    lines += ["| claim | ours | baseline | better | seed | test |", "|---|--:|--:|---|--:|---|"]
    return [*lines, *(f"| {row.split(' | ', 1)[1]}".replace("](../tests/", "](../../tests/") for row in rows)]


# -- public names ------------------------------------------------------------------------------------------------------


def packages() -> list[str]:
    return sorted(PACKAGES, key=lambda package: [*ROOMS, package].index(package))


def _package(module: str) -> str:
    room = module.split(".")[1]
    return "ops.functional" if module.startswith("foveate.ops.functional") else room


def _anchor(target: str) -> str:
    return target.replace(":", ".")


def api_index() -> str:
    lines = [
        "# API",
        "",
        "Public names are `foveate.<room>.Name`; module paths are private.",
        "",
        "| | | names |",
        "|---|---|--:|",
    ]
    lines.append(f"| [foveate](foveate.md) | What most programs need. | {len(_front())} |")
    for package in packages():
        names = catalog.public_names(package)
        lines.append(f"| [foveate.{package}]({package}.md) | {ROOMS.get(package, '')} | {len(names)} |")
    return "\n".join(lines) + "\n"


def _front() -> dict[str, str]:
    """Return the names of `foveate` itself, each with its module."""
    import foveate

    return dict(foveate._HOME)


def front_page() -> str:
    """Return the page of `foveate`'s own names; names that a room publishes as well link to that room's page."""
    homes = {
        (name, module): package for package in packages() for name, module in catalog.public_names(package).items()
    }
    lines = [
        "# foveate",
        "",
        "The names of `import foveate`. It imports nothing heavy: each is fetched when it is first touched.",
    ]
    links, blocks = [], []
    for name, module in _front().items():
        if package := homes.get((name, module)):
            links.append(f"- [`foveate.{name}`]({package}.md#{module}.{name})")
        else:
            blocks += ["", *_block("foveate", module, name)]
    return "\n".join([*lines, "", *links, *blocks]) + "\n"


#: A need is answered by the pages of systems; a name is found here all the same.
_NAMES_HEAD = ["---", "search:", "  boost: 0.5", "---", ""]


def api_page(package: str) -> str:
    lines = [*_NAMES_HEAD, f"# foveate.{package}", "", ROOMS.get(package, "")]
    for name, module in catalog.public_names(package).items():
        lines += ["", *_block(f"foveate.{package}", module, name)]
    return "\n".join(lines) + "\n"


def _block(package: str, module: str, name: str) -> list[str]:
    lines = [f"::: {module}.{name}", "    options:", f"      heading: {package}.{name}", f"      toc_label: {name}"]
    if name in _unpacked(module):  # mkdocstrings does not see a name that is assigned beside others
        lines = [f"## {package}.{name} {{ #{module}.{name} }}", "", "A constant."]
    if row := _systems_of().get(f"{module}:{name}"):
        lines += ["", f"System: [{row}](../system/{row}.md)"]
    return lines


@cache
def _unpacked(module: str) -> set[str]:
    """Return the constants of a module that are assigned several at a time."""
    path = ROOT / "src" / Path(*module.split("."))
    text = next(file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()).read_text("utf-8")
    targets = [target for node in ast.parse(text).body if isinstance(node, ast.Assign) for target in node.targets]
    return {
        name.id
        for target in targets
        if isinstance(target, ast.Tuple)
        for name in target.elts
        if isinstance(name, ast.Name)
    }


@cache
def _systems_of() -> dict[str, str]:
    return {target: row.key for row in catalog.systems() for target in (*row.parts, row.object)}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
