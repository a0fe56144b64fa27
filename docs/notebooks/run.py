"""Run the tutorials and keep what they print: `python docs/notebooks/run.py [names]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 300


def run(path: Path, folder: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`; a cell that fails raises."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    for cell in book.cells:  # what differs between runs and says nothing
        cell.get("outputs", [])[:] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
    return book


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) < 2 or path.stem in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(run(path, folder), path)
            print(path.name)


if __name__ == "__main__":
    main()
