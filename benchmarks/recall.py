"""Recall against state: thirteen networks of equal size on multi-query associative recall, in one run.

    python benchmarks/recall.py            about an hour on one quiet core; a run that was stopped goes on

Each network is trained at three learning rates and stands in the figure at the one that suits it best. Keeps
docs/measured/recall/recall.json and prints the table; the last line is one of JSON, with each network's recall and
state by name.
"""

from __future__ import annotations

import json
from pathlib import Path

from foveate.bench.recall_figure import RESULTS, recall
from foveate.report import curves

DOCS = Path(__file__).parent.parent / "docs" / "measured" / "recall"


def main() -> None:
    def said(step: int, steps: int, note: str) -> None:
        if step % 200 == 0:
            print(f"{step}/{steps} {note}", flush=True)

    found = recall(out=DOCS, progress=said)
    title = f"Recall of {found.task['pairs']} pairs in {found.task['length']} tokens against state"
    curves.recall(found.best(), title, Path("foveate-recall.html"))
    print(f"{'network':22}{'recall':>9}{'state, bytes':>15}{'parameters':>13}{'rate':>8}{'seconds':>9}")
    for point in found.best():
        numbers = f"{point.accuracy:9.1%}{point.state_bytes:15,}{point.parameters:13,}"
        print(f"{point.label:22}{numbers}{point.rate:8g}{point.seconds:9.0f}")
    assert (DOCS / RESULTS).is_file()
    print(json.dumps({p.label: {"recall": round(p.accuracy, 4), "state_bytes": p.state_bytes} for p in found.best()}))


if __name__ == "__main__":
    main()
