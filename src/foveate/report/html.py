"""The comparison as one self-contained web page, which makes no requests and works from a disk."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foveate.bench.comparison.columns import cells, columns, megabytes, name_of, ordered, percent
from foveate.bench.comparison.results import LOSS, Comparison, Row
from foveate.bench.comparison.significance import findings
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.pages.skeleton import asset, environment, policy
from foveate.pages.text import visible
from foveate.report import lost, significance
from foveate.report.figures import COSTS, figures
from foveate.report.headline import about, headline, headliner, notes, share_kept
from foveate.report.samples import by_example, choose, trim

ARXIV = re.compile(r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?")


def write(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Write the page of `comparison` to `path`, and return the path.

    The page has about 5 MB, nearly all of it Plotly's script, which makes it work offline. All texts from prompts,
    models and users are escaped, and a content security policy forbids network access and other scripts.
    """
    return write_atomic(path, render(comparison))


def render(comparison: Comparison) -> str:
    """Return the page as text."""
    templates = environment("foveate.report")
    scripts = [_plotly(), asset(templates, "labels.js"), asset(templates, "compare.js")]
    return templates.get_template("compare.html.j2").render(
        policy=policy(scripts),
        style=Markup(asset(templates, "page.css")),
        scripts=[Markup(script) for script in scripts],
        **_content(comparison),
    )


def _content(comparison: Comparison) -> dict[str, Any]:
    """Return the values of the template."""
    samples, found = choose(comparison), findings(comparison)
    return {
        "comparison": comparison,
        "headline": headline(comparison),
        "about": about(comparison),
        "notes": notes(comparison),
        "lead": name_of(comparison, row) if (row := headliner(comparison)) else "",
        "highlights": _highlights(comparison),
        "columns": columns(comparison),
        "parts": [_part(comparison, part) for part in comparison.parts()],
        "cards": [_card(comparison, row) for row in ordered(comparison)],
        "statements": significance.statements(comparison, found),
        "contrasts": significance.tables(comparison, found),
        "lost": lost.content(comparison),
        "figures": figures(comparison),
        "samples": samples,
        "answered": len(by_example(comparison)),
        "settings": _settings(comparison),
    }


def _part(comparison: Comparison, part: Comparison) -> dict[str, Any]:
    """Return the table of one budget."""
    title = f"At {percent(part.budgets[0])} of the cache" if len(comparison.budgets) > 1 else ""
    rows = [_row(comparison, row, line) for row, line in zip(ordered(part), cells(part), strict=True)]
    return {"title": title, "rows": rows}


def _row(comparison: Comparison, row: Row, line: list) -> dict[str, Any]:
    """Return one method's cells."""
    role = "baseline" if row.method == comparison.baseline else "lead" if row is headliner(comparison) else "other"
    return {
        "key": visible(row.method), "role": role, "cells": line, "error": visible(row.error), "ran": bool(row.answers),
    }  # fmt: skip


def _card(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Return one method's details."""
    paper = row.options.get("arxiv")
    linked = isinstance(paper, str) and ARXIV.fullmatch(paper) is not None
    options = [(visible(str(name)), trim(_option(value))) for name, value in row.options.items()]
    return {
        "name": name_of(comparison, row),
        "title": visible(row.title),
        "error": visible(row.error),
        "paper": paper if linked else None,
        "options": [option for option in options if not (linked and option[0] == "arxiv")] + _further(row),
    }


def _further(row: Row) -> list[tuple[str, Any]]:
    """Return measurements without a column: the range of the kept share over prompts, and the peak memory."""
    found = []
    kept = [answer.cache_kept for answer in row.answers if math.isfinite(answer.cache_kept)]
    if kept and percent(min(kept)) != percent(max(kept)):
        found.append(("cache kept", trim(f"{percent(min(kept))} to {percent(max(kept))} of a prompt’s")))
    if math.isfinite(row.peak_mb):
        found.append(("peak memory", trim(megabytes(row.peak_mb))))
    return found


def _highlights(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the headline method's shares of the baseline's score, cache, times and memory, as large numbers."""
    row = headliner(comparison)
    if row is None:
        return []
    quality = "of the likelihood" if comparison.metric == LOSS else "of the score"
    shares = [(quality, share_kept(comparison, row)), ("of the cache", row.cache_kept)]
    words = {"prefill_ms": "of the prefill time", "decode_ms": "of the decode time", "memory_mb": "of the memory"}
    shares += [(words[measure], comparison.ratio(row, measure)) for measure in COSTS]
    return [(percent(share), text) for text, share in shares if share is not None and math.isfinite(share)]


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    shown = {name: value for name, value in comparison.settings().items() if name not in ("versions", "baseline")}
    shown["budgets"] = ", ".join(map(percent, comparison.budgets))
    texts = {name: f"{value:,}" if name in ("examples", "length") and value else value for name, value in shown.items()}
    return [(name, visible(str(value))) for name, value in texts.items() if value is not None]


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and needed only here

    return get_plotlyjs().replace("\r\n", "\n")  # a browser hashes the parsed script, without carriage returns
