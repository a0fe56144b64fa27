"""The comparison as one web page that stands alone: no request leaves it, and it still opens from a disk in years."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foveate.bench.comparison.results import LOSS, Comparison, Row
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.report.columns import cells, columns, megabytes, ordered, percent, visible
from foveate.report.figures import COSTS, figures
from foveate.report.headline import about, headline, headliner, notes, share_kept
from foveate.report.samples import by_example, choose, trim

ARXIV = re.compile(r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?")


def write(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Write the page of `comparison` to `path` and return it.

    About 5 MB, nearly all of it Plotly's script, which is inlined so that the page works offline. Every text in it that
    came from a prompt, a model or a user is escaped; a policy in the page forbids all network and all other scripts.
    """
    return write_atomic(path, render(comparison))


def render(comparison: Comparison) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("foveate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    scripts = [_plotly(), _asset(environment, "labels.js"), _asset(environment, "compare.js")]
    return environment.get_template("compare.html.j2").render(
        policy=_policy(scripts),
        style=Markup(_asset(environment, "compare.css")),
        scripts=[Markup(script) for script in scripts],
        **_content(comparison),
    )


def _content(comparison: Comparison) -> dict[str, Any]:
    """Everything that the template shows."""
    samples = choose(comparison)
    return {
        "comparison": comparison,
        "headline": headline(comparison),
        "about": about(comparison),
        "notes": notes(comparison),
        "lead": row.method if (row := headliner(comparison)) else "",
        "highlights": _highlights(comparison),
        "columns": columns(comparison),
        "rows": [_row(comparison, row, line) for row, line in zip(ordered(comparison), cells(comparison), strict=True)],
        "figures": figures(comparison),
        "samples": samples,
        "answered": len(by_example(comparison)),
        "settings": _settings(comparison),
    }


def _row(comparison: Comparison, row: Row, line: list) -> dict[str, Any]:
    """One method: its cells, and what its card says."""
    paper = row.options.get("arxiv")
    linked = isinstance(paper, str) and ARXIV.fullmatch(paper) is not None
    options = [(visible(str(name)), trim(_option(value))) for name, value in row.options.items()]
    return {
        "key": visible(row.method),
        "title": visible(row.title),
        "role": "baseline"
        if row.method == comparison.baseline
        else "lead"
        if row is headliner(comparison)
        else "other",
        "cells": line,
        "error": visible(row.error),
        "ran": bool(row.answers),
        "paper": paper if linked else None,
        "options": [option for option in options if not (linked and option[0] == "arxiv")] + _further(row),
    }


def _further(row: Row) -> list[tuple[str, Any]]:
    """What was measured and has no column: how the share kept differs by prompt, and the highest memory."""
    found = []
    kept = [answer.cache_kept for answer in row.answers if math.isfinite(answer.cache_kept)]
    if kept and percent(min(kept)) != percent(max(kept)):
        found.append(("cache kept", trim(f"{percent(min(kept))} to {percent(max(kept))} of a prompt’s")))
    if math.isfinite(row.peak_mb):
        found.append(("peak memory", trim(megabytes(row.peak_mb))))
    return found


def _highlights(comparison: Comparison) -> list[tuple[str, str]]:
    """The headline's method in a few large numbers: what is left of the baseline's score, cache, time and memory."""
    row = headliner(comparison)
    if row is None:
        return []
    what = "of the likelihood" if comparison.metric == LOSS else "of the score"
    shares = [(what, share_kept(comparison, row)), ("of the cache", row.cache_kept)]
    words = {"prefill_ms": "of the prefill time", "decode_ms": "of the decode time", "memory_mb": "of the memory"}
    shares += [(words[measure], comparison.ratio(row, measure)) for measure in COSTS]
    return [(percent(share), text) for text, share in shares if share is not None and math.isfinite(share)]


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    shown = {name: value for name, value in comparison.settings().items() if name not in ("versions", "baseline")}
    shown["budget"] = percent(comparison.budget)
    texts = {name: f"{value:,}" if name in ("examples", "length") and value else value for name, value in shown.items()}
    return [(name, visible(str(value))) for name, value in texts.items() if value is not None]


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def _asset(environment: Environment, name: str) -> str:
    """A file beside the template, as it is: it holds no placeholders."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    return get_plotlyjs().replace("\r\n", "\n")  # a browser hashes what its parser read, which has no carriage returns


def _policy(scripts: list[str]) -> str:
    """What the browser lets the page do: these scripts and no others, inline styles and images, no network at all."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
