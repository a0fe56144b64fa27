"""Self-contained pages: their templates, the files inside them, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from foveate.pages.text import visible


def environment(package: str) -> Environment:
    """Return the templates of a package, beside those that all pages share; all texts are escaped."""
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("foveate.pages")]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["visible"] = visible
    return templates


def asset(templates: Environment, name: str) -> str:
    """Return a file of the templates unchanged; it has no placeholders."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def policy(scripts: Sequence[str]) -> str:
    """Return the content security policy: only these scripts, inline styles and images, and no network."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def framed(page: str, title: str, height: int = 760) -> str:
    """Return a page as a frame for notebooks; its styles and scripts stay inside, and it reaches nothing outside."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" title="{html.escape(title)}" sandbox="allow-scripts" '
        f'style="width:100%;height:{height}px;border:0"></iframe>'
    )
