"""All runs of a folder on one page, and as a short table: what each method scored and cost at each date."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from foveate.bench.comparison.columns import NOTHING, between, listed, percent, plain_number, times
from foveate.bench.comparison.history import Past
from foveate.bench.comparison.results import LOSS
from foveate.bench.parts.plaindata import write_atomic
from foveate.pages.skeleton import asset, environment
from foveate.pages.text import visible

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write(runs: Sequence[Past], folder: Path, path: str | os.PathLike) -> Path:
    """Write the page, which has no scripts and loads nothing."""
    return write_atomic(path, render(runs, folder))


def render(runs: Sequence[Past], folder: Path) -> str:
    """Return the page as text: a table for each model, task and score, with a row for each method and budget."""
    templates = environment("foveate.report")
    return templates.get_template("history.html.j2").render(
        policy=_POLICY, style=Markup(asset(templates, "page.css")), count=len(runs), folder=visible(str(folder)),
        groups=[_group(title, some, folder) for title, some in _grouped(runs).items()],
    )  # fmt: skip


def table(runs: Sequence[Past], folder: Path) -> Table:
    """Build the table for the terminal, one line for each run."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("ended, UTC", "folder", "model", "task", "budgets", "full"):
        found.add_column(heading)
    found.add_column("best other", ratio=1)
    for run in runs:
        full, best = _baseline(run), _best(run)
        cells = (
            _date(run), _folder(run, folder), _text(run, "model"), _text(run, "task"),
            listed([percent(budget) for budget in run.settings.get("budgets") or []] or [NOTHING]),
            NOTHING if full is None else _score(run, full), NOTHING if best is None else _named(run, best),
        )  # fmt: skip
        found.add_row(*map(Text, cells))
    return found


def _grouped(runs: Sequence[Past]) -> dict[str, list[Past]]:
    """Group runs whose scores can be compared: the same model, task, length, examples and score."""
    found: dict[str, list[Past]] = {}
    for run in runs:
        length = run.settings.get("length")
        details = f"{run.settings.get('examples')} examples" + (f" of length {length:,}" if length else "")
        title = f"{_text(run, 'task')} on {_text(run, 'model')}: {details}, score “{_text(run, 'metric')}”"
        found.setdefault(title, []).append(run)
    return found


def _group(title: str, runs: Sequence[Past], folder: Path) -> dict[str, Any]:
    names: dict[tuple[str, float | None], None] = {}
    for run in runs:
        names.update(dict.fromkeys((row["method"], row["budget"]) for row in run.rows))
    heads = [{"date": _date(run), "folder": _folder(run, folder), "version": _version(run)} for run in runs]
    ordered = sorted(names, key=lambda name: (name[1] is not None, name[1] or 0))
    return {
        "title": title,
        "heads": heads,
        "rows": [{"name": _name(*name), "cells": [_cell(run, name) for run in runs]} for name in ordered],
    }


def _cell(run: Past, name: tuple[str, float | None]) -> dict[str, str] | None:
    row = next((row for row in run.rows if (row["method"], row["budget"]) == name), None)
    if row is None:
        return None
    if not row["answers"]:
        return {"score": NOTHING, "more": f"failed: {visible(row['error'])}"}
    shares = [
        f"{words} {percent(row[measure])}"
        for measure, words in (("cache_kept", "kept"), ("keys_read", "read"))
        if row[measure] is not None
    ]
    decode = row["ratios"].get("decode_ms")
    if decode is not None and decode[3]:
        shares.append(f"decode {times(decode[0])}")
    return {"score": _score(run, row), "more": ", ".join(shares)}


def _score(run: Past, row: dict[str, Any]) -> str:
    show = plain_number if run.settings.get("metric") == LOSS else percent
    if row["score"] is None:
        return NOTHING
    low_high = row["score_interval"]
    spread = between((low_high[0], low_high[1]), show) if low_high else ""
    return show(row["score"]) + (f" ({spread})" if spread else "")


def _baseline(run: Past) -> dict[str, Any] | None:
    return next((row for row in run.rows if row["method"] == run.settings.get("baseline")), None)


def _best(run: Past) -> dict[str, Any] | None:
    """Return the row with the best score, apart from the baseline; of equal ones that with the smallest cache."""
    sign = 1 if run.settings.get("metric") == LOSS else -1
    rows = [row for row in run.rows if row["score"] is not None and row is not _baseline(run)]
    return min(rows, key=lambda row: (sign * row["score"], row["cache_kept"] or 1.0), default=None)


def _named(run: Past, row: dict[str, Any]) -> str:
    return f"{_name(row['method'], row['budget'])}: {_score(run, row)}"


def _name(method: str, budget: float | None) -> str:
    return visible(method) + ("" if budget is None else f" at {percent(budget)}")


def _date(run: Past) -> str:
    return visible(run.date[:16].replace("T", " "))


def _folder(run: Past, folder: Path) -> str:
    return visible(str(run.folder.relative_to(folder)) if run.folder != folder else ".")


def _version(run: Past) -> str:
    return visible(f"foveate {(run.settings.get('versions') or {}).get('foveate', '')}".strip())


def _text(run: Past, name: str) -> str:
    return visible(str(run.settings.get(name)))
