"""The reference run of docs/real.md: two pretrained decoders under every cache policy. `make real` calls it.

`--quick` takes a few minutes and only shows its table. Without it everything is measured, which takes most of an hour
on two cores, and docs/real.md and docs/measured/real.json are written. Either takes up where it was interrupted. Parts
that are measured apart, with `--page`, get a page of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.real.fetch import MODELS, fetch
from foveate.bench.policies import plan
from foveate.bench.policies.run import run
from foveate.cli.console import Bar
from foveate.core.cache_folder import cache
from foveate.core.errors import FoveateError
from foveate.report import policies

DOCS = Path(__file__).parents[2] / "docs"


def out() -> Path:
    """Return the path of the journal: beside the models, outside the repository."""
    return cache() / "real" / "policies"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few minutes' worth; writes nothing under docs/")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run has left")
    parser.add_argument("--dtype", default="float32", help="what the models compute in (default: float32)")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one of them; both by default")
    parser.add_argument("--tasks", nargs="+", help="retrieval tasks, in the place of the plan's")
    parser.add_argument(
        "--losses", nargs="*", type=int, help="lengths of the texts of the next-token loss; none: no loss"
    )
    parser.add_argument("--times", nargs="*", type=int, help="lengths of the timed prompts; none: nothing is timed")
    parser.add_argument("--page", default="real", help="the page under docs/, and its numbers under docs/measured/")
    chosen = parser.parse_args()
    sizes, begun = plan.quick() if chosen.quick else plan.whole(), time.perf_counter()
    given = {name: getattr(chosen, name) for name in ("tasks", "losses", "times")}
    sizes = replace(sizes, **{name: tuple(value) for name, value in given.items() if value is not None})
    try:
        folders = [str(fetch(MODELS[key], say)) for key in chosen.model or MODELS]
        with Bar("loading") as bar:
            found = run(folders, sizes, out(), bar, dtype=chosen.dtype, fresh=chosen.fresh)
    except FoveateError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted: what is measured is kept in {out()}; run the same command to resume", file=sys.stderr)
        raise SystemExit(1) from None
    print(policies.short(found))
    if not chosen.quick:
        _write(chosen.page, found)
    print(f"\n{time.perf_counter() - begun:.0f} s; {'kept in ' + str(out()) if chosen.quick else 'written to docs/'}")


def _write(name: str, found: dict[str, Any]) -> None:
    """Write the numbers under docs/measured/, and the page, with its notes if there are any."""
    (DOCS / "measured" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    notes = DOCS / "measured" / f"{name}_notes.md"
    command = " ".join(["python benchmarks/real/reference.py", *sys.argv[1:]])
    made_by = f"`{command}` measured this; [measured/{name}.json](measured/{name}.json) has its numbers."
    text = policies.page(found, notes.read_text("utf-8") if notes.is_file() else "", made_by)
    (DOCS / f"{name}.md").write_text(text, "utf-8")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
