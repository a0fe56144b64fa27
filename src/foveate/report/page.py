"""Self-contained pages: their templates, the files inside them, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """Return the templates; all texts are escaped."""
    return Environment(
        loader=PackageLoader("foveate.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


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
