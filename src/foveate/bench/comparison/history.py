"""The earlier runs of a folder, each as one line of a file: settings, date, and the summary of each row.

`compare` replaces its results with those of the next run in the same folder. Its history stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from foveate.bench.comparison.results import MEASURES, Comparison, Row
from foveate.bench.parts.plaindata import plain
from foveate.core.errors import OptionError

HISTORY, RESULTS = "history.jsonl", "results.json"
FORMAT = "foveate.history/1"


@dataclass(frozen=True)
class Past:
    """One run.

    Args:
        folder: the folder of the run.
        date: when it ended, as ISO text in UTC.
        settings: those of `Comparison.settings`.
        rows: a summary of each row: method, budget, the measures, the score's interval, the ratios to the baseline, the
            number of answers and the error.
    """

    folder: Path
    date: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]


def record(comparison: Comparison, folder: Path, date: datetime | None = None) -> None:
    """Add a run to the folder's history; a run that repeats the last one, with the same results, adds nothing."""
    content = {"settings": comparison.settings(), "rows": [_summary(comparison, row) for row in comparison.rows]}
    file = folder / HISTORY
    last = _lines(file)[-1:]
    if last and {name: last[0].get(name) for name in content} == content:
        return
    now = (date or datetime.now(UTC)).isoformat(timespec="seconds")
    try:
        with file.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps({"format": FORMAT, "date": now, **content}) + "\n")
    except OSError as error:
        raise OptionError(f"cannot write {file}: {error.strerror or error}") from None


def runs(folder: Path) -> list[Past]:
    """Return all runs in a folder and the folders below it, in the order of their dates.

    A folder with results but without a history gives one run, with the date of its file.

    Raises:
        OptionError: if there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise OptionError(f"history={str(folder)!r} is no folder")
    found = [past for file in sorted(folder.rglob(HISTORY)) for past in _history(file)]
    found += [past for file in sorted(folder.rglob(RESULTS)) for past in _single(file)]
    if not found:
        raise OptionError(f"history={str(folder)!r} holds no run of `foveate compare`")
    return sorted(found, key=lambda past: past.date)


def _history(file: Path) -> Iterator[Past]:
    for line in _lines(file):
        yield Past(file.parent, line["date"], line["settings"], line["rows"])


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return a history's lines; a line that a killed run left incomplete, or of another format, is left out."""
    if not file.exists():
        return []
    found = []
    for text in file.read_text("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("format") == FORMAT:
            found.append(line)
    return found


def _single(file: Path) -> Iterator[Past]:
    """Yield the run of a results file without a history beside it; files of other programs give none."""
    if (file.parent / HISTORY).exists():
        return
    try:
        comparison = Comparison.load(file)
    except OptionError:
        return
    date = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    rows = [plain(_summary(comparison, row)) for row in comparison.rows]
    yield Past(file.parent, date, comparison.settings(), rows)


def _summary(comparison: Comparison, row: Row) -> dict[str, Any]:
    ratios = {name: comparison.paired(row, name) for name in MEASURES}
    return plain(
        {
            "method": row.method, "budget": row.budget, **{name: getattr(row, name) for name in MEASURES},
            "score_interval": row.score_interval, "answers": len(row.answers), "error": row.error,
            "ratios": {
                name: [*ratio, ratio.is_certain] for name, ratio in ratios.items() if ratio is not None
            },
        }
    )  # fmt: skip
