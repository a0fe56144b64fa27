"""Write every case of the corpus to a folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import tests.corpus.everything  # noqa: F401  registers the cases
from tests.corpus.cases import CASES, sound

if __name__ == "__main__":
    root = Path(sys.argv[1])
    base = sound(root / "sound")
    for case in CASES.values():
        folder = root / case.name
        folder.mkdir(parents=True)
        print(shlex.join(["foveate", "compare", *case.make(base, folder)]), "#", case.says or "runs")
