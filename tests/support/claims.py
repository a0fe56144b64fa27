"""The claims ledger: what each paper says, what we measured at a small scale, against which baseline.

The `claim` fixture (`tests/conftest.py`) checks a claim and records it; this module turns the records into a table:

    FOVEATE_CLAIMS=.claims python -m pytest tests/systems
    python -m tests.support.claims .claims

With `--keep`, systems without a new record keep the rows that they have: for a run of some of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from foveate.core.catalog import ROOMS, System, systems

VARIABLE = "FOVEATE_CLAIMS"  # names the folder that records go to; unset: nothing is recorded
LEDGER = Path(__file__).parents[2] / "docs" / "claims.md"

HEAD = """\
# The claims ledger

What each system's paper says, checked here at a small scale against a named baseline. Each line is a test that fails
when the direction is wrong, by at least the margin where one is given. Written by `make claims`; do not edit.

Numbers are those of one run on one machine. They show a direction, not the paper's own figures.
"""

_COLUMNS = ("| system | claim | ours | baseline | better | seed | test |", "|---|---|--:|--:|---|--:|---|")
_ROW = re.compile(r"\| \[?(\w+)(?:\]\(| \|)")


@dataclass(frozen=True)
class Claim:
    """One claim and what was measured; `gain` is how much better ours is, in the unit of the measurement."""

    key: str
    statement: str
    ours: float
    baseline: float
    baseline_name: str
    better: Literal["higher", "lower"]
    margin: float
    seed: int | None
    test: str

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f'better={self.better!r} must be "higher" or "lower"')
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin!r} must be at least 0")

    @property
    def gain(self) -> float:
        return self.ours - self.baseline if self.better == "higher" else self.baseline - self.ours

    @property
    def holds(self) -> bool:
        """Strictly better, and by the margin; a NaN on either side is no evidence."""
        return self.gain > 0 and self.gain >= self.margin

    def __str__(self) -> str:
        by = f" by at least {self.margin:.4g}" if self.margin else ""
        return (
            f"{self.key}: {self.statement}: ours {self.ours:.4g}, {self.baseline_name} {self.baseline:.4g}; "
            f"ours should be {self.better}{by}"
        )


def record(claim: Claim, folder: Path) -> None:
    """Append a claim to the folder's records; test workers write to a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with (folder / f"{worker}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(claim)) + "\n")


def read(folder: Path) -> list[Claim]:
    """The folder's claims; of a test that ran more than once, the last."""
    found: dict[tuple[str, str, str], Claim] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text("utf-8").splitlines():
            claim = Claim(**json.loads(line))
            found[claim.test, claim.statement, claim.baseline_name] = claim
    return sorted(found.values(), key=lambda claim: (claim.test, claim.statement))


def kept(text: str) -> dict[str, list[str]]:
    """The rows of a ledger, by system."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if (row := _ROW.match(line)) and not line.startswith("| system |"):
            found.setdefault(row[1], []).append(line)
    return found


def ledger(claims: Iterable[Claim], rows: Iterable[System], old: Mapping[str, list[str]] | None = None) -> str:
    """The ledger in Markdown: a table for each room, systems in the catalogue's order.

    `old` has the rows of systems that have no claim here.
    """
    by_key: dict[str, list[Claim]] = {}
    for claim in claims:
        by_key.setdefault(claim.key, []).append(claim)
    rows = list(rows)
    strangers = sorted(by_key.keys() - {row.key for row in rows})
    if strangers:
        raise ValueError(f"claims of systems that the catalogue does not have: {', '.join(strangers)}")
    lines = {row.key: list(_lines(row, by_key[row.key])) for row in rows if row.key in by_key}
    lines = {**(old or {}), **lines}
    parts = [HEAD]
    for room in ROOMS:
        of_room = [line for row in rows if row.room == room for line in lines.get(row.key, [])]
        if of_room:
            parts.append("\n".join([f"## {room}\n", *_COLUMNS, *of_room]) + "\n")
    without = [f"`{row.key}`" for row in rows if row.key not in lines]
    if without:
        parts.append(f"Without a claim: {', '.join(without)}.\n")
    return "\n".join(parts)


def _lines(row: System, claims: list[Claim]) -> Iterator[str]:
    name = f"[{row.key}]({row.url} {json.dumps(row.title, ensure_ascii=False)})" if row.url else row.key
    for claim in claims:
        by = f", by {claim.margin:.3g}" if claim.margin else ""
        seed = "" if claim.seed is None else claim.seed
        path, _, test = claim.test.partition("::")
        baseline = f"{claim.baseline:.4g} ({_cell(claim.baseline_name)})"
        cells = (
            name, _cell(claim.statement), f"{claim.ours:.4g}", baseline, claim.better + by, seed,
            f"[{_cell(test)}](../{path})",
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.claims", description="Write the claims ledger from records."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(os.environ.get(VARIABLE, ".claims")))
    parser.add_argument("--out", type=Path, default=LEDGER)
    parser.add_argument("--keep", action="store_true", help="keep the rows of systems without a new record")
    options = parser.parse_args(arguments)
    claims = read(options.folder)
    if not claims:
        print(f"no claims recorded in {options.folder}: run the tests with {VARIABLE} set to it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    old = kept(options.out.read_text("utf-8")) if options.keep and options.out.is_file() else {}
    options.out.write_text(ledger(claims, systems(), old), "utf-8")
    print(f"{len(claims)} claims of {len({claim.key for claim in claims})} systems: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
