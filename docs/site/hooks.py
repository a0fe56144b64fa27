"""The pages of the site that are not files under docs/, made while mkdocs builds.

One page for each system (docstring, row of the catalogue, claims, BibTeX), one for each room's public names, the
tutorials, and the files of the repository that other pages link to, so that every link works without a network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages  # mkdocs puts this folder on the path while it reads a hook
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from foveate.core import catalog

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"

#: Pages that are a file outside docs/.
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

_LINK = re.compile(r"(\]\()(?!\w+:)([^)\s#]+)((?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))")
_FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.DOTALL | re.MULTILINE)


# -- what mkdocs calls -------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each system and each room into the navigation, after the two that list them."""
    assert config.nav is not None
    for entry in config.nav:
        if "Systems" in entry:
            groups = [{room: [f"system/{row.key}.md" for row in rows]} for room, rows in pages.rooms().items()]
            entry["Systems"] = [entry["Systems"], *groups]
        elif "API" in entry:
            entry["API"] = [
                entry["API"],
                {"foveate": "api/foveate.md"},
                *({p: f"api/{p}.md"} for p in pages.packages()),
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made: dict[str, str] = {page: (ROOT / source).read_text("utf-8") for page, source in ELSEWHERE.items()}
    made["system/index.md"], made["api/index.md"] = pages.systems_page(), pages.api_index()
    made |= {f"system/{row.key}.md": pages.system_page(row) for row in catalog.systems()}
    made["api/foveate.md"] = pages.front_page()
    made |= {f"api/{package}.md": pages.api_page(package) for package in pages.packages()}
    made |= {f"notebooks/{path.stem}.md": _notebook(path) for path in sorted(DOCS.glob("notebooks/*.ipynb"))}
    written = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in DOCS.glob("*.md")}
    for page, text in {**made, **written}.items():
        made |= {f"files/{file}.md": _source_page(file) for file in _linked(text, page) if not _page_of(file)}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between the repository's files into links between pages, and give lists the blank line they need."""
    here = page.file.src_uri

    def prose(text: str) -> str:
        return _LINK.sub(lambda link: f"{link[1]}{_target(link[2], here)}{link[3]}", _loose(text))

    return "".join(part if part.lstrip().startswith("```") else prose(part) for part in _FENCE.split(markdown))


# -- links -------------------------------------------------------------------------------------------------------------


def _home(page: str) -> Path:
    """Return the folder that a page's links start from."""
    return (ROOT / ELSEWHERE[page] if page in ELSEWHERE else DOCS / page).parent


def _linked(text: str, page: str) -> set[str]:
    """Return the files of the repository that a page links to, by their paths from its root."""
    found = set()
    for _, target, _ in _LINK.findall(_FENCE.sub("", text)):
        path = Path(os.path.normpath(_home(page) / target))
        if path.is_file() and path.is_relative_to(ROOT):
            found.add(path.relative_to(ROOT).as_posix())
    return found


def _page_of(file: str) -> str | None:
    """Return the page, or the file beside the pages, that shows a file of the repository; None if none does."""
    elsewhere = {source: page for page, source in ELSEWHERE.items()}
    if file in elsewhere:
        return elsewhere[file]
    if not file.startswith("docs/") or file.endswith(".py"):
        return None
    return file.removeprefix("docs/").replace(".ipynb", ".md")


def _target(target: str, page: str) -> str:
    """Redirect a link to the page that shows its file; a link to no file stays as it is."""
    path = Path(os.path.normpath(_home(page) / target))
    if not (path.is_file() and path.is_relative_to(ROOT)):
        return target
    file = path.relative_to(ROOT).as_posix()
    return os.path.relpath(_page_of(file) or f"files/{file}.md", Path(page).parent).replace(os.sep, "/")


def _loose(text: str) -> str:
    """Put a blank line before each list that follows a line of text, as GitHub takes it."""
    return re.sub(
        r"^(?![ \t]*(?:[-*+]|\d+\.) )(?![ \t]*$)(.+)\n(?=(?:[-*+]|\d+\.) )", r"\1\n\n", text, flags=re.MULTILINE
    )


# -- other files -------------------------------------------------------------------------------------------------------


def _source_page(file: str) -> str:
    """Return a file of the repository as a page, which the search leaves out."""
    kind = {".py": "python", ".toml": "toml", ".json": "json"}.get(Path(file).suffix, "text")
    text = (ROOT / file).read_text("utf-8")
    hidden = [
        "---",
        f"title: {Path(file).name}",
        "search:",
        "  exclude: true",
        "hide: [toc]",
        "---",
        "",
        f"# {file}",
        "",
    ]
    if file.endswith(".md"):
        return "\n".join(hidden[:-2]) + "\n" + text
    return "\n".join([*hidden, f"````{kind}", text.rstrip(), "````"]) + "\n"


def _notebook(path: Path) -> str:
    """Return a tutorial with its outputs as a page."""
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "markdown": lambda cell: "".join(cell["source"]),
        "code": lambda cell: "\n\n".join(
            [f"```python\n{''.join(cell['source'])}\n```", *map(_output, cell["outputs"])]
        ),
    }
    return "\n\n".join(shown[cell["cell_type"]](cell) for cell in json.loads(path.read_text("utf-8"))["cells"]) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(data.get('text/plain', output.get('traceback', ''))).rstrip()}\n```"
