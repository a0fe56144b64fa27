"""A study's report as one self-contained web page, as lines for a terminal, as JSON, and as a part of the ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.text import Text

from foveate._version import __version__
from foveate.bench.parts.plaindata import write_atomic
from foveate.core.catalog import System
from foveate.pages.skeleton import asset, environment, policy
from foveate.pages.text import visible
from foveate.studies.base.report import Finding, StudyReport

FORMAT = "foveate.study/1"


def write(row: System, report: StudyReport, path: str | os.PathLike, *, quick: bool = False) -> Path:
    """Write the page to `path`, and return the path. It has no scripts and loads nothing.

    Args:
        row: the system that the study belongs to.
        report: the run.
        path: the page's file.
        quick: the run had the small sizes of `Study.example`.
    """
    return write_atomic(path, render(row, report, quick=quick))


def render(row: System, report: StudyReport, *, quick: bool = False) -> str:
    """Return the page as text."""
    templates = environment("foveate.report")
    return templates.get_template("study.html.j2").render(
        policy=policy(()),
        style=Markup(asset(templates, "page.css")),
        scripts=(),
        row=row,
        held=sum(finding.holds for finding in report.findings),
        findings=[_shown(finding) for finding in report.findings],
        plots=[{"title": visible(plot.title), "svg": Markup(plot.svg())} for plot in report.plots],
        settings=_settings(row, report, quick),
    )


def to_json(row: System, report: StudyReport, *, quick: bool = False) -> str:
    """Return the report with the system's key and paper, and the command that repeats it."""
    found = {**_about(row, report, quick), **json.loads(report.to_json())}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> StudyReport:
    """Read the report in what `to_json` wrote."""
    found = json.loads(text)
    return StudyReport.from_json(json.dumps({name: found[name] for name in StudyReport.__dataclass_fields__}))


def lines(row: System, report: StudyReport) -> list[Any]:
    """Return the lines for a terminal: each statement, what it predicts, what was measured and whether it holds."""
    out: list[Any] = [Text.assemble((row.key, "bold"), f"  {row.title} ({row.year})"), ""]
    for finding in report.findings:
        shown, style = _shown(finding), "green" if finding.holds else "bold red"
        out.append(Text.assemble((shown["mark"], style), f" {shown['statement']}"))
        out.append(Text(f"  predicted  {shown['prediction']}", style="dim"))
        out.append(Text.assemble(("  measured   ", "dim"), f"{shown['measured']}; {shown['needed']} needed: ",
                                 (shown["verdict"], style)))  # fmt: skip
    held = sum(finding.holds for finding in report.findings)
    return [*out, "", f"{held} of {len(report.findings)} statements hold, seed {report.seed}"]


def ledger(row: System, report: StudyReport) -> list[str]:
    """Return the study's part of docs/studies.md: a heading, the run, and a table of its statements."""
    name = f"[{row.title}]({row.url})" if row.url else row.title
    made = f"Seed {report.seed}, {report.seconds:.0f} s: `{command(row, report)}`."
    out = [
        f"## {row.key}", "", f"{name}, {row.year}. {made}",
        "", "| statement | prediction | measured | needed | holds |", "|---|---|--:|--:|---|",
    ]  # fmt: skip
    for finding in report.findings:
        shown = _shown(finding)
        cells = (*(shown[name] for name in ("statement", "prediction", "measured", "needed")), _yes(finding))
        out.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return out


def command(row: System, report: StudyReport, quick: bool = False) -> str:
    """Return the command that repeats a run."""
    return f"foveate study {row.key} --seed {report.seed}{' --quick' * quick}"


def _yes(finding: Finding) -> str:
    return "yes" if finding.holds else "**no**"


def _shown(finding: Finding) -> dict[str, str]:
    return {
        "statement": visible(finding.statement), "prediction": visible(finding.prediction),
        "measured": f"{finding.measured:.4g} {visible(finding.unit)}".strip(), "needed": finding.needed,
        "verdict": "holds" if finding.holds else "fails", "mark": "✓" if finding.holds else "✗",
        "role": "right" if finding.holds else "wrong",
    }  # fmt: skip


def _about(row: System, report: StudyReport, quick: bool) -> dict[str, Any]:
    return {
        "format": FORMAT, "key": row.key, "title": row.title, "paper": row.url, "command": command(row, report, quick),
        "version": __version__, "holds": report.holds,
    }  # fmt: skip


def _settings(row: System, report: StudyReport, quick: bool) -> Mapping[str, str]:
    run = {"command": command(row, report, quick), "seconds": f"{report.seconds:g}", "foveate": __version__}
    options = {name: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
               for name, value in report.options.items()}  # fmt: skip
    return {visible(name): visible(value) for name, value in {**run, **options}.items()}
