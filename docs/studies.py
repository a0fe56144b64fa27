"""`make studies`: run every study of the catalogue and write docs/studies.md: `python docs/studies.py [KEY ...]`.

A run's numbers and curves stay in docs/measured/studies/KEY.json; the page is written from these files. With keys, only
those studies run again. A study whose statements do not all hold ends the script with 1, after the page is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate.core.catalog import system, systems
from foveate.report.study import from_json, ledger, to_json
from foveate.studies.base.study import study_of

PAGE = Path(__file__).parent / "studies.md"
MEASURED = Path(__file__).parent / "measured" / "studies"
HEAD = """\
# Studies

A study is a paper's theorem or prediction as an experiment. Each line is one of the paper's statements in our words,
what it predicts for the experiment, what was measured here, and what would have to be measured for it to hold.
`foveate study KEY` runs one in under two minutes on two cores, and draws its curves. Written by `make studies`; do not
edit.

Numbers are those of one run on one machine, at small sizes.
"""


def text() -> str:
    """The page, from the files of the runs; a study without one is named at the end."""
    parts, without = [HEAD], []
    for row in systems("studies"):
        file = MEASURED / f"{row.key}.json"
        if file.is_file():
            parts.append("\n".join(ledger(row, from_json(file.read_text("utf-8")))) + "\n")
        else:
            without.append(f"`{row.key}`")
    if without:
        parts.append(f"Not measured yet: {', '.join(without)}.\n")
    return "\n".join(parts)


def main(keys: list[str]) -> int:
    failed = []
    MEASURED.mkdir(parents=True, exist_ok=True)
    for row in [system(key) for key in keys] or systems("studies"):
        found = study_of(row.key)().run()
        (MEASURED / f"{row.key}.json").write_text(to_json(row, found), "utf-8")
        print(found, f"{found.seconds:.0f} s", sep="\n")
        failed += [row.key] * (not found.holds)
    PAGE.write_text(text(), "utf-8")
    print(f"{PAGE}" + (f"; statements fail in {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
