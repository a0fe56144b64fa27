"""A table of the broken examples of each method whose looked-up slots had been dropped, with the heads that looked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from foveate.bench.comparison.columns import NOTHING, name_of, percent
from foveate.bench.comparison.results import Comparison, LookedUp, Row
from foveate.pages.text import visible

DROPPED = 0.5  # from this share of the looked-up mass on, an example's slots count as dropped
HEADS = 4  # heads that a table names
MEANING = (
    "An example is broken if the full cache solves it and the method does not. Looked up: the attention that the "
    "answer’s queries pay, in the full cache, to slots other than the first and the nearest ones. Dropped: the method "
    f"did not let the same head see the slot. An example’s slots count as dropped from {percent(DROPPED)} of that "
    "attention on. Heads are layer.head, counted from 0."
)


@dataclass(frozen=True)
class Loss:
    """The broken examples of one row.

    Args:
        row: the row.
        broken: its broken examples.
        dropped: how many of these had their looked-up slots dropped.
        share, share_solved: the mean share of the looked-up attention that was dropped, on broken and on solved
            examples.
        heads: the heads that looked up most on broken examples, with the share that was dropped there.
    """

    row: Row
    broken: int
    dropped: int
    share: float
    share_solved: float
    heads: list[tuple[str, float]]


def losses(comparison: Comparison) -> list[Loss]:
    """Summarise each row whose examples were read."""
    return [_loss(row) for row in comparison.rows if row.lost]


def _loss(row: Row) -> Loss:
    broken = [example for example in row.lost if not example.solved]
    shares = [example.dropped for example in broken]
    solved = [example.dropped for example in row.lost if example.solved]
    return Loss(
        row, len(broken), sum(share >= DROPPED for share in shares), _mean(shares), _mean(solved), _heads(broken)
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan


def _heads(examples: Sequence[LookedUp]) -> list[tuple[str, float]]:
    """Return the heads with the most attention to looked-up slots, and the share of it that was dropped."""
    mass: dict[str, list[tuple[float, float]]] = {}
    for example in examples:
        for head, (looked, dropped) in example.heads.items():
            if dropped is not None:
                mass.setdefault(head, []).append((looked, dropped))
    total = {head: sum(looked for looked, _ in each) for head, each in mass.items()}
    most = sorted((head for head in mass if total[head] > 0), key=lambda head: -total[head])[:HEADS]
    return [(head, sum(looked * dropped for looked, dropped in mass[head]) / total[head]) for head in most]


def sentence(loss: Loss, comparison: Comparison) -> str:
    """Say it in one sentence."""
    name = name_of(comparison, loss.row)
    if not loss.broken:
        return f"{name} broke no example that {visible(comparison.baseline)} solves."
    examples = f"{loss.broken} example{'' if loss.broken == 1 else 's'}"
    return (
        f"{name} broke {examples}; in {loss.dropped} of them it had dropped what {visible(comparison.baseline)} looked "
        f"up for the answer."
    )


def table(comparison: Comparison) -> Table:
    """Build the table for the terminal."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left")
    found.add_column("what was lost", no_wrap=True)
    for heading in HEADINGS[1:-1]:
        found.add_column(heading, justify="right")
    found.add_column(HEADINGS[-1])
    for loss in losses(comparison):
        found.add_row(*map(Text, cells(loss, comparison)))
    return found


HEADINGS = ("method", "broken", "slots dropped", "dropped, broken", "dropped, solved", "heads that looked (dropped)")


def cells(loss: Loss, comparison: Comparison) -> tuple[str, ...]:
    """Return a row's cells under `HEADINGS`."""
    heads = ", ".join(f"{visible(head)} ({percent(share)})" for head, share in loss.heads)
    share = f"{loss.dropped} of {loss.broken}" if loss.broken else NOTHING
    name = name_of(comparison, loss.row)
    return name, str(loss.broken), share, percent(loss.share), percent(loss.share_solved), heads or NOTHING


def content(comparison: Comparison) -> dict[str, Any] | None:
    """Return the values of the page; None if nothing was read."""
    found = losses(comparison)
    if not found:
        return None
    return {
        "meaning": MEANING,
        "headings": HEADINGS,
        "rows": [cells(loss, comparison) for loss in found],
        "examples": [
            (name_of(comparison, loss.row), [_example(example) for example in loss.row.lost if not example.solved])
            for loss in found
            if loss.broken
        ],
    }


def _example(example: LookedUp) -> dict[str, Any]:
    heads = [
        f"{visible(head)}: {looked:.2f}" + ("" if dropped is None else f", {percent(dropped)} dropped")
        for head, (looked, dropped) in list(example.heads.items())[:HEADS]
    ]
    slots = [visible(slot) for slot in example.slots]
    return {"number": example.example + 1, "dropped": percent(example.dropped), "slots": slots, "heads": heads}
